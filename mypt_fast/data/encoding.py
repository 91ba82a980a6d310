"""Pieces of text to tokens on several cores, in order, a sample of them checked as it goes.

The tokenizers release the GIL, so threads are enough.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from mypt_fast.data.documents import (
    BLOCK_CHARS,
    Piece,
    Reader,
    cut_position,
    is_before_mark,
    is_before_white,
)
from mypt_fast.data.duplicates import Duplicates
from mypt_fast.data.fast_gpt2 import EncodeBatch
from mypt_fast.data.shard_writer import Tokens
from mypt_fast.errors import IntegrityError
from mypt_fast.gpt2_files import gpt2_encoding
from mypt_fast.tokenizer import Tokenizer

# The beginnings of so many pieces are always checked; of all pieces one in _SAMPLE_EVERY, whole, by
# a hash of its text.
ALWAYS_CHECKED = 16
_BEGINNING_CHARS = 1 << 16
_SAMPLE_EVERY = 512
_DECODED_TOKENS = 2000


class Unit(NamedTuple):
    """What a thread encodes at a time, and from where a run could go on after it.

    Attributes:
        pieces: what is to be encoded.
        first: how many pieces came before.
        reader: the reader's position after the unit.
        counts: what `Duplicates` counted up to there.
    """

    pieces: list[Piece]
    first: int
    reader: dict[str, int]
    counts: dict[str, Any]


class Encoded(NamedTuple):
    """The tokens of a unit: for each split, with where documents begin in them."""

    unit: Unit
    splits: dict[str, tuple[Tokens, list[int]]]
    verified: int


class Encoder:
    """Encode units.

    Args:
        tokenizer: what to encode with.
        dtype: of the tokens that come out.
        eot: the token to end each document with, or None.
        with_specials: whether special tokens are recognised in the text, as MyPT's pipeline does.
        fast: what encodes ordinary text instead of the tokenizer, see `fast_gpt2`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: np.dtype[Any],
        eot: int | None = None,
        with_specials: bool = False,
        fast: EncodeBatch | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._end = None if eot is None else np.array([eot], dtype=dtype)
        self._with_specials = with_specials
        self._fast = fast

    def __call__(self, unit: Unit) -> Encoded:
        """Encode one unit.

        Raises:
            DataError: a char vocabulary lacks a character.
            IntegrityError: a checked piece has other tokens than it should.
        """
        parts: dict[str, list[Tokens]] = {}
        starts: dict[str, list[int]] = {}
        sizes: dict[str, int] = {}
        verified = 0
        encoded = self._encode([piece.text for piece in unit.pieces])
        for number, (piece, tokens) in enumerate(
            zip(unit.pieces, encoded, strict=True), unit.first
        ):
            if _is_sampled(piece.text):
                self._verify(piece.text, tokens)
                verified += 1
            elif number < ALWAYS_CHECKED:
                self._verify(_beginning(piece.text), tokens, len(piece.text))
                verified += 1
            size = sizes.get(piece.split, 0)
            if piece.starts:
                starts.setdefault(piece.split, []).append(size)
            kept = parts.setdefault(piece.split, [])
            kept.append(tokens)
            size += len(tokens)
            if piece.ends and self._end is not None:
                kept.append(self._end)
                size += 1
            sizes[piece.split] = size
        splits = {s: (_joined(parts[s], self._dtype), starts.get(s, [])) for s in parts}
        return Encoded(unit, splits, verified)

    def _encode(self, texts: list[str]) -> Sequence[npt.NDArray[np.uint32]]:
        if self._fast is not None:
            return self._fast(texts)
        if self._with_specials:
            return [np.array(self._tokenizer.encode(text), dtype=np.uint32) for text in texts]
        return [self._tokenizer.encode_to_numpy(text) for text in texts]

    def _verify(self, text: str, tokens: npt.NDArray[np.uint32], length: int = 0) -> None:
        """Compare tokens of a text, of which there may be more if it is the beginning of one."""
        if self._tokenizer.kind == "gpt2" and not self._with_specials:
            reference = gpt2_encoding()
            expected = reference.encode_ordinary(text)
            is_whole = len(text) >= length
            found = tokens if is_whole else tokens[: len(expected)]
            is_right = (
                found.tolist() == expected and reference.decode_bytes(expected) == text.encode()
            )
        else:
            # The last token may end within a character.
            beginning = self._tokenizer.decode(tokens[:_DECODED_TOKENS].tolist())
            is_right = text.startswith(beginning.rstrip("\ufffd"))
        if not is_right:
            raise IntegrityError(
                f"the tokens of a text that begins {text[:40]!r}",
                "are not those of the tokenizer",
                "--encoder tiktoken avoids gigatoken; if it was not used, please report this",
            )


def _beginning(text: str) -> str:
    """Return a text's beginning that has the same tokens as it has in the text."""
    end = cut_position(text, 0, _BEGINNING_CHARS) if len(text) > _BEGINNING_CHARS else len(text)
    is_safe = end < len(text) and (is_before_white(text, end) or is_before_mark(text, end))
    return text[:end] if is_safe else text


def _is_sampled(text: str) -> bool:
    data = text[:256].encode("utf-8", "surrogatepass")
    return xxhash.xxh3_64_intdigest(data, seed=len(text)) % _SAMPLE_EVERY == 0


def _joined(parts: list[Tokens], dtype: np.dtype[Any]) -> Tokens:
    return np.concatenate(parts, dtype=dtype, casting="unsafe")


def units(reader: Reader, pieces: Iterable[Piece], duplicates: Duplicates) -> Iterator[Unit]:
    """Group small documents, so that a thread gets enough to be worth its while."""
    held: list[Piece] = []
    size = 0

    def unit() -> Unit:
        first = duplicates.pieces
        kept = list(duplicates.filter(held))
        return Unit(kept, first, reader.position(), duplicates.counts())

    for piece in pieces:
        held.append(piece)
        size += len(piece.text)
        if size >= BLOCK_CHARS // 2:
            yield unit()
            held, size = [], 0
    if held:
        yield unit()


def in_order(
    work: Callable[[Unit], Encoded], source: Iterable[Unit], workers: int
) -> Generator[Encoded, None, None]:
    """Map in threads, a bounded number of units in flight."""
    if workers == 1:
        yield from map(work, source)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    waiting: deque[Future[Encoded]] = deque()
    try:
        for unit in source:
            waiting.append(pool.submit(work, unit))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Return how many cores this process may use, 32 at most."""
    # Not every system can tell.
    known = getattr(os, "sched_getaffinity", None)
    return min(len(known(0)) if known else os.cpu_count() or 1, 32)
