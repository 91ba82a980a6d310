"""Execute some steps of a run again, in a scratch directory, and compare what comes out."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mypt_fast import console, settings
from mypt_fast.checkpoint import bundle as bundles
from mypt_fast.checkpoint.legacy import old_run
from mypt_fast.errors import CheckpointError
from mypt_fast.publish import temporary
from mypt_fast.training.numerics import applied
from mypt_fast.training.parts import log_path
from mypt_fast.training.run import open_run
from mypt_fast.training.trainer import Trainer


class _Bounded(Trainer):
    """A trainer that stops after `count` steps as if a signal had come."""

    count: int

    def _train_step(self) -> bool:
        moved = super()._train_step()
        self.count -= moved
        if self.count == 0:
            self.stop.received = signal.SIGTERM
        return moved


@dataclass
class Execution:
    """What some steps came to: their losses, and the state after them."""

    first: int
    losses: dict[int, float | None]
    state: bundles.Bundle


def execute(source: Path, name: str, folder: Path, steps: int) -> Execution:
    """Continue a copy of the bundle `source` in `folder` for `steps` steps.

    Raises:
        CheckpointError, IntegrityError, DataError: as the run itself would.
    """
    run_dir = folder / name
    run_dir.parent.mkdir(parents=True)
    shutil.copytree(source, run_dir)
    typed: dict[str, Any] = {"log_file": str(folder / "log.jsonl"), "save_interval": 0}
    resolved = settings.resolve(typed, model_name=name, checkpoints=folder, read_old=old_run)
    resolved.train.terminal_log_file, resolved.train.keep_last = None, 0
    first = int(resolved.saved_state.get("step") or 0)
    if first >= resolved.train.max_iters:  # a finished run: the schedule stays at its end
        resolved.train.max_iters = first + steps
    steps = min(steps, resolved.train.max_iters - first)
    opened = open_run(resolved)
    live = console.Live(resolved.train.max_iters, first)
    try:
        with contextlib.redirect_stdout(io.StringIO()), applied(opened):
            trainer = _Bounded(opened, live)
            trainer.count = steps
            trainer.train()
        del trainer
    finally:
        live.close()
        opened.close()
        gc.collect()
    return Execution(first, logged_losses(Path(typed["log_file"])), bundles.read(run_dir))


def logged_losses(log: Path) -> dict[int, float | None]:
    """Training loss by step of a JSONL log; empty without one."""
    losses = {}
    for line in log.read_text("utf-8").splitlines() if log.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "train":
            losses[event["iter"]] = event["loss"]
    return losses


def differences(one: Execution, two: Execution) -> Iterator[str]:
    """Name what two executions do not agree on, bit for bit."""
    for step, loss in one.losses.items():
        if two.losses.get(step) != loss:
            yield f"loss of step {step}: {loss} and {two.losses.get(step)}"
            break
    for what in ("state_dict", "optimizer"):
        pair = [dict(_tensors(getattr(x.state, what), "")) for x in (one, two)]
        for name, value in pair[0].items():
            if name not in pair[1] or not _same(value, pair[1][name]):
                yield f"{'weight' if what == 'state_dict' else 'optimizer state'} {name}"
                break
    for key, label in (("rng", "random numbers"), ("data", "data position")):
        states = [(x.state.manifest or {}).get(key) for x in (one, two)]
        if states[0] != states[1]:
            yield label


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def _tensors(content: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield prefix, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))


def prove(run_dir: Path, source: Path, steps: int) -> tuple[list[str], list[str]]:
    """Execute `steps` steps from `source` twice; returns lines to show and what differs.

    Raises:
        CheckpointError: if there is nothing to execute.
    """
    losses = logged_losses(_log_of(run_dir))
    with _scratch(run_dir) as folder:
        runs = [execute(source, run_dir.name, folder / str(n), steps) for n in (1, 2)]
        first, executed = runs[0].first, sorted(runs[0].losses)
        if not executed:
            raise CheckpointError(f"no step of {run_dir} could be executed")
        problems = list(differences(*runs))
    both = [s for s in executed if s in losses]
    wrong = [s for s in both if losses[s] != runs[0].losses[s]]
    problems += [
        f"step {s} was logged with loss {losses[s]}, and has {runs[0].losses[s]}" for s in wrong[:1]
    ]
    lines = [
        f"{run_dir}: steps {first} to {executed[-1]} executed twice from {source.name}: losses, "
        "weights, moments, random numbers and data position equal bit for bit",
        f"the log has {len(both)} of these steps, with the same losses"
        if both
        else "the log has none of these steps to compare with",
    ]
    return lines, problems


def _log_of(run_dir: Path) -> Path:
    return log_path(settings.resolve({}, model_name=run_dir.name, checkpoints=run_dir.parent))


@contextlib.contextmanager
def _scratch(run_dir: Path) -> Iterator[Path]:
    folder = temporary(run_dir)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
