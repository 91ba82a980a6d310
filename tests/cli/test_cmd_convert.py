"""`mypt-fast convert`, and old files in generate and inspect, as people use them."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from mypt_fast.checkpoint import bundle
from mypt_fast.checkpoint.converting import scan
from mypt_fast.cli import cmd_convert, main
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT
from tests.checkpoint.old_files import (
    GPT2,
    SIZES,
    OldGPT,
    batch,
    fifteen_state,
    old_bundle,
    single_file,
    trained,
)


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A run of 2025-11 at checkpoints/dante: latest.pt of step 3, final.pt of step 9."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints/dante"
    model, optimizer = trained(SIZES)
    single_file(folder / "latest.pt", model, SIZES, optimizer=optimizer, step=3)
    single_file(folder / "final.pt", OldGPT(SIZES, seed=9), SIZES, step=9)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


NEW = {
    "model.pt", "config.json", "tokenizer.json", "training_state.json", "manifest.json",
}  # fmt: skip


def test_a_file_becomes_a_bundle_beside_it(old: Path, capsys) -> None:
    before = files(old)
    assert main(["convert", "--model_name", "dante"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "latest.pt -> checkpoints/dante: step 3" in out
    (difference,) = re.findall(r"bundle read back: (\S+)", out)
    assert float(difference) < 1e-5
    assert "optimizer moments: taken over" in out
    assert names(old) == NEW | {"optimizer.pt", "latest.pt", "final.pt"}
    assert {n: files(old)[n] for n in before} == before
    assert names(old.parent) == {"dante"}
    saved = bundle.read(old)
    model = GPT(ModelConfig(**saved.config), seed=None)
    model.load_state_dict(saved.state_dict)
    idx, _ = batch(SIZES, 1)
    theirs, _ = trained(SIZES)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx), theirs(idx), atol=1e-5, rtol=0)
    assert json.loads((old / "config.json").read_text())["per_head_era"] is True


@pytest.mark.parametrize(
    "words",
    [["dante", "--checkpoint", "final.pt"], ["checkpoints/dante/final.pt"],
     ["--model-name", "dante", "--checkpoint", "final.pt"]],
)  # fmt: skip
def test_the_file_can_be_named(old: Path, capsys, words: list[str]) -> None:
    assert main(["convert", *words]) == 0
    assert json.loads((old / "training_state.json").read_text())["step"] == 9
    assert "none, they start at zero" in capsys.readouterr().out


def test_a_dry_run_loads_everything_and_writes_nothing(old: Path, capsys) -> None:
    before = files(old)
    assert main(["convert", "dante", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "can be converted: step 3" in out
    assert re.search(r"model built from it: \d\.\de-\d\d", out)
    assert files(old) == before
    assert names(old.parent) == {"dante"}
    (old / "latest.pt").write_bytes(before["latest.pt"][:-9000])
    assert main(["convert", "dante", "--dry_run"]) == 3


def test_a_bundle_is_replaced_only_when_that_is_said(old: Path, capsys, monkeypatch) -> None:
    assert main(["convert", "dante"]) == 0
    before = files(old)
    for words in ([], ["--yes"]):  # what was trained since is never undone unasked
        assert main(["convert", "dante", *words]) == 0
        assert "nothing to convert" in capsys.readouterr().out
    assert files(old) == before
    again = ["convert", "dante", "--checkpoint", "final.pt"]
    assert main(again) == 2
    assert "--yes replaces it" in capsys.readouterr().err
    for answer, code, step in (("n\n", 2, 3), ("\n", 2, 3), ("y\n", 0, 9)):
        monkeypatch.setattr(cmd_convert.sys, "stdin", Terminal(answer))
        assert main(again) == code
        assert "replace it with final.pt? [y/N]" in capsys.readouterr().err
        assert json.loads((old / "training_state.json").read_text())["step"] == step
        if code:
            assert files(old) == before
    assert (old / "model.pt.legacy").read_bytes() == before["model.pt"]
    assert (old / "optimizer.pt.legacy").read_bytes() == before["optimizer.pt"]
    monkeypatch.setattr(cmd_convert.sys, "stdin", None)
    assert main(["convert", "dante", "--checkpoint", "latest.pt", "--yes"]) == 0
    assert (old / "model.pt.legacy").read_bytes() == before["model.pt"]
    assert (old / "model.pt.legacy2").is_file()
    assert json.loads((old / "training_state.json").read_text())["step"] == 3


class Terminal:
    """A keyboard at which one line is typed."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.answer


