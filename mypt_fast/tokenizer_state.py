"""Read and write `tokenizer.json`: every value checked before it is used, nothing executed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from mypt_fast.errors import DataError
from mypt_fast.gpt2_files import GPT2_BASE_VOCAB, byte_alphabet

KINDS = ("gpt2", "char", "bpe")
SPECIAL_VERSION = 1
_MAX_CHARS = 0x110000
_MAX_BPE = 1 << 20
_MAX_SPECIALS = 1024
_MAX_SPECIAL_LENGTH = 256


@dataclass(frozen=True)
class TokenizerState:
    """A checked state; the maps are empty where the kind has none."""

    kind: str
    chars: list[str] | None = None
    base_vocab_size: int | None = None
    model_vocab_size: int | None = None
    special_ids: dict[str, int] = field(default_factory=dict)
    special_strings: dict[str, int] = field(default_factory=dict)
    bpe: dict[str, Any] | None = None
    bpe_vocab: dict[str, int] = field(default_factory=dict)
    bpe_merges: list[tuple[str, str]] = field(default_factory=list)


def state_digest(state: dict[str, Any]) -> bytes:
    """Return the SHA-256 of a state as JSON with sorted keys and no spaces; shards carry it."""
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).digest()


def read_state(state: Any, known: dict[str, str]) -> TokenizerState:
    """Check a state of any age.

    Args:
        state: the parsed JSON.
        known: special token name -> string, in the order of the pinned ids.
    """
    if not isinstance(state, dict):
        raise _bad("the file", f"is a {type(state).__name__}, expected an object")
    kind = state.get("token_kind")
    if kind not in KINDS:
        raise _bad("token_kind", f"is {kind!r:.60}, expected one of {', '.join(KINDS)}")
    version = state.get("special_token_version")
    if version not in (None, SPECIAL_VERSION) or isinstance(version, bool):
        raise _bad("special_token_version", f"is {version!r:.60}, this version reads 1")
    size = _optional_int(state, "model_vocab_size", 1 << 24)
    if kind == "char":
        return TokenizerState(kind, chars=checked_chars(state.get("chars")), model_vocab_size=size)
    if kind == "bpe":
        return _read_bpe(state, known)
    base = _optional_int(state, "base_vocab_size", 1 << 24)
    if base not in (None, GPT2_BASE_VOCAB):
        raise _bad("base_vocab_size", f"is {base}, GPT-2 has {GPT2_BASE_VOCAB}")
    pinned = {name: GPT2_BASE_VOCAB + n for n, name in enumerate(known)}
    ids, strings = _read_specials(state, known, pinned)
    highest = max(strings.values(), default=GPT2_BASE_VOCAB)
    lowest = min(strings.values(), default=GPT2_BASE_VOCAB)
    if lowest < GPT2_BASE_VOCAB or (strings and size is not None and highest >= size):
        raise _bad(
            "special_token_encoder",
            f"uses ids {lowest}..{highest}, outside {GPT2_BASE_VOCAB}..{(size or 50304) - 1}",
        )
    return TokenizerState(kind, None, GPT2_BASE_VOCAB, size, ids, strings)


def state_for(state: dict[str, Any], vocab_size: int, n_special: int) -> dict[str, Any]:
    """Return the state of an old model's tokenizer, as it is meant.

    GPT-2 tokenizers once stored no special tokens. They get today's `n_special` where the model
    has rows for them, and none where its vocabulary ends before (MyPT specification 9.4).
    """
    maps = ("special_token_encoder", "special_tokens_by_name")
    is_bare = state.get("token_kind") == "gpt2" and all(state.get(k) is None for k in maps)
    if not is_bare or vocab_size >= GPT2_BASE_VOCAB + n_special:
        return state
    return {**state, "model_vocab_size": vocab_size, **{key: {} for key in maps}}


def moved_specials(state: Any, pinned: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Special tokens of a state whose ids are not today's: name -> (its id, today's id).

    Args:
        state: the parsed JSON, of any age.
        pinned: today's ids by name.
    """
    ids = state.get("special_tokens_by_name") if isinstance(state, dict) else None
    if not isinstance(ids, dict) or state.get("token_kind") != "gpt2":
        return {}
    return {n: (i, pinned[n]) for n, i in ids.items() if n in pinned and i != pinned[n]}


def build_state(state: TokenizerState, model_vocab_size: int) -> dict[str, Any]:
    """Return the JSON object, keys in MyPT's order."""
    result: dict[str, Any] = {
        "token_kind": state.kind,
        "chars": state.chars,
        "base_vocab_size": state.base_vocab_size,
        "model_vocab_size": state.model_vocab_size or model_vocab_size,
    }
    if state.kind == "char":
        return result
    result["special_token_encoder"] = dict(state.special_strings)
    result["special_tokens_by_name"] = dict(state.special_ids)
    result["special_token_version"] = SPECIAL_VERSION
    if state.kind == "bpe":
        result["bpe"] = state.bpe
    return result


def checked_chars(chars: Any) -> list[str]:
    """Check a char vocabulary: a list of different single characters, at least one."""
    if not isinstance(chars, list) or not chars:
        raise _bad("chars", "is not a list of characters, or an empty one")
    if len(chars) > _MAX_CHARS:
        raise _bad("chars", f"has {len(chars)} entries, Unicode has {_MAX_CHARS} characters")
    for index, char in enumerate(chars):
        if not isinstance(char, str) or len(char) != 1 or "\ud800" <= char <= "\udfff":
            raise _bad(f"chars[{index}]", f"is {char!r:.40}, expected one character")
    if len(set(chars)) != len(chars):
        seen: set[str] = set()
        twice = next(char for char in chars if char in seen or seen.add(char))  # type: ignore[func-returns-value]
        raise _bad("chars", f"holds {twice!r} twice")
    return list(chars)


