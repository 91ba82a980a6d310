"""The tokenizer beside the shards: is it theirs, and what is taken over by `convert`."""

import json
import os

import pytest

from mypt_fast.cli import main
from mypt_fast.data.format import open_split
from mypt_fast.data.format.convert import convert
from mypt_fast.data.format.tokenizer_file import check_tokenizer, read_tokenizer
from mypt_fast.data.format.verify import verify_dataset
from mypt_fast.errors import DataError, IntegrityError
from mypt_fast.tokenizer import Tokenizer
from tests.data.prepared import build
from tests.data.shard_files import native_bytes, write_file

STATE = "tokenizer_state.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    text = write_file(folder / "text.txt", b"some words, and some more of them\n" * 40)
    build(folder / "set", text, tokenization="char", val_fraction=0.2, tokens_per_shard=500)
    return folder / "set"


@pytest.fixture
def dataset(prepared, tmp_path):
    """A copy of native shards that carry their tokenizer's digest."""
    for path in prepared.rglob("*"):
        if path.is_file():
            write_file(tmp_path / "set" / path.relative_to(prepared), path.read_bytes())
    return tmp_path / "set"


def test_the_tokenizer_that_made_the_shards_is_accepted(dataset):
    assert verify_dataset(dataset).shards > 2
    check_tokenizer(open_split(dataset, "train"), read_tokenizer(dataset), dataset)
    (dataset / STATE).unlink()
    verify_dataset(dataset, full=False)


@pytest.mark.parametrize("full", [True, False])
def test_another_tokenizer_is_refused(dataset, full):
    state = json.loads((dataset / STATE).read_text())
    state["chars"] = state["chars"][::-1]
    (dataset / STATE).write_text(json.dumps(state))
    said = rf"{STATE} of .*set; .* where shard train/shard_00000\.bin was made with"
    with pytest.raises(IntegrityError, match=said):
        verify_dataset(dataset, full)
    with pytest.raises(IntegrityError, match=said):
        check_tokenizer(open_split(dataset, "train"), state, dataset)
    with pytest.raises(IntegrityError, match=said):
        convert(dataset, dataset.parent / "out", "native")


def test_one_shard_of_another_tokenizer_is_found(dataset):
    other = native_bytes([1, 2, 3], [3], vocab_size=64)
    write_file(dataset / "val/shard_00009.bin", other)
    metadata = json.loads((dataset / "dataset_metadata.json").read_text())
    (dataset / "dataset_metadata.json").write_text(json.dumps({"format": metadata["format"]}))
    verify_dataset(dataset)  # it records no tokenizer
    shards = open_split(dataset, "train")
    object.__setattr__(shards[-1], "tokenizer", b"\1" * 32)
    with pytest.raises(IntegrityError, match=f"where shard {shards[-1].name} was made with 01010"):
        check_tokenizer(shards, read_tokenizer(dataset), dataset)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"{}", "token_kind"), (b"[1]", "token_kind"), (b"{", "not JSON"),
     (b"\xff", "not JSON"), (b"[" * 100_000, "not JSON")],
)  # fmt: skip
def test_a_state_that_is_none_is_found_also_beside_shards_without_a_digest(
    tmp_path, capsys, content, said
):
    write_file(tmp_path / "a/train/x.bin", native_bytes([1, 2]))
    write_file(tmp_path / "a" / STATE, content)
    assert main(["data", "verify", str(tmp_path / "a")]) == 3
    assert f"{STATE}; " in (err := capsys.readouterr().err)
    assert said in err
    with pytest.raises(IntegrityError, match=said):
        convert(tmp_path / "a", tmp_path / "b", "mypt")
    assert not (tmp_path / "b").exists()


def test_a_state_of_no_sane_size_is_not_read(tmp_path):
    write_file(tmp_path / "a/train/x.bin", native_bytes([1, 2]))
    with (tmp_path / "a" / STATE).open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(IntegrityError, match="more than 67108864 bytes"):
        convert(tmp_path / "a", tmp_path / "b", "mypt")


def test_a_link_out_of_the_dataset_copies_no_bytes(tmp_path):
    write_file(tmp_path / "a/train/x.bin", native_bytes([1, 2]))
    secret = write_file(tmp_path / "secret", b"-----BEGIN KEY-----")
    (tmp_path / "a" / STATE).symlink_to(secret)
    with pytest.raises(IntegrityError, match="not JSON"):
        convert(tmp_path / "a", tmp_path / "b", "mypt")
    assert not (tmp_path / "b").exists()
    secret.write_text(json.dumps(Tokenizer.gpt2().get_state()))
    convert(tmp_path / "a", tmp_path / "b", "mypt")
    assert not (tmp_path / "b" / STATE).is_symlink()
    assert read_tokenizer(tmp_path / "b") == Tokenizer.gpt2().get_state()


def test_a_pipe_in_its_place_is_refused_and_not_waited_for(tmp_path):
    write_file(tmp_path / "a/train/x.bin", native_bytes([1, 2]))
    os.mkfifo(tmp_path / "a" / STATE)
    with pytest.raises(DataError, match="not a regular file"):
        convert(tmp_path / "a", tmp_path / "b", "mypt")
