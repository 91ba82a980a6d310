"""Batches of episodes for the engine: MyPT's order, with one integer as the position.

`EpisodeLoader` is to conversations what `TokenLoader` is to text: the same stream whatever the
world size, resumed from a number. The order is MyPT's own (specification 8.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mypt_fast.data.episode_rows import episode_shards, read_rows, row_documents
from mypt_fast.data.format import Shard, dataset_fingerprint
from mypt_fast.data.mypt_order import MersenneWords, epoch_order
from mypt_fast.data.packing import DocumentBatch, Int64
from mypt_fast.data.share import MAX_SAMPLES, Share
from mypt_fast.data.share import Tokens as Described
from mypt_fast.errors import DataError, TokenRangeError

ALGORITHM = "mypt-episodes/v1"
MODES = ("epoch", "random")
_EVERY = 4096  # draws between two places of the generator that are remembered


@dataclass
class _Split:
    source: str
    fingerprint: str
    n_tokens: int


class EpisodeStream:
    """The number of the valid episode that each sample is, in MyPT's order.

    "epoch": epoch after epoch, each `epoch_order` of its own. "random": one long sequence of
    RandomState(seed).randint(0, n).

    Raises:
        DataError: there is no episode.
    """

    def __init__(self, n_episodes: int, seed: int, mode: str = "epoch", shuffle: bool = True):
        if mode not in MODES:
            raise ValueError(f"batch_sampling_mode is epoch or random, not {mode!r}")
        if n_episodes < 1:
            raise DataError(
                "episodes to sample from",
                "none is valid",
                "lower episode_min_tokens, or prepare the dataset again",
            )
        self.n_episodes, self.seed, self.mode, self.shuffle = n_episodes, seed, mode, shuffle
        self._epoch = lru_cache(2)(lambda epoch: epoch_order(n_episodes, seed, epoch, shuffle))
        self._taken = [0]  # words used before draw k * _EVERY
        self._drawn = lru_cache(2)(self._draw)

    def ids(self, first_sample: int, count: int) -> Int64:
        """Episode numbers of samples [first_sample, first_sample + count)."""
        size = self.n_episodes if self.mode == "epoch" else _EVERY
        read = self._epoch if self.mode == "epoch" else self._drawn
        parts, done = [], 0
        while done < count:
            block, begin = divmod(first_sample + done, size)
            part = read(block)[begin : begin + count - done]
            parts.append(part)
            done += part.size
        return np.concatenate(parts)

    def _draw(self, block: int) -> Int64:
        """The draws [block * _EVERY, (block + 1) * _EVERY); where they begin is remembered."""
        words = MersenneWords(self.seed, self._taken[min(block, len(self._taken) - 1)])
        drawn = np.empty(0, dtype=np.int64)
        for number in range(min(block, len(self._taken) - 1), block + 1):
            drawn = words.numpy_below(self.n_episodes, _EVERY)
            if number + 1 == len(self._taken):
                self._taken.append(words.taken)
        return drawn


class EpisodeLoader(Share):
    """The stream of episodes, one a row, cut into steps of `global_batch` rows.

    Args:
        shards: of one split of an episode dataset.
        source: what messages call it.
        seq_len: tokens per row, T.
        seed: epoch_seed.
        mode: batch_sampling_mode, "epoch" or "random".
        shuffle: epoch_shuffle.
        global_batch: samples per step over all ranks; a multiple of world_size.
        rank: whose share `next` reads.
        world_size: number of ranks.
        vocab_size: when given, a token id not below it raises TokenRangeError.
        pad_id: token that padding shows.
        min_tokens: shorter episodes are skipped.
        use_loss_mask: weigh targets as the dataset says; a shard that says nothing counts in full.

    Attributes:
        n_windows: valid episodes, the samples of an epoch.
        n_long: those of which only the last T + 1 tokens are read.
        has_masks: whether a mask is stored.
        position: global samples in finished steps.

    Raises:
        DataError: no episode is long enough, or the shards hold none.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        source: str,
        seq_len: int,
        *,
        seed: int,
        mode: str = "epoch",
        shuffle: bool = True,
        global_batch: int = 1,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
        pad_id: int = 0,
        min_tokens: int = 2,
        use_loss_mask: bool = False,
    ) -> None:
        n_tokens = sum(shard.n_tokens for shard in shards)
        split = _Split(source, dataset_fingerprint(list(shards)), n_tokens)
        self._shards = episode_shards(shards, min_tokens)
        self.n_windows = sum(len(shard["valid_ids"]) for shard in self._shards)
        super().__init__(split, seq_len, global_batch, rank, world_size)
        self._seq_len, self._min_tokens, self._pad_id = seq_len, min_tokens, pad_id
        self._stream = EpisodeStream(self.n_windows, seed, mode, shuffle)
        self._vocab_size = vocab_size
        self.has_masks = any(shard["mask"] is not None for shard in self._shards)
        self._use_mask = use_loss_mask and self.has_masks
        self._isolated = any(shard["segment_ids"] is not None for shard in self._shards)
        self.n_long = sum(
            int((s["episodes"][s["valid_ids"], 1] > seq_len + 1).sum()) for s in self._shards
        )
        self._open = True

    def read(self, first_sample: int, rows: int) -> DocumentBatch:
        """Read samples [first_sample, first_sample + rows) without moving the position.

        Raises:
            TokenRangeError: a token id is not below vocab_size.
        """
        if not self._open:
            raise ValueError("the loader is closed")
        if rows < 1 or first_sample < 0 or first_sample + rows > MAX_SAMPLES:
            raise ValueError(f"samples [{first_sample}, +{rows}) are not in [0, 2^62)")
        ids = self._stream.ids(first_sample, rows)
        found = read_rows(self._shards, ids, self._seq_len, self._pad_id)
        self._check_tokens(found.x, ids)
        self._check_tokens(found.y, ids)
        documents = row_documents(found, use_mask=self._use_mask, isolated=self._isolated)
        return DocumentBatch(found.x, found.y, documents)

    def next(self, rows: int) -> DocumentBatch:
        """Read the next rows of this rank's share; the position moves when the share is used up."""
        first, _ = self._ask(rows)
        batch = self.read(first, rows)
        self._move(rows)
        return batch

    def step_weight(self) -> float:
        """Sum of the loss masks of the current step over all ranks: what its loss is divided by."""
        return self.weight(self.position, self._global_batch)

    def weight(self, first_sample: int, rows: int) -> float:
        """Sum of the loss masks of samples [first_sample, first_sample + rows)."""
        documents = self.read(first_sample, rows).documents
        return float(documents.loss_mask.sum(dtype=np.float64))

    def close(self) -> None:
        """Let go of the files."""
        self._open, self._shards = False, []

    def _identity(self) -> dict[str, Any]:
        stream = self._stream
        return {
            "algo": ALGORITHM,
            "mode": stream.mode,
            "shuffle": stream.shuffle,
            "seed": stream.seed,
            "seq_len": self._seq_len,
            "n_episodes": stream.n_episodes,
            "min_tokens": self._min_tokens,
            "pad_id": self._pad_id,
            "use_loss_mask": self._use_mask,
            "fingerprint": self.fingerprint,
        }

    def _check_size(self, corpus: Described, seq_len: int) -> None:
        """An episode may be shorter than a row."""

    def _check_tokens(self, tokens: Int64, ids: Int64) -> None:
        if self._vocab_size is None or int(tokens.max()) < self._vocab_size:
            return
        row, column = (int(v) for v in np.argwhere(tokens >= self._vocab_size)[0])
        raise TokenRangeError(
            f"episode {int(ids[row])} of {self._source}",
            f"id {tokens[row, column]}, where vocab_size is {self._vocab_size}",
            "the data was written with another tokenizer than the model's: prepare it again, or "
            "use a model whose vocab_size covers it",
        )
