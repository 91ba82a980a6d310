"""One trainer per run directory: a lock that the system takes back when its holder dies."""

import fcntl
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from mypt_fast.errors import CheckpointError


class RunLock:
    """Holds `.<name>.lock` beside each directory that a run writes; readers never need it.

    The lock is the system's (flock), not the file: one that a killed process left behind locks
    nothing. The file says who holds it.

    Args:
        directories: what the run publishes: itself, gold, the fp16 copy.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._directories = list(directories)
        self._held: list[tuple[int, Path]] = []
        self.notices: list[str] = []

    def acquire(self) -> None:
        """Take every lock, or none; without effect while they are held.

        Raises:
            CheckpointError: if another process holds one, by its number and machine, or if the
                folder cannot be written.
        """
        if self._held:
            return
        try:
            for directory in self._directories:
                path = _beside(directory)
                handle = _take(directory, path)
                if handle is None:
                    self.notices = [
                        f"{directory.parent}: its file system knows no locks; two trainers in one "
                        "run directory would not be noticed"
                    ]
                    return
                self._held.append((handle, path))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the locks back and remove their files."""
        while self._held:
            handle, path = self._held.pop()
            path.unlink(missing_ok=True)  # while it is held: nobody else can have taken it
            os.close(handle)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _take(directory: Path, path: Path) -> int | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise CheckpointError(
                f"cannot write to {directory.parent}", e.strerror or str(e),
                "run in a writable folder",
            ) from e  # fmt: skip
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise CheckpointError(
                f"{directory} is being trained already",
                f"by {holder}" if holder else "by another process",
                "wait for it, stop it, or choose another --model_name",
            ) from e
        except OSError:  # ENOLCK, EOPNOTSUPP: network file systems without locks
            os.close(handle)
            return None
        if _is_at(handle, path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)  # its holder removed it between our open and our lock


def _beside(directory: Path) -> Path:
    real = Path(os.path.realpath(directory))  # a link to a larger disk is the same run
    return real.with_name(f".{real.name}.lock")


def _is_at(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
