"""Text of core.GPT against a plain sampler (specification 10.2), and Generator's settings."""

import inspect

import pytest
import torch
from core_models import LETTERS, LLAMA, OPTIONS, char_model
from test_core_model import random_model

from mypt_fast.core import writing
from mypt_fast.core.config import GPTConfig
from mypt_fast.core.generator import Generator
from mypt_fast.core.model import GPT
from mypt_fast.core.tokenizer import Tokenizer


def plainly_sampled(model, ids, n, temperature, k, p, penalty, window=256):
    """The order of specification 10.2 in plain steps, every token from a full forward."""
    ids = list(ids)
    for _ in range(n):
        x = model(torch.tensor([ids]))[0][0, -1].detach() / temperature
        for i in set(ids[-window:]):
            x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
        if 0 < k < len(x):
            x[x < x.sort(descending=True).values[k - 1]] = -torch.inf
        order = x.argsort(descending=True)
        mass, kept = 0.0, []
        for i in order.tolist():
            if kept and mass > p:
                break
            kept.append(i)
            mass += float(x.softmax(0)[i])
        keep = torch.full_like(x, -torch.inf)
        keep[kept] = x[kept]
        ids.append(int(torch.multinomial(keep.softmax(0)[None], 1)))
    return ids


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize(
    ("temperature", "k", "p", "penalty"),
    [(0.8, 50, 0.95, 1.1), (1.5, 4, 1.0, 1.0), (1.0, 0, 0.6, 1.6), (0.3, 6, 0.8, 1.3)],
)
def test_the_order_of_sampling_on_the_global_generator(case, temperature, k, p, penalty):
    model = random_model(**{**OPTIONS[case], "block_size": 24}).eval()
    prompt = "bad"
    torch.manual_seed(5)
    expected = plainly_sampled(model, model.encode(prompt), 20, temperature, k, p, penalty)
    torch.manual_seed(5)
    text = model.generate(prompt, 20, temperature, k, p, penalty)
    assert text == model.decode(expected)
    torch.manual_seed(6)
    assert model.generate(prompt, 20, 1.5, 0, 1.0, 1.0) != model.generate(prompt, 20, 1.5, 0, 1.0)


def test_generate_has_the_defaults_of_1_3():
    found = {n: p.default for n, p in inspect.signature(GPT.generate).parameters.items()}
    assert list(found)[1:3] == ["prompt", "max_new_tokens"]
    assert dict(list(found.items())[3:]) == {
        "temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1,
        "stop_tokens": None, "recent_penalty_window": 256, "use_default_stop_tokens": True,
    }  # fmt: skip


def test_temperature_nothing_takes_the_likeliest():
    model = random_model().eval()
    greedy = model.generate_nocache_greedy("abc", 5)
    for temperature in (0, 0.0, -1, None):
        assert model.generate("abc", 5, temperature, top_k=1, top_p=0.1) == greedy
    assert model.generate("abc", 5, 1.0, top_k=1, repetition_penalty=1.0) == greedy
    assert len(model.generate("abc", 5, 1.0, None, None, None)) == 8


def test_an_empty_prompt_begins_with_the_first_id():
    model = random_model().eval()
    assert model.generate("", 3, 0) == model.generate("a", 3, 0)
    assert model.generate("", 3, 0)[0] == "a"
    assert model.generate_simple("", 0) == "a"


def test_the_window_moves_past_the_context():
    """Q-18: MyPT crashes here."""
    for options in ({}, LLAMA):
        model = random_model(**options).eval()
        for text in (
            model.generate("abc", 40, 1.0), model.generate_simple("abc", 40),
            model.generate_nocache_greedy("abc", 40),
        ):  # fmt: skip
            assert text.startswith("abc")
        assert len(model.generate_simple("abc", 40)) == 43
    long = LETTERS * 3
    assert model.generate(long, 2, 0).startswith(long[-8:])
    assert len(model.generate(long, 2, 0)) == 10


def test_simple_is_a_plain_sample_of_a_sliding_window():
    model = random_model().eval()
    torch.manual_seed(9)
    text = model.generate_simple("abc", 20)
    torch.manual_seed(9)
    ids = [0, 1, 2]
    for _ in range(20):
        x = model(torch.tensor([ids[-8:]]))[0][0, -1].detach()
        ids.append(int(torch.multinomial(x.softmax(0)[None], 1)))
    assert text == model.decode(ids)


def test_stop_tokens_end_a_text_and_stay_in_it():
    model = random_model().eval()
    text = model.generate("abc", 6, 0)
    stop = model.encode(text)[4]
    first = text[3:].index(text[4]) + 4
    assert model.generate("abc", 6, 0, stop_tokens=[stop]) == text[:first]


