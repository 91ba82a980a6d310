"""Draw training logs: losses, learning rate, speed.

One run: colours tell the curves apart. Several: each run has a colour, and its curves a style.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mypt_fast import console
from mypt_fast.errors import DataError
from mypt_fast.run_log import Log, Point, number, position, series

MAX_POINTS = 2000  # a line cannot show more on a page; beyond, each bucket keeps its extremes
SMOOTH_SHARE, SMOOTH_MOST = 40, 200  # the mean spans this part of the run, at most so many steps
AXES = {"step": "step", "tokens": "tokens", "time": "training time"}
INK, FAINT = "#22262e", "#8b93a1"
TRAIN, VAL, GOLD = "#3b6fb6", "#d1495b", "#e3a008"
OTHERS = ("#2a9d8f", "#8e5ea2", "#b5762a", "#5c7c3a", "#c2569b", "#4d4d4d")
RUNS = ("#3b6fb6", "#d1495b", "#2a9d8f", "#8e5ea2", "#b5762a", "#5c7c3a", "#c2569b", "#4d4d4d")
INCIDENT_MARKS = {
    "skipped_step": ("x", VAL), "loss_spike": ("^", VAL), "rollback": ("<", INK), "oom": ("s", INK),
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e9ee", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "lines.solid_capstyle": "round", "axes.linewidth": 0.8,
    "text.parse_math": False, "xtick.major.width": 0.8, "ytick.major.width": 0.8,
}  # fmt: skip


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
        losses = ((log.train, "loss"), (log.evals, "val_loss"))
        if not any(series(points, key, axis)[0] for points, key in losses):
            raise DataError(f"{log.path}: no finite losses over {axis}", cure="try --x step")
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # a box in a name, not a page of warnings
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
    if axis == "step":
        return 1.0, ""
    if axis == "tokens":
        top = max((p.tokens or 0.0 for p in points), default=0.0)
        units = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"))
    else:
        top = max((p.seconds for p in points), default=0.0)
        units = ((3600.0, " (hours)"), (60.0, " (minutes)"), (1.0, " (seconds)"))
    smallest = (1.0, "" if axis == "tokens" else " (seconds)")
    return next((unit for unit in units if top >= 1.5 * unit[0]), smallest)


def _title(logs: Sequence[Log]) -> str:
    names = ", ".join(log.name for log in logs)
    return names if len(names) <= 70 else f"{len(logs)} runs"


def _subtitle(logs: Sequence[Log]) -> str:
    if len(logs) > 1:
        return "training loss (thin) and validation loss (marked)"
    log, parts = logs[0], []
    if n := number(log.model.get("total_params")):
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
        self._gold(log)
        if self.many:  # further sets and phases of several runs would hide what is compared
            return
        for i, key in enumerate(log.eval_sets):
            x, y = self._series(log.evals, key)
            shade, label = OTHERS[i % len(OTHERS)], key.removeprefix("eval_")
            self._line(x, y, shade, label, style=(0, (4, 1.6)), width=1.2)
        for p in log.phases:
            at = position(p, self.axis)
            if at is not None:
                self._phase(at / self.scale, str(p.values.get("new_phase", "")))
        self._incidents(log)

    def _incidents(self, log: Log) -> None:
        """Mark steps that were skipped, spiked or rolled back on the upper edge."""
        for kind in dict.fromkeys(str(p.values["event"]) for p in log.incidents):
            points = [p for p in log.incidents if p.values["event"] == kind]
            x = [at / self.scale for p in points if (at := position(p, self.axis)) is not None]
            mark, colour = INCIDENT_MARKS[kind]
            self.loss.scatter(
                x, [0.97] * len(x), marker=mark, s=34, color=colour, zorder=5, clip_on=False,
                transform=self.loss.get_xaxis_transform(), linewidths=1,
                label=f"{kind.replace('_', ' ')} ({len(x)})",
            )  # fmt: skip

    def _phase(self, x: float, name: str) -> None:
        self.loss.axvline(x, color=FAINT, linewidth=0.9, linestyle=":")
        self.loss.text(
            x, 0.98, f" {name}", color=FAINT, fontsize=8, va="top",
            transform=self.loss.get_xaxis_transform(),
        )  # fmt: skip

    def _train(self, log: Log, colour: str) -> None:
        x, y = self._series(log.train, "loss")
        if not x:  # logs of MyPT have it at evaluations only, if at all
            x, y = self._series(log.evals, "train_loss")
            self._line(x, y, colour, None if self.many else "train", width=1.2)
            return
        width = max(1, min(len(y) // SMOOTH_SHARE, SMOOTH_MOST)) | 1
        smooth = running_mean(y, width)
        if width > 1 and not self.many:
            self.loss.plot(*thinned(x, y), color=colour, alpha=0.22, linewidth=0.8)
        label = None if self.many else ("train" if width == 1 else f"train (mean of {width} steps)")
        self._line(*thinned(x, smooth), colour, label, width=1.0 if self.many else 1.7)

    def _gold(self, log: Log) -> None:
        x, y = self._series(log.gold, "val_loss")
        if not x:
            return
        if not self.many:
            self.loss.scatter(
                x[:-1], y[:-1], s=22, color=GOLD, edgecolors=VAL, linewidths=1, zorder=5
            )
        step = max(p.step for p in log.gold)
        label = None if self.many else f"gold: {y[-1]:.3f} at step {step:,}"
        self.loss.scatter(
            x[-1:], y[-1:], marker="*", s=190, color=GOLD, edgecolors="white", linewidths=0.9,
            zorder=6, label=label,
        )  # fmt: skip
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
            if key == "tokens_per_sec" and not self.many:
                self._mfu_axis(panel, log)

    def _mfu_axis(self, panel: Any, log: Log) -> None:
        """Speed as MFU on the right, where it is logged: one is a multiple of the other."""
        from matplotlib.ticker import PercentFormatter

        shares = [p for p in log.train if number(p.values.get("mfu"))]
        speeds = [number(p.values.get("tokens_per_sec")) or 0.0 for p in shares]
        if not sum(speeds):
            return
        of_one = sum(p.values["mfu"] for p in shares) / sum(speeds)
        axis = panel.secondary_yaxis(
            "right", functions=(lambda v: v * of_one, lambda v: v / of_one)
        )
        axis.set_ylabel("MFU")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

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
                panel.yaxis.set_major_formatter(lambda v, _: _short(v))
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


def _short(value: float) -> str:
    """Write a learning rate as people type it: 3e-4, 1.5e-4, 0."""
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


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
