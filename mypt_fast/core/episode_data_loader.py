"""MyPT's `core.episode_data_loader`: batches of whole episodes, in MyPT's order."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast import console
from mypt_fast.core.data_loader import (
    STATE_VERSION,
    MissingDataError,
    UnusableDataError,
    check_state,
    on_device,
    open_split_like_mypt,
)
from mypt_fast.errors import DataError

if TYPE_CHECKING:
    import torch

    from mypt_fast.data.episode_rows import EpisodeShard
    from mypt_fast.data.mypt_order import MyptEpisodeOrder

    Batch = tuple[torch.Tensor, ...]

GPT2_EOT = 50256
_INDEX = "episodes.idx"


def is_episode_indexed_dataset(dataset_dir: str | os.PathLike[str]) -> bool:
    """Whether train/, or else val/, has an index of episodes, or its first shard_* folder has."""
    for split in ("train", "val"):
        folder = Path(dataset_dir) / split
        if folder.is_dir():
            shards = sorted(path for path in folder.glob("shard_*") if path.is_dir())
            return any((place / _INDEX).is_file() for place in (folder, *shards[:1]))
    return False


class GPTEpisodeDataLoader:
    """One episode a row: the whole of it, or its last block_size + 1 tokens, padded on the right.

    None arguments come from the config; `pad_token_id` comes from the argument alone, then from the
    tokenizer's <myPT_eot>, then it is GPT-2's end of text.

    Args:
        config: block_size, batch_size, device and the sampling fields.
        tokenizer: for the padding; may be None where `pad_token_id` is given.
        dataset_dir: an episode dataset.
        use_loss_mask: return masks, weighted ones where there are any.
        batch_sampling_mode: "epoch" or "random".
        epoch_shuffle: shuffle the episodes of each epoch.
        epoch_drop_last: kept for MyPT, which does not read it either.
        epoch_seed: of the order; no global generator is touched.
        pad_token_id: what padding shows.
        episode_min_tokens: shorter episodes are skipped.
        eval_only: open the val split alone; without one, the train split.

    Raises:
        FileNotFoundError: the folder or its train split is not there.
        ValueError: no episode is long enough, an unknown mode, or no token to pad with.
        AssertionError: a file of masks or segments has another number of values than of tokens.
        IntegrityError: a file is not what its size or its index says.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        dataset_dir: str | os.PathLike[str],
        use_loss_mask: bool | None = None,
        batch_sampling_mode: str | None = None,
        epoch_shuffle: bool | None = None,
        epoch_drop_last: bool | None = None,
        epoch_seed: int | None = None,
        pad_token_id: int | None = None,
        episode_min_tokens: int | None = None,
        eval_only: bool = False,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.dataset_dir, self.eval_only = dataset_dir, eval_only
        self.use_loss_mask = bool(_setting(config, "use_loss_mask", use_loss_mask, False))
        self.batch_sampling_mode = _setting(
            config, "batch_sampling_mode", batch_sampling_mode, "epoch"
        )
        self.epoch_shuffle = bool(_setting(config, "epoch_shuffle", epoch_shuffle, True))
        self.epoch_drop_last = bool(_setting(config, "epoch_drop_last", epoch_drop_last, True))
        self.epoch_seed = int(_setting(config, "epoch_seed", epoch_seed, 1337))
        self.episode_min_tokens = int(_setting(config, "episode_min_tokens", episode_min_tokens, 2))
        self.pad_token_id = _pad_token(tokenizer, pad_token_id)
        if self.batch_sampling_mode not in ("epoch", "random"):
            raise UnusableDataError(
                "batch_sampling_mode", f"{self.batch_sampling_mode!r}", "use epoch or random"
            )
        self._mask_debug = False
        self._data: dict[str, dict[str, Any]] = {
            split: {"shards": [], "loaded": False} for split in ("train", "val")
        }
        self._orders: dict[str, MyptEpisodeOrder] = {}
        self._open_dataset(Path(dataset_dir))

    def get_batch(self, split: str = "train") -> Batch:
        """Return x and y, with a mask where masks are used, with segment ids where there are any.

        x, y and segment ids are (batch_size, block_size) int64, the mask float32; the mask is
        aligned to y, the segment ids to x. Without a val split, val is train.

        Raises:
            AssertionError: an episode has another number of masks or segments than of tokens.
        """
        side = self._side(split)
        order = self._order(side)
        return self._batch(side, order)

    def eval_batches(self, split: str, n: int, seed: int | None = None) -> Iterator[Batch]:
        """Yield the n batches that `get_batch` would, and leave the position where it is.

        Args:
            split: "train" or "val".
            n: how many.
            seed: None: from where the split is; any other: from its first episode, so that each
                evaluation is of the same ones. The order is the split's own in any case.
        """
        side = self._side(split)
        order, own = self._order(side), self._new_order(side)
        if seed is None:
            own.load_state_dict(order.state_dict())
        for _ in range(n):
            yield self._batch(side, own)

    def get_epoch_info(self, split: str = "train") -> dict[str, int]:
        """Say where the split is in its epoch."""
        order = self._order(self._side(split))
        return {
            "epoch": order.epoch,
            "position": order.position,
            "episodes_total": order.n_episodes,
            "batches_per_epoch": order.n_episodes // order.batch_size,
            "episodes_seen_this_epoch": order.position,
        }

    def reset_epoch(self, split: str = "train") -> None:
        """Begin the current epoch again."""
        self._order(self._side(split)).reset_epoch()

    def enable_mask_debug(self, enabled: bool = True) -> None:
        """Print, for each batch, how many targets count."""
        self._mask_debug = bool(enabled)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in each split; plain values."""
        orders = {split: order.state_dict() for split, order in self._orders.items()}
        return {"version": STATE_VERSION, "kind": "episodes", "splits": orders}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of a `state_dict`.

        Raises:
            DataError: it is of other episodes, of another order, or no state.
        """
        check_state(state, "episodes")
        for split, saved in state["splits"].items():
            if split in self._data and self._data[split]["loaded"]:
                order = self._order(split)  # a position in an epoch is one with any batch size
                order.load_state_dict({**saved, "batch_size": order.batch_size})

    def _open_dataset(self, folder: Path) -> None:
        if not folder.is_dir():
            raise MissingDataError(
                f"episode dataset {folder}", "no such folder", "name one that exists"
            )
        for split in ("val",) if self.eval_only else ("train", "val"):
            self._load(folder, split)
        if self.eval_only and not self._data["val"]["loaded"]:
            self._load(folder, "train")
        if not any(data["loaded"] for data in self._data.values()) or not (
            self.eval_only or self._data["train"]["loaded"]
        ):
            raise MissingDataError(
                f"{'val' if self.eval_only else 'train'} split of {folder}",
                f"no {_INDEX}; searched the split's folder and its shard_* folders",
                "prepare the dataset again",
            )
        for data in self._data.values():
            if data["loaded"] and not sum(len(shard["valid_ids"]) for shard in data["shards"]):
                raise UnusableDataError(
                    f"episodes of {folder}",
                    f"none has {self.episode_min_tokens} tokens",
                    "lower episode_min_tokens, or prepare the dataset again",
                )
        self._check_masks(folder)

    def _load(self, folder: Path, split: str) -> None:
        from mypt_fast.data.episode_rows import episode_shards

        shards = open_split_like_mypt(folder, split)  # type: ignore[arg-type]
        if not shards or any(shard.format != "episodes" for shard in shards):
            return
        for shard in shards:
            if shard.notice:
                warnings.warn(shard.notice, stacklevel=4)
        opened = episode_shards(shards, self.episode_min_tokens)
        self._data[split] = {"shards": opened, "loaded": True}

    def _check_masks(self, folder: Path) -> None:
        if not self.use_loss_mask:
            return
        loaded = [data["shards"] for data in self._data.values() if data["loaded"]]
        if not any(shard["mask"] is not None for shards in loaded for shard in shards):
            self.use_loss_mask = False
            warnings.warn(f"use_loss_mask is off: {folder} stores no masks", stacklevel=4)

    def _side(self, split: str) -> str:
        other = "val" if split == "train" else "train"
        side = "train" if split == "train" else "val"
        return side if self._data[side]["loaded"] else other

    def _order(self, side: str) -> MyptEpisodeOrder:
        """The order of a split; made again, at its place, where the batch size changed."""
        order = self._orders.get(side)
        if order is None:
            order = self._orders[side] = self._new_order(side)
        order.batch_size = self.config.batch_size
        return order

    def _new_order(self, side: str) -> MyptEpisodeOrder:
        from mypt_fast.data.mypt_order import MyptEpisodeOrder

        shards: list[EpisodeShard] = self._data[side]["shards"]
        count = sum(len(shard["valid_ids"]) for shard in shards)
        try:
            return MyptEpisodeOrder(
                count, self.config.batch_size, self.epoch_seed, self.batch_sampling_mode,
                shuffle=self.epoch_shuffle,
            )  # fmt: skip
        except DataError as error:
            raise UnusableDataError(error.what, error.found, error.cure) from None

    def _batch(self, side: str, order: MyptEpisodeOrder) -> Batch:
        import torch

        from mypt_fast.data.episode_rows import read_rows

        shards: list[EpisodeShard] = self._data[side]["shards"]
        rows = read_rows(shards, order.next_ids(), self.config.block_size, self.pad_token_id)
        parts: list[Any] = [rows.x, rows.y]
        if self.use_loss_mask and any(shard["mask"] is not None for shard in shards):
            parts.append(rows.mask)
            if any(shard["segment_ids"] is not None for shard in shards):
                parts.append(rows.segments)
            if self._mask_debug:
                counted = int((rows.mask != 0).sum())
                console.say(f"[mask] {side}: {counted} of {rows.mask.size} targets count")
        return on_device(tuple(map(torch.from_numpy, parts)), self.config)