def specials_model():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50304, block_size=16, n_embd=8, n_head=2, n_layer=1, device="cpu")
    return GPT(config).eval()


def test_default_stops_are_the_assistants_close_and_the_turns_end():
    model = specials_model()
    assert writing.stop_ids(model) == {50262, 50275}
    for token, stops in ((50275, True), (50262, True), (50256, False)):
        with torch.no_grad():
            model.lm_head.bias.zero_()[token] = 100.0
        n = 1 if stops else 4
        text = model.generate("Hi", 4, 0)
        assert model.encode(text)[1:].count(token) == (n if token > 50256 else 0)
        assert text == model.generate_nocache_greedy("Hi", 4)
        assert text == "Hi" + model.decode([token]) * n
        assert model.generate("Hi", 4, 0, use_default_stop_tokens=False) == (
            "Hi" + model.decode([token]) * 4
        )


def test_a_text_that_repeats_itself_ends():
    model = random_model(block_size=256).eval()
    with torch.no_grad():
        model.lm_head.bias.zero_()[3] = 1000.0
    assert model.generate("abc", 200, 0) == "abc" + "d" * 64


def test_generating_leaves_the_mode_and_takes_no_dropout():
    model = random_model(dropout=0.5).train()
    torch.manual_seed(0)
    first = model.generate("abc", 5, 0)
    assert model.training
    assert model.generate("abc", 5, 0) == first == model.generate_nocache_greedy("abc", 5)


def test_the_cache_can_be_compared(monkeypatch, capsys):
    monkeypatch.setenv("DEBUG_KV_CACHE", "1")
    model = random_model(**OPTIONS["D"])
    model.generate("abcdef", 1, 0)
    line = capsys.readouterr().out
    assert "DEBUG_KV_CACHE: largest difference" in line
    assert "same at 6 of 6 positions" in line


def test_a_scripts_own_tokenizer_needs_only_encode_and_decode(tmp_path):
    class Own:
        def encode(self, text):
            return [ord(c) - 97 for c in text]

        def decode(self, ids):
            return "".join(chr(i + 97) for i in ids)

    model = random_model()
    model.tokenizer = Own()
    assert model.generate("abc", 3, 0) == model.generate_nocache_greedy("abc", 3)
    model.save_checkpoint_bundle(tmp_path / "m", 1)
    assert not (tmp_path / "m/tokenizer.json").exists()


def test_a_tokenizer_of_another_model():
    model = random_model()
    model.tokenizer = Tokenizer(GPTConfig(device="cpu"))
    with pytest.raises(ValueError, match=r"it made id \d+, the model has 13"):
        model.generate("hello", 1)


def test_generator_passes_its_settings(monkeypatch):
    model = char_model().train()
    generator = Generator(model)
    assert not model.training
    asked = []
    monkeypatch.setattr(model, "generate", lambda *a: asked.append(a) or "text")
    assert generator.generate("p") == "text"
    generator.generate_creative("p")
    generator.generate_factual("p")
    generator.generate_code("p")
    assert asked == [
        ("p", 100, 0.8, 50, 0.95, 1.1, None),
        ("p", 500, 1.0, 100, 0.95, 1.2, None),
        ("p", 100, 0.3, 10, 0.8, 1.0, None),
        ("p", 200, 0.2, 40, 0.95, 1.0, None),
    ]


def test_to_inference():
    model = random_model().train()
    model.config.device = "cuda"
    assert model.to_inference("cpu") is model
    assert not model.training
    assert model.config.device == "cpu"
    assert model.double().to_inference().lm_head.weight.dtype is torch.float32


def test_compile_falls_back(monkeypatch, capsys):
    model = random_model().eval()
    idx = torch.tensor([[1, 2, 3]])
    plain, asked = model(idx)[0], []

    def fake(forward, mode=None, backend=None):
        def broken(*args, **kwargs):
            raise RuntimeError("no compiler")

        asked.append((mode, backend))
        return broken if backend is None else forward

    monkeypatch.setattr(torch, "compile", fake)
    assert model.compile_for_inference("reduce-overhead") is model
    assert asked == []  # compiled when it is first used
    torch.testing.assert_close(model(idx)[0], plain)
    torch.testing.assert_close(model(idx)[0], plain)
    assert asked == [("reduce-overhead", None), (None, "aot_eager")]
    assert "using aot_eager" in capsys.readouterr().out
    with pytest.raises(IndexError):
        model(torch.zeros(1, 9, dtype=torch.int64))
    loss = model.as_engine()(idx=idx, targets=idx)  # the engine's view is not the compiled one
    torch.testing.assert_close(loss, model.summed_loss(idx, idx))
