"""The feed-forwards as operators: results, gradients, compilation, errors."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.kernels import mlp
from mypt_fast.kernels.mlp import gelu_mlp, swiglu_mlp
from tests.kernels import oracle

SAVES = ("all", "gate_up", "input")
OPERATOR_ONLY = "the reference operator, which needs no card"


def eager_swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    gate, up = F.linear(x, w_gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w_down)


def eager_gelu(x: Tensor, w_up: Tensor, b_up: Any, w_down: Tensor, b_down: Any) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_up, b_up)), w_down, b_down)


def tensors(
    name: str, rows: int, width: int, hidden: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor | None], Tensor]:
    """The arguments of the MLP called `name`, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        t = torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5 if shape[0] > 2 else 1)
        return t.to(device=device, dtype=dtype)

    x, dy = draw(2, rows, width), draw(2, rows, width)
    if name == "swiglu":
        return [x, draw(2 * hidden, width) * 2, draw(width, hidden)], dy
    return [x, draw(hidden, width), draw(hidden), draw(width, hidden), draw(width)], dy


FUNCTIONS = {"swiglu": (swiglu_mlp, eager_swiglu), "gelu": (gelu_mlp, eager_gelu)}
BOTH = pytest.mark.parametrize("name", FUNCTIONS)


@BOTH
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("size", [(4, 63, 123), (3, 80, 1000), (2, 160, 3456)], ids=str)
def test_mlp_is_as_exact_as_pytorch(way, dtype, name, save, size):
    inputs, dy = tensors(name, *size, dtype, way.device)
    ours, eager = FUNCTIONS[name]
    oracle.check(functools.partial(ours, save=save, impl=way.impl), eager, inputs, [dy])


