"""The model on each implementation of its operators: one loss, one gradient, one graph."""

import dataclasses
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mypt_fast import presets
from mypt_fast.config import ModelConfig
from mypt_fast.kernels import chunked_head
from mypt_fast.model import GPT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = {"vocab_size": 61, "block_size": 12, "n_embd": 32, "n_head": 2, "n_layer": 2}
LLAMA = {
    "pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "tie_weights": True,
}  # fmt: skip
STYLES = [{"bias": True}, LLAMA]
# torch.compile's own, about an autograd.Function that it traces
DYNAMO = "ignore:.*should not be instantiated:DeprecationWarning"
IDX = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[1] * 5 + [2] * 7, [1] * 12, [1] * 3 + [2] * 4 + [3] * 5])


def results(style, kernels="auto", recompute="none", dropout=0.0, segments=None, seed=1):
    """Loss and gradients of one training step."""
    cfg = ModelConfig(**SMALL, **style, dropout=dropout)
    model = GPT(cfg, kernels=kernels, recompute=recompute).train()
    torch.manual_seed(seed)
    loss = model(IDX, IDX.roll(-1, 1), segment_ids=segments)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_equal(found, wanted) -> None:
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6 * float(e.abs().max()) + 1e-7)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("style", STYLES, ids=["gpt2", "llama"])
def test_the_operators_give_what_plain_pytorch_gives(style, segments) -> None:
    impl = "triton" if INTERPRETED else "reference"
    want = results(style, segments=segments)
    for policy in ("none", "norms", "mlp", "block"):
        assert_equal(results(style, impl, policy, segments=segments), want)


@pytest.mark.skipif(not INTERPRETED, reason="compares with Triton: runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize("style", STYLES, ids=["gpt2", "llama"])
def test_dropout_of_a_seed_is_the_same_on_triton_and_on_the_reference(style) -> None:
    want = results(style, "reference", dropout=0.2)
    # attention draws its own dropout from torch's generator, the same on both
    for policy in ("none", "norms", "mlp"):
        assert_equal(results(style, "triton", policy, dropout=0.2), want)
    other = results(style, "reference", dropout=0.2, seed=2)
    assert abs(other[0] - want[0]) > 1e-3


def test_dropout_is_off_in_evaluation_on_every_implementation() -> None:
    for impl in ("auto", "triton" if INTERPRETED else "reference"):
        model = GPT(ModelConfig(**SMALL, **LLAMA, dropout=0.5), kernels=impl).eval()
        with torch.no_grad():
            assert torch.equal(model(IDX), model(IDX))


@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("style", STYLES, ids=["gpt2", "llama"])
def test_one_graph_and_one_compilation_whatever_the_step(style, impl) -> None:
    """Loss included: no operator breaks the graph, and a second step compiles nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = GPT(ModelConfig(**SMALL, **style, dropout=0.1), kernels=impl).train()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(IDX, IDX.roll(-1, 1)).backward()
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_flagship_compiles_without_a_graph_break(impl) -> None:
    """750M_unified_v1 at its own width, feed-forward and vocabulary; two of its 32 layers."""
    torch._dynamo.reset()
    cfg = presets.load("base/750M_unified_v1").model
    cfg = dataclasses.replace(cfg, n_layer=2)
    counter = CompileCounterWithBackend("aot_eager")
    model = GPT(cfg, kernels=impl).train()
    hidden = torch.compile(model.hidden, fullgraph=True, backend=counter)
    seeds = torch.arange(4) if impl == "reference" else None
    idx = torch.zeros(1, 16, dtype=torch.int64)
    for _ in range(2):
        hidden(idx, None, None, seeds).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", ["auto", "triton" if INTERPRETED else "reference"])
def test_training_returns_the_loss_alone_and_makes_no_whole_logits(impl, monkeypatch) -> None:
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(chunked_head, "CPU_BUDGET_BYTES", 1)
    rows = []
    allocate = chunked_head.Head._allocate

    def watched(self, n, need_w):
        rows.append(n)
        allocate(self, n, need_w)

    monkeypatch.setattr(chunked_head.Head, "_allocate", watched)
    model = GPT(ModelConfig(**SMALL), kernels=impl).train()
    loss = model(IDX, IDX)
    assert loss.shape == ()
    assert rows == [4]  # of 36
    assert model(IDX).shape == (3, 12, 61)  # logits on demand


def test_a_memory_budget_beside_dropout_is_refused() -> None:
    """torch.compile recomputes its own dropout with other masks: wrong gradients, silently."""
    model = GPT(ModelConfig(**SMALL, dropout=0.1))
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        with pytest.raises(ValueError, match=r"activation_memory_budget is 0\.5"):
            model.train()(IDX, IDX)
        model.eval()(IDX, IDX)
        GPT(ModelConfig(**SMALL, dropout=0.0)).train()(IDX, IDX)
