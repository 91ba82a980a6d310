"""The row kernel of every cross-entropy: losses, gradients, or both in one visit of a row."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.jit.launch import Case
from mypt_fast.kernels.reference.cross_entropy import Rule

BLOCK_BYTES = 16384  # of a row at a time: wider spills registers


@triton.jit
def _cap(x, SOFTCAP: tl.constexpr):
    """The logit capped, SOFTCAP tanh(x / SOFTCAP); a series where 1 - 2/(1 + e^2u) cancels."""
    u = x / SOFTCAP
    size = tl.abs(u)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    v = u * u
    near = size * (1.0 - v * (1 / 3 - v * (2 / 15 - v * (17 / 315 - v * (62 / 2835)))))
    return SOFTCAP * tl.where(u < 0, -1.0, 1.0) * tl.where(size < 0.25, near, far)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to full precision (Kahan)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _cross_entropy_rows(
    # data
    logits_ptr, grad_ptr, targets_ptr, scale_ptr, losses_ptr, stats_ptr,
    # strides
    logits_stride, grad_stride,
    # sizes
    columns, touchable, ignore_index,
    # constants
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: loss = lse - target, gradient p - one_hot.

    A row whose target is ignored gives 0 and zero gradients without being read; one whose target
    is out of range gives NaN, since raising would need the host. `grad_ptr` may be `logits_ptr`.
    `touchable` columns may be read and written: with padded rows a multiple of 16, so that loads
    stay 16 bytes wide however odd the vocabulary is.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    kept = target != ignore_index
    inside = (target >= 0) & (target < columns)
    n = tl.where(kept, columns, 0)
    logits_ptr += row * logits_stride
    at = tl.load(logits_ptr + tl.where(inside, target, 0)).to(tl.float32)
    if SOFTCAP > 0:
        at = _cap(at, SOFTCAP)
    offsets = tl.arange(0, BLOCK)
    if LOSS:
        peak = tl.full((), -3.4028234663852886e38, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        plain = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            cols = start + offsets
            x = tl.load(logits_ptr + cols, mask=kept & (cols < touchable), other=0.0)
            x = x.to(tl.float32)
            x = tl.where(cols < columns, x, 0.0)  # the padding holds anything
            if SOFTCAP > 0:
                x = _cap(x, SOFTCAP)
            if SMOOTHING > 0:
                plain += tl.where(cols < columns, x, 0.0)
            x = tl.where((cols < columns) & (cols != target), x, float("-inf"))
            higher = tl.maximum(peak, tl.max(x, 0))
            sums = sums * tl.exp(peak - higher) + tl.exp(x - higher)
            peak = higher
        # the target apart from the others: near-certain ones keep their tiny loss and gradient
        others = tl.sum(sums, 0)
        ahead = at > peak
        top = tl.maximum(at, peak)
        others *= tl.exp(peak - top)
        total = others + tl.exp(at - top)
        nll = tl.where(ahead, _log1p(others), tl.log(total) + (top - at))
        miss = others / total
        lse = top + tl.log(total)
        loss = nll
        if SMOOTHING > 0:
            loss = (1.0 - SMOOTHING) * nll + SMOOTHING * (lse - tl.sum(plain, 0) / columns)
        if Z_LOSS > 0:
            loss += Z_LOSS * lse * lse
        loss = tl.where(inside, loss, float("nan"))
        tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))
        if not GRAD:
            tl.store(stats_ptr + 3 * row, top)
            tl.store(stats_ptr + 3 * row + 1, total)
            tl.store(stats_ptr + 3 * row + 2, miss)
    else:
        top = tl.load(stats_ptr + 3 * row)
        total = tl.load(stats_ptr + 3 * row + 1)
        miss = tl.load(stats_ptr + 3 * row + 2)
        lse = top + tl.log(total)
    if GRAD:
        grad_ptr += row * grad_stride
        scale = tl.where(inside, 1.0, float("nan"))
        if HAS_SCALE:
            scale *= tl.load(scale_ptr + row).to(tl.float32)
        slope = 2.0 * Z_LOSS * lse
        factor = (1.0 + slope) / total
        at_target = slope * (1.0 - miss) - miss + (SMOOTHING - SMOOTHING / columns)
        for start in range(0, columns, BLOCK):
            cols = start + offsets
            x = tl.load(logits_ptr + cols, mask=kept & (cols < touchable), other=0.0)
            x = x.to(tl.float32)
            x = tl.where(cols < columns, x, 0.0)  # the padding holds anything
            if SOFTCAP > 0:
                x = _cap(x, SOFTCAP)
            g = tl.exp(tl.minimum(x - top, 0.0)) * factor - SMOOTHING / columns
            g = tl.where(cols == target, at_target, g)
            if SOFTCAP > 0:
                g *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
            g = tl.where(kept, g * scale, 0.0)
            tl.store(grad_ptr + cols, g.to(grad_ptr.dtype.element_ty), mask=cols < touchable)


def _constants(
    columns: int, dtype: torch.dtype, arch: int, rule: Rule, **flags: bool
) -> tuple[dict[str, Any], int, int]:
    """Constexpr arguments, warps and stages of a launch."""
    config = launch.config("cross_entropy", columns, dtype, arch)
    block = min(BLOCK_BYTES // dtype.itemsize, max(16, triton.next_power_of_2(columns)))
    constants = {
        "SMOOTHING": rule.label_smoothing, "Z_LOSS": rule.z_loss, "SOFTCAP": rule.softcap,
        "HAS_SCALE": False, "LOSS": True, "GRAD": True, "BLOCK": block, **flags,
    }  # fmt: skip
    return constants, config.warps, config.stages


def _launch(
    logits: Tensor, grad: Tensor, targets: Tensor, scale: Tensor | None, losses: Tensor,
    stats: Tensor, rule: Rule, touchable: int, **flags: bool,
) -> None:  # fmt: skip
    N, V = logits.shape
    if N == 0:
        return
    constants, warps, stages = _constants(
        V, logits.dtype, launch.arch_of(logits), rule, HAS_SCALE=scale is not None, **flags
    )
    targets = targets.contiguous()
    factors = losses if scale is None else scale.contiguous()
    with launch.device_guard(logits):
        _cross_entropy_rows[(N,)](
            logits, grad, targets, factors, losses, stats,
            logits.stride(0), grad.stride(0),
            V, touchable, rule.ignore_index,
            **constants, **launch.options(warps, stages),
        )  # fmt: skip


def step(logits: Tensor, targets: Tensor, scale: Tensor | None, rule: Rule) -> Tensor:
    """Losses (N,) fp32 of logits (N, V); their gradients, times `scale`, replace the logits.

    All memory of a row, up to the next one, is taken to be its own.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _launch(
        logits, logits, targets, scale, losses, losses, rule, logits.stride(0), LOSS=True, GRAD=True
    )
    return losses


