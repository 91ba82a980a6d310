"""Write token shards: filled to the brim, hashed as they grow, able to go on after a kill.

A shard is native (MYPTSHD1, see `format.native`) or MyPT's flat uint32. Documents run across
shards: in the index of a native shard such a document ends at the shard's last token, and goes on
as the first of the next shard, whose entry in the metadata says `"continues": true`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from mypt_fast.data.format import native

FORMATS = ("native", "mypt")
CUT_SUFFIX = ".cut"
_COPY_TOKENS = 1 << 20

Tokens = npt.NDArray[np.generic]


@dataclass(frozen=True)
class ShardKind:
    """What the shards of a dataset have in common.

    Attributes:
        format: one of FORMATS.
        vocab_size: ids are below it; native shards hold uint16 where that is enough.
        eot_id: the token that ends a document, or -1.
        tokenizer: SHA-256 of the tokenizer's state.
    """

    format: str = "mypt"
    vocab_size: int = 0
    eot_id: int = -1
    tokenizer: bytes = bytes(32)

    @property
    def dtype(self) -> np.dtype[Any]:
        """How a token is stored."""
        is_narrow = self.format == "native" and 0 < self.vocab_size <= 1 << 16
        return np.dtype("<u2" if is_narrow else "<u4")

    @property
    def offset(self) -> int:
        """Bytes before the first token."""
        return native.HEADER_BYTES if self.format == "native" else 0


class _ShardFile:
    """One shard that grows at its end."""

    def __init__(self, path: Path, kind: ShardKind, n_tokens: int = 0) -> None:
        """Open a new shard, or with `n_tokens` one of which that many are to be kept."""
        self.kind = kind
        self.n_tokens = 0
        self.max_token = 0
        self._payload, self._blocks = xxhash.xxh3_128(), native.BlockHashes()
        self._file: BinaryIO = path.open("r+b" if n_tokens else "w+b")
        if n_tokens:
            self._go_on(n_tokens)
        else:
            self._file.write(bytes(kind.offset))

    def _go_on(self, n_tokens: int) -> None:
        size = self.kind.dtype.itemsize
        self._file.seek(self.kind.offset)
        while self.n_tokens < n_tokens:
            data = self._file.read(min(_COPY_TOKENS, n_tokens - self.n_tokens) * size)
            if not data or len(data) % size:
                self.abandon()
                raise EOFError(f"{self._file.name} is shorter than its journal says")
            self._note(np.frombuffer(data, self.kind.dtype))
        self._file.truncate(self._file.tell())

    def write(self, tokens: Tokens) -> None:
        """Append tokens, already of the stored type."""
        self._file.write(tokens.data)
        self._note(tokens)

    def _note(self, tokens: Tokens) -> None:
        self.n_tokens += len(tokens)
        self.max_token = max(self.max_token, int(tokens.max(initial=0)))
        self._payload.update(tokens.data)
        if self.kind.format == "native" and len(tokens):
            self._blocks.update(tokens.data.cast("B"))

    def sync(self) -> None:
        """Bring what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, ends: npt.NDArray[np.uint64]) -> str:
        """Complete the file and return the hash of its tokens in hexadecimal.

        Args:
            ends: where documents end in this shard; the last one is its end.
        """
        if self.kind.format == "native":
            self._finish_native(ends.astype("<u8"))
        self.sync()
        self._file.close()
        return str(self._payload.hexdigest())

    def _finish_native(self, ends: npt.NDArray[np.uint64]) -> None:
        header = native.Header(
            self.kind.dtype.itemsize,
            self.n_tokens,
            len(ends),
            vocab_size=self.kind.vocab_size,
            eot_id=self.kind.eot_id,
            max_token=self.max_token,
            tokenizer=self.kind.tokenizer,
            payload_hash=self._payload.digest(),
        )
        parts = native.layout(header)
        self._file.write(bytes(parts.documents - self._file.tell()))
        tables = ends.tobytes() + self._blocks.finish()
        self._file.write(tables + native.pack_footer(parts.file_size, tables))
        # The header comes last: a file without one is no shard.
        self._file.seek(0)
        self._file.write(native.pack_header(header))

    def abandon(self) -> None:
        """Let go of the file without caring whether it could be written."""
        with contextlib.suppress(OSError):
            self._file.close()


@dataclass
class SplitState:
    """How far a split has come, as the journal keeps it."""

    tokens: int = 0
    documents: int = 0
    max_token: int = -1
    boundaries: int = 0


