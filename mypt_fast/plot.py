"""Read JSONL training logs and draw them: losses, learning rate, speed.

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

from mypt_fast import console
from mypt_fast.errors import DataError

MAX_POINTS = 2000  # a line cannot show more on a page; beyond, each bucket keeps its extremes
SMOOTH_SHARE, SMOOTH_MOST = 40, 200  # the running mean spans this part of the run, or so many steps
AXES = {"step": "step", "tokens": "tokens", "time": "training time"}


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
            (self.phases, False),
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
        config = event.get("config") if isinstance(event.get("config"), dict) else {}
        step = int(_number(config.get("start_step")) or 0)
        self._tokens = self.tokens(step) or 0.0 if last else 0.0
        self._seconds = last.seconds if last else 0.0
        self.step, self._per_step = step, _number(config.get("tokens_per_step"))
        self._begin = _time(event)

    def tokens(self, step: int) -> float | None:
        """Tokens seen before `step`."""
        return None if self._per_step is None else self._tokens + (step - self.step) * self._per_step

    def seconds(self, event: dict[str, Any]) -> float:
        """Seconds of training so far, pauses between runs left out."""
        now = _time(event)
        if self._begin is None:
            self._begin = now
        return self._seconds + ((now - self._begin).total_seconds() if now and self._begin else 0.0)


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if good and math.isfinite(value) else None


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
        config = event.get("config") if isinstance(event.get("config"), dict) else {}
        log.rewind(int(_number(config.get("start_step")) or 0))
        kept = [points[-1] for points in (log.train, log.evals) if points]
        clock.start(event, max(kept, key=lambda p: p.step) if kept else None)
        log.starts += 1
        log.model = event.get("model") if isinstance(event.get("model"), dict) else {}
        return
    if kind == "training_complete":  # the last evaluation has no event of its own
        event = {**event, "val_loss": event.get("final_val_loss")}
        event["iter"] = clock.step + int(_number(event.get("total_steps")) or 0)
    where = {
        "train": log.train, "eval": log.evals, "training_complete": log.evals,
        "gold_checkpoint": log.gold,
        "gold_checkpoint_final_eval": log.gold, "gold_blocked": log.blocked,
        "phase_switch": log.phases,
    }.get(kind)  # fmt: skip
    step = _number(event.get("iter"))
    if where is None or step is None:
        return
    tokens = clock.tokens(int(step))
    if tokens is None:
        tokens = _number(event.get("tokens_processed"))
    where.append(Point(int(step), tokens, clock.seconds(event), event))


def series(points: Sequence[Point], key: str, axis: str) -> tuple[list[float], list[float]]:
    """Return x and y of the finite values of `key`; a step logged twice counts as logged last."""
    rows: dict[int, tuple[float, float]] = {}
    for p in points:
        y = _number(p.values.get(key))
        x = {"step": p.step, "tokens": p.tokens, "time": p.seconds}[axis]
        if x is not None and y is not None:
            rows[p.step] = (x, y)
    pairs = sorted(rows.values())
    return [x for x, _ in pairs], [y for _, y in pairs]


def not_finite(points: Sequence[Point], key: str) -> int:
    """Count the values of `key` that are NaN or infinite."""
    values = [p.values.get(key) for p in points]
    return sum(isinstance(v, float) and not math.isfinite(v) for v in values)


def running_mean(y: Sequence[float], width: int) -> list[float]:
    """Mean of the `width` values around each.

    At the start, where losses fall steeply, the window narrows around its centre; at the end it
    keeps what there is to its left, so that the last value is not a single step's noise.
    """
    sums = [0.0]
    for value in y:
        sums.append(sums[-1] + value)
    half, n, out = width // 2, len(y), []
    for i in range(n):
        first, end = i - min(half, i), min(n, i + 1 + min(half, i))
        out.append((sums[end] - sums[first]) / (end - first))
    return out


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Keep the lowest and highest value of each bucket, where there are too many to draw."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    size = math.ceil(2 * len(x) / MAX_POINTS)
    keep: list[int] = []
    for start in range(0, len(x), size):
        bucket = range(start, min(start + size, len(x)))
        keep += sorted({min(bucket, key=y.__getitem__), max(bucket, key=y.__getitem__)})
    return [x[i] for i in keep], [y[i] for i in keep]


# Drawing. One run: colours tell the curves apart; several: each run has a colour, curves a style.

INK, FAINT = "#22262e", "#8b93a1"
TRAIN, VAL, GOLD = "#3b6fb6", "#d1495b", "#e3a008"
OTHERS = ("#2a9d8f", "#8e5ea2", "#b5762a", "#5c7c3a", "#c2569b", "#4d4d4d")
RUNS = ("#3b6fb6", "#d1495b", "#2a9d8f", "#8e5ea2", "#b5762a", "#5c7c3a", "#c2569b", "#4d4d4d")
STYLE = {
    "font.size": 10, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e9ee", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "lines.solid_capstyle": "round", "axes.linewidth": 0.8,
    "xtick.major.width": 0.8, "ytick.major.width": 0.8,
}  # fmt: skip


def draw(logs: Sequence[Log], out: Path, *, axis: str = "step", title: str | None = None) -> None:
    """Draw logs into an image file whose suffix names the format.

    Raises:
        DataError: without matplotlib, for a format it lacks, an unwritable file, or an axis the
            logs know nothing of.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise DataError("plot needs matplotlib", cure="pip install 'mypt_fast[plot]'") from e
    for log in logs:
        if not any(series(p, k, axis)[0] for p, k in ((log.train, "loss"), (log.evals, "val_loss"))):
            raise DataError(f"{log.path}: no finite losses over {axis}", cure="try --x step")
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6.4), dpi=160, layout="constrained")
        scale, unit = _unit(logs, axis)
        panels = _Panels(figure, logs, axis, scale)
        for i, log in enumerate(logs):
            panels.losses(log, RUNS[i % len(RUNS)] if len(logs) > 1 else None)
            panels.side(log, RUNS[i % len(RUNS)] if len(logs) > 1 else TRAIN)
        panels.finish(title or _title(logs), _subtitle(logs), AXES[axis] + unit)
        try:
            figure.savefig(out)
        except (OSError, ValueError) as e:
            found = getattr(e, "strerror", None) or str(e).splitlines()[0]
            raise DataError(f"cannot write {out}", found, "choose another --out") from e


