"""What to tell somebody whose model does not fit, and what to type for a plan."""

import math
from collections.abc import Sequence

from mypt_fast import console
from mypt_fast.config import ModelConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import search, table


def flags_of(plan: search.Plan) -> str:
    """What to type after `train --config ...` for a plan."""
    s = plan.setup
    words = [f"--state {s.layout.name} --recompute {s.policy.name} --micro_batch_size {s.rows}"]
    return " ".join([*words, f"--chunk_rows {s.chunk}"] if s.chunk else words)


def nominal_gib(total: int) -> int:
    """The card, in whole GiB, that has room for so many bytes."""
    return math.ceil(total / (1 - table.DRIVER_SHARE) / (1 - table.MARGIN_SHARE) / table.GIB)


def does_not_fit(
    name: str,
    cfg: ModelConfig,
    sequences: int,
    device: search.Device,
    plans: Sequence[search.Plan],
    choices: search.Able,
    able: search.Able,
    residual: int | None = None,
) -> ConfigError:
    """The error of a model that cannot be trained on a device, with the smallest change.

    Args:
        name: of the model.
        cfg: its architecture.
        sequences: of a step.
        device: that it does not fit.
        plans: what was found for it, the leanest first.
        choices: what those were chosen from.
        able: what could be chosen where nothing was asked for.
        residual: as `Setup` takes it.
    """
    least, change = plans[0], ""
    if choices != able:
        wider = search.search(cfg, sequences, device, able, residual=residual)
        if wider[0].fits:
            change = f"{flags_of(wider[0])} would fit"
    if not change:
        change = search.smaller_model(cfg, sequences, device, choices, residual=residual)
    need = nominal_gib(least.peak.total)
    return ConfigError(
        f"{name} does not fit {console.bytes_text(device.room)}",
        f"the leanest plan ({flags_of(least)}) needs {console.bytes_text(least.peak.total)}",
        f"{change}, or a card of {need} GB" if change else f"it takes a card of {need} GB",
    )
