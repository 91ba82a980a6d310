"""Where documents lie in a batch: boundaries, positions, loss masks, and best-fit packing.

A corpus is one sequence of tokens, and `ends` says where its documents end in it: ascending, the
last is the number of tokens. Two layouts turn sample numbers into rows, as pure functions of
(seed, sample), so the position of a run stays one integer:

`WindowLayout`   the windows of the plain loader, cut where documents end ("mask")
`BestFitLayout`  whole documents, put together so that rows are full ("bestfit")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mypt_fast.data.order import Permutation, SampleStream

Int64 = NDArray[np.int64]

FRAGMENTS = 4096  # what one best-fit plan packs, about: fewer leave gaps, more take longer
_CHUNKS = 32  # stretches of the corpus that a plan's fragments come from
_MIN_ROWS, _MAX_ROWS = 32, 4096  # of a plan
_PLANS_KEPT = 4
_MASK64 = (1 << 64) - 1
_ROTATION, _ROWS = 1, 2  # what a key is for


@dataclass(frozen=True)
class LossRule:
    """Which targets count, beside the padding that never does.

    Attributes:
        crossing: the last token of a document is asked for the first of the next.
        opening: the first token of a document is asked for the second.
    """

    crossing: bool = False
    opening: bool = True


@dataclass(frozen=True)
class Pieces:
    """Stretches of the corpus that fill the rows of a batch, each row from its left.

    Attributes:
        row: (n,) int64, ascending.
        start: (n,) int64, first token in the corpus.
        length: (n,) int64, in tokens, at least 1.
        closes: (n,) bool, whether the last token is the last of its document.
        n_rows: rows of the batch.
        n_tokens: of the corpus.
    """

    row: Int64
    start: Int64
    length: Int64
    closes: NDArray[np.bool_]
    n_rows: int
    n_tokens: int

    def targets(self, rule: LossRule) -> int:
        """How many targets count: the sum of the loss mask, without making it."""
        dropped = self._dropped_last(rule)
        total = int(self.length.sum()) - int(dropped.sum())
        if not rule.opening:  # of a one-token piece the first token is the last
            total -= int((~(dropped & (self.length == 1))).sum())
        return total

    def reads(self) -> tuple[Int64, Int64, Int64, Int64]:
        """Rows, columns, starts and lengths of what to read, neighbours in the corpus as one."""
        follows = (self.row[1:] == self.row[:-1]) & (self.start[1:] == self._stop[:-1])
        heads = np.flatnonzero(np.concatenate([[True], ~follows]))
        lengths = np.add.reduceat(self.length, heads)
        filled = np.cumsum(self.length) - self.length
        columns = filled - filled[np.searchsorted(self.row, self.row)]
        return self.row[heads], columns[heads], self.start[heads], lengths

    def documents(self, seq_len: int, rule: LossRule) -> Documents:
        """Lay the pieces out in rows of `seq_len` tokens; what they do not fill is padding."""
        filled = np.bincount(self.row, self.length, self.n_rows).astype(np.int64)
        padding = seq_len - filled
        padded = np.flatnonzero(padding)
        behind = np.searchsorted(self.row, padded, "right")
        lengths = np.insert(self.length, behind, padding[padded])
        rows = np.insert(self.row, behind, padded)
        number = np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
        is_padding = np.insert(np.zeros(len(self.row), dtype=bool), behind, True)
        number[is_padding] = 0
        stops = np.cumsum(lengths)
        counts = np.repeat((~is_padding).astype(np.float32), lengths)
        dropped = np.insert(self._dropped_last(rule), behind, True)
        counts[stops[dropped] - 1] = 0
        if not rule.opening:
            counts[stops - lengths] = 0
        shape = (self.n_rows, seq_len)
        return Documents(
            position_ids=_ragged_arange(lengths).reshape(shape),
            segment_ids=np.repeat(number.astype(np.int32), lengths).reshape(shape),
            cu_seqlens=np.concatenate([[0], stops]).astype(np.int32),
            max_seqlen=int(lengths.max()),
            loss_mask=counts.reshape(shape),
        )

    @property
    def _stop(self) -> Int64:
        return self.start + self.length

    def _dropped_last(self, rule: LossRule) -> NDArray[np.bool_]:
        """Pieces whose last token is asked for nothing; the corpus' last has no next at all."""
        return (self._stop == self.n_tokens) if rule.crossing else self.closes


