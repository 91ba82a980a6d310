"""A training step of `fit`, with a loader of MyPT's kind, beside one of `mypt-fast train`.

Both train the same shape on the same tokens in fp32, in one process, run by run in turn; the time
of a step is what the log says, from its first token to the optimizer's last write. `fit` trains
`core.GPT`, as a script does. Without dropout both compute the same, so that the ratio is fit's own
overhead, and the bar is 2 %. With the preset's dropout there is no bar: for MyPT's random numbers
`core` keeps PyTorch's dropout, whole squares of it in attention, where the trainer's model works
rows of 128 tokens and more in strips (`kernels/dropped_attention.py`).

    pytest bench/bench_core.py --benchmark-only          the rows without dropout
    python bench/bench_core.py                           the rows, saved to bench/results/cpu/
"""

import contextlib
import io
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does, for both sides

import numpy as np
import pytest
import torch
from record import machine, save

from mypt_fast import presets
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.core.model import GPT
from mypt_fast.core.tokenizer import Tokenizer
from mypt_fast.training.optim import adamw

BAR = 0.02  # without dropout
SHORT_ROUNDS = 2  # under pytest, which has ten minutes for all of bench/
ROUNDS, STEPS, WARM_UP = 5, 8, 2  # runs of each side, their steps, and how many do not count
CASES = {"tiny_char": 16, "small_char": 8}  # preset: sequences per step
N_TOKENS = 200_000
CHARS = [chr(i) for i in range(0x100, 0x200)]  # 256, as the presets' vocabulary


class MyptTextLoader:
    """Text in memory as MyPT's loader has it: torch's global generator, one slice a row."""

    def __init__(self, cfg: ModelConfig, tokens: np.ndarray) -> None:
        self.cfg, self.data = cfg, torch.from_numpy(tokens.astype(np.int64))

    def get_batch(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.cfg.batch_size, self.cfg.block_size
        starts = torch.randint(len(self.data) - T, (B,)).tolist()
        x = torch.stack([self.data[i : i + T] for i in starts])
        return x, torch.stack([self.data[i + 1 : i + T + 1] for i in starts])


@contextlib.contextmanager
def dataset() -> Iterator[np.ndarray]:
    """Tokens, and the working directory beside a dataset of them."""
    tokens = np.random.default_rng(0).integers(len(CHARS), size=N_TOKENS).astype("<u4")
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for split in ("train", "val"):
                Path("data", split).mkdir(parents=True)
                tokens.tofile(Path("data", split, "shard_00000.bin"))
            state = {"token_kind": "char", "chars": CHARS}
            Path("data/tokenizer_state.json").write_text(json.dumps(state))
            yield tokens
        finally:
            os.chdir(before)


def steps_of(log: str) -> list[float]:
    """Seconds of a token, step by step, the first ones left out."""
    events = [json.loads(line) for line in Path(log).read_text().splitlines()]
    speeds = [e["tokens_per_sec"] for e in events if e["event"] == "train"]
    return [1 / speed for speed in speeds[WARM_UP:]]


def shape(preset: str, dropout: float | None) -> ModelConfig:
    """The preset as both sides train it; dropout None: its own."""
    cfg = presets.load(preset).model
    cfg.batch_size, cfg.vocab_size = CASES[preset], len(CHARS)
    cfg.dropout = cfg.dropout if dropout is None else dropout
    return cfg


def own(preset: str, dropout: float | None, number: int) -> list[float]:
    """Steps of `mypt-fast train`."""
    rows, log = str(CASES[preset]), f"own{number}.jsonl"
    flags = [
        "--config", preset, "--batch_size", rows, "--micro_batch_size", rows, "--dataset_dir",
        "data", "--model_name", f"own{number}", "--max_iters", str(STEPS), "--eval_iters", "1",
        "--eval_interval", "1000", "--no_use_amp", "--compile", "off", "--log_file", log,
        "--dropout", str(shape(preset, dropout).dropout),
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", *flags]) == 0
    return steps_of(log)


def core(preset: str, dropout: float | None, number: int, tokens: np.ndarray) -> list[float]:
    """Steps of fit."""
    cfg, log = shape(preset, dropout), f"core{number}.jsonl"
    tokenizer = Tokenizer(cfg, "char")
    tokenizer.set_state({"token_kind": "char", "chars": CHARS})
    with contextlib.redirect_stdout(io.StringIO()):
        model = GPT(cfg, tokenizer)
        model.fit(
            MyptTextLoader(cfg, tokens),
            adamw(model, TrainConfig()),
            STEPS,
            eval_interval=1000,
            eval_iters=1,
            log_file=log,
        )
    return steps_of(log)


def compare(preset: str, rounds: int = ROUNDS, dropout: float | None = None) -> dict:
    """Both sides in turn; the ratio of fit's step to the trainer's, pair by pair of runs."""
    cfg = shape(preset, dropout)
    tokens_per_step = cfg.batch_size * cfg.block_size
    with dataset() as tokens:
        core(preset, dropout, -1, tokens)  # warm up
        pairs = [(own(preset, dropout, n), core(preset, dropout, n, tokens)) for n in range(rounds)]
    ratios = [statistics.median(c) / statistics.median(o) for o, c in pairs]
    return {
        "preset": preset,
        "dtype": "fp32",
        "dropout": cfg.dropout,
        "bar": None if cfg.dropout else 1 + BAR,
        "tokens_per_step": tokens_per_step,
        "trainer_s": [round(s * tokens_per_step, 5) for o, _ in pairs for s in o],
        "fit_s": [round(s * tokens_per_step, 5) for _, c in pairs for s in c],
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
    }


def show(row: dict) -> None:
    """One row, a line."""
    over = 100 * (row["ratio_median"] - 1)
    what = f"bar {100 * BAR:+.0f} %" if row["bar"] else "no bar: other dropout in attention"
    case = f"{row['preset']}, dropout {row['dropout']:g}"
    print(f"{case:24} fit's step takes {over:+.1f} % ({what})")


@pytest.mark.parametrize("preset", CASES)
def test_step_of_fit(benchmark, preset: str) -> None:
    with dataset() as tokens:
        benchmark.pedantic(lambda: core(preset, 0.0, 0, tokens), rounds=1)
    benchmark.extra_info.update(compare(preset, SHORT_ROUNDS, 0.0))


if __name__ == "__main__":
    rows = [compare(preset, dropout=dropout) for preset in CASES for dropout in (0.0, None)]
    for row in rows:
        show(row)
    save("core", machine(), rows)
