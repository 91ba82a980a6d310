"""`mypt-fast verify` names what differs; `verify-resume` proves that a run continues."""

from pathlib import Path

import pytest
import torch
from conftest import events

from mypt_fast.checkpoint.snapshots import snapshots
from mypt_fast.cli import main
from mypt_fast.training.trainer import Trainer


@pytest.fixture
def trained(train, capsys) -> Path:
    """A finished run of 12 steps whose snapshot is of step 10."""
    assert train("a", "--eval_interval", "5") == 0
    capsys.readouterr()
    return Path("checkpoints/a")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_verify_hashes_files_and_tensors_of_run_and_snapshots(trained, capsys) -> None:
    assert main(["verify", "a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["checkpoints/a", str(snapshots(trained)[0])]
    n_tensors = len(torch.load(trained / "model.pt", weights_only=True)["state_dict"])
    state = torch.load(trained / "optimizer.pt", weights_only=True)["state"]
    assert f"6 files and {n_tensors + 3 * len(state)} tensors have their hashes" in lines[0]


def test_verify_names_member_and_tensor(trained, capsys) -> None:
    for name, tensor in (("model.pt", "lm_head.weight"), ("optimizer.pt", "state.3.exp_avg")):
        content = torch.load(trained / name, weights_only=True)
        value = content.get("state_dict", content)
        for key in [tensor] if name == "model.pt" else tensor.split("."):
            value = value[int(key) if key.isdigit() else key]
        raw = value.numpy().tobytes()
        at = (trained / name).read_bytes().index(raw)
        flip(trained / name, at + len(raw) // 2)
        assert main(["verify", "a"]) == 3
        err = capsys.readouterr().err
        assert f"{name} differs in tensor {tensor}" in err
        flip(trained / name, at + len(raw) // 2)
    assert main(["verify", "a"]) == 0


@pytest.mark.parametrize("name", ["config.json", "model.pt", "tokenizer.json", "manifest.json"])
def test_verify_exits_3_for_every_missing_or_broken_member(trained, capsys, name: str) -> None:
    path = trained / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert main(["verify", "a"]) == 3
    assert name in capsys.readouterr().err
    if name != "manifest.json":
        path.unlink()
        assert main(["verify", "a"]) == 3
        assert f"{name} is missing" in capsys.readouterr().err


def test_a_bundle_without_manifest_is_checked_as_far_as_it_can_be(trained, capsys) -> None:
    (trained / "manifest.json").unlink()
    assert main(["verify", "a"]) == 0
    assert "whether they are what was saved, nothing says" in capsys.readouterr().out
    flip(trained / "model.pt", (trained / "model.pt").stat().st_size // 2)
    assert main(["verify", "a"]) == 3
    assert "model.pt differs from its own CRC-32" in capsys.readouterr().err


def test_verify_resume_executes_logged_steps_again_and_touches_nothing(trained, capsys) -> None:
    before = tree(Path("checkpoints")), tree(Path("logs"))
    assert main(["verify-resume", "a", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "steps 10 to 11 executed twice from .a.step-000000010" in out
    assert "the log has 2 of these steps, with the same losses" in out
    assert (tree(Path("checkpoints")), tree(Path("logs"))) == before


def test_verify_resume_goes_on_where_nothing_is_logged(train, capsys) -> None:
    assert train("a", "--keep_last", "0") == 0
    assert main(["verify_resume", "a", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "steps 12 to 13 executed twice from a:" in out
    assert "none of these steps" in out


def test_verify_resume_finds_what_is_not_deterministic(trained, capsys, monkeypatch) -> None:
    original, calls = Trainer._train_step, []

    def drifting(self: Trainer) -> bool:
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                self.model.lm_head.weight[0, 0] += 1e-7
        return original(self)

    monkeypatch.setattr(Trainer, "_train_step", drifting)
    assert main(["verify-resume", "a", "--steps", "2"]) == 3
    err = capsys.readouterr().err
    assert "weight " in err
    assert "does not continue bit for bit" in err


def test_verify_resume_finds_a_log_that_says_otherwise(trained, capsys) -> None:
    loss = events("a", "train")[-1]["loss"]
    log = Path("logs/train/a_eval.jsonl")
    log.write_text(log.read_text().replace(f'"loss": {loss}', '"loss": 9.5'))
    assert main(["verify-resume", "a", "--steps", "2"]) == 3
    assert f"step 11 was logged with loss 9.5, and has {loss}" in capsys.readouterr().err
