"""Has token accuracy stopped improving? A pure check over a small state (specification 4.5)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mypt_fast.config import Saturation


@dataclass
class SaturationState:
    """What the check remembers; saved with the run and restored on resume."""

    train: list[float] = field(default_factory=list)  # accuracies of past evaluations
    val: list[float] = field(default_factory=list)
    detected: bool = False
    step: int | None = None  # where it was first detected
    reason: str | None = None  # at the last evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


def is_on(rules: Saturation | None, use_loss_mask: bool) -> bool:
    """Whether accuracies are measured: as set, else where the loss is masked."""
    wanted = rules.enabled if rules else None
    return use_loss_mask if wanted is None else wanted


def check(
    state: SaturationState,
    step: int,
    train: float | None,
    val: float | None,
    rules: Saturation,
) -> str | None:
    """Record an evaluation's accuracies and say why they are saturated, None while they are not.

    Gains are per evaluation over the last `window` of them:
    - plateau: neither gains `min_delta`;
    - memorization: training gains, validation does not, and the gap between them grows;
    - gap: it grows by more than `gap_growth_threshold`.

    Args:
        state: updated in place.
        step: of the evaluation.
        train: accuracy on training windows; None where nothing counts.
        val: likewise on validation windows.
        rules: thresholds.
    """
    if train is None or val is None:
        return None
    state.train = [*state.train, train][-rules.window :]
    state.val = [*state.val, val][-rules.window :]
    state.reason = None
    if len(state.val) < rules.window or step < rules.min_steps_before_check:
        return None
    per = rules.window - 1
    train_gain = (state.train[-1] - state.train[0]) / per
    val_gain = (state.val[-1] - state.val[0]) / per
    growth = train_gain - val_gain
    if val_gain < rules.min_delta and train_gain < rules.min_delta:
        state.reason = f"plateau: train {train_gain:+.4f}, val {val_gain:+.4f} per evaluation"
    elif val_gain < rules.min_delta and train_gain > rules.min_delta and growth > 0:
        state.reason = (
            f"memorization shift: train {train_gain:+.4f}, val {val_gain:+.4f} per evaluation"
        )
    elif growth > rules.gap_growth_threshold:
        state.reason = f"gap widening: {growth:+.4f} per evaluation"
    if state.reason and not state.detected:
        state.detected, state.step = True, step
    return state.reason


def log_fields(
    state: SaturationState, train: tuple[float | None, int], val: tuple[float | None, int]
) -> dict[str, Any]:
    """Fields of an eval event, in MyPT's order; accuracies with six decimals."""
    accuracies = [None if a is None else round(a, 6) for a, _ in (train, val)]
    return {
        "train_masked_token_acc": accuracies[0],
        "val_masked_token_acc": accuracies[1],
        "train_masked_token_count": train[1],
        "val_masked_token_count": val[1],
        "masked_acc_gap": gap(*accuracies),
        "saturation_detected": state.detected,
        "saturation_reason": state.reason,
        "saturation_step": state.step,
    }


def saved_fields(saved_state: dict[str, Any], rules: Saturation | None) -> dict[str, Any]:
    """What training_config keeps of it: the six settings, then the state (specification 5)."""
    state = SaturationState(**saved_state)
    saved: dict[str, Any] = {
        **asdict(rules or Saturation()),
        "saturation_detected": state.detected, "saturation_step": state.step,
    }  # fmt: skip
    if state.val:
        saved |= {
            "last_train_masked_token_acc": state.train[-1],
            "last_val_masked_token_acc": state.val[-1],
            "last_masked_acc_gap": gap(state.train[-1], state.val[-1]),
            "last_saturation_reason": state.reason,
        }
    return saved


def gap(train: float | None, val: float | None) -> float | None:
    """How much better training windows are predicted."""
    return None if train is None or val is None else round(train - val, 6)
