"""Every format into every other: what the target can hold arrives, the rest is refused aloud."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
import xxhash

from mypt_fast.data.format import dataset_fingerprint, open_split, writers
from mypt_fast.data.format.convert import CARRIES, convert
from mypt_fast.data.format.source import open_source, read_blocks
from mypt_fast.data.format.verify import verify_dataset
from mypt_fast.errors import ChecksumError, DataError, IntegrityError, TokenRangeError
from tests.data.shard_files import (
    describe,
    llmc_bytes,
    megatron_bytes,
    native_bytes,
    write_episodes,
    write_file,
)

RNG = np.random.default_rng(3)
SIZES = (3001, 1, 2500)
PARTS = [RNG.integers(0, 50257, n) for n in SIZES]
ENDS = [[5, 6, 2999, 3001], [1], [2500]]
MASKS = [RNG.integers(0, 2, n) for n in SIZES]
SEGMENTS = [RNG.integers(0, 256, n) for n in SIZES]
WEIGHTS = [RNG.random(n, "<f4") for n in SIZES]


def make(folder, kind):
    """A dataset of PARTS in train and its first part in val, with all that `kind` can carry."""
    for split, parts in (("train", PARTS), ("val", PARTS[:1])):
        for i, tokens in enumerate(parts):
            path = folder / split / f"shard_{i:05d}.bin"
            if kind == "native":
                data = native_bytes(
                    tokens, ENDS[i], mask=MASKS[i], segments=SEGMENTS[i], vocab_size=50257, eot_id=7
                )
                write_file(path, data)
            elif kind == "mypt":
                write_file(path, tokens.astype("<u4").tobytes())
            elif kind == "llmc":
                write_file(path, llmc_bytes(tokens, 4))
            elif kind == "episodes":
                spans = np.stack([[0, *ENDS[i][:-1]], np.diff([0, *ENDS[i]])], 1)
                write_episodes(
                    path.with_suffix(""), tokens, spans,
                    mask=MASKS[i], weights=WEIGHTS[i], segments=SEGMENTS[i],
                )  # fmt: skip
            elif kind == "megatron":
                for suffix, data in zip(
                    (".bin", ".idx"), megatron_bytes(np.split(tokens, ENDS[i][:-1])), strict=True
                ):
                    write_file(path.with_suffix(suffix), data)
        if kind == "nanogpt":
            write_file(folder / f"{split}.bin", np.concatenate(parts).astype("<u2").tobytes())
    return folder


def content(folder, split="train"):
    """Everything of a split in one piece: tokens, document ends, planes."""
    shards = open_split(folder, split)
    blocks = [block for shard in shards for block in read_blocks(shard)]
    begins = np.cumsum([0] + [s.n_tokens for s in shards])
    ends = [
        (s.document_ends() + np.uint64(b)).tolist()
        for s, b in zip(shards, begins[:-1], strict=True)
        if s.documents
    ]
    planes = {
        plane.kind: np.concatenate([s.read_plane(plane.kind) for s in shards]).tolist()
        for plane in shards[0].planes
    }
    return (
        np.concatenate([b.tokens for b in blocks]).tolist(),
        [e for part in ends for e in part],
        planes,
    )


KINDS = tuple(CARRIES)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_becomes_every_other(tmp_path, kind, target):
    source = make(tmp_path / "a", kind)
    done = convert(source, tmp_path / "b", target, lossy=True)
    assert done.tokens == sum(SIZES) + SIZES[0]
    assert not verify_dataset(tmp_path / "b").unhashed
    for split in ("train", "val"):
        tokens, ends, planes = content(source, split)
        got_tokens, got_ends, got_planes = content(tmp_path / "b", split)
        assert got_tokens == tokens
        carried = CARRIES[target]
        if "documents" in carried and ends:
            assert got_ends == ends
        assert got_planes == {k: v for k, v in planes.items() if k in carried}
    assert {s.format for s in open_split(tmp_path / "b", "train")} == {target}
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("kind", ["native", "episodes"])
def test_there_and_back_gives_the_same_files(tmp_path, kind):
    first = convert(make(tmp_path / "a", kind), tmp_path / "b", kind).out
    convert(first, tmp_path / "c", kind)
    files = [p.relative_to(first) for p in first.rglob("*") if p.is_file()]
    assert len(files) > 4
    for name in files:
        assert (first / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def test_the_native_writer_makes_the_bytes_that_the_layout_describes(tmp_path):
    out = convert(make(tmp_path / "a", "native"), tmp_path / "b", "native").out
    for path in (tmp_path / "a").rglob("*.bin"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "a")).read_bytes()


def test_megatron_and_llmc_writers_make_the_bytes_of_their_originals(tmp_path):
    documents = [[1, 2, 3], [4], [5, 6]]
    data, index = megatron_bytes(documents)
    write_file(tmp_path / "a/train.bin", data)
    write_file(tmp_path / "a/train.idx", index)
    convert(tmp_path / "a", tmp_path / "b", "megatron")
    assert (tmp_path / "b/train.bin").read_bytes() == data
    assert (tmp_path / "b/train.idx").read_bytes() == index
    for dtype, width in (("uint16", 2), ("uint32", 4)):
        convert(tmp_path / "a", tmp_path / dtype, "llmc", dtype=dtype, lossy=True)
        expected = llmc_bytes([1, 2, 3, 4, 5, 6], width)
        assert (tmp_path / dtype / "train_000000.bin").read_bytes() == expected


@pytest.mark.parametrize(
    ("kind", "target", "lost", "able"),
    [
        ("native", "nanogpt", "documents and mask and segments", "native or episodes"),
        ("native", "megatron", "mask and segments", "native or episodes"),
        ("episodes", "native", "weights", "episodes"),
        ("megatron", "llmc", "documents", "native or episodes or megatron"),
    ],
)
def test_nothing_is_lost_without_being_asked_for(tmp_path, kind, target, lost, able):
    make(tmp_path / "a", kind)
    with pytest.raises(DataError, match=f"cannot carry {lost}; choose --format {able}, or pass"):
        convert(tmp_path / "a", tmp_path / "b", target)
    assert not (tmp_path / "b").exists()
    done = convert(tmp_path / "a", tmp_path / "b", target, lossy=True)
    assert done.notes[0] == (
        f"left out, as {target} cannot carry them: {lost.replace(' and ', ', ')}"
    )


@pytest.mark.parametrize("spans", [[(0, 4), (5, 5)], [(0, 9)], [(0, 4), (4, 0), (4, 6)]])
@pytest.mark.parametrize("target", ["episodes", "native"])
def test_gaps_between_episodes_and_empty_ones_do_not_vanish_silently(tmp_path, spans, target):
    write_episodes(tmp_path / "a/train", range(10), spans)
    with pytest.raises(DataError, match="cannot carry gaps and empty documents; pass --lossy to l"):
        convert(tmp_path / "a", tmp_path / "b", target)
    convert(tmp_path / "a", tmp_path / "b", target, lossy=True)
    assert content(tmp_path / "b")[:2] == content(tmp_path / "a")[:2]


def test_empty_documents_of_megatron_do_not_vanish_silently(tmp_path):
    for suffix, data in zip((".bin", ".idx"), megatron_bytes([[1], [], [2]]), strict=True):
        write_file(tmp_path / f"a/train{suffix}", data)
    with pytest.raises(DataError, match="cannot carry gaps and empty documents"):
        convert(tmp_path / "a", tmp_path / "b", "native")


def test_widths_follow_the_vocabulary(tmp_path):
    make(tmp_path / "a", "mypt")
    assert convert(tmp_path / "a", tmp_path / "native", "native").width == 2
    assert convert(tmp_path / "a", tmp_path / "mypt", "mypt").width == 4
    assert convert(tmp_path / "a", tmp_path / "u16", "mypt", dtype="uint16").width == 2
    assert open_split(tmp_path / "u16", "val")[0].width == 2
    describe(tmp_path / "a", vocab_size=70_000)
    assert convert(tmp_path / "a", tmp_path / "wide", "native").width == 4
    assert open_split(tmp_path / "wide", "train")[0].vocab_size == 70_000


@pytest.mark.parametrize(
    ("target", "options", "limit"),
    [
        ("nanogpt", {}, 1 << 16),
        ("llmc", {"dtype": "uint16"}, 1 << 16),
        ("native", {"dtype": "uint16"}, 1 << 16),
        ("megatron", {}, 1 << 31),
    ],
)
def test_an_id_that_does_not_fit_is_refused_with_its_position(tmp_path, target, options, limit):
    write_file(tmp_path / "a/train/x.bin", native_bytes([1, 2, limit, 4], width=4))
    with pytest.raises(TokenRangeError, match=rf"token {limit} at position 2 .* \[0, {limit}\)"):
        convert(tmp_path / "a", tmp_path / "b", target, **options)
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_int64_ids_become_narrow_ones(tmp_path):
    for suffix, data in zip(
        (".bin", ".idx"), megatron_bytes([[1, 2], [70_000]], "<i8"), strict=True
    ):
        write_file(tmp_path / f"a/train{suffix}", data)
    assert convert(tmp_path / "a", tmp_path / "b", "native").width == 4
    assert content(tmp_path / "b") == ([1, 2, 70_000], [2, 3], {})


def test_a_damaged_source_is_not_converted(tmp_path):
    make(tmp_path / "a", "native")
    with (tmp_path / "a/train/shard_00002.bin").open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff\xff", 4096 + 100)
    with pytest.raises(ChecksumError, match=r"shard_00002\.bin; block 0"):
        convert(tmp_path / "a", tmp_path / "b", "native")
    assert not (tmp_path / "b").exists()


def test_a_source_that_changes_after_the_check_leaves_nothing(tmp_path, monkeypatch):
    make(tmp_path / "a", "native")

    def fail(writer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.NativeWriter, "finish", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "a", tmp_path / "b", "native")
    assert os.listdir(tmp_path) == ["a"]


def test_an_output_that_is_taken_is_refused(tmp_path):
    make(tmp_path / "a", "mypt")
    write_file(tmp_path / "b/mine.txt", b"keep")
    with pytest.raises(DataError, match="is not an empty folder"):
        convert(tmp_path / "a", tmp_path / "b", "native")
    with pytest.raises(DataError, match="is no folder; create it first"):
        convert(tmp_path / "a", tmp_path / "no/b", "native")
    with pytest.raises(DataError, match="lies within what is read"):
        convert(tmp_path / "a", tmp_path / "a/b", "native")
    assert (tmp_path / "b/mine.txt").read_bytes() == b"keep"


def test_metadata_and_tokenizer_travel(tmp_path):
    make(tmp_path / "a", "mypt")
    state = {"token_kind": "gpt2", "chars": None, "base_vocab_size": 50257}
    (tmp_path / "a/tokenizer_state.json").write_text(json.dumps(state))
    describe(tmp_path / "a", tokenization="gpt2", vocab_size=50257, total_tokens=1, lineage=[1])
    convert(tmp_path / "a", tmp_path / "b", "native")
    metadata = json.loads((tmp_path / "b/dataset_metadata.json").read_text())
    assert {k: metadata[k] for k in ("format", "dtype", "tokenization", "lineage")} == {
        "format": "native", "dtype": "uint16", "tokenization": "gpt2", "lineage": [1],
    }  # fmt: skip
    assert metadata["total_tokens"] == sum(SIZES) + SIZES[0]
    assert metadata["num_val_tokens"] == SIZES[0]
    assert metadata["shards"][0]["xxh3_128"] == xxhash.xxh3_128_hexdigest(
        PARTS[0].astype("<u2").tobytes()
    )
    assert json.loads((tmp_path / "b/tokenizer_state.json").read_text()) == state


def test_a_single_file_becomes_a_train_split(tmp_path):
    write_file(tmp_path / "x.bin", PARTS[0].astype("<u2").tobytes())
    convert(tmp_path / "x.bin", tmp_path / "b", "native", input_dtype="uint16")
    assert content(tmp_path / "b")[0] == PARTS[0].tolist()


def test_long_documents_become_several_megatron_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_SEQUENCE", 1000)
    convert(make(tmp_path / "a", "megatron"), tmp_path / "b", "megatron")
    assert content(tmp_path / "b")[:2] == content(tmp_path / "a")[:2]
    head = struct.unpack_from("<9sQBQQ", (tmp_path / "b/train.idx").read_bytes())
    assert head[3:] == (10, 7)  # 2993 and 2500 tokens are three sequences each


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    tokens = np.tile(np.arange(50_000), 240)  # 12 M tokens, 24 MB
    write_file(tmp_path / "a/train/x.bin", native_bytes(tokens, [12_000_000]))
    del tokens
    tracemalloc.start()
    convert(tmp_path / "a", tmp_path / "b", "native", workers=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 14 << 20
    first, second = (open_split(tmp_path / name, "train") for name in "ab")
    assert first[0].n_tokens == second[0].n_tokens == 12_000_000


def test_a_shard_of_several_blocks_is_hashed_block_by_block(tmp_path):
    tokens = RNG.integers(0, 60_000, 1_300_000)
    data = native_bytes(tokens, [1_300_000])
    write_file(tmp_path / "a/train/shard_00000.bin", data)
    convert(tmp_path / "a", tmp_path / "b", "native")
    assert (tmp_path / "b/train/shard_00000.bin").read_bytes() == data


def test_the_fingerprint_of_a_copy_is_the_originals(tmp_path):
    make(tmp_path / "a", "native")
    convert(tmp_path / "a", tmp_path / "b", "native")
    a, b = (dataset_fingerprint(open_source(tmp_path / x).splits["train"]) for x in "ab")
    assert a == b


@pytest.mark.parametrize("target", KINDS)
def test_a_file_that_is_missing_afterwards_is_found(tmp_path, target):
    done = convert(make(tmp_path / "a", "mypt"), tmp_path / "b", target)
    metadata = json.loads((done.out / "dataset_metadata.json").read_text())
    shards = [shard for split in ("train", "val") for shard in open_split(done.out, split)]
    assert [entry["name"] for entry in metadata["shards"]] == [shard.name for shard in shards]
    shards[-1].path.unlink()
    with pytest.raises((IntegrityError, DataError), match="val"):
        verify_dataset(done.out)


@pytest.mark.parametrize("target", ["llmc", "episodes", "megatron", "nanogpt"])
def test_a_byte_that_changed_in_what_was_written_is_found(tmp_path, target):
    convert(make(tmp_path / "a", "mypt"), tmp_path / "b", target)
    path = open_split(tmp_path / "b", "train")[-1].path
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        last = file.read(1)
        file.seek(-2, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises((ChecksumError, TokenRangeError), match=path.name):
        verify_dataset(tmp_path / "b")
