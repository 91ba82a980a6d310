"""The head with its loss: gradients in every dtype, chunks, the buffer, what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from mypt_fast.kernels import chunked_head
from mypt_fast.kernels.chunked_head import chunk_rows
from mypt_fast.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels import oracle
from tests.kernels.test_cross_entropy import plain

OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0},
]
ONE_CHUNK_AT_A_TIME = 1  # byte of budget: the smallest chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one ragged, for the small shapes of these tests."""
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_ROWS", 7)


def case(N, C, V, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g) * C**-0.5
    b, targets = torch.randn(V, generator=g), torch.randint(V, (N,), generator=g)
    targets[::4] = -100
    return [t.to(dtype).to(device) for t in (x, w, b)], targets.to(device)


def eager(x, w, b, targets, weights=None, reduction="sum", **options):
    losses = plain(F.linear(x, w, b), targets, **options)
    losses = losses if weights is None else losses * weights
    return losses if reduction == "none" else losses.sum()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize(("N", "C", "V"), [(1, 1, 2), (30, 63, 123), (41, 80, 1000)])
def test_loss_and_gradients_obey_the_oracle_rule(N, C, V, options, reduction, way, dtype) -> None:
    inputs, targets = case(N, C, V, dtype, way.device)
    weights = torch.linspace(0.1, 1, N, device=way.device)
    grad = weights.flip(0) if reduction == "none" else torch.tensor(0.37)
    oracle.check(
        lambda x, w, b: linear_cross_entropy(
            x, w, b, targets, token_weight=weights, reduction=reduction, impl=way.impl,
            memory_budget=ONE_CHUNK_AT_A_TIME, **options,
        ),
        lambda x, w, b: eager(x, w, b, targets, weights, reduction, **options),
        inputs,
        [grad.to(way.device)],
    )  # fmt: skip


@pytest.mark.parametrize("V", [50_257, 50_304])
def test_vocabularies_of_real_models_without_bias(V, way, dtype) -> None:
    (x, w, _), targets = case(9, 16, V, dtype, way.device)
    oracle.check(
        lambda x, w: linear_cross_entropy(x, w, None, targets, reduction="sum", impl=way.impl),
        lambda x, w: eager(x, w, None, targets),
        [x, w],
        [torch.tensor(1.0)],
    )


def test_strided_input(way, dtype) -> None:
    (x, w, b), targets = case(12, 40, 60, dtype, way.device)
    for other in oracle.odd_layouts(x)[1:]:
        for a, e in zip(
            oracle.run(
                lambda *t: linear_cross_entropy(*t, targets, impl=way.impl), [other, w, b],
                [torch.tensor(1.0)],
            ),
            oracle.run(
                lambda *t: linear_cross_entropy(*t, targets, impl=way.impl), [x, w, b],
                [torch.tensor(1.0)],
            ),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, e)


@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_kept_is_zero_with_zero_gradients(N, reduction, way, dtype) -> None:
    inputs, targets = case(N, 8, 20, dtype, way.device)
    targets.fill_(-100)
    grad = torch.ones(N) if reduction == "none" else torch.tensor(1.0)
    loss, *grads = oracle.run(
        lambda x, w, b: linear_cross_entropy(x, w, b, targets, reduction=reduction, impl=way.impl),
        inputs,
        [grad.to(way.device)],
    )
    assert not loss.any()
    assert not any(g.any() for g in grads)


