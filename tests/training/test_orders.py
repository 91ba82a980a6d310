"""Orders and mixtures as a user names them, resumed bit for bit."""

import json
from pathlib import Path

import pytest
from conftest import SMALL, events, write_dataset
from test_resume import assert_same_run, interrupt_at, position

from mypt_fast.cli import main
from mypt_fast.data.loader import TokenLoader


def mixed(**shares: float) -> list[str]:
    """Flags for a config file with a mixture of ./data/<name>."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}  # a preset's shape wins
    mixture = {f"data/{name}": share for name, share in shares.items()}
    Path("mixed.json").write_text(json.dumps({**shape, "mixture": mixture}))
    return ["--config", "mixed.json", *SMALL]


@pytest.mark.parametrize("order", ["replacement", "block", "sequential"])
def test_an_order_is_kept_across_a_resume(train, monkeypatch, order: str) -> None:
    assert train("whole", "--order", order) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 7 + 2, TokenLoader, "next")
        assert train("parts", "--order", order) == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")
    assert train("epoch") == 0
    losses = [[e["loss"] for e in events(name, "train")] for name in ("whole", "epoch")]
    assert losses[0] != losses[1]


def test_another_order_on_resume_is_refused(train, capsys) -> None:
    assert train("a") == 0
    assert train("a", "--order", "block", "--max_iters", "14", resume=True) == 2
    assert "order is 'block', the state has 'epoch'" in capsys.readouterr().err


def test_a_mixture_trains_and_resumes(dataset, monkeypatch) -> None:
    write_dataset(Path("data/other"), n_train=2000, seed=3)
    flags = mixed(toy=3, other=1)
    assert main(["train", "--model_name", "whole", *flags]) == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 6 + 1, TokenLoader, "next")
        assert main(["train", "--model_name", "parts", *flags]) == 130
    assert main(["train", "--model_name", "parts"]) == 0
    assert_same_run("whole", "parts")
    assert position("parts") == 12 * 8
    assert main(["train", "--model_name", "other", *mixed(toy=1, other=3)]) == 0
    losses = [[e["loss"] for e in events(name, "train")] for name in ("whole", "other")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("shares", "reason"), [
    ({"toy": -1, "other": 1}, "weight"),
    ({"toy": 0, "other": 0}, "weight"),
    ({"toy": 1, "other": 1e-9}, "weight"),
    ({"toy": 1, "gone": 1}, "no dataset data/gone"),
])  # fmt: skip
def test_a_mixture_that_cannot_be_is_one_line(dataset, capsys, shares, reason) -> None:
    write_dataset(Path("data/other"), seed=3)
    assert main(["train", "--model_name", "m", *mixed(**shares)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert reason in lines[-1]
    assert not Path("checkpoints/m").exists()


def test_a_mixture_beside_another_source_is_refused(dataset, capsys) -> None:
    flags = mixed(toy=1)
    assert main(["train", "--model_name", "m", *flags, "--dataset_dir", "data/toy"]) == 2
    assert "mixture names the datasets of the whole run" in capsys.readouterr().err


def test_every_byte_is_compared_before_training_if_asked(dataset, capsys) -> None:
    Path("text.txt").write_text("abcdefghijklmnop" * 3000)
    assert main(["prepare", "text.txt", "--tokenization", "char", "--out_dir", "data/native"]) == 0
    start = ["train", *SMALL, "--dataset_dir", "data/native", "--verify_data"]
    assert main([*start, "full", "--model_name", "good"]) == 0
    assert "compared with their hashes" in capsys.readouterr().err
    shard = next(Path("data/native/train").iterdir())
    with shard.open("r+b") as file:
        file.seek(4096 + 1001)
        file.write(b"\1")
    assert main([*start, "full", "--model_name", "bad"]) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(shard) in error
    assert "block 0" in error
    assert not Path("checkpoints/bad").exists()
