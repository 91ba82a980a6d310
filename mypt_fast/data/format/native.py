"""The native shard format, MYPTSHD1: what is in a file, and how a header is packed and checked.

All numbers are little-endian. Every part begins at a multiple of 8 bytes, padded with zeros.

    header     4096 bytes, see `Header`; its last 8 are the XXH3-64 of the others
    payload    n_tokens of uint16 or uint32
    mask       n_tokens of uint8, if FLAG_MASK: 1 where a token counts in the loss
    segments   n_tokens of uint8, if FLAG_SEGMENTS: 0 padding, 1 to 255 a document of a packed row
    documents  n_docs of uint64: where each document ends, ascending; the last is n_tokens
    blocks     a uint64 a block of BLOCK_BYTES of the payload: its XXH3-64
    footer     24 bytes: b"MYPTEND1", the size of the file, the XXH3-64 of documents and blocks

So a header, an index and a truncation are checked when a file is opened, without reading tokens;
the payload by its blocks, when it is asked for.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

MAGIC = b"MYPTSHD1"
FOOTER_MAGIC = b"MYPTEND1"
VERSION = 1
HEADER_BYTES = 4096
FOOTER_BYTES = 24
BLOCK_BYTES = 1 << 20
FLAG_MASK, FLAG_SEGMENTS = 1, 2

_ENDIAN_TAG = 0x01020304
VERSION_AND_ENDIAN = struct.pack("<II", VERSION, _ENDIAN_TAG)  # what follows the magic
_FIELDS = struct.Struct("<8sIIIIQQQqQ32s16s8s8s")
_FOOTER = struct.Struct("<8sQQ")
_MAX_COUNT = 1 << 62


class Header(NamedTuple):
    """What a shard says of itself.

    Attributes:
        width: bytes a token, 2 or 4.
        n_tokens: tokens of the payload.
        n_docs: documents that the index lists; 0 where boundaries are not known.
        flags: FLAG_MASK and FLAG_SEGMENTS.
        vocab_size: ids are below it; 0 where unknown.
        eot_id: the token that ends a document, or -1.
        max_token: the largest id of the payload, at least.
        tokenizer: SHA-256 of the tokenizer's state, or zeros.
        payload_hash: XXH3-128 of the payload; all three hashes as `digest()` gives them.
        mask_hash: XXH3-64 of the mask plane, or zeros.
        segments_hash: XXH3-64 of the segment plane, or zeros.
    """

    width: int
    n_tokens: int
    n_docs: int = 0
    flags: int = 0
    vocab_size: int = 0
    eot_id: int = -1
    max_token: int = 0
    tokenizer: bytes = bytes(32)
    payload_hash: bytes = bytes(16)
    mask_hash: bytes = bytes(8)
    segments_hash: bytes = bytes(8)


class Layout(NamedTuple):
    """Where the parts of a file begin, in bytes; planes that are not there have offset 0."""

    payload: int
    mask: int
    segments: int
    documents: int
    blocks: int
    footer: int
    file_size: int


def layout(header: Header) -> Layout:
    """Compute where the parts lie: all of it follows from the counts."""
    at = HEADER_BYTES
    payload, at = at, _up(at + header.n_tokens * header.width)
    mask = segments = 0
    if header.flags & FLAG_MASK:
        mask, at = at, _up(at + header.n_tokens)
    if header.flags & FLAG_SEGMENTS:
        segments, at = at, _up(at + header.n_tokens)
    documents, at = at, at + 8 * header.n_docs
    blocks, at = at, at + 8 * n_blocks(header)
    return Layout(payload, mask, segments, documents, blocks, at, at + FOOTER_BYTES)


def n_blocks(header: Header) -> int:
    """Blocks of the payload, the last one perhaps shorter."""
    return -(-header.n_tokens * header.width // BLOCK_BYTES)


def _up(offset: int) -> int:
    return -(-offset // 8) * 8


class BlockHashes:
    """The block table of a payload that is written in parts."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._block = xxhash.xxh3_64()
        self._size = 0

    def update(self, data: memoryview) -> None:
        """Add what comes next of the payload, as bytes."""
        while len(data):
            part = data[: BLOCK_BYTES - self._size]
            self._block.update(part)
            self._size += len(part)
            data = data[len(part) :]
            if self._size == BLOCK_BYTES:
                self._end()

    def _end(self) -> None:
        self._done.append(self._block.intdigest())
        self._block.reset()
        self._size = 0

    def finish(self) -> bytes:
        """Return the table; the last block may be shorter than the others."""
        if self._size:
            self._end()
        return struct.pack(f"<{len(self._done)}Q", *self._done)


