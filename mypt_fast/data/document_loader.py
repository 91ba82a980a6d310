"""Batches that know their documents: positions, boundaries and loss masks beside the tokens.

`DocumentLoader` is a `TokenLoader` for --documents mask and bestfit: the same stream of global
samples, the same one-integer position, and a third member in every batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mypt_fast.data.episode_loader import EpisodeLoader
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.order import SampleOrder, SampleStream
from mypt_fast.data.packing import (
    BestFitLayout,
    DocumentBatch,
    Int64,
    Layout,
    LossRule,
    Pieces,
    WindowLayout,
)
from mypt_fast.data.share import MAX_SAMPLES, Share
from mypt_fast.errors import DataError, FormatError, TokenRangeError

ALGORITHM = "documents/v1"
STATE_VERSION = 1
DEFAULT_RULE = LossRule()
LAYOUTS = ("mask", "bestfit")
_SCAN_TOKENS = 1 << 20


class Corpus(Protocol):
    """What a document loader needs of a corpus."""

    source: str
    fingerprint: str
    n_tokens: int

    def read_span(self, start: int, count: int) -> NDArray[Any]:
        """The tokens [start, start + count), which are in the corpus."""
        ...

    def document_ends(self) -> NDArray[Any] | None:
        """Where documents end, ascending, the last at n_tokens; None where nobody stored it."""
        ...

    def locate(self, token: int) -> tuple[str, int]:
        """The shard of a token and its position there."""
        ...


class LossPlane(Protocol):
    """Weights stored beside the tokens, one for each: what predicting that token counts."""

    def read_weights(self, start: int, count: int) -> NDArray[Any]:
        """The weights of the tokens [start, start + count)."""
        ...


def checked_ends(ends: NDArray[Any], n_tokens: int, source: str) -> Int64:
    """Check a document index: ascending, from the first token to the last.

    Returns:
        The ends as int64 (a view of uint64), empty documents left out.

    Raises:
        FormatError: the index is not one of this corpus.
    """
    array = np.ascontiguousarray(ends)
    array = array.view(np.int64) if array.dtype == np.uint64 else array.astype(np.int64)
    found = ""
    if not array.size or int(array[-1]) != n_tokens:
        found = f"it ends at {array[-1] if array.size else 'nothing'}, the tokens at {n_tokens}"
    elif int(array[0]) < 0 or bool((array[1:] < array[:-1]).any()):
        at = int(np.argmax(array[1:] < array[:-1])) + 1
        found = f"document {at} ends at {array[at]}, the one before it at {array[at - 1]}"
    if found:
        raise FormatError(f"document index of {source}", found, "prepare the dataset again")
    if int(array[0]) == 0 or bool((array[1:] == array[:-1]).any()):
        array = np.unique(array[array > 0])
    return array


def document_ends(corpus: Corpus, eot_id: int | None) -> tuple[NDArray[Any], str]:
    """Where the documents of a corpus end, and a line for people where that is a guess.

    The index says it; without one every end-of-text token does, which is wrong where texts hold
    that token or were cut without it.

    Raises:
        DataError: there is neither.
    """
    ends = corpus.document_ends()
    if ends is not None:
        return ends, ""
    if eot_id is None:
        raise DataError(
            f"documents of {corpus.source}",
            "it has no document index, and its tokenizer no end-of-text token",
            "prepare it again in the native format, or train with --documents concat",
        )
    found = []
    for start in range(0, corpus.n_tokens, _SCAN_TOKENS):
        block = corpus.read_span(start, min(_SCAN_TOKENS, corpus.n_tokens - start))
        found.append(np.flatnonzero(block == eot_id) + start + 1)
    ends = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    if not ends.size or ends[-1] != corpus.n_tokens:
        ends = np.append(ends, corpus.n_tokens)
    note = (
        f"{corpus.source} has no document index: documents end at token {eot_id}, which is wrong "
        "where texts hold it or were cut without it; the native format stores boundaries"
    )
    return ends, note


class DocumentLoader(Share):
    """The stream of batches with documents, cut into steps of `global_batch` samples.

    Args:
        corpus: where the tokens are.
        seq_len: tokens per row, T.
        ends: of the documents, (n,) ascending; the last is corpus.n_tokens.
        documents: "mask" (windows cut at boundaries) or "bestfit" (whole documents, packed).
        seed: of the order; it touches no global random state.
        order: of the windows of "mask", as `TokenLoader` takes it; "bestfit" has its own.
        global_batch: samples per step over all ranks; a multiple of world_size.
        rank: whose share `next` reads.
        world_size: number of ranks.
        vocab_size: when given, a token id not below it raises TokenRangeError.
        pad_id: token that padding shows.
        rule: which targets count.
        weights: weights stored with the tokens, that multiply the loss mask.

    Attributes:
        n_windows: samples per epoch.
        position: global samples in finished steps.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        ends: NDArray[Any],
        documents: str,
        *,
        seed: int,
        order: str | SampleStream = "epoch",
        global_batch: int = 1,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
        pad_id: int = 0,
        rule: LossRule = DEFAULT_RULE,
        weights: LossPlane | None = None,
    ) -> None:
        if documents not in LAYOUTS:
            raise ValueError(f"documents is one of {', '.join(LAYOUTS)}, not {documents!r}")
        super().__init__(corpus, seq_len, global_batch, rank, world_size)
        import xxhash

        ends = checked_ends(ends, corpus.n_tokens, corpus.source)
        self._corpus, self._seq_len, self._seed = corpus, seq_len, seed
        self._boundaries = xxhash.xxh3_64_hexdigest(ends.astype("<i8", copy=False).data)
        if documents == "bestfit" and order != "epoch":
            raise ValueError("bestfit has an order of its own")
        if isinstance(order, str):
            order = SampleOrder(corpus.n_tokens, seq_len, seed, order)
        self._layout: Layout = (
            WindowLayout(ends, seq_len, order)
            if documents == "mask"
            else BestFitLayout(ends, seq_len, seed)
        )
        self._order = order.identity() if documents == "mask" else None
        self._vocab_size, self._pad_id = vocab_size, pad_id
        self._rule, self._weights = rule, weights
        self.n_windows = self._layout.n_samples
        self._open = True

    def read(self, first_sample: int, rows: int) -> DocumentBatch:
        """Read samples [first_sample, first_sample + rows) without moving the position.

        Raises:
            TokenRangeError: a token id is not below vocab_size.
        """
        pieces = self._pieces(first_sample, rows)
        shape = (rows, self._seq_len)
        x = np.full(shape, self._pad_id, dtype=np.int64)
        y = np.full(shape, self._pad_id, dtype=np.int64)
        documents = pieces.documents(self._seq_len, self._rule)
        for row, column, start, length in zip(*(a.tolist() for a in pieces.reads()), strict=True):
            count = min(length + 1, self._corpus.n_tokens - start)
            span = self._corpus.read_span(start, count)
            self._check_tokens(start, span)
            x[row, column : column + length] = span[:length]
            y[row, column : column + count - 1] = span[1:]
            if self._weights is not None:
                target = documents.loss_mask[row, column : column + count - 1]
                target *= self._weights.read_weights(start + 1, count - 1)
        return DocumentBatch(x, y, documents)

    def next(self, rows: int) -> DocumentBatch:
        """Read the next rows of this rank's share; the position moves when the share is used up."""
        first, _ = self._ask(rows)
        batch = self.read(first, rows)
        self._move(rows)
        return batch

    def step_weight(self) -> float:
        """Sum of the loss masks of the current step over all ranks: what its loss is divided by.

        It follows from the boundaries, so no token is read and no rank is asked.
        """
        return self.weight(self.position, self._global_batch)

    def weight(self, first_sample: int, rows: int) -> float:
        """Sum of the loss masks of samples [first_sample, first_sample + rows)."""
        pieces = self._pieces(first_sample, rows)
        if self._weights is None:
            return float(pieces.targets(self._rule))
        mask = pieces.documents(self._seq_len, self._rule).loss_mask
        total = 0.0
        for row, column, start, length in zip(*(a.tolist() for a in pieces.reads()), strict=True):
            count = min(length, self._corpus.n_tokens - start - 1)
            stored = np.asarray(self._weights.read_weights(start + 1, count), dtype=np.float64)
            total += float(mask[row, column : column + count] @ stored)
        return total

    def close(self) -> None:
        """Read no more; the corpus stays open for others."""
        self._open = False

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "algo": ALGORITHM,
            "documents": self._layout.name,
            "seed": self._seed,
            "seq_len": self._seq_len,
            "n_windows": self.n_windows,
            "fingerprint": self._corpus.fingerprint,
            "boundaries": self._boundaries,
            "order": self._order,
        }

    def _pieces(self, first_sample: int, rows: int) -> Pieces:
        if not self._open:
            raise ValueError("the loader is closed")
        if rows < 1 or first_sample < 0 or first_sample + rows > MAX_SAMPLES:
            raise ValueError(f"samples [{first_sample}, +{rows}) are not in [0, 2^62)")
        return self._layout.pieces(first_sample, rows)

    def _check_tokens(self, start: int, span: NDArray[Any]) -> None:
        if self._vocab_size is None or int(span.max()) < self._vocab_size:
            return
        at = int(np.argmax(span >= self._vocab_size))
        name, position = self._corpus.locate(start + at)
        raise TokenRangeError(
            f"token {position} of {name} ({self._corpus.source})",
            f"id {span[at]}, where vocab_size is {self._vocab_size}",
            "the data was written with another tokenizer than the model's: prepare it again, or "
            "use a model whose vocab_size covers it",
        )


Loader = TokenLoader | DocumentLoader | EpisodeLoader
