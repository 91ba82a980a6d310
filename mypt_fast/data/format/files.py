"""Reads of files that somebody else wrote: regular files only, and never a byte too few."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mypt_fast.errors import DataChangedError, DataError

SAMPLE_BYTES = 4096
_SAMPLES = 64
_FILES_AT_ONCE = 512
# Without O_NONBLOCK the opening of a named pipe waits for a writer that may never come.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def open_file(path: str | Path, what: str = "shard") -> tuple[int, int]:
    """Open a regular file; return its descriptor, which the caller closes, and its size in bytes.

    Raises:
        DataError: it is missing, cannot be read or is no regular file.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        raise DataError(f"{what} {path}", f"cannot be read: {error.strerror}") from error
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise DataError(f"{what} {path}", "not a regular file")
    return descriptor, info.st_size


@contextlib.contextmanager
def opened(path: str | Path, what: str = "shard") -> Iterator[tuple[int, int]]:
    """`open_file`, closed at the end of the block."""
    descriptor, size = open_file(path, what)
    try:
        yield descriptor, size
    finally:
        os.close(descriptor)


def read_at(descriptor: int, size: int, offset: int, path: str | Path) -> bytes:
    """Read exactly `size` bytes at `offset`; the caller knows that the file has them.

    Raises:
        DataError: the system reports an error.
        DataChangedError: the file has become shorter since it was opened.
    """
    parts: list[bytes] = []
    left = size
    while left:
        try:
            part = os.pread(descriptor, left, offset)
        except OSError as error:
            raise DataError(f"shard {path}", f"cannot be read: {error.strerror}") from error
        if len(part) == size:  # as almost always
            return part
        if not part:
            raise DataChangedError(
                f"shard {path}",
                f"ends at byte {offset}, {left} bytes before it did when it was opened",
                "another program is writing it: wait for that, and start again",
            )
        parts.append(part)
        left, offset = left - len(part), offset + len(part)
    return b"".join(parts)


class FileEnds(NamedTuple):
    """A file's size in bytes, which file it is (see `Shard.identity`), and both its ends."""

    size: int
    identity: tuple[int, int, int]
    head: bytes
    tail: bytes


@contextlib.contextmanager
def read_ends(paths: Sequence[Path], head: int, tail: int) -> Iterator[Iterator[FileEnds | None]]:
    """Read the first `head` and the last `tail` bytes of many files, several at a time.

    Yields:
        An iterator of each file's ends, whole where it is shorter; None where it has to be opened
        by itself: it cannot be read, or there is no extension to read it.
    """
    try:
        native = importlib.import_module("mypt_fast._native").read_ends
    except (ImportError, AttributeError):
        yield iter([None] * len(paths))
        return

    def read(begin: int) -> list[Any]:
        names = list(map(str, paths[begin : begin + _FILES_AT_ONCE]))
        try:
            return native(names, head, tail)
        except TypeError:  # a name that is not UTF-8
            return [None] * len(names)

    def in_turn() -> Iterator[FileEnds | None]:
        coming = ahead.submit(read, 0)
        for begin in range(0, len(paths), _FILES_AT_ONCE):
            found = coming.result()
            coming = ahead.submit(read, begin + _FILES_AT_ONCE)
            for ends in found:
                yield ends and FileEnds._make(ends)

    # The thread reads while the caller looks at what was read. It ends with the caller's `with`:
    # were it a generator's, an error's traceback would keep it until the garbage collector joined
    # it, perhaps while that thread waits for a lock of `threading` that the collecting one holds.
    with ThreadPoolExecutor(1) as ahead:
        yield in_turn()


def sampled_digest(descriptor: int, size: int, path: str | Path) -> str:
    """Hash 64 blocks spread over a file, both ends among them: 256 KiB however large it is."""
    digest = hashlib.blake2b(digest_size=8)
    blocks = max(1, -(-size // SAMPLE_BYTES))
    last = _SAMPLES - 1
    for i in sorted({j * (blocks - 1) // last for j in range(_SAMPLES)}):
        begin = i * SAMPLE_BYTES
        digest.update(read_at(descriptor, min(SAMPLE_BYTES, size - begin), begin, path))
    return f"sampled-{digest.hexdigest()}"
