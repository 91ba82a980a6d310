"""Rotary position embedding of a packed qkv projection, in plain PyTorch.

The expression that autograd differentiates, and the explicit formulas of forward and backward.
Shapes: B batch, T time, D head size, Q and K heads of queries and of keys; values have K heads.
Packed rows are [Q heads of q | K heads of k | K heads of v], each head of D.
"""

import torch
from torch import Tensor


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The differentiable expression: q (B, Q, T, D), k and v (B, K, T, D)."""
    q, k, v = split_heads(qkv, n_head, n_kv_head)
    q, k = _rotated(q, k, cos, sin, positions, q_weight, k_weight, eps)
    return q, k, v.transpose(1, 2)


def rope_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Rotated q (B, Q, T, D) and k (B, K, T, D), each in memory of its own."""
    q, k, _ = split_heads(qkv, n_head, n_kv_head)
    return _rotated(q, k, cos, sin, positions, q_weight, k_weight, eps)


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of packed qkv, and of q_weight and k_weight: (2, D), or (0, D) without QK-norm.

    `qkv` is read only with QK-norm. Weight gradients stay wide (fp32; fp64 for fp64).
    """
    dtype, n_head, n_kv_head = dq.dtype, dq.shape[1], dk.shape[1]
    cos, sin = _angles(cos, sin, positions, dq.shape[2])
    inputs = split_heads(qkv, n_head, n_kv_head) if qkv is not None else (None, None, None)
    packed, dweights = [], []
    for grad, x, weight in zip((dq, dk), inputs, (q_weight, k_weight), strict=False):
        # the rotation is orthogonal: its transpose turns back
        g = turn(_wide(grad.transpose(1, 2)), cos, -sin)
        if x is not None and weight is not None:
            unit, rstd = _unit(_wide(x), eps)
            dweights.append((g * unit).sum((0, 1, 2)))
            g = g * _wide(weight)
            g = rstd * (g - unit * (g * unit).mean(-1, keepdim=True))
        packed.append(g.to(dtype))
    packed.append(dv.transpose(1, 2))
    dqkv = torch.cat([g.flatten(2) for g in packed], -1)
    none = torch.empty((0, dq.shape[3]), dtype=torch.float32, device=dq.device)
    return dqkv, torch.stack(dweights) if dweights else none


def split_heads(qkv: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, T, heads, D) of q, k and v."""
    B, T, width = qkv.shape
    size = width // (n_head + 2 * n_kv_head)
    q, k, v = qkv.split([n_head * size, n_kv_head * size, n_kv_head * size], -1)
    k, v = (t.view(B, T, n_kv_head, size) for t in (k, v))
    return q.view(B, T, n_head, size), k, v


def _rotated(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    cos, sin = _angles(cos, sin, positions, q.shape[1])
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = _wide(x)
        if weight is not None:
            y = _unit(y, eps)[0] * _wide(weight)
        results.append(turn(y, cos, sin).to(x.dtype).transpose(1, 2))
    return results[0], results[1]


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm without weight (arXiv 1910.07467): x / rms(x) over the last dimension, 1 / rms(x)."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x: (B, T, heads, D)."""
    # chunk, not two slices: the gradient of a slice is a zero fill and a copy, that of a chunk a
    # part of one cat; addcmul is one pass over memory where a product and a sum are two
    a, b = x.chunk(2, -1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)


def _angles(cos: Tensor, sin: Tensor, positions: Tensor | None, T: int) -> tuple[Tensor, Tensor]:
    """Tables of the tokens with a head axis: (T, 1, D/2) or (B, T, 1, D/2).

    A position outside the table gives NaN and no access: a GPU is not asked before.
    """
    if positions is None:
        cos, sin = cos[:T], sin[:T]
    else:
        inside = (positions >= 0) & (positions < cos.shape[0])
        index = positions.where(inside, 0)
        cos, sin = cos[index].where(inside.unsqueeze(-1), torch.nan), sin[index]
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
