"""A dataset in the making: its writers, its counts, and the checkpoints from which it can go on."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from mypt_fast.data.dataset_dir import SPLITS
from mypt_fast.data.documents import Position
from mypt_fast.data.duplicates import Duplicates
from mypt_fast.data.encoding import Encoded
from mypt_fast.data.format import native
from mypt_fast.data.format.files import opened, read_at
from mypt_fast.data.format.verify import verify_native
from mypt_fast.data.journal import Checkpoint, Journal
from mypt_fast.data.shard_writer import CUT_SUFFIX, ShardKind, SplitState, SplitWriter
from mypt_fast.errors import DataError, MyptError

_DIGESTS = "documents.xxh3"
# A checkpoint at the latest after this many tokens, however long the shards are.
CHECKPOINT_TOKENS = 1 << 25
_READ_BYTES = 1 << 20


class Build:
    """Everything that has been written so far.

    Args:
        folder: the directory that is being filled.
        tokens_per_shard: tokens of a full shard.
        kind: how shards are written.
        dedup: whether repeated documents are left out.
        journal: where checkpoints go; its last one is where this begins. `damaged_shard` vouches
            for the shards that it calls finished.
        has_checkpoints: whether the inputs can be read again.

    Raises:
        DataError: what the journal's last checkpoint refers to is not there.
    """

    def __init__(
        self,
        folder: Path,
        tokens_per_shard: int,
        kind: ShardKind,
        dedup: bool,
        journal: Journal,
        has_checkpoints: bool,
    ) -> None:
        last = journal.last or Checkpoint({}, {}, {})
        self.kind = kind
        self.verified: int = last.counts.get("verified", 0)
        self.position = Position(**last.reader)
        self._journal = journal if has_checkpoints else None
        self._counts = {k: v for k, v in last.counts.items() if k != "verified"}
        try:
            with ExitStack() as opened:
                self.duplicates = Duplicates(folder / _DIGESTS, dedup, self._counts)
                opened.callback(self.duplicates.close)
                self.writers = {}
                for split in SPLITS:
                    state = SplitState(**last.writers.get(split, {}))
                    shards = last.shards.get(split, [])
                    writer = SplitWriter(folder / split, tokens_per_shard, kind, state, shards)
                    self.writers[split] = writer
                    opened.callback(writer.abandon)
                opened.pop_all()
        except (EOFError, FileNotFoundError) as error:
            # What is left of it goes away with this error.
            raise DataError(
                "the interrupted run", f"cannot be continued: {error}", "run the command again"
            ) from error
        self._reader = last.reader
        self._checkpointed = (self._finished_shards(), self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(writer.tokens for writer in self.writers.values())

    def _finished_shards(self) -> int:
        return sum(writer.finished_shards for writer in self.writers.values())

    def add(self, result: Encoded) -> None:
        """Write a unit's tokens, and a checkpoint when a shard is full."""
        for split, (tokens, starts) in result.splits.items():
            self.writers[split].append(tokens, starts)
        self.verified += result.verified
        self._reader, self._counts = result.unit.reader, result.unit.counts
        shards, tokens_then = self._checkpointed
        if self._finished_shards() > shards or self.tokens >= tokens_then + CHECKPOINT_TOKENS:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Bring everything to the disk and note it in the journal."""
        self._checkpointed = (self._finished_shards(), self.tokens)
        if self._journal is None:
            return
        self.duplicates.sync()
        states = {split: vars(writer.sync()) for split, writer in self.writers.items()}
        shards = {s: w.shards[: w.finished_shards] for s, w in self.writers.items()}
        self._journal.add(
            Checkpoint(self._reader, {**self._counts, "verified": self.verified}, states, shards)
        )

    def finish(self, metadata: dict[str, Any]) -> None:
        """Note that only the publication is left to do."""
        if self._journal is not None:
            self._journal.finish(Checkpoint(self._reader, self._counts, {}, {}, metadata))

    def close(self) -> None:
        """Let go of every file without caring whether it could be written."""
        for writer in self.writers.values():
            writer.abandon()
        self.duplicates.close()

    @staticmethod
    def remove_work_files(folder: Path) -> None:
        """Remove what only a run that continues would need."""
        for name in (_DIGESTS, *(f"{split}.documents" for split in SPLITS)):
            (folder / name).unlink(missing_ok=True)


def damaged_shard(folder: Path, last: Checkpoint, format_: str) -> str:
    """Name the first finished shard that is not what was written; every byte is read.

    A machine that died may have kept a file's length and lost what was in it.
    """
    is_finished = last.metadata is not None
    listed = last.metadata["shards"] if last.metadata else [*chain(*last.shards.values())]
    for shard in listed:
        path = folder / shard["name"]
        cut = path.with_name(path.name + CUT_SUFFIX)
        if is_finished and cut.exists():  # it takes the other one's place, see `settle`
            path = cut
        try:
            found = _native_hash(path) if format_ == "native" else _flat_hash(path)
        except MyptError:
            found = (-1, "")
        if found != (shard["tokens"], shard["xxh3_128"]):
            return str(shard["name"])
    return ""


def _native_hash(path: Path) -> tuple[float, str]:
    verify_native(path)
    with opened(path) as (descriptor, _):
        header = native.unpack_header(read_at(descriptor, native.HEADER_BYTES, 0, path))
    return header.n_tokens, header.payload_hash.hex()


def _flat_hash(path: Path) -> tuple[float, str]:
    digest = xxhash.xxh3_128()
    with opened(path) as (descriptor, size):
        for begin in range(0, size, _READ_BYTES):
            digest.update(read_at(descriptor, min(_READ_BYTES, size - begin), begin, path))
    return size / 4, digest.hexdigest()
