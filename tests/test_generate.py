"""Generation: the cache, the filters against hand-computed numbers, sliding, stops."""

import pytest
import torch

from mypt_fast.checkpoint import bundle
from mypt_fast.config import ModelConfig
from mypt_fast.errors import CheckpointError, ConfigError, IntegrityError
from mypt_fast.generate import (
    Sampling,
    generate,
    keep_top_k,
    keep_top_p,
    load,
    penalised,
    stream_text,
)
from mypt_fast.model import GPT
from mypt_fast.tokenizer import Tokenizer

TEXT = "abcdefgh é日\n"
INF = float("inf")
ARCHITECTURES = {
    "gpt2": {},
    "llama": {
        "pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "tie_weights": True,
    },
}  # fmt: skip


def a_model(block_size: int = 16, arch: str = "gpt2") -> tuple[GPT, Tokenizer]:
    tokenizer = Tokenizer.from_text(TEXT)
    cfg = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=tokenizer.n_tokens,
        dropout=0.0, **ARCHITECTURES[arch],
    )  # fmt: skip
    model = GPT(cfg, seed=1).eval()
    for p in model.parameters():  # far from uniform, so that an order of magnitude would show
        p.data *= 8 if p.dim() > 1 else 1
    return model, tokenizer


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.inference_mode()
def test_greedy_with_cache_equals_greedy_without(arch: str) -> None:
    model, tokenizer = a_model(32, arch)
    found = list(
        generate(model, tokenizer, "abc", max_new_tokens=29, temperature=0, repeat_window=0)
    )
    ids = tokenizer.encode("abc")
    for _ in range(29):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert found == ids[3:]


def test_same_seed_same_text_and_the_global_generator_is_untouched() -> None:
    model, tokenizer = a_model()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        list(generate(model, tokenizer, "ab", max_new_tokens=40, seed=seed, repeat_window=0))
        for seed in (7, 7, 8)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_a_drawn_seed_is_reported_and_repeats_the_text() -> None:
    model, tokenizer = a_model()
    first = generate(model, tokenizer, "ab", max_new_tokens=20)
    ids = list(first)
    assert list(generate(model, tokenizer, "ab", max_new_tokens=20, seed=first.seed)) == ids


def test_penalty_divides_positive_and_multiplies_negative_logits_of_recent_ids() -> None:
    logits = torch.tensor([2.0, -2.0, 3.0, -1.0])
    found = penalised(logits, [0, 1, 0], 2.0)
    assert found.tolist() == [1.0, -4.0, 3.0, -1.0]
    assert logits.tolist() == [2.0, -2.0, 3.0, -1.0]


def test_penalty_looks_at_the_last_ids_only() -> None:
    model, tokenizer = a_model()
    settings = {"max_new_tokens": 30, "seed": 1, "repetition_penalty": 100.0, "top_k": 0,
                "top_p": 1.0, "temperature": 0.3}  # fmt: skip
    one = list(generate(model, tokenizer, "ab", recent_penalty_window=1, **settings))
    assert one != list(generate(model, tokenizer, "ab", recent_penalty_window=256, **settings))


def test_top_k_keeps_ties_at_the_threshold() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    assert keep_top_k(logits, 2).tolist() == [3.0, -INF, 2.0, 2.0, -INF]
    assert keep_top_k(logits, 1).tolist() == [3.0, -INF, -INF, -INF, -INF]
    assert keep_top_k(logits, 0) is logits
    assert keep_top_k(logits, 99) is logits


