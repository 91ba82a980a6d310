"""Token batches by position: any sample of the stream in O(1), the same at any world size.

`TokenCorpus` is the tokens, `TokenLoader` the stream of batches over them. Both run on the C++
module `mypt_fast._native` or on NumPy; the batches are equal, so NumPy is oracle and fallback.
Arrays only, no torch: a tensor takes part through its `.numpy()` view.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np

from mypt_fast.data.order import SampleOrder, SampleStream
from mypt_fast.data.prefetch import Allocate, Array, Gate, Plan, Prefetch, aligned
from mypt_fast.data.reader import BatchReader, Int64
from mypt_fast.data.share import MAX_SAMPLES, Share
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import TokenRangeError

STATE_VERSION = 1


class TokenLoader(Share):
    """The stream of batches over a corpus, cut into steps of `global_batch` samples.

    Step s covers samples [s*G, (s+1)*G) of one global stream; rank r of W takes its r-th part of
    G/W. So the stream does not depend on W, and the position is one integer.

    Args:
        corpus: where the tokens are.
        seq_len: tokens per row, T.
        seed: of the order; it touches no global random state.
        order: one of `order.ORDERS`, or a stream over this corpus, such as a mixture.
        global_batch: samples per step over all ranks, G; a multiple of world_size.
        rank: whose share `next` reads.
        world_size: number of ranks, W.
        vocab_size: when given, a token id not below it raises TokenRangeError.
        prefetch: batches that a thread makes ahead of time; 0 makes each when it is asked for. The
            NumPy backend has no such thread and makes each then.
        allocate: makes the arrays of prefetched batches, such as in page-locked memory.

    Attributes:
        n_windows: samples per epoch.
        position: global samples in finished steps.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        seq_len: int,
        *,
        seed: int,
        order: str | SampleStream = "epoch",
        global_batch: int = 1,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
        prefetch: int = 0,
        allocate: Allocate = aligned,
    ) -> None:
        if prefetch < 0 or prefetch == 1:
            raise ValueError(f"prefetch is 0, or 2 batches or more, not {prefetch}")
        super().__init__(corpus, seq_len, global_batch, rank, world_size)
        self._corpus = corpus
        if isinstance(order, str):
            order = SampleOrder(corpus.n_tokens, seq_len, seed, order)
        if (order.n_tokens, order.seq_len) != (corpus.n_tokens, seq_len):
            raise ValueError(
                f"the order is for {order.n_tokens} tokens in rows of {order.seq_len}, the corpus "
                f"has {corpus.n_tokens} and rows {seq_len}"
            )
        self._order = order
        self._reader: BatchReader | None = corpus.reader(self._order)
        self._vocab_size = vocab_size
        self._slots = prefetch if corpus.backend == "native" else 0
        self._allocate = allocate
        self._ahead: Prefetch | None = None
        self._ahead_at = -1  # samples of this rank that the worker's next batch begins after
        self._waits = 0
        self.n_windows = self._order.n_windows

    def read(
        self, first_sample: int, rows: int, x: Int64 | None = None, y: Int64 | None = None
    ) -> tuple[Int64, Int64]:
        """Read samples [first_sample, first_sample + rows) without moving the position.

        Args:
            first_sample: in [0, 2^62).
            rows: how many.
            x: where to write the tokens, (rows, T) int64, or None for a new array.
            y: likewise for the targets, the tokens shifted by one.

        Raises:
            DataError: a token id is not below vocab_size.
        """
        if first_sample < 0 or first_sample + rows > MAX_SAMPLES:
            raise ValueError(f"samples [{first_sample}, +{rows}) are not in [0, 2^62)")
        return self._fill(first_sample, rows, x, y, first_sample + rows)

    def next(
        self, rows: int, x: Int64 | None = None, y: Int64 | None = None
    ) -> tuple[Int64, Int64]:
        """Read the next rows of this rank's share; the position moves when the share is used up.

        Prefetched arrays belong to the loader and change with the next call, or once the gate
        opens that `hold` put on them.
        """
        if self._slots and x is None and y is None and (batch := self._take(rows, False)):
            x, y = batch
            return x, y
        first, following = self._ask(rows)
        batch = self._fill(first, rows, x, y, following)
        self._move(rows)
        return batch

    def next_windows(self, rows: int) -> Array:
        """Read the next rows as (rows, T + 1) tokens of the corpus's own width, uint16 or uint32.

        Inputs are all columns but the last, targets all but the first: a fourth of the bytes of
        int64 inputs alone, for a device that widens them. See `next`.
        """
        if self._slots and (batch := self._take(rows, True)):
            return batch[0]
        first, following = self._ask(rows)
        reader = self._open_reader()
        dtype = np.uint16 if reader.width == 2 else np.uint32
        windows = np.empty((rows, self._order.seq_len + 1), dtype)
        self._check_tokens(first, reader.read_windows(first, windows, following), windows)
        self._move(rows)
        return windows

    def hold(self, gate: Gate) -> None:
        """Keep the arrays of the batch read last until `gate` opens: a copy still reads them."""
        if self._ahead is not None:
            self._ahead.hold(gate)

    def stats(self) -> dict[str, Any]:
        """How tokens are reached, and how often a batch was not ready when it was asked for."""
        waits = self._waits + (self._ahead.waits if self._ahead else 0)
        return {"backend": self._corpus.backend, "io": self._corpus.io, "waits": waits}

    def _take(self, rows: int, narrow: bool) -> tuple[Array, ...] | None:
        """A batch from the worker; None within a step that it was not set to from the start."""
        first, following = self._ask(rows)
        ahead = self._ahead
        if (
            ahead is None
            or self._ahead_at != first
            or ahead.narrow is not narrow
            or ahead.next_rows != rows
        ):
            self._stop_ahead()
            if self._taken:
                return None
            ahead = self._start_ahead(first, rows, narrow)
        try:
            arrays, largest = ahead.take()
            self._check_tokens(first, largest, *arrays)
        except BaseException:
            self._stop_ahead()  # it is past what was handed out
            raise
        self._ahead_at = following
        self._move(rows)
        return arrays

    def _start_ahead(self, first: int, rows: int, narrow: bool) -> Prefetch:
        plan = Plan(first, self._global_batch, self._share, rows)
        self._ahead = Prefetch(
            self._open_reader(), plan, self._order.seq_len, narrow, self._slots, self._allocate
        )
        return self._ahead

    def _open_reader(self) -> BatchReader:
        if self._reader is None:
            raise ValueError("the loader is closed")
        return self._reader

    def _jump(self) -> None:
        self._stop_ahead()

    def _stop_ahead(self) -> None:
        if self._ahead is not None:
            self._waits += self._ahead.waits
            self._ahead.close()
            self._ahead = None

    def close(self) -> None:
        """Stop the worker and drop the reader; the corpus stays open for others."""
        self._stop_ahead()
        self._reader = None

    def __reduce__(self) -> Any:
        raise TypeError("a TokenLoader holds files and a thread: pass its arguments and its state")

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            **self._order.identity(),
            "fingerprint": self._corpus.fingerprint,
        }

    def _fill(
        self, first: int, rows: int, x: Int64 | None, y: Int64 | None, following: int
    ) -> tuple[Int64, Int64]:
        reader = self._open_reader()
        shape = (rows, self._order.seq_len)
        x = np.empty(shape, dtype=np.int64) if x is None else x
        y = np.empty(shape, dtype=np.int64) if y is None else y
        if x.shape != shape:
            raise ValueError(f"x must be {shape}, not {x.shape}")
        largest = reader.read(first, x, y, following)
        self._check_tokens(first, largest, x, y)
        return x, y

    def _check_tokens(self, first: int, largest: int, *parts: Array) -> None:
        """Refuse ids that the model has no embedding for, in windows or in inputs and targets."""
        if self._vocab_size is None or largest < self._vocab_size:
            return
        windows = np.concatenate([parts[0], *(y[:, -1:] for y in parts[1:])], axis=1)
        row, column = (int(v) for v in np.argwhere(windows >= self._vocab_size)[0])
        start = int(self._order.starts(first + row, 1)[0])
        name, position = self._corpus.locate(start + column)
        raise TokenRangeError(
            f"token {position} of {name} ({self._corpus.source})",
            f"id {windows[row, column]}, where vocab_size is {self._vocab_size}",
            "the data was written with another tokenizer than the model's: prepare it again, or "
            "use a model whose vocab_size covers it",
        )
