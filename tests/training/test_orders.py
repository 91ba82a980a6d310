"""Orders and mixtures as a user names them, resumed bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, events, write_dataset
from test_resume import assert_same_run, interrupt_at, position

from mypt_fast.cli import main
from mypt_fast.data.document_loader import DocumentLoader
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus


def mixed(**shares: float) -> list[str]:
    """Flags for a config file with a small model and a mixture of ./data/<name>."""
    flags = dict(zip(SMALL[::2], SMALL[1::2], strict=False))
    architecture = ("n_layer", "n_head", "n_embd", "block_size")
    config = {name: int(flags.pop(f"--{name}")) for name in architecture}
    config["mixture"] = {f"data/{name}": share for name, share in shares.items()}
    Path("mixed.json").write_text(json.dumps(config))
    rest = [part for flag in flags.items() for part in flag]
    return ["--config", "mixed.json", *rest, "--no_use_amp"]


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


def windows(monkeypatch, documents: str, order: str = "epoch") -> np.ndarray:
    """First tokens of 200 training windows of a mixture that leaves ./data/other out."""
    for name, letter in (("toy", 1), ("other", 2)):
        tokens = np.full(3000, letter, "<u4")
        tokens.tofile(f"data/{name}/train/shard_00000.bin")
    flags = [*mixed(toy=1, other=0), "--documents", documents, "--order", order, "--max_iters", "1"]
    seen = []
    kind = TokenLoader if documents == "concat" else DocumentLoader
    plain = kind.next

    def keep(self, rows, *rest):
        seen.append(self.read(0, 200)[0][:, 0])
        return plain(self, rows, *rest)

    monkeypatch.setattr(kind, "next", keep)
    assert main(["train", "--model_name", f"m{documents}", *flags]) == 0
    return seen[0]


@pytest.mark.parametrize("documents", ["concat", "mask"])
def test_a_source_without_a_share_is_never_read(dataset, monkeypatch, documents: str) -> None:
    write_dataset(Path("data/other"), seed=3)
    monkeypatch.setattr(TokenCorpus, "document_ends", lambda self: np.array([self.n_tokens]))
    assert set(windows(monkeypatch, documents)) == {1}


def test_an_order_that_cannot_be_kept_is_refused(train, capsys) -> None:
    assert train("a", "--documents", "bestfit", "--order", "block") == 2
    assert "--documents bestfit has an order of its own" in capsys.readouterr().err


def test_a_source_that_is_too_short_is_named(dataset, capsys) -> None:
    write_dataset(Path("data/other"), n_val=10, seed=3)
    assert main(["train", "--model_name", "m", *mixed(toy=1, other=1)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "data/other of the mixture" in error
    assert "add data" in error


def test_a_mixture_beside_another_source_is_refused(dataset, capsys) -> None:
    flags = mixed(toy=1)
    assert main(["train", "--model_name", "m", *flags, "--dataset_dir", "data/toy"]) == 2
    assert "mixture names the datasets of the whole run" in capsys.readouterr().err


@pytest.fixture
def damaged(dataset) -> Path:
    """A native dataset of which one shard of several has a wrong byte; returns the shard."""
    Path("text.txt").write_text("abcdefghijklmnop" * 3000)
    flags = ["--tokenization", "char", "--tokens_per_shard", "10000", "--out_dir", "data/native"]
    assert main(["prepare", "text.txt", *flags]) == 0
    shard = Path("data/native/train/shard_00001.bin")
    with shard.open("r+b") as file:
        file.seek(4096 + 1001)
        file.write(b"\1")
    return shard


def native(name: str, verify: str) -> list[str]:
    flags = ["--dataset_dir", "data/native", "--model_name", name, "--verify_data", verify]
    return ["train", *SMALL, *flags]


def test_every_byte_is_compared_before_training_if_asked(damaged, capsys) -> None:
    assert main(native("a", "full")) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(damaged) in error
    assert "block 0" in error
    assert not Path("checkpoints/a").exists()
    damaged.unlink()
    assert main(native("a", "full")) == 3  # a file that is gone is no smaller fault
    assert "missing" in capsys.readouterr().err


def test_another_tokenizer_beside_the_shards_is_refused(damaged, capsys) -> None:
    path = Path("data/native/tokenizer_state.json")
    state = json.loads(path.read_text())
    state["chars"].reverse()
    path.write_text(json.dumps(state))
    assert main(native("a", "open")) == 3
    assert "tokenizer" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_damaged_shard_can_be_left_out_and_the_run_knows(damaged, capsys) -> None:
    assert main(native("a", "skip")) == 0
    said = capsys.readouterr()
    assert f"left out, 10,000 tokens: shard {damaged}" in said.out + said.err
    assert main(["train", "--model_name", "a", "--max_iters", "14"]) == 0
    assert position("a") == 14 * 8
    again = ["train", "--model_name", "a", "--max_iters", "16", "--verify_data", "open"]
    assert main(again) == 2  # with the shard it is another dataset
    assert "fingerprint" in capsys.readouterr().err
    for shard in Path("data/native/train").iterdir():
        with shard.open("r+b") as file:
            file.seek(4096 + 100)
            file.write(b"\1")
    assert main(native("b", "skip")) == 2
    assert "every shard is left out" in capsys.readouterr().err
