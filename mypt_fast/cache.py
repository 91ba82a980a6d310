"""The user's cache folder: what was measured on this machine, and what was compiled for it."""

import os
import stat
from pathlib import Path

# by torch.compile and by Triton; read when they are imported
COMPILERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def folder() -> Path:
    """Where we keep things: below $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~"), ".cache")
    return base / "mypt_fast"


def keep_compiled() -> str | None:
    """Have what is compiled kept here, so that it outlives a reboot; not where the user said where.

    It is loaded and executed by later runs, so nobody else may be able to put anything there.

    Returns:
        Why it stays where torch and Triton put it, or None.
    """
    unset = [name for name in COMPILERS if name not in os.environ]
    if not unset or not hasattr(os, "getuid"):  # Windows: permissions are something else there
        return None
    kept = folder() / "compiled"
    try:
        _made(kept)
        kept = kept.resolve(strict=True)
        open_to = next((p for p in (kept, *kept.parents) if not _is_ours(p, p == kept)), None)
    except OSError as e:
        return f"{e.filename or kept}: {e.strerror or e}"
    if open_to is not None:
        return f"others can write in {open_to}; `chmod go-w` shuts it"
    for name in unset:
        os.environ[name] = str(kept / COMPILERS[name])
    return None


def _made(path: Path) -> None:
    """Make a folder and its parents, all of them ours alone, whatever the umask is."""
    if not path.is_dir():
        _made(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def _is_ours(path: Path, last: bool) -> bool:
    """Whether only we, or root, decide what a path of this name holds."""
    found = path.stat()
    if found.st_uid not in (os.getuid(), os.getuid() if last else 0):
        return False
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # in a directory like /tmp others may write, but not rename what is ours
    return not shared or (not last and bool(found.st_mode & stat.S_ISVTX))
