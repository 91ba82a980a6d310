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
    "linear_cross_entropy weighted", "linear_cross_entropy into", "norm_qkv", "norm_qkv rope",
    "norm_mlp gelu input", "norm_mlp swiglu gate_up", "norm_mlp swiglu input", "linear",
)  # fmt: skip


def make(name: str, device: str, dtype: torch.dtype, impl: str, seed: int = 0) -> Call:
    """The call named `name` on random tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    op, _, variant = name.partition(" ")
    if op in ("norm_qkv", "norm_mlp"):
        return (_norm_qkv if op == "norm_qkv" else _norm_mlp)(variant, draw, device, impl)
    if op == "linear":  # a matmul: no impl to choose
        inputs = [draw(N, C), draw(F, C, scale=C**-0.5), draw(F)]
        return Call(kernels.linear, inputs, [draw(N, F)], False)
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


def _joined(
    is_llama: bool, draw: Callable[..., Tensor], device: str
) -> tuple[list[Tensor], Callable[..., tuple[kernels.Join, kernels.Norm]]]:
    """Leaves of a stream that a branch joins and of its norm, and what makes the two of them."""
    leaves = [draw(2, N // 2, C), draw(2, N // 2, C), 1 + draw(C, scale=0.1)]
    if not is_llama:
        leaves.append(draw(C, scale=0.1))
    seed = torch.tensor(7, device=device)

    def parts(
        branch: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[kernels.Join, kernels.Norm]:
        norm = kernels.Norm(weight, bias, 1e-6 if is_llama else 1e-5, center=not is_llama)
        return kernels.Join(branch, x, 0.2, seed), norm

    return leaves, parts


def _norm_qkv(variant: str, draw: Callable[..., Tensor], device: str, impl: str) -> Call:
    """GPT-2's, with biases; with "rope" Llama's."""
    leaves, parts = _joined(bool(variant), draw, device)
    n, T = len(leaves), N // 2
    rope = kernels.rope_tables(T, C // H, 1e4, 1.0, device) if variant else None
    weights = [draw(3 * C, C, scale=C**-0.5)]
    if not variant:
        weights.append(draw(3 * C))

    def function(*t: Tensor) -> Sequence[Tensor]:
        weight, bias = t[n:] if rope is None else (t[n], None)
        return kernels.norm_qkv(*parts(*t[:n]), weight, bias, H, rope, impl=impl)

    return Call(function, leaves + weights, [draw(2, T, 3 * C), draw(2, T, C)], False)


def _norm_mlp(variant: str, draw: Callable[..., Tensor], device: str, impl: str) -> Call:
    """GPT-2's or Llama's: `variant` is the activation, and what is saved."""
    activation, save = variant.split()
    leaves, parts = _joined(activation == "swiglu", draw, device)
    n, T = len(leaves), N // 2
    w_down, first = draw(C, F, scale=F**-0.5), draw(F, C, scale=C**-0.5)
    if activation == "swiglu":
        weights = [first, draw(F, C, scale=C**-0.5), w_down]
    else:
        weights = [first, w_down, draw(F), draw(C)]

    def function(*t: Tensor) -> Sequence[Tensor]:
        if activation == "swiglu":
            gate, up, down, b_in, b_down = *t[n:], None, None
        else:
            (gate, down, b_in, b_down), up = t[n:], None
        return kernels.norm_mlp(
            *parts(*t[:n]), (gate, up), b_in, down, b_down, save=save, impl=impl
        )

    return Call(function, leaves + weights, [draw(2, T, C), draw(2, T, C)], False)


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
