"""MyPT's `core.data_loader`: batches of tokens, drawn from the global generators as MyPT does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast.core.config import strict_compat
from mypt_fast.errors import DataError, IntegrityError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from mypt_fast.data.format import Shard, Split
    from mypt_fast.data.tokens import TokenCorpus

    Batch = tuple[torch.Tensor, ...]

STATE_VERSION = 1


class MissingDataError(DataError, FileNotFoundError):
    """A dataset, or a split of one, that is not there."""


class UnusableDataError(DataError, ValueError):
    """Data from which no batch can be made."""


class GPTDataLoader:
    """Batches of a text in memory or of a dataset of shards.

    Shards may be MyPT's flat files of 32 or 16 bits, native ones, or any that `mypt_fast` reads.
    Rows are drawn by torch's (text) or NumPy's (shards) global generator, with MyPT's calls in
    MyPT's order. Where MyPT loops for ever or gives fewer rows than asked for (a shard that is
    hardly longer than block_size), this one raises, and draws the rows; MYPT_STRICT_COMPAT=1 brings
    the short batches back.

    Args:
        config: block_size, batch_size and device are read, whenever a batch is made.
        tokenizer: with `encode(text)`.
        dataset_dir: of shards; None for text, through `prepare_data`.
        use_loss_mask: also return masks, where the dataset has any: *_mask.bin beside the shards,
            or the masks of native ones.
        eval_only: open the val split alone; without a val/ folder, the *.bin in the folder itself.

    Raises:
        FileNotFoundError: the folder, or the shards of a split that is needed, are not there.
        IntegrityError: a file is not what its size, its header or the metadata says.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        dataset_dir: str | os.PathLike[str] | None = None,
        use_loss_mask: bool = False,
        eval_only: bool = False,
    ) -> None:
        self.config, self.tokenizer, self.dataset_dir = config, tokenizer, dataset_dir
        self.use_loss_mask, self.eval_only = use_loss_mask, eval_only
        self.train_data: Any = None
        self.val_data: Any = None
        self.train_mask: Any = None
        self.val_mask: Any = None
        self.train_shards: list[str] = []
        self.val_shards: list[str] = []
        self.train_mask_shards: list[str] = []
        self.val_mask_shards: list[str] = []
        self.shard_cache: dict[str, Any] = {}
        self.use_shards = dataset_dir is not None
        self._corpora: dict[str, TokenCorpus] = {}
        self._sizes: dict[str, list[int]] = {}
        self._reaches: dict[tuple[str, int], list[int]] = {}  # by split and block_size
        self._batches = {"train": 0, "val": 0}
        if dataset_dir is not None:
            self._open_dataset(Path(dataset_dir))

    @staticmethod
    def read_text(path: str | os.PathLike[str]) -> str:
        """Read a UTF-8 text."""
        return Path(path).read_text("utf-8")

    def prepare_data(self, text: str, train_ratio: float = 0.9) -> None:
        """Encode a text; its first int(train_ratio * n) tokens are the train split, the rest val.

        Raises:
            ValueError: a split would be empty.
        """
        import torch

        data = torch.tensor(self.tokenizer.encode(text), dtype=torch.long)
        cut = int(train_ratio * len(data))
        for name, part in (("train", data[:cut]), ("val", data[cut:])):
            if not len(part):
                raise UnusableDataError(
                    f"{name} split of a text",
                    f"0 of {len(data)} tokens with train_ratio {train_ratio}",
                    "give a longer text",
                )
        self.train_data, self.val_data = data[:cut], data[cut:]

    def get_batch(self, split: str = "train") -> Batch:
        """Draw x and y, and a mask where masks are used: int64, (batch_size, block_size).

        Raises:
            ValueError: the split has no data, or less than one window.
        """
        batch = self._from_shards(split) if self.use_shards else self._from_memory(split)
        self._batches[_side(split)] += 1
        return on_device(batch, self.config)

    def eval_batches(self, split: str, n: int, seed: int | None = None) -> Iterator[Batch]:
        """Yield the n batches that `get_batch` would, and leave the global generators alone.

        Args:
            split: "train" or "val".
            n: how many.
            seed: begin as `np.random.seed` and `torch.manual_seed` would; None: where the
                generators are.
        """
        import numpy as np
        import torch

        before = dict(self._batches)
        own = np.random.get_state(), torch.get_rng_state()
        if seed is not None:
            fresh = torch.Generator().manual_seed(seed)
            own = np.random.RandomState(seed % (1 << 32)).get_state(), fresh.get_state()
        for _ in range(n):
            outer = np.random.get_state(), torch.get_rng_state()
            np.random.set_state(own[0])
            torch.set_rng_state(own[1])
            try:
                batch = self.get_batch(split)
                own = np.random.get_state(), torch.get_rng_state()
            finally:
                np.random.set_state(outer[0])
                torch.set_rng_state(outer[1])
                self._batches = dict(before)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches were drawn; the generators are global, and not in here."""
        return {"version": STATE_VERSION, "kind": "tokens", "batches": dict(self._batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`.

        Raises:
            DataError: it is another loader's.
        """
        check_state(state, "tokens")
        self._batches = {**self._batches, **state["batches"]}

    def _open_dataset(self, folder: Path) -> None:
        if not folder.is_dir():
            raise MissingDataError(
                f"dataset {folder}", "no such folder", "make it with `mypt-fast prepare`"
            )
        for split in ("val",) if self.eval_only else ("train", "val"):
            shards = open_split_like_mypt(folder, split, self.eval_only)  # type: ignore[arg-type]
            if not shards and split == ("val" if self.eval_only else "train"):
                raise MissingDataError(
                    f"{split} split of {folder}",
                    f"no shard; searched {folder / split}/*.bin",
                    "prepare the dataset again, with --val_fraction and smaller --tokens_per_shard "
                    "where it is a split that is missing",
                )
            if shards:
                self._take(split, shards)

    def _take(self, split: str, shards: Sequence[Shard]) -> None:
        from mypt_fast.data.tokens import TokenCorpus

        ordered = sorted(shards, key=lambda shard: str(shard.path))
        self._corpora[split] = TokenCorpus.from_shards(ordered, f"{split} of {self.dataset_dir}")
        self._sizes[split] = [shard.n_tokens for shard in ordered]
        folder = ordered[0].path.parent
        masks = sorted(str(path) for path in folder.glob("*_mask.bin"))
        setattr(self, f"{split}_shards", [str(shard.path) for shard in ordered])
        setattr(self, f"{split}_mask_shards", masks)

    def _from_memory(self, split: str) -> Batch:
        import torch

        data = self.train_data if _side(split) == "train" else self.val_data
        if data is None:
            raise UnusableDataError(
                f"batch of {split}", "no data was prepared", "call prepare_data(text) first"
            )
        T, B = self.config.block_size, self.config.batch_size
        if len(data) <= T:
            raise UnusableDataError(
                f"{split} split for a context of {T}",
                f"{len(data)} tokens, where one window needs {T + 1}",
                "give a longer text, or lower block_size",
            )
        starts = torch.randint(len(data) - T, (B,))
        columns = starts[:, None] + torch.arange(T)
        mask = self.train_mask if _side(split) == "train" else self.val_mask
        batch = data[columns].long(), data[columns + 1].long()
        if self.use_loss_mask and mask is not None:
            return (*batch, mask[columns + 1].long())
        return batch

    def _from_shards(self, split: str) -> Batch:
        import numpy as np
        import torch

        from mypt_fast.data.mypt_order import shard_batch

        corpus = self._corpora.get(_side(split))
        if corpus is None:
            raise UnusableDataError(
                f"batch of {split}", f"{self.dataset_dir} has no such split", "prepare it again"
            )
        T = self.config.block_size
        number, within = shard_batch(
            lambda n, count: np.random.randint(0, n, size=count).astype(np.int64),
            self._reaches_of(_side(split), T), self.config.batch_size,
            strict_compat=strict_compat(),
        )  # fmt: skip
        starts = within + sum(self._sizes[_side(split)][:number])
        x, y = (np.empty((len(starts), T), np.int64) for _ in range(2))
        corpus.gather(starts, x, y)
        batch: tuple[NDArray[Any], ...] = (x, y)
        if self.use_loss_mask:
            mask = self._mask(_side(split), corpus, number, within, starts)
            batch = batch if mask is None else (x, y, mask)
        return tuple(torch.from_numpy(part) for part in batch)

    def _reaches_of(self, side: str, T: int) -> list[int]:
        from mypt_fast.data.mypt_order import shard_reaches

        if (side, T) not in self._reaches:
            try:
                self._reaches[side, T] = shard_reaches(self._sizes[side], T)
            except DataError as error:  # where MyPT loops for ever
                raise UnusableDataError(error.what, error.found, error.cure) from None
        return self._reaches[side, T]

    def _mask(
        self,
        side: str,
        corpus: TokenCorpus,
        number: int,
        within: NDArray[np.int64],
        starts: NDArray[np.int64],
    ) -> NDArray[Any] | None:
        """Masks of the targets, from the file beside the shard or from within the corpus."""
        import numpy as np

        T = self.config.block_size
        files: list[str] = getattr(self, f"{side}_mask_shards")
        if number < len(files):
            if files[number] not in self.shard_cache:
                plane = _open_mask(Path(files[number]), corpus.shards[number])
                self.shard_cache[files[number]] = plane
            plane = self.shard_cache[files[number]]
            found = np.stack([plane[s + 1 : s + 1 + T] for s in within.tolist()])
            return found.astype(np.int64)
        weights = corpus.stored_weights()
        if not weights.any:
            return None
        return np.stack([weights.read_weights(s + 1, T) for s in starts.tolist()])


