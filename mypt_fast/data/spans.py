"""Any stretch of a corpus's tokens, for what is not a window: documents, scans, reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from mypt_fast.data.format import Shard
from mypt_fast.data.reader import Tokens, map_shard
from mypt_fast.errors import DataChangedError, DataError

Part = Callable[[int, int], Tokens]  # (first token, how many) of one shard


class Spans:
    """Reads stretches of tokens that may cross the edges of shards.

    Args:
        parts: how each shard is read.
        sizes: tokens of each.
    """

    def __init__(self, parts: Sequence[Part], sizes: Sequence[int]) -> None:
        self._parts = parts
        self._ends = np.cumsum(np.array(sizes, dtype=np.int64))

    @classmethod
    def of_shards(cls, shards: Sequence[Shard], io: str) -> Spans:
        """Over files: mapped where `io` is "mmap", read where nothing of them may stay."""
        parts = [_sliced(map_shard(s)) if io == "mmap" else partial(_read, s) for s in shards]
        return cls(parts, [s.n_tokens for s in shards])

    @classmethod
    def of_array(cls, tokens: Tokens) -> Spans:
        """Over tokens in memory."""
        return cls([_sliced(tokens)], [tokens.size])

    def read(self, start: int, count: int) -> Tokens:
        """Return the tokens [start, start + count), which are in the corpus.

        Raises:
            DataError: a file cannot be read.
            DataChangedError: it is shorter than when it was checked.
        """
        shard = int(np.searchsorted(self._ends, start, side="right"))
        found = []
        while count:
            begin = start - (int(self._ends[shard - 1]) if shard else 0)
            size = min(count, int(self._ends[shard]) - start)
            if size:
                found.append(self._parts[shard](begin, size))
            start, count, shard = start + size, count - size, shard + 1
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint16), *found])


def _sliced(tokens: Tokens) -> Part:
    return lambda begin, count: tokens[begin : begin + count]


def _read(shard: Shard, begin: int, count: int) -> Tokens:
    dtype = np.dtype(f"<u{shard.width}")
    offset = shard.offset + begin * shard.width
    try:
        tokens = np.fromfile(shard.path, dtype, count=count, offset=offset)
    except OSError as error:
        raise DataError(f"shard {shard.path}", f"cannot be read: {error}") from error
    if tokens.size != count:
        raise DataChangedError(
            f"tokens {begin} to {begin + count} of shard {shard.path}",
            f"{tokens.size} of {count}: the file is shorter than when it was opened",
            "copy the file again, and leave it alone while it is read",
        )
    return tokens
