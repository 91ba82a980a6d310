"""MFU: what share of a device's matmul ceiling a run puts to use, measured here and published."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mypt_fast import accounting
from mypt_fast.config import ModelConfig
from mypt_fast.kernels import ceiling as measuring
from mypt_fast.planner import cards, ceiling
from mypt_fast.training import device as devices

SECONDS = 0.5  # of measuring at the start of the first run on a device


@dataclass(frozen=True)
class Ceilings:
    """What the MFU of a run is a share of, in TFLOP/s of the dtype that it computes in.

    Attributes:
        flops_per_token: of the model, forward and backward, nothing recomputed
            (`accounting.flops_per_token`; PaLM appendix B, arXiv 2204.02311).
        measured: what big matmuls reached on this device, where that is known.
        card: the table's entry for this card, if it has one.
        published: that card's ceiling, where the table has it for the dtype.
    """

    flops_per_token: float = 0.0
    measured: float | None = None
    card: cards.Card | None = None
    published: float | None = None

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the measured ceiling at a speed; None where nothing was measured."""
        if self.measured is None:
            return None
        return accounting.mfu(tokens_per_s, self.flops_per_token, self.measured)

    def mfu_card(self, tokens_per_s: float) -> float | None:
        """Share of the published ceiling; None where the table has none."""
        if self.published is None:
            return None
        return accounting.mfu(tokens_per_s, self.flops_per_token, self.published)

    def fields(self) -> dict[str, float]:
        """The ceilings that are known, as the log has them."""
        found = {"ceiling_tflops": self.measured, "card_ceiling_tflops": self.published}
        return {name: value for name, value in found.items() if value is not None}

    def shares(self, tokens_per_s: float) -> dict[str, float]:
        """The MFU against each ceiling that is known, as the log has it."""
        found = {"mfu": self.mfu(tokens_per_s), "mfu_card": self.mfu_card(tokens_per_s)}
        return {name: round(value, 4) for name, value in found.items() if value is not None}

    def words(self, tokens_per_s: float) -> str:
        """The same for people, to follow a speed: ' | MFU ...'; empty where nothing is known."""
        found = []
        mfu, mfu_card = self.mfu(tokens_per_s), self.mfu_card(tokens_per_s)
        if mfu is not None and self.measured is not None:
            found.append(of_measured(mfu, self.measured))
        if mfu_card is not None and self.published is not None and self.card is not None:
            found.append(
                f"{_percent(mfu_card)} of the {_tflops(self.published)} published for the "
                f"{self.card.name}"
            )
        return f" | MFU {' and '.join(found)}" if found else ""


def of_measured(mfu: float, tflops: float, *, advises: bool = True) -> str:
    """A share of the measured ceiling in words; above all of it, what to do about that."""
    text = f"{_percent(mfu)} of this machine's measured {_tflops(tflops)}"
    low = mfu > 1 and advises  # a ceiling that was kept, on a day when the machine was busy
    return f"{text} (too low: `mypt-fast ceiling` measures it anew)" if low else text


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _tflops(value: float) -> str:
    return f"{value:.2g} TFLOP/s" if value < 10 else f"{value:.0f} TFLOP/s"


def find(
    device: torch.device, precision: devices.Precision, cfg: ModelConfig, *, tf32: bool = False,
    keeps: bool = True,
) -> tuple[Ceilings, str | None]:  # fmt: skip
    """Both ceilings of a device, and a notice where its own had to be measured first.

    That happens once: what is kept stands until `mypt-fast ceiling` replaces it, so that the
    runs of a machine are shares of the same number.

    Args:
        device: of the run.
        precision: of its matmuls.
        cfg: of its model.
        tf32: whether fp32 matmuls round to TF32; the ceilings of fp32 are not those of that.
        keeps: whether what had to be measured is kept.
    """
    name, dtype = devices.describe(device), precision.name
    card = cards.known(name)
    if tf32 and dtype == "fp32" and devices.has_tf32(device):
        return Ceilings(accounting.flops_per_token(cfg), None, card), None
    measured, note = ceiling.measured_ceiling(name, dtype), None
    if measured is None:
        measured = _measure(device, precision.dtype)
        if measured is not None and keeps:
            note = (
                f"measured {_tflops(measured)} of {dtype} matmuls, {_keep(name, dtype, measured)}"
            )
    flops = accounting.flops_per_token(cfg)
    published = card.tflops.get(dtype) if card else None
    return Ceilings(flops, measured, card, published), note


def _keep(name: str, dtype: str, tflops: float) -> str:
    """Keep a ceiling where that is possible; what became of it, in words."""
    try:
        path = ceiling.add(
            name, dtype, tflops, torch=torch.__version__, measured=time.strftime("%Y-%m-%d")
        )
    except OSError as e:  # measured again next time
        return f"not kept: {e.strerror}"
    return f"kept in {path}; `mypt-fast ceiling` measures them anew"


def _measure(device: torch.device, dtype: torch.dtype) -> float | None:
    """TFLOP/s to four digits; None where there is no memory for big matrices."""
    try:
        with torch.inference_mode():
            rate = measuring.matmul_tflops(device, dtype, SECONDS)
    except RuntimeError:  # torch.OutOfMemoryError is one
        return None
    finally:
        if device.type == "cuda":  # nothing of it is the training's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return float(f"{rate:.4g}")
