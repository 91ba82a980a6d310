"""The gold decision, as tables of evaluations."""

import json
import math
from dataclasses import replace

import pytest

from mypt_fast.config import ExternalGate, GoldGuards, GoldSelection
from mypt_fast.training.gold import (
    Decision,
    Evaluation,
    GoldState,
    Verdict,
    decide,
    from_selection_file,
    paired_interval,
    selection_file,
)

RULES = GoldSelection()
UNGUARDED = GoldSelection(apply_loss_guards=False)


def look(
    state: GoldState,
    step: int,
    val: float,
    train: float | None = None,
    sets: dict[str, float] | None = None,
    rules: GoldSelection = RULES,
    gate: Verdict | None = None,
    wide: bool = False,
) -> Decision:
    """One evaluation."""
    d = decide(state, Evaluation(step, val, train, sets or {}), rules, gate, wide=wide)
    assert not (d.save and d.reason)
    return d


def play(losses: list[float], rules: GoldSelection = RULES, wide: bool = False) -> list[str]:
    """What happens at each evaluation: 'gold', 'blocked' or '-'."""
    state = GoldState()
    decisions = [look(state, i, loss, rules=rules, wide=wide) for i, loss in enumerate(losses)]
    return ["gold" if d.save else "blocked" if d.reason else "-" for d in decisions]


# losses, as the documents have it, as MyPT reports it
@pytest.mark.parametrize(("losses", "want", "wide"), [
    # the worked sequences of the specification
    ([5, 4, 4.1, 4.2, 3.9, 3.8], "gold gold - - blocked gold", "gold gold - - blocked gold"),
    ([5, 5, 5], "gold - -", "gold - -"),  # equal is not better
    ([5, 4, 4.1, 4.2, 4.3], "gold gold - - -", "gold gold - - blocked"),
    # and more
    ([5, 4, 4.1, 3.9], "gold gold - gold", "gold gold - gold"),  # one rise is no trend
    ([3, 4, 5, 6, 2, 1.9], "gold - - - blocked gold", "gold - - blocked blocked gold"),
    ([4, 4.1, 4.2, 3.9, 3.95], "gold - - blocked gold", "gold - - blocked gold"),
    ([5, math.nan, 4], "gold - gold", "gold - gold"),  # a NaN is never gold and never best
    ([math.inf, 4], "- gold", "- gold"),
])  # fmt: skip
def test_worked_sequences(losses: list[float], want: str, wide: str) -> None:
    assert play(losses) == want.split()
    assert play(losses, wide=True) == wide.split()


def test_without_guards_every_minimum_is_gold() -> None:
    assert play([5, 4, 4.1, 4.2, 3.9], UNGUARDED) == ["gold", "gold", "-", "-", "gold"]


def test_an_overfit_minimum_is_blocked_with_the_seeds_words() -> None:
    state = GoldState()
    assert look(state, 0, 0.51).save
    d = look(state, 100, 0.49, 0.001)
    assert d.reason == "overfit: val/train=490.0x, threshold=5.0x"
    assert (d.save, d.prev_best, state.best_gold_val_loss) == (False, 0.51, 0.51)
    assert state.best_val_loss == 0.49
    assert look(state, 200, 0.48, 0.2).save


@pytest.mark.parametrize(("train", "saved"), [(1.0, True), (0.999, False), (1e-6, True)])
def test_the_overfit_ratio_is_exact(train: float, saved: bool) -> None:
    assert look(GoldState(), 0, 5.0, train).save is saved


def test_the_trend_reason_counts_the_rises() -> None:
    state = GoldState()
    for step, loss in enumerate([3, 3.1, 3.2, 3.3]):
        look(state, step, loss)
    assert look(state, 9, 2.0).reason == "trend: 3 consecutive val rises"


