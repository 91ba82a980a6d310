"""The dropout inside add_rms_norm and add_layer_norm: its mask, and that it can be redrawn."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from mypt_fast.kernels import norm
from mypt_fast.kernels.reference import norm as reference
from tests.kernels.conftest import Way
from tests.kernels.test_norm import SEED, P, impls, reference_only, seed_on


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    def read(text: str) -> list[Tensor]:
        return [torch.tensor(int(word, 16)) for word in text.split()]

    assert list(reference.philox(tuple(read(counter)), tuple(read(key)))) == read(words)


def masks(way: Way, impl: str, seed: int, shape: tuple[int, int], p: float) -> Tensor:
    """What the operator keeps, seen from outside: 1 joins a stream of 0."""
    ones = torch.ones(shape, device=way.device)
    weight = torch.ones(shape[1], device=way.device)
    _, h = norm.add_rms_norm(
        ones, 0 * ones, weight, dropout_p=p, seed=seed_on(way, seed), impl=impl
    )
    torch.testing.assert_close(h[h != 0], torch.full_like(h[h != 0], 1 / (1 - p)))
    return h != 0


@pytest.mark.parametrize("columns", [20, 300, 1280, 2100])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_same_mask_everywhere(columns: int, p: float, way: Way) -> None:
    for seed in (0, SEED, 2**63 - 1):
        expected = reference.keep_mask(torch.tensor(seed), p, 6, columns)
        for impl in {"reference", *impls(way)}:
            assert torch.equal(masks(way, impl, seed, (6, columns), p).cpu(), expected)


def test_mask_of_an_element_by_hand() -> None:
    """Column 1100 of 1280 is lane 76 of tile 4: the first word of the second group."""
    mask = reference.keep_mask(torch.tensor(SEED), P, 4, 1280)
    counter = tuple(torch.tensor(c) for c in (76, 3, 0, 1))
    key = (torch.tensor(SEED & 0xFFFFFFFF), torch.tensor(SEED >> 32 & 0xFFFFFFFF))
    assert mask[3, 1100] == (reference.philox(counter, key)[0] >= round(P * 2**32))


@pytest.mark.parametrize("p", [0.02, 0.1, 0.75])
def test_mask_statistics(p: float) -> None:
    drawn = [reference.keep_mask(torch.tensor(s), p, 128, 1280).double() for s in range(2)]
    deviation = (p * (1 - p)) ** 0.5
    for mask in drawn:
        n = mask.numel()
        assert abs(mask.mean() - (1 - p)) < 4 * deviation / n**0.5
        assert (mask.mean(0) - (1 - p)).abs().max() < 6 * deviation / 128**0.5
        assert (mask.mean(1) - (1 - p)).abs().max() < 6 * deviation / 1280**0.5
    centred = [(m - (1 - p)) / deviation for m in drawn]
    far_apart = (centred[0] * centred[1]).mean()  # seeds
    rows = (centred[0][1:] * centred[0][:-1]).mean()
    tiles = (centred[0][:, 256:] * centred[0][:, :-256]).mean()
    assert max(far_apart.abs(), rows.abs(), tiles.abs()) < 5 / n**0.5


class Stack(torch.nn.Module):
    """Four blocks of what a transformer has around its MLPs, dropout included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.ones(width, dtype=torch.float64)) for _ in range(4)
        )
        self.up = torch.nn.ModuleList(
            torch.nn.Linear(width, 2 * width, dtype=torch.float64) for _ in range(4)
        )
        self.down = torch.nn.ModuleList(
            torch.nn.Linear(2 * width, width, dtype=torch.float64) for _ in range(4)
        )

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for i, (weight, up, down) in enumerate(zip(self.weights, self.up, self.down, strict=True)):
            y, h = norm.add_rms_norm(x, h, weight, dropout_p=0.1, seed=seeds[i], impl="reference")
            x = down(F.gelu(up(y)))
        return (h + x).square().mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.3, 0.1, 0.0])
def test_recomputation_redraws_the_mask(
    budget: float, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile may recompute dropout: a seed that is an input keeps its gradients right."""
    reference_only(way)
    drawn = []
    forward = reference.norm_forward
    monkeypatch.setattr(reference, "norm_forward", lambda *a: drawn.append(a) or forward(*a))
    torch.manual_seed(1)
    stack = Stack(16)
    x = torch.randn(4, 6, 16, dtype=torch.float64, requires_grad=True)
    seeds = torch.tensor([11, 12, 13, 14])
    wanted = [x, *stack.parameters()]
    plain = torch.autograd.grad(stack(x, seeds), wanted)
    torch.compiler.reset()
    with functorch_config.patch(activation_memory_budget=budget):
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager_decomp_partition")
        value = compiled(x, seeds)
        drawn.clear()
        found = torch.autograd.grad(value, wanted)
    assert (len(drawn) > 0) == (budget < 1.0)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    for _ in range(3):
        direction = [torch.randn_like(t) for t in wanted]
        slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True))
        measured = _slope(stack, x, seeds, wanted, direction)
        assert abs(slope - measured) <= 1e-6 * abs(measured)


def _slope(
    stack: Stack, x: Tensor, seeds: Tensor, wanted: list[Tensor], direction: list[Tensor]
) -> Tensor:
    """The directional derivative by central differences."""
    step, values = 1e-5, []
    with torch.no_grad():
        for factor in (step, -2 * step):
            for t, d in zip(wanted, direction, strict=True):
                t += factor * d
            values.append(stack(x, seeds))
        for t, d in zip(wanted, direction, strict=True):
            t += step * d
    return (values[0] - values[1]) / (2 * step)
