"""The head and its loss in one: logits exist a chunk of rows at a time, never whole.

Both gradients are made in the forward, where the logits are, without the factor that the mean and
the loss scale bring: in fp16 that factor would flush most of dlogits to zero. It is applied once,
in fp32, in the backward. Shapes: N rows, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels import _operator
from mypt_fast.kernels.chunked_head import Head, chunk_rows
from mypt_fast.kernels.cross_entropy import check_rows, check_rule, divisor, kept_weight
from mypt_fast.kernels.reference.cross_entropy import Rule

NAME = "linear_cross_entropy"


# The summed loss, whose gradients are made in the forward. Schema types are spelled out: they are
# what torch.library reads.


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    dtype: torch.dtype, rows: int, need_x: bool, need_w: bool, need_b: bool, path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rule = Rule(ignore_index, label_smoothing, z_loss, softcap)
    head = Head(x, weight, bias, targets, scale, rule, dtype, rows, path)
    losses, dx, dw, db = head.run(need_x, need_w, need_b)
    return _total(losses, scale), dx, dw, db


def _total(losses: Tensor, scale: Tensor | None) -> Tensor:
    return (losses if scale is None else losses * scale).sum()


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    dtype: torch.dtype, rows: int, need_x: bool, need_w: bool, need_b: bool, path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if need_x else (0,), dtype=dtype),
        x.new_empty(weight.shape if need_w else (0,), dtype=wide),
        x.new_empty(weight.shape[:1] if need_b else (0,), dtype=wide),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    x, weight, bias = inputs[:3]
    ctx.dtypes = (x.dtype, weight.dtype, bias.dtype if bias is not None else None)
    ctx.needed = inputs[11:14]


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 15
    in_place = not _operator.observed()
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True)
    scaled = [scale_once(t, grad, dtype, in_place) if needed else None for t, dtype, needed in made]
    return *scaled, *(None,) * 12


def scale_once(made: Tensor, grad: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """Multiply by the upstream gradient in fp32, rounded once to `dtype`.

    In place where the dtypes allow: saved for one backward, and a copy of dW would be the largest
    tensor of the step. Running the backward twice is then an error that autograd raises.
    """
    factor = grad.reshape((1,) * made.dim())  # a 0-d factor would be rounded to 16 bits first
    if in_place:
        out = made if made.dtype is dtype else torch.empty_like(made, dtype=dtype)
        return torch.mul(made, factor, out=out)
    return (made * factor).to(dtype)


def _flops(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    need_x, need_w = rest[9], rest[10]
    return 2 * x[0] * x[1] * weight[0] * (1 + bool(need_x) + bool(need_w))


summed = _operator.operator(
    _linear_cross_entropy, fake=_fake, setup_context=_setup, backward=_gradient, flops=_flops
)


# The losses of single rows. Their upstream gradients differ, so dW cannot be made in the forward:
# the backward makes the logits again.


def _linear_cross_entropy_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, dtype: torch.dtype, rows: int,
    path: str,
) -> Tensor:  # fmt: skip
    rule = Rule(ignore_index, label_smoothing, z_loss, softcap)
    return Head(x, weight, bias, targets, None, rule, dtype, rows, path).run(False, False, False)[0]


def _linear_cross_entropy_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    dtype: torch.dtype, rows: int, path: str, need_x: bool, need_w: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rule = Rule(ignore_index, label_smoothing, z_loss, softcap)
    scale, largest = normalised(grad.where(targets != ignore_index, 0))
    head = Head(x, weight, bias, targets, scale, rule, dtype, rows, path)
    made = head.run(need_x, need_w, need_b)[1:]
    wanted = (x.dtype, weight.dtype, bias.dtype if bias is not None else weight.dtype)
    pairs = zip(made, wanted, strict=True)
    dx, dw, db = (scale_once(t, largest, dtype, in_place=True) for t, dtype in pairs)
    return dx, dw, db


def normalised(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights divided by their largest magnitude, and that; all zero: 0 and 1.

    dlogits times a weight in [-1, 1] keeps fp16's range; the magnitude is applied in fp32.
    """
    if not weights.numel():
        return weights, weights.new_ones(())
    largest = weights.abs().amax()
    largest = largest.where(largest != 0, 1)
    return weights / largest, largest


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _rows_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    made = rows_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, *needs)
    grads = (t if needed else None for t, needed in zip(made, needs, strict=True))
    return *grads, *(None,) * 8


