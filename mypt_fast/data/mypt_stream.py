"""MyPT's sampling as a stream of samples, so that `mypt-fast train --order mypt` can resume it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from mypt_fast.data.mypt_order import MersenneWords, MyptShardOrder, MyptTextOrder
from mypt_fast.data.packing import Int64

_EVERY = 64  # batches between two places of the generator that are remembered


class MyptStream:
    """A `SampleStream` of MyPT's batches: sample i is row i % B of batch i // B.

    Each batch is drawn after the one before it. Where the generator was is remembered every 64
    batches, so going back is short; going far ahead draws what lies between, 10 us a batch.

    Args:
        order: MyPT's, at its start; it belongs to the stream from here on.

    Attributes:
        n_windows: windows of the corpus side by side; MyPT's own order knows no epochs.
    """

    def __init__(self, order: MyptShardOrder | MyptTextOrder) -> None:
        self.n_tokens, self.seq_len = order.n_tokens, order.seq_len
        self.n_windows = max(1, (order.n_tokens - 1) // order.seq_len)
        self._order = order
        self._taken = [0]
        self._number, self._batch = -1, np.empty(0, dtype=np.int64)

    def starts(self, first_sample: int, count: int) -> Int64:
        """See SampleStream."""
        size = self._order.batch_size
        parts: list[Int64] = []
        done = 0
        while done < count:
            number, row = divmod(first_sample + done, size)
            parts.append(self._drawn(number)[row : row + count - done])
            done += parts[-1].size
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def identity(self) -> dict[str, Any]:
        """See SampleStream."""
        return self._order.identity()

    def to_native(self, module: ModuleType) -> Any:
        """There is no twin in C++: MyPT's order is for comparisons."""
        return None

    def _drawn(self, number: int) -> Int64:
        if number != self._number:
            order, mark = self._order, min(number // _EVERY, len(self._taken) - 1)
            if number < order.batches or mark * _EVERY > order.batches:
                order.words = MersenneWords(order.words.seed, self._taken[mark])
                order.batches = mark * _EVERY
            while order.batches <= number:
                if order.batches == len(self._taken) * _EVERY:
                    self._taken.append(order.words.taken)
                self._batch = order.next_starts()
            self._number = number
        return self._batch