def _unit(logs: Sequence[Log], axis: str) -> tuple[float, str]:
    """Divide the x axis by a unit that keeps its numbers short."""
    points = [p for log in logs for p in (*log.train[-1:], *log.evals[-1:])]
    if axis == "tokens":
        top = max((p.tokens or 0.0 for p in points), default=0.0)
        units: tuple[tuple[float, str], ...] = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"))  # fmt: skip
    elif axis == "time":
        top = max((p.seconds for p in points), default=0.0)
        units = ((5400.0, " (hours)"), (120.0, " (minutes)"), (0.0, " (seconds)"))
        word = next(w for least, w in units if top >= least)
        return {" (hours)": 3600.0, " (minutes)": 60.0, " (seconds)": 1.0}[word], word
    else:
        return 1.0, ""
    return next(((size, word) for size, word in units if top >= 2 * size), (1.0, ""))


def _title(logs: Sequence[Log]) -> str:
    names = ", ".join(log.name for log in logs)
    return names if len(names) <= 70 else f"{len(logs)} runs"


def _subtitle(logs: Sequence[Log]) -> str:
    if len(logs) > 1:
        return "training loss (thin) and validation loss (marked)"
    log, parts = logs[0], []
    if n := _number(log.model.get("total_params")):
        parts.append(f"{console.count(n)} parameters")
    if layers := log.model.get("n_layer"):
        parts.append(f"{layers} layers × {log.model.get('n_embd')}")
    losses = series(log.evals, "val_loss", "step")[1]
    if losses:
        parts.append(f"val loss {losses[-1]:.3f}, best {min(losses):.3f}")
    return "  ·  ".join(parts)


