"""Whether the disk has room for a run's saves; asked before the run begins."""

from __future__ import annotations

import os

import torch

from mypt_fast import accounting, console
from mypt_fast.checkpoint import bundle as bundles
from mypt_fast.errors import CheckpointError
from mypt_fast.settings import Settings


def save_bytes(settings: Settings) -> int:
    """Bytes of one save of the run directory: weights, two moments, exact weights if rounded."""
    total = accounting.count_parameters(settings.model).total
    dtype = settings.model.save_dtype
    weights = 4 if bundles.DTYPES[dtype or "fp32"] is torch.float32 else 2 + 4
    return total * (weights + 8) + (1 << 20)  # JSON, archive heads


def check_space(settings: Settings) -> str | None:
    """Refuse a run whose first save would not fit; returns a notice where the rest may not.

    A save is written aside before the old one is removed, so that each needs its own bytes.

    Raises:
        CheckpointError: before hours are spent.
    """
    folder = settings.run_dir.parent
    try:
        disk = os.statvfs(folder if folder.is_dir() else ".")
    except OSError:
        return None
    free, one = disk.f_bavail * disk.f_frsize, save_bytes(settings)
    if not disk.f_blocks:  # a file system that does not say
        return None
    text = f"{folder} has {console.bytes_text(free)} free"
    if free < one:
        raise CheckpointError(
            f"the first save needs {console.bytes_text(one)}", text,
            "free some space, or make checkpoints/ a link to a larger disk",
        )  # fmt: skip
    copies = 1 if settings.resume else 3 + settings.train.keep_last  # run, gold, one being written
    if free < one * copies:
        need = console.bytes_text(one * copies)
        return f"{text}; run, gold and {settings.train.keep_last} older states may take {need}"
    return None
