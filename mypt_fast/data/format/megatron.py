r"""Megatron's pairs of files: tokens in X.bin, and in X.idx where sequences and documents lie.

b"MMIDIDX\0\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 entries
int32 a sequence      its tokens
int64 a sequence      the byte of X.bin at which it begins
int64 an entry        the sequence with which a document begins; the first is 0 and the last
                      the number of sequences
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from mypt_fast.data.format.files import open_file, opened, read_at, sampled_digest
from mypt_fast.data.format.shard import Documents, Ends, Shard
from mypt_fast.errors import FormatError, TruncatedShardError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
CODES = {4: 4, 5: 8, 8: 2}  # dtype code: bytes a token; int32, int64, uint16
_CHUNK = 1 << 16  # sequences that are checked at once


@dataclass(frozen=True)
class Index:
    """The counts of an index whose every entry was checked."""

    path: Path
    width: int
    n_tokens: int
    n_sequences: int
    n_entries: int

    @property
    def documents_at(self) -> int:
        """The byte of the first document entry."""
        return HEADER.size + 12 * self.n_sequences


def open_megatron(path: Path, label: str = "", *, int64: bool = False) -> Shard:
    """Open X.bin and X.idx.

    Ids of int32 and int64 files are not negative, which is checked when they are read. The loader
    reads 2 and 4 bytes a token, so that 8 have to be converted first.

    Args:
        path: X.bin.
        label: its name in the dataset.
        int64: whether the caller reads 8 bytes a token.

    Raises:
        DataError: a file is missing or cannot be read.
        FormatError: the index is not Megatron's, or contradicts itself.
        TruncatedShardError: a size is not what the index says.
    """
    index_path = path.with_suffix(".idx")
    with opened(index_path, "index") as (descriptor, size):
        index, digest = _check_index(descriptor, size, index_path)
    if index.width == 8 and not int64:
        raise FormatError(
            f"shard {path}", "int64 tokens, 8 bytes each",
            "write it with 2 or 4: mypt-fast data convert",
        )  # fmt: skip
    descriptor, size = open_file(path)
    try:
        if size != index.n_tokens * index.width:
            raise TruncatedShardError(
                f"shard {path}",
                f"{size} bytes, where {index_path.name} says {index.n_tokens} tokens of "
                f"{index.width} bytes: {index.n_tokens * index.width}",
                "copy both files again",
            )
        digest += sampled_digest(descriptor, size, path)
    finally:
        os.close(descriptor)
    read = EndReader(index)
    documents = Documents(index_path, index.documents_at, index.n_entries - 1, read)
    return Shard(
        path, index.width, index.n_tokens, digest=digest, format="megatron", label=label,
        documents=documents,
    )  # fmt: skip


def _check_index(descriptor: int, size: int, path: Path) -> tuple[Index, str]:
    if size < HEADER.size:
        raise TruncatedShardError(f"index {path}", f"{size} bytes, a header has {HEADER.size}")
    head = read_at(descriptor, HEADER.size, 0, path)
    magic, version, code, n_sequences, n_entries = HEADER.unpack(head)
    if magic != MAGIC:
        raise FormatError(f"index {path}", f"magic {magic.hex()}, not {MAGIC.hex()}")
    if version != 1:
        raise FormatError(f"index {path}", f"version {version}; this program reads version 1")
    if code not in CODES:
        known = "4 (int32), 5 (int64), 8 (uint16)"
        raise FormatError(f"index {path}", f"dtype code {code}; this program reads {known}")
    expected = HEADER.size + 12 * n_sequences + 8 * n_entries
    if size != expected:  # before the counts are believed
        raise TruncatedShardError(
            f"index {path}",
            f"{size} bytes, where its header says {n_sequences} sequences and {n_entries} "
            f"document entries: {expected}",
            "copy both files again",
        )
    digest = xxhash.xxh3_128(head)
    n_tokens = _check_sequences(descriptor, path, CODES[code], n_sequences, digest)
    _check_documents(descriptor, path, n_sequences, n_entries, digest)
    return Index(path, CODES[code], n_tokens, n_sequences, n_entries), digest.hexdigest()


def _check_sequences(
    descriptor: int, path: Path, width: int, n_sequences: int, digest: xxhash.xxh3_128
) -> int:
    """Check that sequences lie one behind the other; return how many tokens they have."""
    tokens = 0
    for first in range(0, n_sequences, _CHUNK):
        count = min(_CHUNK, n_sequences - first)
        raw = read_at(descriptor, 4 * count, HEADER.size + 4 * first, path)
        lengths = np.frombuffer(raw, "<i4").astype(np.int64)
        at = HEADER.size + 4 * n_sequences + 8 * first
        raw_pointers = read_at(descriptor, 8 * count, at, path)
        pointers = np.frombuffer(raw_pointers, "<i8")
        if negative := np.flatnonzero(lengths < 0).tolist():
            i = negative[0]
            raise FormatError(f"index {path}", f"sequence {first + i} has {lengths[i]} tokens")
        begins = (tokens + np.cumsum(lengths) - lengths) * width  # < 2^31 * 2^31 * 8 cannot be
        if wrong := np.flatnonzero(pointers != begins).tolist():
            i = wrong[0]
            raise FormatError(
                f"index {path}",
                f"sequence {first + i} begins at byte {pointers[i]}, the ones before it end at "
                f"{begins[i]}",
            )
        tokens += int(lengths.sum())
        digest.update(raw)
        digest.update(raw_pointers)
    return tokens


def _check_documents(
    descriptor: int, path: Path, n_sequences: int, n_entries: int, digest: xxhash.xxh3_128
) -> None:
    before = 0
    for first in range(0, n_entries, _CHUNK):
        count = min(_CHUNK, n_entries - first)
        at = HEADER.size + 12 * n_sequences + 8 * first
        raw = read_at(descriptor, 8 * count, at, path)
        entries = np.frombuffer(raw, "<i8")
        if first == 0 and entries[0] != 0:
            raise FormatError(f"index {path}", f"document 0 begins with sequence {entries[0]}")
        steps = np.diff(entries, prepend=np.int64(before))
        if (steps < 0).any() or entries[-1] > n_sequences or entries.min() < 0:
            raise FormatError(
                f"index {path}",
                f"document entries {first} to {first + count} do not ascend from 0 to "
                f"{n_sequences}",
            )
        before = int(entries[-1])
        digest.update(raw)
    if n_entries == 0 or before != n_sequences:
        found = f"{n_entries} document entries, the last {before}, for {n_sequences} sequences"
        raise FormatError(f"index {path}", found)


@dataclass(frozen=True)
class EndReader:
    """Reads where the documents of an index end."""

    index: Index

    def __call__(self) -> Ends:
        """Token positions, strictly ascending: documents without tokens are left out."""
        index = self.index
        with opened(index.path, "index") as (descriptor, size):
            _check_index(descriptor, size, index.path)  # it may have changed since
            lengths = _read(descriptor, index.path, "<i4", HEADER.size, index.n_sequences)
            entries = _read(descriptor, index.path, "<i8", index.documents_at, index.n_entries)
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        positions: Ends = np.unique(ends[entries]).astype(np.uint64)
        return positions[positions > 0]


def _read(
    descriptor: int, path: Path, dtype: str, offset: int, count: int
) -> NDArray[np.signedinteger]:
    raw = read_at(descriptor, np.dtype(dtype).itemsize * count, offset, path)
    return np.frombuffer(raw, dtype)
