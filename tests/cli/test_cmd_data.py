"""`mypt-fast data` from the command line: what is printed, and with which exit code."""

import json
import os

import numpy as np
import pytest

from mypt_fast.cli import main
from mypt_fast.data.format import dataset_fingerprint, open_split
from mypt_fast.tokenizer import Tokenizer
from tests.data.shard_files import describe, native_bytes, write_episodes, write_file


@pytest.fixture
def native(tmp_path):
    """A dataset of two native splits."""
    data = native_bytes(range(100), [40, 100], mask=[1] * 100, vocab_size=100, eot_id=99)
    for split in ("train", "val"):
        write_file(tmp_path / f"set/{split}/shard_00000.bin", data)
    return tmp_path / "set"


def fails(capsys, *argv, code=2):
    assert main(["data", *map(str, argv)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_inspect_shows_what_a_dataset_holds(native, capsys):
    assert main(["data", "inspect", str(native)]) == 0
    fingerprint = dataset_fingerprint(open_split(native, "train"))
    assert capsys.readouterr().out == "".join(
        f"{line}\n"
        for line in [
            f"dataset       {native}",
            "train         native, uint16: 100 tokens, 2 documents, 1 shard",
            f"  fingerprint {fingerprint}",
            "  ids         vocab_size 100, eot_id 99, max_token 99",
            "  planes      mask",
            "val           native, uint16: 100 tokens, 2 documents, 1 shard",
            f"  fingerprint {dataset_fingerprint(open_split(native, 'val'))}",
            "  ids         vocab_size 100, eot_id 99, max_token 99",
            "  planes      mask",
            "tokenizer     none beside the tokens, which training needs; if they are GPT-2's: "
            f"mypt-fast data convert {native} OUT --tokenization gpt2",
        ]
    )


def test_inspect_as_json_says_the_same(native, capsys):
    assert main(["data", "inspect", str(native), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["splits"]) == ["train", "val"]
    train = report["splits"]["train"]
    assert (train["format"], train["dtypes"], train["planes"]) == ("native", ["uint16"], ["mask"])
    assert (train["tokens"], train["documents"], train["shards"]) == (100, 2, 1)
    assert train["files"] == [{"name": "train/shard_00000.bin", "tokens": 100, "documents": 2}]


def test_inspect_tells_what_was_noticed(tmp_path, capsys):
    write_episodes(tmp_path / "train", range(20), [(0, 20)])
    write_episodes(tmp_path / "train/shard_00001", range(20), [(0, 20)])
    assert main(["data", "inspect", str(tmp_path)]) == 0
    assert "  note        the first shard lies beside" in capsys.readouterr().out


def test_verify_prints_what_it_read_and_how_fast(native, capsys):
    assert main(["data", "verify", str(native)]) == 0
    assert "headers, indexes and sizes are right (--full" in capsys.readouterr().out
    assert main(["data", "verify", str(native), "--full", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 shards, 200 tokens; verified 600 B in " in out
    assert out.endswith(" GB/s\n")


def test_verify_names_file_block_and_tokens_with_exit_code_3(native, capsys):
    path = native / "val/shard_00000.bin"
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff", 4099)
    assert main(["data", "verify", str(native)]) == 0  # tokens are not read
    capsys.readouterr()
    line = fails(capsys, "verify", native, "--full", code=3)
    assert f"shard {path}; block 0 (1 MiB; tokens 0 to 99) hashes to 0x" in line


def test_verify_compares_what_mypts_metadata_records(dataset, capsys):
    import xxhash

    folder = dataset([1000])
    data = (folder / "train/shard_00000.bin").read_bytes()
    entry = {"name": "train/shard_00000.bin", "tokens": 1000}
    describe(folder, shards=[entry | {"xxh3_128": xxhash.xxh3_128_hexdigest(data)}])
    assert main(["data", "verify", str(folder), "--full"]) == 0
    assert capsys.readouterr().err == ""
    with (folder / "train/shard_00000.bin").open("r+b") as file:
        os.pwrite(file.fileno(), b"\x05", 2000)
    line = fails(capsys, "verify", folder, "--full", code=3)
    assert "shard_00000.bin; XXH3-128 " in line
    assert "tokens 0 to 999" in line


@pytest.fixture
def dataset(tmp_path):
    def write(sizes):
        for i, n in enumerate(sizes):
            path = tmp_path / f"stream/train/shard_{i:05d}.bin"
            write_file(path, np.arange(n, dtype="<u4").tobytes())
        return tmp_path / "stream"

    return write


def test_verify_says_where_no_hash_is_recorded(dataset, capsys):
    assert main(["data", "verify", str(dataset([100, 100])), "--full"]) == 0
    assert "note: no hash is recorded for 2 of 2 shards" in capsys.readouterr().err


def test_a_token_beyond_the_vocabulary_is_damage_to_verify(dataset, capsys):
    folder = describe(dataset([100]), vocab_size=99)
    assert "token 99 at position 99 is not in [0, 99)" in fails(
        capsys, "verify", folder, "--full", code=3
    )


def test_convert_writes_and_says_what_it_left_out(native, tmp_path, capsys):
    line = fails(capsys, "convert", native, tmp_path / "x", "--format", "nanogpt")
    assert "cannot carry documents and mask; choose --format native or episodes" in line
    assert main(["data", "convert", str(native), str(tmp_path / "x"), "--format=nanogpt",
                 "--lossy"]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert err == "note: left out, as nanogpt cannot carry them: documents, mask\n"
    assert out.startswith(f"{tmp_path / 'x'}: 200 tokens as nanogpt, uint16, in ")
    assert np.fromfile(tmp_path / "x/train.bin", "<u2").tolist() == list(range(100))


def test_native_is_what_convert_writes_unless_told_otherwise(dataset, tmp_path, capsys):
    assert main(["data", "convert", str(dataset([50])), str(tmp_path / "x")]) == 0
    assert open_split(tmp_path / "x", "train")[0].format == "native"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["inspct", "x"], "invalid choice: 'inspct'"),
        (["inspect"], "PATH"),
        (["inspect", "x", "y"], "inspect with two paths"),
        (["convert", "x"], "convert with one path"),
        (["inspect", "x", "--full"], "--full with inspect; it is for verify"),
        (["verify", "x", "--json"], "--json with verify; it is for inspect"),
        (["verify", "x", "--workers", "0"], "--workers 0; out of range; use 1 to 256"),
        (["inspect", "x", "--lossy"], "--lossy with inspect; it is for convert"),
        (["verify", "x", "--tokenization", "gpt2"], "--tokenization with verify; it is for conv"),
        (["convert", "x", "y", "--format", "parquet"], "invalid choice: 'parquet'"),
        (["inspect", "nowhere"], "dataset nowhere; no such directory"),
        (["verify", "/dev/null"], "/dev/null; is a file"),
        (["inspect", ".", "--input_dtype", "uint16"], "it is for a single file"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *argv)


def test_a_file_without_a_magic_number_is_not_guessed(tmp_path, capsys):
    path = write_file(tmp_path / "x.bin", np.arange(100, dtype="<u2").tobytes())
    assert "name its --input_dtype, uint16 or" in fails(capsys, "inspect", path, code=3)
    assert main(["data", "inspect", str(path), "--input-dtype", "uint16"]) == 0
    assert "uint16: 100 tokens, documents not recorded, 1 shard" in capsys.readouterr().out


def test_a_hostile_name_reaches_no_terminal(tmp_path, capsys):
    folder = tmp_path / "\x1b[2J"
    write_file(folder / "train/a.bin", native_bytes([1]))
    assert main(["data", "inspect", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_nanogpts_tokens_become_a_dataset_to_train_on(tmp_path, capsys):
    for split in ("train", "val"):
        tokens = np.arange(100, 1100, dtype="<u2")
        write_file(tmp_path / f"nano/{split}.bin", tokens.tobytes())
    out = tmp_path / "out"
    assert main(["data", "convert", str(tmp_path / "nano"), str(out), "--tokenization=gpt2"]) == 0
    state = json.loads((out / "tokenizer_state.json").read_text())
    assert Tokenizer.from_state(state).get_state() == Tokenizer.gpt2().get_state() == state
    assert json.loads((out / "dataset_metadata.json").read_text())["tokenization"] == "gpt2"
    capsys.readouterr()
    assert main(["data", "inspect", str(out)]) == 0
    assert "\ntokenizer " not in capsys.readouterr().out
    line = fails(capsys, "convert", out, tmp_path / "again", "--tokenization", "gpt2")
    assert "it has a tokenizer_state.json, which is kept; leave the flag out" in line


def test_tokens_that_gpt2_does_not_have_get_no_tokenizer_of_it(dataset, tmp_path, capsys):
    folder = dataset([60_000])
    line = fails(capsys, "convert", folder, tmp_path / "x", "--tokenization", "gpt2")
    assert "it holds token 59999, GPT-2 has 50" in line
    assert not (tmp_path / "x").exists()


def test_a_file_by_itself_is_told_the_flag_and_no_metadata(tmp_path, capsys):
    path = write_file(tmp_path / "x.bin", np.arange(20, 2020, dtype="<u2").tobytes())
    line = fails(capsys, "verify", path, "--input_dtype", "uint32", code=3)
    assert "look like uint16; say --input_dtype uint16, or" in line
    write_file(path, bytes(6))
    line = fails(capsys, "verify", path, "--input_dtype", "uint32", code=3)
    assert "prepare the dataset again, or say --input_dtype uint16" in line
    assert "dataset_metadata" not in line
