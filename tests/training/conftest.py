"""A small dataset, and `mypt-fast train` called in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mypt_fast.cli import main

LETTERS = "abcdefghijklmnop"
SMALL = [
    "--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--block_size", "12",
    "--batch_size", "4", "--dropout", "0.2", "--grad_accum_steps", "2",
    "--micro_batch_size", "2", "--max_iters", "12", "--eval_interval", "5",
    "--eval_iters", "2", "--learning_rate", "1e-2", "--warmup_iters", "2",
    "--no_use_amp",  # the same numbers on every CPU
]  # fmt: skip


def write_dataset(folder: Path, n_train: int = 3000, n_val: int = 600, seed: int = 0) -> Path:
    """Write a char dataset in MyPT's format: letters that tend to follow each other."""
    rng = np.random.default_rng(seed)
    for split, n in (("train", n_train), ("val", n_val)):
        steps = rng.choice([1, 1, 1, 2, 5], size=n)
        (folder / split).mkdir(parents=True)
        tokens = (np.cumsum(steps) % len(LETTERS)).astype("<u4")
        tokens.tofile(folder / split / "shard_00000.bin")
    state = {"token_kind": "char", "chars": list(LETTERS)}
    (folder / "tokenizer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset at ./data/toy with the working directory in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return write_dataset(Path("data/toy"))


@pytest.fixture
def train(dataset: Path) -> Callable[..., int]:
    """Call `mypt-fast train` for a small model on the toy dataset."""

    def call(name: str, *flags: str, resume: bool = False) -> int:
        start = [] if resume else [*SMALL, "--dataset_dir", str(dataset)]
        return main(["train", "--model_name", name, *start, *flags])

    return call


def events(name: str, kind: str | None = None) -> list[dict]:
    """Events of a run's log."""
    lines = Path(f"logs/train/{name}_eval.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [e for e in found if kind is None or e["event"] == kind]