def on_device(batch: Batch, config: Any) -> Batch:
    """Bring a batch to config.device; to a GPU without waiting for the copy."""
    device = str(getattr(config, "device", None) or "cpu")
    if device.startswith("cuda"):  # torch keeps page-locked memory until its copy is done
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in batch)
    return tuple(part.to(device) for part in batch)


def check_state(state: Any, kind: str) -> None:
    """Refuse what is no state of this kind of loader; raises ValueError."""
    found = (state.get("version"), state.get("kind")) if isinstance(state, dict) else None
    if found != (STATE_VERSION, kind):
        raise UnusableDataError(
            f"state of a loader of {kind}", f"found {found!r}", "use one that state_dict() returned"
        )


def open_split_like_mypt(folder: Path, split: Split, eval_only: bool = False) -> list[Shard]:
    """Open the shards of a split; [] where there is none.

    A metadata file that lists no shards is MyPT's, and there for people alone: its counts are not
    believed. Without a dtype there, shards that cannot be 32 bits wide are read as 16.
    """
    from mypt_fast.data.format import has_split, open_file, open_split

    metadata = _believed_metadata(folder)
    if eval_only and not (folder / split).is_dir():
        names = sorted(folder.glob("*.bin"))
        found = [path for path in names if not path.name.endswith("_mask.bin")]
        return _either_width(
            lambda dtype: [open_file(path, _dtype_of(path, dtype)) for path in found], metadata
        )
    if not has_split(folder, split, metadata):
        return []
    return _either_width(
        lambda dtype: open_split(folder, split, metadata={**metadata, "dtype": dtype}), metadata
    )


