"""How much of a dataset a run reads, and how long it may take (MyPT specification 1.9)."""

from typing import Any

from mypt_fast import console

RECOMMENDED_PASSES = {"min": 2, "max": 5, "optimal": 3.5}
SECONDS_PER_EVALUATION = 10.0
SECONDS_PER_STEP = 0.5
# below this many passes: what to call it
BANDS = (
    (0.5, "very low: most of the data is never read"),
    (1.0, "low: a part of the data is never read"),
    (2.0, "fair: every token about once; more would help"),
    (5.0, "good"),
    (10.0, "high: watch the validation loss"),
    (float("inf"), "very high: overfitting is likely"),
)


def calculate_dataset_coverage(
    max_iters: int, batch_size: int, block_size: int, total_tokens: int, grad_accum_steps: int = 1
) -> dict[str, Any]:
    """Compare the tokens that a run reads with those of a dataset.

    Args:
        max_iters: optimizer steps.
        batch_size: sequences per micro-step.
        block_size: tokens per sequence.
        total_tokens: of the dataset.
        grad_accum_steps: micro-steps per optimizer step.
    """
    per_iter = batch_size * block_size * grad_accum_steps
    viewed = max_iters * per_iter
    return {
        "tokens_per_iter": per_iter,
        "grad_accum_steps": grad_accum_steps,
        "total_tokens_viewed": viewed,
        "dataset_tokens": total_tokens,
        **_ratio(viewed, total_tokens),
        **{
            f"recommended_{name}_iters": int(passes * total_tokens / per_iter) if per_iter else 0
            for name, passes in _recommended()
        },
    }


def calculate_episode_coverage(
    max_iters: int, batch_size: int, total_episodes: int, grad_accum_steps: int = 1
) -> dict[str, Any]:
    """Compare the episodes that a run reads with those of a dataset; arguments as above."""
    per_iter = batch_size * grad_accum_steps
    viewed = max_iters * per_iter
    per_epoch = total_episodes // per_iter if per_iter else 0
    return {
        "episodes_per_iter": per_iter,
        "grad_accum_steps": grad_accum_steps,
        "total_episodes_viewed": viewed,
        "dataset_episodes": total_episodes,
        "batches_per_epoch": per_epoch,
        **_ratio(viewed, total_episodes),
        **{f"recommended_{name}_iters": int(passes * per_epoch) for name, passes in _recommended()},
        "is_episode_indexed": True,
    }


def _ratio(viewed: int, total: int) -> dict[str, float]:
    ratio = viewed / total if total else 0
    return {"coverage_ratio": ratio, "coverage_percentage": ratio * 100}


def _recommended() -> list[tuple[str, float]]:
    return list(RECOMMENDED_PASSES.items())


def coverage_band(ratio: float) -> str:
    """What a number of passes over the data is called."""
    # 5 passes are still good and 10 still high: only the first three limits are themselves excluded
    return next(text for limit, text in BANDS if ratio < limit or (ratio == limit >= 5))


def print_coverage_analysis(coverage: dict[str, Any], current_iters: int) -> None:
    """Print what `calculate_dataset_coverage` found."""
    _print_analysis(coverage, current_iters, "tokens", "tokens_per_iter")


def print_episode_coverage_analysis(coverage: dict[str, Any], current_iters: int) -> None:
    """Print what `calculate_episode_coverage` found."""
    _print_analysis(coverage, current_iters, "episodes", "episodes_per_iter")


def _print_analysis(coverage: dict[str, Any], iters: int, unit: str, per_iter: str) -> None:
    ratio = coverage["coverage_ratio"]
    for line in (
        "Dataset coverage",
        f"  {unit:<9} : {coverage[f'dataset_{unit}']:,} in the dataset, {coverage[per_iter]:,} "
        f"a step",
        f"  run       : {iters:,} steps read {coverage[f'total_{unit}_viewed']:,}",
        f"  coverage  : {ratio:.2f} passes ({coverage['coverage_percentage']:.1f} %): "
        f"{coverage_band(ratio)}",
        f"  2 to 5 passes are {coverage['recommended_min_iters']:,} to "
        f"{coverage['recommended_max_iters']:,} steps",
    ):
        console.say(line)


def coverage_line(coverage: dict[str, Any], max_iters: int) -> str:
    """The report in one line, as `mypt-fast train` prints it."""
    ratio = coverage["coverage_ratio"]
    low, high = coverage["recommended_min_iters"], coverage["recommended_max_iters"]
    return (
        f"{max_iters:,} steps are {ratio:.2g} passes over the data, {coverage_band(ratio)}; "
        f"2 to 5 passes are {low:,} to {high:,} steps"
    )


def estimate_training_time(
    max_iters: int, eval_interval: int, time_per_iter_seconds: float | None = None
) -> dict[str, Any]:
    """Guess the seconds of a run from those of a step, 10 s for each evaluation added."""
    step = SECONDS_PER_STEP if time_per_iter_seconds is None else time_per_iter_seconds
    evaluations = max_iters // eval_interval if eval_interval else 0
    training, evaluating = max_iters * step, evaluations * SECONDS_PER_EVALUATION
    total = training + evaluating
    return {
        "training_time_seconds": training,
        "eval_time_seconds": evaluating,
        "total_seconds": total,
        "hours": int(total // 3600),
        "minutes": int(total % 3600 // 60),
        "num_evaluations": evaluations,
    }


def print_training_estimates(
    max_iters: int, eval_interval: int, batch_size: int, block_size: int
) -> None:
    """Print a guess of a run's length and the tokens it reads."""
    found = estimate_training_time(max_iters, eval_interval)
    tokens = max_iters * batch_size * block_size
    console.say(
        f"Estimate: {found['hours']} h {found['minutes']} min for {max_iters:,} steps and "
        f"{found['num_evaluations']} evaluations, {tokens:,} tokens, at "
        f"{SECONDS_PER_STEP} s a step"
    )
