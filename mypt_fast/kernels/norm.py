"""RMSNorm and LayerNorm, alone or behind a residual add with dropout.

`add_*` is one pass over memory where the add, the dropout and the norm would each be one. Its
dropout draws the mask from a counter and a seed tensor: it stores none, and whoever recomputes the
operator (checkpointing, torch.compile's activation_memory_budget) draws the same mask again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels import _operator as op
from mypt_fast.kernels.reference import norm as reference

Result = tuple[Tensor, Tensor, Tensor, Tensor]
MAX_COLUMNS = 32768  # what the kernels hold in registers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """RMSNorm over the last dimension: x rsqrt(mean(x^2) + eps) (weight + offset).

    From arXiv 1910.07467. Computed in fp32 (fp64 for fp64 inputs) and rounded once.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64.
        weight: (C,), of any of these; its gradient, summed in fp32, has its dtype.
        eps: added to the mean square.
        offset: added to the weight, 1.0 for weights stored around 0.
        out_dtype: of the result; by default autocast's where it is on, else that of x.
        impl: "auto", "triton", "reference" or "inductor".

    Returns:
        y: (..., C).

    Raises:
        ValueError: for shapes or devices that do not fit, or an `impl` that cannot run here.
        TypeError: for dtypes other than these, fp64 among others, or a DTensor.
    """
    path = _check("rms_norm", impl, x, weight, out_dtype=out_dtype)
    dtype = _out_dtype(x, out_dtype)
    if path == "inductor":
        return op.run_expression(reference.rms_norm, impl, x, weight, eps, offset, dtype)
    triton = path == "triton"
    return norm(x, None, weight, None, None, eps, offset, False, 0.0, dtype, triton)[0]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimension: (x - mean) rsqrt(var + eps) weight + bias.

    From arXiv 1607.06450. Computed in fp32 (fp64 for fp64 inputs) and rounded once.

    Args:
        x: (..., C), fp16, bf16, fp32 or fp64.
        weight: (C,), of any of these; its gradient, summed in fp32, has its dtype.
        bias: (C,) as the weight, or None for 0.
        eps: added to the variance.
        out_dtype: of the result; by default autocast's where it is on, else that of x.
        impl: "auto", "triton", "reference" or "inductor".

    Returns:
        y: (..., C).

    Raises:
        ValueError: for shapes or devices that do not fit, or an `impl` that cannot run here.
        TypeError: for dtypes other than these, fp64 among others, or a DTensor.
    """
    path = _check("layer_norm", impl, x, weight, bias=bias, out_dtype=out_dtype)
    dtype = _out_dtype(x, out_dtype)
    if path == "inductor":
        return op.run_expression(reference.layer_norm, impl, x, weight, bias, eps, dtype)
    triton = path == "triton"
    return norm(x, None, weight, bias, None, eps, 0.0, True, 0.0, dtype, triton)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A branch joins the residual stream, and RMSNorm of the sum: h = residual + dropout(x).

    The norm is of h as rounded to its dtype, which is what a later layer reads.

    Args:
        x: (..., C), the branch.
        residual: as x; may be wider (fp32 while x is 16-bit).
        weight: (C,).
        eps: added to the mean square.
        offset: added to the weight, 1.0 for weights stored around 0.
        dropout_p: probability to zero an element of x; the others grow by 1 / (1 - dropout_p).
        seed: 0-d int64 on x's device, new for each call and each step; the mask is Philox 4x32-10
            of it and the element's place, on every implementation and card.
        out_dtype: of y; by default autocast's where it is on, else that of x.
        impl: "auto", "triton", "reference" or "inductor".

    Returns:
        (y, h): the norm, and the new residual stream in the dtype of `residual`.

    Raises:
        ValueError: for shapes or devices that do not fit, a dropout_p outside [0, 1) or without a
            seed, or an `impl` that cannot run here.
        TypeError: for dtypes other than these, fp64 among others, or a DTensor.
    """
    path = _check("add_rms_norm", impl, x, weight, residual=residual, out_dtype=out_dtype)
    seed = _checked_seed("add_rms_norm", x, dropout_p, seed)
    dtype = _out_dtype(x, out_dtype)
    if path == "inductor":
        expression = reference.add_rms_norm
        args = (x, residual, weight, seed, eps, offset, dropout_p, dtype)
        return op.run_expression(expression, impl, *args)
    triton = path == "triton"
    return norm(x, residual, weight, None, seed, eps, offset, False, dropout_p, dtype, triton)[:2]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A branch joins the residual stream, and LayerNorm of the sum: h = residual + dropout(x).

    Args:
        x: (..., C), the branch.
        residual: as x; may be wider (fp32 while x is 16-bit).
        weight: (C,).
        bias: (C,) or None for 0.
        eps: added to the variance.
        dropout_p: as `add_rms_norm` takes it.
        seed: as `add_rms_norm` takes it.
        out_dtype: of y; by default autocast's where it is on, else that of x.
        impl: "auto", "triton", "reference" or "inductor".

    Returns:
        (y, h): the norm, and the new residual stream in the dtype of `residual`.

    Raises:
        ValueError: for shapes or devices that do not fit, a dropout_p outside [0, 1) or without a
            seed, or an `impl` that cannot run here.
        TypeError: for dtypes other than these, fp64 among others, or a DTensor.
    """
    path = _check(
        "add_layer_norm", impl, x, weight, residual=residual, bias=bias, out_dtype=out_dtype
    )
    seed = _checked_seed("add_layer_norm", x, dropout_p, seed)
    dtype = _out_dtype(x, out_dtype)
    if path == "inductor":
        expression = reference.add_layer_norm
        args = (x, residual, weight, bias, seed, eps, dropout_p, dtype)
        return op.run_expression(expression, impl, *args)
    triton = path == "triton"
    return norm(x, residual, weight, bias, seed, eps, 0.0, True, dropout_p, dtype, triton)[:2]


