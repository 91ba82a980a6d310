import json
import os
from pathlib import Path

import numpy as np
import pytest

from mypt_fast.data.format import (
    METADATA,
    Shard,
    dataset_fingerprint,
    has_split,
    open_split,
    read_metadata,
)
from mypt_fast.data.format.source import open_source
from mypt_fast.errors import DataError, FormatError, IntegrityError
from tests.data.shard_files import describe, native_bytes, write_file


def listing(folder, split="train", **extra):
    return [
        {"name": f"{split}/{p.name}", "tokens": p.stat().st_size // 4, **extra}
        for p in sorted((folder / split).glob("*.bin"))
    ]


def test_shards_come_in_the_order_of_their_names_without_masks(dataset):
    folder = dataset([10, 0, 7])
    (folder / "train" / "shard_00000_mask.bin").write_bytes(b"odd")
    (folder / "train" / "notes.txt").write_text("not a shard")
    shards = open_split(folder, "train")
    assert shards[0].notice == "not read: 1 *_mask.bin in train/"
    assert [(s.name, s.n_tokens, s.width, s.offset) for s in shards] == [
        ("train/shard_00000.bin", 10, 4, 0),
        ("train/shard_00001.bin", 0, 4, 0),
        ("train/shard_00002.bin", 7, 4, 0),
    ]


def test_uint32_is_the_dtype_where_no_metadata_says_otherwise(dataset):
    folder = dataset([8])
    (folder / METADATA).unlink()
    assert read_metadata(folder) == {}
    assert open_split(folder, "train")[0].width == 4


def test_uint16_is_read_where_the_metadata_declares_it(dataset):
    (shard,) = open_split(dataset([9], width=2), "train")
    assert (shard.name, shard.width, shard.n_tokens, shard.offset) == (
        "train/shard_00000.bin", 2, 9, 0,
    )  # fmt: skip


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        open_split(tmp_path / "nowhere", "train")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        open_split(tmp_path / "file", "train")


def test_an_empty_directory_says_what_was_searched(tmp_path):
    with pytest.raises(DataError, match=r"no token shard; searched .*/train/\*\.bin"):
        open_split(tmp_path, "train")


def test_a_missing_split_can_be_asked_for(dataset):
    folder = dataset([10])
    assert has_split(folder, "train")
    assert not has_split(folder, "val")
    with pytest.raises(DataError, match="val split"):
        open_split(folder, "val")


@pytest.mark.parametrize(("width", "size"), [(2, 7), (4, 10), (4, 3)])
def test_a_size_that_is_no_whole_number_of_tokens_is_refused(dataset, width, size):
    folder = dataset([4], width=width)
    (folder / "train/shard_00000.bin").write_bytes(bytes(size))
    with pytest.raises(IntegrityError, match=f"shard_00000.bin; {size} bytes is not a multiple"):
        open_split(folder, "train")


def test_a_directory_in_place_of_a_shard_is_refused(dataset):
    folder = dataset([4])
    (folder / "train/shard_00001.bin").mkdir()
    with pytest.raises(DataError, match=r"shard_00001\.bin"):
        open_split(folder, "train")


def test_a_dangling_link_is_refused(dataset):
    folder = dataset([4])
    (folder / "train/shard_00001.bin").symlink_to(folder / "gone")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        open_split(folder, "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_shard_is_named(dataset):
    folder = dataset([4])
    (folder / "train/shard_00000.bin").chmod(0)
    with pytest.raises(DataError, match=r"shard_00000\.bin; cannot be read: Permission denied"):
        open_split(folder, "train")


def test_an_unreadable_shard_is_named_even_to_root(dataset, monkeypatch):
    folder = dataset([4])

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mypt_fast.data.format.files.os.open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        open_split(folder, "train")


def test_recorded_hashes_travel_with_the_shards(dataset):
    folder = dataset([10, 7])
    dataset([10, 7], shards=listing(folder, xxh3_128="ab" * 16))
    digests = [s.digest for s in open_split(folder, "train")]
    assert [digest[:41] for digest in digests] == ["ab" * 16 + "+sampled-"] * 2


@pytest.mark.parametrize("kind", ["mypt", "native"])
def test_a_recorded_hash_does_not_hide_another_file(dataset, kind):
    folder = dataset([40_000, 40_000])
    paths = sorted((folder / "train").iterdir())
    if kind == "native":
        for path, start in zip(paths, (0, 10_000), strict=True):
            path.write_bytes(native_bytes(range(start, start + 40_000), vocab_size=50_000))
        describe(folder, format="native")
    else:
        dataset([40_000, 40_000], shards=listing(folder, xxh3_128="ab" * 16))
    before = dataset_fingerprint(open_split(folder, "train"))
    with paths[0].open("r+b") as file:
        os.pwrite(file.fileno(), b"\5", 5000)  # a token, within the second sample
    changed = dataset_fingerprint(open_split(folder, "train"))
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    swapped = dataset_fingerprint(open_split(folder, "train"))
    assert len({before, changed, swapped}) == 3


def test_many_native_shards_are_known_by_their_headers_alone(tmp_path, monkeypatch):
    for i in range(3):
        path = tmp_path / f"train/shard_{i:05d}.bin"
        write_file(path, native_bytes(range(i, i + 10)))
    assert all("+sampled-" in s.digest for s in open_split(tmp_path, "train"))
    monkeypatch.setattr("mypt_fast.data.format.native_file.SAMPLED_SHARDS", 2)
    assert not any("sampled" in s.digest for s in open_split(tmp_path, "train"))


def test_a_shard_shorter_than_recorded_is_refused(dataset):
    folder = dataset([10, 7])
    dataset([10, 7], shards=listing(folder))
    os.truncate(folder / "train/shard_00001.bin", 24)
    with pytest.raises(IntegrityError, match=r"24 bytes, where .* says 7 tokens .* = 28"):
        open_split(folder, "train")


def test_a_missing_shard_is_refused(dataset):
    folder = dataset([10, 7])
    dataset([10, 7], shards=listing(folder))
    (folder / "train/shard_00000.bin").unlink()
    with pytest.raises(IntegrityError, match=r"missing: train/shard_00000\.bin"):
        open_split(folder, "train")


def test_a_shard_that_is_not_recorded_is_refused(dataset):
    folder = dataset([10, 7])
    dataset([10, 7], shards=listing(folder))
    (folder / "train/shard_00009.bin").write_bytes(bytes(8))
    with pytest.raises(IntegrityError, match=r"does not list: train/shard_00009\.bin"):
        open_split(folder, "train")


def test_splits_are_checked_against_their_own_records(dataset):
    folder = dataset([10])
    dataset([5], split="val")
    dataset([10], shards=listing(folder) + listing(folder, "val"))
    assert open_split(folder, "val")[0].n_tokens == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"dtype": "int8"}', "dtype .* 'int8'"),
        ('{"dtype": ["uint16"]}', "dtype"),
        ('{"vocab_size": -1}', "vocab_size"),
        ('{"vocab_size": "many"}', "vocab_size"),
        ('{"shards": {}}', "a dict, not a list"),
        ('{"shards": [3]}', "not an object"),
        ('{"shards": [{"name": "train/a.bin"}]}', "lacks"),
        ('{"shards": [{"name": "train/a.bin", "tokens": true}]}', "lacks"),
        ('{"shards": [{"name": "a", "tokens": 1, "xxh3_128": 5}]}', "xxh3_128"),
        ('{"shards": [{"name": "a", "tokens": 1, "xxh3_128": "\\ud800"}]}', "xxh3_128"),
        ('{"shards": [{"name": "train/%s", "tokens": 1}]}' % ("1" * 5000), "missing: train/111"),
        ('{"shards": [{"name": "a", "tokens": 1, "continues": 5}]}', "continues 5"),
        ('{"shards": [{"name": "a", "tokens": 1}, {"name": "a", "tokens": 1}]}', "twice"),
    ],
)
def test_metadata_that_cannot_be_trusted_is_refused(dataset, content, message):
    folder = dataset([4])
    (folder / METADATA).write_text(content)
    with pytest.raises(IntegrityError, match=message):
        open_split(folder, "train")


