"""Which window is sample i: a counter-based permutation per epoch, so a position is one integer.

The NumPy twin of `csrc/order.cpp` and its specification: same numbers, bit for bit, fixed by golden
vectors in the tests. Nothing here is ever stored but (seed, global sample).
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from mypt_fast.data.permutation import (
    ALGORITHM,
    BLOCK_KEY,
    EPOCH_STRIDE,
    MASK,
    MAX_WINDOWS,
    PHASE_KEY,
    REPLACEMENT_KEY,
    Int64,
    Permutation,
    UInt64,
    base_key,
    derived_key,
    derived_keys,
    mix_array,
)

ORDERS = ("epoch", "sequential", "replacement", "block")
# What a state names: a change of the numbers below needs a new version here.
ALGORITHMS = {
    "epoch": ALGORITHM,
    "sequential": ALGORITHM,
    "replacement": "draw/v1",
    "block": "feistel6-block/v1",
}
BLOCK_TOKENS = 1 << 23  # of one block: 16 MiB at 2 bytes a token
POOL_BLOCKS = 8

_MAX_BLOCK_TOKENS = 1 << 40
_MAX_POOL = 1 << 16


class SampleStream(Protocol):
    """Global sample numbers to the first tokens of their windows, in closed form.

    Attributes:
        n_tokens: of the corpus that the starts are positions in.
        seq_len: tokens per row, T; a window reads T + 1.
        n_windows: samples in which each window comes once, where the order has such epochs.
    """

    n_tokens: int
    seq_len: int
    n_windows: int

    def starts(self, first_sample: int, count: int) -> Int64:
        """Return the first token of samples [first_sample, first_sample + count)."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what must agree for a sample number to mean the same window; plain values."""
        ...

    def to_native(self, module: ModuleType) -> Any:
        """Return the C++ twin, a SampleStream of `mypt_fast._native`; None where there is none."""
        ...


def check_samples(first_sample: int, count: int) -> None:
    """Raise ValueError when samples [first_sample, first_sample + count) leave [0, 2^63)."""
    if first_sample < 0 or count < 0 or first_sample + count >= 1 << 63:
        raise ValueError(f"samples [{first_sample}, +{count}) are not in [0, 2^63)")


