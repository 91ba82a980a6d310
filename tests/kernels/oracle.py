"""The oracle rule: an error against fp64 of at most twice plain PyTorch's at the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor | Sequence[Tensor]]


def run(
    function: Function, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of `function` and its gradients for every floating-point input."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in inputs
    ]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    upstream = [g.to(o.dtype) for o, g in zip(outputs, gradients, strict=True)]
    grads = torch.autograd.grad(outputs, wanted, upstream)
    for leaf, grad in zip(wanted, grads, strict=True):
        assert grad.dtype is leaf.dtype
        assert grad.shape == leaf.shape
    return [t.detach() for t in (*outputs, *grads)]


def wide(t: Tensor | None) -> Tensor | None:
    """An input for the fp64 truth: the values the narrow one has, exactly."""
    return t.double() if t is not None and t.is_floating_point() else t


def check(
    ours: Function,
    eager: Function,
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    factor: float = 2.0,
) -> None:
    """Assert the rule for every output and every gradient.

    `eager` is plain PyTorch: at fp64 it is the truth, at the dtype of `inputs` the yardstick.
    """
    yardstick = run(eager, inputs, gradients)
    # the truth gets the gradients that the narrow dtype holds, not finer ones
    gradients = [g.to(y.dtype) for g, y in zip(gradients, yardstick, strict=False)]
    truth = run(eager, [wide(t) for t in inputs], gradients)
    found = run(ours, inputs, gradients)
    for i, (a, t, y) in enumerate(zip(found, truth, yardstick, strict=True)):
        assert a.dtype is y.dtype, f"result {i}: {a.dtype}, plain PyTorch has {y.dtype}"
        assert a.shape == y.shape
        assert_close(a, t, y, factor, f"result {i}")


def assert_close(a: Tensor, truth: Tensor, yardstick: Tensor, factor: float, what: str) -> None:
    """Assert the rule for one result, in the Euclidean norm and in the worst element."""
    if not truth.numel():
        return
    for norm in (lambda t: t.norm(), lambda t: t.abs().max()):
        error, allowed = norm(a.double() - truth), norm(yardstick.double() - truth)
        tiny = 1e-7 * norm(truth) + 1e-30  # an ulp of fp32: where eager happens to be exact
        assert torch.isfinite(error), f"{what} is not finite"
        assert error <= factor * allowed + tiny, f"{what}: error {error:.3e}, eager {allowed:.3e}"


def odd_layouts(t: Tensor) -> list[Tensor]:
    """The same values with other strides: contiguous, padded rows, every second column."""
    padded = torch.full((*t.shape[:-1], t.shape[-1] + 5), torch.nan, dtype=t.dtype, device=t.device)
    padded[..., : t.shape[-1]] = t
    spread = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype, device=t.device)
    spread[..., ::2] = t
    return [t, padded[..., : t.shape[-1]], spread[..., ::2]]