def test_an_eval_set_that_got_much_worse_blocks() -> None:
    state = GoldState()
    look(state, 0, 5.0, sets={"code": 2.0})
    assert look(state, 1, 4.9, sets={"code": 2.4}).save  # exactly 20 % is allowed
    d = look(state, 2, 4.8, sets={"code": 2.41})
    assert d.reason == "eval regression: code 2.0000→2.4100 (+20.5%, threshold=20%)"


def test_an_eval_set_without_a_finite_loss_blocks_and_is_no_baseline() -> None:
    state = GoldState()
    d = look(state, 0, 5.0, sets={"code": math.nan})
    assert d.reason == "eval regression: code is nan"
    assert look(state, 1, 4.9, sets={"code": 2.0, "new": 1.0}).save
    assert state.baselines == {"code": 2.0, "new": 1.0}  # each from where it was first finite
    assert (look(state, 2, 4.8, sets={"code": 2.0, "new": 1.3}).reason or "").startswith(
        "eval regression: new 1.0000→1.3000"
    )


def test_the_first_hit_of_overfit_trend_regression_gate_is_the_reason() -> None:
    guards = GoldGuards()
    gate = ExternalGate(enabled=True, require_pass=True)
    reasons = []
    for off in (
        {}, {"overfit_ratio": 1e9}, {"overfit_ratio": 1e9, "consecutive_rises": 99},
        {"overfit_ratio": 1e9, "consecutive_rises": 99, "eval_regression": 1e9},
    ):  # fmt: skip
        state = GoldState()
        for loss in (3, 3.1, 3.2):
            look(state, 0, loss, sets={"x": 1.0})
        rules = GoldSelection(guards=replace(guards, **off), external_gate=gate)
        d = look(state, 1, 2.0, 0.1, {"x": 9.0}, rules, Verdict(True, True, False))
        reasons.append((d.reason or "").split(":")[0])
    assert reasons == ["overfit", "trend", "eval regression", "external gate said no"]


PASS, FAIL = Verdict(True, True, True, 0.5), Verdict(True, True, False, 0.5)
BROKEN, ABSENT = Verdict(True), None


# strategy, require_pass, strict; then what a new minimum is under each verdict
@pytest.mark.parametrize(("strategy", "need", "strict", "want"), [
    # PASS FAIL BROKEN ABSENT
    ("val_loss", False, False, "gold gold gold gold"),
    ("val_loss", False, True, "gold gold blocked gold"),
    ("val_loss", True, False, "gold blocked blocked blocked"),
    ("hybrid", False, False, "gold blocked blocked blocked"),
    ("hybrid", True, True, "gold blocked blocked blocked"),
    ("external_gate", False, False, "gold gold blocked blocked"),
    ("external_gate", True, False, "gold blocked blocked blocked"),
])  # fmt: skip
def test_what_a_verdict_does_under_each_strategy(
    strategy: str, need: bool, strict: bool, want: str
) -> None:
    ext = ExternalGate(enabled=True, require_pass=need, strict=strict)
    rules = GoldSelection(strategy=strategy, external_gate=ext)
    for verdict, expected in zip((PASS, FAIL, BROKEN, ABSENT), want.split(), strict=True):
        d = look(GoldState(), 0, 4.0, rules=rules, gate=verdict)
        assert ("gold" if d.save else "blocked") == expected
        state = GoldState(best_gold_val_loss=3.0, best_gate_metric=0.9)
        worse = look(state, 0, 4.0, rules=rules, gate=verdict)
        assert (worse.save, worse.reason) == (False, None)  # no new minimum: nothing to report


def test_hybrid_without_a_gate_never_saves() -> None:
    assert play([5, 4], GoldSelection(strategy="hybrid")) == ["blocked", "blocked"]


