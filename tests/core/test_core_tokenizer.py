"""core.Tokenizer against specification 9."""

import pytest
import torch

from mypt_fast.core.config import GPTConfig
from mypt_fast.core.tokenizer import Tokenizer
from mypt_fast.tokenizer import SPECIAL_STRINGS

TAGS = ("system", "user", "assistant", "user_context", "assistant_context", "toolcall",
        "toolresult", "think", "cite")  # fmt: skip
# the set before 2026-02: 15 tokens, the assistant's opening at 50263 and the end of turn at 50271
OLD_TAGS = ("system", "user", "user_context", "assistant", "assistant_context", "toolcall",
            "toolresult")  # fmt: skip


def config(**options):
    return GPTConfig(device="cpu", **options)


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer(config())


def test_gpt2_attributes(gpt2):
    assert gpt2.token_kind == "gpt2"
    assert gpt2.chars is None
    assert gpt2.base_vocab_size == 50257
    assert gpt2.model_vocab_size == gpt2.vocab_size == 50304
    assert gpt2.enc.name == "gpt2"
    assert gpt2.config.vocab_size == 50304


def test_the_19_special_tokens(gpt2):
    pinned = [f"<{slash}myPT_{tag}>" for tag in TAGS for slash in ("", "/")] + ["<myPT_eot>"]
    assert [gpt2.special_token_encoder[s] for s in pinned] == list(range(50257, 50276))
    assert gpt2.special_token_decoder[50261] == "<myPT_assistant>"
    assert gpt2.special_tokens["myPT_assistant_open"] == 50261
    assert gpt2.get_special_token_id("myPT_eot") == 50275
    assert gpt2.get_special_token_string("myPT_user_close") == "</myPT_user>"
    assert gpt2.get_special_token_string("nothing") is None
    assert gpt2.is_special_token(50257)
    assert not gpt2.is_special_token(50256)
    with pytest.raises(KeyError, match="no special token 'myPT_eos'"):
        gpt2.get_special_token_id("myPT_eos")


def test_gpt2_text(gpt2):
    text = "<myPT_system>You are MyPT.</myPT_system>"
    assert gpt2.encode(text) == [50257, 1639, 389, 2011, 11571, 13, 50258]
    assert gpt2.decode(gpt2.encode(text)) == text
    assert 50257 not in gpt2.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode_ordinary(text)) == text
    assert 50256 not in gpt2.encode("<|endoftext|>")
    assert gpt2.decode(torch.tensor([39, 50300])) == "H<unk_tok_50300>"
    assert gpt2.encode("hello") == gpt2.enc.encode_ordinary("hello")


@pytest.mark.parametrize("size", [50275, 256])
def test_gpt2_needs_rows_for_its_special_tokens(size):
    with pytest.raises(ValueError, match=f"needs vocab_size >= 50276; found {size}"):
        Tokenizer(config(vocab_size=size))
    assert Tokenizer(config(vocab_size=50276)).model_vocab_size == 50276


def test_gpt2_state(gpt2):
    state = gpt2.get_state()
    assert list(state) == [
        "token_kind", "chars", "base_vocab_size", "model_vocab_size", "special_token_encoder",
        "special_tokens_by_name", "special_token_version",
    ]  # fmt: skip
    assert state["chars"] is None
    assert state["special_token_version"] == 1
    again = Tokenizer.from_state(config(), state)
    assert again.get_state() == state
    bare = Tokenizer.from_state(config(), {"token_kind": "gpt2"})
    assert bare.get_state() == state


def test_a_char_tokenizer_from_text():
    tokenizer = Tokenizer(config(vocab_size=256), "char")
    assert tokenizer.chars is None
    with pytest.raises(ValueError, match="no vocabulary yet"):
        tokenizer.encode("a")
    with pytest.raises(ValueError, match="no vocabulary yet"):
        tokenizer.decode([0])
    tokenizer.build_char_vocab("banana\n")
    assert tokenizer.chars == ["\n", "a", "b", "n"]
    assert tokenizer.vocab_size == 4
    assert tokenizer.model_vocab_size == 256
    assert tokenizer.encode("nab\n") == [3, 1, 2, 0]
    assert tokenizer.decode([3, 1, 2, 0]) == "nab\n"
    assert tokenizer.enc is None
    assert tokenizer.base_vocab_size is None
    assert tokenizer.special_tokens == {}
    with pytest.raises(KeyError, match="'z'"):
        tokenizer.encode("az")
    with pytest.raises(KeyError, match="char tokenizer"):
        tokenizer.get_special_token_id("myPT_eot")


def test_a_char_state():
    tokenizer = Tokenizer(config(vocab_size=256), "char")
    tokenizer.build_char_vocab("ab")
    state = {"token_kind": "char", "chars": ["a", "b"], "base_vocab_size": None,
             "model_vocab_size": 256}  # fmt: skip
    assert tokenizer.get_state() == state
    assert Tokenizer.from_state(config(vocab_size=2), state).get_state() == state
    least = Tokenizer.from_state(config(vocab_size=2), {"token_kind": "char", "chars": ["a", "b"]})
    assert least.encode("ba") == [1, 0]
    assert least.model_vocab_size == 2
    other = Tokenizer(config(vocab_size=2), "char")
    other.set_state(state)
    assert other.encode("ba") == [1, 0]
    other.chars = ["b", "a"]
    assert other.encode("ba") == [0, 1]


def test_a_char_model_is_loaded_without_gpt2s_rows():
    """Q-12: MyPT builds a gpt2 tokenizer first, which refuses the small vocabulary."""
    state = {"token_kind": "char", "chars": ["a", "b"]}
    assert Tokenizer.from_state(config(vocab_size=2), state).token_kind == "char"


def test_old_special_tokens_keep_the_ids_the_weights_were_trained_at():
    strings = [f"<{slash}myPT_{tag}>" for tag in OLD_TAGS for slash in ("", "/")] + ["<myPT_eot>"]
    ids = {s: 50257 + n for n, s in enumerate(strings)}
    names = {s: n for n, s in SPECIAL_STRINGS.items()}
    state = {
        "token_kind": "gpt2", "special_token_encoder": ids,
        "special_tokens_by_name": {names[s]: i for s, i in ids.items()},
    }  # fmt: skip
    old = Tokenizer.from_state(config(), state)
    assert old.get_special_token_id("myPT_assistant_open") == 50263
    assert old.get_special_token_id("myPT_eot") == 50271
    assert old.encode("<myPT_eot>") == [50271]
    assert old.decode([50271, 50275]) == "<myPT_eot><unk_tok_50275>"
    assert old.get_state()["special_token_encoder"] == ids


@pytest.mark.parametrize(
    "state",
    [
        None, [], {}, {"token_kind": "word"}, {"token_kind": "char", "chars": ["ab"]},
        {"token_kind": "gpt2", "special_token_encoder": {"<x>": 3}},
    ],
)  # fmt: skip
def test_what_is_no_state_is_a_value_error(state):
    with pytest.raises(ValueError, match=r"tokenizer state|token_kind"):
        Tokenizer.from_state(config(), state)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="'word'"):
        Tokenizer(config(), "word")


def test_reading_a_text_file(tmp_path):
    (tmp_path / "t.txt").write_text("é\n", "utf-8")
    assert Tokenizer(config(), "char").read_textData(tmp_path / "t.txt") == "é\n"
