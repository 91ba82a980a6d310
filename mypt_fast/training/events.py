"""The JSONL log: one object a line, one writer, the truth of a run (MyPT specification 7)."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

from mypt_fast.errors import CheckpointError

SCHEMA = 1


class EventLog:
    """Appends events; `position` is where a resumed run continues."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115
        except OSError as e:
            raise CheckpointError(
                f"cannot write the log {path}", e.strerror or str(e), "choose another --log_file"
            ) from e

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with a local naive ISO timestamp after `event` and `iter`."""
        record = {"event": event}
        if "iter" in fields:
            record["iter"] = fields.pop("iter")
        record["timestamp"] = datetime.datetime.now().isoformat()
        line = json.dumps({**record, **fields}, ensure_ascii=False, allow_nan=True)
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
        self._file.seek(0, os.SEEK_END)
        return size - position

    def sync(self) -> None:
        """Put the log on the disk; called before a checkpoint that records its position."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _ends_line(path: Path, position: int) -> bool:
    if position == 0:
        return True
    with open(path, "rb") as f:
        f.seek(position - 1)
        return f.read(1) == b"\n"


def loss6(value: float | None) -> float | None:
    """Losses are logged with six decimals."""
    return None if value is None else round(value, 6)
