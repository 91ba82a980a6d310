"""Which window is sample i: a counter-based permutation per epoch, so a position is one integer.

This is the NumPy twin of `csrc/permutation.cpp` and `csrc/order.cpp` and their specification: same
numbers, bit for bit, fixed by golden vectors in the tests. Nothing here is ever stored but (seed,
global sample).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ALGORITHM = "feistel6/v1"
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

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_EPOCH_STRIDE = 0xD1B54A32D192ED03
_ROUNDS = 6  # 2 rounds fail a chi-square test of positions; from 3 on none was told from random
_TABLE_LIMIT = 1 << 16  # below this a shuffled table is small, and cycle walking would be long
_PHASE_KEY = _ROUNDS + 1
_REPLACEMENT_KEY = _ROUNDS + 2
_BLOCK_KEY = _ROUNDS + 3
SOURCE_KEY = _ROUNDS + 4  # these two are of mixture.py
SLOT_KEY = _ROUNDS + 5
_DRAW_KEY = 16  # the key counter of the first shuffle draw, past all round keys
_MAX_WINDOWS = 1 << 62
_MAX_BLOCK_TOKENS = 1 << 40
_MAX_POOL = 1 << 16

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


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
        """Return the C++ twin, a SampleStream of `mypt_fast._native`."""
        ...


def check_samples(first_sample: int, count: int) -> None:
    """Raise ValueError when samples [first_sample, first_sample + count) leave [0, 2^63)."""
    if first_sample < 0 or count < 0 or first_sample + count >= 1 << 63:
        raise ValueError(f"samples [{first_sample}, +{count}) are not in [0, 2^63)")


def _mix(z: int) -> int:
    """Finalise 64 bits (splitmix64)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix_array(z: UInt64) -> UInt64:
    """Finalise 64 bits, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def base_key(seed: int, epoch: int) -> int:
    """Return the key of (seed, epoch), from which others are derived."""
    return _mix(_mix((seed + _GOLDEN) & _MASK) ^ ((epoch * _EPOCH_STRIDE + 1) & _MASK))


def base_keys(seed: int, epochs: UInt64) -> UInt64:
    """Return base_key(seed, epoch) of each epoch."""
    outer = np.uint64(_mix((seed + _GOLDEN) & _MASK))
    return mix_array(outer ^ (epochs * np.uint64(_EPOCH_STRIDE) + np.uint64(1)))


def derived_key(base: int, counter: int) -> int:
    """Return the `counter`-th key of `base`."""
    return _mix((base + counter * _GOLDEN) & _MASK)


def derived_keys(base: UInt64, counters: UInt64) -> UInt64:
    """Return derived_key of each pair."""
    return mix_array(base + counters * np.uint64(_GOLDEN))


class Permutation:
    """A permutation of range(n) fixed by (seed, epoch), with O(1) memory for large n.

    n < 2^16 is a Fisher-Yates table. Above, a balanced Feistel network over the smallest even
    number of bits that holds n, walked until the value is back below n (fewer than 4 tries on
    average).
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 1 <= n <= _MAX_WINDOWS:
            raise ValueError(f"a permutation needs 1 <= n <= 2^62, not {n}")
        if not (0 <= seed <= _MASK and 0 <= epoch <= _MASK):
            raise ValueError(f"seed and epoch are unsigned 64-bit, not {seed} and {epoch}")
        self.n = n
        base = base_key(seed, epoch)
        self._table = _shuffled(n, base) if n < _TABLE_LIMIT else None
        self._half = np.uint64(((n - 1).bit_length() + 1) // 2)
        self._keys = [np.uint64(derived_key(base, r + 1)) for r in range(_ROUNDS)]

    def at(self, index: Int64) -> Int64:
        """Return the images of `index`, an int64 array of values in [0, n)."""
        self._check(index)
        if self._table is not None:
            return self._table[index]
        return self._walk(index, self._encrypt)

    def inverse(self, value: Int64) -> Int64:
        """Return the indices whose images are `value`, an int64 array of values in [0, n)."""
        self._check(value)
        if self._table is not None:
            return np.argsort(self._table)[value]
        return self._walk(value, self._decrypt)

    def _check(self, index: Int64) -> None:
        if index.size and (int(index.min()) < 0 or int(index.max()) >= self.n):
            raise ValueError(f"permutation index outside [0, {self.n})")

    def _walk(self, index: Int64, step: Callable[[UInt64], UInt64]) -> Int64:
        out = step(index.astype(np.uint64))
        limit = np.uint64(self.n)
        while (outside := np.flatnonzero(out >= limit)).size:
            out[outside] = step(out[outside])
        return out.astype(np.int64)

    def _encrypt(self, value: UInt64) -> UInt64:
        left, right = self._halves(value)
        for key in self._keys:
            left, right = right, left ^ self._round(right, key)
        out: UInt64 = (left << self._half) | right
        return out

    def _decrypt(self, value: UInt64) -> UInt64:
        left, right = self._halves(value)
        for key in reversed(self._keys):
            left, right = right ^ self._round(left, key), left
        out: UInt64 = (left << self._half) | right
        return out

    def _halves(self, value: UInt64) -> tuple[UInt64, UInt64]:
        return value >> self._half, value & ((np.uint64(1) << self._half) - np.uint64(1))

    def _round(self, half: UInt64, key: np.uint64) -> UInt64:
        # The top bits of the mixer are its best ones.
        out: UInt64 = mix_array(half + key) >> (np.uint64(64) - self._half)
        return out


@lru_cache(maxsize=4)
def _shuffled(n: int, base: int) -> Int64:
    counters = np.arange(n, dtype=np.uint64) + np.uint64(_DRAW_KEY)
    draws = derived_keys(np.uint64(base), counters) >> np.uint64(32)
    picks = ((draws * np.arange(1, n + 1, dtype=np.uint64)) >> np.uint64(32)).tolist()
    table = list(range(n))
    for i in range(n - 1, 0, -1):
        j = picks[i]
        table[i], table[j] = table[j], table[i]
    return np.array(table, dtype=np.int64)


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
        if n_tokens > _MAX_WINDOWS:
            raise ValueError(f"a corpus has at most 2^62 tokens, not {n_tokens}")
        if kind not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}, not {kind!r}")
        if not 0 <= seed <= _MASK:
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
        return derived_key(base_key(self.seed, epoch), _PHASE_KEY) % self._n_phases

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
            key = derived_key(base_key(self.seed, epoch), _BLOCK_KEY)
            return _BlockShuffle(self.n_windows, per_block, self.pool_blocks, key).run(index, size)
        windows = np.arange(index, index + size, dtype=np.int64)
        if self.kind == "epoch":
            windows = Permutation(self.n_windows, self.seed, epoch).at(windows)
        return windows

    def _drawn(self, samples: UInt64) -> Int64:
        n = self.n_tokens - self.seq_len
        last = np.uint64(_MASK - (1 << 64) % n)
        base = np.uint64(derived_key(base_key(self.seed, 0), _REPLACEMENT_KEY))
        keys = derived_keys(base, samples)
        words, attempt = mix_array(keys), 0
        while (again := np.flatnonzero(words > last)).size:
            attempt += 1
            words[again] = mix_array(keys[again] + np.uint64(attempt * _EPOCH_STRIDE & _MASK))
        return (words % np.uint64(n)).astype(np.int64)
