"""What guards and log cost a step: all they do, without the step. The bar is 0.5 ms.

pytest bench/bench_guard.py --benchmark-only         the rows
python bench/bench_guard.py                          the rows, saved to bench/results/cpu/
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from record import machine, save

from mypt_fast.training import device as devices
from mypt_fast.training.events import EventLog
from mypt_fast.training.guard import WINDOW, GuardState, fault, judge
from mypt_fast.training.journal import Journal
from mypt_fast.training.signals import StopSignal

ROUNDS = 2000
MICRO_STEPS = 4
BAR_S = 0.5e-3


@contextmanager
def log_cost(folder: Path) -> Iterator[Callable[[], object]]:
    """One `train` event in a file."""
    log = EventLog(folder / "a.jsonl")
    journal = SimpleNamespace(log=log, tokens_per_step=4096)
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


CASES = {"log": log_cost, "guards": guard_cost}


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
        print(f"{r['what']:6} {1e6 * r['median_s']:.1f} us median, {1e6 * r['p99_s']:.1f} us p99")
    both = sum(r["median_s"] for r in rows)
    print(f"both   {1e6 * both:.1f} us a step, {100 * both / BAR_S:.0f} % of the bar")
    save("guard", machine(), rows)