@pytest.mark.parametrize(
    ("p", "kept"), [(0.1, [1]), (0.49, [1]), (0.6, [1, 3]), (0.85, [1, 3, 0]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_prefix_whose_mass_exceeds_p(p: float, kept: list[int]) -> None:
    found = keep_top_p(logits_of(0.15, 0.5, 0.05, 0.3), p)
    assert [i for i, v in enumerate(found.tolist()) if v != -INF] == sorted(kept)


def test_sampling_draws_from_the_filtered_distribution() -> None:
    # T=0.5 squares the odds 0.5 : 0.3 : 0.2 to 25 : 9 : 4; top-k 2 leaves 25 : 9
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=0.5, top_k=2, top_p=1.0, repetition_penalty=1.0)
    draws = [sampling.choose(logits_of(0.5, 0.3, 0.2), [], generator) for _ in range(2000)]
    assert set(draws) == {0, 1}
    assert draws.count(0) / 2000 == pytest.approx(25 / 34, abs=0.03)


def test_order_is_temperature_then_penalty_then_filters() -> None:
    # after /T the first logit is 4; halved by the penalty it falls behind 3, and top-k 1 drops it
    sampling = Sampling(temperature=0.5, top_k=1, top_p=1.0, repetition_penalty=2.0)
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert sampling.choose(logits, [0], torch.Generator()) == 1


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    sampling = Sampling(temperature=0, top_k=1, repetition_penalty=50.0)
    assert sampling.choose(torch.tensor([1.0, 5.0, 4.0]), [1], torch.Generator()) == 1


def test_the_smallest_temperature_still_draws() -> None:
    sampling = Sampling(temperature=1e-40)
    assert sampling.choose(torch.tensor([1.0, 5.0, 4.0]), [], torch.Generator()) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_text_slides_past_several_windows(block_size: int, arch: str) -> None:
    model, tokenizer = a_model(block_size, arch)
    n = 5 * block_size + 3
    ids = list(generate(model, tokenizer, "abc", max_new_tokens=n, seed=1, repeat_window=0))
    assert len(ids) == n


@torch.inference_mode()
def test_a_slide_reads_the_last_three_quarters_of_the_window_again() -> None:
    model, tokenizer = a_model(16)
    generation = generate(
        model, tokenizer, "abc", max_new_tokens=60, temperature=0, repeat_window=0
    )
    ids = [*tokenizer.encode("abc"), *generation]
    # position 17 is the first that does not fit: its logits see the 12 ids before it, no more
    expected = int(model(torch.tensor([ids[16 - 11 : 17]]))[0, -1].argmax())
    assert ids[17] == expected


def test_a_long_prompt_keeps_its_last_block() -> None:
    model, tokenizer = a_model(16)
    settings = {"max_new_tokens": 5, "seed": 2, "repetition_penalty": 1.0, "repeat_window": 0}
    long = list(generate(model, tokenizer, "h" * 50 + "abcdefghabcdefgh", **settings))
    assert long == list(generate(model, tokenizer, "abcdefghabcdefgh", **settings))


def test_an_empty_prompt_starts_at_id_zero_without_a_document_token() -> None:
    model, tokenizer = a_model()
    generation = generate(model, tokenizer, "", max_new_tokens=2, seed=1)
    assert generation.ids == [0]
    assert len(list(generation)) == 2


def test_a_stop_token_ends_the_text_and_its_string_is_left_out() -> None:
    model, tokenizer = a_model()
    free = list(generate(model, tokenizer, "ab", max_new_tokens=20, seed=3))
    stop = free[5]
    generation = generate(model, tokenizer, "ab", max_new_tokens=20, seed=3, stop_tokens=[stop])
    text = "".join(stream_text(tokenizer, generation))
    cut = free[: free.index(stop)]
    assert generation.stopped == "stop_token"
    assert generation.ids[2:] == [*cut, stop]
    assert text == tokenizer.decode(cut)


def test_a_repeated_pattern_ends_the_text() -> None:
    model, tokenizer = a_model(16)
    with torch.no_grad():  # always the same token: the head looks at its bias alone
        model.lm_head.weight.zero_()
        model.lm_head.bias[3] = 9.0
    generation = generate(model, tokenizer, "a", max_new_tokens=200, temperature=0)
    assert list(generation) == [3] * 64
    assert generation.stopped == "repetition"
    forever = generate(model, tokenizer, "a", max_new_tokens=200, temperature=0, repeat_window=0)
    assert len(list(forever)) == 200
    assert forever.stopped == "length"


def test_utf8_text_round_trips_character_by_character() -> None:
    model, tokenizer = a_model()
    generation = generate(model, tokenizer, "日é", max_new_tokens=30, seed=4, repeat_window=0)
    pieces = list(stream_text(tokenizer, generation))
    assert tokenizer.decode(generation.ids[:2]) == "日é"
    assert all(len(piece) <= 1 for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(generation.ids[2:])


OUT_OF_RANGE = [
    ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.5), ("repetition_penalty", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    model, tokenizer = a_model()
    with pytest.raises(ConfigError, match=name):
        generate(model, tokenizer, "a", **{name: value})


def test_an_id_the_model_does_not_have_is_refused() -> None:
    model, tokenizer = a_model()
    with pytest.raises(ConfigError, match="999"):
        generate(model, tokenizer, "a", stop_tokens=[999])


def test_damaged_weights_are_reported_not_sampled() -> None:
    model, tokenizer = a_model()
    model.lm_head.bias.data[0] = float("nan")
    with pytest.raises(IntegrityError, match="not finite"):
        next(generate(model, tokenizer, "a"))


def save(path, model: GPT, tokenizer: Tokenizer, /, **changes) -> None:
    content = {
        "config": model.config.to_dict(), "state_dict": model.state_dict(),
        "training_state": {"step": 3}, "tokenizer": tokenizer.get_state(),
    }  # fmt: skip
    bundle.write(path, **{**content, **changes})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_loaded_bundle_writes_what_the_model_in_memory_writes(tmp_path, arch: str) -> None:
    model, tokenizer = a_model(16, arch)
    save(tmp_path / "m", model, tokenizer)
    loaded = load(tmp_path / "m")
    assert loaded.step == 3
    assert not loaded.model.training
    ids = [
        list(generate(m, t, "ab", max_new_tokens=20, temperature=0))
        for m, t in ((model, tokenizer), (loaded.model, loaded.tokenizer))
    ]
    assert ids[0] == ids[1]


def test_a_half_precision_bundle_loads_and_rotary_tables_stay_fp32(tmp_path) -> None:
    model, tokenizer = a_model(16, "llama")
    save(tmp_path / "m_fp16", model, tokenizer, save_dtype="fp16")
    loaded = load(tmp_path / "m_fp16", dtype=torch.bfloat16)
    assert loaded.model.lm_head.weight.dtype is torch.bfloat16
    assert loaded.model.rope_cos.dtype is torch.float32
    assert len(list(generate(loaded.model, loaded.tokenizer, "ab", max_new_tokens=30))) == 30


def test_a_bundle_without_tokenizer_or_of_another_shape_is_refused(tmp_path) -> None:
    model, tokenizer = a_model()
    save(tmp_path / "a", model, tokenizer, tokenizer=None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        load(tmp_path / "a")
    save(tmp_path / "b", model, tokenizer, config={**model.config.to_dict(), "n_layer": 3})
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path / "b")
