"""AdamW (arXiv 1711.05101) over many tensors in one step, whatever their state is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mypt_fast.kernels._operator import choose, expect_floating, expect_tensors
from mypt_fast.kernels.reference import adamw as reference
from mypt_fast.kernels.reference.adamw import BLOCK


@dataclass(frozen=True)
class Slot:
    """One parameter and its state; everything contiguous, on one device.

    Attributes:
        weight: fp32, or bf16 beside a remainder.
        gradient: fp32 or bf16, of its shape.
        first, second: moments of its shape; fp32, or int8 and uint8 codes beside scales.
        count: steps so far, 0-d fp32.
        remainder: int16, of its shape: what the bf16 weight lacks of the fp32 master.
        scales: of the codes, two fp32 tensors of ceil(n / 256).
    """

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    count: Tensor
    remainder: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None

    def check(self) -> None:
        """Raise TypeError or ValueError for what no kernel is written for."""
        expect_tensors("adamw_step", weight=self.weight, gradient=self.gradient)
        expect_floating("adamw_step", weight=self.weight, gradient=self.gradient)
        is_split, coded = self.remainder is not None, self.scales is not None
        wanted = {
            "weight": torch.bfloat16 if is_split else torch.float32,
            "first": torch.int8 if coded else torch.float32,
            "second": torch.uint8 if coded else torch.float32,
            "remainder": torch.int16,
        }
        for name, dtype in wanted.items():
            t = getattr(self, name)
            if t is None:
                continue
            if t.dtype is not dtype:
                raise TypeError(f"adamw_step: expected {name} of {dtype}; found {t.dtype}")
            if t.shape != self.gradient.shape or not t.is_contiguous():
                raise ValueError(
                    f"adamw_step: expected {name} contiguous, of shape "
                    f"{tuple(self.gradient.shape)}; found {tuple(t.shape)}"
                )
        groups = -(-self.weight.numel() // BLOCK)
        if self.scales is not None and any(s.numel() != groups for s in self.scales):
            found = [s.numel() for s in self.scales]
            raise ValueError(f"adamw_step: expected {groups} scales each; found {found}")


@torch.no_grad()
def adamw_step(
    slots: Sequence[Slot],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Move every weight and its moments one step, in place. The host waits for nothing.

    Args:
        slots: the parameters.
        lr: learning rate.
        betas: decay of the two moments.
        eps: beside the root of the second moment.
        weight_decay: decoupled.
        scale: 0-d fp32 factor of every gradient (clipping), on the device; None: 1.
        impl: "triton" or "reference"; "auto" takes PyTorch's fused kernel over fp32 forms (the
            reference, equal to the fp32 layout bit for bit on every device), and Triton's on a
            GPU for 8-bit moments, whose fp32 forms would need the memory that they save.

    Raises:
        ValueError: for shapes that disagree, or an `impl` that cannot run here.
        TypeError: for dtypes that disagree.
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    plain: list[Slot] = []
    fused: list[Slot] = []
    for slot in slots:
        slot.check()
        wanted = "reference" if impl == "auto" and slot.scales is None else impl
        path = choose("adamw_step", wanted, slot.gradient)
        (fused if path == "triton" else plain).append(slot)
    if fused:
        from mypt_fast.kernels.jit import adamw as jit

        jit.step(fused, scale=scale, **options)  # type: ignore[arg-type]
    for s in plain:
        reference.step(
            s.weight, s.gradient, s.first, s.second, s.count, remainder=s.remainder,
            scales=s.scales, scale=scale, **options,  # type: ignore[arg-type]
        )  # fmt: skip
