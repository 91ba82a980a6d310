"""The learning rate as a function of the step."""

import pytest

from mypt_fast.config import TrainConfig
from mypt_fast.training.schedule import learning_rate, warmup_steps

COSINE = TrainConfig(learning_rate=1e-3, warmup_iters=3, max_iters=12)


@pytest.mark.parametrize(("step", "want"), [
    (0, 3.3333e-4), (2, 1e-3), (3, 1e-3), (4, 9.728617e-4), (8, 4.718583e-4),
    (11, 1.271383e-4), (12, 1e-4), (500, 1e-4),
])  # fmt: skip
def test_cosine_matches_the_specification(step: int, want: float) -> None:
    assert learning_rate(step, COSINE) == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize(
    ("value", "want"), [(0.05, 50), (0.5, 500), (0, 0), (1, 1), (1.0, 1), (200, 200), (0.0, 0)]
)
def test_warmup_is_a_share_below_one_and_a_count_from_one(value: float, want: int) -> None:
    assert warmup_steps(value, 1000) == want


def test_constant_stays_at_the_peak_after_warmup() -> None:
    cfg = TrainConfig(learning_rate=1e-3, warmup_iters=4, max_iters=100, schedule="constant")
    assert [learning_rate(s, cfg) for s in (0, 3, 4, 99)] == [2.5e-4, 1e-3, 1e-3, 1e-3]


def test_wsd_decays_linearly_over_the_last_share() -> None:
    cfg = TrainConfig(
        learning_rate=1.0,
        warmup_iters=0,
        max_iters=100,
        schedule="wsd",
        decay_fraction=0.2,
        min_lr_ratio=0.0,
    )
    assert [learning_rate(s, cfg) for s in (0, 79, 80, 90, 99)] == [1.0, 1.0, 1.0, 0.5, 0.05]
    assert learning_rate(200, cfg) == 0.0


def test_no_warmup_longer_than_the_run_divides_by_zero() -> None:
    cfg = TrainConfig(learning_rate=1.0, warmup_iters=10, max_iters=10)
    assert learning_rate(9, cfg) == 1.0
    assert learning_rate(10, cfg) == 1.0
