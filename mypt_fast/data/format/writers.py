"""Write files of tokens in any format, one block after the other, in bounded memory.

A writer fills one file (Megatron's two, an episode folder's five). What comes after the tokens in
the file waits in a nameless one beside it. Publishing is the caller's: see `convert`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from mypt_fast.data.format import episodes, megatron, native, raw
from mypt_fast.data.format.shard import PlaneKind
from mypt_fast.errors import DataError, TokenRangeError

CHUNK = 1 << 20  # bytes that are copied at once
_LLMC_MOST = (1 << 31) - 1
_SEQUENCE = 1 << 30  # tokens; Megatron counts them in int32


@dataclass(frozen=True)
class Block:
    """A run of tokens.

    Attributes:
        tokens: ids, any integer type.
        ends: positions in `tokens`, each the length of a beginning after which a document ends.
        planes: values beside the tokens, as many.
    """

    tokens: NDArray[np.integer[Any]]
    ends: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    planes: Mapping[PlaneKind, NDArray[Any]] = field(default_factory=dict)


class FlatWriter:
    """Tokens and no more; with llm.c's header of so many tokens where `llmc_tokens` is set."""

    def __init__(self, path: Path, width: int, *, llmc_tokens: int | None = None) -> None:
        """Create the file.

        Raises:
            DataError: llm.c's header cannot count as many tokens.
        """
        if llmc_tokens is not None and llmc_tokens > _LLMC_MOST:
            raise DataError(f"{path}", f"llm.c counts at most {_LLMC_MOST} tokens in a file")
        self.path, self.width, self.n_tokens = path, width, 0
        self.max_token = 0
        header = b"" if llmc_tokens is None else raw.pack_llmc_header(llmc_tokens, width)
        self.hash = xxhash.xxh3_128(header)
        self._file: BinaryIO = path.open("wb")
        self._file.write(header)

    def append(self, block: Block) -> None:
        """Write the tokens of a block.

        Raises:
            TokenRangeError: an id does not fit the width.
        """
        self._write(fit(block.tokens, self.width, self.path, self.n_tokens))

    def _write(self, tokens: NDArray[Any]) -> None:
        self._file.write(tokens.data)
        self.hash.update(tokens.data)
        self.n_tokens += len(tokens)
        self.max_token = max(self.max_token, int(tokens.max()) if len(tokens) else 0)

    def finish(self) -> None:
        """Complete the file on the disk."""
        _close(self._file)

    def abandon(self) -> None:
        """Let go of the file."""
        self._file.close()


class NativeWriter(FlatWriter):
    """A native shard: see `native`."""

    def __init__(
        self,
        path: Path,
        width: int,
        *,
        vocab_size: int = 0,
        eot_id: int = -1,
        tokenizer: bytes = bytes(32),
        planes: tuple[PlaneKind, ...] = (),
    ) -> None:
        """Create the file; `planes` are those that every block has."""
        super().__init__(path, width)
        self._file.write(bytes(native.HEADER_BYTES))
        self._vocab_size, self._eot_id, self._tokenizer = vocab_size, eot_id, tokenizer
        self._ends = _Spool(path.parent)
        self._planes = {k: _Spool(path.parent) for k in ("mask", "segments") if k in planes}
        self._blocks = native.BlockHashes()

    def append(self, block: Block) -> None:
        """Write a block; raises as `FlatWriter.append`."""
        first = self.n_tokens
        super().append(block)
        self._ends.write((block.ends + np.uint64(first)).astype("<u8"))
        for kind, spool in self._planes.items():
            spool.write(np.ascontiguousarray(block.planes[cast(PlaneKind, kind)], "u1"))

    def _write(self, tokens: NDArray[Any]) -> None:
        super()._write(tokens)
        if len(tokens):
            self._blocks.update(tokens.data.cast("B"))

    def finish(self) -> None:
        """Write what follows the tokens, and the header last."""
        hashes = {kind: spool.copy_to(self._file, pad=self._pad) for kind, spool in self._parts()}
        flags = native.FLAG_MASK if "mask" in hashes else 0
        flags |= native.FLAG_SEGMENTS if "segments" in hashes else 0
        self._pad()
        tables = xxhash.xxh3_64()
        self._ends.copy_to(self._file, digest=tables)
        blocks = self._blocks.finish()
        tables.update(blocks)
        self._file.write(blocks)
        header = native.Header(
            self.width, self.n_tokens, self._ends.size // 8, flags, self._vocab_size, self._eot_id,
            self.max_token, self._tokenizer, self.hash.digest(),
            hashes.get("mask", bytes(8)), hashes.get("segments", bytes(8)),
        )  # fmt: skip
        size = native.layout(header).file_size
        self._file.write(native.pack_footer_of(size, tables.intdigest()))
        self._file.seek(0)
        self._file.write(native.pack_header(header))
        _close(self._file)

    def _parts(self) -> Iterator[tuple[str, _Spool]]:
        yield from self._planes.items()

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % 8))

    def abandon(self) -> None:
        """Let go of the files."""
        super().abandon()
        for spool in (self._ends, *self._planes.values()):
            spool.close()


