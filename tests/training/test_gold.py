"""The gold decision, as tables of evaluations."""

import math

import pytest

from mypt_fast.config import GoldGuards
from mypt_fast.training.gold import GoldState, decide

GUARDS = GoldGuards()


def play(
    losses: list[float], train: float | None = None, guards: GoldGuards | None = GUARDS
) -> list[str]:
    """What happens at each evaluation: 'gold', 'blocked' or '-'."""
    state, seen = GoldState(), []
    for step, loss in enumerate(losses):
        d = decide(state, step, loss, train, {}, guards)
        assert not (d.save and d.reason)
        seen.append("gold" if d.save else "blocked" if d.reason else "-")
    return seen


@pytest.mark.parametrize(("losses", "want"), [
    ([5, 4, 4.1, 4.2, 3.9, 3.8], ["gold", "gold", "-", "-", "blocked", "gold"]),
    ([5, 4, 4.1, 3.9], ["gold", "gold", "-", "gold"]),  # one rise is no trend
    ([5, 5, 5], ["gold", "-", "-"]),  # equal is not better
    ([5, 4, 4.1, 4.2, 4.3], ["gold", "gold", "-", "-", "-"]),  # only a new minimum is blocked
    ([3, 4, 5, 6, 2, 1.9], ["gold", "-", "-", "-", "blocked", "gold"]),
    ([5, math.nan, 4], ["gold", "-", "gold"]),  # a NaN is never gold and never best
])  # fmt: skip
def test_worked_sequences(losses: list[float], want: list[str]) -> None:
    assert play(losses) == want


def test_without_guards_every_minimum_is_gold() -> None:
    assert play([5, 4, 4.1, 4.2, 3.9], guards=None) == ["gold", "gold", "-", "-", "gold"]


def test_an_overfit_minimum_is_blocked_with_the_seeds_words() -> None:
    state = GoldState()
    assert decide(state, 0, 0.51, None, {}, GUARDS).save
    d = decide(state, 100, 0.49, 0.001, {}, GUARDS)
    assert d.reason == "overfit: val/train=490.0x, threshold=5.0x"
    assert (d.save, d.prev_best, state.best_gold_val_loss) == (False, 0.51, 0.51)
    assert state.best_val_loss == 0.49
    assert decide(state, 200, 0.48, 0.2, {}, GUARDS).save


def test_the_trend_reason_counts_the_rises() -> None:
    state = GoldState()
    for step, loss in enumerate([3, 3.1, 3.2, 3.3]):
        decide(state, step, loss, None, {}, GUARDS)
    assert decide(state, 9, 2.0, None, {}, GUARDS).reason == "trend: 3 consecutive val rises"


def test_an_eval_set_that_got_much_worse_blocks() -> None:
    state = GoldState()
    decide(state, 0, 5.0, None, {"code": 2.0}, GUARDS)
    assert decide(state, 1, 4.9, None, {"code": 2.4}, GUARDS).save  # exactly 20 % is allowed
    d = decide(state, 2, 4.8, None, {"code": 2.41}, GUARDS)
    assert d.reason == "eval regression: code 2.0000→2.4100 (+20.5%, threshold=20%)"


def test_the_first_hit_of_overfit_trend_regression_is_the_reason() -> None:
    state = GoldState()
    for loss in (3, 3.1, 3.2):
        decide(state, 0, loss, None, {"x": 1.0}, GUARDS)
    assert (decide(state, 1, 2.0, 0.1, {"x": 9.0}, GUARDS).reason or "").startswith("overfit")


def test_state_round_trips_through_json() -> None:
    import json

    state = GoldState()
    decide(state, 3, 4.0, None, {"a": 1.0}, GUARDS)
    assert GoldState(**json.loads(json.dumps(state.to_dict()))) == state
