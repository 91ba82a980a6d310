"""Which window is sample i: a counter-based permutation per epoch, so a position is one integer.

This is the NumPy twin of `csrc/permutation.cpp` and its specification: same numbers, bit for bit,
fixed by golden vectors in the tests. Nothing here is ever stored but (seed, global sample).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ALGORITHM = "feistel6/v1"
ORDERS = ("epoch", "sequential")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_EPOCH_STRIDE = 0xD1B54A32D192ED03
_ROUNDS = 6  # 2 rounds fail a chi-square test of positions; from 3 on none was told from random
_TABLE_LIMIT = 1 << 16  # below this a shuffled table is small, and cycle walking would be long
_PHASE_KEY = _ROUNDS + 1
_DRAW_KEY = 16  # the key counter of the first shuffle draw, past all round keys
_MAX_WINDOWS = 1 << 62


def _mix(z: int) -> int:
    """Finalise 64 bits (splitmix64)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mix_array(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _base_key(seed: int, epoch: int) -> int:
    return _mix(_mix((seed + _GOLDEN) & _MASK) ^ ((epoch * _EPOCH_STRIDE + 1) & _MASK))


def _derived_key(base: int, counter: int) -> int:
    return _mix((base + counter * _GOLDEN) & _MASK)


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
        base = _base_key(seed, epoch)
        self._table = _shuffled(n, base) if n < _TABLE_LIMIT else None
        self._half = np.uint64(((n - 1).bit_length() + 1) // 2)
        self._keys = [np.uint64(_derived_key(base, r + 1)) for r in range(_ROUNDS)]

    def at(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the images of `index`, an int64 array of values in [0, n)."""
        if index.size and (int(index.min()) < 0 or int(index.max()) >= self.n):
            raise ValueError(f"permutation index outside [0, {self.n})")
        if self._table is not None:
            return self._table[index]
        out = self._encrypt(index.astype(np.uint64))
        limit = np.uint64(self.n)
        while (outside := np.flatnonzero(out >= limit)).size:
            out[outside] = self._encrypt(out[outside])
        return out.astype(np.int64)

    def _encrypt(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half, drop = self._half, np.uint64(64) - self._half
        left = value >> half
        right = value & ((np.uint64(1) << half) - np.uint64(1))
        for key in self._keys:
            # The top bits of the mixer are its best ones.
            left, right = right, left ^ (_mix_array(right + key) >> drop)
        out: NDArray[np.uint64] = (left << half) | right
        return out


@lru_cache(maxsize=4)
def _shuffled(n: int, base: int) -> NDArray[np.int64]:
    counters = np.arange(n, dtype=np.uint64) + np.uint64(_DRAW_KEY)
    draws = _mix_array(np.uint64(base) + counters * np.uint64(_GOLDEN)) >> np.uint64(32)
    picks = ((draws * np.arange(1, n + 1, dtype=np.uint64)) >> np.uint64(32)).tolist()
    table = list(range(n))
    for i in range(n - 1, 0, -1):
        j = picks[i]
        table[i], table[j] = table[j], table[i]
    return np.array(table, dtype=np.int64)


class SampleOrder:
    """Map a global sample number to the first token of its window.

    The corpus is cut into n windows of `seq_len` tokens. "epoch": sample i is window
    Permutation(n, seed, i // n)(i % n), and all windows of an epoch shift by one phase, drawn from
    (seed, epoch), so that their edges move between epochs. "sequential": window i % n, phase 0.

    A window reads seq_len + 1 tokens (targets are shifted by one), so with N tokens
    n * T + phase + 1 <= N must hold. n = (N - T) // T leaves room for at least T phases (a corpus
    too short for that has one window), and the phase is drawn from all that fit, so that over the
    epochs every token is read, the last ones too.
    """

    def __init__(self, n_tokens: int, seq_len: int, seed: int, kind: str = "epoch") -> None:
        if seq_len < 1 or n_tokens < seq_len + 1:
            raise ValueError(f"{n_tokens} tokens hold no window of {seq_len} + 1")
        if kind not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}, not {kind!r}")
        if not 0 <= seed <= _MASK:
            raise ValueError(f"seed is an unsigned 64-bit integer, not {seed}")
        self.n_tokens, self.seq_len, self.seed, self.kind = n_tokens, seq_len, seed, kind
        self.n_windows = max(1, (n_tokens - seq_len) // seq_len)
        self._n_phases = n_tokens - self.n_windows * seq_len

    def phase(self, epoch: int) -> int:
        """Return how many tokens the windows of this epoch are shifted by."""
        if self.kind == "sequential":
            return 0
        return _derived_key(_base_key(self.seed, epoch), _PHASE_KEY) % self._n_phases

    def starts(self, first_sample: int, count: int) -> NDArray[np.int64]:
        """Return the first token of samples [first_sample, first_sample + count)."""
        if first_sample < 0 or count < 0 or first_sample + count >= 1 << 63:
            raise ValueError(f"samples [{first_sample}, +{count}) are not in [0, 2^63)")
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, index = divmod(first_sample + done, self.n_windows)
            size = min(count - done, self.n_windows - index)
            windows = np.arange(index, index + size, dtype=np.int64)
            if self.kind == "epoch":
                windows = Permutation(self.n_windows, self.seed, epoch).at(windows)
            out[done : done + size] = windows * self.seq_len + self.phase(epoch)
            done += size
        return out
