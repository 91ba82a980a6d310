"""Causal attention with dropout on its weights, for a CPU: a strip of queries at a time.

PyTorch's flash attention for the CPU has no dropout. Its plain attention works on whole (T, T)
squares, also above the diagonal, several times over, and draws each element's dropout from a
double. Here a strip of queries meets only the keys up to it, its scores stay in the cache from one
pass to the next, and one 64-bit random number serves four elements.

Shapes: B batch, H heads, T time, D head size; N = B H sum(rows b) over strips of `rows` queries
that see b keys.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels._operator import operator

STRIP = 128  # queries; one of 12 heads and 1,024 keys is 6 MB of scores
LEAST_LENGTH = 128  # positions, from which it is faster than PyTorch's (docs/decisions.md)
LEVELS = 1 << 16  # of the numbers that dropout is drawn from


def serves(q: Tensor, dropout_p: float) -> bool:
    """Whether `dropped_attention` is what these queries should take."""
    is_cpu, drops = q.device.type == "cpu", 0 < threshold(dropout_p) < LEVELS
    return is_cpu and drops and q.shape[2] >= LEAST_LENGTH


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Causal attention, scale 1/sqrt(D), whose weights are dropped out.

    Computed in fp32 (fp64 for fp64). Dropout draws from PyTorch's generator, with a probability in
    steps of 2^-16; a recomputation with the generator's state repeats it.

    Args:
        q: (B, H, T, D) on a CPU.
        k: as q.
        v: as q.
        dropout_p: probability to drop a weight, from 2^-16 to 1 - 2^-16.

    Returns:
        (B, H, T, D) of the dtype of q, a transposed view of (B, T, H, D).

    Raises:
        ValueError: for shapes that differ, another device, or another dropout_p.
    """
    if q.device.type != "cpu" or q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "dropped_attention: expected q, k and v (B, H, T, D) on a CPU; found "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} on {q.device}"
        )
    if not 0 < threshold(dropout_p) < LEVELS:
        raise ValueError(
            f"dropped_attention: expected dropout_p of 2^-16 to 1 - 2^-16; found {dropout_p}"
        )
    y: Tensor = _operator(q, k, v, dropout_p, STRIP)[0]
    return y


def threshold(p: float) -> int:
    """Of `LEVELS` equally likely numbers, how many drop an element."""
    return round(p * LEVELS)


def _strips(batch: int, T: int, strip: int) -> Iterator[tuple[int, int, slice]]:
    """First and last query of every strip, and where its (batch, rows, keys) lies among N."""
    begin = 0
    for first in range(0, T, strip):
        last = min(first + strip, T)
        size = batch * (last - first) * last
        yield first, last, slice(begin, begin + size)
        begin += size


def _elements(batch: int, T: int, strip: int) -> int:
    return sum(at.stop - at.start for _, _, at in _strips(batch, T, strip))


def _heads(t: Tensor) -> Tensor:
    """(B, H, T, D) as (B H, T, D), fp32 or fp64."""
    wide = t if t.dtype is torch.float64 else t.float()
    return wide.reshape(-1, *t.shape[2:])


def _keep_(keep: Tensor, p: float) -> None:
    """Draw a mask into (N,) bool."""
    words = torch.empty(-(-len(keep) // 4), dtype=torch.int64).random_(-(2**63), None)
    torch.ge(words.view(torch.int16)[: len(keep)], threshold(p) - LEVELS // 2, out=keep)


def _dropped_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, strip: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, the weights before dropout (N,) and which of them are kept (N,).

    `strip` is an argument, because N depends on it: the caches of torch.compile must tell it apart.
    """
    B, H, T, D = q.shape
    queries, keys, values = (_heads(t) for t in (q, k, v))
    y = queries.new_empty(B, T, H, D)
    weights = queries.new_empty(_elements(B * H, T, strip))
    keep = torch.empty(len(weights), dtype=torch.bool)
    scale, grow = 1 / math.sqrt(D), LEVELS / (LEVELS - threshold(dropout_p))
    above = torch.full((strip, strip), -torch.inf, dtype=weights.dtype).triu(1)
    for first, last, at in _strips(B * H, T, strip):
        rows, shape = last - first, (B * H, last - first, last)
        scores = torch.bmm(queries[:, first:last], keys[:, :last].transpose(1, 2)).mul_(scale)
        scores[:, :, first:] += above[:rows, :rows]
        p = weights[at].view(shape)
        torch.softmax(scores, -1, out=p)
        _keep_(keep[at], dropout_p)
        torch.mul(p, keep[at].view(shape), out=scores)
        mixed = torch.bmm(scores, values[:, :last]).mul_(grow)
        y[:, first:last] = mixed.view(B, H, rows, D).transpose(1, 2)
    return y.to(q.dtype).transpose(1, 2), weights, keep


def _fake(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, strip: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    N = _elements(B * H, T, strip)
    y = q.new_empty(B, T, H, D).transpose(1, 2)
    return y, q.new_empty(N, dtype=wide), q.new_empty(N, dtype=torch.bool)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *qkv, ctx.dropout_p, ctx.strip = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*qkv, *output)


@once_differentiable
def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    gradients = _backward_operator(dy, *ctx.saved_tensors, ctx.dropout_p, ctx.strip)
    return (*gradients, None, None)


def _dropped_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, weights: Tensor, keep: Tensor,
    dropout_p: float, strip: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With w the weights and m their dropout: dw = m dy v^T, ds = w (dw - sum(dy y))."""
    B, H, T, D = q.shape
    queries, keys, values, upstream = (_heads(t) for t in (q, k, v, dy))
    along = (upstream * _heads(y)).sum(-1, keepdim=True)
    # not empty_like: of one row the heads are views, whose strides the results must not have
    dq, dk, dv = (queries.new_zeros(B * H, T, D) for _ in "qkv")
    scale, grow = 1 / math.sqrt(D), LEVELS / (LEVELS - threshold(dropout_p))
    for first, last, at in _strips(B * H, T, strip):
        shape = (B * H, last - first, last)
        p, kept, g = weights[at].view(shape), keep[at].view(shape), upstream[:, first:last]
        dp = torch.mul(p, kept)
        dv[:, :last].baddbmm_(dp.transpose(1, 2), g, alpha=grow)
        torch.bmm(g, values[:, :last].transpose(1, 2), out=dp)
        ds = dp.mul_(kept).mul_(grow).sub_(along[:, first:last]).mul_(p)
        dq[:, first:last] = torch.bmm(ds, keys[:, :last])
        dk[:, :last].baddbmm_(ds.transpose(1, 2), queries[:, first:last], alpha=scale)
    made = (dq.mul_(scale), dk, dv)
    dq, dk, dv = (t.view(B, H, T, D).to(q.dtype) for t in made)
    return dq, dk, dv


def _backward_fake(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    dq, dk, dv = (q.new_empty(B, H, T, D) for _ in "qkv")
    return dq, dk, dv


_backward_operator = operator(_dropped_attention_backward, fake=_backward_fake)
_operator = operator(
    _dropped_attention, fake=_fake, setup_context=_setup_context, backward=_gradients,
    tags=(torch.Tag.nondeterministic_seeded,),
)  # fmt: skip
