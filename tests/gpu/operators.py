"""Every operator once, forward and backward, as the tests that only a GPU can pass call it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mypt_fast import kernels

N, C, F, V, H = 96, 160, 256, 1000, 2  # rows, width, feed-forward, vocabulary, heads


@dataclass
class Call:
    """A function of leaves, and a gradient for each of its outputs."""

    function: Callable[..., Tensor | Sequence[Tensor]]
    inputs: list[Tensor]
    upstream: list[Tensor]
    exact: bool = True  # no matmul inside: two runs agree bit for bit whatever the stream

    def run(self, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Outputs, then the gradients of all inputs that have one."""
        leaves = [t.detach().requires_grad_() for t in inputs or self.inputs]
        outputs = self.function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        grads = torch.autograd.grad(outputs, leaves, self.upstream, allow_unused=True)
        return [*(t.detach() for t in outputs), *(g for g in grads if g is not None)]


NAMES = (
    "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "swiglu", "swiglu_mlp all",
    "swiglu_mlp gate_up", "swiglu_mlp input", "gelu_mlp input", "rope_qkv", "rope_qkv norm",
    "cross_entropy", "cross_entropy none", "linear_cross_entropy", "linear_cross_entropy none",
    "linear_cross_entropy weighted", "linear_cross_entropy into",
)  # fmt: skip


def make(name: str, device: str, dtype: torch.dtype, impl: str, seed: int = 0) -> Call:
    """The call named `name` on random tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    op, _, variant = name.partition(" ")
    if op.endswith("norm"):
        return _norm(op, draw, device, impl)
    if op.endswith("mlp"):
        return _mlp(op, variant, draw, impl)
    if op.endswith("cross_entropy"):
        return _loss(op, variant, draw, device, impl, generator)
    if op == "swiglu":
        return Call(lambda t: kernels.swiglu(t, impl=impl), [draw(N, 2 * F)], [draw(N, F)])
    T, D = N // 2, C // H
    cos, sin = kernels.rope_tables(T, D, 1e4, 1.0, device)
    weights = [1 + draw(D, scale=0.1), 1 + draw(D, scale=0.1)] if variant else []

    def rope(qkv: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        named = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return kernels.rope_qkv(qkv, cos, sin, H, impl=impl, **named)

    return Call(rope, [draw(2, T, 3 * C), *weights], [draw(2, H, T, D) for _ in range(3)])


def _norm(op: str, draw: Callable[..., Tensor], device: str, impl: str) -> Call:
    parameters = [1 + draw(C, scale=0.1)]
    if "layer" in op:
        parameters.append(draw(C, scale=0.1))
    function = getattr(kernels, op)
    if not op.startswith("add"):
        return Call(lambda *t: function(*t, impl=impl), [draw(N, C), *parameters], [draw(N, C)])
    seed = torch.tensor(7, device=device)
    return Call(
        lambda *t: function(*t, dropout_p=0.2, seed=seed, impl=impl),
        [draw(N, C), draw(N, C), *parameters],
        [draw(N, C), draw(N, C)],
    )


def _mlp(op: str, save: str, draw: Callable[..., Tensor], impl: str) -> Call:
    w_down = draw(C, F, scale=F**-0.5)
    if op == "swiglu_mlp":
        weights = [draw(2 * F, C, scale=C**-0.5), w_down]
    else:
        weights = [draw(F, C, scale=C**-0.5), draw(F), w_down, draw(C)]
    function = getattr(kernels, op)
    return Call(
        lambda *t: function(*t, save=save, impl=impl), [draw(N, C), *weights], [draw(N, C)], False
    )


def _loss(
    op: str, variant: str, draw: Callable[..., Tensor], device: str, impl: str,
    generator: torch.Generator,
) -> Call:  # fmt: skip
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -100
    targets = targets.to(device)
    single = variant == "none"
    upstream = [torch.rand(N if single else (), generator=generator).to(device) + 0.5]
    options = {"reduction": "none" if single else "mean", "impl": impl}
    if variant == "weighted":
        options |= {"token_weight": torch.rand(N, generator=generator).to(device)}
    if op == "cross_entropy":
        return Call(lambda z: kernels.cross_entropy(z, targets, **options), [draw(N, V)], upstream)
    if variant == "into":
        options |= {"grad_into": torch.zeros(V, C, device=device), "grad_scale": upstream[0]}
    return Call(
        lambda x, w, b: kernels.linear_cross_entropy(
            x, w, b, targets, memory_budget=32 * V, **options
        ),
        [draw(N, C), draw(V, C, scale=C**-0.5), draw(V)],
        upstream,
        False,
    )
