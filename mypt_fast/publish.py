"""Publish a directory atomically: built aside, then swapped in by one system call.

A reader sees the old directory or the new one, never a mixture, whenever the process dies.
"""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextlib.contextmanager
def staged(target: Path, owned: frozenset[str]) -> Iterator[Path]:
    """Yield an empty directory that replaces `target` when the block ends without an error.

    Args:
        target: the directory to publish. Its parent must exist.
        owned: names this program writes. Other entries of an existing `target` are the user's
            and are carried over.

    Raises:
        OSError: as the system reports it; `target` is then as it was.
    """
    target = Path(os.path.realpath(target))  # a link to a larger disk stays a link
    clean_stale(target)
    aside = target.parent / f".{target.name}.tmp-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if target.is_dir():
            _carry_over(target, aside, owned)
        sync_directory(aside)
        _swap(aside, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # what failed, or what was there before


def clean_stale(target: Path) -> None:
    """Finish or remove what a killed process left beside `target`."""
    target = Path(os.path.realpath(target))
    name = glob.escape(target.name)
    for old in sorted(target.parent.glob(f".{name}.old-*")):
        if not target.exists():  # killed between the two renames: the old state is the state
            os.rename(old, target)
        elif not _alive(old.name):
            shutil.rmtree(old, ignore_errors=True)
    for stale in target.parent.glob(f".{name}.tmp-*"):
        if not _alive(stale.name):
            shutil.rmtree(stale, ignore_errors=True)


def _alive(name: str) -> bool:
    pid = name.rsplit("-", 1)[1]
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _carry_over(source: Path, destination: Path, owned: frozenset[str]) -> None:
    """Link what is not ours: no copy, and the same inode for whoever has it open."""
    for entry in os.scandir(source):
        there = destination / entry.name
        if entry.name in owned or there.exists():
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), there)
        elif entry.is_dir():
            there.mkdir()
            _carry_over(Path(entry.path), there, frozenset())
        else:
            try:
                os.link(entry.path, there)
            except OSError:  # a file system without hard links
                shutil.copy2(entry.path, there)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    if _exchange(new, target):
        return
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    os.rename(target, old)
    os.rename(new, target)
    os.rename(old, new)  # the caller removes it


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