def _believed_metadata(folder: Path) -> dict[str, Any]:
    """What metadata says of the files; of a file that is not in our terms, nothing."""
    from mypt_fast.data.format import METADATA, read_metadata

    try:
        metadata = read_metadata(folder)
    except IntegrityError:
        try:
            found = json.loads((folder / METADATA).read_bytes())
        except (ValueError, RecursionError, OSError):
            found = None
        if not isinstance(found, dict) or isinstance(found.get("shards"), list):
            raise
        return {}
    if "shards" in metadata:
        return metadata
    return {key: metadata[key] for key in ("dtype", "format", "vocab_size") if key in metadata}


def _dtype_of(path: Path, dtype: str) -> str | None:
    from mypt_fast.data.format.dataset import magic_of

    return None if magic_of(path) else dtype


def _either_width(opened: Callable[[str], list[Shard]], metadata: dict[str, Any]) -> list[Shard]:
    if "dtype" in metadata:
        return opened(metadata["dtype"])
    try:
        return opened("uint32")
    except IntegrityError as error:
        if isinstance(error, AssertionError):
            raise
        try:
            return opened("uint16")
        except IntegrityError:
            raise error from None


def _open_mask(path: Path, shard: Shard) -> NDArray[Any]:
    """Map a mask file, whose values are as wide as its size makes them: 4, 2 or 1 bytes."""
    import numpy as np

    width, rest = divmod(path.stat().st_size, max(1, shard.n_tokens))
    if rest or width not in (1, 2, 4):
        raise IntegrityError(
            f"mask {path}",
            f"{path.stat().st_size} bytes, where {shard.path.name} has {shard.n_tokens} tokens",
            "copy the files again: they are not of one dataset",
        )
    plane: NDArray[Any] = np.memmap(path, f"<u{width}", "r")
    return plane


def _side(split: str) -> str:
    return "train" if split == "train" else "val"