class SplitWriter:
    """The shards of one split, each of exactly `tokens_per_shard` tokens but the last.

    Args:
        folder: the split's directory; made if missing.
        tokens_per_shard: tokens of a full shard.
        kind: how shards are written.
        state: to go on from here; what was written after it is taken back.
        shards: with `state`, the finished shards' entries.

    Raises:
        OSError, EOFError: files are missing or too short for `state`.
    """

    def __init__(
        self,
        folder: Path,
        tokens_per_shard: int,
        kind: ShardKind | None = None,
        state: SplitState | None = None,
        shards: Sequence[dict[str, Any]] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.kind = kind or ShardKind()
        self.shards = [dict(shard) for shard in shards]
        self._per_shard = tokens_per_shard
        self._file: _ShardFile | None = None
        self.tokens = self.documents = self.boundaries = 0
        self.max_token = -1
        # Where documents begin, 8 bytes each: on the disk, not in memory.
        self._path = folder.with_name(f"{folder.name}.documents")
        self._starts = self._path.open("r+b" if state and state.boundaries else "w+b")
        try:
            self._go_on(state or SplitState())
        except BaseException:
            self.abandon()
            raise

    def _go_on(self, state: SplitState) -> None:
        self.tokens, self.documents = state.tokens, state.documents
        self.max_token = state.max_token
        if os.fstat(self._starts.fileno()).st_size < 8 * state.boundaries:
            raise EOFError(f"{self._path} is shorter than its journal says")
        self._starts.truncate(8 * state.boundaries)
        self._starts.seek(0, os.SEEK_END)
        self.boundaries = state.boundaries
        finished = sum(shard["tokens"] for shard in self.shards)
        if state.tokens > finished:
            self._open(state.tokens - finished)
        keep = {self._shard_path(shard) for shard in self.shards}
        for path in self.folder.iterdir():
            if path not in keep:
                path.unlink()

    def _shard_path(self, shard: dict[str, Any]) -> Path:
        return self.folder / Path(shard["name"]).name

    def append(self, tokens: Tokens, starts: Sequence[int] = ()) -> None:
        """Write tokens, opening the next shard whenever one is full.

        Args:
            tokens: what to write.
            starts: the positions in `tokens` at which a document begins.
        """
        if len(starts):
            self._starts.write((np.array(starts, dtype="<u8") + np.uint64(self.tokens)).data)
            self.documents += len(starts)
            self.boundaries += len(starts)
        tokens = np.ascontiguousarray(tokens, dtype=self.kind.dtype)
        if len(tokens):
            self.max_token = max(self.max_token, int(tokens.max()))
        start = 0
        while start < len(tokens):
            if self._file is None:
                self._open()
            assert self._file is not None
            part = tokens[start : start + self._per_shard - self._file.n_tokens]
            self._file.write(part)
            self.shards[-1]["tokens"] += len(part)
            self.tokens += len(part)
            start += len(part)
            if self._file.n_tokens == self._per_shard:
                self.close()

    def _open(self, n_tokens: int = 0) -> None:
        name = f"shard_{len(self.shards):05d}.bin"
        self._file = _ShardFile(self.folder / name, self.kind, n_tokens)
        self.shards.append({"name": f"{self.folder.name}/{name}", "tokens": n_tokens})

    def close(self) -> None:
        """Finish the open shard: complete it on the disk and note its hash."""
        if self._file is not None:
            begin = self.tokens - self._file.n_tokens
            self._finish(self.shards[-1], self._file, begin)
            self._file = None

    def _finish(self, shard: dict[str, Any], file: _ShardFile, begin: int) -> None:
        starts = self._starts_between(begin, begin + file.n_tokens)
        ends = np.append(starts[starts > begin] - np.uint64(begin), np.uint64(file.n_tokens))
        shard["xxh3_128"] = file.finish(ends)
        if begin and not (len(starts) and starts[0] == begin):
            shard["continues"] = True

    def sync(self) -> SplitState:
        """Bring everything to the disk and return the state from which to go on."""
        if self._file is not None:
            self._file.sync()
        self._starts.flush()
        os.fsync(self._starts.fileno())
        return SplitState(self.tokens, self.documents, self.max_token, self.boundaries)

    @property
    def finished_shards(self) -> int:
        """How many shards are complete."""
        return len(self.shards) - (self._file is not None)

    def abandon(self) -> None:
        """Let go of every file without caring whether it could be written."""
        if self._file is not None:
            self._file.abandon()
            self._file = None
        with contextlib.suppress(OSError):
            self._starts.close()

    def document_starts(self) -> npt.NDArray[np.uint64]:
        """Return the position of each document's first token, ascending, without loading them."""
        self._starts.flush()
        if not self.boundaries:
            return np.zeros(0, dtype="<u8")
        return np.memmap(self._path, dtype="<u8", mode="r")

    def _starts_between(self, begin: int, end: int) -> npt.NDArray[np.uint64]:
        starts = self.document_starts()
        first, last = np.searchsorted(starts, [begin, end])
        return np.array(starts[first:last])

    def move_tail(self, count: int, target: SplitWriter) -> None:
        """Move the last `count` tokens to the end of `target`; both are closed afterwards.

        No file that was complete changes before `settle`: what is cut is written beside it.
        """
        self.close()
        keep = self.tokens - count
        moved = self.documents - int(np.searchsorted(self.document_starts(), keep))
        documents = target.documents
        at = keep
        for tokens in self._read_from(keep):
            starts = self._starts_between(at, at + len(tokens)) - np.uint64(at)
            # What begins in the middle of a document must not lengthen the one before it.
            is_inside = at == keep and not (len(starts) and starts[0] == 0)
            target.append(tokens, [0, *starts] if is_inside else starts.tolist())
            at += len(tokens)
        target.close()
        target.documents = documents + moved
        self.documents -= moved
        self._cut(keep)

    def _read_from(self, position: int) -> Iterator[Tokens]:
        begin = 0
        size = self.kind.dtype.itemsize
        for shard in self.shards:
            end = begin + shard["tokens"]
            at = max(position, begin)
            while at < end:
                count = min(_COPY_TOKENS, end - at)
                offset = self.kind.offset + (at - begin) * size
                yield np.fromfile(self._shard_path(shard), self.kind.dtype, count, offset=offset)
                at += count
            begin = end

    def _cut(self, keep: int) -> None:
        """Write what stays of the shard that `keep` falls into; drop the later ones."""
        # max_token is left as it is: still an upper bound of what the split holds.
        self.tokens = keep
        kept: list[dict[str, Any]] = []
        begin = 0
        for shard in self.shards:
            if begin < keep:
                kept.append(shard)
                if keep < begin + shard["tokens"]:
                    self._shorten(shard, begin, keep - begin)
            begin += shard["tokens"]
        self.shards = kept

    def _shorten(self, shard: dict[str, Any], begin: int, n_tokens: int) -> None:
        path = self._shard_path(shard)
        file = _ShardFile(path.with_name(path.name + CUT_SUFFIX), self.kind)
        with path.open("rb") as source:
            source.seek(self.kind.offset)
            while file.n_tokens < n_tokens:
                count = min(_COPY_TOKENS, n_tokens - file.n_tokens)
                file.write(np.fromfile(source, self.kind.dtype, count))
        shard["tokens"] = n_tokens
        self._finish(shard, file, begin)


def settle(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Leave exactly `shards` in a split's directory; doing it again changes nothing."""
    names = {Path(shard["name"]).name for shard in shards}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(CUT_SUFFIX):
            os.replace(path, path.with_name(path.name[: -len(CUT_SUFFIX)]))
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def balance(train: SplitWriter, val: SplitWriter, val_fraction: float) -> str:
    """Move a tail between the splits where chance left validation too small or too large.

    Returns:
        The rule by which the split came about, in words.
    """
    total = train.tokens + val.tokens
    low = max(1, int(total * val_fraction / 2))
    high = min(total - 1, int(total * min(2 * val_fraction, (1 + val_fraction) / 2)))
    if low <= val.tokens <= high:
        return "by document"
    wanted = min(max(round(total * val_fraction), 1), total - 1)
    if val.tokens < low:
        source, target, count = train, val, wanted - val.tokens
        fewest, most = low - val.tokens, high - val.tokens
    else:
        source, target, count = val, train, val.tokens - wanted
        fewest, most = val.tokens - high, val.tokens - low
    starts = source.document_starts()
    # A view of the starts that would leave the share acceptable.
    fitting = starts[
        np.searchsorted(starts, source.tokens - most) : np.searchsorted(
            starts, source.tokens - fewest, side="right"
        )
    ]
    if len(fitting):
        at = min(int(np.searchsorted(fitting, source.tokens - count)), len(fitting) - 1)
        count = source.tokens - int(fitting[at])
    source.move_tail(count, target)
    return "by document, then a tail of whole ones" if len(fitting) else "by document, then a tail"
