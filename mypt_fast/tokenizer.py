"""Text to token ids and back: GPT-2's BPE, one id per character, or a BPE trained on the spot.

All three kinds share special tokens, decoding and the JSON state of MyPT's `tokenizer.json`;
they differ in one small backend each. numpy, tiktoken and tokenizers load on first use.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mypt_fast.errors import DataError
from mypt_fast.gpt2_files import GPT2_BASE_VOCAB, byte_alphabet, gpt2_encoding
from mypt_fast.tokenizer_state import TokenizerState, build_state, read_state

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Tokens = npt.NDArray[np.uint32]

ENDOFTEXT = "<|endoftext|>"
GPT2_EOT = 50256
GPT2_MODEL_VOCAB = 50304

_TAGS = (
    "system",
    "user",
    "assistant",
    "user_context",
    "assistant_context",
    "toolcall",
    "toolresult",
    "think",
    "cite",
)
# Name -> string, in the pinned order: each tag's opening and closing token, then the end of turn.
SPECIAL_STRINGS: dict[str, str] = {
    f"myPT_{tag}_{side}": f"<{slash}myPT_{tag}>"
    for tag in _TAGS
    for side, slash in (("open", ""), ("close", "/"))
}
SPECIAL_STRINGS["myPT_eot"] = "<myPT_eot>"
# Name -> id under GPT-2: 50257..50275.
SPECIAL_TOKENS: dict[str, int] = {
    name: GPT2_BASE_VOCAB + n for n, name in enumerate(SPECIAL_STRINGS)
}


class _Backend(Protocol):
    """What the three kinds do differently."""

    def encode(self, text: str) -> Tokens:
        """Encode text that holds no special tokens."""

    def token_bytes(self, token: int) -> bytes | None:
        """Return the UTF-8 bytes of a token, None where the id stands for nothing."""


class Tokenizer:
    """Encode and decode text; build one with the class methods, not with this constructor.

    Attributes:
        kind: "gpt2", "char" or "bpe".
        chars: the vocabulary of a char tokenizer, else None.
        model_vocab_size: what `vocab_size` in the model's config must be.
        n_tokens: number of ids that can be produced and decoded.
        eot_id: the token that ends a document, None for char.
        special_tokens: name -> id; `special_token_encoder` and `special_token_decoder` map strings.
    """

    def __init__(self, state: TokenizerState, backend: _Backend) -> None:
        self.kind = state.kind
        self.chars = state.chars
        self.base_vocab_size = state.base_vocab_size
        self.special_tokens = dict(state.special_ids)
        self.special_token_encoder = dict(state.special_strings)
        self.special_token_decoder = {i: s for s, i in state.special_strings.items()}
        self._state = state
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        # Longest first, so that no special token hides behind a shorter one.
        names = sorted(self.special_token_encoder, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.model_vocab_size, self.n_tokens, self.eot_id = self._sizes()

    def _sizes(self) -> tuple[int, int, int | None]:
        if self.kind == "char":
            size = len(self.chars or ())
            return size, size, None
        base = self.base_vocab_size or 0
        n_tokens = max([base, *(i + 1 for i in self.special_token_decoder)])
        if self.kind == "gpt2":
            return self._state.model_vocab_size or GPT2_MODEL_VOCAB, n_tokens, GPT2_EOT
        eot = self._state.bpe_vocab.get(ENDOFTEXT)
        return -(-n_tokens // 64) * 64, n_tokens, eot

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """Return GPT-2's tokenizer with MyPT's 19 special tokens."""
        return cls.from_state({"token_kind": "gpt2"})

    @classmethod
    def char(cls, chars: Sequence[str]) -> Tokenizer:
        """Return a tokenizer with one id per character, in the order given."""
        return cls.from_state({"token_kind": "char", "chars": list(chars)})

    @classmethod
    def from_text(cls, text: str) -> Tokenizer:
        """Return a char tokenizer whose vocabulary is the sorted set of `text`'s characters."""
        return cls.char(sorted(set(text)))

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocab_size` tokens, special tokens included.

        Raises:
            DataError: `vocab_size` has no room for the 256 bytes and the special tokens.
        """
        import json

        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        specials = [ENDOFTEXT, *SPECIAL_STRINGS.values()]
        smallest = 256 + len(specials)
        if not smallest <= vocab_size <= 1 << 20:
            raise DataError(
                f"--vocab_size {vocab_size}",
                f"a byte-level BPE needs at least {smallest} tokens and takes at most {1 << 20}",
                "8192 is a sensible start",
            )
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=specials,
            initial_alphabet=sorted(byte_alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls.from_state({"token_kind": "bpe", "bpe": json.loads(model.to_str())})

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tokenizer:
        """Rebuild a tokenizer from `tokenizer.json` of any age; special ids stay as stored.

        Raises:
            DataError: the state is not one, or holds impossible values.
        """
        checked = read_state(state, SPECIAL_STRINGS)
        if checked.kind == "char":
            return cls(checked, _CharBackend(checked.chars or []))
        if checked.kind == "bpe":
            return cls(checked, _BpeBackend(checked))
        return cls(checked, _Gpt2Backend())

    def get_state(self) -> dict[str, Any]:
        """Return the JSON state, keys in MyPT's order."""
        return build_state(self._state, self.model_vocab_size)

    def encode(self, text: str) -> list[int]:
        """Encode `text`, special tokens recognised; `<|endoftext|>` is plain text, as in MyPT."""
        if self._special_pattern is None:
            return self.encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            if match.start() > start:
                ids += self.encode_ordinary(text[start : match.start()])
            ids.append(self.special_token_encoder[match.group()])
            start = match.end()
        return ids + self.encode_ordinary(text[start:]) if start < len(text) else ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode `text` as plain text, whatever it spells.

        Raises:
            DataError: a char vocabulary lacks one of the characters.
        """
        ids: list[int] = self._backend.encode(text).tolist()
        return ids

    def encode_to_numpy(self, text: str) -> Tokens:
        """Encode as `encode_ordinary` does, into an array, releasing the GIL where it can."""
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; an id without a token becomes `<unk_tok_ID>`, broken UTF-8 U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(int(token)) for token in ids]) + stream.flush()

    def stream(self) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return StreamDecoder(self)

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token by name (`myPT_eot`), None where it is not there."""
        return self.special_tokens.get(name)

    def stop_ids(self) -> list[int]:
        """Return the ids at which an answer ends: document end, turn end, assistant's close."""
        found = [
            self.eot_id,
            self.special_id("myPT_eot"),
            self.special_id("myPT_assistant_close"),
        ]
        return [token for token in found if token is not None]

    def _bytes_of(self, token: int) -> bytes | None:
        known = self._bytes.get(token)
        if known is None and (known := self._backend.token_bytes(token)) is not None:
            self._bytes[token] = known
        return known


class StreamDecoder:
    """Decode ids one by one, holding back bytes until they form whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes, often all of its own, sometimes none."""
        special = self._tokenizer.special_token_decoder.get(token)
        if special is None:
            data = self._tokenizer._bytes_of(token)
            if data is not None:
                return self._utf8.decode(data)
            special = f"<unk_tok_{token}>"
        # A special token ends the run: bytes left hanging before it can never be completed.
        return self.flush() + special

    def flush(self) -> str:
        """Return what is still held back, as U+FFFD, and start afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _Gpt2Backend:
    def __init__(self) -> None:
        gpt2_encoding()  # missing files are reported here, not at the first use

    def encode(self, text: str) -> Tokens:
        try:
            ids: Tokens = gpt2_encoding().encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(_without_surrogates(text))
        return ids

    def token_bytes(self, token: int) -> bytes | None:
        if not 0 <= token < GPT2_BASE_VOCAB:
            return None
        data: bytes = gpt2_encoding().decode_single_token_bytes(token)
        return data


class _CharBackend:
    def __init__(self, chars: Sequence[str]) -> None:
        self._chars = list(chars)
        self._table: Tokens | None = None

    def _lookup(self) -> Tokens:
        import numpy as np

        if self._table is None:
            codes = np.array([ord(char) for char in self._chars], dtype=np.int64)
            # One entry past the largest character stands for everything above it.
            table = np.full(int(codes.max()) + 2, len(codes), dtype=np.uint32)
            table[codes] = np.arange(len(codes), dtype=np.uint32)
            self._table = table
        return self._table

    def encode(self, text: str) -> Tokens:
        import numpy as np

        table = self._lookup()
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids: Tokens = table[np.minimum(codes, np.uint32(len(table) - 1))]
        unknown = ids == len(self._chars)
        if unknown.any():
            at = int(unknown.argmax())
            raise DataError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at}",
                f"is not among the {len(self._chars)} characters of this char vocabulary",
                "leave it out, or prepare and train with text that contains it",
            )
        return ids

    def token_bytes(self, token: int) -> bytes | None:
        return self._chars[token].encode() if 0 <= token < len(self._chars) else None


class _BpeBackend:
    def __init__(self, state: TokenizerState) -> None:
        from tokenizers import Tokenizer as HfTokenizer
        from tokenizers import models, pre_tokenizers

        # Rebuilt from vocabulary and merges alone: the special tokens stay unknown to it, so
        # ordinary text never turns into them, and no other stage of a stored file can run.
        vocab, merges = state.bpe_vocab, state.bpe_merges
        self._model = HfTokenizer(models.BPE(vocab=vocab, merges=merges))
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        to_byte = byte_alphabet()
        specials = {ENDOFTEXT, *state.special_strings}
        self._token_bytes = [b""] * len(vocab)
        for token, index in vocab.items():
            self._token_bytes[index] = (
                token.encode() if token in specials else bytes([to_byte[char] for char in token])
            )

    def encode(self, text: str) -> Tokens:
        import numpy as np

        # The batch call, unlike the single one, lets other threads run.
        try:
            (encoded,) = self._model.encode_batch_fast([text], add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # how it refuses a lone surrogate
            return self.encode(_without_surrogates(text))
        return np.array(encoded.ids, dtype=np.uint32)

    def token_bytes(self, token: int) -> bytes | None:
        return self._token_bytes[token] if 0 <= token < len(self._token_bytes) else None
