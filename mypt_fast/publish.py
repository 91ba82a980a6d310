"""Publish a directory atomically: built aside, then swapped in by one system call.

A reader sees the old directory or the new one, never a mixture, whenever the process dies.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RENAME_EXCHANGE = 2
AT_FDCWD = -100
# In a directory that can be continued, locked while its process lives: it holds the id of the boot.
LOCK_NAME = "in_use.lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def staged(
    target: Path,
    owned: frozenset[str],
    adopt: Callable[[Path], bool] | None = None,
    retire: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yield a directory that replaces `target` when the block ends without an error.

    Args:
        target: the directory to publish. Its parent must exist.
        owned: names this program writes. Other entries of an existing `target` are the user's
            and are carried over.
        adopt: says whether what a killed process left can be continued; such a directory is
            yielded as it was left, any other is new and empty. With it, what an interruption
            (KeyboardInterrupt) or a full disk (OSError) leaves is kept as well, if it can be
            continued.
        retire: called with the directory that was replaced, once the new one is durable; what it
            does not move away is removed.

    Raises:
        OSError: as the system reports it; `target` is then as it was.
    """
    target = Path(os.path.realpath(target))  # a link to a larger disk stays a link
    aside = temporary(target)
    if not _adopt(target, aside, adopt):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    lock = None if adopt is None else _hold(aside)
    keep = False
    try:
        yield aside
        if target.is_dir():
            _carry_over(target, aside, owned)
        if adopt is not None:
            (aside / LOCK_NAME).unlink(missing_ok=True)
        sync_directory(aside)
        _swap(aside, target)
        if retire is not None and aside.is_dir():  # what was added since
            _carry_over(aside, target, owned, merge=True)
        sync_directory(target.parent)
        if retire is not None and aside.is_dir():
            retire(aside)
    except (KeyboardInterrupt, OSError):
        keep = adopt is not None and adopt(aside)
        raise
    finally:
        if not keep:
            shutil.rmtree(aside, ignore_errors=True)  # what failed, or what was there before
        if lock is not None:
            os.close(lock)


def temporary(target: Path) -> Path:
    """A hidden name beside `target` that is this process's; the next `clean_stale` removes it."""
    target = Path(os.path.realpath(target))
    return target.parent / f".{target.name}.tmp-{_me()}"


def clean_stale(target: Path) -> None:
    """Finish or remove what a killed process left beside `target`."""
    target = Path(os.path.realpath(target))
    restore(target)
    for stale in _leftovers(target):
        shutil.rmtree(stale, ignore_errors=True)


def _adopt(target: Path, aside: Path, adopt: Callable[[Path], bool] | None) -> bool:
    """Make the first leftover that can be continued this process's own; remove the others."""
    restore(target)
    is_adopted = False
    for stale in _leftovers(target):
        if adopt is None or is_adopted or not adopt(stale):
            shutil.rmtree(stale, ignore_errors=True)
        else:
            if stale != aside:
                os.rename(stale, aside)
            is_adopted = True
    return is_adopted


def restore(target: Path) -> None:
    """Put back what was under the name when a process died between its two renames."""
    for old in sorted(target.parent.glob(f".{glob.escape(target.name)}.old-*")):
        if target.exists():
            if not _may_live(old):
                shutil.rmtree(old, ignore_errors=True)
        elif not _may_live(old) or not _is_here(old.name):
            # Where a process of another machine lives on after all, its second rename fails and
            # the old state stays: nothing is lost.
            os.rename(old, target)


def _leftovers(target: Path) -> list[Path]:
    """Directories that dead processes of this machine left."""
    return [path for path in _staged_for(target) if not _may_live(path)]


def left_alone(target: Path) -> list[Path]:
    """Directories that other processes are filling, or may be: nobody continues or removes them."""
    return [path for path in _staged_for(Path(os.path.realpath(target))) if _may_live(path)]


def _staged_for(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.tmp-*"))


def _me() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _is_here(name: str) -> bool:
    """Whether a name was given on this machine; on a shared disk others write too."""
    pid = name.rsplit("-", 1)[1]
    mine = tuple(f".{kind}-{socket.gethostname()}-{pid}" for kind in ("tmp", "old"))
    return name.endswith((*mine, f".tmp-{pid}", f".old-{pid}"))  # without a host: an older name


def _may_live(path: Path) -> bool:
    """Whether the process that made a directory may still be there; another machine's always may.

    Its lock tells, if it has one: a number is given to the next process, a machine is renamed.
    """
    name = path.name
    is_held, boot = _look_at_lock(path)
    if is_held:
        return True
    if boot and (boot == _boot() or _is_here(name)):
        return False
    pid = name.rsplit("-", 1)[1]
    if not _is_here(name):
        return True
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _boot() -> bytes:
    try:
        return _BOOT.read_bytes().strip()
    except OSError:
        return b""


def _hold(folder: Path) -> int | None:
    """Lock a directory until the descriptor is closed or the process dies; None if that fails."""
    lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, _boot())  # only now: an empty file says nothing
    except OSError:
        os.close(lock)
        (folder / LOCK_NAME).unlink(missing_ok=True)
        return None
    return lock


def _look_at_lock(folder: Path) -> tuple[bool, bytes]:
    """Whether a directory's lock is held, and if not, in which boot it was; b"" if unknown."""
    try:
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False, b""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False, os.read(lock, 64)
    except BlockingIOError:
        return True, b""
    except OSError:  # a file system without locks
        return False, b""
    finally:
        os.close(lock)


def _carry_over(
    source: Path, destination: Path, owned: frozenset[str], merge: bool = False
) -> None:
    """Link what is not ours: no copy, and the same inode for whoever has it open.

    With `merge`, also into folders that are there already.
    """
    for entry in os.scandir(source):
        there = destination / entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        is_there = os.path.lexists(there) and not (merge and is_folder and there.is_dir())
        if entry.name in owned or is_there:
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), there)
        elif is_folder:
            there.mkdir(exist_ok=merge)
            _carry_over(Path(entry.path), there, frozenset(), merge)
        else:
            try:
                os.link(entry.path, there)
            except OSError:  # a file system without hard links
                shutil.copy2(entry.path, there)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is complete or absent: a temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    old = target.parent / f".{target.name}.old-{_me()}"
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
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