def _setting(config: Any, name: str, given: Any, default: Any) -> Any:
    """An argument, else the config's field, else MyPT's default."""
    return getattr(config, name, default) if given is None else given


def _pad_token(tokenizer: Any, given: int | None) -> int:
    """The token that padding shows; the config's own field is not read, as in MyPT."""
    if given is not None:
        return int(given)
    end = _end_token(tokenizer)
    if end is not None:
        return end
    if tokenizer is not None and getattr(tokenizer, "token_kind", "gpt2") == "gpt2":
        return GPT2_EOT
    raise UnusableDataError(
        "padding of episodes",
        "the tokenizer has neither <myPT_eot> nor GPT-2's end of text",
        "give pad_token_id",
    )


def _end_token(tokenizer: Any) -> int | None:
    """The id of <myPT_eot>, in whichever way a script's own tokenizer tells it; None for none."""
    found = []
    tables = (("special_tokens", "myPT_eot"), ("special_token_encoder", "<myPT_eot>"))
    for table, key in tables:
        entries = getattr(tokenizer, table, None)
        found.append(entries.get(key) if isinstance(entries, Mapping) else None)
    ask = getattr(tokenizer, "get_special_token_id", None)
    with contextlib.suppress(KeyError, ValueError):  # as ours and MyPT's say that there is none
        found.append(ask("myPT_eot") if callable(ask) else None)
    return next((int(n) for n in found if isinstance(n, Integral)), None)
