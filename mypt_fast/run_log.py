"""Read a JSONL training log back, to draw it.

Reading forgives what real logs hold: a last line cut off, lines that are not JSON, NaN, and runs
that were resumed, whose repeated steps count once.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mypt_fast.errors import DataError

INCIDENTS = ("skipped_step", "loss_spike", "rollback", "oom")


@dataclass
class Point:
    """One logged value: where it stands on each axis, and its fields."""

    step: int
    tokens: float | None
    seconds: float
    values: dict[str, Any]


@dataclass
class Log:
    """The events of one run, resumptions joined."""

    name: str
    path: Path
    train: list[Point] = field(default_factory=list)
    evals: list[Point] = field(default_factory=list)
    gold: list[Point] = field(default_factory=list)
    blocked: list[Point] = field(default_factory=list)
    phases: list[Point] = field(default_factory=list)
    incidents: list[Point] = field(default_factory=list)  # of the kinds in INCIDENTS
    model: dict[str, Any] = field(default_factory=dict)
    junk: int = 0
    starts: int = 0

    @property
    def eval_sets(self) -> list[str]:
        """Names of the further validation sets, in the order they appeared."""
        seen = dict.fromkeys(k for p in self.evals for k in p.values if k.startswith("eval_"))
        return [k for k in seen if k != "eval_duration_s"]

    def rewind(self, step: int) -> None:
        """Drop what a resumed run logs again; the evaluation a checkpoint was saved at stays."""
        for points, keep_step in (
            (self.train, False), (self.evals, True), (self.gold, True), (self.blocked, True),
            (self.phases, False), (self.incidents, False),
        ):  # fmt: skip
            limit = step + 1 if keep_step and step > 0 else step
            points[:] = [p for p in points if p.step < limit]


class _Clock:
    """Turns an event's step and timestamp into tokens and seconds since the run first began."""

    def __init__(self) -> None:
        self.step, self._tokens = 0, 0.0
        self._per_step: float | None = None
        self._begin: datetime.datetime | None = None
        self._seconds = 0.0

    def start(self, event: dict[str, Any], last: Point | None) -> None:
        """Begin a run or go on where the last kept event was."""
        config = _section(event, "config")
        step = int(number(config.get("start_step")) or 0)
        self._tokens = self.tokens(step) or 0.0 if last else 0.0
        self._seconds = last.seconds if last else 0.0
        self.step, self._per_step = step, number(config.get("tokens_per_step"))
        self._begin = _time(event)

    def tokens(self, step: int) -> float | None:
        """Tokens seen before `step`."""
        if self._per_step is None:
            return None
        return self._tokens + (step - self.step) * self._per_step

    def seconds(self, event: dict[str, Any]) -> float:
        """Seconds of training so far, pauses between runs left out."""
        now = _time(event)
        if self._begin is None:
            self._begin = now
        return self._seconds + ((now - self._begin).total_seconds() if now and self._begin else 0.0)


def number(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if good and math.isfinite(value) else None


def _section(event: dict[str, Any], key: str) -> dict[str, Any]:
    value = event.get(key)
    return value if isinstance(value, dict) else {}


def _time(event: dict[str, Any]) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(str(event.get("timestamp"))).replace(tzinfo=None)
    except ValueError:
        return None


def find(name: str) -> Path:
    """Resolve a log's path or a model's name; raises DataError."""
    for path in (Path(name), Path("logs") / "train" / f"{name}_eval.jsonl"):
        if path.is_file():
            return path
    raise DataError(
        f"no log '{name}'", f"neither a file, nor logs/train/{name}_eval.jsonl", "name a .jsonl log"
    )


def read_log(path: Path) -> Log:
    """Read a log.

    Raises:
        DataError: if it cannot be read or holds no loss.
    """
    log, clock = Log(path.name.removesuffix(".jsonl").removesuffix("_eval"), path), _Clock()
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                _take(log, clock, line)
    except OSError as e:
        raise DataError(f"cannot read {path}", e.strerror or str(e)) from e
    if not log.train and not log.evals:
        found = f"{log.junk} lines that are not events" if log.junk else "no events"
        raise DataError(f"{path} holds nothing to plot", f"found {found}", "name a training log")
    return log


def _take(log: Log, clock: _Clock, line: str) -> None:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        log.junk += bool(line.strip())
        return
    kind = event["event"]
    if kind == "training_start":
        log.rewind(int(number(_section(event, "config").get("start_step")) or 0))
        kept = [points[-1] for points in (log.train, log.evals) if points]
        clock.start(event, max(kept, key=lambda p: p.step) if kept else None)
        log.starts += 1
        log.model = _section(event, "model")
        return
    back_to = number(event.get("back_to")) if kind == "rollback" else None
    if back_to is not None:  # the steps since then were made again; why stays
        why = list(log.incidents)
        log.rewind(int(back_to))
        log.incidents = why
    if kind == "training_complete":  # the last evaluation has no event of its own
        event = {**event, "val_loss": event.get("final_val_loss")}
        event["iter"] = clock.step + int(number(event.get("total_steps")) or 0)
    where = {
        "train": log.train, "eval": log.evals, "training_complete": log.evals,
        "gold_checkpoint": log.gold,
        "gold_checkpoint_final_eval": log.gold, "gold_blocked": log.blocked,
        "phase_switch": log.phases, **dict.fromkeys(INCIDENTS, log.incidents),
    }.get(kind)  # fmt: skip
    step = number(event.get("iter"))
    if where is None or step is None:
        return
    tokens = clock.tokens(int(step))
    if tokens is None:
        tokens = number(event.get("tokens_processed"))
    where.append(Point(int(step), tokens, clock.seconds(event), event))


def position(p: Point, axis: str) -> float | None:
    """Return where an event stands on an axis: step, tokens or time."""
    return {"step": p.step, "tokens": p.tokens, "time": p.seconds}[axis]


def series(points: Sequence[Point], key: str, axis: str) -> tuple[list[float], list[float]]:
    """Return x and y of the finite values of `key`; a step logged twice counts as logged last."""
    rows: dict[int, tuple[float, float]] = {}
    for p in points:
        y = number(p.values.get(key))
        x = position(p, axis)
        if x is not None and y is not None:
            rows[p.step] = (x, y)
    pairs = sorted(rows.values())
    return [x for x, _ in pairs], [y for _, y in pairs]


def not_finite(points: Sequence[Point], key: str) -> int:
    """Count the values of `key` that are NaN or infinite."""
    values = [p.values.get(key) for p in points]
    return sum(isinstance(v, float) and not math.isfinite(v) for v in values)
