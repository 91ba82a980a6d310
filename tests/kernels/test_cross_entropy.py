"""Cross-entropy on given logits: the row kernel, alone."""

import pytest
import torch
import torch.nn.functional as F

from mypt_fast.kernels.cross_entropy import cross_entropy
from tests.kernels import oracle

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"softcap": 5.0},
    {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 3.0, "ignore_index": 0},
]


def plain(logits, targets, label_smoothing=0.0, z_loss=0.0, softcap=None, ignore_index=-100):
    """Row losses as anyone would write them, at the dtype of the logits."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits,
        targets,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction="none",
    )
    kept = targets != ignore_index
    losses = losses + z_loss * logits.logsumexp(-1).square() * kept
    wide = torch.promote_types(losses.dtype, torch.float32)
    return losses.to(wide)


def case(N, V, dtype, device, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(N, V, generator=g) * scale).to(dtype).to(device)
    targets = torch.randint(V, (N,), generator=g)
    targets[::3] = -100
    return logits, targets.to(device), torch.randn(N, generator=g).to(device)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("V", [1, 63, 123, 1000])
def test_losses_and_gradients_obey_the_oracle_rule(V, options, way, dtype) -> None:
    logits, targets, grad = case(48, V, dtype, way.device)
    if options.get("ignore_index") == 0:
        targets = targets.clamp(min=0)
    for t in oracle.odd_layouts(logits):
        oracle.check(
            lambda x: cross_entropy(x, targets, reduction="none", impl=way.impl, **options),
            lambda x: plain(x, targets, **options),
            [t],
            [grad],
        )


@pytest.mark.parametrize("V", [50_257, 50_304])
def test_vocabularies_of_real_models(V, way, dtype) -> None:
    logits, targets, grad = case(16, V, dtype, way.device)
    oracle.check(
        lambda x: cross_entropy(x, targets, reduction="none", impl=way.impl),
        lambda x: plain(x, targets),
        [logits],
        [grad],
    )


@pytest.mark.parametrize("impl", ["auto", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_expression_is_the_same_loss(impl, way) -> None:
    if way.impl == "triton":
        pytest.skip("the expression runs no Triton kernel of ours")
    logits, targets, grad = case(48, 40, torch.float32, way.device)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
    oracle.check(
        lambda x: cross_entropy(x, targets, reduction="none", impl=impl, **options),
        lambda x: plain(x, targets, **options),
        [logits],
        [grad],
        factor=3.0 if impl == "inductor" else 2.0,  # its exp and log are vector approximations
    )


def test_reductions_weights_and_denominator(way) -> None:
    logits, targets, _ = case(9, 30, torch.float32, way.device)
    weights = torch.rand(9, device=way.device)
    rows = plain(logits.double(), targets) * weights
    kept = targets != -100

    def ours(**options) -> float:
        return cross_entropy(logits, targets, impl=way.impl, **options).item()

    mean = plain(logits.double(), targets).sum() / kept.sum()
    assert ours() == pytest.approx(mean.item(), rel=1e-6)
    assert ours(token_weight=weights, reduction="sum") == pytest.approx(rows.sum().item(), rel=1e-6)
    want = rows.sum() / (weights * kept).sum()
    assert ours(token_weight=weights) == pytest.approx(want.item(), rel=1e-6)
    assert ours(token_weight=weights, denom=7) == pytest.approx(rows.sum().item() / 7, rel=1e-6)
    by = torch.tensor(7.0, device=way.device)
    assert ours(token_weight=weights, denom=by) == ours(token_weight=weights, denom=7)


@pytest.mark.parametrize("N", [0, 4])
def test_nothing_kept_is_zero_with_zero_gradients(N, way, dtype) -> None:
    targets = torch.full((N,), -100, device=way.device)
    for options in OPTIONS[:4]:
        logits = torch.full((N, 20), torch.nan, dtype=dtype, device=way.device, requires_grad=True)
        loss = cross_entropy(logits, targets, impl=way.impl, **options)
        loss.backward()
        assert loss.item() == 0
        assert not logits.grad.any()


def test_targets_and_weights_with_strides(way) -> None:
    logits, targets, _ = case(9, 30, torch.float32, way.device)
    spread = torch.stack((targets, targets + 1), 1)[:, 0]
    weights = torch.rand(9, 2, device=way.device)
    loss = cross_entropy(logits, spread, token_weight=weights[:, 0], impl=way.impl)
    want = cross_entropy(logits, targets, token_weight=weights[:, 0].contiguous(), impl=way.impl)
    assert loss == want
    one = targets[1:2].expand(9)
    assert torch.equal(
        cross_entropy(logits, one, reduction="none", impl=way.impl),
        cross_entropy(logits, one.contiguous(), reduction="none", impl=way.impl),
    )


def test_near_certain_and_hopeless_targets_keep_their_digits(way) -> None:
    logits = torch.tensor([[20.0, 0.0, 0.0], [-500.0, 3.0, 0.0]], device=way.device)
    logits.requires_grad_()
    targets = torch.zeros(2, dtype=torch.int64, device=way.device)
    losses = cross_entropy(logits, targets, reduction="none", impl=way.impl)
    losses.sum().backward()
    truth = logits.detach().double().requires_grad_()
    want = torch.stack((torch.log1p(2 * torch.exp(-truth[0, 0])), truth[1].logsumexp(0) + 500))
    torch.testing.assert_close(losses.detach().double(), want.detach(), rtol=1e-6, atol=0)
    small = 2 * torch.exp(torch.tensor(-20.0, dtype=torch.float64))
    assert logits.grad[0, 0].item() == pytest.approx(-(small / (1 + small)).item(), rel=1e-5)


def test_every_element_is_written_and_two_runs_are_equal(way, dtype, monkeypatch) -> None:
    logits, targets, grad = case(6, 123, dtype, way.device)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    def run():
        function = lambda x: cross_entropy(x, targets, reduction="none", impl=way.impl)  # noqa: E731
        return oracle.run(function, [logits], [grad])

    first = run()
    monkeypatch.setattr(torch, "empty", poisoned)
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_those_of_finite_differences(way) -> None:
    if way.impl == "triton":
        pytest.skip("Triton has no fp64 kernel; the oracle rule covers it")
    logits, targets, _ = case(4, 6, torch.float64, "cpu")
    for options in OPTIONS[:4]:
        assert torch.autograd.gradcheck(
            lambda x, o=options: cross_entropy(x, targets, reduction="none", impl="reference", **o),
            [logits.requires_grad_()],
        )


def test_opcheck_and_one_graph(way) -> None:
    if way.impl == "triton":
        pytest.skip("registration does not depend on the implementation")
    logits, targets, grad = case(5, 20, torch.float32, "cpu")
    arguments = (logits.requires_grad_(), targets, -100, 0.1, 1e-3, 5.0, False)
    torch.library.opcheck(torch.ops.mypt_fast.cross_entropy, arguments)
    stats = torch.ops.mypt_fast.cross_entropy(*arguments)[1]
    backward = (grad, logits.detach(), targets, stats, *arguments[2:])
    torch.library.opcheck(torch.ops.mypt_fast.cross_entropy_backward, backward)
    for impl in ("reference", "inductor"):
        function = torch.compile(
            lambda x, i=impl: cross_entropy(x, targets, impl=i), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(function(logits), cross_entropy(logits, targets))


def test_targets_out_of_range(way) -> None:
    logits, targets, _ = case(4, 20, torch.float32, way.device)
    targets[1] = 20
    if way.device == "cpu":
        with pytest.raises(ValueError, match=r"expected targets in 0\.\.19 or -100; found 20"):
            cross_entropy(logits, targets, impl=way.impl)
    else:  # looking would stall the device
        losses = cross_entropy(logits, targets, impl=way.impl, reduction="none")
        assert losses.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets of shape \(4,\)"),
        ({"targets": torch.zeros(4)}, TypeError, "targets of int64; found torch.float32"),
        ({"logits": torch.zeros(4, 0)}, ValueError, r"found \(4, 0\)"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "found torch.int32"),
        ({"token_weight": torch.zeros(5)}, ValueError, r"token_weight of shape \(4,\)"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing < 1; found 1.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss >= 0; found -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap > 0 or None; found 0.0"),
        ({"reduction": "max"}, ValueError, "mean, sum, none; found 'max'"),
        ({"impl": "cuda"}, ValueError, "auto, triton, reference, inductor; found 'cuda'"),
    ],
)
def test_bad_input_is_named(change, error, text) -> None:
    arguments = {"logits": torch.zeros(4, 3), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=text):
        cross_entropy(**{**arguments, **change})


def test_forced_triton_that_cannot_run_raises(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' cannot run: the tensors are on the CPU"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), impl="triton")
