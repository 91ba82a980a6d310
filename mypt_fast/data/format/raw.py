"""Flat files of tokens: MyPT's and nanoGPT's without a header, llm.c's with one.

MyPT, nanoGPT   nothing but tokens; the dtype is declared, never guessed
llm.c           256 int32: magic, version, tokens, then zeros; 20240520 version 1 holds uint16,
                20240801 version 7 uint32
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mypt_fast.data.format import native
from mypt_fast.data.format.files import open_file, opened, read_at, sampled_digest
from mypt_fast.data.format.metadata import METADATA, PREPARE
from mypt_fast.data.format.shard import Shard
from mypt_fast.errors import FormatError, IntegrityError, TruncatedShardError

LLMC_HEADER_BYTES = 1024
LLMC_KINDS = {(20240520, 1): 2, (20240801, 7): 4}  # magic, version: bytes a token
LLMC_MAGICS = {magic for magic, _ in LLMC_KINDS}
_LLMC_FIELDS = struct.Struct("<iii")

# Where the dtype of tokens without a header is declared: for a dataset, and for a file by itself.
IN_METADATA = f'set "dtype": "{{}}" in {METADATA}'
IN_FLAG = "say --input_dtype {}"

_SAMPLE_BYTES = 64 << 10
_MIN_SAMPLE_WORDS = 32  # below this a pattern of zeros proves nothing


def open_stream(
    path: Path,
    width: int,
    *,
    format: str = "mypt",
    label: str = "",
    vocab_size: int = 0,
    recorded: dict[str, Any] | None = None,
    explicit: bool = False,
    cure: str = IN_METADATA,
) -> Shard:
    """Open a file that is nothing but tokens.

    Args:
        path: the file.
        width: bytes a token, as somebody declared.
        format: "mypt" or "nanogpt".
        label: its name in the dataset.
        vocab_size: as the metadata says, or 0.
        recorded: what the metadata says of this file, if anything.
        explicit: whether the format was named, rather than concluded from the folder's layout.
        cure: where its dtype can be declared.

    Raises:
        DataError: it cannot be read.
        IntegrityError: its size is not what it should be, or it is another format's file.
    """
    descriptor, size = open_file(path)
    try:
        if size % width:
            raise TruncatedShardError(
                f"shard {path}",
                f"{size} bytes is not a multiple of {width} (uint{8 * width})",
                f"the file was cut short or has another dtype: {PREPARE}, or "
                + cure.format("uint16" if width == 4 else "uint32"),
            )
        _refuse_foreign(descriptor, size, path, explicit)
        # What is recorded was true when it was written; the samples are of what lies here now.
        hashes = ((recorded or {}).get("xxh3_128"), sampled_digest(descriptor, size, path))
        digest = "+".join(filter(None, hashes))
    finally:
        os.close(descriptor)
    n_tokens = size // width
    if recorded is not None and n_tokens != recorded["tokens"]:
        raise TruncatedShardError(
            f"shard {path}",
            f"{size} bytes, where {METADATA} says {recorded['tokens']} tokens of {width} "
            f"bytes = {recorded['tokens'] * width}",
            f"copy the file again or {PREPARE}",
        )
    return Shard(
        path, width, n_tokens, digest=digest, format=format, label=label, vocab_size=vocab_size
    )


def _refuse_foreign(descriptor: int, size: int, path: Path, explicit: bool) -> None:
    """Refuse a file with a header that would be read as tokens, even where a bit of it flipped."""
    head = read_at(descriptor, min(size, LLMC_HEADER_BYTES), 0, path)
    begin = max(0, size - native.FOOTER_BYTES)
    tail = read_at(descriptor, size - begin, begin, path)
    begun = native.MAGIC.startswith(head[:8]) and size > 0  # also where it was cut within it
    if begun or head[8:16] == native.VERSION_AND_ENDIAN or tail.startswith(native.FOOTER_MAGIC):
        found = f"begins with {head[:8].hex()} and ends like a native shard"
    elif _is_llmc(head, size) or (not explicit and _llmc_magic(head) in LLMC_MAGICS):
        found = "begins with a header of llm.c"
    else:
        return
    raise FormatError(
        f"shard {path}",
        f"{found}, in a folder of files without headers",
        f'keep formats apart, or set "format" in {METADATA}',
    )


def open_llmc(path: Path, label: str = "") -> Shard:
    """Open one of llm.c's files.

    Raises:
        DataError: it cannot be read.
        FormatError: the header is not llm.c's.
        TruncatedShardError: the size is not the header's.
    """
    with opened(path) as (descriptor, size):
        if size < LLMC_HEADER_BYTES:
            raise TruncatedShardError(
                f"shard {path}", f"{size} bytes, where llm.c's header has {LLMC_HEADER_BYTES}"
            )
        head = read_at(descriptor, LLMC_HEADER_BYTES, 0, path)
        width, n_tokens = _llmc_fields(head, path)
        expected = LLMC_HEADER_BYTES + n_tokens * width
        if size != expected:
            raise TruncatedShardError(
                f"shard {path}",
                f"{size} bytes, where its header says {n_tokens} tokens of {width} bytes: "
                f"{expected}",
                "copy the file again",
            )
        digest = sampled_digest(descriptor, size, path)
    return Shard(path, width, n_tokens, LLMC_HEADER_BYTES, digest, "llmc", label)


def pack_llmc_header(n_tokens: int, width: int) -> bytes:
    """The header of a file of `n_tokens` tokens, at most 2^31 - 1."""
    magic, version = next(kind for kind, w in LLMC_KINDS.items() if w == width)
    return _LLMC_FIELDS.pack(magic, version, n_tokens).ljust(LLMC_HEADER_BYTES, b"\0")


def _llmc_fields(head: bytes, path: Path) -> tuple[int, int]:
    magic, version, n_tokens = _LLMC_FIELDS.unpack_from(head)
    width = LLMC_KINDS.get((magic, version))
    if width is None:
        known = ", ".join(f"{m} version {v}" for m, v in LLMC_KINDS)
        raise FormatError(
            f"shard {path}",
            f"magic {magic} ({head[:4].hex()}) version {version}; llm.c has {known}",
        )
    if n_tokens < 0 or any(head[_LLMC_FIELDS.size :]):
        found = f"{n_tokens} tokens" if n_tokens < 0 else "not zero after the third number"
        raise FormatError(f"header of {path}", found, "copy the file again")
    return width, n_tokens


def _llmc_magic(head: bytes) -> int:
    return int.from_bytes(head[:4], "little")


def _is_llmc(head: bytes, size: int) -> bool:
    """Whether all of a header but its magic is llm.c's: for a file whose magic was damaged."""
    if len(head) < LLMC_HEADER_BYTES or any(head[_LLMC_FIELDS.size :]):
        return False
    _, version, n_tokens = _LLMC_FIELDS.unpack_from(head)
    widths = [width for (_, v), width in LLMC_KINDS.items() if v == version]
    return n_tokens > 0 and any(size == LLMC_HEADER_BYTES + n_tokens * w for w in widths)


def check_width(shard: Shard, vocab_size: int | None, cure: str = IN_METADATA) -> None:
    """Refuse a shard whose first tokens say that it was written with the other width.

    uint32 read as uint16 is silent otherwise: every second token is 0. uint16 read as uint32 gives
    two tokens glued together, far above any vocabulary.
    """
    with opened(shard.path) as (descriptor, _):
        count = min(_SAMPLE_BYTES, shard.n_tokens * shard.width)
        raw = read_at(descriptor, count, shard.offset, shard.path)
    words = np.frombuffer(raw, dtype=f"<u{shard.width}")
    if len(words) < _MIN_SAMPLE_WORDS:
        return
    if shard.width == 2:
        looks_wrong = not words[1::2].any() and bool(words[::2].any())
    else:
        limit = max(vocab_size, 1 << 16) if vocab_size else 1 << 20
        looks_wrong = bool((words >= limit).mean() > 0.5)
    if looks_wrong:
        declared, likely = (f"uint{8 * width}" for width in (shard.width, 6 - shard.width))
        raise IntegrityError(
            f"shard {shard.path}",
            f"declared {declared}, but its tokens look like {likely}",
            f"{cure.format(likely)}, or {PREPARE}",
        )
