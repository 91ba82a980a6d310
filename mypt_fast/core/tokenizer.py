"""MyPT's Tokenizer(config, kind) over the engine's: same ids, same state, built when first used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mypt_fast.config import ModelConfig
from mypt_fast.core.errors import TokenizerError, UnknownTokenError
from mypt_fast.errors import DataError
from mypt_fast.gpt2_files import GPT2_BASE_VOCAB, gpt2_encoding
from mypt_fast.schema import shown
from mypt_fast.tokenizer import SPECIAL_STRINGS
from mypt_fast.tokenizer import Tokenizer as Engine
from mypt_fast.tokenizer_state import TokenizerState, read_state

KINDS = ("gpt2", "char", "bpe")
GPT2_SMALLEST = GPT2_BASE_VOCAB + len(SPECIAL_STRINGS)  # rows that every id has an embedding in


class Tokenizer:
    """Text to ids and back (MyPT specification 9).

    Args:
        config: of the model; its vocab_size is remembered as `model_vocab_size`.
        kind: "gpt2", or "char", whose vocabulary comes from `build_char_vocab` or `set_state`.

    Attributes:
        config: as given.
        token_kind: as given.
        base_vocab_size: 50257, None for char.
        model_vocab_size: config.vocab_size when this was made.
        special_token_encoder: string -> id; `special_token_decoder` is its inverse.
        special_tokens: name -> id.

    Raises:
        TokenizerError: (a ValueError) for an unknown kind, and for "gpt2" where the model has no
            embeddings for the 19 special tokens.
    """

    def __init__(self, config: ModelConfig, kind: str = "gpt2") -> None:
        self.config, self.model_vocab_size = config, config.vocab_size
        if kind == "gpt2" and config.vocab_size < GPT2_SMALLEST:
            raise TokenizerError(
                f"a gpt2 tokenizer needs vocab_size >= {GPT2_SMALLEST}",
                f"found {config.vocab_size}",
                'use 50304, or kind="char"',
            )
        self._take({"token_kind": kind, "model_vocab_size": config.vocab_size})

    @classmethod
    def from_state(cls, config: ModelConfig, state: dict[str, Any]) -> Tokenizer:
        """Rebuild from the content of tokenizer.json.

        Raises:
            TokenizerError: (a ValueError) if it is none.
        """
        made = cls.__new__(cls)
        made.config, made.model_vocab_size = config, config.vocab_size
        made.set_state(state)
        return made

    def set_state(self, state: dict[str, Any]) -> None:
        """Become the tokenizer of a state; special tokens keep the ids stored in it."""
        if not isinstance(state, dict):
            raise TokenizerError("a tokenizer state is a JSON object", f"found {shown(state)}")
        size = state.get("model_vocab_size") or self.model_vocab_size
        self._take({**state, "model_vocab_size": size})

    def _take(self, state: dict[str, Any]) -> None:
        """Check a state, and show what it says; the engine is built at the first use."""
        checked = _checked(state)
        self.token_kind, self._chars = checked.kind, checked.chars
        self.base_vocab_size = checked.base_vocab_size
        self.model_vocab_size = checked.model_vocab_size or self.model_vocab_size
        self.special_tokens = dict(checked.special_ids)
        self.special_token_encoder = dict(checked.special_strings)
        self.special_token_decoder = {i: s for s, i in checked.special_strings.items()}
        self._state = state
        self._engine: Engine | None = None

    @property
    def chars(self) -> list[str] | None:
        """The characters of a char tokenizer, in the order of their ids."""
        return self._chars

    @chars.setter
    def chars(self, chars: Sequence[str]) -> None:
        self._take({**self._state, "chars": list(chars)})

    def get_state(self) -> dict[str, Any]:
        """Return what tokenizer.json holds, keys in MyPT's order."""
        if self.token_kind == "char" and not self.chars:
            return {
                "token_kind": "char", "chars": None, "base_vocab_size": None,
                "model_vocab_size": self.model_vocab_size,
            }  # fmt: skip
        return self.engine.get_state()

    @property
    def engine(self) -> Engine:
        """The engine's tokenizer; raises TokenizerError (a ValueError) without a vocabulary."""
        made = self._engine
        if made is None:
            if self.token_kind == "char" and not self.chars:
                raise TokenizerError(
                    "this char tokenizer has no vocabulary yet",
                    cure="call build_char_vocab(text), or set_state(state) with its chars",
                )
            made = self._engine = Engine.from_state(self._state)
        return made

    @property
    def enc(self) -> Any:
        """The tiktoken encoding of GPT-2; None for the other kinds."""
        return gpt2_encoding() if self.token_kind == "gpt2" else None

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs: characters, or GPT-2's padded size."""
        return len(self.chars or ()) if self.token_kind == "char" else self.model_vocab_size

    def build_char_vocab(self, text: str) -> None:
        """Take the sorted characters of a text as the vocabulary of a char tokenizer."""
        self._take(
            {
                "token_kind": "char",
                "chars": sorted(set(text)),
                "model_vocab_size": self.model_vocab_size,
            }
        )

    def read_textData(self, path: str | Path) -> str:  # noqa: N802  MyPT's name
        """Read a UTF-8 text file."""
        return Path(path).read_text("utf-8")

    def encode(self, text: str) -> list[int]:
        """Encode text; special tokens spelled in it become their ids.

        Raises:
            UnknownTokenError: (a KeyError) for a character that a char vocabulary lacks.
        """
        return self._encoded(self.engine.encode, text)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode text that is only text, whatever it spells; raises as `encode`."""
        return self._encoded(self.engine.encode_ordinary, text)

    def _encoded(self, encode: Any, text: str) -> list[int]:
        try:
            ids: list[int] = encode(text)
        except DataError as e:
            if self.token_kind == "char":
                raise UnknownTokenError(e.what, e.found, e.cure) from e
            raise
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, a list or a tensor; one without a token becomes `<unk_tok_ID>`."""
        return self.engine.decode(_listed(ids))

    def get_special_token_id(self, name: str) -> int:
        """Return the id of a special token by its name, `myPT_eot`.

        Raises:
            UnknownTokenError: (a KeyError) if there is none.
        """
        if name not in self.special_tokens:
            known = ", ".join(self.special_tokens) or f"none: this is a {self.token_kind} tokenizer"
            raise UnknownTokenError(f"no special token {shown(name)}", f"there are {known}")
        return self.special_tokens[name]

    def get_special_token_string(self, name: str) -> str | None:
        """Return the string of a special token by its name, None if there is none."""
        return self.special_token_decoder.get(self.special_tokens.get(name, -1))

    def is_special_token(self, token: int) -> bool:
        """Whether an id is a special token's."""
        return int(token) in self.special_token_decoder


def _checked(state: dict[str, Any]) -> TokenizerState:
    kind = state.get("token_kind")
    if kind == "char" and not state.get("chars"):
        return TokenizerState("char", model_vocab_size=state["model_vocab_size"])
    try:
        return read_state(state, SPECIAL_STRINGS)
    except DataError as e:
        raise TokenizerError(e.what, e.found, e.cure) from e


def _listed(ids: Any) -> Sequence[int]:
    listed: Sequence[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return listed
