"""Every operator in plain PyTorch: the specification, and the path that runs on a CPU.

Shapes: B batch, T time, C width, H heads, D head size, V vocabulary, N rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The one buffer of logits that exists at a time. Plain PyTorch holds three N x V arrays (1.6 GB
# each at batch 32 x 256 x 50,304), and on a CPU faults their pages in anew each step.
LOGITS_BUDGET_BYTES = 96 << 20
MIN_CHUNK_ROWS = 64
TILE_ROWS = 64  # on a CPU: 13 MB of fp32 logits, worked on while they are in its cache


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


def chunk_rows(rows: int, vocab: int, element_bytes: int) -> int:
    """Rows of logits at a time: about the budget, in chunks of equal size."""
    fitting = max(MIN_CHUNK_ROWS, LOGITS_BUDGET_BYTES // (element_bytes * vocab))
    chunks = max(1, round(rows / fitting))
    return max(1, -(-rows // chunks))


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
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        N, V = x.shape[0], weight.shape[0]
        keep = (targets != ignore_index).float()
        if row_weights is not None:
            keep = keep * row_weights
        index = targets.where(targets != ignore_index, 0).unsqueeze(1)
        w, low = weight.to(dtype), x.to(dtype)
        b = bias.to(dtype) if bias is not None else None
        dx = torch.empty_like(x) if need_x else None
        dw = torch.empty(weight.shape, dtype=torch.float32, device=x.device) if need_w else None
        if dw is not None and N == 0:
            dw.zero_()
        db = torch.zeros(V, dtype=torch.float32, device=x.device) if need_b else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        step = chunk_rows(N, V, dtype.itemsize)
        # Made once and written over: on a CPU, fresh memory costs a third of the matmul filling it
        buffer = torch.empty(step, V, dtype=dtype, device=x.device)
        exact = dtype is torch.float32
        tile_rows = min(step, TILE_ROWS) if x.device.type == "cpu" else step
        wide = buffer if exact else torch.empty(tile_rows, V, device=x.device)
        part = (
            torch.empty(weight.shape, dtype=dtype, device=x.device)
            if need_w and not exact
            else None
        )
        for i in range(0, N, step):
            rows = slice(i, i + step)
            logits = buffer[: min(step, N - i)]
            if b is None:
                torch.mm(low[rows], w.T, out=logits)
            else:
                torch.addmm(b, low[rows], w.T, out=logits)
            losses, dlogits = _losses_and_gradient(logits, index[rows], wide, tile_rows)
            total += (losses * keep[rows]).sum()
            if dx is None and dw is None and db is None:
                continue
            # a row's weight is applied where the row is narrow
            if db is not None:
                db += (keep[rows].to(dtype) @ dlogits).float()
            if dx is not None:
                dx[rows] = (dlogits @ w).float() * keep[rows].unsqueeze(1)
            scaled = (low[rows] * keep[rows].unsqueeze(1)).to(dtype)
            if dw is not None:
                _add_product(dw, dlogits.T, scaled, part, first=i == 0)
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


def _add_product(total: Tensor, a: Tensor, b: Tensor, part: Tensor | None, first: bool) -> None:
    """Set `total` to a b at first, add it later; `part` holds the product of a narrow dtype."""
    if part is not None:
        product = torch.mm(a, b, out=part)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def _losses_and_gradient(
    logits: Tensor, index: Tensor, wide: Tensor, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Each row's loss, and softmax - one_hot written over the logits.

    Worked in fp32, in tiles of rows that stay in a CPU's cache: `wide` is a buffer for one tile,
    or the logits themselves.
    """
    losses = []
    for i in range(0, len(logits), tile_rows):
        tile, target = logits[i : i + tile_rows], index[i : i + tile_rows]
        probs = tile if tile.dtype is wide.dtype else wide[: len(tile)].copy_(tile)
        above_target = probs.amax(-1) - probs.gather(1, target).squeeze(1)
        torch.softmax(probs, -1, out=probs)
        # lse - target = (peak - target) - log p_peak: no underflow however unlikely the target
        losses.append(above_target - probs.amax(-1).log())
        probs.scatter_add_(1, target, probs.new_full((len(tile), 1), -1.0))
        if probs is not tile:
            tile.copy_(probs)
    return torch.cat(losses), logits


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