def _check(
    name: str,
    impl: str,
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> str:
    if impl == "auto" and op.alike_on_cpu(x, weight, residual, bias) and x.dim() and x.shape[-1]:
        width = x.shape[-1:]
        fits = weight.shape == width and (bias is None or bias.shape == width)
        if fits and (residual is None or residual.shape == x.shape):
            return "inductor"
    path = op.choose(name, impl, x, dtype=_kernel_dtype(x, out_dtype))
    if path == "triton" and x.dim() and x.shape[-1] > MAX_COLUMNS:
        if impl == "triton":
            raise ValueError(
                f"{name}: impl='triton' takes rows of at most {MAX_COLUMNS}; found {x.shape[-1]}"
            )
        path = "inductor"
    op.expect_tensors(name, weight=weight)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected x of shape (..., C), C > 0; found {tuple(x.shape)}")
    tensors = {"x": x, "weight": weight, "residual": residual, "bias": bias}
    op.expect_floating(name, **tensors)
    op.expect_shape(name, "weight", weight, (x.shape[-1],))
    op.expect_shape(name, "bias", bias, (x.shape[-1],))
    op.expect_shape(name, "residual", residual, tuple(x.shape))
    op.expect_same_device(name, x, weight=weight, residual=residual, bias=bias)
    for argument, t in tensors.items():
        if t is not None and (t.dtype is torch.float64) != (x.dtype is torch.float64):
            raise TypeError(
                f"{name}: expected fp64 in all tensors or none; x is {x.dtype}, "
                f"{argument} {t.dtype}"
            )
    return path


def _kernel_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """bf16 where any of it is: what a card must support."""
    out = _out_dtype(x, out_dtype)
    return torch.bfloat16 if out is torch.bfloat16 else x.dtype


def _checked_seed(name: str, x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The seed, None where nothing is dropped."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: expected 0 <= dropout_p < 1; found {dropout_p}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        raise ValueError(f"{name}: expected a seed with dropout_p {dropout_p}; found None")
    op.expect_tensors(name, seed=seed)
    if seed.dtype is not torch.int64 or seed.dim() != 0:
        raise ValueError(
            f"{name}: expected seed as a 0-d int64 tensor; "
            f"found {seed.dtype} of shape {tuple(seed.shape)}"
        )
    op.expect_same_device(name, x, seed=seed)
    return seed


def _out_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """As asked; else autocast's, which leaves fp64 alone, or that of x."""
    if out_dtype is not None:
        if not out_dtype.is_floating_point:
            raise TypeError(f"norm: expected a floating-point out_dtype; found {out_dtype}")
        return out_dtype
    return x.dtype if x.dtype is torch.float64 else op.autocast_dtype(x)


def _norm_backward(
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
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (dy, dh_out, h, weight, mean, rstd, seed)
    constants = (offset, center, dropout_p, branch_dtype, bias_dtype)
    if triton:
        from mypt_fast.kernels.jit import norm as jit

        return jit.norm_backward(*args, *constants)
    return reference.norm_backward(*args, *constants)


def _norm_backward_fake(
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
    triton: bool,
) -> Result:
    dx = h.new_empty(0 if branch_dtype is None else h.shape, dtype=branch_dtype or dy.dtype)
    dbias = h.new_empty(0 if bias_dtype is None else weight.shape, dtype=bias_dtype or dy.dtype)
    return h.new_empty(h.shape), dx, torch.empty_like(weight), dbias


norm_backward = op.operator(_norm_backward, fake=_norm_backward_fake)


def _norm(
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
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (x, residual, weight, bias, seed, eps, offset, center, dropout_p, out_dtype)
    if triton:
        from mypt_fast.kernels.jit import norm as jit

        return jit.norm_forward(*args)
    return reference.norm_forward(*args)


def _norm_fake(
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
    triton: bool,
) -> Result:
    wide = reference.wide_dtype(x)
    h = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    mean = x.new_empty(x.shape[:-1] if center else 0, dtype=wide)
    return x.new_empty(x.shape, dtype=out_dtype), h, mean, x.new_empty(x.shape[:-1], dtype=wide)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    x, residual, weight, bias, seed, _, offset, center, dropout_p, out_dtype, triton = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    differs = residual is not None and (seed is not None or x.dtype is not residual.dtype)
    ctx.constants = (
        offset,
        center,
        dropout_p,
        x.dtype if differs else None,
        bias.dtype if bias is not None else None,
        triton,
    )
    ctx.has_residual = residual is not None
    ctx.out_dtype = out_dtype


@once_differentiable  # the statistics it reads are constants to autograd
def _norm_gradients(
    ctx: Any, dy: Tensor | None, dh_out: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    h, weight, mean, rstd, seed = ctx.saved_tensors
    if not ctx.has_residual:
        dh_out = None
    if dy is None:  # only h was used
        dy = torch.zeros_like(h, dtype=ctx.out_dtype)
    branch_dtype, bias_dtype = ctx.constants[3:5]
    dh, dx, dweight, dbias = norm_backward(dy, dh_out, h, weight, mean, rstd, seed, *ctx.constants)
    return (
        dx if branch_dtype is not None else dh,
        dh if ctx.has_residual else None,
        dweight,
        dbias if bias_dtype is not None else None,
        *(None,) * 7,
    )


norm = op.operator(_norm, fake=_norm_fake, setup_context=_norm_setup, backward=_norm_gradients)
