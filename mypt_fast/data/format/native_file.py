"""Open native shards: header, index and length are checked without reading tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from mypt_fast.data.format import native
from mypt_fast.data.format.files import FileEnds, opened, read_at, sampled_digest
from mypt_fast.data.format.shard import Documents, Ends, Plane, Shard
from mypt_fast.errors import ChecksumError, DataChangedError, FormatError, TruncatedShardError

# Tables of a whole split that are hashed when it is opened: 0.1 s from the page cache. What is
# above it is checked when it is first used.
TABLES_AT_OPEN = 256 << 20
# Shards of a split up to which each is sampled for the fingerprint: 16,384 small reads. Of more
# the header alone, which covers the hash of the tokens, identifies a shard.
SAMPLED_SHARDS = 256
TAIL_BYTES = 4096  # read at a file's end with its header: the tables of most shards
CURE = "copy the file again, or prepare the dataset again"

Read = Callable[[int, int], bytes]  # so many bytes from an offset


class NativeFile(NamedTuple):
    """A native shard whose header and length were checked.

    Attributes:
        header: what it says of itself.
        layout: where its parts are.
        tables_hash: what its footer records for documents and blocks.
    """

    path: Path
    header: native.Header
    layout: native.Layout
    tables_hash: int


def open_native(
    path: Path,
    label: str = "",
    most: int = TABLES_AT_OPEN,
    payload_hash: str = "",
    is_sampled: bool = True,
    ends: FileEnds | None = None,
) -> tuple[Shard, int]:
    """Open one shard; return it, and the bytes of tables that were checked.

    Args:
        path: the file.
        label: its name in the dataset, see `Shard`.
        most: bytes of tables that are hashed now; longer ones when they are first used.
        payload_hash: what the metadata records of its tokens, XXH3-128 in hex, if anything.
        is_sampled: whether samples of the file are part of its digest.
        ends: of the file, where they were read already.

    Raises:
        DataError: it is missing or cannot be read.
        FormatError: header or footer are not this format's.
        TruncatedShardError: it is shorter or longer than its header says.
        ChecksumError: the document index or the block table differ from their hash, or the tokens
            are others than the metadata records.
    """
    if ends is not None and not is_sampled:
        file, digest = _inspect(_EndsReader(path, ends), ends.size, path, most)
        identity = ends.identity
    else:
        with opened(path) as (descriptor, size):
            info = os.fstat(descriptor)
            identity = info.st_dev, info.st_ino, info.st_mtime_ns
            file, digest = _inspect(_reader(descriptor, path), size, path, most)
            if is_sampled:
                digest += "+" + sampled_digest(descriptor, size, path)
    header, layout = file.header, file.layout
    if payload_hash and payload_hash != header.payload_hash.hex():
        raise ChecksumError(
            f"shard {path}",
            f"its header records tokens that hash to {header.payload_hash.hex()}, the metadata "
            f"{payload_hash:.80}",
            "it is another dataset's file: " + CURE,
        )
    documents = None
    if header.n_docs:
        read = DocumentReader(file)
        documents = Documents(path, layout.documents, header.n_docs, read)
    planes: tuple[Plane, ...] = ()
    if header.flags & native.FLAG_MASK:
        planes += (Plane("mask", path, layout.mask),)
    if header.flags & native.FLAG_SEGMENTS:
        planes += (Plane("segments", path, layout.segments),)
    shard = Shard(
        path, header.width, header.n_tokens, layout.payload, digest, "native", label,
        header.vocab_size, header.eot_id, header.max_token, documents, planes, "", header.tokenizer,
        layout.file_size - layout.payload - header.n_tokens * header.width,
        identity=identity,
    )  # fmt: skip
    tables = layout.footer - layout.documents
    return shard, tables if tables <= most else 0


def inspect_native(path: Path) -> NativeFile:
    """Check header, footer and, up to TABLES_AT_OPEN, tables of one file; as `open_native`."""
    with opened(path) as (descriptor, size):
        return _inspect(_reader(descriptor, path), size, path, TABLES_AT_OPEN)[0]


def _reader(descriptor: int, path: Path) -> Read:
    return lambda size, offset: read_at(descriptor, size, offset, path)


class _EndsReader:
    """Reads from a file's ends, and from the file what is not in them."""

    def __init__(self, path: Path, ends: FileEnds) -> None:
        self._path, self._ends = path, ends

    def __call__(self, size: int, offset: int) -> bytes:
        ends = self._ends
        if offset + size <= len(ends.head):
            return ends.head[offset : offset + size]
        in_tail = offset - (ends.size - len(ends.tail))
        if in_tail >= 0:
            return ends.tail[in_tail : in_tail + size]
        with opened(self._path) as (descriptor, now):
            info = os.fstat(descriptor)
            if (now, (info.st_dev, info.st_ino, info.st_mtime_ns)) != (ends.size, ends.identity):
                raise DataChangedError(
                    f"shard {self._path}",
                    "is another file than a moment ago",
                    "another program is writing it: wait for that, and start again",
                )
            return read_at(descriptor, size, offset, self._path)


