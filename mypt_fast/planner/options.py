"""What a run's settings leave to be chosen, and which of them exclude each other."""

import dataclasses
from dataclasses import dataclass

from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import table


@dataclass(frozen=True)
class Options:
    """What may be chosen; by default everything.

    Attributes:
        chunks: rows of a chunk of logits; None: as the head chooses.
        rows: sequences of a forward where they are not to be chosen.
    """

    layouts: tuple[str, ...] = table.SEARCHED_LAYOUTS
    policies: tuple[str, ...] = tuple(table.POLICIES)
    chunks: tuple[int | None, ...] = (None, *table.CHUNK_ROWS[1:])
    rows: int | None = None


def options_of(cfg: ModelConfig, train: TrainConfig, dtype: str) -> Options:
    """What a run's settings leave to be chosen.

    Args:
        cfg: the model; `use_checkpoint` is the policy "block".
        train: settings; "auto" and 0 are what is left open.
        dtype: of the matmuls.

    Raises:
        ConfigError: for a state layout that this dtype does not have.
    """
    everything = Options()
    # the other layouts compute with bf16 weights
    layouts = everything.layouts if dtype == "bf16" else ("exact",)
    if train.state not in ("auto", *layouts):
        raise ConfigError(
            f"--state {train.state} computes with bf16 weights", f"found {dtype}",
            "use --state exact",
        )  # fmt: skip
    policies = everything.policies
    if train.kernels == "inductor" or cfg.per_head_era:  # what makes norms again is neither's
        policies = tuple(name for name in policies if not table.POLICIES[name].norms)
    policy = train.recompute
    if policy == "auto" and cfg.use_checkpoint:
        policy = "block"
    return Options(
        layouts if train.state == "auto" else (train.state,),
        policies if policy == "auto" else (policy,),
        (train.chunk_rows,) if train.chunk_rows else everything.chunks,
        train.micro_batch_size or None,
    )


def left_open(train: TrainConfig) -> TrainConfig:
    """The settings with nothing said about memory."""
    return dataclasses.replace(
        train, state="auto", recompute="auto", micro_batch_size=0, chunk_rows=0
    )


# what cannot run, each with the words of whoever asked for it


def check_rows(wanted: int, sequences: int) -> None:
    """Raise ConfigError for a micro-batch of more sequences than a step has."""
    if wanted > sequences:
        raise ConfigError(
            f"--micro_batch_size {wanted} is more than a step has",
            f"found {sequences} sequences a step", "lower it, or drop it",
        )  # fmt: skip


def check_policy(policy: str, cfg: ModelConfig, train: TrainConfig, named: str) -> None:
    """Raise ConfigError for a recompute policy that this model, or what runs it, does not know.

    Args:
        policy: "auto", or a name of `table.POLICIES`.
        cfg: the model.
        train: settings.
        named: the policy, as the user or the run named it.
    """
    if policy not in table.POLICIES or not table.POLICIES[policy].norms:
        return
    if train.kernels == "inductor":
        raise ConfigError(
            f"{named}, is done by operators that torch.compile does not look into",
            "found --kernels inductor", "use another of the two",
        )  # fmt: skip
    if cfg.per_head_era:
        raise ConfigError(
            f"{named}, knows GELU and SwiGLU", "found the ReLU of older checkpoints",
            "use --recompute block",
        )  # fmt: skip


def check_residual(wanted: str, dtype: str) -> None:
    """Raise ConfigError for a bf16 residual stream beside another precision."""
    if wanted == "bf16" and dtype != "bf16":
        raise ConfigError(
            "--residual_dtype bf16 is for bf16 mixed precision", f"found {dtype}", "drop it"
        )
