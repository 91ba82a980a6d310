"""`mypt-fast inspect`: MyPT's sections, exact numbers, and --verify."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mypt_fast
from mypt_fast.checkpoint import bundle
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT
from mypt_fast.tokenizer import Tokenizer

STATE = {
    "step": 2000,
    "training_config": {
        "max_iters": 2000, "eval_interval": 50, "eval_iters": 200, "learning_rate": 0.0001,
        "start_step": 1000,
    },
}  # fmt: skip
GOLD = {"gold_step": 1500, "best_gold_val_loss": 2.25}


def save(path, **changes) -> GPT:
    tokenizer = Tokenizer.from_text("abc é")
    cfg = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=5, device="cpu")
    model = GPT(cfg, seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "config": cfg.to_dict(), "state_dict": model.state_dict(), "training_state": STATE,
        "tokenizer": tokenizer.get_state(), "optimizer": optimizer.state_dict(),
        "gold_state": GOLD,
    }  # fmt: skip
    bundle.write(path, **{**content, **changes})
    return model


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A bundle at checkpoints/dante, seen from the working directory."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "checkpoints" / "dante")
    return tmp_path / "checkpoints" / "dante"


def test_sections_have_the_promised_wording_and_order(run_dir, capsys) -> None:
    assert main(["inspect", "--model_name", "dante"]) == 0
    out = capsys.readouterr().out
    heads = [line for line in out.splitlines() if line.startswith("===")]
    assert heads == [
        "=== FORMAT ===", "=== CONFIG ===", "=== TOKENIZER ===", "=== TRAINING STATE ===",
        "=== GOLD ===", "=== FILES ===",
    ]  # fmt: skip
    assert "New JSON-based format" in out
    assert "Location: checkpoints/dante\n" in out
    assert "batch_size:32, block_size:8, vocab_size:5, n_embd:8, n_head:2, n_layer:1" in out
    assert "kind      : char\nvocab     : 5 characters\n" in out
    assert "Last recorded training step: 2000\nTraining configuration:\n  max_iters: 2000\n" in out
    assert "  learning_rate: 0.0001\n  start_step: 1000\n" in out
    assert "Best step: 1500 (val_loss=2.2500)" in out


def test_parameters_are_the_tensors_own_count(run_dir, capsys) -> None:
    model = save(run_dir)
    total = sum(p.numel() for p in model.parameters())
    assert main(["inspect", str(run_dir)]) == 0
    assert f"Parameters: {total:,} " in capsys.readouterr().out


def test_gpt2_vocabulary_has_its_wording(run_dir, capsys) -> None:
    save(run_dir, tokenizer={"token_kind": "gpt2"})
    assert main(["inspect", "dante"]) == 0
    assert (
        "kind      : gpt2\nvocab     : GPT-2 BPE (fixed ~50k tokens)\n" in capsys.readouterr().out
    )


def test_the_gold_directory_is_shown_where_it_is(run_dir, capsys) -> None:
    save(run_dir.with_name("dante_gold"))
    assert main(["inspect", "dante"]) == 0
    assert "Location: checkpoints/dante_gold" in capsys.readouterr().out


def test_json_holds_everything(run_dir, capsys) -> None:
    assert main(["inspect", "dante", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["training_state"]["step"] == 2000
    assert report["config"]["n_embd"] == 8
    assert report["verified"] is False
    status = {f["file"]: f["status"] for f in report["files"]}
    assert status["model.pt"] == "not checked"
    assert {f["file"]: f["bytes"] for f in report["files"]}["model.pt"] == (
        run_dir / "model.pt"
    ).stat().st_size


def test_verify_passes_on_what_was_saved(run_dir, capsys) -> None:
    (run_dir / "notes.txt").write_text("mine")
    assert main(["inspect", "dante", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "Verified: every file is what was saved" in out
    assert "not in the manifest" in out


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "config.json", "tokenizer.json"])
def test_verify_finds_a_changed_byte_and_exits_3(run_dir, capsys, name: str) -> None:
    data = bytearray((run_dir / name).read_bytes())
    at = data.index(b"8") if name == "config.json" else len(data) // 2
    data[at] ^= 1
    (run_dir / name).write_bytes(data)
    assert main(["inspect", "dante", "--verify"]) == 3
    err = capsys.readouterr().err
    assert name in err
    assert err.count("\n") == 1


def test_verify_finds_a_missing_file(run_dir, capsys) -> None:
    (run_dir / "optimizer.pt").unlink()
    assert main(["inspect", "dante"]) == 0
    assert "MISSING" in capsys.readouterr().out
    assert main(["inspect", "dante", "--verify"]) == 3


def test_a_bundle_of_another_program_is_shown_but_not_verified(run_dir, capsys) -> None:
    (run_dir / "manifest.json").unlink()
    (run_dir / "tokenizer.json").unlink()
    (run_dir / "training_state.json").unlink()
    assert main(["inspect", "dante"]) == 0
    out = capsys.readouterr().out
    assert "New JSON-based format\n" in out
    assert "No manifest.json: files cannot be verified" in out
    assert main(["inspect", "dante", "--verify"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs one model"),
        (["a", "--model_name", "b"], "needs one model"),
        (["dant"], "the nearest run is 'dante'"),
        (["../etc/passwd"], "no model"),
    ],
)
def test_mistakes_are_one_line(run_dir, capsys, words, said) -> None:
    assert main(["inspect", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_damaged_single_file_checkpoint_is_named(run_dir, capsys) -> None:
    old = run_dir.with_name("old")
    old.mkdir()
    (old / "latest.pt").write_bytes(b"x")
    assert main(["inspect", "old"]) == 3
    assert "latest.pt" in capsys.readouterr().err


def test_a_broken_member_is_one_line(run_dir, capsys) -> None:
    (run_dir / "training_state.json").write_text("{")
    assert main(["inspect", "dante"]) == 3
    assert "not valid JSON" in capsys.readouterr().err


def test_torch_is_not_loaded(run_dir) -> None:
    code = (
        "import sys; from mypt_fast.cli import main; main(['inspect', 'dante', '--verify']); "
        "sys.exit('torch' in sys.modules)"
    )
    package = Path(mypt_fast.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run_dir.parent.parent, check=False,
        env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0
