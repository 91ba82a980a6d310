"""The feed-forward networks as one operator that is its own checkpoint.

In `save` the caller says what the forward leaves for the backward, in tokens T, width C, hidden
width F (K = 2F columns in front of SwiGLU, F in front of GELU):

| save | kept besides the weights | made again | GEMMs, forward and backward |
|---|---|---|---|
| "all" | x, up-projection (T, K), h (T, F) | - | 6 |
| "gate_up" ("up") | x, up-projection | h, in the pass that makes its gradient | 6 |
| "input" | x | both | 7 (a checkpoint around it: 8) |
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels._operator import (
    alike_on_cpu,
    autocast_dtype,
    autocasts,
    choose,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    operator,
    run_expression,
)
from mypt_fast.kernels.activation import formulas
from mypt_fast.kernels.reference import activation as reference


def swiglu_mlp(
    x: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    *,
    save: str = "all",
    impl: str = "auto",
) -> Tensor:
    """(silu(x Wg^T) * (x Wu^T)) Wd^T, the SwiGLU feed-forward (arXiv 2002.05202).

    Under autocast the GEMMs run in its dtype, and so does the result; gradients have the dtypes
    of the parameters. A pair of weights is packed for the operator, which copies them, and used
    as it is by the plain expression.

    Args:
        x: (..., C).
        w_gate_up: (2F, C), rows [gate | up], or the pair (w_gate, w_up), each (F, C).
        w_down: (C, F).
        save: "all", "gate_up" or "input": what the backward finds, see the table above.
        impl: as `_operator.choose` takes it. The plain expression keeps what autograd keeps: where
            `auto` would take it, `save` other than "all" takes the reference operator instead.

    Returns:
        (..., C).

    Raises:
        ValueError: for shapes or devices that disagree, an unknown `save`, an `impl` that cannot
            run here, and impl="inductor" with `save` other than "all".
        TypeError: for dtypes that disagree outside autocast, and for a DTensor.
    """
    first: dict[str, Tensor] = {}
    if isinstance(w_gate_up, Tensor):
        first["w_gate_up"] = w_gate_up
    elif isinstance(w_gate_up, (tuple, list)) and len(w_gate_up) == 2:
        first["w_gate"], first["w_up"] = w_gate_up
    else:
        raise TypeError(
            "swiglu_mlp: expected w_gate_up to be a tensor or a pair of tensors; "
            f"found {type(w_gate_up).__name__}"
        )
    path, save = _path("swiglu_mlp", x, {**first, "w_down": w_down}, save, impl)
    C, F = x.shape[-1], w_down.shape[-1]
    for argument, weight in first.items():
        expect_shape("swiglu_mlp", argument, weight, (2 * F // len(first), C))
    expect_shape("swiglu_mlp", "w_down", w_down, (C, F))
    if path == "inductor":
        return run_expression(reference.swiglu_mlp, impl, x, w_gate_up, w_down)
    dtype = autocast_dtype(x)
    low = [weight.to(dtype) for weight in first.values()]
    w_in = low[0] if len(low) == 1 else torch.cat(low)
    return _apply("swiglu", x.to(dtype), w_in, None, w_down.to(dtype), None, save, path)


def gelu_mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    save: str = "all",
    impl: str = "auto",
) -> Tensor:
    """gelu(x Wu^T + bu) Wd^T + bd with the exact, erf, GELU (arXiv 1606.08415), as in GPT-2.

    Args:
        x: (..., C).
        w_up: (F, C).
        b_up: (F,) or None.
        w_down: (C, F).
        b_down: (C,) or None.
        save: "all", "up" (or "gate_up", the same) or "input"; the rest is as in `swiglu_mlp`.
        impl: as in `swiglu_mlp`.

    Returns:
        (..., C).

    Raises:
        ValueError: as `swiglu_mlp`.
        TypeError: as `swiglu_mlp`.
    """
    tensors: dict[str, Tensor | None] = {
        "w_up": w_up,
        "b_up": b_up,
        "w_down": w_down,
        "b_down": b_down,
    }
    path, save = _path("gelu_mlp", x, tensors, "gate_up" if save == "up" else save, impl)
    C, F = x.shape[-1], w_down.shape[-1]
    expect_shape("gelu_mlp", "w_up", w_up, (F, C))
    expect_shape("gelu_mlp", "b_up", b_up, (F,))
    expect_shape("gelu_mlp", "w_down", w_down, (C, F))
    expect_shape("gelu_mlp", "b_down", b_down, (C,))
    if path == "inductor":
        return run_expression(reference.gelu_mlp, impl, x, w_up, b_up, w_down, b_down)
    dtype = autocast_dtype(x)
    return _apply(
        "gelu", x.to(dtype), w_up.to(dtype), None if b_up is None else b_up.to(dtype),
        w_down.to(dtype), None if b_down is None else b_down.to(dtype), save, path,
    )  # fmt: skip


def _path(
    name: str, x: Tensor, others: dict[str, Tensor | None], save: str, impl: str
) -> tuple[str, str]:
    """Check everything but shapes; the implementation, and what to save."""
    if impl == "auto" and save == "all" and alike_on_cpu(x, *others.values()):
        w_down = others["w_down"]
        given = all(others.get(k, x) is not None for k in ("w_gate", "w_up"))
        wide = x.dim() and x.shape[-1] and w_down is not None and w_down.dim() == 2
        if given and wide and w_down.shape[1]:  # type: ignore[union-attr]
            return "inductor", save
    dtype = autocast_dtype(x)  # what the kernels will see, which decides
    path = choose(name, impl, x, dtype=dtype, saves_memory=save != "all")
    if save not in ("all", "gate_up", "input"):
        raise ValueError(
            f"{name}: save must be one of all, {'gate_' if name == 'swiglu_mlp' else ''}up, input; "
            f"found {save!r}"
        )
    if path == "inductor" and save != "all":
        if impl == "inductor":
            raise ValueError(
                f"{name}: save={save!r} needs the operator, but impl='inductor' forces the plain "
                "expression, which keeps everything: use save='all', or another impl"
            )
        path = "reference"
    weights = {k: t for k, t in others.items() if k.startswith("w")}
    expect_tensors(name, **weights)  # type: ignore[arg-type]
    expect_floating(name, x=x, **others)
    expect_same_device(name, x, **others)
    if not autocasts(x.device.type):
        for argument, t in others.items():
            if t is not None and t.dtype is not x.dtype:
                raise TypeError(
                    f"{name}: expected {argument} of the dtype of x, {x.dtype}; found {t.dtype}"
                )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected x (..., C) with C > 0; found {tuple(x.shape)}")
    w_down = others["w_down"]
    if w_down is not None and (w_down.dim() != 2 or w_down.shape[1] == 0):
        raise ValueError(f"{name}: expected w_down (C, F) with F > 0; found {tuple(w_down.shape)}")
    return path, save if torch.is_grad_enabled() else "input"


def _apply(
    activation: str, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_down: Tensor,
    b_down: Tensor | None, save: str, path: str,
) -> Tensor:  # fmt: skip
    flat = x.reshape(-1, x.shape[-1])
    triton = path == "triton"
    y, _, _ = _mlp_operator(flat, w_in, b_in, w_down, b_down, activation, save, triton)
    return y.view(x.shape)


def _mlp(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_down: Tensor, b_down: Tensor | None,
    activation: str, save: str, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y (T, C), the up-projection (T, K) and h (T, F), the last two empty unless saved."""
    pre = _linear(x, w_in, b_in)
    h = getattr(formulas(triton), f"{activation}_forward")(pre)
    if save == "input":
        pre = x.new_empty(0)  # gone before y comes
    y = _linear(h, w_down, b_down)
    return y, pre, h if save == "all" else x.new_empty(0)


