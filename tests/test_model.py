"""The model against the vectors of the MyPT specification, and against itself."""

import math

import pytest
import torch

from mypt_fast import kernels
from mypt_fast.attention import KVCache, segment_positions
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT

BASE = {"vocab_size": 13, "block_size": 8, "n_embd": 12, "n_head": 2, "n_layer": 2, "dropout": 0.0}
LLAMA = {"pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm"}
# options, parameters, tensors, losses (plain, masked, packed), logits, packed logits, greedy text
CASES: dict[str, tuple] = {
    "A": (
        {},
        4117,
        26,
        (2.702764, 2.656413, 2.685218),
        (-0.34295, 0.12556, 0.70120, -0.58204),
        (0.23448, -0.14777, 0.40764),
        "bfjlcclc",
    ),
    "B": (
        {"bias": True},
        4213,
        30,
        (2.553951, 2.531758, 2.545043),
        (0.05961, -0.33438, 0.65646, 0.16499),
        (0.48736, 0.51400, -0.65240),
        "bfjmbldb",
    ),
    "C": (
        {**LLAMA, "tie_weights": True},
        5989,
        17,
        (2.648438, 2.177279, 2.664794),
        (-0.57194, 0.92758, -0.19559, -0.88057),
        (0.93580, 0.28475, -1.03571),
        "bfjjjjjj",
    ),
    "D": (
        {"pos_encoding": "rope", "rope_theta": 500.0, "rope_scale": 4.0},
        4021,
        25,
        (2.687072, 2.752378, 2.685903),
        (-0.55088, 0.07934, 0.75172, -0.36738),
        (-0.78954, 0.71010, 0.33529),
        "bfjkcccc",
    ),
    "E": (
        {"mlp_type": "swiglu", "norm_type": "rmsnorm", "segment_position_reset": False},
        6241,
        19,
        (2.707932, 3.254025, 2.680389),
        (0.67364, -0.75902, -0.29793, 0.94997),
        (-1.22092, 0.37426, 0.41962),
        "bfjefmef",
    ),
}
IDX = torch.tensor([[1, 5, 9, 2, 0, 12, 3, 7]])
TARGETS = torch.tensor([[5, 9, 2, 0, 12, 3, 7, 1]])
MASK = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0]])


def filled(**options: object) -> GPT:
    """The model of specification 12.2: every parameter a known sine."""
    model = GPT(ModelConfig(**{**BASE, **options})).eval()
    for k, (name, p) in enumerate(model.named_parameters()):
        i = torch.arange(p.numel(), dtype=torch.float64)
        v = torch.sin(0.7 * i + 1.3 * k + 0.1)
        norm = "ln" in name and name.endswith("weight")
        p.data = (1 + 0.1 * v if norm else 0.2 * v).float().view_as(p)
    if model.config.tie_weights:
        model.lm_head.weight = model.token_embedding_table.weight
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_losses_match_the_specification(case: str) -> None:
    options, n_params, n_tensors, losses, last, packed, _ = CASES[case]
    model = filled(**options)
    params = dict(model.named_parameters())
    assert sum(p.numel() for p in params.values()) == n_params
    assert len(params) == n_tensors
    with torch.no_grad():
        logits = model(IDX)
        torch.testing.assert_close(logits[0, -1, :4], torch.tensor(last), atol=1e-5, rtol=0)
        packed_logits = model(IDX, segment_ids=SEGMENTS)
        torch.testing.assert_close(packed_logits[0, 5, :3], torch.tensor(packed), atol=1e-5, rtol=0)
        plain = model(IDX, TARGETS) / 8
        masked = model(IDX, TARGETS, loss_mask=MASK) / MASK.sum()
        segmented = model(IDX, TARGETS, segment_ids=SEGMENTS) / 8
    assert [plain.item(), masked.item(), segmented.item()] == pytest.approx(losses, abs=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuation_matches_with_and_without_cache(case: str) -> None:
    options, *_, text = CASES[case]
    model = filled(**options)
    ids = ["abcdefghijklm".index(c) for c in text[:3]]
    cached, new = list(ids), list(ids)
    with torch.no_grad():
        cache = KVCache(model.config, 1, model.ln_f.weight)
        for _ in range(5):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
            cached.append(model(torch.tensor([new]), cache=cache)[0, -1].argmax().item())
            new = cached[-1:]
    assert "".join("abcdefghijklm"[i] for i in ids) == text
    assert cached == ids


def test_a_block_of_tokens_behind_cached_ones_equals_the_uncached_forward() -> None:
    model = filled(**LLAMA)
    with torch.no_grad():
        cache = KVCache(model.config, 1, model.ln_f.weight)
        model(IDX[:, :3], cache=cache)
        torch.testing.assert_close(model(IDX[:, 3:], cache=cache), model(IDX)[:, 3:])


def test_rope_vector() -> None:
    qkv = torch.tensor([1.0, 2, 3, 4]).repeat(3).view(1, 1, 12)
    for scale, want in (
        (1.0, (-1.984110594, 1.959900618, 2.462378025, 4.019799709)),
        (4.0, (0.226700544, 1.989993811, 3.154141188, 4.004987717)),
    ):
        cos, sin = kernels.rope_tables(2, 4, 1e4, scale)
        q, k, v = kernels.rope_qkv(qkv, cos, sin, 1, positions=torch.tensor([1]))
        torch.testing.assert_close(q.flatten(), torch.tensor(want))
        assert torch.equal(k, q)
        assert v.flatten().tolist() == [1, 2, 3, 4]


def test_positions_restart_at_each_segment() -> None:
    ids = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0]])
    assert segment_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]


