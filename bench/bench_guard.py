"""What guards and log cost a step, and all of our Python: without model and optimizer.

The bars are 0.5 ms and 1 ms a step.

pytest bench/bench_guard.py --benchmark-only         the rows
python bench/bench_guard.py                          the rows, saved to bench/results/cpu/
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from record import machine, save

from mypt_fast import settings
from mypt_fast.console import Live
from mypt_fast.training import device as devices
from mypt_fast.training.events import EventLog
from mypt_fast.training.guard import WINDOW, GuardState, fault, judge
from mypt_fast.training.journal import Journal
from mypt_fast.training.run import open_run
from mypt_fast.training.signals import StopSignal
from mypt_fast.training.trainer import Trainer
from mypt_fast.training.utilisation import Ceilings

ROUNDS = 2000
MICRO_STEPS = 4
BARS_S = {"log": 0.5e-3, "guards": 0.5e-3, "step": 1e-3}


@contextmanager
def log_cost(folder: Path) -> Iterator[Callable[[], object]]:
    """One `train` event in a file."""
    log = EventLog(folder / "a.jsonl")
    run = SimpleNamespace(ceilings=Ceilings(1e9, 0.2))
    journal = SimpleNamespace(log=log, tokens_per_step=4096, run=run)
    yield lambda: Journal.step(journal, 123456, 2.345678901, 3e-4, 0.987654321, 0.0123)  # type: ignore[arg-type]
    log.close()


@contextmanager
def guard_cost(folder: Path) -> Iterator[Callable[[], object]]:
    """The mark to undo a step, the places where signals interrupt it, and the decision."""
    state = GuardState(losses=[2.0 + i / 1000 for i in range(WINDOW)])
    cpu, stop = torch.device("cpu"), StopSignal()
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step() -> None:
        devices.rng_state(cpu), scaler.state_dict()
        for _ in range(MICRO_STEPS):
            with stop.interruptible():
                pass
        judge(state, 2.01, [fault(2.01, 1.0)], limit=3, spike_action="log")

    yield step


@contextmanager
def step_cost(folder: Path) -> Iterator[Callable[[], object]]:
    """A trainer's whole step of four micro-steps, whose model and optimizer do next to nothing."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        for split in ("train", "val"):
            Path("data", split).mkdir(parents=True)
            np.zeros(1 << 16, "<u4").tofile(f"data/{split}/shard_00000.bin")
        letters = {"token_kind": "char", "chars": list("abcdefgh")}
        Path("data/tokenizer_state.json").write_text(json.dumps(letters))
        typed = {
            "dataset_dir": "data", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64,
            "batch_size": MICRO_STEPS, "micro_batch_size": 1, "use_amp": False, "device": "cpu",
        }  # fmt: skip
        run = open_run(settings.resolve(typed, model_name="overhead"))
        trainer = Trainer(run, Live(1 << 30, 0))
        trainer._begin(StopSignal())
        weight = trainer.model.ln_f.weight
        trainer.model.summed_loss = lambda **inputs: weight[0] * 0 + 2  # type: ignore[method-assign]
        trainer.optimizer.step = lambda *args: None  # type: ignore[method-assign]

        def step() -> None:
            assert trainer._train_step()
            trainer.step += 1

        yield step
        trainer.log.close()
        run.close()
    finally:
        os.chdir(before)


CASES = {"log": log_cost, "guards": guard_cost, "step": step_cost}


def measure(name: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        with CASES[name](Path(folder)) as step:
            for _ in range(ROUNDS):
                began = time.perf_counter()
                step()
                samples.append(time.perf_counter() - began)
    cuts = statistics.quantiles(samples, n=100)
    return {
        "what": name, "rounds": ROUNDS, "median_s": statistics.median(samples), "p99_s": cuts[98],
        "mean_s": statistics.fmean(samples), "samples_s": samples[:50],
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step(benchmark, tmp_path, name: str) -> None:
    with CASES[name](tmp_path) as step:
        benchmark(step)


if __name__ == "__main__":
    rows = [measure(name) for name in CASES]
    for r in rows:
        share = r["median_s"] / BARS_S[r["what"]]
        print(
            f"{r['what']:6} {1e6 * r['median_s']:.1f} us median, {1e6 * r['p99_s']:.1f} us p99, "
            f"{share:.0%} of the bar"
        )
    save("guard", machine(), rows)