def test_a_mean_divides_by_what_was_asked_for(way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    weights = torch.rand(20, device=way.device)
    kept = (targets != -100).float()
    total = eager(x.double(), w.double(), b.double(), targets, weights)
    for options, by in (
        ({}, (weights * kept).sum()),
        ({"denom": 5}, 5),
        ({"denom": torch.tensor(5.0, device=way.device)}, 5),
    ):
        got = linear_cross_entropy(x, w, b, targets, token_weight=weights, impl=way.impl, **options)
        assert got.item() == pytest.approx((total / by).item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_weight_of_an_ignored_row_is_nobodys(reduction, way, dtype) -> None:
    inputs, targets = case(20, 8, 30, dtype, way.device)
    grad = torch.ones(20) if reduction == "none" else torch.tensor(1.0)
    results = []
    for stray in (1.0, 1e9, torch.nan):
        weights = torch.ones(20, device=way.device)
        weights[0] = stray  # its target is -100
        results.append(
            oracle.run(
                lambda x, w, b, m=weights: linear_cross_entropy(
                    x, w, b, targets, token_weight=m, reduction=reduction, impl=way.impl
                ),
                inputs,
                [grad.to(way.device)],
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sum_of_fp16_weights_does_not_overflow(way) -> None:
    x, w = torch.zeros(70_000, 1, device=way.device), torch.ones(2, 1, device=way.device)
    targets = torch.zeros(70_000, dtype=torch.int64, device=way.device)
    weights = torch.ones(70_000, device=way.device).half()
    loss = linear_cross_entropy(x, w, None, targets, token_weight=weights)
    assert loss.item() == pytest.approx(0.6931472, rel=1e-5)


@pytest.mark.parametrize("denom", [0, 0.0, torch.tensor(0.0)])
def test_a_denominator_of_zero_counts_as_one(denom, way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, "cpu")
    total = linear_cross_entropy(x, w, b, targets, reduction="sum")
    assert linear_cross_entropy(x, w, b, targets, denom=denom) == total


def test_tiny_token_weights_do_not_flush_fp16(way) -> None:
    inputs, targets = case(64, 32, 500, torch.float16, way.device)
    weights = torch.full((64,), 1e-6, device=way.device)
    oracle.check(
        lambda x, w, b: 1e6 * linear_cross_entropy(
            x, w, b, targets, token_weight=weights, reduction="sum", impl=way.impl
        ),
        lambda x, w, b: eager(x, w, b, targets),
        inputs,
        [torch.tensor(1.0, device=way.device)],
    )  # fmt: skip


def relative(a: torch.Tensor, truth: torch.Tensor) -> float:
    return ((a.double() - truth).norm() / truth.norm()).item()


def gradients_at_scale(N, C, V, dtype, scale, device, impl, into, budget=None):
    """Gradients of the mean loss under a loss scale, with the scale taken out again."""
    inputs, targets = case(N, C, V, dtype, device)
    targets.clamp_(min=0)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    scale_tensor = torch.tensor(float(scale), device=device)
    buffer = torch.zeros(V, C, device=device) if into else None
    loss = linear_cross_entropy(
        *leaves, None, targets, impl=impl, grad_into=buffer, grad_scale=scale_tensor,
        memory_budget=budget,
    )  # fmt: skip
    (loss * scale_tensor).backward()
    wide = [t.detach().double().requires_grad_() for t in inputs[:2]]
    F.cross_entropy(F.linear(*wide), targets).backward()
    dw = leaves[1].grad if buffer is None else buffer
    found = [g.double() / scale for g in (leaves[0].grad, dw)]
    return [relative(a, t.grad) for a, t in zip(found, wide, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("into", [False, True])
def test_fp16_gradients_under_a_loss_scale_are_those_of_fp32_order(into, way, monkeypatch) -> None:
    """Dividing by N before the fp16 rounding costs 5e-2 and 1e-2 here, as published kernels do."""
    if way.impl == "triton" and way.device == "cpu":
        pytest.skip("a quarter of an hour in the interpreter; small shapes run there")
    monkeypatch.undo()
    dx, dw = gradients_at_scale(
        1024, 256, 32_768, torch.float16, 65_536, way.device, way.impl, into
    )
    assert dx <= 2.5e-4
    assert dw <= (1e-4 if into else 2.5e-4)


def test_bf16_weight_gradients_do_not_pay_for_chunks(way, monkeypatch) -> None:
    """Summed in bf16, 64 chunks cost 1e-2."""
    if way.impl == "triton" and way.device == "cpu":
        pytest.skip("Triton's interpreter has no correct bf16")
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_ROWS", 16)
    N, V = 1024, 2048
    assert chunk_rows(N, V, torch.bfloat16, True, 1) == N // 64
    one, many, rounded = (
        gradients_at_scale(N, 64, V, torch.bfloat16, 1, way.device, way.impl, into, budget)[1]
        for into, budget in ((True, None), (True, 1), (False, 1))
    )
    assert many <= 1.1 * one
    assert rounded <= 3e-3  # to the weight's own dtype, at the end


def test_a_buffer_takes_the_weight_gradient(way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    start = torch.randn(30, 8, device=way.device)
    buffer, leaves = start.clone(), [t.clone().requires_grad_() for t in (x, w, b)]
    for _ in range(2):  # two micro-steps
        loss = linear_cross_entropy(
            *leaves, targets, impl=way.impl, grad_into=buffer, grad_scale=3.0,
            memory_budget=ONE_CHUNK_AT_A_TIME,
        )  # fmt: skip
        (3.0 * loss).backward()
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    (6.0 * eager(*wide, targets) / (targets != -100).sum()).backward()
    assert leaves[1].grad is None
    for a, e in zip((leaves[0].grad, buffer - start, leaves[2].grad), wide, strict=True):
        # the buffer holds 1 or so: its own fp32 roundings come on top
        torch.testing.assert_close(a.double(), e.grad, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_another_upstream_gradient_than_promised_is_not_silent(frozen, way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    buffer = torch.zeros(30, 8, device=way.device)
    loss = linear_cross_entropy(
        x.requires_grad_(not frozen), w.requires_grad_(), b, targets, impl=way.impl,
        grad_into=buffer,
    )  # fmt: skip
    assert buffer.isfinite().all()
    (2 * loss).backward()
    assert buffer.isnan().any()
    assert frozen or x.grad.isnan().all()


@pytest.mark.parametrize("scale", [1e-39, 1e-20, 1e20])
def test_an_extreme_grad_scale_spares_what_the_buffer_held(scale, way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    buffer = torch.ones(30, 8, device=way.device)
    linear_cross_entropy(
        x, w.requires_grad_(), b, targets, impl=way.impl, grad_into=buffer, grad_scale=scale
    )
    truth = w.detach().double().requires_grad_()
    (eager(x.double(), truth, b.double(), targets) / (targets != -100).sum()).backward()
    torch.testing.assert_close(buffer.double(), 1 + scale * truth.grad, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_buffer_is_left_alone(way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    buffer = torch.ones(30, 8, device=way.device)
    with torch.no_grad():
        linear_cross_entropy(x, w.requires_grad_(), b, targets, impl=way.impl, grad_into=buffer)
    assert (buffer == 1).all()


def test_a_grad_scale_of_zero_leaves_the_buffer_alone(way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    leaf, buffer = x.requires_grad_(), torch.ones(30, 8, device=way.device)
    loss = linear_cross_entropy(
        leaf, w, b, targets, impl=way.impl, grad_into=buffer, grad_scale=0.0
    )
    (0 * loss).backward()
    assert (buffer == 1).all()
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_under_autocast_the_sums_stay_fp32(way) -> None:
    if way.impl == "triton" and way.device == "cpu":
        pytest.skip("Triton's interpreter has no correct bf16")
    inputs, targets = case(64, 64, 300, torch.float32, way.device)
    truth = oracle.run(
        lambda x, w, b: eager(x, w, b, targets), [t.double() for t in inputs], [torch.tensor(1.0)]
    )
    with torch.autocast(way.device, dtype=torch.bfloat16):
        found, yardstick = (
            oracle.run(f, inputs, [torch.tensor(1.0)])
            for f in (
                lambda *t: linear_cross_entropy(*t, targets, reduction="sum", impl=way.impl),
                lambda *t: eager(*t, targets),
            )
        )
    for a, t, y in zip(found, truth, yardstick, strict=True):
        assert a.dtype is torch.float32
        oracle.assert_close(a, t, y, 2.0, "autocast")


def test_without_gradients_only_the_loss_is_made(way, monkeypatch) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    made = []
    monkeypatch.setattr(chunked_head.Head, "_add_product", lambda *_: made.append(1))
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), b, targets)
    assert not loss.requires_grad
    assert not made
    mean = eager(x, w, b, targets) / (targets != -100).sum()
    torch.testing.assert_close(loss, mean.detach())


def test_a_second_backward_is_an_error_not_a_wrong_gradient(way) -> None:
    (x, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    loss = linear_cross_entropy(x.requires_grad_(), w, b, targets, impl=way.impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_runs_are_equal_bit_for_bit(way, dtype) -> None:
    inputs, targets = case(64, 48, 500, dtype, way.device)
    runs = [
        oracle.run(
            lambda *t: linear_cross_entropy(
                *t, targets, impl=way.impl, memory_budget=ONE_CHUNK_AT_A_TIME
            ),
            inputs,
            [torch.tensor(1.0)],
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tied_embeddings_add_both_gradients(way) -> None:
    (_, w, b), targets = case(20, 8, 30, torch.float32, way.device)
    ids = torch.arange(20, device=way.device)
    table = w.clone().requires_grad_()
    linear_cross_entropy(
        F.embedding(ids, table), table, b, targets, reduction="sum", impl=way.impl
    ).backward()
    truth = w.double().requires_grad_()
    eager(F.embedding(ids, truth), truth, b.double(), targets).backward()
    assert table.grad is not None
    torch.testing.assert_close(table.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_chunks_hold_no_more_than_the_budget(monkeypatch) -> None:
    monkeypatch.undo()
    padded = 50_304  # a multiple of 64 already
    for n in (1, 63, 64, 499, 501, 1024, 2048, 12_288, 100_000):
        rows = chunk_rows(n, 50_304, torch.float32, True, None)
        assert rows * padded * 4 <= 60_000_000
        assert (-(-n // rows) - 1) * rows < n  # no empty chunk
    assert chunk_rows(12_288, 50_304, torch.bfloat16, False, None) == 2048
    assert chunk_rows(8192, 128_256, torch.bfloat16, False, None) == 2048
    assert chunk_rows(0, 50_304, torch.float16, True, None) == 1
    assert chunk_rows(10**6, 10**9, torch.float16, False, None) == chunked_head.MIN_CHUNK_ROWS


def test_gradients_are_those_of_finite_differences(way) -> None:
    if way.impl == "triton":
        pytest.skip("Triton has no fp64 kernel; the oracle rule covers it")
    inputs, targets = case(9, 4, 6, torch.float64, "cpu")
    for options in OPTIONS:
        for reduction in ("sum", "none"):
            assert (
                torch.autograd.gradcheck(
                    lambda x, w, b, o=options, r=reduction: linear_cross_entropy(
                        x, w, b, targets, memory_budget=1, reduction=r, impl="reference", **o
                    ),
                    [t.requires_grad_() for t in inputs],
                    check_batched_grad=False,
                )
                if reduction == "none"
                else _finite_difference(inputs, targets, options)
            )


def _finite_difference(inputs, targets, options) -> bool:
    """Central differences along random directions: gradcheck runs a backward more than once."""
    loss = lambda *t: linear_cross_entropy(*t, targets, reduction="sum", **options)  # noqa: E731
    _, *grads = oracle.run(loss, inputs, [torch.tensor(1.0)])
    directions = [torch.randn_like(t) for t in inputs]
    with torch.no_grad():
        ends = [
            loss(*(t + s * d for t, d in zip(inputs, directions, strict=True)))
            for s in (1e-6, -1e-6)
        ]
    slope = (ends[0] - ends[1]) / 2e-6
    along = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(along, slope, rtol=1e-7, atol=1e-8)
    return True


def test_opcheck(way) -> None:
    if way.impl == "triton":
        pytest.skip("registration does not depend on the implementation")
    inputs, targets = case(9, 8, 20, torch.float32, "cpu")
    leaves = [t.requires_grad_() for t in inputs]
    options = (-100, 0.1, 1e-3, 5.0, torch.float32, 4)
    op = torch.ops.mypt_fast.linear_cross_entropy
    # the gradients are scaled in place, which only tracing may not do twice
    torch.library.opcheck(
        op, (*leaves, targets, None, *options, True, True, True, "reference"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.mypt_fast.linear_cross_entropy_rows, (*leaves, targets, *options, "reference")
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_under_compile(reduction, way) -> None:
    if way.impl == "triton":
        pytest.skip("registration does not depend on the implementation")
    inputs, targets = case(9, 8, 20, torch.float32, "cpu")
    head = lambda *t: linear_cross_entropy(*t, targets, reduction=reduction)  # noqa: E731
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    grad = torch.tensor(0.5) if reduction == "mean" else torch.rand(9)
    for a, e in zip(
        oracle.run(compiled, inputs, [grad]), oracle.run(head, inputs, [grad]), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_step_obeys_the_rule(way, dtype) -> None:
    if way.impl == "triton":
        pytest.skip("the compiled step is no Triton kernel of ours")
    inputs, targets = case(60, 32, 500, dtype, "cpu")
    for options in OPTIONS:
        oracle.check(
            lambda x, w, b, o=options: linear_cross_entropy(
                x, w, b, targets, reduction="sum", impl="inductor", memory_budget=1, **o
            ),
            lambda x, w, b, o=options: eager(x, w, b, targets, **o),
            inputs,
            [torch.tensor(1.0)],
        )


def test_flops_count_the_matmuls_made(way) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    (x, w, b), targets = case(9, 8, 20, torch.float32, "cpu")
    one = 2 * 9 * 8 * 20
    for trained, reduction, count in (
        (False, "mean", 1), (True, "mean", 3), (False, "none", 1), (True, "none", 4),
    ):  # fmt: skip
        leaves = [t.detach().requires_grad_(trained) for t in (x, w, b)]
        with FlopCounterMode(display=False) as counter:
            loss = linear_cross_entropy(*leaves, targets, reduction=reduction).sum()
            if trained:
                loss.backward()
        assert counter.get_total_flops() == count * one


def test_targets_out_of_range(way) -> None:
    (x, w, b), targets = case(9, 8, 20, torch.float32, way.device)
    targets[1] = 20
    if way.device == "cpu":
        with pytest.raises(ValueError, match=r"expected targets in 0\.\.19 or -100; found 20"):
            linear_cross_entropy(x, w, b, targets, impl=way.impl)
    else:
        assert linear_cross_entropy(x, w, b, targets, impl=way.impl).isnan()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(5, 3).half()}, TypeError, "weight of the dtype of x"),
        ({"memory_budget": 0}, ValueError, "memory_budget > 0 or None; found 0"),
        ({"denom": torch.ones(4)}, ValueError, r"denom of shape \(\); found \(4,\)"),
        ({"denom": "4"}, TypeError, "denom to be a number or a 0-d tensor; found str"),
        ({"targets": None}, TypeError, "targets to be a tensor; found NoneType"),
        ({"x": torch.zeros(4, 2)}, ValueError, r"found \(4, 2\) and \(5, 3\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"found \(4, 3\) and \(0, 3\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias of shape \(5,\); found \(4,\)"),
        ({"x": torch.zeros(4, 3).int()}, TypeError, "found torch.int32"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias on cpu; found meta"),
        ({"grad_into": torch.zeros(5, 3).half()}, TypeError, "grad_into of fp32, and no fp64"),
        (
            {"grad_into": torch.zeros(5, 3), "grad_scale": torch.ones((), device="meta")},
            ValueError,
            "grad_scale on cpu; found meta",
        ),
        ({"grad_into": torch.zeros(4, 3)}, ValueError, r"grad_into of shape \(5, 3\)"),
        (
            {"grad_into": torch.zeros(5, 3), "reduction": "none"},
            ValueError,
            "grad_into needs reduction mean or sum",
        ),
        (
            {"token_weight": torch.zeros(4, requires_grad=True)},
            ValueError,
            "token_weight gets no gradient",
        ),
    ],
)
def test_bad_input_is_named(change, error, text) -> None:
    arguments = {
        "x": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "bias": torch.zeros(5),
        "targets": torch.zeros(4, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(error, match=text):
        linear_cross_entropy(**{**arguments, **change})


def test_a_dtensor_is_refused(way) -> None:
    class DTensor(torch.Tensor):
        pass

    sharded = torch.zeros(4, 3).as_subclass(DTensor)
    with pytest.raises(TypeError, match="expected plain tensors; x is a DTensor"):
        linear_cross_entropy(
            sharded, torch.zeros(5, 3), None, torch.zeros(4, dtype=torch.int64), impl=way.impl
        )