def test_state_dict_keys_are_those_of_the_format() -> None:
    gelu = set(GPT(ModelConfig(**BASE, bias=True)).state_dict())
    block = {"sa.qkv", "sa.proj", "fwd.net.0", "fwd.net.2", "ln1", "ln2"}
    expected = {f"blocks.{i}.{m}.{w}" for i in range(2) for m in block for w in ("weight", "bias")}
    expected |= {
        "token_embedding_table.weight",
        "position_embedding_table.weight",
        "ln_f.weight",
        "ln_f.bias",
        "lm_head.weight",
        "lm_head.bias",
    }
    assert gelu == expected
    llama = GPT(ModelConfig(**BASE, **LLAMA, tie_weights=True)).state_dict()
    assert {"blocks.0.fwd.w_gate.weight", "blocks.1.fwd.w_down.weight", "lm_head.weight"} <= set(
        llama
    )
    assert not any("rope" in k or "bias" in k for k in llama if k != "lm_head.bias")
    order = [k for k in llama if k.startswith("blocks.0")]
    assert [k.split(".")[2] for k in order] == ["sa", "sa", "fwd", "fwd", "fwd", "ln1", "ln2"]


def test_initial_weights_follow_the_table_and_the_seed() -> None:
    cfg = ModelConfig(vocab_size=500, block_size=64, n_embd=128, n_head=4, n_layer=8)
    model = GPT(cfg, seed=3)
    assert model.blocks[0].sa.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].fwd.net[2].weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.lm_head.bias.abs().max() == 0
    assert (model.ln_f.weight == 1).all()
    again, other = GPT(cfg, seed=3), GPT(cfg, seed=4)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_activation_checkpointing_changes_no_gradient(options: dict) -> None:
    def gradients(use_checkpoint: bool) -> list[torch.Tensor]:
        cfg = ModelConfig(**{**BASE, **options, "dropout": 0.3}, use_checkpoint=use_checkpoint)
        model = GPT(cfg, seed=1).train()
        torch.manual_seed(5)
        model(IDX, TARGETS).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_neftune_noise_is_bounded_and_only_in_training() -> None:
    model = filled(neftune_alpha=5.0)
    with torch.no_grad():
        quiet = model(IDX)
        assert torch.equal(quiet, filled()(IDX))
        model.train()
        torch.manual_seed(0)
        noisy = model(IDX)
    assert not torch.equal(noisy, quiet)
    assert (noisy - quiet).abs().max() < 5 / math.sqrt(8 * 12) * 12


def test_too_many_positions_name_both_numbers() -> None:
    with pytest.raises(ValueError, match="block_size=8 positions; found 9"):
        filled()(torch.zeros(1, 9, dtype=torch.long))