def pack_header(header: Header) -> bytes:
    """The first HEADER_BYTES of a file."""
    fields = _FIELDS.pack(
        MAGIC, VERSION, _ENDIAN_TAG, header.width, header.flags, header.n_tokens, header.n_docs,
        header.vocab_size, header.eot_id, header.max_token, header.tokenizer, header.payload_hash,
        header.mask_hash, header.segments_hash,
    )  # fmt: skip
    body = fields.ljust(HEADER_BYTES - 8, b"\0")
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def pack_footer(file_size: int, tables: bytes | memoryview) -> bytes:
    """The last FOOTER_BYTES of a file; `tables` is documents and blocks."""
    return pack_footer_of(file_size, xxhash.xxh3_64_intdigest(tables))


def pack_footer_of(file_size: int, tables_hash: int) -> bytes:
    """`pack_footer` where the XXH3-64 of the tables is known."""
    return _FOOTER.pack(FOOTER_MAGIC, file_size, tables_hash)


def unpack_header(data: bytes) -> Header:
    """Check and read the first HEADER_BYTES of a file.

    Raises:
        ValueError: saying what is wrong, for the caller to name the file.
    """
    if len(data) != HEADER_BYTES:
        raise ValueError(f"{len(data)} bytes, where a header has {HEADER_BYTES}")
    (
        magic, version, endian, width, flags, n_tokens, n_docs, vocab_size, eot_id, max_token,
        tokenizer, payload_hash, mask_hash, segments_hash,
    ) = _FIELDS.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise ValueError(f"magic {magic.hex()}, not {MAGIC.hex()} ({MAGIC.decode()})")
    if endian != _ENDIAN_TAG:
        raise ValueError(f"endian tag {endian:#x}, not {_ENDIAN_TAG:#x}")
    if version != VERSION:
        raise ValueError(f"version {version}; this program reads version {VERSION}")
    body = data[:-8]
    recorded, found = int.from_bytes(data[-8:], "little"), xxhash.xxh3_64_intdigest(body)
    if recorded != found:
        raise ValueError(f"the header's hash is {found:#018x}, it records {recorded:#018x}")
    if width not in (2, 4) or flags & ~(FLAG_MASK | FLAG_SEGMENTS):
        raise ValueError(f"width {width} and flags {flags:#x}")
    if max(n_tokens, n_docs, vocab_size) > _MAX_COUNT or max_token >= 1 << 32:
        raise ValueError(f"counts out of range: {n_tokens} tokens, {n_docs} documents")
    if not -1 <= eot_id < 1 << 32:
        raise ValueError(f"eot_id {eot_id}")
    return Header(
        width, n_tokens, n_docs, flags, vocab_size, eot_id, max_token, tokenizer, payload_hash,
        mask_hash, segments_hash,
    )  # fmt: skip


def unpack_footer(data: bytes) -> tuple[int, int]:
    """The file size and the hash of the tables that a footer records.

    Raises:
        ValueError: as `unpack_header`.
    """
    magic, file_size, tables = _FOOTER.unpack(data)
    if magic != FOOTER_MAGIC:
        raise ValueError(f"footer magic {magic.hex()}, not {FOOTER_MAGIC.hex()}")
    return file_size, tables
