"""What to tell somebody whose model does not fit, and what to type for a plan."""

import math
from dataclasses import dataclass

from mypt_fast import console
from mypt_fast.config import ModelConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import search, table
from mypt_fast.planner.options import Options


def flags_of(plan: search.Plan) -> str:
    """What to type after `train --config ...` for a plan."""
    s = plan.setup
    words = [f"--state {s.layout.name} --recompute {s.policy.name} --micro_batch_size {s.rows}"]
    return " ".join([*words, f"--chunk_rows {s.chunk}"] if s.chunk else words)


def nominal_gib(total: int) -> int:
    """The card, in whole GiB, that has room for so many bytes."""
    return math.ceil(total / (1 - table.DRIVER_SHARE) / (1 - table.MARGIN_SHARE) / table.GIB)


@dataclass(frozen=True)
class Refusal:
    """A model that cannot be trained on a device.

    Attributes:
        name: of the model.
        device: that it does not fit.
        least: the leanest plan.
        change: the smallest that would fit, in words; "" where none would.
    """

    name: str
    device: search.Device
    least: search.Plan
    change: str

    @property
    def card_gb(self) -> int:
        """The card that it would fit."""
        return nominal_gib(self.least.peak.total)

    def error(self) -> ConfigError:
        """The same for people."""
        size = console.bytes_text
        card = f"a card of {self.card_gb} GB"
        return ConfigError(
            f"{self.name} does not fit {size(self.device.room)}",
            f"the leanest plan ({flags_of(self.least)}) needs {size(self.least.peak.total)}",
            f"{self.change}, or {card}" if self.change else f"it takes {card}",
        )


def refusal(
    name: str, cfg: ModelConfig, device: search.Device, least: search.Plan,
    choices: Options, everything: Options,
) -> Refusal:  # fmt: skip
    """What to say where not even the leanest plan fits.

    Args:
        name: of the model.
        cfg: its architecture.
        device: that it does not fit.
        least: the leanest plan.
        choices: what it was chosen from.
        everything: what could be chosen where nothing was asked for.
    """
    sequences, residual, change = least.setup.sequences, least.setup.residual, ""
    if choices != everything:
        wider = search.search(cfg, sequences, device, everything, residual=residual)
        if wider[0].fits:
            change = f"{flags_of(wider[0])} would fit"
    if not change:
        change = search.smaller_model(cfg, sequences, device, choices, residual=residual)
    return Refusal(name, device, least, change)
