"""The JSONL log: one object a line, one writer, the truth of a run (MyPT specification 7)."""

import datetime
import json
import math
import os
from pathlib import Path
from typing import IO, Any

from mypt_fast.errors import CheckpointError

SCHEMA = 1


class EventLog:
    """Appends events; the file is opened at the first one.

    Raises:
        CheckpointError: at once, if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab"):
                pass
        except OSError as e:
            raise CheckpointError(
                f"cannot write the log {path}", e.strerror or str(e), "choose another --log_file"
            ) from e

    @property
    def _file(self) -> IO[bytes]:
        if self._open is None:
            self._open = open(self.path, "ab")  # noqa: SIM115
        return self._open

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with a local naive ISO timestamp after `event` and `iter`."""
        record = {"event": event}
        if "iter" in fields:
            record["iter"] = fields.pop("iter")
        record["timestamp"] = datetime.datetime.now().isoformat()
        line = json.dumps({**record, **fields}, ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()  # a killed process loses nothing; a power cut, at most the tail

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def rewind(self, position: int) -> int:
        """Drop what was logged after `position`: the resumed run logs those steps again.

        Returns the number of bytes dropped: 0 when the file holds less, or when `position` is
        not the end of a line, so that it is not the file whose position was saved.
        """
        size = self.path.stat().st_size
        if position >= size or not _ends_line(self.path, position):
            return 0
        os.truncate(self.path, position)
        return size - position

    def sync(self) -> None:
        """Put the log on the disk; called before a checkpoint that records its position."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None


def _ends_line(path: Path, position: int) -> bool:
    if position == 0:
        return True
    with open(path, "rb") as f:
        f.seek(position - 1)
        return f.read(1) == b"\n"


def loss6(value: float | None) -> float | None:
    """Losses are logged with six decimals, and as null when they are not finite."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
