"""Every vector of specification 12 that the model computes, and counts of parameters (3.4)."""

import json
from pathlib import Path

import pytest
import torch
from core_models import IDX, MASK, OPTIONS, SEGMENTS, TARGETS, filled

from mypt_fast.attention import Segments
from mypt_fast.core.model import GPT, GPTConfig, apply_rotary_emb, precompute_rope_frequencies

ROOT = Path(__file__).parent.parent.parent
# parameters, tensors, loss, masked, packed, logits[0,-1,:4], packed logits[0,5,:3], greedy text
VECTORS = {
    "A": (4117, 26, 2.702764, 2.656413, 2.685218, (-0.34295, 0.12556, 0.70120, -0.58204),
          (0.23448, -0.14777, 0.40764), "bfjlcclc"),
    "B": (4213, 30, 2.553951, 2.531758, 2.545043, (0.05961, -0.33438, 0.65646, 0.16499),
          (0.48736, 0.51400, -0.65240), "bfjmbldb"),
    "C": (5989, 17, 2.648438, 2.177279, 2.664794, (-0.57194, 0.92758, -0.19559, -0.88057),
          (0.93580, 0.28475, -1.03571), "bfjjjjjj"),
    "D": (4021, 25, 2.687072, 2.752378, 2.685903, (-0.55088, 0.07934, 0.75172, -0.36738),
          (-0.78954, 0.71010, 0.33529), "bfjkcccc"),
    "E": (6241, 19, 2.707932, 3.254025, 2.680389, (0.67364, -0.75902, -0.29793, 0.94997),
          (-1.22092, 0.37426, 0.41962), "bfjefmef"),
}  # fmt: skip


@pytest.mark.parametrize("case", VECTORS)
def test_the_whole_model_of_12_2(case):
    parameters, tensors, loss, masked, packed, last, inner, _ = VECTORS[case]
    model = filled(**OPTIONS[case])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    logits, plain, present = model(IDX, TARGETS)
    assert present is None
    assert logits.shape == (1, 8, 13)
    torch.testing.assert_close(logits[0, -1, :4], torch.tensor(last), atol=1e-5, rtol=0)
    assert plain.item() == pytest.approx(loss, abs=1e-6)
    assert model(IDX, TARGETS, loss_mask=MASK)[1].item() == pytest.approx(masked, abs=1e-6)
    logits, of_segments, _ = model(IDX, TARGETS, segment_ids=SEGMENTS)
    torch.testing.assert_close(logits[0, 5, :3], torch.tensor(inner), atol=1e-5, rtol=0)
    assert of_segments.item() == pytest.approx(packed, abs=1e-6)


@pytest.mark.parametrize("case", VECTORS)
def test_the_greedy_text_of_12_2_with_and_without_cache(case):
    model, text = filled(**OPTIONS[case]), VECTORS[case][-1]
    assert model.generate("bfj", 5, temperature=0) == text
    assert model.generate_nocache_greedy("bfj", 5) == text


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.0, [-1.984110594, 1.959900618, 2.462378025, 4.019799709]),
        (4.0, [0.226700544, 1.989993811, 3.154141188, 4.004987717]),
    ],
)
def test_the_rotation_of_12_1(scale, expected):
    cos, sin = precompute_rope_frequencies(4, 2, 1e4, scale)
    assert cos.shape == sin.shape == (2, 2)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = apply_rotary_emb(torch.stack([x, x]), cos, sin)
    torch.testing.assert_close(rows[0], x)  # position 0 stays
    torch.testing.assert_close(rows[1], torch.tensor(expected), atol=1e-6, rtol=0)


def test_rotation_of_heads_at_positions_of_their_own():
    cos, sin = precompute_rope_frequencies(4, 5)
    x = torch.randn(2, 3, 5, 4)
    together = apply_rotary_emb(x, cos, sin)
    rows = apply_rotary_emb(x, cos.expand(2, 5, 2), sin.expand(2, 5, 2))
    torch.testing.assert_close(rows, together)


def test_segment_positions_of_2_3():
    ids = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0]])
    assert Segments.from_ids(ids).positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("tiny", 21_168_384), ("tiny_char", 1_899_904), ("small", 49_420_416),
        ("small_char", 10_933_504), ("150M", 190_872_192), ("500M_1024", 602_277_504),
        ("base/750M_unified_v1", 698_911_104),
    ],
)  # fmt: skip
def test_parameter_counts_of_3_4(preset, parameters):
    config = GPTConfig.from_dict(json.loads((ROOT / f"configs/{preset}.json").read_text()))
    with torch.device("meta"):
        model = GPT(config, token_kind="char")
    assert sum(p.numel() for p in model.parameters()) == parameters
