"""core.GPT against a plain reference, against its own caches, and against the interface of 1.3."""

import itertools
import json

import pytest
import reference
import torch
from core_models import IDX, LETTERS, LLAMA, MASK, OPTIONS, SEGMENTS, SIZES, TARGETS, char_model
from torch import nn

from mypt_fast import model as engine
from mypt_fast.attention import Segments
from mypt_fast.core import checkpoint
from mypt_fast.core.config import GPTConfig
from mypt_fast.core.model import GPT, Block, CausalSelfAttention, FeedForward, RMSNorm
from mypt_fast.core.model import SwiGLUFeedForward as Gated
from mypt_fast.core.tokenizer import Tokenizer

ALL = [
    dict(zip(("pos_encoding", "mlp_type", "norm_type", "bias", "tie_weights"), choice, strict=True))
    for choice in itertools.product(
        ("learned", "rope"), ("gelu", "swiglu"), ("layernorm", "rmsnorm"), (False, True),
        (False, True),
    )
]  # fmt: skip


def random_model(seed=0, **options):
    """Weights large enough that every part of the model shows in its output."""
    torch.manual_seed(seed)
    model = char_model(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch(B=3, T=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(13, (B, T), generator=g) for _ in range(2))
    return x, y, torch.rand(B, T, generator=g), torch.randint(3, (B, T), generator=g)


@pytest.mark.parametrize("options", ALL, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_logits_loss_and_gradients_are_the_references(options, packed):
    model = random_model(rope_scale=2.0, **options)
    x, y, mask, segments = batch()
    segments = segments if packed else None
    logits, loss, _ = model(x, y, loss_mask=mask, segment_ids=segments)
    loss.backward()
    named = dict(model.named_parameters())
    mine = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    state = dict(mine)
    if options["tie_weights"]:
        state["lm_head.weight"] = state["token_embedding_table.weight"]
    config = reference.default_config(rope_scale=2.0, **options)
    expected = reference.logits(state, config, x, segments)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    goal = reference.loss(expected, y, mask)
    torch.testing.assert_close(loss, goal, atol=1e-5, rtol=1e-5)
    goal.backward()
    for name, p in named.items():
        torch.testing.assert_close(p.grad, mine[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("case", OPTIONS)
def test_without_mask_the_loss_is_the_mean_and_the_fused_sum_agrees(case):
    model = random_model(**OPTIONS[case])
    x, y, mask, _ = batch()
    loss = model(x, y)[1]
    state = {n: p.detach() for n, p in model.state_dict().items()}
    config = reference.default_config(**OPTIONS[case])
    torch.testing.assert_close(loss, reference.loss(reference.logits(state, config, x), y))
    torch.testing.assert_close(model.summed_loss(x, y) / y.numel(), loss)
    weighted = model.summed_loss(x, y, mask) / mask.sum().clamp(min=1)
    torch.testing.assert_close(weighted, model(x, y, loss_mask=mask)[1])


def test_segment_ids_that_come_again_see_each_other_as_in_mypt():
    model = random_model()
    ids = torch.tensor([[0, 1, 1, 2, 1, 2, 0, 0]])
    state = dict(model.state_dict())
    expected = reference.logits(state, reference.default_config(), IDX, ids)
    torch.testing.assert_close(model(IDX, segment_ids=ids)[0], expected, atol=1e-5, rtol=1e-5)
    loss = model.as_engine()(idx=IDX, targets=TARGETS, segment_ids=ids)  # as `fit` trains
    torch.testing.assert_close(loss / 8, reference.loss(expected, TARGETS), atol=1e-5, rtol=1e-5)
    assert Segments.from_ids(SEGMENTS).allowed is None  # an ordinary batch has no dense mask
    assert Segments.from_ids(torch.tensor([[1, 1, 2], [2, 1, 1]])).allowed is None


def test_an_all_zero_mask_gives_exactly_zero_with_a_graph():
    model = char_model()
    loss = model(IDX, TARGETS, loss_mask=torch.zeros_like(MASK))[1]
    assert loss.item() == 0.0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
def test_masks_of_every_kind(kind):
    model = char_model()
    loss = model(IDX, TARGETS, loss_mask=(MASK > 0).to(kind))[1]
    each = [nn.functional.cross_entropy(model(IDX)[0][0, t], TARGETS[0, t]) for t in (4, 5, 6, 7)]
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_forward_returns_three_things_whatever_is_asked():
    model = char_model().eval()
    logits, loss, present = model(IDX)
    assert (loss, present) == (None, None)
    assert logits.dtype == torch.float32
    assert model(IDX, use_cache=True)[1] is None
    assert model(IDX, TARGETS)[1].shape == ()
    # a cache without use_cache is not read, and not written
    cache = [(torch.zeros(1, 2, 8, 6), torch.zeros(1, 2, 8, 6)) for _ in range(2)]
    torch.testing.assert_close(model(IDX, kv_cache=cache)[0], logits)
    assert not cache[0][0].any()


def test_in_bf16_the_loss_is_not_rounded_and_rotary_tables_stay_exact():
    model = random_model(**LLAMA)
    exact = model(IDX, TARGETS)[1]
    before = model.rope_cos.clone()
    model.to(torch.bfloat16)
    loss = model(IDX, TARGETS)[1]
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert loss.bfloat16().item() != loss.item()  # bf16 would have quantised it
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert torch.equal(model.rope_cos, before)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("cuts", [(8,), (5, 1, 1, 1), (3, 4, 1), (1,) * 8])
def test_both_caches_give_the_logits_of_one_pass(case, cuts):
    model = random_model(**OPTIONS[case]).eval()
    whole = model(IDX)[0]
    heads, size = 2, 6
    cache = [(torch.zeros(1, heads, 8, size), torch.zeros(1, heads, 8, size)) for _ in range(2)]
    past, at, joined, written = None, 0, [], []
    for part in IDX.split(list(cuts), 1):
        logits, _, past = model(part, past_kv=past, use_cache=True)
        joined.append(logits)
        logits, _, present = model(part, use_cache=True, kv_cache=cache, cache_pos=at)
        written.append(logits)
        at += part.shape[1]
        assert present[0] is cache
        assert present[1] == at
        assert [t.shape for t in past[0]] == [(1, heads, at, size)] * 2
    torch.testing.assert_close(torch.cat(joined, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(written, 1), whole, atol=1e-5, rtol=1e-5)
    for (k, v), (keys, values) in zip(past, cache, strict=True):
        torch.testing.assert_close(k, keys)  # written in place, in the caller's tensors
        torch.testing.assert_close(v, values)


@pytest.mark.parametrize("case", ["A", "D"])
def test_beyond_the_context_and_the_cache(case):
    model = char_model(**OPTIONS[case]).eval()
    long = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(IndexError, match=r"block_size=8.*found 9"):
        model(long)
    cache = [(torch.zeros(1, 2, 8, 6), torch.zeros(1, 2, 8, 6)) for _ in range(2)]
    with pytest.raises(ValueError, match="no room for 2 tokens at cache_pos 7"):
        model(IDX[:, :2], use_cache=True, kv_cache=cache, cache_pos=7)
    past = model(IDX, use_cache=True)[2]
    with pytest.raises(IndexError, match="found 9"):
        model(IDX[:, :1], past_kv=past, use_cache=True)
    assert not cache[0][0].any()  # nothing was written


def test_the_global_generator_decides_the_initial_weights():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(char_model().lm_head.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(char_model().lm_head.weight, char_model().lm_head.weight)


def test_the_distributions_of_2_2():
    torch.manual_seed(0)
    config = GPTConfig(n_embd=128, n_head=4, n_layer=8, vocab_size=500, block_size=64, device="cpu")
    model = GPT(config, token_kind="char")
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1.0 if "ln" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            scaled = 0.02 / 4 if name.endswith("net.2.weight") else 0.02
            assert p.std().item() == pytest.approx(scaled, rel=0.05), name


def test_attributes_that_scripts_read():
    learned = char_model(**OPTIONS["A"])
    rope = char_model(**OPTIONS["C"])
    assert hasattr(learned, "position_embedding_table")
    assert not hasattr(rope, "position_embedding_table")
    assert (learned._use_rope, rope._use_rope) == (False, True)
    assert not hasattr(learned, "rope_cos")
    assert rope.rope_cos.shape == rope.rope_sin.shape == (8, 3)
    assert "rope_cos" not in rope.state_dict()
    assert isinstance(learned.token_embedding_table, nn.Embedding)
    block = rope.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.sa, CausalSelfAttention)
    assert isinstance(block.fwd, Gated)
    assert isinstance(learned.blocks[0].fwd, FeedForward)
    assert isinstance(block.ln1, RMSNorm)
    assert isinstance(rope.ln_f, RMSNorm)
    assert block.use_checkpoint is False
    assert char_model(dropout=0.3).blocks[0].sa.dropout_p == 0.3
    assert rope.lm_head.weight is rope.token_embedding_table.weight
    assert {"lm_head.weight", "token_embedding_table.weight"} <= set(rope.state_dict())


def test_the_keys_of_2_5_in_their_order():
    keys = list(char_model(n_layer=1, bias=True).state_dict())
    inner = "sa.qkv.weight sa.qkv.bias sa.proj.weight sa.proj.bias fwd.net.0.weight fwd.net.0.bias"
    inner += " fwd.net.2.weight fwd.net.2.bias ln1.weight ln1.bias ln2.weight ln2.bias"
    assert keys == [
        "token_embedding_table.weight", "position_embedding_table.weight",
        *(f"blocks.0.{k}" for k in inner.split()),
        "ln_f.weight", "ln_f.bias", "lm_head.weight", "lm_head.bias",
    ]  # fmt: skip


def test_unknown_options_fall_back_to_the_defaults_silently():
    torch.manual_seed(0)
    odd = char_model(mlp_type="relu2", norm_type="none", pos_encoding="alibi")
    torch.manual_seed(0)
    plain = char_model()
    assert torch.equal(odd(IDX)[0], plain(IDX)[0])
    assert hasattr(odd, "position_embedding_table")


def test_heads_that_do_not_divide_the_width_are_the_only_thing_checked():
    with pytest.raises(AssertionError, match="n_embd must be divisible by n_head; found 12 and 5"):
        char_model(n_head=5)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_checkpointing_and_noise_only_in_training(options, recompute):
    model = char_model(dropout=0.4, use_checkpoint=recompute, neftune_alpha=5.0, **options)
    model.train()
    torch.manual_seed(3)
    a = model(IDX, TARGETS)[1]
    torch.manual_seed(3)
    again = model(IDX, TARGETS)[1]
    other = model(IDX, TARGETS)[1]
    assert a.item() == again.item() != other.item()
    a.backward()
    model.eval()
    assert torch.equal(model(IDX)[0], model(IDX)[0])


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = random_model(use_checkpoint=recompute)
        model(IDX, TARGETS, segment_ids=SEGMENTS)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_engine_sees_the_same_model_and_never_makes_all_logits(monkeypatch):
    model = random_model(**OPTIONS["C"])
    twin = model.as_engine()
    assert type(twin) is engine.GPT
    assert twin.lm_head is model.lm_head
    loss = twin(idx=IDX, targets=TARGETS, segment_ids=SEGMENTS)
    torch.testing.assert_close(loss / 8, model(IDX, TARGETS, segment_ids=SEGMENTS)[1])
    model.eval()
    assert not twin.training
    shapes = []
    head = type(model.lm_head).forward
    monkeypatch.setattr(
        type(model.lm_head), "forward", lambda m, x: shapes.append(x.shape) or head(m, x)
    )
    model.summed_loss(IDX, TARGETS).backward()
    heads = [s for s in shapes if s[-1] == 12 and len(s) == 3 and s[1] == 8]
    assert model.lm_head.weight.grad is not None
    assert len(heads) == 2 * len(model.blocks)  # qkv and proj of each block, not the head


def test_modules_alone_are_those_of_the_model():
    model = random_model(**OPTIONS["D"], dropout=0.0).eval()
    x = torch.randn(2, 5, 12)
    block = model.blocks[0]
    y, present = block.sa(x)
    assert present is None
    _, (k, v) = block.sa(x, use_cache=True)
    assert k.shape == v.shape == (2, 2, 5, 6)
    half = block.sa(x[:, :3], use_cache=True)
    rest = block.sa(x[:, 3:], past_kv=half[1], use_cache=True)
    torch.testing.assert_close(torch.cat([half[0], rest[0]], 1), y)
    cache = (torch.zeros(2, 2, 8, 6), torch.zeros(2, 2, 8, 6))
    half = block.sa(x[:, :3], use_cache=True, kv_cache=cache)[0]
    rest, present = block.sa(x[:, 3:], use_cache=True, kv_cache=cache, cache_pos=3)
    assert present is cache
    torch.testing.assert_close(torch.cat([half, rest], 1), y)
    # blocks called one by one, as a script that traces a model does it
    h = model.token_embedding_table(IDX)
    for b in model.blocks:
        h, _ = b(h)
    torch.testing.assert_close(model.lm_head(model.ln_f(h)), model(IDX)[0])
    h = model.token_embedding_table(IDX)
    for b in model.blocks:
        h, _ = b(h, segment_ids=SEGMENTS)
    packed = model(IDX, segment_ids=SEGMENTS)[0]
    torch.testing.assert_close(model.lm_head(model.ln_f(h)), packed)


def test_a_block_alone_runs_again_where_its_config_or_a_script_says_so(monkeypatch):
    runs, forward = [], CausalSelfAttention.forward
    monkeypatch.setattr(
        CausalSelfAttention, "forward", lambda *args: runs.append(1) or forward(*args)
    )
    x, found = torch.randn(2, 8, 12), []
    for on in (True, False):
        torch.manual_seed(0)
        block = Block(GPTConfig(**{**SIZES, "dropout": 0.3}, use_checkpoint=on))
        assert block.use_checkpoint is on
        block.use_checkpoint = not on
        block.sa.dropout_p = 0.2
        runs.clear()
        y, present = block(x)
        y.square().sum().backward()
        assert present is None
        assert len(runs) == (1 if on else 2)
        found.append([p.grad for p in block.parameters()])
        block.eval()
        block(x)
        assert len(runs) == (2 if on else 3)
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)


def test_a_cache_given_to_attention_without_use_cache():
    attention = CausalSelfAttention(GPTConfig(**SIZES))
    cache = (torch.zeros(1, 2, 8, 6), torch.zeros(1, 2, 8, 6))
    with pytest.raises(ValueError, match="kv_cache needs use_cache=True"):
        attention(torch.randn(1, 3, 12), kv_cache=cache)
    with pytest.raises(ValueError, match="no room for 3 tokens at cache_pos 6"):
        attention(torch.randn(1, 3, 12), use_cache=True, kv_cache=cache, cache_pos=6)


@pytest.mark.parametrize("part", [CausalSelfAttention, Block, FeedForward, Gated])
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_a_part_built_alone_has_weights_and_learns(part, options):
    torch.manual_seed(0)
    module = part(GPTConfig(**{**SIZES, **options}))
    x = torch.randn(2, 8, 12)
    y = module(x)
    y = y if part in (FeedForward, Gated) else y[0]
    assert y.shape == x.shape
    assert y.isfinite().all()
    y.square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        if p.dim() == 2:
            assert 0 < p.std() < 1, name


def test_rms_norm_alone():
    x = torch.randn(4, 16)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(16)(x), expected)
    assert not torch.allclose(RMSNorm(16, 1.0)(x), expected)


def test_hooks_see_every_part_and_change_nothing():
    model = random_model(**OPTIONS["D"]).eval()
    plain, seen = model(IDX)[0], {}
    watched = {f"{n}": m for n, m in model.named_modules() if n and "fwd.net" not in n}
    for name, module in watched.items():
        module.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, o))
    torch.testing.assert_close(model(IDX)[0], plain)
    assert set(seen) == {n for n in watched if n != "blocks"}
    stream, present = seen["blocks.1"]
    assert present is None
    torch.testing.assert_close(model.ln_f(stream), seen["ln_f"])


def test_encode_and_decode_are_the_tokenizers():
    model = char_model()
    assert model.encode("bad") == [1, 0, 3]
    assert model.decode([1, 0, 3]) == "bad"
    assert model.decode(torch.tensor([1, 0, 3])) == "bad"


def test_create_model(tmp_path):
    with torch.device("meta"):
        model = checkpoint.GPT(GPTConfig(device="cpu"))
    assert sum(p.numel() for p in model.parameters()) == 49_420_416
    assert model.tokenizer.token_kind == "gpt2"
    small = checkpoint.create_model(1, 2, 8, 16, 0.0, True, device="cpu")
    assert small.config.vocab_size == 50304
    assert small.blocks[0].sa.qkv.bias is not None
    assert json.loads(json.dumps(small.config.to_dict()))["device"] == "cpu"


def test_without_a_tokenizer_a_small_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size >= 50276; found 13"):
        GPT(GPTConfig(**SIZES))
    model = GPT(GPTConfig(**SIZES), token_kind="char")
    assert model.tokenizer.token_kind == "char"
    assert isinstance(model.tokenizer, Tokenizer)
    assert len(LETTERS) == 13


def test_layer_norms_are_torch_s():
    model = char_model()
    norms = [model.ln_f, *(norm for block in model.blocks for norm in (block.ln1, block.ln2))]
    assert all(isinstance(norm, nn.LayerNorm) and norm.eps == 1e-5 for norm in norms)
    assert not any(isinstance(m, nn.LayerNorm) for m in char_model(**LLAMA).modules())
