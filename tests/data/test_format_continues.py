"""Documents that run across shards are one document, in counts, in training and in copies."""

import json

import numpy as np
import pytest

from mypt_fast.cli import main
from mypt_fast.data.annotations import joined_ends
from mypt_fast.data.format import dataset_fingerprint, open_split
from mypt_fast.data.format.convert import convert
from mypt_fast.data.format.verify import verify_dataset
from mypt_fast.data.tokens import TokenCorpus
from tests.data.prepared import build
from tests.data.shard_files import describe, native_bytes, write_episodes, write_file

# Documents of 5, 4, 13 and 8 tokens in shards of 10: the third lies in all of them.
ENDS = [[5, 9, 10], [10], [2, 10]]
WHOLE = [5, 9, 22, 30]


def entries(names, continues=(False, True, True)):
    return [
        {"name": name, "tokens": 10} | ({"continues": True} if goes_on else {})
        for name, goes_on in zip(names, continues, strict=True)
    ]


@pytest.fixture
def dataset(tmp_path):
    folder, names = tmp_path / "set", [f"train/shard_{i:05d}.bin" for i in range(3)]
    for i, name in enumerate(names):
        write_file(folder / name, native_bytes(range(10 * i, 10 * i + 10), ENDS[i], vocab_size=30))
    return describe(folder, format="native", shards=entries(names))


def ends(folder):
    return joined_ends(open_split(folder, "train")).tolist()


def test_a_document_over_three_shards_ends_once(dataset):
    assert ends(dataset) == WHOLE
    corpus = TokenCorpus.from_dataset(dataset, "train")
    assert corpus.document_ends().tolist() == WHOLE
    both = TokenCorpus.from_datasets([dataset, dataset], "train")
    assert both.document_ends().tolist() == [*WHOLE, *(30 + end for end in WHOLE)]


def test_nothing_is_joined_where_the_metadata_does_not_say_so(dataset):
    (dataset / "dataset_metadata.json").unlink()
    assert ends(dataset) == [5, 9, 10, 20, 22, 30]


def test_a_shard_that_is_left_out_joins_no_strangers(dataset):
    middle = dataset / "train/shard_00001.bin"
    corpus = TokenCorpus.from_datasets([dataset], "train", without={middle})
    assert corpus.document_ends().tolist() == [5, 9, 10, 12, 20]


def test_an_empty_shard_in_between_changes_nothing(dataset):
    write_file(dataset / "train/empty.bin", native_bytes([], vocab_size=30))
    names = ["train/shard_00000.bin", "train/shard_00001.bin", "train/shard_00002.bin"]
    listed = entries(names)
    listed.insert(1, {"name": "train/empty.bin", "tokens": 0})
    describe(dataset, format="native", shards=listed)
    assert ends(dataset) == WHOLE


def test_inspect_counts_each_document_once(dataset, capsys):
    assert main(["data", "inspect", str(dataset)]) == 0
    assert "30 tokens, 4 documents, 3 shards" in capsys.readouterr().out


def test_what_belongs_together_is_part_of_the_fingerprint(dataset):
    before = dataset_fingerprint(open_split(dataset, "train"))
    names = [f"train/shard_{i:05d}.bin" for i in range(3)]
    describe(dataset, format="native", shards=entries(names, (False, True, False)))
    assert dataset_fingerprint(open_split(dataset, "train")) != before
    assert ends(dataset) == [5, 9, 20, 22, 30]


@pytest.mark.parametrize("target", ["native", "episodes", "megatron"])
def test_a_copy_keeps_documents_whole(dataset, tmp_path, target):
    convert(dataset, tmp_path / "out", target)
    verify_dataset(tmp_path / "out")
    assert ends(tmp_path / "out") == WHOLE
    metadata = json.loads((tmp_path / "out/dataset_metadata.json").read_text())
    kept = [entry.get("continues", False) for entry in metadata["shards"]]
    assert kept == ([False] if target == "megatron" else [False, True, True])


def test_episodes_over_shards_become_megatrons_documents(tmp_path):
    names = []
    for i, spans in enumerate(([(0, 4), (4, 6)], [(0, 10)], [(0, 10)])):
        write_episodes(tmp_path / f"a/train/shard_{i:05d}", range(10), spans)
        names.append(f"train/shard_{i:05d}/tokens.bin")
    describe(tmp_path / "a", shards=entries(names, (False, True, False)))
    assert ends(tmp_path / "a") == [4, 20, 30]
    convert(tmp_path / "a", tmp_path / "b", "megatron")
    assert ends(tmp_path / "b") == [4, 20, 30]


def test_what_prepare_cuts_into_shards_is_put_together_again(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i:02d}.txt").write_text(f"document {i} " * (i + 1))
    options = {"tokenization": "gpt2", "val_fraction": 0.2}
    metadata = build(tmp_path / "cut", tmp_path / "texts", tokens_per_shard=97, **options)
    build(tmp_path / "whole", tmp_path / "texts", tokens_per_shard=1 << 20, **options)
    for split in ("train", "val"):
        cut, whole = (open_split(tmp_path / name, split) for name in ("cut", "whole"))
        assert len(cut) > 3
        assert np.array_equal(joined_ends(cut), joined_ends(whole))
    assert main(["data", "inspect", str(tmp_path / "cut"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["splits"]
    assert shown["train"]["documents"] == metadata["num_train_documents"]
