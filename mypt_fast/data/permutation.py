"""Keyed permutations of range(n): any image in O(1), with nothing stored for large n.

The NumPy twin of `csrc/permutation.cpp` and its specification: same numbers, bit for bit, fixed by
golden vectors in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

ALGORITHM = "feistel6/v1"
MASK = (1 << 64) - 1
EPOCH_STRIDE = 0xD1B54A32D192ED03
MAX_WINDOWS = 1 << 62

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6  # 2 rounds fail a chi-square test of positions; from 3 on none was told from random
_TABLE_LIMIT = 1 << 16  # below this a shuffled table is small, and cycle walking would be long

# Counters of derived keys. 1 to 6 are of the rounds, 16 and up of the draws of a table.
PHASE_KEY, REPLACEMENT_KEY, BLOCK_KEY, SOURCE_KEY, SLOT_KEY = range(_ROUNDS + 1, _ROUNDS + 6)
_DRAW_KEY = 16


def _mix(z: int) -> int:
    """Finalise 64 bits (splitmix64)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def mix_array(z: UInt64) -> UInt64:
    """Finalise 64 bits, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def base_key(seed: int, epoch: int) -> int:
    """Return the key of (seed, epoch), from which others are derived."""
    return _mix(_mix((seed + _GOLDEN) & MASK) ^ ((epoch * EPOCH_STRIDE + 1) & MASK))


def base_keys(seed: int, epochs: UInt64) -> UInt64:
    """Return base_key(seed, epoch) of each epoch."""
    outer = np.uint64(_mix((seed + _GOLDEN) & MASK))
    return mix_array(outer ^ (epochs * np.uint64(EPOCH_STRIDE) + np.uint64(1)))


def derived_key(base: int, counter: int) -> int:
    """Return the `counter`-th key of `base`."""
    return _mix((base + counter * _GOLDEN) & MASK)


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
        if not 1 <= n <= MAX_WINDOWS:
            raise ValueError(f"a permutation needs 1 <= n <= 2^62, not {n}")
        if not (0 <= seed <= MASK and 0 <= epoch <= MASK):
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
