"""The norms in plain PyTorch: expressions that autograd differentiates, and explicit formulas.

An expression (`rms_norm`, `layer_norm`, `added`) is what a CPU runs and what torch.compile fuses.
The formulas (`norm_forward`, `norm_backward`) have the signatures of the Triton launchers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.kernels.jit.launch import tiles

# Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
PHILOX_ROUNDS = 10
PHILOX_FACTORS = (0xD2511F53, 0xCD9E8D57)
PHILOX_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, out_dtype: torch.dtype
) -> Tensor:
    """The expression of RMSNorm: fp32 from a 16-bit x to the one rounding at the end."""
    dtype = wide_dtype(x)
    factor = weight.to(dtype)
    if offset:
        factor = factor + offset
    return F.rms_norm(x.to(dtype), (x.shape[-1],), factor, eps).to(out_dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """The expression of LayerNorm: torch's own, which computes a 16-bit x in fp32."""
    same = weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype)
    if not same or out_dtype is not x.dtype:  # one rounding, to out_dtype, not to x's first
        dtype = wide_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).to(out_dtype)


def added(x: Tensor, residual: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """The expression residual + dropout(x), in the dtype of the residual."""
    if dropout_p and seed is not None:
        x = dropped(x.to(wide_dtype(x, residual)), seed, dropout_p)
    return (residual + x).to(residual.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    offset: float,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The expression of h = residual + dropout(x) and RMSNorm(h): (y, h)."""
    h = added(x, residual, seed, dropout_p)
    return rms_norm(h, weight, eps, offset, out_dtype), h


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The expression of h = residual + dropout(x) and LayerNorm(h): (y, h)."""
    h = added(x, residual, seed, dropout_p)
    return layer_norm(h, weight, bias, eps, out_dtype), h


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd): h = residual + dropout(x), y = (h - mean) rstd (weight + offset) + bias.

    Without a residual h is x and is returned empty; without `center` the mean is 0 and empty.
    """
    dtype = wide_dtype(x, residual)
    h = wide = x.to(dtype)
    if residual is not None:
        if seed is not None:
            wide = dropped(wide, seed, dropout_p)
        h = (residual.to(dtype) + wide).to(residual.dtype).contiguous()
        wide = h.to(dtype)
    mean = wide.mean(-1) if center else wide.new_empty(0)
    if center:
        wide = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1) * (weight.to(dtype) + offset)
    if bias is not None:
        y = y + bias.to(dtype)
    kept = h if residual is not None else x.new_empty(0)
    return y.to(out_dtype).contiguous(), kept, mean.contiguous(), rstd.contiguous()


def norm_backward(
    dy: Tensor,
    dh_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    offset: float,
    center: bool,
    dropout_p: float,
    branch_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dh, dx, dweight, dbias) of `norm_forward`, `dh_out` being the gradient of its h.

    With xhat = (h - mean) rstd and g = dy (weight + offset):
    dh = rstd (g - xhat mean(g xhat) - mean(g) if centred) + dh_out, dx = dropout'(dh),
    dweight = sum dy xhat, dbias = sum dy. dx and dbias are empty where their dtype is None.
    """
    dtype = rstd.dtype
    dx, dbias = dy.new_empty(0), dy.new_empty(0)
    dy, xhat = dy.to(dtype), h.to(dtype)
    if center:
        xhat = xhat - mean.unsqueeze(-1)
    xhat = xhat * rstd.unsqueeze(-1)
    g = dy * (weight.to(dtype) + offset)
    dh = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if center:
        dh = dh - g.mean(-1, keepdim=True)
    dh = dh * rstd.unsqueeze(-1)
    if dh_out is not None:
        dh = dh + dh_out.to(dtype)
    if branch_dtype is not None:
        dx = dropped(dh, seed, dropout_p) if seed is not None else dh
        dx = dx.to(branch_dtype).contiguous()
    columns = h.shape[-1]
    dweight = (dy * xhat).reshape(-1, columns).sum(0).to(weight.dtype)
    if bias_dtype is not None:
        dbias = dy.reshape(-1, columns).sum(0).to(bias_dtype)
    return dh.to(h.dtype).contiguous(), dx, dweight, dbias


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What a norm computes in: fp64 if a tensor is, else fp32."""
    doubles = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if doubles else torch.float32


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Dropout of x: (..., C) by the mask that `seed` draws."""
    rows = x.numel() // x.shape[-1]
    mask = keep_mask(seed, p, rows, x.shape[-1]).view(x.shape)
    return torch.where(mask, x * (1.0 / (1.0 - p)), 0.0)


def keep_mask(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """Which elements dropout keeps, (rows, columns) bool: the same on every implementation.

    Element (row, column) lies in lane column % BLOCK of tile j = column // BLOCK. It is kept iff
    word j % 4 of Philox(counter (lane, row low, row high, j // 4), key seed) >= p 2^32.

    Args:
        seed: 0-d int64; its low and high 32 bits are the key.
        p: probability to drop.
        rows: all leading dimensions as one.
        columns: of a row.
    """
    block, count = tiles(columns)
    groups = -(-count // 4)
    device = seed.device
    row = torch.arange(rows, device=device).view(-1, 1, 1)
    group = torch.arange(groups, device=device).view(1, -1, 1)
    lane = torch.arange(block, device=device).view(1, 1, -1)
    words = philox((lane, row & LOW_32, row >> 32, group), (seed & LOW_32, seed >> 32 & LOW_32))
    drawn = torch.stack(words, 2).reshape(rows, groups * 4 * block)
    return drawn[:, :columns] >= drop_threshold(p)


def drop_threshold(p: float) -> int:
    """The words below it, of 2^32, are dropped."""
    return min(round(p * 2**32), LOW_32)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words; the arguments broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high_0, low_0 = _product(c0, PHILOX_FACTORS[0])
        high_1, low_1 = _product(c2, PHILOX_FACTORS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + PHILOX_STEPS[0] & LOW_32, k1 + PHILOX_STEPS[1] & LOW_32
    return c0, c1, c2, c3


def _product(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product, by 16-bit halves of `a` so that int64 suffices."""
    below = (a & 0xFFFF) * factor
    above = (a >> 16) * factor + (below >> 16)
    return above >> 16, (above & 0xFFFF) << 16 | below & 0xFFFF
