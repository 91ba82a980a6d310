"""What turns sample numbers into batches: the NumPy reader, and how the native one is found."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mypt_fast.data.format import Shard
from mypt_fast.data.mixture import ALGORITHM as MIXTURE_ALGORITHM
from mypt_fast.data.order import ALGORITHMS, SampleStream
from mypt_fast.errors import DataChangedError, DataError, IntegrityError

Int64 = NDArray[np.int64]
Tokens = NDArray[np.unsignedinteger[Any]]

_BLOCK = 1024  # samples whose starts NumPy computes at once: 0.6 ms, where 8 take 0.2 ms


class BatchReader(Protocol):
    """Fills x and y, each (rows, seq_len) int64, with the samples from `first_sample` on.

    It returns the largest token id read. `next_sample` is a hint: where the next call will read.
    """

    @property
    def width(self) -> int:
        """Bytes of the corpus's widest token."""
        ...

    def read(self, first_sample: int, x: Int64, y: Int64, next_sample: int) -> int:
        """Fill the rows of x and y with consecutive samples."""
        ...

    def read_windows(self, first_sample: int, windows: Tokens, next_sample: int) -> int:
        """Fill the rows of `windows`, each seq_len + 1 tokens, with consecutive samples."""
        ...


def native_module() -> tuple[ModuleType | None, str]:
    """Import the extension; return it, or None and why it cannot be used."""
    try:
        module = importlib.import_module("mypt_fast._native")
    except ImportError as error:
        return None, f"mypt_fast._native cannot be imported: {error}"
    expected = {**ALGORITHMS, "mixture": MIXTURE_ALGORITHM}
    if getattr(module, "ORDER_ALGORITHMS", None) != expected:
        return None, "mypt_fast._native was built from other sources; build it again"
    return module, ""


def map_shard(shard: Shard) -> Tokens:
    """Map the tokens of one shard; the mapping stays open as long as the array."""
    dtype = np.dtype(f"<u{shard.width}")
    if shard.n_tokens == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    try:
        mapped = np.memmap(shard.path, dtype, "r", offset=shard.offset, shape=(shard.n_tokens,))
    except OSError as error:
        raise DataError(f"shard {shard.path}", f"cannot be mapped: {error}") from error
    except ValueError as error:  # shorter than when it was validated
        raise IntegrityError(f"shard {shard.path}", str(error)) from error
    return np.asarray(mapped)  # indexing a plain array is twice as fast as a memmap


def load_shard(shard: Shard) -> Tokens:
    """Copy the tokens of one shard into memory."""
    try:
        tokens = np.fromfile(
            shard.path, f"<u{shard.width}", count=shard.n_tokens, offset=shard.offset
        )
    except OSError as error:
        raise DataError(f"shard {shard.path}", f"cannot be read: {error}") from error
    if tokens.size != shard.n_tokens:
        raise DataChangedError(
            f"shard {shard.path}",
            f"{tokens.size} tokens, where {shard.n_tokens} were validated",
            "the file changed while it was being opened: start again",
        )
    return tokens


def narrow(tokens: NDArray[Any]) -> Tokens:
    """Copy token ids into uint16, or uint32 where they need it."""
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"tokens must be 1-D integers, not {tokens.ndim}-D {tokens.dtype}")
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if low < 0 or high >= 1 << 32:
        raise ValueError(f"token ids are in [0, 2^32), not [{low}, {high}]")
    return np.array(tokens, dtype=np.uint16 if high < 1 << 16 else np.uint32)


