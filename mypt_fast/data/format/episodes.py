"""MyPT's episode datasets: tokens in a row, an index of episodes, a value or two a token.

    tokens.bin          uint32; uint16 where the metadata says so, or where the file is exactly as
                        long as that makes it
    episodes.idx        uint64 pairs: first token, tokens
    mask.bin            uint8, optional: 1 where a token counts in the loss
    mask_weighted.bin   float32, optional: how much it counts
    segment_ids.bin     uint8, optional: 0 padding, 1 to 255 a document of a packed episode

They lie in the split's folder or in shard_*/ folders of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from mypt_fast.data.format.files import open_file, opened, read_at, sampled_digest
from mypt_fast.data.format.metadata import natural_order
from mypt_fast.data.format.shard import Documents, Ends, Plane, PlaneKind, Shard
from mypt_fast.errors import FormatError, TruncatedShardError

TOKENS, INDEX = "tokens.bin", "episodes.idx"
PLANES: dict[str, PlaneKind] = {
    "mask.bin": "mask",
    "mask_weighted.bin": "weights",
    "segment_ids.bin": "segments",
}
_PAIR = 16
_CHUNK = 1 << 16  # episodes that are checked at once


class MismatchedPlaneError(FormatError, AssertionError):
    """Another number of masks or segments than of tokens; MyPT asserts that they agree."""


@dataclass(frozen=True)
class Folders:
    """Where the shards of a split are, and one line about what was found."""

    paths: list[Path]
    notice: str = ""


def find_folders(split_dir: Path, names: list[str]) -> Folders | None:
    """Say where the episodes of a split are; None where its layout is another.

    MyPT reads shard_* folders alone where there are any. One of its writers leaves the first shard
    beside them, and training on the others would be silent: it is read first.

    Args:
        split_dir: the split's folder.
        names: what is in it, sorted.
    """
    numbered = [name for name in names if name.startswith("shard_") and "." not in name]
    numbered.sort(key=natural_order)
    folders = [split_dir / name for name in numbered if (split_dir / name).is_dir()]
    direct = [name for name in (TOKENS, INDEX) if name in names]
    if not any((folder / TOKENS).exists() or (folder / INDEX).exists() for folder in folders):
        if INDEX in names:
            return Folders([split_dir])
        if TOKENS in names and PLANES.keys() & set(names):
            raise FormatError(
                f"episodes in {split_dir}",
                f"{TOKENS} and {', '.join(sorted(PLANES.keys() & set(names)))} without {INDEX}",
                "copy the missing file",
            )
        return None
    if len(direct) == 2:
        notice = f"the first shard lies beside the shard_* folders of {split_dir.name}/; it is read"
        return Folders([split_dir, *folders], notice)
    ignored = [name for name in names if name in (TOKENS, INDEX) or name in PLANES]
    if not ignored:
        return Folders(folders)
    notice = f"{', '.join(ignored)} beside the shard_* folders of {split_dir.name}/ is no complete "
    return Folders(folders, notice + "shard and is not read, as in MyPT")


def open_episodes(
    folder: Path, width: int, label: str, *, vocab_size: int = 0, notice: str = ""
) -> Shard:
    """Open one folder of episodes.

    Raises:
        DataError: a file is missing or cannot be read.
        FormatError: the index is out of range or not in order.
        TruncatedShardError: a file has another size than the tokens say.
    """
    path = folder / TOKENS
    descriptor, size = open_file(path)
    try:
        if width == 4 and size == 2 * _last_token(folder / INDEX) > 0:
            width = 2
        if size % width:
            raise TruncatedShardError(
                f"shard {path}", f"{size} bytes is not a multiple of {width} (uint{8 * width})"
            )
        digest = sampled_digest(descriptor, size, path)
    finally:
        os.close(descriptor)
    n_tokens = size // width
    reader = EpisodeReader(folder / INDEX, n_tokens)
    count, index_digest = reader.check()
    digests, planes = [digest, index_digest], []
    for name, kind in PLANES.items():
        if (folder / name).exists():
            plane = Plane(kind, folder / name)
            digests.append(_check_plane(plane, n_tokens))
            planes.append(plane)
    return Shard(
        path, width, n_tokens, digest="+".join(digests), format="episodes", label=label,
        vocab_size=vocab_size, documents=Documents(folder / INDEX, 0, count, reader),
        planes=tuple(planes), notice=notice,
    )  # fmt: skip


def _last_token(index: Path) -> int:
    """Where the last episode of an index ends; 0 where it has none."""
    with opened(index, "index") as (descriptor, size):
        if size < _PAIR:
            return 0
        begin, length = np.frombuffer(read_at(descriptor, _PAIR, size - _PAIR, index), "<u8")
    return int(begin) + int(length)


def _check_plane(plane: Plane, n_tokens: int) -> str:
    with opened(plane.path, plane.kind) as (descriptor, size):
        itemsize = plane.dtype.itemsize
        if size != n_tokens * itemsize:
            raise MismatchedPlaneError(
                f"{plane.kind} {plane.path}",
                f"{size} bytes, where {n_tokens} tokens with {itemsize} bytes each are "
                f"{n_tokens * itemsize}",
                "copy the files again: they are not of one dataset",
            )
        return sampled_digest(descriptor, size, plane.path)


@dataclass(frozen=True)
class EpisodeReader:
    """Reads the index of one folder; called, it gives where documents end.

    Attributes:
        path: episodes.idx.
        n_tokens: tokens of tokens.bin beside it.
    """

    path: Path
    n_tokens: int

    def __call__(self) -> Ends:
        """Token positions, strictly ascending; what lies between two episodes ends by itself."""
        starts, lengths = self.spans()
        edges = np.concatenate((starts, starts + lengths, np.array([self.n_tokens], np.uint64)))
        positions: Ends = np.unique(edges)
        return positions[positions > 0]

    def spans(self) -> tuple[Ends, Ends]:
        """First token and tokens of every episode, uint64, checked."""
        with opened(self.path, "index") as (descriptor, size):
            self._check_size(size)
            pairs = np.frombuffer(read_at(descriptor, size, 0, self.path), "<u8").reshape(-1, 2)
        self._check_pairs(pairs, 0, 0)
        return pairs[:, 0], pairs[:, 1]

    def check(self) -> tuple[int, str]:
        """Check all episodes in bounded memory; return how many there are, and a hash."""
        digest, end = xxhash.xxh3_64(), 0
        with opened(self.path, "index") as (descriptor, size):
            self._check_size(size)
            for at in range(0, size, _CHUNK * _PAIR):
                raw = read_at(descriptor, min(_CHUNK * _PAIR, size - at), at, self.path)
                end = self._check_pairs(np.frombuffer(raw, "<u8").reshape(-1, 2), at // _PAIR, end)
                digest.update(raw)
        return size // _PAIR, digest.hexdigest()

    def _check_size(self, size: int) -> None:
        if size % _PAIR:
            raise TruncatedShardError(
                f"index {self.path}", f"{size} bytes is not a multiple of {_PAIR}"
            )

    def _check_pairs(self, pairs: NDArray[np.uint64], first: int, end: int) -> int:
        """Refuse what is out of range or overlaps; return where the last episode ends."""
        if not len(pairs):
            return end
        starts, lengths = pairs[:, 0], pairs[:, 1]
        limit = np.uint64(self.n_tokens)
        outside = (starts > limit) | (lengths > limit - np.minimum(starts, limit))
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            self._fail(first + i, starts[i], lengths[i], f"not within {self.n_tokens} tokens")
        ends = starts + lengths
        before = np.concatenate((np.array([end], np.uint64), ends[:-1]))
        overlapping = starts < before
        if overlapping.any():
            i = int(np.flatnonzero(overlapping)[0])
            self._fail(first + i, starts[i], lengths[i], f"the one before it ends at {before[i]}")
        return int(ends[-1])

    def _fail(self, episode: int, start: np.uint64, length: np.uint64, found: str) -> None:
        raise FormatError(
            f"index {self.path}",
            f"episode {episode} has {length} tokens from token {start} on; {found}",
            "copy the files again: they are not of one dataset",
        )
