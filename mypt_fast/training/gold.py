"""Is this the best checkpoint? A pure decision over a small state."""

from dataclasses import asdict, dataclass, field
from typing import Any

from mypt_fast.config import GoldGuards


@dataclass
class GoldState:
    """What the decision remembers; saved with the run and restored on resume."""

    best_val_loss: float | None = None  # smallest validation loss seen
    best_gold_val_loss: float | None = None  # smallest one that was saved
    gold_step: int | None = None
    history: list[float] = field(default_factory=list)
    baselines: dict[str, float] = field(default_factory=dict)  # eval sets at the first evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """What to do with this evaluation's weights."""

    save: bool
    reason: str | None = None  # why a new minimum was blocked
    prev_best: float | None = None


def decide(
    state: GoldState,
    step: int,
    val_loss: float,
    train_loss: float | None,
    eval_losses: dict[str, float],
    guards: GoldGuards | None,
) -> Decision:
    """Record an evaluation in `state` and decide whether it is the new gold.

    A candidate must be strictly below the best saved loss. Guards are asked only about
    candidates, in the order overfit, trend, eval regression; None turns them off. The trend
    counts rises up to the previous evaluation: the candidate itself is the dip.

    Args:
        state: updated in place.
        step: step of the evaluation.
        val_loss: mean validation loss.
        train_loss: mean training loss since the last evaluation, None before the first step.
        eval_losses: loss of each further eval set.
        guards: thresholds.
    """
    past = list(state.history)
    state.history.append(val_loss)
    if not state.baselines:
        state.baselines = dict(eval_losses)
    if state.best_val_loss is None or val_loss < state.best_val_loss:
        state.best_val_loss = val_loss
    best = state.best_gold_val_loss
    if val_loss != val_loss or (best is not None and val_loss >= best):
        return Decision(save=False, prev_best=best)
    reason = None
    if guards is not None:
        reason = (
            _overfit(val_loss, train_loss, guards)
            or _trend(past, guards)
            or _regression(state.baselines, eval_losses, guards)
        )
    if reason is None:
        state.best_gold_val_loss, state.gold_step = val_loss, step
    return Decision(save=reason is None, reason=reason, prev_best=best)


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
        if base > 1e-6 and (loss - base) / base > guards.eval_regression:
            rise, limit = 100 * (loss - base) / base, 100 * guards.eval_regression
            return (
                f"eval regression: {name} {base:.4f}→{loss:.4f} "
                f"(+{rise:.1f}%, threshold={limit:g}%)"
            )
    return None
