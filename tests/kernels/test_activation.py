"""SwiGLU, and the formulas and kernels of SwiGLU and GELU that the MLPs share."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.kernels.activation import formulas, swiglu
from mypt_fast.kernels.reference import activation as reference
from tests.kernels import oracle

OPERATOR_ONLY = "the reference operator, which needs no card"


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def values(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(device=device, dtype=dtype)


@pytest.mark.parametrize("hidden", [1, 63, 123, 1000, 1280, 3456])
def test_swiglu_is_as_exact_as_pytorch(way, dtype, hidden):
    x = values(3, 5, 2 * hidden, dtype=dtype, device=way.device)
    dh = values(3, 5, hidden, dtype=dtype, device=way.device, seed=1)
    oracle.check(lambda t: swiglu(t, impl=way.impl), eager, [x], [dh])
    oracle.check(swiglu, eager, [x], [dh])  # auto: on a CPU the plain expression


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter
def test_large_gates_stay_finite(way, dtype):
    big = 0.9 * torch.finfo(torch.float16).max
    gate = torch.tensor([-big, -1e4, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e4])
    x = torch.cat((gate, torch.ones(10))).repeat(3, 1).to(device=way.device, dtype=dtype)
    dh = torch.ones(3, 10, dtype=dtype, device=way.device)
    oracle.check(lambda t: swiglu(t, impl=way.impl), eager, [x], [dh])


def test_strided_rows(way, dtype):
    x = values(7, 2 * 100, dtype=dtype, device=way.device)
    dh = values(7, 100, dtype=dtype, device=way.device, seed=1)
    for a in oracle.odd_layouts(x):
        for b in [*oracle.odd_layouts(dh), dh.t().contiguous().t()]:
            oracle.check(lambda t: swiglu(t, impl=way.impl), eager, [a], [b])


def test_a_broadcast_gradient_is_read_right(way):
    x = values(4, 32, dtype=torch.float32, device=way.device).requires_grad_()
    swiglu(x, impl=way.impl).sum().backward()
    assert x.grad is not None
    (want,) = torch.autograd.grad(eager(x).sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_no_rows(way, dtype):
    x = torch.empty(2, 0, 64, dtype=dtype, device=way.device, requires_grad=True)
    h = swiglu(x, impl=way.impl)
    h.sum().backward()
    assert h.shape == (2, 0, 32)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
@pytest.mark.parametrize("hidden", [123, 1280])
def test_formulas(way, dtype, name, hidden):
    """Both activations against autograd in fp64, plain, recreating h, and all in place."""
    module = formulas(way.impl == "triton")
    forward = getattr(module, f"{name}_forward")
    backward = getattr(module, f"{name}_backward")
    plain = eager if name == "swiglu" else F.gelu
    pre = values(5, 2 * hidden if name == "swiglu" else hidden, dtype=dtype, device=way.device)
    dh = values(5, hidden, dtype=dtype, device=way.device, seed=1)
    truth_h, truth_d = oracle.run(plain, [pre.double()], [dh])
    eager_h, eager_d = oracle.run(plain, [pre], [dh])
    h, d = forward(pre), backward(dh, pre)
    oracle.assert_close(h, truth_h, eager_h, 2.0, "h")
    oracle.assert_close(d, truth_d, eager_d, 2.0, "gradient")
    apart = torch.full_like(dh, torch.nan)
    assert torch.equal(backward(dh, pre, apart), d)
    assert torch.equal(apart, h)
    assert backward(dh, pre, dh, pre) is pre  # over its own inputs
    assert torch.equal(pre, d)
    assert torch.equal(dh, h)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_every_element_is_written(way, monkeypatch, name):
    """Fresh memory is full of NaN, rows and columns are no multiples of a tile."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        return real(*args, **kwargs).fill_(torch.nan)

    module = formulas(way.impl == "triton")
    pre = values(7, 600, dtype=torch.float32, device=way.device)
    dh = values(7, 300 if name == "swiglu" else 600, dtype=torch.float32, device=way.device)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t: poisoned(t.shape, dtype=t.dtype, device=t.device)
    )
    h = getattr(module, f"{name}_forward")(pre)
    recreated = torch.empty(dh.shape, device=way.device)
    d = getattr(module, f"{name}_backward")(dh, pre, recreated)
    for t in (h, d, recreated):
        assert torch.isfinite(t).all()


def test_two_runs_are_bitwise_equal(way, dtype):
    x = values(9, 2 * 123, dtype=dtype, device=way.device)
    dh = values(9, 123, dtype=dtype, device=way.device, seed=1)
    one, two = (oracle.run(lambda t: swiglu(t, impl=way.impl), [x], [dh]) for _ in range(2))
    assert all(map(torch.equal, one, two))


def test_fp64_is_computed_in_fp64():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: swiglu(t, impl="reference"), (x,))


def test_separate_gate_and_up(dtype, way):
    x = values(3, 20, dtype=dtype, device=way.device)
    assert torch.equal(reference.swiglu(x[:, :10], x[:, 10:]), reference.swiglu_packed(x))


def test_the_operators_are_registered_right(way):
    if way.impl == "triton":
        pytest.skip(OPERATOR_ONLY)
    x = torch.randn(3, 10)
    ops = torch.ops.mypt_fast
    torch.library.opcheck(ops.swiglu.default, (x.clone().requires_grad_(), False))
    torch.library.opcheck(ops.swiglu_backward.default, (torch.randn(3, 5), x, False))


@pytest.mark.parametrize("impl", ["reference", "inductor"])
def test_compiles_without_a_graph_break(way, impl):
    if way.impl == "triton":
        pytest.skip(OPERATOR_ONLY)
    x, dh = torch.randn(2, 3, 10), torch.randn(2, 3, 5)
    torch._dynamo.reset()
    step = torch.compile(lambda t: swiglu(t, impl=impl), fullgraph=True, backend="aot_eager")
    for a, b in zip(oracle.run(step, [x], [dh]), oracle.run(eager, [x], [dh]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("impl", ["reference", "inductor"])
def test_compiles_with_inductor(way, impl):
    if way.impl == "triton":
        pytest.skip(OPERATOR_ONLY)
    x, dh = torch.randn(2, 3, 10), torch.randn(2, 3, 5)
    torch._dynamo.reset()
    step = torch.compile(lambda t: swiglu(t, impl=impl), fullgraph=True)
    for a, b in zip(oracle.run(step, [x], [dh]), oracle.run(eager, [x], [dh]), strict=True):
        torch.testing.assert_close(a, b)
    if impl == "inductor":  # forced outside a compiled region, it is compiled by itself
        found = oracle.run(lambda t: swiglu(t, impl=impl), [x], [dh])
        for a, b in zip(found, oracle.run(eager, [x], [dh]), strict=True):
            torch.testing.assert_close(a, b)


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"swiglu: expected gate_up \(\.\.\., 2F\).*found \(3, 5\)"
    ):
        swiglu(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"F > 0; found \(3, 0\)"):
        swiglu(torch.randn(3, 0))
    with pytest.raises(ValueError, match=r"found \(\)"):
        swiglu(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"swiglu: expected gate_up of fp16.*torch.int64"):
        swiglu(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="swiglu: impl must be one of"):
        swiglu(torch.randn(2, 2), impl="fast")