class _BlockShuffle:
    """A permutation of range(n) under which neighbours stay in few blocks.

    The range is cut into blocks of `per_block`, the blocks are permuted, and every `pool_blocks` of
    them in that order are shuffled together. The last block may be short: within its pool it
    is put last, and the pools after that one begin earlier. So all positions are closed forms.
    """

    def __init__(self, n: int, per_block: int, pool_blocks: int, key: int) -> None:
        n_blocks = -(-n // per_block)
        self._n, self._per_block, self._pool_blocks, self._key = n, per_block, pool_blocks, key
        self._full = per_block * pool_blocks
        self._missing = n_blocks * per_block - n
        self._order = Permutation(n_blocks, key, 0)
        last = self._order.inverse(np.array([n_blocks - 1], dtype=np.int64))
        self._short_pool, self._short_at = divmod(int(last[0]), pool_blocks)

    def run(self, index: int, size: int) -> Int64:
        """Return the images of [index, index + size), or fewer where the pool ends before."""
        missing, short = self._missing, self._short_pool
        after = index >= (short + 1) * self._full - missing
        pool = (index + (missing if after else 0)) // self._full
        begin = pool * self._full - (missing if pool > short else 0)
        end = min(self._n, (pool + 1) * self._full - (missing if pool >= short else 0))

        positions = np.arange(index - begin, min(index + size, end) - begin, dtype=np.int64)
        inner = Permutation(end - begin, self._key, pool + 1).at(positions)
        return self._blocks(pool)[inner // self._per_block] + inner % self._per_block

    def _blocks(self, pool: int) -> Int64:
        first = pool * self._pool_blocks
        last = min(first + self._pool_blocks, self._order.n)
        blocks = self._order.at(np.arange(first, last, dtype=np.int64)) * self._per_block
        if pool == self._short_pool:
            blocks[[self._short_at, -1]] = blocks[[-1, self._short_at]]
        return blocks


_block_shuffle = lru_cache(maxsize=4)(_BlockShuffle)


class SampleOrder:
    """Map a global sample number to the first token of its window.

    The corpus is cut into n windows of `seq_len` tokens. All windows of an epoch shift by one
    phase, drawn from (seed, epoch), so that their edges move between epochs.

    "epoch": sample i is window Permutation(n, seed, i // n)(i % n).
    "sequential": window i % n, phase 0.
    "replacement": any of the N - T starts, drawn uniformly and independently for each sample from
    (seed, sample). A remainder would favour low starts, so words past the last whole multiple of
    N - T are drawn again.
    "block": for storage that is slow to seek. Blocks of block_tokens tokens (whole windows of them)
    come in a permuted order, and every pool_blocks of them are shuffled together: each window once
    per epoch, and any run of samples from one pool reads only pool_blocks extents of block_tokens,
    128 MiB of 2-byte tokens by default. Within pools order is as random as in "epoch"; windows of
    one block are always in one pool.

    A window reads seq_len + 1 tokens (targets are shifted by one), so with N tokens
    n * T + phase + 1 <= N must hold. n = (N - T) // T leaves room for at least T phases (a corpus
    too short for that has one window), and the phase is drawn from all that fit, so that over the
    epochs every token is read, the last ones too.

    Raises:
        ValueError: the arguments make no order: fewer tokens than one window, an unknown kind.
    """

    def __init__(
        self,
        n_tokens: int,
        seq_len: int,
        seed: int,
        kind: str = "epoch",
        *,
        block_tokens: int = BLOCK_TOKENS,
        pool_blocks: int = POOL_BLOCKS,
    ) -> None:
        if seq_len < 1 or n_tokens < seq_len + 1:
            raise ValueError(f"{n_tokens} tokens hold no window of {seq_len} + 1")
        if n_tokens > MAX_WINDOWS:
            raise ValueError(f"a corpus has at most 2^62 tokens, not {n_tokens}")
        if kind not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}, not {kind!r}")
        if not 0 <= seed <= MASK:
            raise ValueError(f"seed is an unsigned 64-bit integer, not {seed}")
        if not (1 <= block_tokens <= _MAX_BLOCK_TOKENS and 1 <= pool_blocks <= _MAX_POOL):
            raise ValueError(
                "a block has 1 to 2^40 tokens and a pool 1 to 65536 blocks, "
                f"not {block_tokens} and {pool_blocks}"
            )
        self.n_tokens, self.seq_len, self.seed, self.kind = n_tokens, seq_len, seed, kind
        self.block_tokens, self.pool_blocks = block_tokens, pool_blocks
        self.n_windows = max(1, (n_tokens - seq_len) // seq_len)
        self._n_phases = n_tokens - self.n_windows * seq_len

    def phase(self, epoch: int) -> int:
        """Return how many tokens the windows of this epoch are shifted by."""
        if self.kind in ("sequential", "replacement"):
            return 0
        return derived_key(base_key(self.seed, epoch), PHASE_KEY) % self._n_phases

    def starts(self, first_sample: int, count: int) -> Int64:
        """Return the first token of samples [first_sample, first_sample + count)."""
        check_samples(first_sample, count)
        if self.kind == "replacement":
            return self._drawn(np.arange(first_sample, first_sample + count, dtype=np.uint64))
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, index = divmod(first_sample + done, self.n_windows)
            windows = self._windows(epoch, index, min(count - done, self.n_windows - index))
            out[done : done + windows.size] = windows * self.seq_len + self.phase(epoch)
            done += windows.size
        return out

    def identity(self) -> dict[str, Any]:
        """Return what must agree for a sample number to mean the same window; plain values."""
        blocks = {"block_tokens": self.block_tokens, "pool_blocks": self.pool_blocks}
        return {
            "algo": ALGORITHMS[self.kind],
            "order": self.kind,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "n_windows": self.n_windows,
            **(blocks if self.kind == "block" else {}),
        }

    def to_native(self, module: ModuleType) -> Any:
        """Return the C++ twin, a SampleStream of `mypt_fast._native`."""
        return module.SampleOrder(
            self.n_tokens, self.seq_len, self.seed, self.kind, self.block_tokens, self.pool_blocks
        )

    def _windows(self, epoch: int, index: int, size: int) -> Int64:
        """Windows at [index, index + size) of an epoch; "block" may return fewer."""
        if self.kind == "block":
            per_block = max(1, self.block_tokens // self.seq_len)
            key = derived_key(base_key(self.seed, epoch), BLOCK_KEY)
            shuffle = _block_shuffle(self.n_windows, per_block, self.pool_blocks, key)
            return shuffle.run(index, size)
        windows = np.arange(index, index + size, dtype=np.int64)
        if self.kind == "epoch":
            windows = Permutation(self.n_windows, self.seed, epoch).at(windows)
        return windows

    def _drawn(self, samples: UInt64) -> Int64:
        n = self.n_tokens - self.seq_len
        last = np.uint64(MASK - (1 << 64) % n)
        base = np.uint64(derived_key(base_key(self.seed, 0), REPLACEMENT_KEY))
        keys = derived_keys(base, samples)
        words, attempt = mix_array(keys), 0
        while (again := np.flatnonzero(words > last)).size:
            attempt += 1
            words[again] = mix_array(keys[again] + np.uint64(attempt * EPOCH_STRIDE & MASK))
        return (words % np.uint64(n)).astype(np.int64)
