"""Attention with dropout on a CPU: exact, causal, repeatable, and as lucky as it should be."""

import math

import pytest
import torch
import torch.nn.functional as F

from mypt_fast.kernels import dropped_attention as da

# one strip, several, a last one that is short
SHAPES = [(2, 3, 40, 16), (1, 2, 128, 8), (2, 2, 300, 24)]


def tensors(shape, dtype):
    """q, k, v as the projection leaves them, and an upstream gradient."""
    B, H, T, D = shape
    draw = torch.Generator().manual_seed(0)
    packed = torch.randn(B, T, 3, H, D, generator=draw).to(dtype)
    made = (packed[:, :, i].transpose(1, 2).clone().requires_grad_() for i in range(3))
    return [*made, torch.randn(B, H, T, D, generator=draw).to(dtype)]


def truth(q, k, v, p):
    """In fp64, by whole squares, with the mask that the operator draws."""
    B, H, T, D = q.shape
    torch.manual_seed(1)
    keep = da._dropped_attention(q.detach(), k.detach(), v.detach(), p, da.STRIP)[2]
    mask = torch.zeros(B * H, T, T, dtype=torch.float64)
    for first, last, at in da._strips(B * H, T, da.STRIP):
        mask[:, first:last, :last] = keep[at].view(B * H, last - first, last).double()
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    return (weights * mask.view(B, H, T, T) / (1 - da.threshold(p) / da.LEVELS)) @ v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 4e-3)]
)
def test_result_and_gradients_are_those_of_whole_squares(shape, dtype, error):
    *qkv, dy = tensors(shape, dtype)
    torch.manual_seed(1)
    y = da.dropped_attention(*qkv, 0.2)
    assert y.dtype is dtype
    found = [y, *torch.autograd.grad(y, qkv, dy)]
    wide = [t.detach().double().requires_grad_() for t in qkv]
    want = truth(*wide, 0.2)
    for a, b in zip(found, [want, *torch.autograd.grad(want, wide, dy.double())], strict=True):
        assert (a.double() - b).norm() <= error * b.norm()


def test_without_its_dropout_it_is_pytorchs(monkeypatch):
    *qkv, _ = tensors((2, 2, 300, 24), torch.float32)
    monkeypatch.setattr(da, "_keep_", lambda keep, p: keep.fill_(True))
    found = da.dropped_attention(*qkv, 0.25) * 0.75
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*qkv, is_causal=True))


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_as_many_are_dropped_as_should_be_and_none_twice_alike(p):
    """Within five standard deviations; lanes of a word are independent of each other."""
    torch.manual_seed(3)
    keep = torch.empty(1 << 18, dtype=torch.bool)
    da._keep_(keep, p)
    lanes = keep.view(-1, 4).double()
    bound = 5 * math.sqrt(p * (1 - p) / len(lanes))
    assert (lanes.mean(0) - (1 - p)).abs().max() < bound
    together = (lanes.T @ lanes / len(lanes) - (1 - p) ** 2).fill_diagonal_(0)
    assert together.abs().max() < bound
    again = torch.empty_like(keep)
    da._keep_(again, p)
    assert not torch.equal(keep, again)
    torch.manual_seed(3)
    da._keep_(again, p)
    assert torch.equal(keep, again)


def test_a_later_token_changes_nothing_before_it():
    *qkv, _ = tensors((1, 2, 300, 24), torch.float32)
    outputs = []
    for factor in (1.0, 100.0):
        changed = [t.detach().clone() for t in qkv]
        for t in changed:
            t[:, :, 200:] *= factor
        torch.manual_seed(1)
        outputs.append(da.dropped_attention(*changed, 0.2)[:, :, :200])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shape", [(1, 2, 140, 8), (2, 2, 140, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_are_registered_and_their_fakes_are_right(shape, dtype):
    """Strides too, which a compiled backward relies on; of one row the heads are a view."""
    *qkv, dy = tensors(shape, dtype)
    torch.library.opcheck(
        torch.ops.mypt_fast.dropped_attention, (*qkv, 0.2, da.STRIP),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    given = [t.detach() for t in qkv]
    kept = (dy, *given, *da._dropped_attention(*given, 0.2, da.STRIP), 0.2, da.STRIP)
    operator = torch.ops.mypt_fast.dropped_attention_backward
    torch.library.opcheck(operator, kept, test_utils=("test_schema", "test_faketensor"))
    packed = torch.empty(shape[0], shape[2], 3, *shape[1::2], dtype=dtype)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    strides = [t.stride() for t in da._backward_fake(dy, *views)]
    assert [t.stride() for t in da._dropped_attention_backward(dy, *views, *kept[4:])] == strides


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p": 0.0}, "found 0.0"),
        ({"p": 1e-6}, "found 1e-06"),
        ({"p": 1.0}, "found 1.0"),
        ({"rows": 5}, "found"),
    ],
)
def test_what_it_does_not_serve_is_refused(change, words):
    q, k, v, _ = tensors((1, 2, 40, 8), torch.float32)
    with pytest.raises(ValueError, match=words):
        da.dropped_attention(q, k[:, :, : change.get("rows", 40)], v, change.get("p", 0.2))


@pytest.mark.parametrize("p", [0.0, 1e-6, 2**-17, 2**-16, 0.5, 1 - 2**-16, 1 - 1e-6])
def test_every_dropout_of_a_config_is_served_by_one_or_the_other(p):
    q = torch.randn(1, 1, da.LEAST_LENGTH, 8)
    if da.serves(q, p):
        assert da.dropped_attention(q, q, q, p).isfinite().all()
    else:
        assert not 2**-16 <= p <= 1 - 2**-16


def test_as_many_queries_a_strip_as_it_is_told():
    """An argument of the operator: what torch.compile keeps on disk is told apart by it."""
    qkv = [t.detach() for t in tensors((1, 2, 40, 8), torch.float32)[:3]]
    for strip, elements in ((40, 2 * 40 * 40), (16, 2 * (16 * 16 + 16 * 32 + 8 * 40))):
        assert len(da._dropped_attention(*qkv, 0.2, strip)[1]) == elements
