"""What a preparation has done so far, on the disk beside it, so that a killed one can go on.

`journal.jsonl` lies in the directory that is being built: a line that says what is built from what,
then a line for each checkpoint. A line counts once it is complete; what it refers to is on the disk
before it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from mypt_fast.data.corpus import Source
from mypt_fast.data.dataset_dir import JOURNAL_NAME

_VERSION = 1


@dataclass
class Checkpoint:
    """A point from which the same dataset comes out as without the interruption.

    Attributes:
        reader: the reader's position.
        counts: what was counted on the way (duplicates, verified pieces).
        writers: the state of each split's writer.
        shards: finished shards of each split; in a line of the file only the new ones.
        metadata: that of the finished dataset, where only its publication is left to do.
    """

    reader: dict[str, Any]
    counts: dict[str, Any]
    writers: dict[str, dict[str, Any]]
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None


class Journal:
    """The journal of one directory.

    Args:
        folder: the directory that is being built.
        key: from `run_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / JOURNAL_NAME
        self._known: dict[str, int] = {}
        self._file: BinaryIO
        self.last: Checkpoint | None = None
        with contextlib.suppress(FileNotFoundError):
            self._load(key)
        if self.last is None:
            self._file = self.path.open("wb")
            self._write({"version": _VERSION, "key": key})

    def _load(self, key: str) -> None:
        lines, size = _complete_lines(self.path)
        self.last = _last_of(lines, key)
        if self.last is None:
            return
        self._known = {split: len(names) for split, names in self.last.shards.items()}
        self._file = self.path.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)

    def add(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; `shards` has all finished ones, of which the new are written."""
        line = dict(vars(checkpoint))
        line["shards"] = {s: all_[self._known.get(s, 0) :] for s, all_ in checkpoint.shards.items()}
        self._known = {split: len(all_) for split, all_ in checkpoint.shards.items()}
        self._write(line)

    def finish(self, checkpoint: Checkpoint) -> None:
        """Write the last checkpoint, whose metadata lists all shards."""
        self._write({**vars(checkpoint), "shards": {}})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the journal of a directory that is published; left there, it harms nobody."""
        with contextlib.suppress(OSError):
            (folder / JOURNAL_NAME).unlink()


def last_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """Return the last checkpoint of the same preparation that `folder` holds, if any."""
    try:
        lines, _ = _complete_lines(folder / JOURNAL_NAME)
    except OSError:
        return None
    return _last_of(lines, key)


def _last_of(lines: list[dict[str, Any]], key: str) -> Checkpoint | None:
    names = {f.name for f in fields(Checkpoint)}
    if len(lines) < 2 or not _is_header(lines[0], key):
        return None
    if any(line.keys() != names for line in lines[1:]):
        return None
    shards: dict[str, list[dict[str, Any]]] = {}
    for line in lines[1:]:
        for split, new in line["shards"].items():
            shards.setdefault(split, []).extend(new)
    last = Checkpoint(**lines[-1])
    last.shards = shards if last.metadata is None else {}
    return last


def has_journal(folder: Path) -> bool:
    """Whether a preparation was interrupted here, of whatever."""
    return (folder / JOURNAL_NAME).is_file()


def run_key(options: dict[str, Any], sources: Sequence[Source]) -> str:
    """Return a digest that is equal only where the same tokens would come out.

    Of the inputs it covers path, size and time of change: reading them would take as long as
    going on.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for source in sources:
        line = f"{source.real_path}\0{source.size}\0{source.mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _is_header(line: dict[str, Any], key: str) -> bool:
    return line.get("version") == _VERSION and line.get("key") == key


def _complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines that were written completely, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    size = 0
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                break
            lines.append(line)
            size += len(raw)
    return lines, size
