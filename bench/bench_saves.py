"""What a save of `small` costs: its copy, its bytes, its hashes, and the training beside it.

    pytest bench/bench_saves.py --benchmark-only      the rows, under two minutes
    python bench/bench_saves.py                       also writes bench/results/cpu/saves.json

"beside" is a micro-step of 4 of small's 32 sequences while a thread writes a save, "alone" the
same without. From both follows what a save every 50 steps adds to a step: the copy, and how much
longer the micro-steps take that a save lasts. The bar is 1 %; hashing has to reach 2 GB/s.
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does

import numpy as np
import pytest
import torch
import xxhash
from record import machine, run_suite, save

from mypt_fast import presets
from mypt_fast.checkpoint import bundle
from mypt_fast.checkpoint.verify import verify
from mypt_fast.config import TrainConfig
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.optim import adamw
from mypt_fast.training.saver import Saver, Snapshot

SAVE_EVERY = 50
ROWS = 4
CPU = torch.device("cpu")


class Small:
    """`small` after one step, so that its moments exist."""

    def __init__(self) -> None:
        self.cfg = presets.load("small").model
        self.precision, _ = devices.precision(CPU, True, "bf16", explicit=False)
        self.model = GPT(self.cfg, seed=0)
        self.optimizer = adamw(self.model, TrainConfig())
        self.batch = torch.randint(self.cfg.vocab_size, (2, ROWS, self.cfg.block_size))
        self.micro_step()
        self.optimizer.step()

    def micro_step(self) -> None:
        with self.precision.autocast():
            loss = self.model(self.batch[0], self.batch[1]) / self.batch[0].numel()
        loss.backward()

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def write(self, state: dict, target: Path) -> None:
        bundle.write(
            target, config=self.cfg.to_dict(), state_dict=state["model"],
            optimizer=state["optimizer"], training_state={"step": 1}, state={"step": 1},
        )  # fmt: skip


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Small()


def note(benchmark, what, **facts):
    """Name the row, with its speed where it moves bytes."""
    benchmark.extra_info["what"] = what
    if benchmark.stats is not None and "bytes" in facts:
        facts["gb_per_s"] = round(facts["bytes"] / benchmark.stats.stats.median / 1e9, 2)
    benchmark.extra_info.update(facts)


def state_bytes(small):
    tensors = [*small.model.state_dict().values()]
    for moments in small.optimizer.state_dict()["state"].values():
        tensors += moments.values()
    return sum(t.nbytes for t in tensors)


def test_copy(benchmark, small):
    snapshot = Snapshot(CPU)
    benchmark.pedantic(lambda: snapshot.take(small.state()), rounds=7, warmup_rounds=1)
    note(benchmark, "copy", bytes=state_bytes(small))


def test_hash(benchmark):
    data = np.ones(256 << 20, np.uint8)
    benchmark.pedantic(lambda: xxhash.xxh3_128_digest(data), rounds=5)
    note(benchmark, "hash", bytes=data.nbytes)


def test_write(benchmark, small, tmp_path):
    """Bytes, hashes of files and tensors, fsync, and reading all of it back."""
    state = small.state()
    benchmark.pedantic(lambda: small.write(state, tmp_path / "run"), rounds=3, warmup_rounds=1)
    note(benchmark, "write", bytes=state_bytes(small))


def test_verify(benchmark, small, tmp_path):
    small.write(small.state(), tmp_path / "run")
    benchmark.pedantic(lambda: verify(tmp_path / "run"), rounds=3, warmup_rounds=1)
    note(benchmark, "verify", bytes=state_bytes(small))


@pytest.mark.parametrize("way", ["alone", "beside"])
def test_micro_step(benchmark, small, tmp_path, way):
    saver, snapshot = Saver(beside=True), Snapshot(CPU)
    state, seconds = snapshot.take(small.state()), []

    def write():
        began = time.perf_counter()
        small.write(state, tmp_path / "run")
        seconds.append(time.perf_counter() - began)

    def keep_writing():
        if way == "beside" and all(job.done() for _, job in saver._jobs):
            saver.run("save", write)

    benchmark.pedantic(small.micro_step, setup=keep_writing, rounds=12, warmup_rounds=1)
    saver.close()
    note(benchmark, way, save_seconds=round(statistics.median(seconds), 2) if seconds else None)


def overhead(rows):
    """What a save every 50 steps adds to a step of 32 sequences, as a share of it."""
    seconds = {r["what"]: statistics.median(r["seconds"]) for r in rows}
    lasts = next(r["save_seconds"] for r in rows if r["what"] == "beside")
    slower = lasts * (1 - seconds["alone"] / seconds["beside"])
    step = seconds["alone"] * 32 / ROWS
    return (seconds["copy"] + slower) / (SAVE_EVERY * step)


def main():
    """Run the suite in its own process and keep every sample, without the machine's name."""
    rows = [
        {**r["extra_info"], "seconds": [float(f"{s:.4g}") for s in r["stats"]["data"]]}
        for r in run_suite(__file__)
    ]
    share = overhead(rows)
    save("saves", {**machine(), "model": "small", "overhead": round(share, 5)}, rows)
    for row in rows:
        facts = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("what", "seconds"))
        sys.stdout.write(f"{row['what']:8} {statistics.median(row['seconds']):8.3f} s  {facts}\n")
    sys.stdout.write(f"a save every {SAVE_EVERY} steps: {100 * share:.2f} % of step time\n")


if __name__ == "__main__":
    main()