class MegatronWriter(FlatWriter):
    """X.bin and X.idx: each document one sequence, which is cut where int32 cannot count it."""

    def __init__(self, path: Path, width: int) -> None:
        """Create both files."""
        super().__init__(path, width)
        self._lengths, self._pointers = _Spool(path.parent), _Spool(path.parent)
        self._entries = _Spool(path.parent)
        self._entries.write(np.zeros(1, "<i8"))
        self._begin = self._sequences = 0

    def append(self, block: Block) -> None:
        """Write a block.

        Raises:
            TokenRangeError: an id does not fit; Megatron's 4 bytes are signed.
        """
        first = self.n_tokens
        if self.width == 4:
            fit(block.tokens, 4, self.path, first, limit=1 << 31)
        super().append(block)
        if not len(block.ends):
            return
        ends = block.ends.astype("<i8") + first
        starts = np.concatenate((np.array([self._begin], "<i8"), ends[:-1]))
        if int((ends - starts).max()) <= _SEQUENCE:
            self._write_sequences(starts, ends)
            entries = np.arange(self._sequences - len(ends), self._sequences, dtype="<i8") + 1
            self._entries.write(entries)
        else:
            for end in ends.tolist():
                self._end_document(end)

    def _end_document(self, end: int) -> None:
        cuts = np.array([*range(self._begin, end, _SEQUENCE), end], "<i8")
        self._write_sequences(cuts[:-1], cuts[1:])
        self._entries.write(np.array([self._sequences], "<i8"))

    def _write_sequences(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._lengths.write((ends - starts).astype("<i4"))
        self._pointers.write((starts * self.width).astype("<i8"))
        self._begin, self._sequences = int(ends[-1]), self._sequences + len(ends)

    def end_shard(self) -> None:
        """End a document with what was written so far: none lies in two shards."""
        if self._begin < self.n_tokens:
            self._end_document(self.n_tokens)

    def finish(self) -> None:
        """Write the index; tokens after the last document are one more."""
        self.end_shard()
        _close(self._file)
        code = {2: 8, 4: 4}[self.width]
        entries = self._entries.size // 8
        with self.path.with_suffix(".idx").open("wb") as file:
            file.write(megatron.HEADER.pack(megatron.MAGIC, 1, code, self._sequences, entries))
            for spool in (self._lengths, self._pointers, self._entries):
                spool.copy_to(file)
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Let go of the files."""
        super().abandon()
        for spool in (self._lengths, self._pointers, self._entries):
            spool.close()


class EpisodeWriter(FlatWriter):
    """A folder of MyPT's episodes: a document each."""

    def __init__(self, folder: Path, width: int, planes: tuple[PlaneKind, ...] = ()) -> None:
        """Create the folder and its files."""
        folder.mkdir(parents=True)
        super().__init__(folder / episodes.TOKENS, width)
        names = {kind: name for name, kind in episodes.PLANES.items()}
        self._planes = {kind: (folder / names[kind]).open("wb") for kind in planes}
        self._index: BinaryIO = (folder / episodes.INDEX).open("wb")
        self._begin = 0

    def append(self, block: Block) -> None:
        """Write a block; raises as `FlatWriter.append`."""
        first = self.n_tokens
        super().append(block)
        for kind, file in self._planes.items():
            dtype = "<f4" if kind == "weights" else "u1"
            file.write(np.ascontiguousarray(block.planes[kind], dtype).data)
        if len(block.ends):
            ends = block.ends.astype("<u8") + np.uint64(first)
            starts = np.concatenate((np.array([self._begin], "<u8"), ends[:-1]))
            self._index.write(np.stack((starts, ends - starts), 1).astype("<u8").tobytes())
            self._begin = int(ends[-1])

    def finish(self) -> None:
        """Complete the files; tokens after the last document are one more episode."""
        if self._begin < self.n_tokens:
            last = np.array([self._begin, self.n_tokens - self._begin], "<u8")
            self._index.write(last.tobytes())
        for file in (self._file, self._index, *self._planes.values()):
            _close(file)

    def abandon(self) -> None:
        """Let go of the files."""
        for file in (self._file, self._index, *self._planes.values()):
            file.close()


class _Spool:
    """Bytes that will be copied to the end of a file: in a nameless file, not in memory."""

    def __init__(self, folder: Path) -> None:
        self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self.size = 0

    def write(self, values: NDArray[Any]) -> None:
        self.size += self._file.write(values.tobytes())

    def copy_to(self, target: BinaryIO, digest: Any = None, pad: Any = None) -> bytes:
        """Append everything to `target`; return its XXH3-64."""
        digest = digest or xxhash.xxh3_64()
        if pad is not None:
            pad()
        self._file.seek(0)
        while part := self._file.read(CHUNK):
            digest.update(part)
            target.write(part)
        self._file.close()
        return bytes(digest.digest())

    def close(self) -> None:
        self._file.close()


def fit(
    tokens: NDArray[np.integer[Any]], width: int, path: Path, first: int, limit: int | None = None
) -> NDArray[Any]:
    """Return the ids in `width` bytes each, contiguous and little-endian.

    Raises:
        TokenRangeError: one of them is negative or too large, with its position.
    """
    limit = limit or 1 << 8 * width
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= limit):
        i = int(np.flatnonzero((tokens < 0) | (tokens >= limit))[0])
        raise TokenRangeError(
            f"{path}",
            f"token {tokens[i]} at position {first + i} is not in [0, {limit})",
            "choose a --dtype or --format that holds it",
        )
    return np.ascontiguousarray(tokens, f"<u{width}")


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
