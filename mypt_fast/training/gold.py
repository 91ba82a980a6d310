"""Is this the best checkpoint? A pure decision over a small state.

Rules: MyPT specification 6; but here the final promotion passes the guards too.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from mypt_fast.config import ExternalGate, GoldGuards, GoldSelection


@dataclass
class GoldState:
    """What the decision remembers; saved with the run and restored on resume."""

    best_val_loss: float | None = None  # smallest validation loss seen
    best_gold_val_loss: float | None = None  # smallest one that was saved
    gold_step: int | None = None
    history: list[float] = field(default_factory=list)  # finite validation losses
    baselines: dict[str, float] = field(default_factory=dict)  # eval sets, where first evaluated
    evaluations: int = 0
    best_gate_metric: float | None = None  # of the gold checkpoint
    last_gate: dict[str, Any] | None = None
    windows: dict[str, Any] = field(default_factory=dict)  # of the gold checkpoint, for --gold_ci

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What the external gate said about a checkpoint."""

    ran: bool
    ok: bool = False  # it ended well and left JSON that can be read
    gate_pass: bool = False
    metric: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The losses that a decision is about.

    Attributes:
        step: of the weights.
        val_loss: mean validation loss.
        train_loss: mean training loss since the last evaluation; None before the first step.
        eval_losses: of each further eval set.
    """

    step: int
    val_loss: float
    train_loss: float | None = None
    eval_losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What to do with this evaluation's weights."""

    save: bool
    reason: str | None = None  # why a new minimum was blocked
    prev_best: float | None = None


def decide(
    state: GoldState,
    found: Evaluation,
    rules: GoldSelection,
    gate: Verdict | None = None,
    *,
    wide: bool = False,
) -> Decision:
    """Record an evaluation in `state` and decide whether it is the new gold.

    By validation loss a candidate is strictly below the best saved one; under the strategy
    external_gate, better by the gate's metric where there is one. Only candidates are blocked: by
    the guards, in the order overfit, trend, eval regression, then by the gate. The trend counts
    rises up to the previous evaluation: the candidate itself is the dip.

    Args:
        state: updated in place.
        found: what was measured.
        rules: strategy, guards and what is asked of the gate.
        gate: the gate's verdict, None where it was not asked.
        wide: report a block on evaluations that are no candidates too, as MyPT does.
    """
    past = list(state.history)
    _record(state, found)
    best, gate = state.best_gold_val_loss, gate or Verdict(ran=False)
    if not math.isfinite(found.val_loss):
        return Decision(save=False, prev_best=best)
    candidate = _is_candidate(state, found.val_loss, rules, gate)
    if not candidate and not wide:
        return Decision(save=False, prev_best=best)
    reason = _guarded(state, past, found, rules) or _gated(rules, gate)
    if candidate and reason is None:
        state.best_gold_val_loss, state.gold_step = found.val_loss, found.step
        state.best_gate_metric = gate.metric
    return Decision(save=candidate and reason is None, reason=reason, prev_best=best)


def _record(state: GoldState, found: Evaluation) -> None:
    state.evaluations += 1
    for name, loss in found.eval_losses.items():
        if math.isfinite(loss):
            state.baselines.setdefault(name, loss)
    if math.isfinite(found.val_loss):
        state.history.append(found.val_loss)
        if state.best_val_loss is None or found.val_loss < state.best_val_loss:
            state.best_val_loss = found.val_loss


def _is_candidate(state: GoldState, val_loss: float, rules: GoldSelection, gate: Verdict) -> bool:
    best = state.best_gold_val_loss
    lower = best is None or val_loss < best
    if rules.strategy != "external_gate" or gate.metric is None:
        return lower
    before = state.best_gate_metric
    better = is_better(gate.metric, before, rules.external_gate.metric_goal)
    return better or (gate.metric == before and lower)


def is_better(metric: float, best: float | None, goal: str) -> bool:
    """Whether a gate's metric beats the best one; anything beats None."""
    if best is None:
        return True
    return metric < best if goal == "min" else metric > best


def _guarded(
    state: GoldState, past: list[float], found: Evaluation, rules: GoldSelection
) -> str | None:
    if not rules.apply_loss_guards:
        return None
    return (
        _overfit(found.val_loss, found.train_loss, rules.guards)
        or _trend(past, rules.guards)
        or _regression(state.baselines, found.eval_losses, rules.guards)
    )