@dataclass(frozen=True)
class Documents:
    """The documents of a batch of B rows of T tokens.

    Attributes:
        position_ids: (B, T) int64, from 0 in each document (and in the padding of a row).
        segment_ids: (B, T) int32, from 1 in each row; 0 is padding.
        cu_seqlens: (n + 1,) int32: where segments, padding included, begin in the B*T tokens of
            the flattened batch, and B*T at the end. No segment is in two rows. Empty where rows
            are whole.
        max_seqlen: tokens of the longest segment.
        loss_mask: (B, T) float32, weight of each target; 0 on padding.
    """

    position_ids: Int64
    segment_ids: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    loss_mask: NDArray[np.float32]


class DocumentBatch(NamedTuple):
    """Tokens and targets, (B, T) int64, and the documents they are in."""

    x: Int64
    y: Int64
    documents: Documents


class Layout(Protocol):
    """Turns sample numbers into pieces."""

    name: str
    n_samples: int  # of an epoch

    def pieces(self, first_sample: int, count: int) -> Pieces:
        """What fills samples [first_sample, first_sample + count)."""
        ...


class WindowLayout:
    """Windows of `seq_len` tokens, as the plain loader reads them, cut where documents end.

    A document that begins in one window and ends in another is cut between them; positions start
    from 0 again there, as they do in every window of a run without documents.
    """

    name = "mask"

    def __init__(self, ends: Int64, seq_len: int, order: SampleStream) -> None:
        self._ends, self._seq_len, self._order = ends, seq_len, order
        self.n_samples = order.n_windows

    def pieces(self, first_sample: int, count: int) -> Pieces:
        """See Layout."""
        starts = self._order.starts(first_sample, count)
        row, begin, length = cut_at_ends(self._ends, starts, starts + self._seq_len)
        closes = _is_end(self._ends, begin + length)
        return Pieces(row, begin, length, closes, count, int(self._ends[-1]))


