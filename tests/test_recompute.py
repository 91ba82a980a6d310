"""Recompute policies: the same loss and gradients, whatever the backward makes again."""

import contextlib
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mypt_fast.config import ModelConfig
from mypt_fast.kernels import dropped_attention
from mypt_fast.model import GPT
from mypt_fast.recompute import POLICIES, Host

SMALL = {"vocab_size": 61, "block_size": 12, "n_embd": 32, "n_head": 2, "n_layer": 3}
LLAMA = {
    "pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "tie_weights": True,
}  # fmt: skip
STYLES = {"gpt2": {"bias": True}, "llama": LLAMA}
IDX = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[1] * 5 + [2] * 7, [1] * 12, [1] * 3 + [2] * 4 + [3] * 5])
# torch.compile's own, about an autograd.Function that it traces
DYNAMO = "ignore:.*should not be instantiated:DeprecationWarning"
REMADE = [p for p in POLICIES if p != "none"]
TWICE = ("block", "offload")  # blocks whose forward the backward runs again


@dataclasses.dataclass
class Attention:
    """Strips that a layer's attention with dropout has, 0: none; how many masks of them it drew."""

    strips: int
    drawn: int = 0


@pytest.fixture(params=[0, 3], ids=["squares", "strips"])
def attention(request, monkeypatch):
    """PyTorch's as short rows have it, and in strips as long ones do: three, the last one short."""
    here, draw = Attention(request.param), dropped_attention._keep_

    def counted(keep, p):
        here.drawn += 1
        draw(keep, p)

    monkeypatch.setattr(dropped_attention, "_keep_", counted)
    if here.strips:
        monkeypatch.setattr(dropped_attention, "LEAST_LENGTH", SMALL["block_size"])
        monkeypatch.setattr(dropped_attention, "STRIP", 5)
    torch._dynamo.reset()  # a graph holds the sizes of its strips, and nothing compares them
    yield here
    torch._dynamo.reset()


def step(style, policy, *, dropout=0.0, bf16=False, kernels="auto", segments=None, change=None):
    """Loss and gradients of one step."""
    model = GPT(ModelConfig(**SMALL, **STYLES[style], dropout=dropout), 0, kernels, policy).train()
    if change is not None:
        change(model)
    torch.manual_seed(1)
    on = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    with on:
        loss = model(IDX, IDX.roll(-1, 1), segment_ids=segments) / IDX.numel()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_close(found, wanted, rtol=2e-5):
    for a, e in zip(found, wanted, strict=True):
        assert a.dtype is e.dtype
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol * float(e.abs().max()) + 1e-9)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("policy", REMADE)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_every_policy_has_the_gradients_of_none(style, policy, segments):
    assert_close(step(style, policy, segments=segments), step(style, "none", segments=segments))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("policy", TWICE)
def test_blocks_that_run_twice_draw_the_same_dropout(style, policy, attention):
    """Bit for bit: the order of draws is that of a plain forward."""
    want = step(style, "none", dropout=0.3)
    for a, b in zip(step(style, policy, dropout=0.3), want, strict=True):
        assert torch.equal(a, b)
    assert attention.drawn == attention.strips * SMALL["n_layer"] * (1 + 2)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.usefixtures("attention")
def test_norms_that_are_made_again_draw_the_same_dropout(style):
    """From seeds, as the operators with everything kept draw it."""
    want = step(style, "none", dropout=0.3, kernels="reference")
    for policy in ("norms", "mlp"):
        assert_close(step(style, policy, dropout=0.3, kernels="reference"), want)
        assert_close(step(style, policy, dropout=0.3), want)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("policy", REMADE)
def test_mixed_precision_is_as_good_as_with_everything_kept(style, policy):
    truth = step(style, "none")
    plain, again = step(style, "none", bf16=True), step(style, policy, bf16=True)
    assert abs(again[0] - truth[0]) <= 1e-4 * truth[0]  # one number's error is luck
    for a, b, t in zip(again[1:], plain[1:], truth[1:], strict=True):
        assert a.dtype is torch.float32
        assert (a - t).norm() <= 1.5 * (b - t).norm() + 1e-6 * t.norm()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_16_bit_residual_stream_trains_everything(style, policy):
    def narrow(model):
        model.residual = torch.bfloat16

    found, truth = step(style, policy, bf16=True, change=narrow), step(style, "none")
    for a, t in zip(found, truth, strict=True):
        assert a.dtype is torch.float32
        assert (a - t).norm() <= 0.05 * t.norm()


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_blocks(policy):
    def freeze(model):
        model.blocks[0].requires_grad_(False)
        model.token_embedding_table.requires_grad_(False)

    assert_close(step("gpt2", policy, change=freeze), step("gpt2", "none", change=freeze))


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_knows_no_policy(policy):
    cfg = ModelConfig(**SMALL, **LLAMA, dropout=0.5)
    model, plain = GPT(cfg, 0, recompute=policy).eval(), GPT(cfg, 0).eval()
    assert torch.equal(model(IDX), plain(IDX))


def test_use_checkpoint_is_the_policy_block():
    cfg = ModelConfig(**SMALL, use_checkpoint=True)
    assert GPT(cfg).recompute == "block"
    assert GPT(cfg, recompute="norms").recompute == "norms"
    assert GPT(dataclasses.replace(cfg, use_checkpoint=False)).recompute == "none"


