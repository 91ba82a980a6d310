"""Preparations that are killed at any event that changes the disk."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mypt_fast.data import prepare, shard_writer
from mypt_fast.data.prepare import PrepareOptions


def options(out: Path, inputs: tuple[str, ...], **more: Any) -> PrepareOptions:
    return PrepareOptions(out, inputs, **{"tokens_per_shard": 101, "workers": 1, **more})


EVENTS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (os, "unlink"),
    (shard_writer._ShardFile, "write"),
    (shard_writer.SplitWriter, "append"),
]


def count_events(patch: pytest.MonkeyPatch, on_event: Callable[[int], None]) -> None:
    """Call `on_event` with 1, 2, 3, ... before each thing that changes the disk."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            on_event(count)
            return original(*args, **kwargs)

        return call

    for where, name in EVENTS:
        patch.setattr(where, name, counted(getattr(where, name)))


def events_of(run: PrepareOptions) -> int:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        count_events(patch, seen.append)
        prepare.prepare(run)
    return seen[-1]


def killed_at(event: int, run: PrepareOptions) -> bool:
    """Run in a child that kills itself at an event; False if it came to the end before."""
    pid = os.fork()
    if pid == 0:

        def on_event(number: int) -> None:
            if number == event:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            count_events(pytest.MonkeyPatch(), on_event)
            prepare.prepare(run)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
