"""A matmul that keeps its weight as it is stored, not the 16-bit copy that autocast makes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels import _operator as op
from mypt_fast.kernels import mlp as feed_forward
from mypt_fast.kernels._joined import expect_matrix, flat, low


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A matmul x W^T + b in autocast's dtype, keeping W as it is stored and not its 16-bit copy.

    Args:
        x: (..., C).
        weight: (K, C).
        bias: (K,) or None.

    Returns:
        (..., K).

    Raises:
        ValueError: for shapes or devices that do not fit.
        TypeError: for a DTensor.
    """
    op.expect_tensors("linear", x=x, weight=weight)
    op.expect_same_device("linear", x, weight=weight, bias=bias)
    if not x.dim():
        raise ValueError("linear: expected x (..., C); found ()")
    expect_matrix("linear", "weight", weight, x.shape[-1])
    op.expect_shape("linear", "bias", bias, (weight.shape[0],))
    return _linear_operator(x, weight, bias, op.autocast_dtype(x))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = feed_forward._linear(flat(x.to(dtype)), weight.to(dtype), low(bias, dtype))
    return y.view(*x.shape[:-1], -1)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


@once_differentiable
def _linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _linear_backward_operator(dy, x, weight, ctx.has_bias)
    return dx, dweight, dbias if ctx.has_bias else None, None


def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g = flat(dy)
    dbias = g.sum(0) if has_bias else g.new_empty(0)
    dx = torch.mm(g, weight.to(dy.dtype)).view(x.shape)
    return dx.to(x.dtype), torch.mm(g.T, flat(x.to(dy.dtype))), dbias


def _linear_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = dy.new_empty(weight.shape[0] if has_bias else 0)
    return x.new_empty(x.shape), dy.new_empty(weight.shape), dbias


_linear_backward_operator = op.operator(_linear_backward, fake=_linear_backward_fake)
_linear_operator = op.operator(
    _linear, fake=_linear_fake, setup_context=_linear_setup, backward=_linear_gradients
)
