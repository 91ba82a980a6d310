"""Read every byte of a dataset and compare it with what was recorded when it was written.

A native shard is compared block by block, so that an error names a mebibyte and its tokens; a
file whose metadata records an XXH3-128 as a whole. Hashing leaves the interpreter's lock alone,
so that files are read by several threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np
import xxhash

from mypt_fast.data.format import native, native_file
from mypt_fast.data.format.files import open_file
from mypt_fast.data.format.shard import Plane, Shard
from mypt_fast.data.format.source import Source, open_source, token_dtype
from mypt_fast.data.format.tokenizer_file import check_tokenizer, read_tokenizer
from mypt_fast.errors import (
    ChecksumError,
    DataChangedError,
    DataError,
    FormatError,
    IntegrityError,
    TokenRangeError,
)

_CURE = "copy the file again, or prepare the dataset again"


@dataclass
class Report:
    """What `verify_dataset` did.

    Attributes:
        shards: files of tokens whose structure was checked.
        tokens: how many they hold.
        bytes_read: of payload and planes.
        seconds: that took.
        max_token: the largest id that was read.
        unhashed: names of shards for which no hash is recorded: ids and structure were checked.
    """

    shards: int = 0
    tokens: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    max_token: int = 0
    unhashed: list[str] = field(default_factory=list)


def verify_dataset(dataset_dir: Path, full: bool = True, workers: int | None = None) -> Report:
    """Check a dataset; what is wrong first, in reading order, is raised.

    Args:
        dataset_dir: the folder.
        full: also read tokens and planes; else headers, indexes and sizes alone.
        workers: threads; default one per processor, at most 8.

    Raises:
        DataError: nothing is there, or it cannot be read.
        IntegrityError: something is not as it was written.
        TokenRangeError: a token is not below the recorded vocab_size.
    """
    return verify_source(open_source(Path(dataset_dir)), full, workers)


def verify_source(source: Source, full: bool = True, workers: int | None = None) -> Report:
    """`verify_dataset` of what was opened already."""
    shards, digests = source.shards, source.recorded_digests()
    if source.path.is_dir():
        check_tokenizer(shards, read_tokenizer(source.path), source.path)
    report = Report(len(shards), sum(shard.n_tokens for shard in shards))
    report.unhashed = [
        shard.name
        for shard, digest in zip(shards, digests, strict=True)
        if shard.format != "native" and not digest
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        try:
            for done, largest in pool.map(verify_shard, shards, digests, repeat(full)):
                report.bytes_read += done
                report.max_token = max(report.max_token, largest)
        finally:
            pool.shutdown(cancel_futures=True)
    report.seconds = time.perf_counter() - started
    return report


def damaged_shards(
    source: Source, workers: int | None = None
) -> list[tuple[Shard, IntegrityError | TokenRangeError]]:
    """Read every byte; return the shards that are not what was written, and what is wrong."""

    def problem(shard: Shard, digest: str) -> IntegrityError | TokenRangeError | None:
        try:
            verify_shard(shard, digest)
        except (IntegrityError, TokenRangeError) as error:
            return error
        return None

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(problem, source.shards, source.recorded_digests()))
    return [(s, p) for s, p in zip(source.shards, problems, strict=True) if p is not None]


def verify_shard(shard: Shard, digest: str = "", full: bool = True) -> tuple[int, int]:
    """Check one shard; return how many bytes were read, and the largest id among them."""
    if shard.format == "native":
        return verify_native(shard.path, full)
    if shard.documents is not None:
        shard.document_ends()
    if not full:
        return 0, 0
    done, largest = _verify_flat(shard, digest)
    return done + sum(_check_values(shard, plane) for plane in shard.planes), largest


def verify_native(path: Path, full: bool = True) -> tuple[int, int]:
    """Check one native shard; return how many bytes were read, and the largest id among them."""
    file = native_file.inspect_native(path)
    _, blocks = native_file.read_tables(file)
    if not full:
        return 0, 0
    header, layout = file.header, file.layout
    done, largest = header.n_tokens * header.width, 0
    whole = xxhash.xxh3_128()
    descriptor, _ = open_file(path)
    try:
        for i, part in enumerate(_parts(descriptor, layout.payload, done, path)):
            largest = max(largest, _check_block(file, i, part, int(blocks[i])))
            whole.update(part)
        if whole.digest() != header.payload_hash:
            raise ChecksumError(
                f"shard {path}",
                f"its tokens hash to {whole.hexdigest()}, the header records "
                f"{header.payload_hash.hex()}, though every block is as recorded",
                _CURE,
            )
        for name, begin, recorded in (
            ("mask", layout.mask, header.mask_hash),
            ("segments", layout.segments, header.segments_hash),
        ):
            if begin:
                _check_plane(descriptor, name, begin, header.n_tokens, recorded, path)
                done += header.n_tokens
        _check_padding(descriptor, file)
    finally:
        os.close(descriptor)
    return done, largest


def _check_block(file: native_file.NativeFile, i: int, part: memoryview, recorded: int) -> int:
    header = file.header
    first = i * native.BLOCK_BYTES // header.width
    found = xxhash.xxh3_64_intdigest(part)
    if found != recorded:
        raise ChecksumError(
            f"shard {file.path}",
            f"block {i} (1 MiB; tokens {first} to {first + len(part) // header.width - 1}) hashes "
            f"to {found:#018x}, {recorded:#018x} is recorded",
            _CURE,
        )
    largest = int(np.frombuffer(part, f"<u{header.width}").max())
    if largest > header.max_token:
        raise FormatError(
            f"shard {file.path}",
            f"block {i} holds token {largest}, where the header says {header.max_token} at most",
            _CURE,
        )
    return largest


def _check_plane(
    descriptor: int, name: str, begin: int, size: int, recorded: bytes, path: Path
) -> None:
    digest, largest = xxhash.xxh3_64(), 0
    for part in _parts(descriptor, begin, size, path):
        digest.update(part)
        if name == "mask":
            largest = max(largest, int(np.frombuffer(part, "u1").max()))
    if digest.digest() != recorded:
        raise ChecksumError(
            f"{name} of shard {path}",
            f"bytes {begin} to {begin + size} hash to {digest.hexdigest()}, the header records "
            f"{recorded.hex()}",
            _CURE,
        )
    if largest > 1:
        raise FormatError(f"mask of shard {path}", f"holds {largest}, neither 0 nor 1", _CURE)


def _check_padding(descriptor: int, file: native_file.NativeFile) -> None:
    """Refuse bytes other than zero between the parts, which belong to none of them."""
    header, layout = file.header, file.layout
    ends = [layout.payload + header.n_tokens * header.width]
    ends += [at + header.n_tokens for at in (layout.mask, layout.segments) if at]
    for end in ends:
        for gap in _parts(descriptor, end, -end % 8, file.path):
            if any(gap):
                raise FormatError(
                    f"shard {file.path}", f"bytes {end} to {end + len(gap)} are not zero", _CURE
                )


def _verify_flat(shard: Shard, digest: str) -> tuple[int, int]:
    """Read tokens whose file has no hashes of blocks; `digest` is of the file from its start."""
    whole, largest = xxhash.xxh3_128(), 0
    descriptor, size = open_file(shard.path)
    payload = shard.n_tokens * shard.width
    try:
        if size != shard.offset + payload:
            raise DataChangedError(
                f"shard {shard.path}", f"{size} bytes; it was opened with others"
            )
        if digest:
            for part in _parts(descriptor, 0, shard.offset, shard.path):
                whole.update(part)
        for i, part in enumerate(_parts(descriptor, shard.offset, payload, shard.path)):
            if digest:
                whole.update(part)
            first = i * native.BLOCK_BYTES // shard.width
            largest = max(largest, _check_range(shard, part, first))
    finally:
        os.close(descriptor)
    if digest and whole.hexdigest() != digest:
        raise ChecksumError(
            f"shard {shard.path}",
            f"XXH3-128 {whole.hexdigest()} of its {size} bytes (tokens 0 to {shard.n_tokens - 1}), "
            f"the metadata records {digest:.80}",
            _CURE,
        )
    return payload, largest


def _check_range(shard: Shard, part: memoryview, first: int) -> int:
    """Refuse ids outside of the vocabulary; return the largest of them."""
    limit = shard.vocab_size or 1 << min(32, 8 * shard.width)
    tokens = np.frombuffer(part, token_dtype(shard))
    largest = int(tokens.max())
    if largest >= limit or (tokens.dtype.kind == "i" and int(tokens.min()) < 0):
        i = int(np.flatnonzero((tokens < 0) | (tokens >= limit))[0])
        raise TokenRangeError(
            f"shard {shard.path}",
            f"token {tokens[i]} at position {first + i} is not in [0, {limit})",
            "prepare the dataset again with the tokenizer that its vocabulary is of",
        )
    return largest


def _check_values(shard: Shard, plane: Plane) -> int:
    """Refuse masks that are neither 0 nor 1 and weights that are no weights; return bytes read."""
    size = plane.dtype.itemsize
    descriptor, _ = open_file(plane.path, plane.kind)
    try:
        parts = _parts(descriptor, plane.offset, shard.n_tokens * size, plane.path)
        for i, part in enumerate(parts):
            values = np.frombuffer(part, plane.dtype)
            if plane.kind == "mask":
                wrong = values > 1
            elif plane.kind == "weights":
                wrong = ~(np.isfinite(values) & (values >= 0))
            else:
                continue  # every byte is a segment
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                raise FormatError(
                    f"{plane.kind} {plane.path}",
                    f"{values[at]} at position {i * native.BLOCK_BYTES // size + at}",
                    "a mask is 0 or 1, a weight is finite and not negative",
                )
    finally:
        os.close(descriptor)
    return shard.n_tokens * size


def _parts(descriptor: int, begin: int, size: int, path: Path) -> Iterator[memoryview]:
    """Yield [begin, begin + size) of a file by blocks, each valid until the next is asked for."""
    buffer = memoryview(bytearray(min(size, native.BLOCK_BYTES)))
    for at in range(begin, begin + size, native.BLOCK_BYTES):
        part = buffer[: min(native.BLOCK_BYTES, begin + size - at)]
        filled = 0
        while filled < len(part):
            try:
                got = os.preadv(descriptor, [part[filled:]], at + filled)
            except OSError as error:
                raise DataError(f"shard {path}", f"cannot be read: {error.strerror}") from error
            if not got:
                raise DataChangedError(
                    f"shard {path}", f"ends at byte {at + filled}, earlier than when it was opened"
                )
            filled += got
        yield part
