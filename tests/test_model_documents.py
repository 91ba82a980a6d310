"""Documents in a row: each computes what it computes alone, and nothing is T x T."""

import inspect
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mypt_fast import attention
from mypt_fast.attention import KVCache, Segments
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT

SMALL = {
    "vocab_size": 31,
    "block_size": 16,
    "n_embd": 24,
    "n_head": 2,
    "n_layer": 2,
    "dropout": 0.0,
}
STYLES = {
    "gpt2": {"bias": True},
    "llama": {
        "pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "tie_weights": True,
    },
}  # fmt: skip
# torch.compile's own, about an autograd.Function that it traces
DYNAMO = "ignore:.*should not be instantiated:DeprecationWarning"
IDS = torch.tensor([[1] * 5 + [2] + [3] * 10, [1] * 9 + [2] * 4 + [0] * 3, [1] * 16])
IDX = torch.randint(31, (3, 16), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(31, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


def gpt(style=STYLES["llama"], dtype=torch.float32, seed=3, **options) -> GPT:
    model = GPT(ModelConfig(**{**SMALL, **style, **options}), seed=seed)
    with torch.no_grad():  # far from its beginning, where attention hardly matters
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    for p in model.parameters():  # not the tables of rope, which stay fp32
        p.data = p.data.to(dtype)
    return model


def documents_of(ids):
    """(row, slice) of each document."""
    for row in range(len(ids)):
        for number in range(1, int(ids[row].max()) + 1):
            where = (ids[row] == number).nonzero().flatten().tolist()
            yield row, slice(where[0], where[-1] + 1)


def gradients(model: GPT) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_document_in_a_row_is_a_document_alone(style, dtype, within, checkpointed) -> None:
    model = gpt(style, dtype, use_checkpoint=checkpointed).train()
    logits = model(IDX, segment_ids=IDS)
    loss = model(IDX, TARGETS, loss_mask=IDS > 0, segment_ids=IDS)
    loss.backward()
    packed, total = gradients(model), 0.0
    for row, where in documents_of(IDS):
        alone, targets = IDX[None, row, where], TARGETS[None, row, where]
        torch.testing.assert_close(logits[None, row, where], model(alone), atol=within, rtol=within)
        part = model(alone, targets)
        part.backward()
        total += part.item()
    assert loss.item() == pytest.approx(total, rel=within)
    for a, b in zip(packed, gradients(model), strict=True):
        torch.testing.assert_close(a, b, atol=within * b.abs().max().item(), rtol=10 * within)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_token_changes_no_logit_of_another_document(style, dropout) -> None:
    model = gpt(style, dropout=dropout).train()

    def logits(idx):
        torch.manual_seed(0)
        return model(idx, segment_ids=IDS)

    before = logits(IDX)
    for row, where in documents_of(IDS):
        for position in (where.start, where.stop - 1):
            changed = IDX.clone()
            changed[row, position] = (changed[row, position] + 1) % 31
            moved = (logits(changed) != before).any(-1)
            expected = torch.zeros_like(moved)
            expected[row, position : where.stop] = True
            assert torch.equal(moved, expected)


def test_the_loss_is_the_mean_over_the_tokens_that_count(style) -> None:
    model = gpt(style, torch.float64)
    valid = IDS > 0
    by_hand = [
        F.cross_entropy(model(IDX[None, r, w])[0, t], TARGETS[r, w][t]).item()
        for r, w in documents_of(IDS)
        for t in range(w.stop - w.start)
    ]
    loss = model(IDX, TARGETS, loss_mask=valid, segment_ids=IDS) / valid.sum()
    assert len(by_hand) == valid.sum() == 45
    assert loss.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_padding_is_finite_weighs_nothing_and_moves_nothing(style, dropout) -> None:
    model = gpt(style, dropout=dropout).train()
    ids = torch.cat([IDS[1:2], torch.zeros_like(IDS[:1])])  # one row is padding alone

    def step(idx):
        torch.manual_seed(0)
        loss = model(idx, TARGETS[:2], loss_mask=ids > 0, segment_ids=ids)
        loss.backward()
        return loss.detach(), gradients(model)

    loss, grads = step(IDX[:2])
    changed = IDX[:2].where(ids > 0, 7)
    again, moved = step(changed)
    assert loss == again
    for a, b in zip(grads, moved, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    nothing = model(IDX[:1], TARGETS[:1], loss_mask=torch.zeros(1, 16), segment_ids=ids[1:])
    nothing.backward()
    assert nothing.item() == 0
    assert not any(g.any() for g in gradients(model))


def test_positions_stay_those_of_the_row_where_resetting_is_off(style) -> None:
    whole, absolute = gpt(style), gpt(style, segment_position_reset=False)
    ids = torch.ones_like(IDS)
    torch.testing.assert_close(absolute(IDX, segment_ids=ids), whole(IDX))
    torch.testing.assert_close(whole(IDX, segment_ids=ids), whole(IDX))
    if style == STYLES["gpt2"]:  # a rotation is relative: only learned positions can tell
        assert not torch.allclose(absolute(IDX, segment_ids=IDS), whole(IDX, segment_ids=IDS))


def test_attention_equals_that_under_a_mask() -> None:
    segments = Segments.from_ids(IDS)
    q, k, v = (torch.randn(3, 2, 16, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    mask = (IDS[:, None] == IDS[:, :, None]).tril()[:, None]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = attention.attend(q, k, v, segments, 0.0)
    torch.testing.assert_close(found, wanted)
    assert found.transpose(1, 2).is_contiguous()  # the projection needs no copy
    weights = torch.randn_like(wanted)
    grads = [torch.autograd.grad(y, (q, k, v), weights) for y in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_dropout_drops_weights_and_only_in_training(monkeypatch) -> None:
    alone = Segments.from_ids(torch.arange(400).expand(3, 400))  # each token sees itself
    ones = torch.ones(3, 2, 400, 4)
    torch.manual_seed(0)
    dropped = attention.attend(ones, ones, ones, alone, 0.25)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    given = []

    def watched(q, k, v, segments, dropout_p):
        given.append(dropout_p)
        return attention.attend(q, k, v, segments, dropout_p)

    monkeypatch.setattr("mypt_fast.block.attend", watched)
    model = gpt(dropout=0.25)
    model.train()(IDX, segment_ids=IDS)
    model.eval()(IDX, segment_ids=IDS)
    assert given == [0.25, 0.25, 0, 0]


def test_segments_are_cut_at_rows_and_where_ids_change() -> None:
    segments = Segments.from_ids(IDS)
    assert segments.cu_seqlens.tolist() == [0, 5, 6, 16, 25, 29, 32, 48]
    assert segments.cu_seqlens.dtype is torch.int32
    assert segments.lengths == (5, 1, 10, 9, 4, 3, 16)
    assert segments.positions[1].tolist() == [*range(9), *range(4), *range(3)]


class Largest(TorchDispatchMode):
    """The most elements that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_is_as_large_as_a_mask_of_a_long_row(style, checkpointed) -> None:
    T = 2048
    options = {"block_size": T, "n_embd": 16, "n_layer": 1, "use_checkpoint": checkpointed}
    model = gpt(style, **options).train()
    for lengths in ((700, 1, 1000, 347), (T,)):
        ids = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.tensor(lengths))[None]
        with Largest() as seen:
            idx = torch.zeros_like(ids)
            model(idx, idx, loss_mask=torch.ones(1, T), segment_ids=ids).backward()
        assert 16 * T <= seen.numel < T * T // 8


def test_what_does_not_fit_is_refused() -> None:
    model = gpt()
    with pytest.raises(ValueError, match=r"a batch \(2, 16\); found \(3, 16\)"):
        model(IDX[:2], documents=Segments.from_ids(IDS))
    with pytest.raises(ValueError, match="documents or a cache"):
        model(IDX, segment_ids=IDS, cache=KVCache(model.config, 3, model.ln_f.weight))


def boundaries(count: int) -> Segments:
    """Segments of three rows, each of `count` and the rest."""
    return Segments.from_ids((torch.arange(16) < count).long().expand(3, 16))


@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor:UserWarning")  # dynamo's, at a graph break
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_on_a_cpu_it_is_the_same_and_compiled_once(style, checkpointed) -> None:
    torch._dynamo.reset()
    model = gpt(style, use_checkpoint=checkpointed).train()
    plain, counter = model.hidden, CompileCounterWithBackend("aot_eager")
    compiled, frames = torch.compile(plain, backend=counter), []
    for segments in (Segments.from_ids(IDS), *map(boundaries, range(3, 6))):
        results = []
        for model.hidden in (plain, compiled):
            loss = model(IDX, TARGETS, documents=segments)
            loss.backward()
            results.append([loss.detach(), *gradients(model)])
        frames.append(counter.frame_count)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert frames[-1] == frames[1]  # other boundaries are no reason to compile again


# the flash path, which only a GPU can run: its arguments, its layout and its graph


def emulated(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), **rest):
    """What varlen_attn computes, segment by segment."""
    assert not rest
    assert window_size == (-1, 0)  # causal
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k >= cu_seq_q.diff().max()
    assert all(t.is_contiguous() and t.dim() == 3 for t in (query, key, value))
    parts = []
    for a, b in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (t[a:b].transpose(0, 1) for t in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


def test_the_flash_path_gives_what_the_segments_give(style, monkeypatch) -> None:
    model = gpt(style)
    wanted = model(IDX, segment_ids=IDS)
    kernel = mock.create_autospec(varlen.varlen_attn, side_effect=emulated)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "has_flash", lambda q, p: True)
    torch.testing.assert_close(model(IDX, segment_ids=IDS), wanted)
    assert kernel.call_count == SMALL["n_layer"]


def test_the_flash_path_traces_forward_and_backward_in_shapes_alone(monkeypatch) -> None:
    monkeypatch.setattr(attention, "has_flash", lambda q, p: True)
    with FakeTensorMode():
        qkv = torch.empty(3, 16, 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        cu_seqlens = torch.empty(8, dtype=torch.int32)
        segments = Segments(cu_seqlens, torch.empty(3, 16, dtype=torch.int64), ())
        y = attention.attend(q, k, v, segments, 0.0)
        assert (y.shape, y.dtype) == ((3, 2, 16, 8), torch.bfloat16)
        assert y.transpose(1, 2).is_contiguous()
        y.sum().backward()
        assert qkv.grad.shape == qkv.shape


@pytest.mark.filterwarnings(DYNAMO)
def test_the_flash_path_is_one_graph_whatever_the_boundaries(style, monkeypatch) -> None:
    monkeypatch.setattr(attention, "has_flash", lambda q, p: True)
    torch._dynamo.reset()
    graphs = []

    def capture(graph, example):
        graphs.append(graph)
        return lambda *_: (torch.zeros(3, 16, 24),)  # the kernel itself needs a GPU

    hidden = torch.compile(gpt(style, torch.bfloat16).hidden, fullgraph=True, backend=capture)
    for segments in (Segments.from_ids(IDS), *map(boundaries, (3, 3, 4, 16, 5))):
        hidden(IDX, segments)
    assert len(graphs) == 2  # the second time, with a number of documents that varies
    for graph in graphs:
        calls = [n for n in graph.graph.nodes if "varlen" in str(n.target)]
        assert len(calls) == SMALL["n_layer"]


def test_the_flash_kernel_is_taken_where_it_can_run(monkeypatch) -> None:
    def query(device="cuda", dtype=torch.bfloat16, size=64):
        return mock.Mock(device=torch.device(device), dtype=dtype, shape=(1, 2, 8, size))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert attention.has_flash(query(), 0.0)
    assert attention.has_flash(query(dtype=torch.float16), 0.0)
    assert not attention.has_flash(query(), 0.1)
    assert not attention.has_flash(query("cpu"), 0.0)
    assert not attention.has_flash(query(dtype=torch.float32), 0.0)
    assert not attention.has_flash(query(size=20), 0.0)
    assert not attention.has_flash(query(size=200), 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not attention.has_flash(query(), 0.0)
    names = inspect.signature(varlen.varlen_attn).parameters
    assert {"cu_seq_q", "cu_seq_k", "max_q", "max_k", "window_size"} <= set(names)
