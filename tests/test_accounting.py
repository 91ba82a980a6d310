import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mypt_fast import accounting, presets
from mypt_fast.accounting import count_parameters, flops_per_token
from mypt_fast.config import ModelConfig

LLAMA = {"pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "tie_weights": True}
# MyPT specification 3.4: context, vocabulary, width, heads, layers, true parameter count
# (checked there by construction); the last rows are its toolchat and SFT models.
TRUE_COUNTS = {
    "micro": (64, 50304, 64, 4, 4, 6_692_352),
    "tiny": (128, 50304, 192, 4, 4, 21_168_384),
    "tiny_char": (128, 256, 192, 4, 4, 1_899_904),
    "small": (256, 50304, 384, 6, 6, 49_420_416),
    "small_char": (256, 256, 384, 6, 6, 10_933_504),
    "150M at 512": (512, 50304, 768, 12, 16, 191_068_800),
    "150M": (256, 50304, 768, 12, 16, 190_872_192),
    "200M": (256, 50304, 896, 14, 16, 244_695_936),
    "250M": (256, 50304, 1024, 16, 16, 304_811_136),
    "150M_1024": (1024, 50304, 768, 12, 16, 191_462_016),
    "200M_1024": (1024, 50304, 896, 14, 16, 245_384_064),
    "250M_1024": (1024, 50304, 1024, 16, 16, 305_597_568),
    "350M_1024": (1024, 50304, 1024, 16, 24, 406_334_592),
    "500M_1024": (1024, 50304, 1280, 16, 24, 602_277_504),
    "750M_1024": (1024, 50304, 1536, 24, 24, 835_969_152),
    "750M_1024_deep": (1024, 50304, 1152, 18, 36, 690_814_848),
    "750M_1024_reasoning": (1024, 50304, 1280, 20, 32, 759_656_064),
    "tiny_sft": (128, 50304, 384, 6, 6, 49_371_264),
    "toolchat": (512, 50304, 384, 6, 6, 49_518_720),
    "toolchat_150M": (512, 50304, 768, 12, 12, 162_729_600),
}
LLAMA_COUNTS = {
    "750M_unified_v1": (1024, 50304, 1280, 20, 32, 698_911_104),
    "phase1b_context_extension": (4096, 50304, 1280, 20, 32, 698_911_104),
}
OPTIONS = {
    "bias": (False, True),
    "tie_weights": (False, True),
    "pos_encoding": ("learned", "rope"),
    "mlp_type": ("gelu", "swiglu"),
    "norm_type": ("layernorm", "rmsnorm"),
}
COMBINATIONS = list(itertools.product(*OPTIONS.values()))


def config(T, V, C, H, L, **options):
    return ModelConfig(block_size=T, vocab_size=V, n_embd=C, n_head=H, n_layer=L, **options)


@pytest.mark.parametrize("name", TRUE_COUNTS)
def test_the_count_is_mypts_true_count(name):
    *shape, true = TRUE_COUNTS[name]
    assert count_parameters(config(*shape)).total == true


@pytest.mark.parametrize("name", LLAMA_COUNTS)
def test_the_count_of_a_llama_style_model_is_mypts_true_count(name):
    *shape, true = LLAMA_COUNTS[name]
    assert count_parameters(config(*shape, rope_scale=4.0, **LLAMA)).total == true


@pytest.mark.parametrize("name", [n for n in TRUE_COUNTS if (n + ".json") in
                                  {p.name for p in presets.shipped()}])  # fmt: skip
def test_a_shipped_preset_counts_as_mypts(name):
    assert count_parameters(presets.load(name).model).total == TRUE_COUNTS[name][-1]


@given(st.integers(1, 2000), st.integers(1, 60000), st.integers(1, 2048), st.integers(1, 64))
def test_the_count_is_the_closed_formula(T, V, C, L):
    """MyPT specification 2.7."""
    base = 2 * V * C + V + T * C + L * (12 * C * C + 9 * C) + 2 * C

    def total(**options):
        return count_parameters(config(T, V, C, 1, L, **options)).total

    hidden = accounting.swiglu_hidden(C)
    assert total() == base
    assert total(bias=True) == base + L * 4 * C
    assert total(tie_weights=True) == base - V * C
    assert total(pos_encoding="rope") == base - T * C
    assert total(norm_type="rmsnorm") == base - (2 * L + 1) * C
    assert total(mlp_type="swiglu") == base - L * (8 * C * C + 5 * C) + L * 3 * C * hidden


@pytest.mark.parametrize("values", COMBINATIONS, ids=lambda v: "-".join(map(str, v)))
def test_the_count_is_what_a_built_model_holds(values):
    from mypt_fast.model import GPT

    options = dict(zip(OPTIONS, values, strict=True))
    cfg = config(16, 101, 24, 2, 2, **options)
    named = dict(GPT(cfg).named_parameters())  # a shared matrix appears once
    n = count_parameters(cfg)
    assert sum(p.numel() for p in named.values()) == n.total

    def part(*words):
        return sum(p.numel() for k, p in named.items() if any(w in k for w in words))

    assert part("token_embedding") == n.token_embedding
    assert part("position_embedding") == n.position_embedding
    assert part(".sa.") == n.attention
    assert part(".fwd.") == n.mlp
    assert part(".ln1.", ".ln2.", "ln_f.") == n.norms
    assert part("lm_head") == n.lm_head


def test_swiglu_widths_are_mypts():
    """MyPT specification 2.1."""
    widths = {12: 64, 32: 128, 64: 192, 128: 384, 192: 512, 384: 1024, 512: 1408, 768: 2048,
              896: 2432, 1024: 2752, 1152: 3072, 1280: 3456, 1536: 4096}  # fmt: skip
    assert {C: accounting.swiglu_hidden(C) for C in widths} == widths


@pytest.mark.parametrize(("name", "gflops"), [("500M_1024", 3.41), ("base/750M_unified_v1", 4.44)])
def test_flops_per_token_are_those_of_the_literature(name, gflops):
    assert round(flops_per_token(presets.load(name).model) / 1e9, 2) == gflops


def test_flops_count_the_matmuls_and_half_the_attention_square():
    cfg = config(32, 100, 8, 2, 3)
    matmul = 3 * (4 * 8 * 8 + 8 * 8 * 8 + 5 * 8) + 100 * 8
    assert flops_per_token(cfg) == 6 * matmul + 6 * 3 * 8 * 32


def test_tying_saves_bytes_but_no_flops():
    plain, tied = config(32, 100, 8, 2, 3), config(32, 100, 8, 2, 3, tie_weights=True)
    assert flops_per_token(plain) == flops_per_token(tied)
    saved = accounting.state_bytes(plain).total - accounting.state_bytes(tied).total
    assert saved == 16 * 100 * 8


def test_state_is_sixteen_bytes_a_parameter():
    cfg = presets.load("500M_1024").model
    state, n = accounting.state_bytes(cfg), 602_277_504
    assert (state.weights, state.gradients, state.moments) == (4 * n, 4 * n, 8 * n)
    assert state.total == 16 * n


def test_mfu_is_model_flops_over_the_ceiling_and_knows_no_recomputing() -> None:
    cfg = ModelConfig(n_layer=4, n_embd=192, n_head=4, block_size=128, vocab_size=50304)
    # by hand, as PaLM does: 6 for each of 12 C^2 a block and V C, and 6 L C T for causal attention
    flops = 6 * (4 * 12 * 192**2 + 50304 * 192) + 6 * 4 * 192 * 128
    share = accounting.mfu(1000.0, flops_per_token(cfg), 0.5)
    assert share == pytest.approx(1000 * flops / 0.5e12, rel=1e-3)
    again = ModelConfig(**{**cfg.to_dict(), "use_checkpoint": True})
    assert accounting.mfu(1000.0, flops_per_token(again), 0.5) == share
