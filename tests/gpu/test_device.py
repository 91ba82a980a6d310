"""What only a GPU can show: graphs, streams, syncs, memory, a second card."""

import dataclasses

import pytest
import torch

from mypt_fast import kernels, presets
from mypt_fast.kernels import _operator
from mypt_fast.kernels.chunked_head import chunk_rows
from mypt_fast.model import GPT
from tests.gpu import operators

EVERY = pytest.mark.parametrize("name", operators.NAMES)
MIB = 1 << 20


def assert_same(found, wanted, call) -> None:
    """Bit for bit, except that a matmul may be split another way on another stream."""
    for a, b in zip(found, wanted, strict=True):
        if call.exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@EVERY
def test_no_host_sync(name, way, dtype) -> None:
    call = operators.make(name, way.device, dtype, way.impl)
    call.run()  # compiled, cuBLAS has its workspace
    torch.cuda.set_sync_debug_mode("error")
    found = call.run()
    torch.cuda.set_sync_debug_mode("default")
    assert all(t.isfinite().all() for t in found)


@EVERY
def test_a_captured_graph_computes_with_new_values(name, way) -> None:
    call = operators.make(name, way.device, torch.float16, way.impl)
    other = operators.make(name, way.device, torch.float16, way.impl, seed=1)
    static = [t.clone() for t in call.inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch's notes on graphs ask: warm up aside
        for _ in range(3):
            call.run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call.run(static)
    for t, new in zip(static, other.inputs, strict=True):
        t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, call.run(other.inputs), call)


@EVERY
def test_another_stream_than_the_default(name, way) -> None:
    call = operators.make(name, way.device, torch.float16, way.impl)
    wanted = call.run()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # the default stream would not wait for what comes now
        inputs = [t.clone() for t in call.inputs]
        found = call.run(inputs)
    side.synchronize()
    assert_same(found, wanted, call)


@EVERY
def test_a_second_device(name, way) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    wanted = operators.make(name, "cuda:0", torch.float16, way.impl)
    assert torch.cuda.current_device() == 0
    found = operators.make(name, "cuda:1", torch.float16, way.impl).run()
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert_same([t.to("cuda:0") for t in found], wanted.run(), wanted)


@EVERY
def test_two_runs_are_equal_bit_for_bit(name, way, dtype) -> None:
    call = operators.make(name, way.device, dtype, way.impl)
    for a, b in zip(call.run(), call.run(), strict=True):
        assert torch.equal(a, b)


