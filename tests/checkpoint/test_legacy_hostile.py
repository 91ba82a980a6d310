"""Old files that are damaged, wrong or hostile: one line, nothing executed, bounded memory."""

import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from mypt_fast.checkpoint import legacy
from mypt_fast.cli import main
from mypt_fast.errors import ConfigError, IntegrityError
from tests.checkpoint.old_files import CHAR, SIZES, OldGPT, old_bundle, single_file

KEY = "blocks.1.sa.heads.1.value.weight"


def weights(change=lambda w: None) -> dict:
    state = OldGPT(SIZES).state_dict()
    change(state)
    return state


# what is written, and what the one line has to name
WRONG = {
    "a missing key": (
        {"model_state_dict": weights(lambda w: w.pop(KEY))},
        [KEY, "is missing", "expected (8, 16)"],
    ),
    "a wrong shape": (
        {"model_state_dict": weights(lambda w: w.update({KEY: torch.zeros(4, 16)}))},
        [KEY, "expected (8, 16)", "found (4, 16)"],
    ),
    "a proj without its bias": (
        {"model_state_dict": weights(lambda w: w.pop("blocks.0.sa.proj.bias"))},
        ["blocks.0.sa.proj.bias is missing", "expected (16)"],
    ),
    "a newer layout": (
        {"model_state_dict": weights(lambda w: w.update({"blocks.0.moe.gate": torch.zeros(2)}))},
        ["blocks.0.moe.gate", "no weight of this architecture", "newer version"],
    ),
    "whole numbers for weights": (
        {"model_state_dict": weights(lambda w: w.update({KEY: torch.zeros(8, 16).long()}))},
        [KEY, "expected (8, 16)", "torch.int64"],
    ),
    "a string for a weight": (
        {"model_state_dict": weights(lambda w: w.update({KEY: "x"}))},
        [KEY, "expected (8, 16)", "found a str"],
    ),
    "other heads": ({"config": {**SIZES, "n_head": 4}}, ["expected n_head 4", "found 2"]),
    "other blocks": ({"config": {**SIZES, "n_layer": 3}}, ["expected n_layer 3", "found 2"]),
    "another vocabulary": (
        {"config": {**SIZES, "vocab_size": 17}},
        ["token_embedding_table.weight", "expected (17, 16)", "found (16, 16)"],
    ),
    "a million heads": (
        {"config": {**SIZES, "n_head": 4096, "n_embd": 4096, "n_layer": 1024}},
        ["expected 12582912 matrices of heads", "found"],
    ),
    "too many characters": (
        {"tokenizer": {"token_kind": "char", "chars": [*CHAR["chars"], "z"]}},
        ["tokenizer", "expected at most vocab_size 16", "found 17"],
    ),
    "gpt2 for a char model": ({"tokenizer": {"token_kind": "gpt2"}}, ["vocab_size 16", "50257"]),
    "an unknown tokenizer": ({"tokenizer": {"token_kind": "sp"}}, ["token_kind", "'sp'"]),
    "a list for a tokenizer": ({"tokenizer": [1]}, ["tokenizer", "list"]),
    "no config": ({"config": None}, ["config: expected a dict", "it is missing"]),
    "a list of weights": ({"model_state_dict": [1]}, ["model_state_dict", "found list"]),
    "a step that is no number": ({"step": "many"}, ["step", "whole number", "many"]),
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints/old"
    folder.mkdir(parents=True)
    return folder


def one_line(capsys, *words: str, code: int = 3) -> str:
    capsys.readouterr()
    assert main([*words]) == code
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if line.startswith("error: ")] == err[-1:]
    return err[-1]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_nothing_is_written(run: Path, capsys, case: str) -> None:
    changes, said = WRONG[case]
    path = single_file(run / "latest.pt", OldGPT(SIZES), SIZES, **changes)
    with pytest.raises(IntegrityError) as error:
        legacy.read(path)
    assert error.value.exit_code == 3
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 400
    for text in ("latest.pt", *said):
        assert text in line
    assert one_line(capsys, "convert", "--model_name", "old").startswith("error: ")
    assert [p.name for p in run.iterdir()] == ["latest.pt"]


