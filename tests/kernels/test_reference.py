"""The reference operators against fp64 and against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from mypt_fast import kernels
from mypt_fast.kernels import reference


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one ragged, for the small shapes of these tests."""
    monkeypatch.setattr(reference, "TILE_ROWS", 3)
    monkeypatch.setattr(reference, "chunk_rows", lambda rows, vocab, _: max(1, min(rows, 7)))


def head_inputs(N: int = 23, C: int = 16, V: int = 50, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g)
    return [x, w, torch.randn(V, generator=g), torch.randint(V, (N,), generator=g)]


def plain(x, w, b, t, weights=None, ignore=-100) -> torch.Tensor:
    losses = F.cross_entropy(F.linear(x, w, b), t, reduction="none", ignore_index=ignore)
    return (losses if weights is None else losses * weights).sum()


def gradients(function, tensors: list[torch.Tensor], dtype: torch.dtype, **options):
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in tensors[:3]]
    loss = function(*leaves, tensors[3], **options)
    (loss * 0.37).backward()
    return [loss.detach(), *(p.grad for p in leaves)]


@pytest.mark.parametrize("N", [0, 1, 6, 7, 8, 23])
def test_head_loss_and_gradients_equal_plain_pytorch(N: int) -> None:
    inputs = head_inputs(N)
    ours = gradients(kernels.linear_cross_entropy, inputs, torch.float32)
    exact = gradients(plain, inputs, torch.float64)
    eager = gradients(plain, inputs, torch.float32)
    for a, e, p in zip(ours, exact, eager, strict=True):
        if e.numel():
            error, eager_error = ((t.double() - e).abs().max() for t in (a, p))
            assert error <= 2 * eager_error + 1e-7 * e.abs().max()


def test_ignored_targets_and_row_weights_count_as_they_should() -> None:
    inputs = head_inputs()
    inputs[3][::3] = -100
    weights = torch.rand(23)
    ours = gradients(kernels.linear_cross_entropy, inputs, torch.float32, row_weights=weights)
    want = gradients(plain, inputs, torch.float64, weights=weights.double())
    for a, e in zip(ours, want, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-5)
    assert ours[1][::3].abs().max() == 0


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    inputs = head_inputs()
    inputs[3][:] = -100
    loss, *grads = gradients(kernels.linear_cross_entropy, inputs, torch.float32)
    assert loss == 0
    assert all(g.abs().max() == 0 for g in grads)


def test_a_hopeless_target_has_a_finite_exact_loss() -> None:
    x, w = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0], [499.0]])
    loss = kernels.linear_cross_entropy(x, w, None, torch.tensor([0]))
    assert loss.item() == pytest.approx(500 + torch.tensor(1 + torch.e**-1).log().item(), rel=1e-6)


def test_without_gradients_only_the_loss_is_made() -> None:
    inputs = head_inputs()
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(*inputs[:3], inputs[3])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(*inputs))


def test_under_autocast_the_gradients_stay_within_bf16() -> None:
    inputs = head_inputs(N=64, C=64, V=300)
    exact = gradients(plain, inputs, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(kernels.linear_cross_entropy, inputs, torch.float32)
        eager = gradients(plain, inputs, torch.float32)
    for a, e, p in zip(ours, exact, eager, strict=True):
        error, allowed = ((t.double() - e).norm() / e.norm() for t in (a, p))
        assert a.dtype is torch.float32
        assert error <= 2 * allowed + 1e-6


def test_mismatched_shapes_are_named() -> None:
    x, w, b, t = head_inputs()
    with pytest.raises(ValueError, match=r"found \(23, 16\), \(50, 16\), \(22,\)"):
        kernels.linear_cross_entropy(x, w, b, t[:-1])


def test_chunks_hold_no_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows = reference.chunk_rows(100_000, 50_304, 4)
    assert rows * 50_304 * 4 <= 1.5 * reference.LOGITS_BUDGET_BYTES
    assert reference.chunk_rows(10, 50_304, 4) == 10
    assert reference.chunk_rows(0, 50_304, 2) == 1
    assert reference.chunk_rows(10**6, 10**9, 2) == reference.MIN_CHUNK_ROWS
    for n in (1, 63, 64, 499, 501, 2048, 12_288):
        rows = reference.chunk_rows(n, 50_304, 4)
        assert rows * 50_304 * 4 <= 1.5 * reference.LOGITS_BUDGET_BYTES
        assert (-(-n // rows) - 1) * rows < n  # no empty chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_as_exact_as_its_dtype_allows(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 63, generator=g) * 30, torch.randn(63, generator=g)
    want = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * w.double()
    got = kernels.rms_norm(x.to(dtype), w.to(dtype))
    assert got.dtype is dtype
    bound = 1e-6 if dtype is torch.float32 else 1.2e-2
    assert ((got.double() - want).abs() <= bound * want.abs() + 1e-5).all()


def test_swiglu_and_layer_norm_follow_their_formulas() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, generator=g), torch.randn(4, 9, generator=g)
    torch.testing.assert_close(kernels.swiglu(a, b), a * torch.sigmoid(a) * b)
    centred = a - a.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(kernels.layer_norm(a, b[0], b[1]), normed * b[0] + b[1])


def test_rope_turns_by_relative_position_only() -> None:
    cos, sin = kernels.rope_tables(64, 8, 1e4, 1.0)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=g) for _ in "qk")

    def score(m: int, n: int) -> float:
        turned = (
            kernels.apply_rope(v, cos[i : i + 1], sin[i : i + 1]) for v, i in ((q, m), (k, n))
        )
        return (next(turned) * next(turned)).sum().item()

    assert score(5, 2) == pytest.approx(score(43, 40), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
