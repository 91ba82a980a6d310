"""Every operator in plain PyTorch: the specification, and the path that runs on a CPU.

Shapes: B batch, T time, C width, H heads, D head size, V vocabulary, N rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of logits alive at once. 32 MB of fp32 logits stay near a desktop CPU's last-level cache,
# and N x V logits (1.6 GB at batch 32 x 256 x 50,304) are never made.
LOGITS_BUDGET_BYTES = 32 << 20
MIN_CHUNK_ROWS = 64


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension (arXiv 1607.06450). x: (..., C); weight, bias: (C,)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension: x * rsqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    The statistic is taken in fp32 whatever the dtype of x: (..., C); weight: (C,).
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU, silu(gate) * up (arXiv 2002.05202); both (..., F)."""
    return F.silu(gate) * up


def rope_tables(
    length: int, head_size: int, theta: float, scale: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of (position / scale) * theta^(-2i/D), each (length, D/2), fp32.

    Built in fp64 and rounded once: at position 4095 an fp32 angle is already off by 2e-4.
    """
    i = torch.arange(0, head_size, 2, dtype=torch.float64, device=device)
    inverse = theta ** (-i / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device) / scale, inverse)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x: (B, H, T, D) by tables (T, D/2) or (B, 1, T, D/2).

    Half-split layout of RoPE (arXiv 2104.09864); the result has the dtype of x.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def chunk_rows(rows: int, vocab: int) -> int:
    """How many rows of logits fit the budget."""
    return min(rows, max(MIN_CHUNK_ROWS, LOGITS_BUDGET_BYTES // (4 * vocab)))


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunked head: the gradients are made in the forward, where each chunk's logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor | None,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        need = ctx.needs_input_grad
        w = weight.to(dtype)
        b = bias.to(dtype) if bias is not None else None
        total = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if need[0] else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if need[1] else None
        db = weight.new_zeros(weight.shape[0], dtype=torch.float32) if need[2] else None
        step = chunk_rows(x.shape[0], weight.shape[0])
        for i in range(0, x.shape[0], step):
            rows = slice(i, i + step)
            xc, t = x[rows].to(dtype), targets[rows]
            keep = (t != ignore_index).float()
            if row_weights is not None:
                keep = keep * row_weights[rows]
            index = t.where(t != ignore_index, 0).unsqueeze(1)
            # log-probabilities overwrite the logits' storage budget: one fp32 (rows, V) at a time
            logp = F.linear(xc, w, b).float().log_softmax(-1)
            total -= (logp.gather(1, index).squeeze(1) * keep).sum()
            if dx is None and dw is None and db is None:
                continue
            dlogits = logp.exp_()
            dlogits.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=torch.float32))
            dlogits *= keep.unsqueeze(1)
            if db is not None:
                db += dlogits.sum(0)
            low = dlogits.to(dtype)
            if dx is not None:
                dx[rows] = (low @ w).to(dx.dtype)
            if dw is not None and dtype is torch.float32:
                dw.addmm_(low.T, xc)
            elif dw is not None:
                dw += low.T @ xc
        ctx.save_for_backward(dx, dw, db)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        # saved once, used once: scaling in place saves a copy of the V x C gradient
        dx = dx.mul_(grad.to(dx.dtype)) if dx is not None else None
        dw = dw.mul_(grad).to(ctx.dtypes[0]) if dw is not None else None
        db = db.mul_(grad).to(ctx.dtypes[1]) if db is not None else None
        return dx, dw, db, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Sum over rows of weight_i * cross_entropy(x_i W^T + b, target_i), logits never whole.

    Args:
        x: (N, C).
        weight: (V, C).
        bias: (V,) or None.
        targets: (N,) int64.
        row_weights: (N,) fp32 factor per row, or None for 1.
        ignore_index: rows with this target count nothing.

    Returns:
        fp32 scalar. Divide by the number of valid tokens outside: that number is global. Its
        backward may run once.

    Raises:
        ValueError: if shapes disagree.
    """
    N, C = x.shape
    if weight.shape[1] != C or targets.shape != (N,):
        raise ValueError(
            "linear_cross_entropy: expected x (N, C), weight (V, C), targets (N,); "
            f"found {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, bias, targets, row_weights, ignore_index, low)