def bpe_tables(bpe: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Take vocabulary and merges out of a `tokenizers` JSON object, byte-level BPE only."""
    model = bpe.get("model") if isinstance(bpe, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or bpe.get("normalizer"):
        raise _bad("bpe", "is not a byte-level BPE without normalizer")
    stage = bpe.get("pre_tokenizer")
    if not isinstance(stage, dict) or stage.get("type") != "ByteLevel":
        raise _bad("bpe.pre_tokenizer", "is not ByteLevel")
    if stage.get("add_prefix_space") or stage.get("use_regex") is False:
        raise _bad("bpe.pre_tokenizer", "has options other than GPT-2's")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise _bad("bpe.model", "has no vocab or no merges")
    if len(vocab) > _MAX_BPE or len(merges) > _MAX_BPE:
        raise _bad("bpe.model", f"has {len(vocab)} tokens, at most {_MAX_BPE} are accepted")
    if not all(_is_int(token) for token in vocab.values()):
        raise _bad("bpe.model.vocab", "holds an id that is not a whole number")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise _bad("bpe.model.vocab", f"does not number its tokens 0..{len(vocab) - 1}")
    if missing := [char for char in byte_alphabet() if char not in vocab]:
        raise _bad("bpe.model.vocab", f"lacks {len(missing)} of the 256 single bytes")
    return dict(vocab), [_merge(entry, vocab) for entry in merges]


def _merge(entry: Any, vocab: dict[str, int]) -> tuple[str, str]:
    # Older files join the two halves with a space, newer ones keep a list.
    pair = entry.split(" ") if isinstance(entry, str) else entry
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(isinstance(part, str) and part in vocab for part in pair)
        or pair[0] + pair[1] not in vocab
    ):
        raise _bad("bpe.model.merges", f"holds {entry!r:.60}, which joins no two known tokens")
    return pair[0], pair[1]


def _read_bpe(state: dict[str, Any], known: dict[str, str]) -> TokenizerState:
    vocab, merges = bpe_tables(state.get("bpe"))
    alphabet = set(byte_alphabet())
    present = {name: vocab[string] for name, string in known.items() if string in vocab}
    ids, strings = _read_specials(state, known, present)
    if wrong := [string for string, token in strings.items() if vocab.get(string) != token]:
        raise _bad("special_token_encoder", f"gives {wrong[0]!r} an id the vocabulary does not")
    specials = {"<|endoftext|>", *strings}
    for token in vocab:
        if token not in specials and not alphabet.issuperset(token):
            raise _bad("bpe.model.vocab", f"holds {token!r:.60}, which is not byte-level")
    declared = _optional_int(state, "base_vocab_size", 1 << 24)
    if declared not in (None, len(vocab)):
        raise _bad("base_vocab_size", f"is {declared}, the vocabulary has {len(vocab)} tokens")
    return TokenizerState("bpe", None, len(vocab), None, ids, strings, state["bpe"], vocab, merges)


def _read_specials(
    state: dict[str, Any], known: dict[str, str], default: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return (name -> id, string -> id) as stored, or the default where nothing is stored.

    Sets older than 2026-02 hold 15 tokens in another order. Their ids are kept: the embeddings
    were trained there, and forcing today's ids on them would scramble the model. Empty maps are
    those of a model without rows for special tokens.
    """
    by_name = _id_map(state, "special_tokens_by_name")
    by_string = _id_map(state, "special_token_encoder")
    names = {string: name for name, string in known.items()}
    if by_name is None and by_string is None:
        by_name = dict(default)
    by_name, by_string = by_name or {}, by_string or {}
    if not by_name:
        by_name = {names[s]: token for s, token in by_string.items() if s in names}
    if not by_string:
        if unknown := sorted(set(by_name) - set(known)):
            raise _bad("special_tokens_by_name", f"names {unknown[0]!r:.60} without its string")
        by_string = {known[name]: token for name, token in by_name.items()}
    for name, token in by_name.items():
        if name in known and by_string.get(known[name]) != token:
            raise _bad(
                "special_tokens_by_name",
                f"gives {name} id {token}, special_token_encoder {by_string.get(known[name])}",
            )
    return by_name, by_string


def _id_map(state: dict[str, Any], key: str) -> dict[str, int] | None:
    value = state.get(key)
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _MAX_SPECIALS:
        raise _bad(key, f"is not an object of at most {_MAX_SPECIALS} ids")
    for name, token in value.items():
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_SPECIAL_LENGTH:
            raise _bad(key, f"holds the name {name!r:.60}")
        if not _is_int(token) or not 0 <= token < 1 << 24:
            raise _bad(key, f"gives {name!r:.60} the id {token!r:.40}")
    if len(set(value.values())) != len(value):
        raise _bad(key, "uses one id twice")
    return dict(value)


def _optional_int(state: dict[str, Any], key: str, limit: int) -> int | None:
    value = state.get(key)
    if value is not None and (not _is_int(value) or not 0 < value <= limit):
        raise _bad(key, f"is {value!r:.40}, expected a whole number from 1 to {limit}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(what: str, found: str) -> DataError:
    return DataError(f"tokenizer state: {what} {found}", cure="prepare the dataset again")