class _Panels:
    """The loss panel and, where there is something to show, learning rate and speed below it."""

    def __init__(self, figure: Any, logs: Sequence[Log], axis: str, scale: float) -> None:
        self.axis, self.scale, self.many = axis, scale, len(logs) > 1
        keys = ("lr", "tokens_per_sec")
        below = [k for k in keys if any(series(_source(log, k), k, axis)[0] for log in logs)]
        axes = figure.subplots(
            1 + len(below), 1, sharex=True, squeeze=False,
            height_ratios=[3.4, *[1.0] * len(below)],
        )  # fmt: skip
        self.figure, self.loss = figure, axes[0, 0]
        self.below = {k: axes[i + 1, 0] for i, k in enumerate(below)}
        self._shown: list[tuple[float, float]] = []  # what sets the y range: no step's spike does

    def losses(self, log: Log, colour: str | None) -> None:
        """Draw a run's training, validation and further losses, its gold steps and phases."""
        self._train(log, colour or TRAIN)
        name = log.name if self.many else "validation"
        x, y = self._series(log.evals, "val_loss")
        self._line(x, y, colour or VAL, name, marker="o" if len(x) <= 60 else None, width=1.8)
        for i, key in enumerate(log.eval_sets):
            x, y = self._series(log.evals, key)
            label = None if self.many else key.removeprefix("eval_")
            shade = colour or OTHERS[i % len(OTHERS)]
            self._line(x, y, shade, label, style=(0, (4, 1.6)), width=1.2)
        self._gold(log)
        for p in [] if self.many else log.phases:
            (x, _) = series([Point(p.step, p.tokens, p.seconds, {"_": 0.0})], "_", self.axis)
            for at in x:
                self.loss.axvline(at / self.scale, color=FAINT, linewidth=0.9, linestyle=":")
                self.loss.text(
                    at / self.scale, 0.98, f" {p.values.get('new_phase', '')}", color=FAINT,
                    fontsize=8, va="top", transform=self.loss.get_xaxis_transform(),
                )  # fmt: skip

    def _train(self, log: Log, colour: str) -> None:
        x, y = self._series(log.train, "loss")
        if not x:  # logs of MyPT have it at evaluations only, if at all
            x, y = self._series(log.evals, "train_loss")
            self._line(x, y, colour, None if self.many else "train", width=1.2)
            return
        width = max(1, min(len(y) // SMOOTH_SHARE, SMOOTH_MOST)) | 1
        smooth = running_mean(y, width)
        if width > 1:
            self.loss.plot(*thinned(x, y), color=colour, alpha=0.22, linewidth=0.8)
        label = None if self.many else ("train" if width == 1 else f"train (mean of {width} steps)")
        self._line(*thinned(x, smooth), colour, label, width=1.0 if self.many else 1.7)

    def _gold(self, log: Log) -> None:
        x, y = self._series(log.gold, "val_loss")
        if not x:
            return
        if not self.many:
            self.loss.scatter(x[:-1], y[:-1], s=22, color=GOLD, edgecolors=VAL, linewidths=1, zorder=5)
        label = None if self.many else f"gold: {y[-1]:.3f} at step {max(p.step for p in log.gold):,}"
        self.loss.scatter(x[-1:], y[-1:], marker="*", s=190, color=GOLD, edgecolors="white", linewidths=0.9, zorder=6, label=label)  # fmt: skip
        bx, by = self._series(log.blocked, "val_loss")
        if bx and not self.many:
            self.loss.scatter(bx, by, marker="x", s=30, color=FAINT, zorder=5, label="gold blocked")

    def side(self, log: Log, colour: str) -> None:
        """Draw learning rate and speed."""
        for key, panel in self.below.items():
            x, y = self._series(_source(log, key), key)
            if key == "tokens_per_sec" and len(y) >= SMOOTH_SHARE:
                panel.plot(*thinned(x, y), color=colour, alpha=0.22, linewidth=0.8)
                y = running_mean(y, max(3, min(len(y) // SMOOTH_SHARE, SMOOTH_MOST)) | 1)
            panel.plot(*thinned(x, y), color=colour, linewidth=1.4)

    def finish(self, title: str, subtitle: str, x_label: str) -> None:
        """Set titles, labels, ranges and the legend."""
        from matplotlib.ticker import EngFormatter

        if self._shown:
            self.loss.set_ylim(*_loss_range(self._shown))
        self.loss.set_ylabel("loss (nats per token)")
        for key, panel in self.below.items():
            panel.set_ylabel({"lr": "learning rate", "tokens_per_sec": "tokens/s"}[key])
            panel.set_ylim(bottom=0)
            if key == "lr":
                panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            else:
                panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        last = list(self.below.values())[-1] if self.below else self.loss
        last.set_xlabel(x_label)
        if self.axis == "step":
            last.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        last.margins(x=0.015)
        self.figure.align_ylabels()
        self.loss.legend(loc="upper right", fontsize=9, handlelength=1.8)
        self.loss.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=26)
        self.loss.annotate(
            subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points",
            fontsize=9, color=FAINT,
        )  # fmt: skip

    def _series(self, points: Sequence[Point], key: str) -> tuple[list[float], list[float]]:
        x, y = series(points, key, self.axis)
        return [v / self.scale for v in x], y

    def _line(
        self, x: Sequence[float], y: Sequence[float], colour: str, label: str | None, *,
        width: float, marker: str | None = None, style: Any = "-",
    ) -> None:  # fmt: skip
        if not x:
            return
        self._shown += zip(x, y, strict=True)
        self.loss.plot(
            x, y, color=colour, label=label, linewidth=width, linestyle=style, marker=marker,
            markersize=4, markeredgewidth=0,
        )  # fmt: skip


def _loss_range(shown: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Range of the loss axis: everything, unless the first fall would flatten all that follows."""
    begin, end = min(x for x, _ in shown), max(x for x, _ in shown)
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    late = max(y for x, y in shown if x >= begin + 0.04 * (end - begin))
    if high - low > 3 * (late - low) > 0:
        high = low + 1.5 * (late - low)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _source(log: Log, key: str) -> list[Point]:
    """Per-step events where they are logged, else the evaluations."""
    return log.train if any(key in p.values for p in log.train) else log.evals