@BOTH
@pytest.mark.parametrize("save", SAVES)
def test_the_narrowest(way, name, save):
    """Gradients of one number each, of which the error of plain PyTorch says nothing."""
    inputs, dy = tensors(name, 3, 1, 1, torch.float32, way.device)
    ours, eager = FUNCTIONS[name]
    found = oracle.run(functools.partial(ours, save=save, impl=way.impl), inputs, [dy])
    for a, b in zip(found, oracle.run(eager, inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)


def test_presets_width(way):
    inputs, dy = tensors("swiglu", 2, 1280, 3456, torch.float32, way.device)
    oracle.check(functools.partial(swiglu_mlp, save="input", impl=way.impl), eager_swiglu,
                 inputs, [dy])  # fmt: skip


@BOTH
def test_auto_on_a_cpu(dtype, name):
    """The plain expression keeps everything, the reference operator honours the rest."""
    inputs, dy = tensors(name, 3, 20, 30, dtype, "cpu")
    ours, eager = FUNCTIONS[name]
    for save in SAVES:
        oracle.check(functools.partial(ours, save=save), eager, inputs, [dy])
    for a, b in zip(oracle.run(ours, inputs, [dy]), oracle.run(eager, inputs, [dy]), strict=True):
        assert torch.equal(a, b)


@BOTH
def test_save_modes_give_the_same_bits(way, dtype, name):
    inputs, dy = tensors(name, 9, 40, 123, dtype, way.device)
    ours, _ = FUNCTIONS[name]
    results = [
        oracle.run(functools.partial(ours, save=save, impl=way.impl), inputs, [dy])
        for save in (*SAVES, "all")
    ]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_gelu_without_biases(way, dtype, biases):
    inputs, dy = tensors("gelu", 3, 20, 30, dtype, way.device)
    for i, present in zip((2, 4), biases, strict=True):
        if not present:
            inputs[i] = None
    for save in ("all", "up", "input"):
        ours = functools.partial(gelu_mlp, save=save, impl=way.impl)
        oracle.check(ours, eager_gelu, inputs, [dy])


@pytest.mark.parametrize("impl", ["auto", "operator"])
def test_a_pair_of_weights(way, dtype, impl):
    inputs, dy = tensors("swiglu", 3, 20, 30, dtype, way.device)
    x, w_gate_up, w_down = inputs
    assert w_gate_up is not None
    w_gate, w_up = w_gate_up.chunk(2)
    impl = way.impl if impl == "operator" else impl
    for save in SAVES:
        oracle.check(
            lambda x, g, u, d, save=save: swiglu_mlp(x, (g, u), d, save=save, impl=impl),
            lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
            [x, w_gate, w_up, w_down],
            [dy],
        )


@BOTH
def test_odd_layouts(way, dtype, name):
    inputs, dy = tensors(name, 3, 24, 40, dtype, way.device)
    ours, eager = FUNCTIONS[name]
    layouts = [oracle.odd_layouts(t) if t is not None else [None] * 3 for t in inputs]
    for i, upstream in enumerate(oracle.odd_layouts(dy)):
        odd = [layout[i] for layout in layouts]
        oracle.check(functools.partial(ours, save="input", impl=way.impl), eager, odd, [upstream])


@BOTH
@pytest.mark.parametrize("save", SAVES)
def test_no_rows(way, dtype, name, save):
    inputs, dy = tensors(name, 0, 20, 30, dtype, way.device)
    ours, _ = FUNCTIONS[name]
    found = oracle.run(functools.partial(ours, save=save, impl=way.impl), inputs, [dy])
    assert found[0].shape == dy.shape
    for gradient in found[1:]:
        assert not gradient.count_nonzero()


@BOTH
def test_autocast(way, name):
    """Gradients in the parameters' dtype, errors within twice those of PyTorch's autocast."""
    inputs, dy = tensors(name, 5, 40, 60, torch.float32, way.device)
    ours, eager = FUNCTIONS[name]
    low = torch.float16 if way.impl == "triton" else torch.bfloat16

    def under(function, save=None):
        def call(*args):
            if args[0].dtype is torch.float64:
                return function(*args)
            with torch.autocast(way.device, dtype=low):
                return function(*args, save=save, impl=way.impl) if save else function(*args)

        return call

    for save in SAVES:
        oracle.check(under(ours, save), under(eager), inputs, [dy])


def test_the_dtype_of_autocast_decides(way, monkeypatch):
    """Not that of the parameters: a card without bf16 must not get a bf16 kernel."""
    asked = []
    real = mlp.choose
    monkeypatch.setattr(mlp, "choose", lambda *a, **k: (asked.append(k["dtype"]), real(*a, **k))[1])
    inputs, _ = tensors("swiglu", 3, 8, 12, torch.float32, way.device)
    with torch.autocast(way.device, dtype=torch.bfloat16):
        assert swiglu_mlp(*inputs, save="gate_up").dtype is torch.bfloat16
    swiglu_mlp(*inputs, save="gate_up")
    assert asked == [torch.bfloat16, torch.float32]


@BOTH
@pytest.mark.parametrize("save", SAVES)
def test_only_wanted_gradients(way, name, save):
    """Any subset of the arguments may be frozen."""
    inputs, dy = tensors(name, 3, 8, 12, torch.float32, way.device)
    ours, eager = FUNCTIONS[name]
    for frozen in range(1, 2 ** len(inputs) - 1):
        results = []
        for function in (functools.partial(ours, save=save, impl=way.impl), eager):
            leaves = [
                t.detach().clone().requires_grad_(not frozen >> i & 1)
                for i, t in enumerate(inputs)
                if t is not None
            ]
            function(*leaves).backward(dy)
            results.append([leaf.grad for leaf in leaves])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@BOTH
@pytest.mark.parametrize("save", SAVES)
def test_fp64_is_computed_in_fp64(name, save):
    inputs, _ = tensors(name, 2, 3, 5, torch.float64, "cpu")
    leaves = [t if t is None else t.requires_grad_() for t in inputs]
    ours, _ = FUNCTIONS[name]
    assert torch.autograd.gradcheck(functools.partial(ours, save=save, impl="reference"), leaves)


@BOTH
def test_without_gradients_nothing_is_kept(way, name):
    inputs, _ = tensors(name, 3, 8, 12, torch.float32, way.device)
    ours, eager = FUNCTIONS[name]
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs, impl=way.impl), eager(*inputs))


