"""SwiGLU as one operator over the packed product [gate | up]."""

from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels._operator import choose, expect_floating, operator, run_expression
from mypt_fast.kernels.reference import activation as reference


def swiglu(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up of a packed row [gate | up] (SwiGLU, arXiv 2002.05202).

    Computed in fp32 (fp64 for fp64) and rounded once, except that the plain expression, which
    `auto` takes on a CPU, rounds silu to 16 bits on the way. The gradient is written packed, in
    one piece, by the operator.

    Args:
        gate_up: (..., 2F), fp16, bf16, fp32 or fp64.
        impl: as `_operator.choose` takes it.

    Returns:
        (..., F), of the dtype of `gate_up`.

    Raises:
        ValueError: if the last dimension is odd or zero, or for an `impl` that cannot run here.
        TypeError: if `gate_up` is not floating point, or a DTensor.
    """
    path = choose("swiglu", impl, gate_up)
    expect_floating("swiglu", gate_up=gate_up)
    width = gate_up.shape[-1] if gate_up.dim() else 0
    if width == 0 or width % 2:
        raise ValueError(
            "swiglu: expected gate_up (..., 2F), two halves of one width F > 0; "
            f"found {tuple(gate_up.shape)}"
        )
    if path == "inductor":
        return run_expression(reference.swiglu_packed, impl, gate_up)
    h = _swiglu_operator(gate_up.reshape(-1, width), path == "triton")
    return h.view(*gate_up.shape[:-1], width // 2)


def formulas(triton: bool) -> Any:
    """The module of the Triton launchers, or that of the formulas they implement."""
    if triton:
        from mypt_fast.kernels.jit import activation

        return activation
    return reference


def _swiglu(gate_up: Tensor, triton: bool) -> Tensor:
    return formulas(triton).swiglu_forward(gate_up)


def _swiglu_fake(gate_up: Tensor, triton: bool) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _swiglu_backward(dh: Tensor, gate_up: Tensor, triton: bool) -> Tensor:
    return formulas(triton).swiglu_backward(dh, gate_up)


def _swiglu_backward_fake(dh: Tensor, gate_up: Tensor, triton: bool) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.triton = inputs[1]


@once_differentiable
def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
    (gate_up,) = ctx.saved_tensors
    return _swiglu_backward_operator(dh, gate_up, ctx.triton), None


_swiglu_backward_operator = operator(_swiglu_backward, fake=_swiglu_backward_fake)
_swiglu_operator = operator(
    _swiglu, fake=_swiglu_fake, setup_context=_setup_context, backward=_gradient
)