def test_all_converts_what_can_be_and_names_what_cannot(old: Path, capsys) -> None:
    root = old.parent
    single_file(root / "only_final/final.pt", OldGPT(SIZES), SIZES)
    single_file(root / "named/epoch_3.pt", OldGPT(SIZES), SIZES)
    old_bundle(root / "december", OldGPT(SIZES, tril=False), SIZES)
    (root / "torn").mkdir()
    (root / "torn/latest.pt").write_bytes(b"junk")
    (root / "other").mkdir()
    torch.save({"a": torch.zeros(2)}, root / "other/vectors.pt")
    (root / ".hidden").mkdir()
    assert main(["convert", "--all", "--dry_run"]) == 3
    assert not list(root.glob("*/manifest.json"))
    capsys.readouterr()
    assert main(["convert", "--all"]) == 3
    out, err = capsys.readouterr()
    assert out.count("-> ") == 4
    assert "failed: checkpoints/torn: cannot read checkpoints/torn/latest.pt" in err
    done = {p.parent.name for p in root.glob("*/manifest.json")}
    assert done == {"dante", "only_final", "named", "december"}
    (root / "torn/latest.pt").unlink()
    assert main(["convert", "--all"]) == 0
    assert "nothing to convert" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone"], "runs here: dante"),
        (["dante", "--checkpoint", "gone.pt"], "found final.pt, latest.pt"),
        ([], "give a name"),
        (["dante", "--all"], "give a name"),
        (["--all", "--checkpoint", "a.pt"], "--checkpoint"),
        ([""], "no model"),
    ],
)
def test_what_is_not_there_is_named_and_leaves_nothing(old: Path, capsys, words, said) -> None:
    assert main(["convert", *words]) == 2
    assert said in capsys.readouterr().err
    assert names(old.parent) == {"dante"}
    assert names(old) == {"latest.pt", "final.pt"}


def test_a_failed_write_leaves_the_old_bundle_and_no_litter(old: Path, capsys, monkeypatch) -> None:
    folder = old_bundle(old.parent / "december", OldGPT(SIZES), SIZES)
    before = files(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.torch, "save", full)
    assert main(["convert", "december"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert files(folder) == before
    assert names(old.parent) == {"dante", "december"}


# reading without converting


def write(capsys, *words: str) -> tuple[str, str]:
    call = ["generate", "--model_name", "dante", "--device", "cpu", "--prompt", "abc",
            "--temperature", "0", "--max_new_tokens", "8", "--repeat_window", "0"]  # fmt: skip
    assert main([*call, *words]) == 0
    return capsys.readouterr()


def test_generate_reads_latest_then_final_or_the_named_file(old: Path, capsys) -> None:
    latest, _ = write(capsys)
    final, _ = write(capsys, "--legacy_checkpoint", "final.pt")
    assert latest != final
    assert write(capsys, "--legacy-checkpoint", "latest.pt")[0] == latest
    (old / "latest.pt").unlink()
    assert write(capsys)[0] == final


def test_a_bundle_hides_old_files_and_says_so_in_one_line(old: Path, capsys) -> None:
    latest, _ = write(capsys)
    assert main(["convert", "dante"]) == 0
    capsys.readouterr()
    assert write(capsys) == (latest, "")
    out, err = write(capsys, "--legacy_checkpoint", "final.pt")
    assert out == latest
    assert err == ("note: final.pt is not read: the bundle in checkpoints/dante comes before it\n")
    assert main(["inspect", "dante", "--legacy_checkpoint", "final.pt"]) == 0
    assert "final.pt is not read" in capsys.readouterr().err


def inspect(capsys, *words: str) -> str:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


def test_inspect_reads_final_then_latest_or_the_named_file(old: Path, capsys) -> None:
    out = inspect(capsys, "--model_name", "dante")
    assert "=== FORMAT ===\nLegacy single-file format\n" in out
    assert "per-head era" in out
    assert "batch_size:4, block_size:12, vocab_size:16, n_embd:16, n_head:2, n_layer:2" in out
    assert "kind      : char" in out
    assert "Last recorded training step: 9" in out
    n_params = sum(p.numel() for p in OldGPT(SIZES).parameters())
    assert f"Parameters: {n_params:,}" in out
    assert "training step: 3" in inspect(capsys, "dante", "--legacy_checkpoint", "latest.pt")
    (old / "final.pt").unlink()
    assert "training step: 3" in inspect(capsys, "dante", "--verify")
    report = json.loads(inspect(capsys, "dante", "--json"))
    assert (report["format"], report["per_head_era"], report["config"]) == ("legacy", True, SIZES)


def test_inspect_counts_the_parameters_of_an_old_bundle(old: Path, capsys) -> None:
    old_bundle(old.parent / "december", OldGPT(SIZES), SIZES)
    report = json.loads(inspect(capsys, "december", "--json"))
    assert report["total_params"] == sum(p.numel() for p in OldGPT(SIZES).parameters())
    assert (report["format"], report["per_head_era"]) == ("bundle", True)
    assert report["config"] == SIZES


def test_inspect_says_that_special_tokens_are_the_old_fifteen(old: Path, capsys) -> None:
    single_file(old.parent / "tags/final.pt", OldGPT(GPT2), GPT2, tokenizer=fifteen_state())
    out = inspect(capsys, "tags")
    assert "special   : 15 tokens, at the ids the weights were trained with" in out


def test_generate_without_any_checkpoint_makes_no_directory(old: Path, capsys) -> None:
    call = ["generate", "--device", "cpu", "--model_name", "nobody"]
    for words in ([], ["--legacy_checkpoint", "final.pt"]):
        assert main([*call, *words]) == 2
        assert capsys.readouterr().err.startswith("error: no ")
    assert names(old.parent) == {"dante"}


def test_a_pipe_named_as_a_checkpoint_is_none(old):
    """It would be read for ever."""
    pipes = old.parent / "pipes"
    (pipes / "folder.pt").mkdir(parents=True)
    for name in ("latest.pt", "other.pt"):
        os.mkfifo(pipes / name)
    assert [(folder.name, name) for folder, name in scan(old.parent)] == [("dante", "latest.pt")]