class BestFitLayout:
    """Rows of whole documents: every token once an epoch, and padding in the last rows alone.

    The corpus, rotated by a random offset, is cut into chunks; 32 of them, from all over it, make
    the `rows_per_window * seq_len` tokens of a plan, about 4096 documents. Documents longer than
    `seq_len` are cut into pieces of it. Best-fit decreasing puts the fragments into exactly
    `rows_per_window` rows, and what does not fit in one piece fills the gaps that are left. So the
    rows of a plan are a closed form: a sample is found without the plans before it. The price is
    that about one document in a hundred is cut where it could have stayed whole.

    Args:
        ends: of the documents.
        seq_len: tokens of a row, T.
        seed: of chunks and rows; no global random state is touched.
    """

    name = "bestfit"

    def __init__(self, ends: Int64, seq_len: int, seed: int) -> None:
        self._ends, self._seq_len, self._seed = ends, seq_len, seed
        self._n_tokens = int(ends[-1])
        chunk_rows = _chunk_rows(self._n_tokens, len(ends), seq_len)
        self.rows_per_window = _CHUNKS * chunk_rows
        self._chunk = chunk_rows * seq_len
        self._n_chunks = self._n_tokens // self._chunk  # whole ones; the rest ends the epoch
        self.n_samples = -(-self._n_tokens // seq_len)
        self.n_windows = -(-self.n_samples // self.rows_per_window)
        self.plan: Callable[[int, int], Plan] = lru_cache(_PLANS_KEPT)(self._plan)
        self._chunk_order = lru_cache(2)(self._permutation)

    def pieces(self, first_sample: int, count: int) -> Pieces:
        """See Layout."""
        parts: list[tuple[Int64, Int64, Int64]] = []
        done = 0
        while done < count:
            epoch, index = divmod(first_sample + done, self.n_samples)
            window, row = divmod(index, self.rows_per_window)
            plan = self.plan(epoch, window)
            rows = min(count - done, plan.n_rows - row)
            begin, end = plan.row_starts[row], plan.row_starts[row + rows]
            here = slice(int(begin), int(end))
            parts.append((plan.row[here] - row + done, plan.start[here], plan.length[here]))
            done += rows
        row_of, start, length = (np.concatenate(column) for column in zip(*parts, strict=True))
        closes = _is_end(self._ends, start + length)
        return Pieces(row_of, start, length, closes, count, self._n_tokens)

    def _plan(self, epoch: int, window: int) -> Plan:
        """Pack one window: a pure function of (seed, epoch, window)."""
        starts, stops = self._chunks(epoch, window)
        _, begin, length = cut_at_ends(self._ends, starts, stops)
        parts = -(-length // self._seq_len)
        begin = np.repeat(begin, parts) + self._seq_len * _ragged_arange(parts)
        length = np.repeat(begin[np.cumsum(parts) - parts] + length, parts) - begin
        length = np.minimum(length, self._seq_len)
        n_rows = -(-int(length.sum()) // self._seq_len)
        piece, offset, size, bin_of = best_fit(length, n_rows, self._seq_len)
        shuffled = np.argsort(_draws(_key(self._seed, epoch, window, _ROWS), n_rows), kind="stable")
        row = shuffled[bin_of]
        order = np.argsort(row, kind="stable")
        row, start, size = row[order], (begin[piece] + offset)[order], size[order]
        return Plan(row, start, size, np.searchsorted(row, np.arange(n_rows + 1)))

    def _chunks(self, epoch: int, window: int) -> tuple[Int64, Int64]:
        """Starts and stops of the stretches that a window packs."""
        first = window * _CHUNKS
        chunks = np.arange(first, min(first + _CHUNKS, self._n_chunks), dtype=np.int64)
        if chunks.size:
            chunks = self._chunk_order(epoch).at(chunks)
        sizes = np.full(len(chunks), self._chunk, dtype=np.int64)
        if window == self.n_windows - 1 and self._n_tokens % self._chunk:
            chunks = np.append(chunks, self._n_chunks)
            sizes = np.append(sizes, self._n_tokens % self._chunk)
        rotation = _key(self._seed, epoch, 0, _ROTATION) % self._n_tokens
        starts = (chunks * self._chunk + rotation) % self._n_tokens
        stops = starts + sizes
        wrapped = stops > self._n_tokens  # one chunk goes on at the beginning of the corpus
        rest = stops[wrapped] - self._n_tokens
        starts = np.concatenate([starts, np.zeros_like(rest)])
        return starts, np.concatenate([np.minimum(stops, self._n_tokens), rest])

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self._n_chunks, self._seed, epoch)


class Plan:
    """The rows of one best-fit window.

    Attributes:
        row: (n,) ascending, of each piece.
        start: (n,) first token in the corpus.
        length: (n,) in tokens.
        row_starts: (n_rows + 1,) first piece of each row, and n.
        n_rows: rows of the window.
    """

    def __init__(self, row: Int64, start: Int64, length: Int64, row_starts: Int64) -> None:
        self.row, self.start, self.length, self.row_starts = row, start, length, row_starts
        self.n_rows = len(row_starts) - 1


def cut_at_ends(ends: Int64, starts: Int64, stops: Int64) -> tuple[Int64, Int64, Int64]:
    """Cut the stretches [starts, stops) where documents end.

    Returns:
        For each piece, in order: which stretch it is of, its first token, its length.
    """
    first = np.searchsorted(ends, starts, "right")
    pieces = np.searchsorted(ends, stops, "left") - first + 1
    of = np.repeat(np.arange(len(starts)), pieces)
    number = _ragged_arange(pieces)
    cut = first[of] + number  # the document end that closes the piece, if it is not the last
    begin = np.where(number == 0, starts[of], ends[np.maximum(cut - 1, 0)])
    is_last = number == pieces[of] - 1
    end = np.where(is_last, stops[of], ends[np.minimum(cut, len(ends) - 1)])
    return of, begin, end - begin


def best_fit(
    lengths: Int64, n_bins: int, capacity: int
) -> tuple[Int64, Int64, Int64, NDArray[Any]]:
    """Pack fragments into `n_bins` bins: best-fit decreasing, then what is left into the gaps.

    Args:
        lengths: (n,) of the fragments, from 1 to `capacity`; their sum fits into the bins.
        n_bins: how many bins.
        capacity: of each.

    Returns:
        For each piece: its fragment, its offset within it, its length and its bin. A fragment
        that fits nowhere whole is several pieces, all others are one.
    """
    order = np.argsort(-lengths, kind="stable")
    where = np.full(len(lengths), -1, dtype=np.int64)
    room = np.full(n_bins, capacity, dtype=np.int64)
    bins_with: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some opened bin has room for r: the best fit is a lowest bit
    opened = 0
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            chosen = bins_with[left].pop()
            if not bins_with[left]:
                rooms ^= 1 << left
        elif opened < n_bins:
            chosen, left, opened = opened, capacity, opened + 1
        else:
            continue
        where[i] = chosen
        room[chosen] = left = left - length
        if left:
            bins_with.setdefault(left, []).append(chosen)
            rooms |= 1 << left
    whole = np.flatnonzero(where >= 0)
    zero = np.zeros(len(whole), dtype=np.int64)
    rest = _into_gaps(order[where[order] < 0], lengths, room)
    fitted = (whole, zero, lengths[whole], where[whole])
    piece, offset, size, bin_of = (np.concatenate(c) for c in zip(fitted, rest, strict=True))
    return piece, offset, size, bin_of


def _into_gaps(
    fragments: Int64, lengths: Int64, room: Int64
) -> tuple[Int64, Int64, Int64, NDArray[Any]]:
    """Lay fragments end to end over the gaps of the bins, the largest of both first."""
    gaps = np.argsort(-room, kind="stable")
    fragment_stops, gap_stops = np.cumsum(lengths[fragments]), np.cumsum(room[gaps])
    total = int(fragment_stops[-1]) if fragments.size else 0
    cuts = np.union1d(fragment_stops, gap_stops[(gap_stops > 0) & (gap_stops < total)])
    begins = np.concatenate([[0], cuts[:-1]]).astype(np.int64)[: len(cuts)]
    which = np.searchsorted(fragment_stops, begins, "right")
    offset = begins - (fragment_stops - lengths[fragments])[which]
    bins = gaps[np.searchsorted(gap_stops, begins, "right")]
    return fragments[which], offset, cuts - begins, bins


def _chunk_rows(n_tokens: int, n_documents: int, seq_len: int) -> int:
    """Rows of a chunk, so that a window has about FRAGMENTS fragments."""
    fragment = min(n_tokens / n_documents, seq_len)
    rows = min(max(FRAGMENTS * fragment / seq_len, _MIN_ROWS), _MAX_ROWS)
    return max(1, round(rows / _CHUNKS))


def _is_end(ends: Int64, tokens: Int64) -> NDArray[np.bool_]:
    return ends[np.minimum(np.searchsorted(ends, tokens), len(ends) - 1)] == tokens


def _ragged_arange(counts: Int64) -> Int64:
    """0 .. c-1 for each c of `counts`, one after the other."""
    stops = np.cumsum(counts)
    total = int(stops[-1]) if len(stops) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(stops - counts, counts)


def _key(*parts: int) -> int:
    """Mix integers into 64 bits (splitmix64's finaliser over each)."""
    z = 0
    for part in parts:
        z = (z ^ part) + 0x9E3779B97F4A7C15 & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return z


def _draws(key: int, count: int) -> NDArray[np.uint64]:
    """Numbers that sort in a random order, fixed by `key`."""
    z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
