"""Rows that lie more than 2^31 elements apart: an offset in 32 bits would wrap."""

import pytest
import torch

from mypt_fast import kernels

STRIDE = 2**31 + 64


@pytest.fixture
def far_apart(way):
    """Give a tensor's leading rows huge strides; the pages between are never touched."""
    if way.impl == "reference":
        pytest.skip("PyTorch's own offsets; those of the kernels could overflow")
    kept = []

    def spread(t):
        rows = t.reshape(-1, t.shape[-1])
        pages = torch.empty(
            STRIDE * (len(rows) - 1) + rows.shape[1], dtype=t.dtype, device=t.device
        )
        kept.append(pages)
        far = pages.as_strided(rows.shape, (STRIDE, 1))
        far.copy_(rows)
        return far.view(t.shape) if t.dim() == 2 else far.unsqueeze(0)

    return spread


def draw(way, *shape):
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g).half().to(way.device)


def gradient(function, x, upstream):
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, upstream)[0]


def test_cross_entropy(way, far_apart):
    logits, targets = draw(way, 2, 40), torch.tensor([3, 5], device=way.device)
    upstream = torch.ones(2, device=way.device)
    loss = lambda x: kernels.cross_entropy(x, targets, reduction="none", impl=way.impl)  # noqa: E731
    assert_same(gradient(loss, far_apart(logits), upstream), gradient(loss, logits, upstream))


def test_swiglu(way, far_apart):
    x, upstream = draw(way, 2, 48), draw(way, 2, 24)
    op = lambda t: kernels.swiglu(t, impl=way.impl)  # noqa: E731
    assert_same(gradient(op, far_apart(x), far_apart(upstream)), gradient(op, x, upstream))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms(way, far_apart, name):
    x, weights = draw(way, 2, 40), [draw(way, 40)] * (1 + (name == "layer_norm"))
    op = lambda t: getattr(kernels, name)(t, *weights, impl=way.impl)  # noqa: E731
    assert_same(gradient(op, far_apart(x), far_apart(x)), gradient(op, x, x))


@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_norms_of_a_sum(way, far_apart, name):
    x, weights = draw(way, 2, 40), [draw(way, 40)] * (1 + (name == "add_layer_norm"))

    def run(x, residual, dy, dh):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        y, h = getattr(kernels, name)(*leaves, *weights, impl=way.impl)
        return [y.detach(), h.detach(), *torch.autograd.grad((y, h), leaves, (dy, dh))]

    assert_same(run(*(far_apart(x) for _ in range(4))), run(x, x, x, x))


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk_norm"])
def test_rope(way, far_apart, normed):
    cos, sin = kernels.rope_tables(2, 16, 1e4, 1.0, device=way.device)
    qkv, upstream = draw(way, 1, 2, 3 * 32), draw(way, 1, 2, 2, 16)
    weights = dict.fromkeys(("q_weight", "k_weight"), draw(way, 16)) if normed else {}
    op = lambda t: sum(kernels.rope_qkv(t, cos, sin, 2, impl=way.impl, **weights))  # noqa: E731
    assert_same(gradient(op, far_apart(qkv), upstream), gradient(op, qkv, upstream))


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