def _gated(rules: GoldSelection, gate: Verdict) -> str | None:
    """Why the gate keeps this checkpoint from being gold."""
    ext: ExternalGate = rules.external_gate
    if ext.enabled and ext.strict and gate.ran and not gate.ok:
        return "external gate failed, and it is strict"
    needed = {
        "val_loss": ext.enabled and ext.require_pass,
        "hybrid": True,
        # without a metric the pass is all there is to go by
        "external_gate": ext.require_pass or gate.metric is None,
    }[rules.strategy]
    if not needed or gate.gate_pass:
        return None
    said = "said no" if gate.ran else "did not run"
    if rules.strategy == "val_loss":
        return f"external gate {said}"
    return f"{rules.strategy} strategy needs a pass: the external gate {said}"


def _overfit(val_loss: float, train_loss: float | None, guards: GoldGuards) -> str | None:
    if train_loss is None or train_loss <= 1e-6 or val_loss / train_loss <= guards.overfit_ratio:
        return None
    return f"overfit: val/train={val_loss / train_loss:.1f}x, threshold={guards.overfit_ratio:.1f}x"


def _trend(past: list[float], guards: GoldGuards) -> str | None:
    rises = 0
    while rises + 1 < len(past) and past[-1 - rises] > past[-2 - rises]:
        rises += 1
    return f"trend: {rises} consecutive val rises" if rises >= guards.consecutive_rises else None


def _regression(
    baselines: dict[str, float], now: dict[str, float], guards: GoldGuards
) -> str | None:
    for name, loss in now.items():
        base = baselines.get(name, 0.0)
        if not math.isfinite(loss):
            return f"eval regression: {name} is {loss}"
        if base > 1e-6 and (loss - base) / base > guards.eval_regression:
            rise, limit = 100 * (loss - base) / base, 100 * guards.eval_regression
            return (
                f"eval regression: {name} {base:.4f}→{loss:.4f} "
                f"(+{rise:.1f}%, threshold={limit:g}%)"
            )
    return None


def selection_file(state: GoldState, rules: GoldSelection, step: int) -> dict[str, Any]:
    """Content of gold_selection_state.json (MyPT specification 6.5)."""
    shown = ("enabled", "metric_path", "metric_goal", "pass_path", "require_pass")
    return {
        "strategy": rules.strategy,
        "iter": step,
        "best_val_loss": state.best_val_loss,
        "best_gold_val_loss": state.best_gold_val_loss,
        "best_gate_metric": state.best_gate_metric,
        "gold_step": state.gold_step,
        "external_gate": {name: getattr(rules.external_gate, name) for name in shown},
        "last_gate": _of_gate(state.last_gate),
    }


def _of_gate(last: dict[str, Any] | None) -> dict[str, Any] | None:
    names = ("ran", "ok", "gate_pass", "metric_value", "returncode", "output_json", "error")
    return None if last is None else {name: last.get(name) for name in names}


def from_selection_file(content: object) -> GoldState:
    """What a gold_selection_state.json tells of a run that MyPT trained; it never reads it."""
    raw = content if isinstance(content, dict) else {}

    def number(key: str) -> float | None:
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value) if abs(value) <= sys.float_info.max else None

    step = raw.get("gold_step")
    if type(step) is not int or number("best_gold_val_loss") is None:
        return GoldState()
    return GoldState(
        number("best_val_loss"), number("best_gold_val_loss"), step,
        best_gate_metric=number("best_gate_metric"),
    )  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % confidence interval."""

    windows: int
    mean: float
    low: float
    high: float


def paired_interval(new: list[float], old: list[float]) -> Interval | None:
    """How much lower or higher the losses of the same windows are, and how sure that is.

    The mean of the differences of pairs, with Student's quantile for their number: window by
    window the text is the same, so its difficulty drops out.

    Args:
        new: mean loss of each window now; NaN where none of its tokens counts.
        old: the same windows' under the weights compared with.

    Returns:
        None for windows that are not the same number, and for fewer than two.
    """
    if len(new) != len(old):
        return None
    pairs = zip(new, old, strict=True)
    differences = [a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    half = _student_95(n - 1) * math.sqrt(variance / n)
    return Interval(n, mean, mean - half, mean + half)


def _student_95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2, within 0.3 % from 3 on."""
    if freedom <= 2:
        return (12.706205, 4.302653)[freedom - 1]
    z, v = 1.959963985, freedom  # Abramowitz and Stegun 26.7.5
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))