def test_metadata_of_no_sane_size_is_not_read(dataset, monkeypatch):
    folder = dataset([4])
    monkeypatch.setattr("mypt_fast.data.format.metadata._METADATA_LIMIT", 10)
    with pytest.raises(IntegrityError, match="more than 10 bytes"):
        read_metadata(folder)


def test_metadata_of_other_writers_is_accepted(dataset):
    folder = dataset([4], total_tokens=4, tokenization="gpt2", lineage={"x": 1}, vocab_size=50257)
    assert read_metadata(folder)["tokenization"] == "gpt2"
    assert open_split(folder, "train")[0].n_tokens == 4


def test_uint32_tokens_declared_uint16_are_refused(dataset):
    folder = dataset([4000])
    (folder / METADATA).write_text('{"dtype": "uint16"}')
    with pytest.raises(IntegrityError, match=r"declared uint16, .* look like uint32"):
        open_split(folder, "train")


@pytest.mark.parametrize("vocab_size", [None, 65, 50257])
def test_uint16_tokens_declared_uint32_are_refused(dataset, vocab_size):
    folder = dataset([4], vocab_size=vocab_size)
    tokens = np.random.default_rng(0).integers(20, vocab_size or 50257, 4000).astype("<u2")
    tokens.tofile(folder / "train/shard_00000.bin")
    with pytest.raises(IntegrityError, match=r"declared uint32, .* look like uint16"):
        open_split(folder, "train")