@pytest.mark.parametrize(("goal", "metrics", "want"), [
    ("max", [0.5, 0.4, 0.6, 0.6], [True, False, True, False]),
    ("min", [0.5, 0.4, 0.6, 0.4], [True, True, False, False]),
])  # fmt: skip
def test_the_gates_metric_decides_whatever_the_loss(
    goal: str, metrics: list[float], want: list[bool]
) -> None:
    ext = ExternalGate(enabled=True, metric_goal=goal, metric_path="m")
    rules = GoldSelection(strategy="external_gate", external_gate=ext, apply_loss_guards=False)
    state = GoldState()
    losses = [4.0, 4.5, 5.0, 5.5]  # ever worse
    saved = [
        look(state, i, loss, rules=rules, gate=Verdict(True, True, False, metric)).save
        for i, (loss, metric) in enumerate(zip(losses, metrics, strict=True))
    ]
    assert saved == want
    assert state.best_gate_metric == (0.6 if goal == "max" else 0.4)
    tie = look(state, 9, 1.0, rules=rules, gate=Verdict(True, True, False, state.best_gate_metric))
    assert tie.save  # equal by the metric, lower by the loss


def test_state_round_trips_through_json_and_reads_older_ones() -> None:
    state = GoldState()
    look(state, 3, 4.0, sets={"a": 1.0})
    assert GoldState(**json.loads(json.dumps(state.to_dict()))) == state
    older = {"best_val_loss": 4.0, "best_gold_val_loss": 4.0, "gold_step": 3, "history": [4.0]}
    assert not look(GoldState(**older, baselines={}), 4, 4.0).save


def test_the_state_file_has_the_fields_of_the_format_in_order() -> None:
    state = GoldState()
    look(state, 3, 4.0)
    content = selection_file(state, RULES, 5)
    assert list(content) == [
        "strategy", "iter", "best_val_loss", "best_gold_val_loss", "best_gate_metric",
        "gold_step", "external_gate", "last_gate",
    ]  # fmt: skip
    assert (content["iter"], content["gold_step"], content["best_gold_val_loss"]) == (5, 3, 4.0)


@pytest.mark.parametrize("content", [
    None, [], {}, {"gold_step": 3}, {"gold_step": 3, "best_gold_val_loss": "x"},
    {"gold_step": None, "best_gold_val_loss": math.inf}, {"gold_step": True},
    {"gold_step": 3, "best_gold_val_loss": 10**400},
])  # fmt: skip
def test_a_state_file_that_says_nothing_gives_a_new_state(content: object) -> None:
    assert from_selection_file(content) == GoldState()


def test_a_state_file_gives_back_what_it_was_made_of() -> None:
    state = GoldState()
    look(state, 3, 4.0)
    again = from_selection_file(json.loads(json.dumps(selection_file(state, RULES, 5))))
    assert not look(again, 9, 4.0).save
    assert (again.best_gold_val_loss, again.gold_step) == (4.0, 3)


# Student's t for a few degrees of freedom, from tables
@pytest.mark.parametrize(
    ("n", "t"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (6, 2.5706), (31, 2.0423), (1001, 1.9623)]
)
def test_the_interval_is_students_over_differences_of_pairs(n: int, t: float) -> None:
    old = [2.0 + 3 * (i % 7) for i in range(n)]  # texts differ far more than the two models do
    new = [x - 0.1 + (0.01 if i % 2 else -0.01) for i, x in enumerate(old)]
    found = paired_interval(new, old)
    assert found is not None
    differences = [a - b for a, b in zip(new, old, strict=True)]
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    assert found.windows == n
    assert found.mean == pytest.approx(mean)
    assert found.high - found.mean == pytest.approx(t * spread / math.sqrt(n), rel=3e-3)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_windows_without_a_loss_and_windows_that_do_not_match_are_left_out() -> None:
    found = paired_interval([1.0, math.nan, 2.0, 3.0], [1.5, 1.0, 2.5, 3.5])
    assert found is not None
    assert (found.windows, found.mean) == (3, -0.5)
    assert paired_interval([1.0, 2.0], [1.0]) is None
    assert paired_interval([1.0], [2.0]) is None
