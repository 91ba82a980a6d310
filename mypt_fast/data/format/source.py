"""Everything at a path: a dataset's splits, or one file, and its tokens block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mypt_fast.data.format.dataset import has_split, open_file, open_split
from mypt_fast.data.format.files import opened, read_at
from mypt_fast.data.format.metadata import is_declared, read_metadata, recorded_shards
from mypt_fast.data.format.shard import Shard, Split
from mypt_fast.data.format.writers import Block
from mypt_fast.errors import DataError

BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Source:
    """What a path holds.

    Attributes:
        path: of a dataset or a file.
        splits: the shards of each split that is there; a single file is the train split.
        metadata: of the dataset, {} where there is none.
    """

    path: Path
    splits: dict[Split, list[Shard]]
    metadata: dict[str, Any]

    @property
    def shards(self) -> list[Shard]:
        """All shards, train's first."""
        return [shard for shards in self.splits.values() for shard in shards]

    def recorded_digests(self) -> list[str]:
        """The XXH3-128 of each shard's file as the metadata records it, or "", as `shards`."""
        digests = []
        for split, shards in self.splits.items():
            recorded = recorded_shards(self.metadata, split) or {}
            digests += [recorded.get(s.name, {}).get("xxh3_128", "") for s in shards]
        return digests


def open_source(path: Path, dtype: str | None = None) -> Source:
    """Open whatever is at a path, also with 8 bytes a token.

    Args:
        path: a dataset's folder, or one file of tokens.
        dtype: of a file that has no magic number.

    Raises:
        DataError: nothing is there, or it cannot be read.
        IntegrityError: it is not what its headers, sizes or metadata say.
    """
    path = Path(path)
    if path.is_file():
        return Source(path, {"train": [open_file(path, dtype)]}, {})
    if dtype is not None and path.is_dir():
        raise DataError(
            f"--input_dtype {dtype} for {path}", "a dataset's folder", "it is for a single file"
        )
    names: tuple[Split, ...] = get_args(Split)
    metadata = read_metadata(path)
    found = [
        split for split in names if is_declared(metadata, split) or has_split(path, split, metadata)
    ]
    splits = {
        split: open_split(path, split, int64=True, metadata=metadata)
        for split in found or names[:1]
    }
    return Source(path, splits, metadata)


def token_dtype(shard: Shard) -> np.dtype[Any]:
    """The type of an id as it is stored: Megatron's 4 and 8 bytes are signed."""
    signed = shard.format == "megatron" and shard.width > 2
    return np.dtype(f"<{'i' if signed else 'u'}{shard.width}")


def read_blocks(shard: Shard, goes_on: bool = False) -> Iterator[Block]:
    """Yield a shard's tokens with what lies beside them; only document ends are read at once.

    Args:
        shard: what to read.
        goes_on: whether its last document goes on in the next shard, and does not end here.
    """
    ends = shard.document_ends() if shard.documents else np.empty(0, np.uint64)
    if goes_on:
        ends = ends[:-1]
    dtype = token_dtype(shard)
    with contextlib.ExitStack() as stack:
        tokens = stack.enter_context(opened(shard.path))[0]
        planes = {p: stack.enter_context(opened(p.path, p.kind))[0] for p in shard.planes}
        for first in range(0, shard.n_tokens, BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, shard.n_tokens - first)
            at = shard.offset + first * shard.width
            raw = read_at(tokens, count * shard.width, at, shard.path)
            low, high = np.searchsorted(ends, [first, first + count], side="right")
            values = {}
            for p, descriptor in planes.items():
                size = p.dtype.itemsize
                data = read_at(descriptor, count * size, p.offset + first * size, p.path)
                values[p.kind] = np.frombuffer(data, p.dtype)
            within = ends[low:high] - np.uint64(first)
            yield Block(np.frombuffer(raw, dtype), within, values)