def forward(logits: Tensor, targets: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """As `reference.cross_entropy.forward`."""
    logits = _unit_stride(logits)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    stats = torch.empty(len(logits), 3, dtype=torch.float32, device=logits.device)
    _launch(
        logits, logits, targets, None, losses, stats, rule, logits.shape[1], LOSS=True, GRAD=False
    )
    return losses, stats


def backward(grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, rule: Rule) -> Tensor:
    """As `reference.cross_entropy.backward`."""
    logits = _unit_stride(logits)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    V = logits.shape[1]
    _launch(logits, out, targets, grad, stats, stats, rule, V, LOSS=False, GRAD=True)
    return out


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def cases(shape: dict[str, int], dtype: torch.dtype, arch: int) -> Iterator[Case]:
    """The row kernel as the head launches it, and as given logits do."""
    pointer = f"*{launch.NAMES[dtype]}"
    signature = {
        "logits_ptr": pointer, "grad_ptr": pointer, "targets_ptr": "*i64", "scale_ptr": "*fp32",
        "losses_ptr": "*fp32", "stats_ptr": "*fp32", "logits_stride": "i32", "grad_stride": "i32",
        "columns": "i32", "touchable": "i32", "ignore_index": "i32",
    }  # fmt: skip
    aligned = (*list(signature)[:8], "touchable")
    uses: tuple[tuple[str, dict[str, bool], Rule], ...] = (
        ("head", {"LOSS": True, "GRAD": True}, Rule()),
        ("head_all", {"LOSS": True, "GRAD": True, "HAS_SCALE": True},
         Rule(label_smoothing=0.1, z_loss=1e-4, softcap=30.0)),
        ("forward", {"LOSS": True, "GRAD": False}, Rule()),
        ("backward", {"LOSS": False, "GRAD": True, "HAS_SCALE": True}, Rule()),
    )  # fmt: skip
    for name, flags, rule in uses:
        if name in ("head_all", "backward") and not shape.get("everything", True):
            continue  # options that no shipped model sets
        constants, warps, stages = _constants(shape["vocab_size"], dtype, arch, rule, **flags)
        yield Case(
            f"cross_entropy_{name}", _cross_entropy_rows, signature, constants, warps, stages,
            aligned,
        )  # fmt: skip