def _inspect(read: Read, size: int, path: Path, most: int) -> tuple[NativeFile, str]:
    if size < native.HEADER_BYTES + native.FOOTER_BYTES:
        least = native.HEADER_BYTES + native.FOOTER_BYTES
        raise TruncatedShardError(
            f"shard {path}", f"{size} bytes, where a native shard has at least {least}", CURE
        )
    data = read(native.HEADER_BYTES, 0)
    try:
        header = native.unpack_header(data)
    except ValueError as error:
        raise FormatError(f"shard {path}", str(error), CURE) from error
    layout = native.layout(header)
    if size != layout.file_size:  # before any count of the header is believed
        raise TruncatedShardError(
            f"shard {path}",
            f"{size} bytes, where its header says {layout.file_size} "
            f"({header.n_tokens} tokens of {header.width} bytes, {header.n_docs} documents)",
            CURE,
        )
    _check_claims(header, path)
    is_checked = layout.footer - layout.documents <= most
    begin = layout.documents if is_checked else layout.footer
    tail = memoryview(read(size - begin, begin))
    try:
        recorded_size, tables_hash = native.unpack_footer(bytes(tail[-native.FOOTER_BYTES :]))
    except ValueError as error:
        raise FormatError(f"shard {path}", str(error), CURE) from error
    if recorded_size != size:
        raise TruncatedShardError(
            f"shard {path}", f"{size} bytes, where its footer says {recorded_size}", CURE
        )
    file = NativeFile(path, header, layout, tables_hash)
    if is_checked:
        check_tables_hash(file, tail[: -native.FOOTER_BYTES])
    # The header's own hash covers the payload's; together with the tables' it is the file's.
    return file, f"{data[-8:].hex()}{tables_hash:016x}"


def _check_claims(header: native.Header, path: Path) -> None:
    if header.n_docs > header.n_tokens:
        found = f"{header.n_docs} documents in {header.n_tokens} tokens"
    elif header.vocab_size and header.max_token >= header.vocab_size and header.n_tokens:
        found = f"largest token {header.max_token}, not below its vocab_size {header.vocab_size}"
    elif header.max_token >= 1 << 8 * header.width:
        found = f"largest token {header.max_token} in {header.width} bytes a token"
    else:
        return
    raise FormatError(f"shard {path}", found, CURE)


def check_tables_hash(file: NativeFile, tables: bytes | memoryview) -> None:
    """Compare documents and blocks with the hash that the footer records."""
    found = xxhash.xxh3_64_intdigest(tables)
    if found != file.tables_hash:
        raise ChecksumError(
            f"shard {file.path}",
            f"document index and block table hash to {found:#018x}, the footer records "
            f"{file.tables_hash:#018x} (bytes {file.layout.documents} to {file.layout.footer})",
            CURE,
        )


def read_tables(file: NativeFile) -> tuple[Ends, Ends]:
    """Read document ends and block hashes, both uint64, checked.

    Raises:
        ChecksumError: they differ from the recorded hash.
        FormatError: the ends do not ascend to n_tokens.
    """
    with opened(file.path) as (descriptor, size):
        if size != file.layout.file_size:
            raise TruncatedShardError(
                f"shard {file.path}", f"{size} bytes, where its header says {file.layout.file_size}"
            )
        begin = file.layout.documents
        tables = read_at(descriptor, file.layout.footer - begin, begin, file.path)
    check_tables_hash(file, tables)
    ends, blocks = np.split(np.frombuffer(tables, "<u8"), [file.header.n_docs])
    check_ends(ends, file.header.n_tokens, file.path)
    return ends, blocks


def check_ends(ends: Ends, n_tokens: int, path: Path) -> None:
    """Refuse document ends that do not ascend strictly from above 0 to n_tokens."""
    if not len(ends):
        return
    wrong = np.flatnonzero(ends[1:] <= ends[:-1])
    if len(wrong):
        i = int(wrong[0]) + 1
        found = f"document {i} ends at token {ends[i]}, the one before it at {ends[i - 1]}"
    elif ends[0] == 0:
        found = "document 0 is empty"
    elif ends[-1] != n_tokens:
        found = f"the last document ends at token {ends[-1]} of {n_tokens}"
    else:
        return
    raise FormatError(f"document index of {path}", found, CURE)


@dataclass(frozen=True, slots=True)
class DocumentReader:
    """Reads the document ends of one native shard."""

    file: NativeFile

    def __call__(self) -> Ends:
        """Read and check them."""
        return read_tables(self.file)[0]
