"""The norm of the residual stream and its feed-forward; `save` as in the table of `mlp.py`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels import _operator as op
from mypt_fast.kernels import mlp as feed_forward
from mypt_fast.kernels._joined import (
    Join,
    Norm,
    checked,
    flat,
    gradient_like,
    low,
    norm_gradients,
    norm_like,
    normed,
    shared,
)


def norm_mlp(
    join: Join,
    norm: Norm,
    w_in: tuple[Tensor, Tensor | None],
    b_in: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    save: str,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The feed-forward of norm(h): SwiGLU of a pair of weights, GELU of one.

    Args:
        join: what is normalised.
        norm: how.
        w_in: (w_gate, w_up), each (F, C); or (w_up, None).
        b_in: (F,) or None; of a pair of weights (2F,), gate before up.
        w_down: (C, F).
        b_down: (C,) or None.
        save: "gate_up" keeps the product of the first matmul, "input" nothing.
        impl: as `_operator.choose` takes it.

    Returns:
        (y, h): (B, T, C) in the dtype of the matmuls, and (B, T, C).

    Raises:
        ValueError, TypeError: as `norm_qkv`; for another `save`.
    """
    if save not in ("gate_up", "input"):
        raise ValueError(f"norm_mlp: save must be gate_up or input; found {save!r}")
    first, up = w_in
    inner = {"w_up": first} if up is None else {"w_gate": first, "w_up": up}
    rest = {"b_in": b_in, "w_down": w_down, "b_down": b_down}
    triton, dtype, seed = checked("norm_mlp", join, norm, {**inner, **rest}, impl)
    F, C = first.shape
    op.expect_shape("norm_mlp", "w_up", up, (F, C))
    op.expect_shape("norm_mlp", "b_in", b_in, (F if up is None else 2 * F,))
    op.expect_shape("norm_mlp", "w_down", w_down, (C, F))
    op.expect_shape("norm_mlp", "b_down", b_down, (C,))
    if not torch.is_grad_enabled():
        save = "input"
    y, _, h = _norm_mlp_operator(
        join.branch, join.residual, norm.weight, norm.bias, *w_in, b_in, w_down, b_down, seed,
        norm.eps, norm.center, join.p, save, dtype, triton,
    )  # fmt: skip
    return y, join.residual if join.branch is None else h


def _packed(w_in: Tensor, w_up: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The first matmul's weight, (K, C)."""
    return w_in.to(dtype) if w_up is None else torch.cat([w_in.to(dtype), w_up.to(dtype)])


def _norm_mlp(
    branch: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    w_in: Tensor, w_up: Tensor | None, b_in: Tensor | None, w_down: Tensor,
    b_down: Tensor | None, seed: Tensor | None, eps: float, center: bool, p: float, save: str,
    dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the product of the first matmul (N, K) where it is kept, and h."""
    y, h, _, _ = normed(
        branch, residual, norm_weight, norm_bias, seed, eps, center, p, dtype, triton
    )
    out, pre, _ = feed_forward._mlp(
        flat(y), _packed(w_in, w_up, dtype), low(b_in, dtype), w_down.to(dtype),
        low(b_down, dtype), "gelu" if w_up is None else "swiglu", save, triton,
    )  # fmt: skip
    return out.view(residual.shape), pre, h


def _norm_mlp_fake(
    branch: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    w_in: Tensor, w_up: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    save, dtype = rest[-3], rest[-2]
    tokens = residual.numel() // residual.shape[-1]
    columns = w_in.shape[0] * (1 if w_up is None else 2)
    pre = residual.new_empty(0 if save == "input" else (tokens, columns), dtype=dtype)
    h = residual.new_empty(0 if branch is None else residual.shape)
    return residual.new_empty(residual.shape, dtype=dtype), pre, h


def _norm_mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branch, residual, *parts, seed = inputs[:10]
    _, pre, h = output
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual if branch is None else h, *parts, pre, seed)
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.settings = inputs[10:]


@once_differentiable
def _norm_mlp_gradients(
    ctx: Any, dout: Tensor | None, _: None, dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, dtype = ctx.saved_tensors, ctx.settings[-2]
    h, *weights = saved[:8]
    if dout is None:  # only h was used
        dout = torch.zeros_like(h, dtype=dtype)
    dh = None if ctx.branch_dtype is None else dh
    grads = _norm_mlp_backward_operator(dout, dh, *saved, *ctx.settings, ctx.branch_dtype)
    return (*shared(grads, ctx.branch_dtype, weights), *(None,) * 7)


def _norm_mlp_backward(
    dout: Tensor, dh: Tensor | None, h: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    w_in: Tensor, w_up: Tensor | None, b_in: Tensor | None, w_down: Tensor,
    b_down: Tensor | None, pre: Tensor, seed: Tensor | None, eps: float, center: bool, p: float,
    save: str, dtype: torch.dtype, triton: bool, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, _, mean, rstd = normed(
        None, h, norm_weight, norm_bias, None, eps, center, 0.0, dtype, triton
    )
    needs = [True, True, b_in is not None, True, b_down is not None]
    dy, dw_in, db_in, dw_down, db_down = feed_forward._mlp_backward(
        flat(dout), flat(y), _packed(w_in, w_up, dtype), low(b_in, dtype), w_down.to(dtype),
        pre, pre.new_empty(0), "gelu" if w_up is None else "swiglu", save, needs, triton,
    )  # fmt: skip
    del y
    norm = norm_gradients(
        dy.view(h.shape), dh, h, norm_weight, norm_bias, (mean, rstd), seed, center, p,
        branch_dtype, triton,
    )  # fmt: skip
    if w_up is None:
        return (*norm, dw_in, dw_in.new_empty(0), db_in, dw_down, db_down)
    gate, up = (t.clone() for t in dw_in.chunk(2))  # an operator returns no views
    return (*norm, gate, up, db_in, dw_down, db_down)


def _norm_mlp_backward_fake(
    dout: Tensor, dh: Tensor | None, h: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
    w_in: Tensor, w_up: Tensor | None, b_in: Tensor | None, w_down: Tensor,
    b_down: Tensor | None, pre: Tensor, seed: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    norm = norm_like(h, norm_weight, norm_bias, seed, rest[-1])
    return (*norm, *gradient_like(rest[-3], h, w_in, w_up, b_in, w_down, b_down))


_norm_mlp_backward_operator = op.operator(_norm_mlp_backward, fake=_norm_mlp_backward_fake)
_norm_mlp_operator = op.operator(
    _norm_mlp, fake=_norm_mlp_fake, setup_context=_norm_mlp_setup, backward=_norm_mlp_gradients
)