@pytest.mark.parametrize("width", [2, 4])
def test_tokens_that_are_all_zero_are_no_evidence(dataset, width):
    folder = dataset([4], width=width)
    (folder / "train/shard_00000.bin").write_bytes(bytes(4000))
    assert open_split(folder, "train")[0].n_tokens == 4000 // width


def test_a_few_ids_above_the_recorded_vocabulary_are_the_loaders_business(dataset):
    folder = dataset([70_000], vocab_size=60_000)
    assert open_split(folder, "train")[0].n_tokens == 70_000


def test_the_fingerprint_changes_with_what_identifies_the_data(tmp_path):
    base = [Shard(tmp_path / "train/a.bin", 4, 10), Shard(tmp_path / "train/b.bin", 4, 5)]
    elsewhere = [Shard(Path("/other/train") / s.path.name, 4, s.n_tokens) for s in base]
    assert dataset_fingerprint(base) == dataset_fingerprint(elsewhere)
    others = [
        base[::-1],
        base[:1],
        [base[0], Shard(base[1].path, 4, 6)],
        [base[0], Shard(base[1].path, 2, 5)],
        [base[0], Shard(base[1].path, 4, 5, digest="ff")],
        [base[0], Shard(tmp_path / "val/b.bin", 4, 5)],
    ]
    prints = {dataset_fingerprint(shards) for shards in [base, *others]}
    assert len(prints) == 1 + len(others)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


def test_what_is_written_as_json_is_read_back(dataset):
    folder = dataset([4], shards=[])
    assert read_metadata(folder) == json.loads((folder / METADATA).read_text())


def test_another_file_of_the_same_name_and_size_has_another_fingerprint(tmp_path):
    prints = set()
    for i, data in enumerate((bytes(40_000), bytes(39_999) + b"\1", b"\1" + bytes(39_999))):
        folder = tmp_path / str(i) / "train"
        folder.mkdir(parents=True)
        (folder / "shard_00000.bin").write_bytes(data)
        prints.add(dataset_fingerprint(open_split(folder.parent, "train")))
    assert len(prints) == 3


def test_a_name_that_is_no_text_has_a_fingerprint_too(tmp_path):
    (tmp_path / "train").mkdir()
    name = os.fsdecode(b"shard_\xff.bin")
    np.arange(10, dtype="<u4").tofile(tmp_path / "train" / name)
    assert len(dataset_fingerprint(open_split(tmp_path, "train"))) == 16


