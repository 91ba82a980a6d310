"""The JSONL log: one object a line, one writer, the truth of a run (MyPT specification 7)."""

import datetime
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mypt_fast import console
from mypt_fast.errors import CheckpointError

SCHEMA = 1


class EventLog:
    """Appends events; the file is opened at the first one.

    A line is written whole or not at all, as far as a process can say: a full disk keeps lines
    here until it takes them, and what a power cut left of a last line is cut before the next.

    Attributes:
        listeners: called with every event, such as what feeds TensorBoard.

    Raises:
        CheckpointError: at once, if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._open: io.FileIO | None = None
        self._waiting = b""  # what the disk has not taken
        self._complete = 0  # bytes of whole lines in the file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab"):
                pass
        except OSError as e:
            raise CheckpointError(
                f"cannot write the log {path}", e.strerror or str(e), "choose another --log_file"
            ) from e

    @property
    def _file(self) -> io.FileIO:
        if self._open is None:
            _mend(self.path)
            self._open = io.FileIO(self.path, "a")
            self._complete = self._open.seek(0, os.SEEK_END)
        return self._open

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with a local naive ISO timestamp after `event` and `iter`."""
        record: dict[str, Any] = {"event": event}
        if "iter" in fields:
            record["iter"] = fields.pop("iter")
        record["timestamp"] = datetime.datetime.now().isoformat()
        record.update(fields)
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        # unbuffered: a killed process loses nothing; a power cut, at most the tail
        self._append(line.encode() + b"\n")
        for listener in self.listeners:
            listener(record)

    def _append(self, data: bytes) -> None:
        was_waiting = bool(self._waiting)
        self._waiting += data
        try:
            while self._waiting:
                written = self._file.write(self._waiting) or 0
                whole = self._waiting.rfind(b"\n", 0, written) + 1
                if whole:
                    self._complete = self._file.tell() - written + whole
                self._waiting = self._waiting[written:]
        except OSError as e:
            if not was_waiting:
                console.notice(f"note: {self.path}: {e.strerror}; events wait for the disk")
            return
        if was_waiting:
            console.notice(f"note: {self.path}: the disk has taken the events that waited")

    @property
    def position(self) -> int:
        """Bytes of whole lines in the file."""
        return self._complete if self._file else 0

    def rewind(self, position: int, run: str = "") -> int:
        """Drop what was logged after `position`: the resumed run logs those steps again.

        Returns the number of bytes dropped: 0 when the file holds less, when `position` is
        not the end of a line, so that it is not the file whose position was saved, or when a
        run of another name than `run` has begun after it.
        """
        size = self.path.stat().st_size
        if not 0 <= position < size or not _ends_line(self.path, position):
            return 0
        if run and _has_another(self.path, position, run):
            return 0
        os.truncate(self.path, position)
        return size - position

    def flush(self) -> None:
        """Write what waits for the disk; raises OSError if the log cannot be opened."""
        self._append(b"")
        _ = self._file

    def sync(self) -> None:
        """Put what is in the file on the disk; called before a checkpoint records its position.

        Another thread may call it while events are written.
        """
        try:
            if self._open is not None:
                os.fsync(self._open.fileno())
        except OSError as e:  # the lines are in the file; a run does not end for their durability
            console.notice(f"note: {self.path}: {e.strerror}")

    def close(self) -> None:
        """Close the file, with a last attempt at what waits."""
        if self._open is not None:
            self._append(b"")
            self._open.close()
            self._open = None


class NoLog(EventLog):
    """A log without a file, for a caller that wants none; listeners hear of every event."""

    def __init__(self) -> None:
        self.path = Path(os.devnull)
        self.listeners = []

    def _append(self, data: bytes) -> None:
        """Keep nothing."""

    @property
    def position(self) -> int:
        """Nothing is in it."""
        return 0

    def rewind(self, position: int, run: str = "") -> int:
        """Drop nothing."""
        return 0

    def flush(self) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _mend(path: Path) -> None:
    """End the last line: what a power cut left of one of ours is cut, anything else gets its end.

    A file system may have made the file longer before it wrote the bytes: zeros are cut too.
    """
    with open(path, "r+b") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - _LONGEST))
        tail = f.read()
        line = tail[tail.rfind(b"\n") + 1 :]
        text = line.rstrip(b"\0")
        if not line:
            return
        if len(line) < _LONGEST and _BEGIN.startswith(text[: len(_BEGIN)]) and not _is_json(text):
            f.truncate(size - len(line))
        else:
            f.write(b"\n")


_BEGIN = b'{"event": "'
_START = _BEGIN + b'training_start"'
_LONGEST = 1 << 20


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _ends_line(path: Path, position: int) -> bool:
    if position == 0:
        return True
    with open(path, "rb") as f:
        f.seek(position - 1)
        return f.read(1) == b"\n"


def _has_another(path: Path, position: int, run: str) -> bool:
    """Whether a run of another name began after `position`."""
    with open(path, "rb") as f:
        f.seek(position)
        for line in f:
            if line.startswith(_START):
                try:
                    config = json.loads(line).get("config")
                except ValueError:
                    continue
                name = config.get("model_name") if isinstance(config, dict) else None
                if name not in (None, run):
                    return True
    return False


def loss6(value: float | None) -> float | None:
    """Losses are logged with six decimals, and as null when they are not finite."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