def _rows_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    dtype: torch.dtype, rows: int, path: str, need_x: bool, need_w: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b = weight if bias is None else bias
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_w else (0,), dtype=weight.dtype),
        x.new_empty(weight.shape[:1] if need_b else (0,), dtype=b.dtype),
    )


def _rows_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _rows_backward_flops(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    return _rows_flops(x, weight) * (1 + bool(rest[9]) + bool(rest[10]))


rows_backward = _operator.operator(
    _linear_cross_entropy_rows_backward, fake=_rows_backward_fake, flops=_rows_backward_flops
)
single = _operator.operator(
    _linear_cross_entropy_rows,
    fake=lambda x, weight, bias, targets, *rest: x.new_empty(
        x.shape[0], dtype=torch.float64 if rest[4] is torch.float64 else torch.float32
    ),
    setup_context=_rows_setup,
    backward=_rows_gradient,
    flops=_rows_flops,
)


class _GradInto(torch.autograd.Function):
    """`summed`, with dW added to a buffer in the forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        scale: Tensor | None, rule: Rule, dtype: torch.dtype, rows: int, path: str,
        grad_into: Tensor, promised: Tensor,
    ) -> Tensor:  # fmt: skip
        need_x, _, need_b = ctx.needs_input_grad[:3]
        if scale is None:
            scale = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
        # Summed without the factor, like every dW: the buffer's older part steps aside for it.
        # A factor that would take the buffer out of fp32's range goes to the rows instead.
        moderate = (promised.abs() > 1e-12) & (promised.abs() < 1e12)
        factor = promised.where(moderate, 1)
        head = Head(
            x, weight, bias, targets, scale * promised.where(~moderate, 1), rule, dtype, rows, path
        )
        grad_into.div_(factor)
        with torch.autocast(x.device.type, enabled=False):
            losses, dx, _, db = head.run(need_x, True, need_b, dw=grad_into)
        grad_into.mul_(factor)
        ctx.save_for_backward(dx, db, promised, factor)
        ctx.grad_into = grad_into
        ctx.dtypes = (x.dtype, bias.dtype if bias is not None else None)
        ctx.needed = (need_x, need_b)
        return _total(losses, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, db, promised, factor = ctx.saved_tensors
        # dW is already in the buffer: another factor than promised may not pass unseen
        kept = (grad - promised).abs() <= 1e-5 * promised.abs()
        factor = factor.where(kept, torch.nan)
        ctx.grad_into[0, :1] += factor.where(~kept, 0)
        made = zip((dx, db), ctx.dtypes, ctx.needed, strict=True)
        dx, db = (scale_once(t, factor, d, in_place=True) if n else None for t, d, n in made)
        return dx, None, db, *(None,) * 8


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    denom: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    grad_into: Tensor | None = None,
    grad_scale: Tensor | float = 1.0,
    memory_budget: int | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """cross_entropy(x W^T + b, targets) without the (N, V) logits.

    Under autocast the matmuls run in its dtype; the gradient of a fp32 weight stays a fp32 sum.
    The backward of "mean" and "sum" may run once.

    Args:
        x: (N, C).
        weight: (V, C).
        bias: (V,) or None.
        targets: as in `cross_entropy`, like all that is not explained here.
        ignore_index: as there.
        token_weight: as there, but without a gradient.
        denom: as there.
        label_smoothing: as there.
        z_loss: as there.
        softcap: as there.
        reduction: as there; "none" makes the logits again in the backward.
        grad_into: (V, C) fp32 buffer, `weight.grad` for instance, that dW is added to in the
            forward instead of being returned: it saves a second dW. Not under torch.compile, nor
            inside a checkpoint, whose second forward would add again.
        grad_scale: with `grad_into`, the upstream gradient that the backward will get (the loss
            scale, say), a number or 0-d tensor. Should another come, the gradients are NaN.
        memory_budget: bytes that the logits of a chunk may take, but 64 rows at least; see
            `chunk_rows`.
        chunk: most rows of logits at a time, instead of a budget.
        impl: as in `choose`; "inductor" compiles the step on a chunk of logits.

    Returns:
        fp32 scalar, or (N,) for "none".

    Raises:
        ValueError, TypeError: for arguments that do not fit each other.
    """
    rule = check_rule(NAME, ignore_index, label_smoothing, z_loss, softcap, reduction)
    dtype = _check(x, weight, bias, grad_into, reduction, grad_scale, memory_budget, chunk)
    check_rows(NAME, x, targets, token_weight, denom, (x.shape[0], weight.shape[0]), rule)
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError(f"{NAME}: token_weight gets no gradient; pass it detached")
    path, cpu = _path(impl, x, dtype), x.device.type == "cpu"
    rows = chunk_rows(x.shape[0], weight.shape[0], dtype, cpu, memory_budget, chunk)
    options = (ignore_index, rule.label_smoothing, rule.z_loss, rule.softcap, dtype, rows)
    row_weight = kept_weight(x, targets, token_weight, rule)
    if reduction == "none":
        losses = single(x, weight, bias, targets, *options, path)
        return losses if row_weight is None else losses * row_weight
    scale, largest = (None, 1.0) if row_weight is None else normalised(row_weight)
    by = divisor(targets, row_weight, denom, rule) if reduction == "mean" else 1.0
    grads = torch.is_grad_enabled()
    if grad_into is not None and grads:
        promised = grad_scale * largest / by
        if not isinstance(promised, Tensor):  # made there: a copy would stall the device
            promised = torch.full((), promised, device=x.device)
        total = _GradInto.apply(
            x, weight, bias, targets, scale, rule, dtype, rows, path, grad_into, promised.float()
        )
    else:
        needs = (grads and t is not None and t.requires_grad for t in (x, weight, bias))
        total = summed(x, weight, bias, targets, scale, *options, *needs, path)[0]
    return total * largest / by


def _path(impl: str, x: Tensor, dtype: torch.dtype) -> str:
    path = _operator.choose(NAME, impl, x, dtype=dtype, saves_memory=True)
    if path == "inductor":  # auto, on a CPU: the step needs no compiler to be fast there
        return "compiled" if impl == "inductor" else "reference"
    return path


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad_into: Tensor | None, reduction: str,
    grad_scale: Tensor | float, memory_budget: int | None, chunk: int | None,
) -> torch.dtype:  # fmt: skip
    """Check all but the rows; returns the dtype of the matmuls."""
    _operator.expect_tensors(NAME, x=x, weight=weight)
    _operator.expect_same_device(NAME, x, weight=weight, bias=bias, grad_into=grad_into)
    _operator.expect_floating(NAME, x=x, weight=weight, bias=bias)
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or not weight.numel():
        raise ValueError(
            f"{NAME}: expected x (N, C) and weight (V, C), V and C > 0; "
            f"found {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    _operator.expect_shape(NAME, "bias", bias, (weight.shape[0],))
    dtype = _operator.autocast_dtype(x)
    if not _operator.autocasts(x.device.type):
        for argument, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype is not x.dtype:
                raise TypeError(
                    f"{NAME}: expected {argument} of the dtype of x, {x.dtype}; found {t.dtype}"
                )
    for argument, value in (("memory_budget", memory_budget), ("chunk", chunk)):
        if value is not None and value <= 0:
            raise ValueError(f"{NAME}: expected {argument} > 0 or None; found {value}")
    if grad_into is not None:
        _check_buffer(grad_into, weight, dtype, reduction)
        if isinstance(grad_scale, Tensor):
            _operator.expect_same_device(NAME, x, grad_scale=grad_scale)
            _operator.expect_shape(NAME, "grad_scale", grad_scale, ())
    return dtype


def _check_buffer(buffer: Tensor, weight: Tensor, dtype: torch.dtype, reduction: str) -> None:
    _operator.expect_shape(NAME, "grad_into", buffer, tuple(weight.shape))
    if buffer.dtype is not torch.float32 or dtype is torch.float64:
        raise TypeError(
            f"{NAME}: expected grad_into of fp32, and no fp64 beside it; "
            f"found {buffer.dtype}, {dtype}"
        )
    if not buffer.is_contiguous():
        raise ValueError(f"{NAME}: expected grad_into contiguous; found strides {buffer.stride()}")
    if reduction == "none" or torch.compiler.is_compiling():
        raise ValueError(f"{NAME}: grad_into needs reduction mean or sum, outside torch.compile")