@BOTH
def test_the_operators_are_registered_right(way, name):
    if way.impl == "triton":
        pytest.skip(OPERATOR_ONLY)
    (x, *weights), dy = tensors(name, 3, 8, 12, torch.float32, "cpu")
    if name == "swiglu":
        weights = [weights[0], None, weights[1], None]
    leaves = [t if t is None else t.requires_grad_() for t in (x.flatten(0, 1), *weights)]
    ops = torch.ops.mypt_fast
    torch.library.opcheck(ops.mlp.default, (*leaves, name, "gate_up", False))
    assert [t.requires_grad for t in ops.mlp(*leaves, name, "all", False)] == [True, False, False]
    leaves = [t if t is None else t.detach() for t in leaves]
    _, pre, h = ops.mlp(*leaves, name, "all", False)
    for save, needs in (("all", [True] * 5), ("input", [True, False, True, False, True])):
        needs = [n and t is not None for n, t in zip(needs, leaves, strict=True)]
        args = (dy.flatten(0, 1), *leaves[:4], pre, h, name, save, needs, False)
        torch.library.opcheck(ops.mlp_backward.default, args)


@BOTH
@pytest.mark.parametrize("save", ["input", "inductor"])
def test_compiles_without_a_graph_break(way, name, save):
    if way.impl == "triton":
        pytest.skip(OPERATOR_ONLY)
    compile_and_compare(name, save, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@BOTH
@pytest.mark.parametrize("save", [*SAVES, "inductor"])
def test_compiles_with_inductor(way, name, save):
    if way.impl == "triton":
        pytest.skip(OPERATOR_ONLY)
    compile_and_compare(name, save, "inductor")


def compile_and_compare(name: str, save: str, backend: str) -> None:
    inputs, dy = tensors(name, 3, 8, 12, torch.float32, "cpu")
    ours, eager = FUNCTIONS[name]
    options = {"impl": "inductor"} if save == "inductor" else {"impl": "reference", "save": save}
    torch._dynamo.reset()  # else the variants of all tests count as recompilations of one function
    step = torch.compile(functools.partial(ours, **options), fullgraph=True, backend=backend)
    found, want = oracle.run(step, inputs, [dy]), oracle.run(eager, inputs, [dy])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"save": "up"}, ValueError, "swiglu_mlp: save must be one of all, gate_up, input; found"),
        ({"save": "input", "impl": "inductor"}, ValueError, "save='input' needs the operator"),
        ({"w_gate_up": torch.ones(7, 4)}, ValueError, r"w_gate_up of shape \(6, 4\); found"),
        ({"w_gate_up": (torch.ones(3, 4), torch.ones(2, 4))}, ValueError, r"w_up of shape \(3, 4"),
        ({"w_down": torch.ones(5, 3)}, ValueError, r"w_down of shape \(4, 3\); found \(5, 3\)"),
        ({"w_down": torch.ones(4, 0)}, ValueError, "F > 0"),
        ({"w_down": torch.ones(3)}, ValueError, r"w_down \(C, F\) with F > 0; found \(3,\)"),
        ({"x": torch.ones(2, 0)}, ValueError, "C > 0"),
        ({"x": torch.ones(2, 4).half()}, TypeError, "w_gate_up of the dtype of x, torch.float16"),
        ({"x": torch.ones(2, 4).long()}, TypeError, "expected x of fp16"),
        ({"w_down": torch.ones(4, 3, device="meta")}, ValueError, "w_down on cpu; found meta"),
    ],
)
def test_bad_input(change, error, message):
    good = {"x": torch.ones(2, 4), "w_gate_up": torch.ones(6, 4), "w_down": torch.ones(4, 3)}
    swiglu_mlp(**good)
    with pytest.raises(error, match=message):
        swiglu_mlp(**(good | change))


def test_bad_input_of_gelu():
    x, w_up, w_down = torch.ones(2, 4), torch.ones(3, 4), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"gelu_mlp: expected b_up of shape \(3,\); found \(4,\)"):
        gelu_mlp(x, w_up, torch.ones(4), w_down, None)
    with pytest.raises(ValueError, match="gelu_mlp: save must be one of all, up, input; found"):
        gelu_mlp(x, w_up, None, w_down, None, save="half")
