"""Split the global batch into micro-batches that fit memory."""

from __future__ import annotations

from mypt_fast import accounting, console
from mypt_fast.config import ModelConfig
from mypt_fast.errors import ConfigError
from mypt_fast.settings import Settings
from mypt_fast.training import device as devices

MEMORY_SHARE = 0.9  # of what is free: the estimate is not exact, and others use the machine


def choose_micro_batch(
    settings: Settings, precision: devices.Precision, free: int, notices: list[str]
) -> int:
    """Sequences per forward: as typed, as the saved run chose, or the largest that fits.

    The global batch never changes. Where not even one sequence fits, `use_checkpoint` is turned
    on; where that does not help either, a notice says so and one sequence is tried.
    """
    cfg, wanted = settings.model, settings.train.micro_batch_size
    if wanted > settings.global_batch:
        raise ConfigError(
            "micro_batch_size is larger than the global batch",
            f"found {wanted} > {settings.global_batch}",
        )
    # another split would draw dropout in another order
    state = settings.train.state
    rows = wanted or saved_micro_batch(settings) or _fitting(cfg, precision, free, state)
    if rows:
        return rows
    cfg.use_checkpoint = True
    rows = _fitting(cfg, precision, free, state)
    if rows:
        notices.append("use_checkpoint is on: keeping every activation would not fit memory")
        return rows
    need = console.bytes_text(accounting.state_bytes(cfg, state).total)
    notices.append(
        f"this model may not fit: weights, gradients and moments take {need} of "
        f"{console.bytes_text(free)} free"
    )
    return 1


def saved_micro_batch(settings: Settings) -> int | None:
    """The split a resumed run was trained with, if it is for the same global batch."""
    plan = settings.saved_state.get("plan")
    if not isinstance(plan, dict) or plan.get("global_batch") != settings.global_batch:
        return None
    rows = plan.get("micro_batch_size")
    return rows if isinstance(rows, int) and 0 < rows <= settings.global_batch else None


def _fitting(cfg: ModelConfig, precision: devices.Precision, free: int, state: str) -> int | None:
    usable = int(free * MEMORY_SHARE)
    cpu = precision.device_type == "cpu"
    return accounting.micro_batch_that_fits(cfg, usable, attention_matrix=cpu, state=state)