@pytest.mark.parametrize("command", [["convert"], ["convert", "--dry_run"], ["inspect"],
                                     ["generate", "--device", "cpu"], ["train"]])  # fmt: skip
@pytest.mark.parametrize("damage", ["truncated", "empty", "junk", "flipped", "not a dict"])
def test_a_damaged_file_is_one_line_for_every_command(run, capsys, command, damage) -> None:
    path = single_file(run / "latest.pt", OldGPT(SIZES), SIZES)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        at = data.index(OldGPT(SIZES).lm_head.weight.detach().numpy().tobytes())
        data[at + 5] ^= 1
    content = {"truncated": data[:-200], "empty": b"", "junk": b"junk" * 99, "flipped": data}
    if damage == "not a dict":
        torch.save([1, 2], path)
    else:
        path.write_bytes(content[damage])
    before = path.read_bytes()
    if damage == "flipped" and command[0] in ("inspect", "train"):
        # they look at what it says, not at its weights: a trainer is stopped when it loads them
        with pytest.raises(IntegrityError, match="is damaged"):
            legacy.read(path)
        return
    assert "latest.pt" in one_line(capsys, *command, "--model_name", "old")
    assert path.read_bytes() == before
    assert [p.name for p in run.iterdir()] == ["latest.pt"]


class Bomb:
    """Pickles into a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["model_state_dict", "config", "tokenizer", "extra"])
@pytest.mark.parametrize("command", ["convert", "inspect", "generate", "train"])
def test_nothing_in_a_file_is_executed(run: Path, capsys, command: str, place: str) -> None:
    struck = run.parent / "struck"
    single_file(run / "latest.pt", OldGPT(SIZES), SIZES, **{place: {"x": Bomb(struck)}})
    assert "asks to call" in one_line(capsys, command, "--model_name", "old")
    assert not struck.exists()
    with pytest.raises(pickle.UnpicklingError):  # it is a bomb that others refuse as well
        torch.load(run / "latest.pt", weights_only=True)


class Mischief:
    """An object of another class than GPTConfig."""


class GPTConfig:
    """Named like MyPT's, with a state that is no dict of fields."""

    def __getstate__(self) -> object:
        return [1, 2]


@pytest.mark.parametrize(
    ("made", "said"), [(Mischief, "asks to make a"), (GPTConfig, "list where a dict belongs")]
)
def test_objects_are_refused_by_name(run: Path, capsys, made: type, said: str) -> None:
    single_file(run / "latest.pt", OldGPT(SIZES), made())
    assert said in one_line(capsys, "inspect", "old")


def test_a_bundle_of_the_era_with_wrong_weights_is_refused_before_it_is_touched(run, capsys):
    model = OldGPT({**SIZES, "n_layer": 1})
    old_bundle(run, model, SIZES)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    line = one_line(capsys, "convert", "--model_name", "old")
    assert "expected n_layer 2, found 1" in line
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_an_impossible_config_is_a_setting_that_cannot_be(run: Path) -> None:
    path = single_file(run / "latest.pt", OldGPT(SIZES), {**SIZES, "n_layer": -1})
    with pytest.raises(ConfigError, match="n_layer"):
        legacy.read(path)


def test_a_claim_of_terabytes_takes_no_memory(run: Path) -> None:
    """The pickle's sizes are compared with the records before memory is taken for them."""
    path = single_file(run / "latest.pt", OldGPT(SIZES), SIZES)
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    records[name] = records[name].replace(b"M\x00\x01", b"J\xff\xff\xff\x7f", 1)  # 256 -> 2^31
    assert b"J\xff\xff\xff\x7f" in records[name]
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(IntegrityError, match="claims 2147483647 values"):
        legacy.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB


def test_weights_of_another_shape_in_todays_bundle_are_named_with_both(run: Path, capsys) -> None:
    single_file(run / "latest.pt", OldGPT(SIZES), SIZES)
    assert main(["convert", "old"]) == 0
    (run / "manifest.json").unlink()
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"block_size": 12', '"block_size": 13'))
    line = one_line(capsys, "generate", "--model_name", "old", "--device", "cpu", code=2)
    for text in ("position_embedding_table.weight", "expected (13, 16)", "found (12, 16)"):
        assert text in line
