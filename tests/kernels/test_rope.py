"""Rotary position embedding against fp64 and plain PyTorch, whole path: split, norm, rotation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.kernels.rope import rope_qkv, rope_tables
from tests.kernels import oracle

LENGTH = 16
both = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
# torch.compile's own, for any autograd.Function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int],
    positions: Tensor | None = None, weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a model without these kernels writes."""
    B, T, _ = qkv.shape
    D = 2 * cos.shape[1]
    q, k, v = qkv.reshape(B, T, -1, D).transpose(1, 2).split([heads[0], heads[1], heads[1]], 1)
    if weights:
        q, k = (F.rms_norm(t, (D,), w, 1e-6) for t, w in zip((q, k), weights, strict=True))
    rows = slice(T) if positions is None else positions.expand(B, T)
    c, s = (t[rows] if positions is None else t[rows].unsqueeze(1) for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(qkv.dtype)

    return turn(q), turn(k), v


def case(
    way: Any, dtype: torch.dtype, B: int, T: int, heads: tuple[int, int], D: int,
    norm: bool = False, problems: int = 0,
) -> SimpleNamespace:  # fmt: skip
    g = torch.Generator().manual_seed(B + T + D)
    made = SimpleNamespace(heads=heads, impl=way.impl, D=D)
    first = (problems,) if problems else ()

    def make(*shape: int) -> Tensor:
        return torch.randn(*first, *shape, generator=g).to(way.device, dtype)

    made.cos, made.sin = rope_tables(LENGTH, D, 1e4, 1.0, way.device)
    made.qkv = make(B, T, (heads[0] + 2 * heads[1]) * D)
    made.weights = [1 + 0.3 * make(D), 1 + 0.3 * make(D)] if norm else []
    made.grads = [make(B, h, T, D) for h in (heads[0], heads[1], heads[1])]
    made.positions = torch.randint(LENGTH, (B, T), generator=g).to(way.device)
    return made


def ours(made: SimpleNamespace, positions: Tensor | None = None) -> Callable[..., Sequence[Tensor]]:
    def function(qkv: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        norm = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        q, k, v = rope_qkv(
            qkv, made.cos, made.sin, *made.heads, positions=positions, impl=made.impl, **norm
        )
        for t, heads in ((q, made.heads[0]), (k, made.heads[1]), (v, made.heads[1])):
            assert t.shape == (qkv.shape[0], heads, qkv.shape[1], made.D)
        return q, k, v

    return function


def eager(
    made: SimpleNamespace, positions: Tensor | None = None
) -> Callable[..., Sequence[Tensor]]:
    return lambda qkv, *weights: plain(qkv, made.cos, made.sin, made.heads, positions, weights)


def check(made: SimpleNamespace, positions: Tensor | None = None, layout: int = 0) -> None:
    """The oracle rule over several problems at once: the worst of one's 16 sums is luck."""

    def each(function: Callable[..., Sequence[Tensor]]) -> Callable[..., list[Tensor]]:
        def run(qkv: Tensor, *weights: Tensor) -> list[Tensor]:
            problems = [function(x, *(w[i] for w in weights)) for i, x in enumerate(qkv)]
            return [torch.stack(results) for results in zip(*problems, strict=True)]

        return run

    inputs = [oracle.odd_layouts(made.qkv)[layout], *made.weights]
    oracle.check(each(ours(made, positions)), each(eager(made, positions)), inputs, made.grads)


@both
@pytest.mark.parametrize(
    ("B", "T", "heads", "D"),
    [
        (2, 5, (4, 4), 16),
        (1, 7, (3, 3), 64),
        (2, 3, (4, 2), 80),
        (1, 1, (6, 1), 128),
        (2, 4, (2, 1), 10),
    ],
)
def test_the_rule_holds_for_results_and_gradients(
    way, dtype, B: int, T: int, heads: tuple[int, int], D: int, norm: bool
) -> None:
    made = case(way, dtype, B, T, heads, D, norm, problems=max(1, 64 // D) if norm else 1)
    check(made)
    check(made, made.positions)


@both
def test_strided_inputs_and_gradients(way, dtype, norm: bool) -> None:
    made = case(way, dtype, 2, 3, (2, 1), 16, norm, problems=3)
    for layout in range(3):
        check(made, made.positions, layout)
    made.qkv = torch.stack((made.qkv, made.qkv), 2)[:, :, 0]  # batches apart
    check(made)
    grads = made.grads
    for layout in (1, 2):
        made.grads = [oracle.odd_layouts(g)[layout] for g in grads]
        check(made)
    made.grads = [g.transpose(2, 3).contiguous().transpose(2, 3) for g in grads]
    check(made)
    made.grads[0], made.grads[1] = grads[0], oracle.odd_layouts(grads[1])[1]  # each its own strides
    check(made)
    made.grads = [g[:, :1, :1, :1, :1].expand_as(g) for g in grads]
    check(made)


def test_positions_of_one_row_are_those_of_every_row(way) -> None:
    made = case(way, torch.float32, 2, 5, (2, 1), 16)
    in_order = torch.arange(5, device=way.device)
    wanted = ours(made)(made.qkv)
    for positions in (in_order, in_order.expand(2, 5), in_order.repeat(2, 1)):
        assert all(map(torch.equal, ours(made, positions)(made.qkv), wanted))
    # behind a cache of 3 tokens: the rows of the tables from 3 on
    wanted = ours(made, in_order + 3)(made.qkv)
    made.cos, made.sin = made.cos[3:8], made.sin[3:8]
    assert all(map(torch.equal, ours(made)(made.qkv), wanted))


@pytest.mark.parametrize("D", [2, 16])
def test_positions_of_every_token(way, dtype, D: int) -> None:
    made = case(way, dtype, 2, 5, (2, 1), D, problems=2)
    check(made, made.positions)
    check(made, made.positions[0])
    check(made, made.positions.T.contiguous().T)


def test_packed_segments_are_rotated_as_if_alone(way) -> None:
    made = case(way, torch.float32, 1, 7, (2, 2), 16)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]], device=way.device)
    packed = ours(made, positions)(made.qkv)
    for a, b in ((0, 3), (3, 5), (5, 7)):
        alone = ours(made)(made.qkv[:, a:b])
        assert all(torch.equal(p[:, :, a:b], q) for p, q in zip(packed, alone, strict=True))


def test_scores_depend_on_relative_position_only(way) -> None:
    cos, sin = rope_tables(64, 16, 1e4, 1.0, way.device)
    qkv = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0)).to(way.device)
    q, k, _ = rope_qkv(qkv.expand(1, 64, 48), cos, sin, 1, impl=way.impl)
    scores = (q @ k.transpose(2, 3))[0, 0]
    for offset in (0, 1, 3, 40):
        diagonal = scores.diagonal(-offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert abs(scores[5, 2] - scores[5, 3]) > 1e-3


@both
def test_empty_batches(way, norm: bool) -> None:
    made = case(way, torch.float32, 2, 3, (2, 1), 16, norm)
    for B, T in ((0, 3), (2, 0)):
        grads = [torch.empty(B, heads, T, 16, device=way.device) for heads in (2, 1, 1)]
        qkv = torch.empty(B, T, 64, device=way.device)
        found = oracle.run(ours(made), [qkv, *made.weights], grads)
        assert all(not t.any() for t in found[4:])


def test_v_is_a_view_and_q_and_k_are_laid_out_by_token(way, dtype) -> None:
    made = case(way, dtype, 2, 3, (2, 1), 16)
    for qkv in oracle.odd_layouts(made.qkv):
        q, k, v = ours(made)(qkv)
        assert v.data_ptr() == qkv[..., 48:].data_ptr()
        assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert q.transpose(1, 2).is_contiguous()
        assert k.transpose(1, 2).is_contiguous()


@both
def test_two_runs_are_bitwise_equal_and_write_every_element(
    way, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(way, torch.float32, 2, 5, (4, 2), 20, norm)
    first = oracle.run(ours(made), [made.qkv, *made.weights], made.grads)
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        t = empty(*args, **kwargs)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", poisoned)
    second = oracle.run(ours(made), [made.qkv, *made.weights], made.grads)
    assert all(map(torch.equal, first, second))


@both
def test_positions_outside_the_tables_are_nan_where_nothing_may_ask(way, norm: bool) -> None:
    """What the operators do on a GPU, where the public function does not look."""
    from mypt_fast.kernels import rope

    made = case(way, torch.float32, 2, 3, (2, 1), 16, norm)
    positions = torch.tensor([[0, LENGTH, 2], [-1, 3, 2**40]], device=way.device)
    bad = (positions < 0) | (positions >= LENGTH)
    tables = (made.cos, made.sin, positions, *(made.weights or (None, None)))
    q, k = rope._forward(made.qkv, *tables, 2, 1, 1e-6, way.impl == "triton")
    assert torch.equal(q.isnan().sum((1, 3)), bad * 32)
    assert torch.equal(k.isnan().sum((1, 3)), bad * 16)
    kept = made.qkv if norm else None
    dqkv, dweights = rope._backward(*made.grads, kept, *tables, 1e-6, way.impl == "triton")
    assert torch.equal(dqkv.isnan().sum(2), bad * 48)
    assert torch.equal(dqkv[..., 48:], made.grads[2].transpose(1, 2).flatten(2))
    assert dweights.isnan().all()


@pytest.mark.parametrize("worst", [LENGTH, -1])
def test_positions_outside_the_tables_are_refused(way, worst: int) -> None:
    if way.device != "cpu":
        pytest.skip("a GPU is not asked: its rows are NaN")
    made = case(way, torch.float32, 2, 3, (2, 1), 16)
    made.positions[1, 2] = worst
    for made.impl in ("auto", way.impl):
        with pytest.raises(ValueError, match=rf"from 0 to 15.* have 16 rows; found {worst}"):
            ours(made, made.positions)(made.qkv)


def test_autocast_leaves_the_arithmetic_alone(way) -> None:
    made = case(way, torch.float32, 1, 3, (2, 1), 16, norm=True)
    for made.impl in ("auto", way.impl):
        wanted = ours(made)(made.qkv, *made.weights)
        with torch.autocast(way.device, dtype=torch.float16):
            found = ours(made)(made.qkv, *made.weights)
        assert all(map(torch.equal, found, wanted))
        assert all(t.dtype is torch.float32 for t in found)


def test_norm_weights_may_be_wider_than_qkv(way) -> None:
    made = case(way, torch.float16, 2, 3, (2, 1), 16, norm=True)
    inputs = [made.qkv, *(w.float() for w in made.weights)]
    found = oracle.run(ours(made), inputs, made.grads)
    assert [t.dtype for t in found] == [torch.float16] * 4 + [torch.float32] * 2
    truth = oracle.run(eager(made), [t.double() for t in inputs], made.grads)
    for a, t in zip(found[4:], truth[4:], strict=True):
        assert (a.double() - t).norm() < 1e-6 * t.norm()


@both
def test_the_cpu_expression_follows_the_rule(way, dtype, norm: bool) -> None:
    if way.impl == "triton":
        pytest.skip("the expression is no Triton kernel; the reference run tests it")
    made = case(way, dtype, 2, 5, (4, 2), 20, norm, problems=6)
    made.impl = "auto"
    check(made)
    check(made, made.positions)


@both
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradcheck_in_fp64(way, impl: str, norm: bool) -> None:
    if way.impl == "triton":
        pytest.skip("Triton kernels have no fp64")
    made = case(way, torch.float64, 1, 3, (2, 1), 6, norm)
    made.impl = impl
    leaves = [t.requires_grad_() for t in (made.qkv, *made.weights)]
    assert torch.autograd.gradcheck(ours(made, made.positions), leaves)


def test_second_derivatives_of_the_operator_are_refused(way) -> None:
    made = case(way, torch.float32, 1, 3, (2, 1), 16)
    qkv = made.qkv.requires_grad_()
    q = ours(made)(qkv)[0]
    (grad,) = torch.autograd.grad(q.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_operators_pass_opcheck(way, dtype: torch.dtype, norm: bool) -> None:
    if way.device != "cpu" or way.impl == "triton":
        pytest.skip("the schema and the shapes are checked once, on the reference")
    made = case(way, dtype, 2, 3, (2, 1), 16, norm)
    tables = (made.cos, made.sin, made.positions if norm else None, *(made.weights or (None, None)))
    torch.library.opcheck(
        torch.ops.mypt_fast.rope_qkv_forward, (made.qkv, *tables, 2, 1, 1e-6, False)
    )
    torch.library.opcheck(
        torch.ops.mypt_fast.rope_qkv_backward,
        (*made.grads, made.qkv if norm else None, *tables, 1e-6, False),
    )


@both
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("impl", ["own", "inductor"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(way, backend: str, impl: str, norm: bool) -> None:
    if way.device == "cpu" and way.impl == "triton":
        pytest.skip("the interpreter cannot be traced; the reference run compiles the operators")
    made = case(way, torch.float32, 2, 5, (4, 2), 16, norm)
    made.impl = way.impl if impl == "own" else impl
    at = made.positions if norm else None

    def attended(function: Callable[..., Sequence[Tensor]]) -> Callable[..., Tensor]:
        return lambda qkv, *weights: F.scaled_dot_product_attention(
            *function(made, at)(2 * qkv, *weights), is_causal=True, enable_gqa=True
        )

    torch.compiler.reset()
    compiled = torch.compile(attended(ours), fullgraph=True, backend=backend)
    inputs = [made.qkv, *made.weights]
    found = oracle.run(compiled, inputs, made.grads[:1])
    for a, b in zip(found, oracle.run(attended(eager), inputs, made.grads[:1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("D", "theta", "scale"), [(64, 1e4, 1.0), (80, 5e5, 8.0)])
def test_tables_are_exact_far_out(D: int, theta: float, scale: float) -> None:
    tables = rope_tables(131_072, D, theta, scale)
    for table, function in zip(tables, (math.cos, math.sin), strict=True):
        assert table.shape == (131_072, D // 2)
        assert table.dtype is torch.float32
        for at in (0, 1, 4095, 131_071):
            angles = [at / scale * theta ** (-2 * i / D) for i in range(D // 2)]
            exact = torch.tensor([function(a) for a in angles], dtype=torch.float64)
            narrow = exact.abs().float()
            ulp = narrow.nextafter(torch.tensor(torch.inf)) - narrow
            assert ((table[at].double() - exact).abs() <= ulp).all()


def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    cos, sin = rope_tables(LENGTH, 16, 1e4, 1.0)
    q = torch.ones(16)
    long = torch.zeros(2, 3, dtype=torch.int64)
    return {
        "width": ({"n_kv_head": 2}, ValueError, r"qkv \(B, T, 96\).*found \(2, 3, 64\)"),
        "dim": ({"qkv": torch.zeros(3, 64)}, ValueError, r"found \(3, 64\)"),
        "heads": ({"n_kv_head": 0}, ValueError, "n_head=2, n_kv_head=0"),
        "divisor": ({"n_head": 3, "n_kv_head": 2}, ValueError, "n_head=3, n_kv_head=2"),
        "integers": ({"qkv": torch.zeros(2, 3, 64, dtype=torch.int32)}, TypeError, "qkv of fp16"),
        "tables": ({"cos": cos.double()}, TypeError, "cos and sin of fp32; found torch.float64"),
        "sin": ({"sin": sin[:3]}, ValueError, r"sin of shape \(16, 8\); found \(3, 8\)"),
        "no width": ({"cos": cos[:, :0], "sin": sin[:, :0]}, ValueError, r"found \(16, 0\)"),
        "too long": ({"qkv": torch.zeros(1, 17, 64)}, ValueError, "at most 16 .* found 17"),
        "int32": ({"positions": long.int()}, TypeError, "positions of int64; found torch.int32"),
        "positions": ({"positions": long[:1]}, ValueError, r"\(3,\) or \(2, 3\); found \(1, 3\)"),
        "one weight": ({"q_weight": q}, ValueError, "both q_weight and k_weight"),
        "weight": ({"q_weight": q, "k_weight": q[:8]}, ValueError, r"k_weight .* found \(8,\)"),
        "kinds": ({"q_weight": q, "k_weight": q.half()}, TypeError, "one dtype"),
        "device": ({"cos": cos.to("meta")}, ValueError, "cos on cpu; found meta"),
        "impl": ({"impl": "fast"}, ValueError, "impl must be one of"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_calls_are_named(name: str) -> None:
    changed, error, message = bad_calls()[name]
    cos, sin = rope_tables(LENGTH, 16, 1e4, 1.0)
    good = {"qkv": torch.zeros(2, 3, 64), "cos": cos, "sin": sin, "n_head": 2, "n_kv_head": 1}
    rope_qkv(**good)
    with pytest.raises(error, match=message) as raised:
        rope_qkv(**{**good, **changed})
    assert str(raised.value).startswith("rope_qkv: ")


def test_every_kernel_argument_has_a_type_or_a_value() -> None:
    pytest.importorskip("triton")
    from mypt_fast.kernels.jit import rope as jit

    cases = list(jit.cases({"n_head": 2, "head_size": 80}, torch.float16, 80))
    assert len({c.name for c in cases}) == len(cases) == 6
    for c in cases:
        assert sorted([*c.signature, *c.constants]) == sorted(c.function.arg_names)
        assert c.constants["HALF"] == 64


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_weight_gradients_are_summed_over_programs(
    way, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way.impl != "triton":
        pytest.skip("the reference has no programs")
    from mypt_fast.kernels.jit import launch

    table = launch.config
    monkeypatch.setattr(launch, "config", lambda *a: replace(table(*a), programs=programs))
    check(case(way, torch.float32, 2, 5, (2, 1), 16, norm=True, problems=4))
