"""MyPT's own sampling, bit for bit, for runs that are compared with it.

MyPT draws from global generators, one batch after another, so its order cannot be had at a position
in O(1) like `order.py`. Here each order owns its generator, which starts where the global one is
after `np.random.seed(seed)` or `torch.manual_seed(seed)`; its state is how many words of it were
used. Skipping words is fast, so a resume costs next to nothing, and the state is a few integers
instead of the generator's 2.5 KB.

Upstream draws train and val batches from the same generator; that is the caller's matter: an order
serves one split, and the draws of another can be interleaved through `MersenneWords`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mypt_fast.data.permutation import Int64, UInt64
from mypt_fast.errors import DataError

_WORD = 1 << 32
_TORCH_ONE_WORD = 1 << 28  # from here on torch.randint takes two words
_MOST_WORDS = 1 << 36  # a state past this is no real one, and would take minutes to skip to
_SKIP = 1 << 24  # words skipped at once, between two chances for an interrupt


class MersenneWords:
    """The 32-bit words of an MT19937 that NumPy or torch seeded with one integer.

    Args:
        seed: 32 bits.
        taken: words to skip, as a state says.

    Attributes:
        seed: as given.
        taken: how many words were used.
    """

    def __init__(self, seed: int, taken: int = 0) -> None:
        if not 0 <= seed < _WORD:
            raise ValueError(f"a Mersenne Twister is seeded with 32 bits, not {seed}")
        self.seed = seed
        self._generator = np.random.MT19937()
        # The seeding of np.random.seed, which is torch's too; MT19937(seed) hashes the seed.
        np.random.RandomState(self._generator).seed(seed)
        self.taken = 0
        while self.taken < taken:
            size = min(_SKIP, taken - self.taken)
            self._generator.random_raw(size, output=False)
            self.taken += size

    def take(self, count: int) -> UInt64:
        """Return the next `count` words."""
        self.taken += count
        words: UInt64 = self._generator.random_raw(count)
        return words

    def numpy_below(self, n: int, count: int) -> Int64:
        """Return what `np.random.randint(0, n, size=count)` does: masked words, too large dropped.

        For n = 1 it uses no word.
        """
        if not 1 <= n <= _WORD:
            raise ValueError(f"randint draws below 1 to 2^32, not {n}")
        if n == 1:
            return np.zeros(count, dtype=np.int64)
        mask = np.uint64((1 << (n - 1).bit_length()) - 1)
        out, have = np.empty(count, dtype=np.int64), 0
        while have < count:  # no word is taken that a loop one by one would not take
            words = self.take(count - have) & mask
            kept = words[words < n]
            out[have : have + kept.size] = kept
            have += kept.size
        return out

    def torch_below(self, n: int, count: int) -> Int64:
        """Return what `torch.randint(n, (count,))` does on a CPU: words modulo n.

        One word a value below 2^28, from there on two, the first being the high one.
        """
        if not 1 <= n < 1 << 63:
            raise ValueError(f"randint draws below 1 to 2^63, not {n}")
        words = self.take(count if n < _TORCH_ONE_WORD else 2 * count)
        if n >= _TORCH_ONE_WORD:
            words = words[0::2] << np.uint64(32) | words[1::2]
        return (words % np.uint64(n)).astype(np.int64)


Below = Callable[[int, int], Int64]  # (n, count): that many numbers in [0, n)


def shard_batch(
    below: Below, reaches: Sequence[int], batch_size: int, *, strict_compat: bool = False
) -> tuple[int, Int64]:
    """Draw one batch as MyPT does: a shard, whatever its length, and starts within it.

    Args:
        below: the generator, such as `MersenneWords.numpy_below`.
        reaches: of each shard, how many starts MyPT draws from; one at least is positive.
        batch_size: rows.
        strict_compat: where a shard has fewer starts than that, all of them in order, in a smaller
            batch, which is what MyPT makes of it. Otherwise they are drawn like any others.

    Returns:
        The number of the shard, and the starts in it.
    """
    below(len(reaches), 1)  # drawn, and not used
    reach = 0
    while reach < 1:
        shard = int(below(len(reaches), 1)[0])
        reach = reaches[shard]
    if strict_compat and reach < batch_size:
        return shard, np.arange(reach, dtype=np.int64)
    return shard, below(reach, batch_size)


def shard_reaches(sizes: Sequence[int], seq_len: int) -> list[int]:
    """How many starts MyPT draws from in each shard: the last two windows are never read.

    Raises:
        DataError: no shard is long enough, where upstream loops for ever.
    """
    reaches = [int(size) - seq_len - 1 for size in sizes]
    if max(reaches, default=0) < 1:
        raise DataError(
            f"{len(sizes)} shards for MyPT's sampling with a context of {seq_len}",
            f"the longest has {max(sizes, default=0)} tokens, where one needs {seq_len + 2}",
            "add data or lower block_size",
        )
    return reaches


def epoch_order(n_episodes: int, seed: int, epoch: int, shuffle: bool = True) -> Int64:
    """The episodes of one epoch: RandomState(seed + epoch).permutation(n), or 0, 1, 2, ...

    Raises:
        DataError: seed + epoch is past 32 bits.
    """
    if not shuffle:
        return np.arange(n_episodes, dtype=np.int64)
    if seed + epoch >= _WORD:
        raise DataError("epoch_seed plus the epoch", f"{seed + epoch}, past 32 bits")
    order = np.random.RandomState(seed + epoch).permutation(n_episodes)
    return np.asarray(order, dtype=np.int64)


class _MyptStream:
    """What the two token orders share: batches one after another, and a state of a few integers."""

    algo = ""

    def __init__(self, n_tokens: int, seq_len: int, batch_size: int, seed: int) -> None:
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"rows of {seq_len} tokens, {batch_size} a batch")
        self.n_tokens, self.seq_len = n_tokens, seq_len
        self.batch_size, self.seed = batch_size, seed
        self.batches = 0
        self.words = MersenneWords(seed)

    def next_starts(self) -> Int64:
        """Return the first token, in the corpus, of each row of the next batch."""
        starts = self._draw()
        self.batches += 1
        return starts

    def identity(self) -> dict[str, Any]:
        """Return what must agree for a position to mean the same batches; plain values."""
        return {
            "algo": self.algo,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "n_tokens": self.n_tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the identity and the position, all plain values."""
        return {**self.identity(), "batches": self.batches, "words": self.words.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`.

        Raises:
            DataError: the state is of another stream, or no state.
        """
        _require(self.identity(), state)
        self.batches, taken = _counters(state, "batches", "words")
        self.words = MersenneWords(self.seed, taken)

    def _draw(self) -> Int64:
        raise NotImplementedError


class MyptTextOrder(_MyptStream):
    """Text in memory: `torch.randint(len - block_size, (batch_size,))` on the CPU generator.

    Raises:
        DataError: fewer tokens than one window, where upstream fails on its first batch.
    """

    algo = "mypt-text/v1"

    def __init__(self, n_tokens: int, seq_len: int, batch_size: int, seed: int) -> None:
        # torch.manual_seed takes 64 bits, its Mersenne Twister the low 32 of them.
        super().__init__(n_tokens, seq_len, batch_size, seed % _WORD)
        if n_tokens < seq_len + 1:
            raise DataError(
                f"text in memory for a context of {seq_len}",
                f"{n_tokens} tokens, where one window needs {seq_len + 1}",
                "add data or lower block_size",
            )

    def _draw(self) -> Int64:
        return self.words.torch_below(self.n_tokens - self.seq_len, self.batch_size)


class MyptShardOrder(_MyptStream):
    """Shards: one of them per batch, whatever its length, and starts within it.

    Upstream draws a shard number it does not use, then shard numbers until one is long enough, then
    the starts, in [0, tokens - block_size - 1).

    Args:
        sizes: tokens of each shard, in the order of their paths.
        seq_len: block_size.
        batch_size: rows.
        seed: of np.random.seed, 32 bits.
        strict_compat: of `shard_batch`.

    Raises:
        DataError: no shard is long enough.
    """

    algo = "mypt-shards/v1"

    def __init__(
        self,
        sizes: Sequence[int],
        seq_len: int,
        batch_size: int,
        seed: int,
        *,
        strict_compat: bool = False,
    ) -> None:
        super().__init__(sum(sizes), seq_len, batch_size, seed)
        self.strict_compat = strict_compat
        self._bases = [0, *np.cumsum(sizes).tolist()]
        self._reaches = shard_reaches(sizes, seq_len)

    def identity(self) -> dict[str, Any]:
        """Return what must agree for a position to mean the same batches; plain values."""
        return {**super().identity(), "n_shards": len(self._reaches), "compat": self.strict_compat}

    def _draw(self) -> Int64:
        shard, starts = shard_batch(
            self.words.numpy_below, self._reaches, self.batch_size, strict_compat=self.strict_compat
        )
        return starts + self._bases[shard]


class MyptEpisodeOrder:
    """Episodes of one split: numbers of valid episodes, in (shard, index) order, batch by batch.

    "epoch": RandomState(seed + epoch).permutation(n), or 0, 1, 2, ... without shuffle; a batch that
    reaches the end of an epoch goes on in the next. "random": RandomState(seed).randint(0, n).

    Attributes:
        epoch: number of the current one.
        position: episodes of it already given.
    """

    algo = "mypt-episodes/v1"

    def __init__(
        self,
        n_episodes: int,
        batch_size: int,
        seed: int,
        mode: str = "epoch",
        *,
        shuffle: bool = True,
    ) -> None:
        if mode not in ("epoch", "random"):
            raise ValueError(f"batch_sampling_mode is epoch or random, not {mode!r}")
        if batch_size < 1:
            raise ValueError(f"{batch_size} rows a batch")
        if n_episodes < 1:
            raise DataError(
                "episodes to sample from",
                "none is valid",
                "lower episode_min_tokens, or prepare the dataset again",
            )
        self.n_episodes, self.batch_size, self.seed = n_episodes, batch_size, seed
        self.mode, self.shuffle = mode, shuffle
        self.epoch = self.position = 0
        self._words = MersenneWords(seed)
        self._order = self._order_of(0)

    def next_ids(self) -> Int64:
        """Return the episode numbers of the next batch."""
        if self.mode == "random":
            return self._words.numpy_below(self.n_episodes, self.batch_size)
        parts, left = [], self.batch_size
        while left:
            if self.position == self.n_episodes:
                self._order = self._order_of(self.epoch + 1)
                self.epoch, self.position = self.epoch + 1, 0
            part = self._order[self.position : self.position + left]
            self.position += part.size
            left -= part.size
            parts.append(part)
        return np.concatenate(parts)

    def reset_epoch(self) -> None:
        """Begin the current epoch again."""
        self.position = 0

    def identity(self) -> dict[str, Any]:
        """Return what must agree for a position to mean the same batches; plain values."""
        return {
            "algo": self.algo,
            "mode": self.mode,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "n_episodes": self.n_episodes,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the identity and the position, all plain values."""
        return {
            **self.identity(),
            "epoch": self.epoch,
            "position": self.position,
            "words": self._words.taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`.

        Raises:
            DataError: the state is of another stream, or no state.
        """
        _require(self.identity(), state)
        epoch, position, taken = _counters(state, "epoch", "position", "words")
        if position > self.n_episodes:
            raise DataError("resuming the data position", f"position is {position}")
        self._order = self._order_of(epoch)
        self.epoch, self.position, self._words = epoch, position, MersenneWords(self.seed, taken)

    def _order_of(self, epoch: int) -> Int64:
        return epoch_order(self.n_episodes, self.seed, epoch, self.shuffle and self.mode == "epoch")


def _require(expected: dict[str, Any], state: dict[str, Any]) -> None:
    differing = [
        f"{key} is {value!r}, the state has {state.get(key)!r}"
        for key, value in expected.items()
        if state.get(key) != value
    ]
    if differing:
        raise DataError(
            "resuming MyPT's sampling",
            "; ".join(differing),
            "use the data and settings of the saved run",
        )


def _counters(state: dict[str, Any], *names: str) -> list[int]:
    values = [state.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if type(value) is not int or not 0 <= value < _MOST_WORDS:
            raise DataError("resuming the data position", f"{name} is {value!r}")
    return [value for value in values if isinstance(value, int)]