def wide(model):
    """In fp64, but for the rotary tables."""
    tables = {name: b.clone() for name, b in model.named_buffers()}
    model.double()
    for name, table in tables.items():
        setattr(model, name, table)
    return model.train()


def slope_and_difference(model, hidden=None, idx=IDX):
    """d loss along a random direction of all weights: by gradients, and by a central difference."""
    if hidden is not None:
        model.hidden = hidden

    def loss():
        torch.manual_seed(3)
        return model(idx, idx.roll(-1, 1)) / idx.numel()

    loss().backward()
    parameters = list(model.parameters())
    draw = torch.Generator().manual_seed(5)
    ways = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, ways, strict=True))
    ends = []
    for by in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(parameters, ways, strict=True):
                p += by * d
        ends.append(loss().item())
    return float(slope), (ends[0] - ends[1]) / 2e-6


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("style", STYLES)
def test_finite_differences_agree_beside_dropout(style, policy, attention):
    """In fp64: whatever is made again was drawn with the masks of the forward."""
    cfg = ModelConfig(**{**SMALL, "n_layer": 2}, **STYLES[style], dropout=0.3)
    model = wide(GPT(cfg, 0, "reference", policy))
    slope, difference = slope_and_difference(model)
    assert difference == pytest.approx(slope, rel=1e-5)
    assert attention.drawn == attention.strips * cfg.n_layer * (3 + (policy in TWICE))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["block", "attention"])
def test_finite_differences_agree_where_a_probability_is_set_beside_the_config(where, policy):
    cfg = ModelConfig(**{**SMALL, "n_layer": 2}, dropout=0.0)
    model = wide(GPT(cfg, 0, "reference", policy))
    part = model.blocks[1] if where == "block" else model.blocks[1].sa
    part.dropout = 0.3
    slope, difference = slope_and_difference(model)
    assert difference == pytest.approx(slope, rel=1e-5)
    slopes = [slope]
    part.dropout = 0.0
    model.zero_grad()
    slopes.append(slope_and_difference(model)[0])
    assert slopes[0] != pytest.approx(slopes[1], rel=1e-3)  # it was dropped


@pytest.mark.slow
@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.parametrize("policy", ["norms", "mlp", "block"])
@pytest.mark.parametrize("style", STYLES)
def test_finite_differences_agree_where_the_model_is_one_graph(style, policy, attention):
    torch._dynamo.reset()
    cfg = ModelConfig(**{**SMALL, "n_layer": 2}, **STYLES[style], dropout=0.3)
    model = wide(GPT(cfg, 0, recompute=policy))
    compiled = torch.compile(model.hidden, fullgraph=True, backend="aot_eager")
    slope, difference = slope_and_difference(model, compiled)
    assert difference == pytest.approx(slope, rel=1e-5)
    assert attention.drawn == attention.strips * cfg.n_layer * (3 + (policy in TWICE))


@pytest.fixture
def aot_eager(monkeypatch):
    """`GPT.compile_blocks` with a backend that is fast to compile; what it was called for."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: original(f, fullgraph=True, backend=counter))
    return counter


@pytest.mark.filterwarnings(DYNAMO, "ignore:The .grad attribute of a Tensor")  # hidden by torch
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("style", STYLES)
def test_finite_differences_agree_where_blocks_are_compiled(style, policy, aot_eager, attention):
    """Dropout repeats its masks, and layers share a graph: of the first block and of the others."""
    cfg = ModelConfig(**SMALL, **STYLES[style], dropout=0.3)
    model = wide(GPT(cfg, 0, recompute=policy))
    model.compile_blocks()
    slope, difference = slope_and_difference(model)
    assert difference == pytest.approx(slope, rel=1e-5)
    assert aot_eager.frame_count == (1 if policy in TWICE else 2)
    assert attention.drawn == attention.strips * cfg.n_layer * (3 + (policy in TWICE))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    DYNAMO, "ignore:The .grad attribute of a Tensor", "ignore:.*torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("attention", [3], ids=["strips"], indirect=True)
@pytest.mark.parametrize("policy", ["none", "block"])
def test_finite_differences_agree_of_one_sequence_that_inductor_compiles(policy, attention):
    """Inductor holds an operator to the strides it promised; of one row, heads are views."""
    cfg = ModelConfig(**SMALL, bias=True, dropout=0.3)
    model = wide(GPT(cfg, 0, recompute=policy))
    model.compile_blocks()
    slope, difference = slope_and_difference(model, idx=IDX[:1])
    assert difference == pytest.approx(slope, rel=1e-5)
    assert attention.drawn == attention.strips * cfg.n_layer * (3 + (policy in TWICE))


def test_tensors_come_back_from_host_memory_in_any_order():
    host = Host(torch.device("cpu"))
    tensors = [torch.randn(5, 3) for _ in range(4)]
    kept = [host.take(t) for t in tensors]
    assert all(k.host.data_ptr() != t.data_ptr() for k, t in zip(kept, tensors, strict=True))
    for i in (3, 2, 0, 1):
        assert torch.equal(host.give(kept[i]), tensors[i])
    weight = torch.nn.Parameter(torch.ones(2))
    assert host.give(host.take(weight)) is weight
