"""The norm of the residual stream and its projection to queries, keys and values, rotated."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels import _operator as op
from mypt_fast.kernels import mlp as feed_forward
from mypt_fast.kernels import rope as rotary
from mypt_fast.kernels._joined import (
    Join,
    Norm,
    Pair,
    checked,
    flat,
    gradient_like,
    low,
    norm_gradients,
    norm_like,
    normed,
    shared,
)
from mypt_fast.kernels.reference.rope import split_heads


def norm_qkv(
    join: Join,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    n_head: int,
    rope: Pair | None = None,
    positions: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Project norm(h), heads packed, and rotate queries and keys where there is a rotation.

    Args:
        join: what is normalised.
        norm: how.
        weight: (3C, C).
        bias: (3C,) or None.
        n_head: heads of q, of k and of v.
        rope: cosines and sines as `rope_qkv` takes them, or None.
        positions: as `rope_qkv` takes them.
        impl: as `_operator.choose` takes it.

    Returns:
        (qkv, h): (B, T, 3C) in the dtype of the matmuls, and (B, T, C).

    Raises:
        ValueError: for shapes or devices that do not fit, dropout without a seed, an `impl` that
            cannot run here; "inductor" never can.
        TypeError: for dtypes that the operators do not take, and for a DTensor.
    """
    triton, dtype, seed = checked("norm_qkv", join, norm, {"weight": weight, "bias": bias}, impl)
    op.expect_shape("norm_qkv", "weight", weight, (3 * weight.shape[1], weight.shape[1]))
    op.expect_shape("norm_qkv", "bias", bias, (weight.shape[0],))
    if rope is not None:
        B, T, C = _rotated("norm_qkv", join.residual, n_head)
        rotary.check_tables("norm_qkv", join.residual, *rope, positions)
        op.expect_shape("norm_qkv", "cos", rope[0], (rope[0].shape[0], C // n_head // 2))
        rotary.check_positions("norm_qkv", positions, B, T, rope[0].shape[0])
    cos, sin = (None, None) if rope is None else rope
    qkv, h = _norm_qkv_operator(
        join.branch, join.residual, norm.weight, norm.bias, weight, bias, cos, sin, positions,
        seed, n_head, norm.eps, norm.center, join.p, dtype, triton,
    )  # fmt: skip
    return qkv, join.residual if join.branch is None else h


def _rotated(name: str, residual: Tensor, n_head: int) -> tuple[int, int, int]:
    """(B, T, C) of a stream whose heads are rotated.

    Raises:
        ValueError: where they cannot be.
    """
    if residual.dim() != 3:
        found = tuple(residual.shape)
        raise ValueError(f"{name}: expected residual (B, T, C) where it rotates; found {found}")
    B, T, C = residual.shape
    if n_head < 1 or C % (2 * n_head):
        raise ValueError(
            f"{name}: expected heads of an even width, as rotations need; "
            f"found width {C} and n_head {n_head}"
        )
    return B, T, C


def _rotate(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, n_head: int,
    triton: bool, back: bool = False,
) -> Tensor:  # fmt: skip
    """Turn the packed queries and keys of (B, T, 3C), or turn them back; values are copied.

    It is the backward of the rotation, which packs; with the sines' negatives it turns forward.
    """
    if cos is None or sin is None:
        return qkv
    q, k, v = (t.transpose(1, 2) for t in split_heads(qkv, n_head, n_head))
    angles = (cos, sin if back else -sin, positions)
    return rotary._rope_qkv_backward(q, k, v, None, *angles, None, None, 0.0, triton)[0]


def _norm_qkv(
    branch: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    positions: Tensor | None, seed: Tensor | None, n_head: int, eps: float, center: bool, p: float,
    dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, h, _, _ = normed(
        branch, residual, norm_weight, norm_bias, seed, eps, center, p, dtype, triton
    )
    qkv = feed_forward._linear(flat(y), weight.to(dtype), low(bias, dtype))
    del y
    qkv = qkv.view(*residual.shape[:-1], -1)
    return _rotate(qkv, cos, sin, positions, n_head, triton), h


def _norm_qkv_fake(
    branch: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    weight: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    qkv = residual.new_empty((*residual.shape[:-1], weight.shape[0]), dtype=rest[-2])
    return qkv, residual.new_empty(0 if branch is None else residual.shape)


def _norm_qkv_setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    branch, residual, *parts = inputs[:10]
    ctx.save_for_backward(residual if branch is None else output[1], *parts)
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.settings = inputs[10:]


@once_differentiable
def _norm_qkv_gradients(
    ctx: Any, dqkv: Tensor | None, dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, dtype = ctx.saved_tensors, ctx.settings[-2]  # read once: a checkpoint gives them once
    h, *weights = saved[:5]
    if dqkv is None:  # only h was used
        dqkv = h.new_zeros((*h.shape[:-1], weights[2].shape[0]), dtype=dtype)
    dh = None if ctx.branch_dtype is None else dh
    grads = _norm_qkv_backward_operator(dqkv, dh, *saved, *ctx.settings, ctx.branch_dtype)
    return (*shared(grads, ctx.branch_dtype, weights), *(None,) * 10)


def _norm_qkv_backward(
    dqkv: Tensor, dh: Tensor | None, h: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    positions: Tensor | None, seed: Tensor | None, n_head: int, eps: float, center: bool, p: float,
    dtype: torch.dtype, triton: bool, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g = flat(_rotate(dqkv, cos, sin, positions, n_head, triton, back=True))
    y, _, mean, rstd = normed(
        None, h, norm_weight, norm_bias, None, eps, center, 0.0, dtype, triton
    )
    dweight = torch.mm(g.T, flat(y))
    del y
    dbias = g.sum(0) if bias is not None else g.new_empty(0)
    dy = torch.mm(g, weight.to(dtype)).view(h.shape)
    del g
    norm = norm_gradients(
        dy, dh, h, norm_weight, norm_bias, (mean, rstd), seed, center, p, branch_dtype, triton
    )
    return (*norm, dweight, dbias)


def _norm_qkv_backward_fake(
    dqkv: Tensor, dh: Tensor | None, h: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    norm = norm_like(h, norm_weight, norm_bias, rest[3], rest[-1])
    return (*norm, *gradient_like(rest[-3], h, weight, bias))


_norm_qkv_backward_operator = op.operator(_norm_qkv_backward, fake=_norm_qkv_backward_fake)
_norm_qkv_operator = op.operator(
    _norm_qkv, fake=_norm_qkv_fake, setup_context=_norm_qkv_setup, backward=_norm_qkv_gradients
)