class NumpyReader:
    """The NumPy twin of the native reader: the specification of what a batch holds."""

    def __init__(self, arrays: list[Tokens], order: SampleStream) -> None:
        self._order = order
        self._arrays = [array for array in arrays if array.size]
        self._width = max((array.itemsize for array in self._arrays), default=2)
        self._ends = np.cumsum([array.size for array in self._arrays])
        self._begins = self._ends - [array.size for array in self._arrays]
        width = order.seq_len + 1
        self._windows = {
            shard: np.lib.stride_tricks.sliding_window_view(array, width)
            for shard, array in enumerate(self._arrays)
            if array.size >= width
        }
        self._block_first = 0
        self._block = np.empty(0, dtype=np.int64)

    @property
    def width(self) -> int:
        """See BatchReader."""
        return self._width

    def read(self, first_sample: int, x: Int64, y: Int64, next_sample: int) -> int:
        """See BatchReader; the hint is of no use here."""
        del next_sample
        _check_buffers(x, y, self._order.seq_len)
        for rows, block in self._blocks(first_sample, len(x)):
            x[rows], y[rows] = block[:, :-1], block[:, 1:]
        return max(int(x.max()), int(y.max())) if x.size else 0

    def read_windows(self, first_sample: int, windows: Tokens, next_sample: int) -> int:
        """See BatchReader."""
        del next_sample
        _check_windows(windows, self._order.seq_len, self.width)
        for rows, block in self._blocks(first_sample, len(windows)):
            windows[rows] = block
        return int(windows.max()) if windows.size else 0

    def _blocks(self, first_sample: int, count: int) -> Iterator[tuple[Any, Tokens]]:
        """Rows of a batch, and the windows that go there."""
        T = self._order.seq_len
        starts = self._starts(first_sample, count)
        shards = np.searchsorted(self._ends, starts, side="right")
        whole = starts + T + 1 <= self._ends[shards]
        for shard in np.unique(shards[whole]).tolist():
            rows = whole & (shards == shard)
            block = self._windows[shard][starts[rows] - self._begins[shard]]
            # Assigning to all rows is several times faster than to a selection of them.
            yield (slice(None) if rows.all() else rows), block
        for row in np.flatnonzero(~whole).tolist():
            yield slice(row, row + 1), self._span(int(starts[row]), T + 1, int(shards[row]))[None]

    def _starts(self, first_sample: int, rows: int) -> Int64:
        offset = first_sample - self._block_first
        if not 0 <= offset <= len(self._block) - rows:
            self._block = self._order.starts(first_sample, max(rows, _BLOCK))
            offset, self._block_first = 0, first_sample
        return self._block[offset : offset + rows]

    def _span(self, start: int, count: int, shard: int) -> Tokens:
        """Collect tokens from as many shards as they lie in."""
        parts, begin = [], start - int(self._begins[shard])
        while count:
            part = self._arrays[shard][begin : begin + count]
            parts.append(part)
            count, shard, begin = count - part.size, shard + 1, 0
        return np.concatenate(parts)


def _check_buffers(x: Int64, y: Int64, seq_len: int) -> None:
    for name, array in (("x", x), ("y", y)):
        flags = array.flags
        if array.dtype != np.int64 or not flags.c_contiguous or not flags.writeable:
            raise ValueError(f"{name} must be a writeable C-contiguous int64 array")
        if array.ndim != 2 or array.shape[1] != seq_len:
            raise ValueError(f"{name} must be (rows, {seq_len}), not {array.shape}")
    if x.shape != y.shape:
        raise ValueError(f"x and y differ in shape: {x.shape} and {y.shape}")
    if np.may_share_memory(x, y):
        raise ValueError("x and y overlap")


def _check_windows(windows: Tokens, seq_len: int, width: int) -> None:
    flags, itemsize = windows.flags, windows.dtype.itemsize
    fits = windows.dtype.kind == "u" and itemsize in (width, 4)
    if not fits or not flags.c_contiguous or not flags.writeable:
        raise ValueError(f"windows must be a writeable C-contiguous uint{8 * width} array")
    if windows.ndim != 2 or windows.shape[1] != seq_len + 1:
        raise ValueError(f"windows must be (rows, {seq_len} + 1), not {windows.shape}")
