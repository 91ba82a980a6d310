from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.kernels import norm
from mypt_fast.kernels.reference import norm as reference
from tests.kernels import oracle
from tests.kernels.conftest import Way

COLUMNS = (1, 63, 80, 123, 1000, 1280, 3456)
NAMES = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
SEED = -0x123456789ABCDEF
P = 0.3


def impls(way: Way) -> tuple[str, ...]:
    """The operator, and on a CPU what `auto` is there: the plain expression."""
    return (way.impl, "auto") if way.device == "cpu" else (way.impl,)


def make(
    name: str,
    shape: tuple[int, ...],
    way: Way,
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    parameters: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Inputs of the operator `name`, and gradients of its results."""
    g = torch.Generator().manual_seed(sum(shape))
    stream, parameters = stream or dtype, parameters or dtype

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(way.device)

    inputs: list[Tensor | None] = [(draw(*shape) + 0.3).to(dtype)]
    if name.startswith("add"):
        inputs.append((2 * draw(*shape)).to(stream))
    inputs.append((1 + draw(shape[-1]) / 4).to(parameters))
    if "layer" in name:
        inputs.append((draw(shape[-1]) / 4).to(parameters))
    # gradients that `dtype` holds exactly: the truth is to see the same ones
    gradients = [draw(*shape).to(dtype) for _ in range(2 if name.startswith("add") else 1)]
    return inputs, gradients


def seed_on(way: Way, value: int = SEED) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=way.device)


def eager(name: str, p: float = 0.0, mask: Tensor | None = None) -> Callable[..., Any]:
    """The operator in plain PyTorch ops at the dtype of the tensors."""

    def run(x: Tensor, *rest: Tensor) -> Any:
        out = x.dtype
        if name.startswith("add"):
            residual, *rest = rest
            if mask is not None:
                x = x * mask.view(x.shape) / (1 - p)
            x = (residual + x).to(residual.dtype)
        size = (x.shape[-1],)
        y = (
            F.layer_norm(x, size, *rest, 1e-5)
            if "layer" in name
            else F.rms_norm(x, size, *rest, 1e-6)
        ).to(out)
        return (y, x) if name.startswith("add") else y

    return run


def ours(name: str, impl: str, **kwargs: Any) -> Callable[..., Any]:
    return lambda *args: getattr(norm, name)(*args, impl=impl, **kwargs)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", NAMES)
def test_accurate(name: str, columns: int, dtype: torch.dtype, way: Way) -> None:
    # the gradient of one column is a difference of equals: noise, to be averaged over rows
    rows = 64 if columns == 1 else 7 if columns < 1280 else 5
    inputs, gradients = make(name, (rows, columns), way, dtype)
    for impl in impls(way):
        oracle.check(ours(name, impl), eager(name), inputs, gradients)


@pytest.mark.parametrize("columns", [63, 1280])
@pytest.mark.parametrize("name", NAMES[2:])
def test_accurate_with_dropout(name: str, columns: int, dtype: torch.dtype, way: Way) -> None:
    inputs, gradients = make(name, (2, 3, columns), way, dtype)
    seed = seed_on(way)
    truth = eager(name, P, reference.keep_mask(seed, P, 6, columns))
    for impl in impls(way):
        oracle.check(ours(name, impl, dropout_p=P, seed=seed), truth, inputs, gradients)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("name", NAMES)
def test_accurate_with_wider_stream_and_parameters(
    name: str, p: float, dtype: torch.dtype, way: Way
) -> None:
    if dtype is torch.float32 or (p and not name.startswith("add")):
        pytest.skip("as in another test")
    inputs, gradients = make(name, (5, 300), way, dtype, torch.float32, torch.float32)
    seed = seed_on(way)
    mask = reference.keep_mask(seed, p, 5, 300) if p else None
    more = {"dropout_p": p, "seed": seed} if p else {}

    def truth(x: Tensor, *rest: Tensor) -> Any:  # eager PyTorch would refuse the mixed dtypes
        if name.startswith("add"):
            return eager(name, p, mask)(x, *rest)
        return eager(name)(x.to(rest[0].dtype), *rest).to(x.dtype)

    for impl in impls(way):
        oracle.check(ours(name, impl, **more), truth, inputs, gradients)


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str, way: Way) -> None:
    (x, *rest), gradients = make(name, (2, 3, 48), way, torch.float32)
    assert x is not None
    plain = oracle.run(ours(name, way.impl), [x, *rest], gradients)
    for odd in [*oracle.odd_layouts(x)[1:], x.transpose(0, 1).contiguous().transpose(0, 1)]:
        strided = [odd, *rest]
        if name.startswith("add"):
            strided[1] = oracle.odd_layouts(rest[0])[1]
        for a, b in zip(plain, oracle.run(ours(name, way.impl), strided, gradients), strict=True):
            torch.testing.assert_close(a, b)
    padded = [oracle.odd_layouts(g)[1] for g in gradients]  # of what flows back
    for a, b in zip(plain, oracle.run(ours(name, way.impl), [x, *rest], padded), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(9, 123), (5, 256), (3, 1280)])
def test_every_element_is_written(
    name: str, shape: tuple[int, ...], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way.impl != "triton":
        pytest.skip("only the kernels write into empty tensors")
    inputs, gradients = make(name, shape, way, torch.float16, torch.float32)
    more = {"dropout_p": P, "seed": seed_on(way)} if name.startswith("add") else {}
    kinds = []

    def poisoned(*size: Any, **kwargs: Any) -> Tensor:
        kinds.append(kwargs.get("dtype"))
        return torch.full(*_size(size), torch.nan, **kwargs)

    monkeypatch.setattr(torch, "empty", poisoned)
    results = oracle.run(ours(name, way.impl, **more), inputs, gradients)
    assert len(kinds) >= 7  # four of the forward, three of the backward
    assert all(t.isfinite().all() for t in results)


def _size(size: tuple[Any, ...]) -> tuple[Any, ...]:
    return (size[0] if isinstance(size[0], tuple) else size,)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name: str, dtype: torch.dtype, way: Way) -> None:
    inputs, gradients = make(name, (2, 0, 24), way, dtype)
    more = {"dropout_p": P, "seed": seed_on(way)} if name.startswith("add") else {}
    for impl in impls(way):
        results = oracle.run(ours(name, impl, **more), inputs, gradients)
        assert all((t == 0).all() for t in results)  # the weights' gradients: the rest is empty
        assert sum(t.numel() for t in results) == 24 * (2 if "layer" in name else 1)


@pytest.mark.parametrize("name", NAMES)
def test_bitwise_equal_runs(name: str, dtype: torch.dtype, way: Way) -> None:
    inputs, gradients = make(name, (13, 300), way, dtype)
    more = {"dropout_p": P, "seed": seed_on(way)} if name.startswith("add") else {}
    first, second = (oracle.run(ours(name, way.impl, **more), inputs, gradients) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [n for n in NAMES if "rms" in n])
def test_offset(name: str, way: Way) -> None:
    inputs, gradients = make(name, (3, 40), way, torch.float32)
    inputs[-1] = inputs[-1] - 1.0
    shifted = lambda *args: eager(name)(*args[:-1], args[-1] + 1.0)  # noqa: E731
    for impl in impls(way):
        oracle.check(ours(name, impl, offset=1.0), shifted, inputs, gradients)


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_used(name: str, used: int, way: Way) -> None:
    inputs, gradients = make(name, (3, 40), way, torch.float32)
    one = lambda f: lambda *args: f(*args)[used] + 0.0 * sum(t.sum() for t in args)  # noqa: E731
    for impl in impls(way):
        oracle.check(one(ours(name, impl)), one(eager(name)), inputs, gradients[:1])


def test_branch_and_residual_share_a_gradient(way: Way) -> None:
    (x, residual, weight), (dy, _) = make("add_rms_norm", (3, 40), way, torch.float32)
    assert x is not None
    assert residual is not None
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    y, _ = norm.add_rms_norm(*leaves, weight, impl=way.impl)
    dx, dresidual = torch.autograd.grad(y, leaves, dy)
    assert dx is dresidual or dx.data_ptr() == dresidual.data_ptr()
    y, _ = norm.add_rms_norm(*leaves, weight, impl=way.impl)
    y.backward(dy)
    x.grad.zero_()  # a gradient that is kept is a tensor of its own
    torch.testing.assert_close(residual.grad, dresidual)


@pytest.mark.parametrize("name", NAMES)
def test_no_second_derivative(name: str, way: Way) -> None:
    """It would be wrong: the saved statistics are constants to autograd."""
    inputs, gradients = make(name, (3, 5), way, torch.float32)
    x = inputs[0].requires_grad_()
    y = getattr(norm, name)(*inputs, impl=way.impl)
    y = y[0] if name.startswith("add") else y
    (dx,) = torch.autograd.grad(y, x, gradients[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(dx.sum(), x)


def reference_only(way: Way) -> None:
    if way.impl == "triton":
        pytest.skip("about the registered operators and the compiler, on a CPU")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_finite_differences(name: str, impl: str, way: Way) -> None:
    reference_only(way)
    inputs, _ = make(name, (3, 5), way, torch.float64)
    more = {"dropout_p": P, "seed": seed_on(way)} if name.startswith("add") else {}
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    assert torch.autograd.gradcheck(ours(name, impl, **more), leaves, fast_mode=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [0.0, P])
def test_opcheck(name: str, p: float, way: Way) -> None:
    reference_only(way)
    if p and not name.startswith("add"):
        pytest.skip("no dropout")
    inputs, _ = make(name, (2, 3, 20), way, torch.float16, torch.float32, torch.float32)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    x, *rest = leaves
    residual = rest.pop(0) if name.startswith("add") else None
    weight, bias = rest[0], rest[1] if len(rest) > 1 else None
    seed = seed_on(way) if p else None
    center = "layer" in name
    args = (x, residual, weight, bias, seed, 1e-5, 0.5, center, p, torch.float16, False)
    torch.library.opcheck(torch.ops.mypt_fast.norm.default, args)
    with torch.no_grad():
        _, h, mean, rstd = torch.ops.mypt_fast.norm(*args)
        h = h if residual is not None else x.detach()
        dy, dh = torch.randn_like(x), torch.randn_like(h) if residual is not None else None
        branch = torch.float16 if residual is not None else None
        after = (dy, dh, h, weight, mean, rstd, seed, 0.5, center, p, branch)
        dtype = torch.float32 if center else None
        torch.library.opcheck(torch.ops.mypt_fast.norm_backward.default, (*after, dtype, False))


def compiled_agrees(impl: str, backend: str, name: str, way: Way) -> None:
    inputs, gradients = make(name, (2, 3, 40), way, torch.float32)
    seed = seed_on(way) if name.startswith("add") else None

    def function(*args: Tensor) -> Any:
        more = {"dropout_p": P, "seed": seed} if seed is not None else {}
        return getattr(norm, name)(*args, impl=impl, **more)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    plain = ours(name, "auto", **({"dropout_p": P, "seed": seed} if seed is not None else {}))
    expected = oracle.run(plain, inputs, gradients)
    for a, b in zip(oracle.run(compiled, inputs, gradients), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_one_graph(impl: str, name: str, way: Way) -> None:
    reference_only(way)
    compiled_agrees(impl, "aot_eager", name, way)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("impl", ["reference", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_by_inductor(impl: str, name: str, way: Way) -> None:
    reference_only(way)
    compiled_agrees(impl, "inductor", name, way)


def test_dtypes_of_results(way: Way) -> None:
    inputs, _ = make("add_rms_norm", (2, 20), way, torch.float32)
    for impl in impls(way):
        y, h = norm.add_rms_norm(*inputs, impl=impl)
        assert (y.dtype, h.dtype) == (torch.float32, torch.float32)
        y, h = norm.add_rms_norm(*inputs, out_dtype=torch.float16, impl=impl)
        assert (y.dtype, h.dtype) == (torch.float16, torch.float32)
        with torch.autocast(way.device, dtype=torch.float16):
            y, h = norm.add_rms_norm(*inputs, impl=impl)
            assert (y.dtype, h.dtype) == (torch.float16, torch.float32)
            assert norm.rms_norm(inputs[0], inputs[2], impl=impl).dtype is torch.float16
            double = [t.double() for t in inputs if t is not None]
        if impl != "triton":
            with torch.autocast(way.device, dtype=torch.float16):
                assert norm.layer_norm(double[0], double[2], None).dtype is torch.float64


def test_bad_input(way: Way) -> None:
    x, weight = torch.ones(2, 8, device=way.device), torch.ones(8, device=way.device)
    seed = seed_on(way)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \(8,\); found"):
        norm.rms_norm(x, weight[:7], impl=way.impl)
    with pytest.raises(ValueError, match=r"layer_norm: expected bias of shape \(8,\)"):
        norm.layer_norm(x, weight, weight[:1], impl=way.impl)
    with pytest.raises(ValueError, match=r"add_rms_norm: expected residual of shape \(2, 8\)"):
        norm.add_rms_norm(x, x[:1], weight, impl=way.impl)
    with pytest.raises(ValueError, match=r"expected x of shape \(\.\.\., C\), C > 0; found"):
        norm.rms_norm(x[:, :0], weight[:0], impl=way.impl)
    with pytest.raises(ValueError, match="expected weight on"):
        norm.rms_norm(x, weight.to("meta"), impl=way.impl)
    with pytest.raises(TypeError, match="expected x of fp16, bf16, fp32 or fp64; found"):
        norm.rms_norm(x.long(), weight)
    with pytest.raises(TypeError, match="expected fp64 in all tensors or none; x is"):
        norm.add_rms_norm(x, x.double(), weight, impl=way.impl)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected 0 <= dropout_p < 1; found"):
            norm.add_rms_norm(x, x, weight, dropout_p=p, seed=seed, impl=way.impl)
    with pytest.raises(ValueError, match=r"expected a seed with dropout_p 0\.1; found None"):
        norm.add_rms_norm(x, x, weight, dropout_p=0.1, impl=way.impl)
    for wrong in (seed.float(), seed.view(1)):
        with pytest.raises(ValueError, match="expected seed as a 0-d int64 tensor; found"):
            norm.add_layer_norm(x, x, weight, None, dropout_p=0.1, seed=wrong, impl=way.impl)


def test_cases_fill_every_argument(way: Way) -> None:
    if way.impl != "triton":
        pytest.skip("needs the kernels")
    from mypt_fast.kernels.jit import norm as jit

    for case in jit.cases({"n_embd": 1280}, torch.float16, 80):
        assert {*case.signature, *case.constants} == {*case.function.arg_names}
        assert {*case.aligned} <= {*case.signature}
