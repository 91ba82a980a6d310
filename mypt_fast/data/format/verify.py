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
from pathlib import Path
from typing import get_args

import numpy as np
import xxhash

from mypt_fast.data.format import native, native_file
from mypt_fast.data.format.dataset import has_split, open_split
from mypt_fast.data.format.files import open_file
from mypt_fast.data.format.metadata import read_metadata, recorded_shards
from mypt_fast.data.format.shard import Shard, Split
from mypt_fast.errors import (
    ChecksumError,
    DataChangedError,
    DataError,
    FormatError,
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
        unhashed: names of shards for which no hash is recorded: ids and structure were checked.
    """

    shards: int = 0
    tokens: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
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
    dataset_dir = Path(dataset_dir)
    splits: tuple[Split, ...] = get_args(Split)
    found = [split for split in splits if has_split(dataset_dir, split)]
    pairs: list[tuple[Shard, str]] = []
    metadata = read_metadata(dataset_dir)
    for split in found or splits[:1]:  # open_split says what is missing
        recorded = recorded_shards(metadata, split) or {}
        pairs += [
            (shard, recorded.get(shard.path.name, {}).get("xxh3_128", ""))
            for shard in open_split(dataset_dir, split, int64=True)
        ]
    return verify_shards(pairs, full, workers)


def verify_shards(
    shards: list[tuple[Shard, str]], full: bool = True, workers: int | None = None
) -> Report:
    """Check opened shards, each with the XXH3-128 of its file where that is recorded."""
    report = Report(len(shards), sum(shard.n_tokens for shard, _ in shards))
    started = time.perf_counter()
    threads = workers or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        try:
            tasks = [pool.submit(_verify_shard, shard, digest, full) for shard, digest in shards]
            report.bytes_read = sum(task.result() for task in tasks)
        finally:
            pool.shutdown(cancel_futures=True)
    report.seconds = time.perf_counter() - started
    report.unhashed = [s.name for s, digest in shards if s.format != "native" and not digest]
    return report


def _verify_shard(shard: Shard, digest: str, full: bool) -> int:
    """Return how many bytes were read."""
    if shard.format == "native":
        return verify_native(shard.path, full)
    if shard.documents is not None:
        shard.document_ends()
    return _verify_flat(shard, digest) if full else 0


def verify_native(path: Path, full: bool = True) -> int:
    """Check one native shard; return how many bytes of payload and planes were read."""
    file = native_file.inspect_native(path)
    _, blocks = native_file.read_tables(file)
    if not full:
        return 0
    header, layout = file.header, file.layout
    payload_bytes = header.n_tokens * header.width
    whole = xxhash.xxh3_128()
    descriptor, _ = open_file(path)
    try:
        for i, part in enumerate(_parts(descriptor, layout.payload, payload_bytes, path)):
            _check_block(file, i, part, int(blocks[i]))
            whole.update(part)
        if whole.digest() != header.payload_hash:
            raise ChecksumError(
                f"shard {path}",
                f"its tokens hash to {whole.hexdigest()}, the header records "
                f"{header.payload_hash.hex()}, though every block is as recorded",
                _CURE,
            )
        done = payload_bytes
        for name, flag, begin, recorded in (
            ("mask", native.FLAG_MASK, layout.mask, header.mask_hash),
            ("segments", native.FLAG_SEGMENTS, layout.segments, header.segments_hash),
        ):
            if header.flags & flag:
                _check_plane(descriptor, name, begin, header.n_tokens, recorded, path)
                done += header.n_tokens
        _check_padding(descriptor, file)
    finally:
        os.close(descriptor)
    return done


def _check_block(file: native_file.NativeFile, i: int, part: memoryview, recorded: int) -> None:
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


def _verify_flat(shard: Shard, digest: str) -> int:
    """Read tokens whose file has no hashes of blocks; `digest` is of the file from its start."""
    whole = xxhash.xxh3_128()
    descriptor, size = open_file(shard.path)
    payload = shard.n_tokens * shard.width
    try:
        if size != shard.offset + payload:
            raise DataChangedError(
                f"shard {shard.path}", f"{size} bytes, not as when it was opened"
            )
        if digest:
            for part in _parts(descriptor, 0, shard.offset, shard.path):
                whole.update(part)
        limit = token_limit(shard)
        for i, part in enumerate(_parts(descriptor, shard.offset, payload, shard.path)):
            if digest:
                whole.update(part)
            check_range(shard, part, i * native.BLOCK_BYTES // shard.width, limit)
    finally:
        os.close(descriptor)
    if digest and whole.hexdigest() != digest:
        raise ChecksumError(
            f"shard {shard.path}",
            f"XXH3-128 {whole.hexdigest()} of its {size} bytes (tokens 0 to {shard.n_tokens - 1}), "
            f"the metadata records {digest:.80}",
            _CURE,
        )
    return payload


def token_limit(shard: Shard) -> int:
    """What every id of a shard is below."""
    if shard.vocab_size:
        return shard.vocab_size
    if shard.format == "megatron" and shard.width == 4:
        return 1 << 31  # its int32 are not negative
    return 1 << min(32, 8 * shard.width)


def check_range(shard: Shard, part: memoryview, first: int, limit: int) -> None:
    """Refuse ids that are not below `limit`, naming the first one's position.

    Raises:
        TokenRangeError: with the position in the shard.
    """
    tokens = np.frombuffer(part, f"<u{shard.width}")
    if len(tokens) and int(tokens.max()) >= limit:
        i = int(np.flatnonzero(tokens >= limit)[0])
        signed = shard.format == "megatron" and shard.width > 2
        value = tokens.view(f"<i{shard.width}")[i] if signed else tokens[i]
        raise TokenRangeError(
            f"shard {shard.path}",
            f"token {value} at position {first + i} is not in [0, {limit})",
            "prepare the dataset again with the tokenizer that its vocabulary is of",
        )


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