def test_the_fingerprint_of_mypts_shards_is_the_one_that_saved_runs_hold(tmp_path):
    (tmp_path / "train").mkdir()
    for i, n in enumerate((300_000, 7)):
        np.arange(n, dtype="<u4").tofile(tmp_path / f"train/shard_{i:05d}.bin")
    assert dataset_fingerprint(open_split(tmp_path, "train")) == "c5e59d148ea5f82d"
    describe(tmp_path, shards=listing(tmp_path, xxh3_128="ab" * 16))
    assert dataset_fingerprint(open_split(tmp_path, "train")) == "6de4f2df3cb59dc8"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"num_val_tokens": 5}, "0 tokens, where .* says 5"),
        ({"val_shards": 2}, r"0 shard\(s\), where .* says 2"),
        ({"shards": [{"name": "val/shard_00000.bin", "tokens": 5}]}, "1 shard.* missing: val/"),
    ],
)
def test_a_split_that_the_metadata_counts_and_that_is_gone_is_refused(dataset, metadata, said):
    folder = dataset([10])
    metadata.get("shards", []).extend(listing(folder))
    describe(folder, **metadata)
    with pytest.raises(IntegrityError, match=said):
        open_source(folder)
    with pytest.raises(IntegrityError, match=said):
        open_split(folder, "val")


@pytest.mark.parametrize("name", ["num_train_tokens", "train_shards"])
def test_a_split_of_other_sizes_than_counted_is_refused(dataset, name):
    folder = dataset([10, 7], **{name: 18})
    with pytest.raises(IntegrityError, match=r"train split .* where .* says 18"):
        open_split(folder, "train")
    dataset([10, 7], **{name: 2 if name == "train_shards" else 17})
    assert len(open_split(folder, "train")) == 2


def test_counts_that_are_no_counts_are_another_programs(dataset):
    folder = dataset([10], train_shards=["a", "b"], num_train_tokens=None, val_shards=True)
    assert list(open_source(folder).splits) == ["train"]


def test_the_hundred_thousandth_shard_comes_after_the_one_before_it(tmp_path):
    for number in (100_000, 99_999, 100_001):
        write_file(tmp_path / f"train/shard_{number:05d}.bin", bytes(4))
    names = [shard.path.stem for shard in open_split(tmp_path, "train")]
    assert names == ["shard_99999", "shard_100000", "shard_100001"]


def test_the_metadatas_list_gives_the_order(dataset):
    folder = dataset([10, 7, 3])
    dataset([10, 7, 3], shards=listing(folder)[::-1])
    assert [shard.n_tokens for shard in open_split(folder, "train")] == [3, 7, 10]


@pytest.mark.parametrize("name", ["._shard_00000.bin", ".x.swp.bin", ".bin"])
def test_hidden_files_are_no_tokens(dataset, name):
    folder = dataset([10])
    (folder / "train" / name).write_bytes(bytes(400))
    assert [s.n_tokens for s in open_split(folder, "train")] == [10]


def test_hidden_files_beside_flat_shards_are_no_tokens(tmp_path):
    write_file(tmp_path / "x_train_0.bin", native_bytes([1, 2]))
    write_file(tmp_path / "._x_train_0.bin", bytes(400))
    assert [s.name for s in open_split(tmp_path, "train")] == ["x_train_0.bin"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_name_of_both_splits_is_refused(tmp_path, split):
    write_file(tmp_path / "corpus_train_val_0.bin", native_bytes([1, 2]))
    with pytest.raises(FormatError, match=r"corpus_train_val_0\.bin names both splits"):
        open_split(tmp_path, split)


def test_metadata_is_parsed_once(dataset, monkeypatch):
    folder = dataset([10])
    dataset([5], split="val")
    seen = []
    loads = json.loads
    monkeypatch.setattr(
        "mypt_fast.data.format.metadata.json.loads", lambda raw: seen.append(raw) or loads(raw)
    )
    assert list(open_source(folder).splits) == ["train", "val"]
    assert len(seen) == 1


def test_metadata_of_17_mebibytes_is_not_parsed(dataset):
    folder = dataset([4])
    with (folder / METADATA).open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(IntegrityError, match="more than 16777216 bytes"):
        open_split(folder, "train")