def peak_of(work) -> int:
    """The most memory held beyond what was there, after a warm-up."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("budget", [None, 64 * MIB])
@pytest.mark.parametrize("into", [False, True])
def test_the_head_keeps_to_its_budget(budget, into, way) -> None:
    """One chunk of logits, dx, and dW where no buffer takes it; nothing of the size N x V."""
    N, C, V = 8192, 512, 50_304
    x, w = (torch.randn(n, C, device=way.device).half().requires_grad_() for n in (N, V))
    targets = torch.randint(V, (N,), device=way.device)
    buffer = torch.zeros(V, C, device=way.device) if into else None

    def work() -> None:
        loss = kernels.linear_cross_entropy(
            x, w, None, targets, impl=way.impl, memory_budget=budget, grad_into=buffer
        )
        torch.autograd.grad(loss, [x, w], allow_unused=True)

    chunk = 2 * V * chunk_rows(N, V, torch.float16, False, budget)
    dw = 0 if into else (4 + 2) * V * C  # the fp32 sum, rounded to fp16 at the end
    assert peak_of(work) <= chunk + 2 * 2 * N * C + dw + 16 * MIB
    assert chunk <= (budget or 512 * MIB)
    assert chunk < 2 * N * V / 3


def test_the_head_without_gradients_needs_its_chunk_alone(way) -> None:
    N, C, V = 8192, 512, 50_304
    x, w = (torch.randn(n, C, device=way.device).half() for n in (N, V))
    targets = torch.randint(V, (N,), device=way.device)
    budget = 64 * MIB

    def work() -> None:
        with torch.no_grad():
            kernels.linear_cross_entropy(x, w, None, targets, impl=way.impl, memory_budget=budget)

    assert peak_of(work) <= budget + 4 * MIB


@pytest.mark.parametrize("wrong", [1000, -1, -(2**40), 2**40])
def test_a_target_out_of_range_is_nan_and_the_device_lives_on(wrong, way) -> None:
    logits = torch.randn(8, 1000, device=way.device, requires_grad=True)
    targets = torch.arange(8, device=way.device)
    targets[3] = wrong
    losses = kernels.cross_entropy(logits, targets, reduction="none", impl=way.impl)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    bad = torch.arange(8, device=way.device) == 3
    assert torch.equal(losses.isnan(), bad)
    assert torch.equal(grad.isnan().any(1), bad)
    w = torch.randn(1000, 16, device=way.device)
    x = torch.randn(8, 16, device=way.device)
    assert kernels.linear_cross_entropy(x, w, None, targets, impl=way.impl).isnan()
    targets[3] = 0
    assert kernels.linear_cross_entropy(x, w, None, targets, impl=way.impl).isfinite()


@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_buffer_for_the_weight_gradient_needs_no_sync(scale, reduction, way) -> None:
    x, w = (torch.randn(n, 64, device=way.device).half() for n in (40, 200))
    targets = torch.randint(200, (40,), device=way.device)
    buffer = torch.zeros(200, 64, device=way.device)
    if isinstance(scale, torch.Tensor):
        scale = scale.to(way.device)

    def work() -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        loss = kernels.linear_cross_entropy(
            leaf, w.requires_grad_(), None, targets, reduction=reduction, impl=way.impl,
            grad_into=buffer, grad_scale=scale,
        )  # fmt: skip
        return torch.autograd.grad(loss * scale, leaf)[0]

    work()
    torch.cuda.set_sync_debug_mode("error")
    grad = work()
    torch.cuda.set_sync_debug_mode("default")
    leaves = [t.detach().float().requires_grad_() for t in (x, w)]
    logits = leaves[0] @ leaves[1].T
    loss = scale * torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)
    dx, dw = torch.autograd.grad(loss, leaves)
    assert (grad - dx).norm() <= 2e-2 * dx.norm()
    assert (buffer - 2 * dw).norm() <= 2e-2 * (2 * dw).norm()  # of both calls


def test_a_grad_scale_on_another_device_is_refused(way) -> None:
    x, w = (torch.randn(n, 16, device=way.device, requires_grad=True) for n in (8, 20))
    targets = torch.zeros(8, dtype=torch.long, device=way.device)
    buffer = torch.zeros(20, 16, device=way.device)
    with pytest.raises(ValueError, match=r"expected grad_scale on cuda.*; found cpu"):
        kernels.linear_cross_entropy(
            x, w, None, targets, impl=way.impl, grad_into=buffer, grad_scale=torch.ones(())
        )
    assert not buffer.any()


def test_bf16_before_ampere_is_an_error_when_forced(way, monkeypatch) -> None:
    monkeypatch.setattr(_operator, "device_arch", lambda index: 75)
    x = torch.ones(2, 8, device=way.device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bf16 needs compute capability 8\.0; found 7\.5"):
        kernels.rms_norm(x, x[0], impl="triton")
    assert _operator.choose("rms_norm", "auto", x) == "inductor"
    assert _operator.choose("rms_norm", "triton", x.half()) == "triton"
    monkeypatch.setattr(_operator, "device_arch", lambda index: 70)
    with pytest.raises(ValueError, match=r"needs compute capability 7\.5; found 7\.0"):
        kernels.rms_norm(x.half(), x[0].half(), impl="triton")


def test_auto_is_triton_outside_the_compiler(way, dtype) -> None:
    x = torch.ones(2, 8, device=way.device, dtype=dtype)
    assert _operator.choose("rms_norm", "auto", x) == "triton"
    assert _operator.choose("rms_norm", "auto", x.double()) == "inductor"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("preset", ["base/750M_unified_v1", "150M_1024"])
def test_a_model_learns_the_same_with_and_without_the_kernels(preset, compiled, way) -> None:
    """Loss and gradients of two blocks under fp16 autocast; compiled, it is one graph."""
    cfg = presets.load(preset).model
    cfg = dataclasses.replace(
        cfg, n_layer=2, n_embd=160, n_head=2, block_size=64, vocab_size=500, dropout=0.0
    )
    batch = torch.randint(500, (2, 4, 64), device=way.device)
    results = []
    for impl in ("inductor", "triton", "auto"):
        model = GPT(cfg, seed=0, kernels=impl).to(way.device).train()
        if compiled:
            torch.compiler.reset()
            model.hidden = torch.compile(model.hidden, fullgraph=True)
        elif impl == "inductor":
            model = GPT(cfg, seed=0, kernels="reference").to(way.device).train()
        with torch.autocast(way.device, dtype=torch.float16):
            loss = model(*batch)  # the sum: its gradients are large enough for fp16
        loss.backward()
        results.append((loss.item(), {k: p.grad for k, p in model.named_parameters()}))
    (loss, grads), *others = results
    for other, found in others:
        assert other == pytest.approx(loss, rel=2e-3)
        for key, grad in found.items():
            assert (grad - grads[key]).norm() <= 2e-2 * grads[key].norm(), key