def _mlp_fake(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_down: Tensor, b_down: Tensor | None,
    activation: str, save: str, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T = x.shape[0]
    return (
        x.new_empty((T, w_down.shape[0])),
        x.new_empty(0 if save == "input" else (T, w_in.shape[0])),
        x.new_empty((T, w_down.shape[1]) if save == "all" else 0),
    )


def _mlp_backward(
    dy: Tensor, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_down: Tensor, pre: Tensor,
    h: Tensor, activation: str, save: str, needs: list[bool], triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the five tensors, empty where `needs` says that nobody wants them.

    Tokens times F at the worst moment, besides what was saved: SwiGLU 3, GELU 2. What is ours is
    written over: recreated h over its gradient, the gradient of a replayed product over it.
    """
    need_x, need_w_in, need_b_in, need_w_down, need_b_down = needs
    replay = save == "input"
    dx, dw_in, db_in, dw_down, db_down = (x.new_empty(0) for _ in range(5))
    if need_b_down:
        db_down = dy.sum(0)  # accumulated in fp32
    if need_w_down and save == "all":
        dw_down = torch.mm(dy.T, h)
    if need_x or need_w_in or need_b_in or (need_w_down and save != "all"):
        dh = torch.mm(dy, w_down)
        pre = _linear(x, w_in, b_in) if replay else pre
        recreated = dh if need_w_down and save != "all" else None
        dpre = getattr(formulas(triton), f"{activation}_backward")(
            dh, pre, recreated, pre if replay else None
        )
        if recreated is not None:
            dw_down = torch.mm(dy.T, recreated)
        del dh, recreated, pre
        if need_b_in:
            db_in = dpre.sum(0)
        if need_w_in:
            dw_in = torch.mm(dpre.T, x)
        if need_x:
            dx = torch.mm(dpre, w_in)
    return dx, dw_in, db_in, dw_down, db_down


def _mlp_backward_fake(
    dy: Tensor, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_down: Tensor, pre: Tensor,
    h: Tensor, activation: str, save: str, needs: list[bool], triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    C, K = w_down.shape[0], w_in.shape[0]
    shapes = (x.shape, (K, C), (K,), w_down.shape, (C,))
    dx, dw_in, db_in, dw_down, db_down = (
        x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)
    )
    return dx, dw_in, db_in, dw_down, db_down


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, b_in, w_down, _, activation, save, triton = inputs
    _, pre, h = output
    ctx.mark_non_differentiable(pre, h)
    ctx.set_materialize_grads(False)
    # b_in serves the replay alone
    ctx.save_for_backward(x, w_in, b_in if save == "input" else None, w_down, pre, h)
    ctx.settings = (activation, save, triton)


@once_differentiable
def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    activation, save, triton = ctx.settings
    needs = list(ctx.needs_input_grad[:5])
    grads = _mlp_backward_operator(dy, *ctx.saved_tensors, activation, save, needs, triton)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


def _flops(
    x: tuple[int, ...], w_in: tuple[int, ...], b_in: Any, w_down: tuple[int, ...], *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    T, (K, C), F = x[0], w_in, w_down[1]
    return 2 * T * C * (K + F)


def _backward_flops(
    dy: tuple[int, ...], x: tuple[int, ...], w_in: tuple[int, ...], b_in: Any,
    w_down: tuple[int, ...], pre: Any, h: Any, activation: str, save: str, needs: list[bool],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    T, (K, C), F = x[0], w_in, w_down[1]
    need_x, need_w_in, need_w_down = needs[0], needs[1], needs[3]
    recreate = need_w_down and save != "all"
    up = need_x + need_w_in + (save == "input" and any(needs[:4]))
    down = need_w_down + (any(needs[:3]) or recreate)
    return 2 * T * C * (up * K + down * F)


_mlp_backward_operator = operator(_mlp_backward, fake=_mlp_backward_fake, flops=_backward_flops)
_mlp_operator = operator(
    _mlp, fake=_mlp_fake, setup_context=_setup_context, backward=_gradients, flops=_flops
)
