"""A start that dies before its first checkpoint leaves nothing behind in the log."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from mypt_fast.errors import CheckpointError, ConfigError
from mypt_fast.presets import read_json
from mypt_fast.publish import write_json
from mypt_fast.training.events import EventLog


class FirstStart:
    """Remembers, until a new run has a checkpoint, where its log began.

    A checkpoint says where its log ends, so that a resumed run repeats no line. Before the first
    one, a hidden file beside the run directory says it.

    Args:
        run_dir: the run directory.
        log: its event log.
        run: the run's name in it; default: that of the directory.
    """

    def __init__(self, run_dir: Path, log: EventLog, run: str = "") -> None:
        real = Path(os.path.realpath(run_dir))
        self._path, self._log = real.with_name(f".{real.name}.start"), log
        self._run = run or real.name

    def begin(self) -> int:
        """Note where the log of a new run begins; returns the bytes of an earlier start dropped."""
        dropped, entry = 0, self._entry()
        if entry.get("log") == str(self._log.path) and type(entry.get("bytes")) is int:
            dropped = self._log.rewind(entry["bytes"], self._run)
        with contextlib.suppress(OSError):  # a disk that refuses this has its say at the first save
            self._log.flush()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"log": str(self._log.path), "bytes": self._log.position})
        self._log.close()  # until the first event: a run may yet be refused
        return dropped

    def end(self) -> None:
        """Forget it: from here on the checkpoint knows."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _entry(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        try:
            content = read_json(self._path, "start of a run", 1 << 16)
        except (ConfigError, CheckpointError):  # what a power cut left of it
            return {}
        return content if isinstance(content, dict) else {}
