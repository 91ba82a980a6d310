"""The learning rate as a pure function of the step."""

import math

from mypt_fast.config import TrainConfig


def warmup_steps(warmup_iters: float, max_iters: int) -> int:
    """A float strictly between 0 and 1 is a share of the run; anything else counts steps."""
    if isinstance(warmup_iters, float) and 0 < warmup_iters < 1:
        return int(warmup_iters * max_iters)
    return int(warmup_iters)


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of the update made at `step` (0-based).

    Linear warmup to the peak, then
    - cosine: to `min_lr_ratio` of the peak at `max_iters` (MyPT specification 4.3);
    - constant: the peak;
    - wsd: the peak, then linearly down over the last `decay_fraction` (arXiv 2405.18392).
    """
    peak, floor = cfg.learning_rate, cfg.min_lr_ratio * cfg.learning_rate
    warmup = warmup_steps(cfg.warmup_iters, cfg.max_iters)
    if step < warmup:
        return peak * (step + 1) / warmup
    if cfg.schedule == "constant":
        return peak
    if cfg.schedule == "wsd":
        span = max(1, int(cfg.decay_fraction * cfg.max_iters))
        left = min(max(cfg.max_iters - step, 0), span)
        return floor + (peak - floor) * left / span
    progress = min((step - warmup) / max(1, cfg.max_iters - warmup), 1.0)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))
