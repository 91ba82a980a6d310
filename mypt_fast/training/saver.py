"""Saves beside the training: a copy of the state is made between two steps, a thread writes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mypt_fast import accounting
from mypt_fast.settings import Settings
from mypt_fast.training import device as devices
from mypt_fast.training.memory import MEMORY_SHARE

STATE_BYTES = 12  # a parameter: fp32 weight and two moments
HOST_SHARE = 0.5  # of free memory, where training has another


class Snapshot:
    """A copy of a run's tensors, in memory that is used again by the next one.

    On a GPU the copies run beside the next forward and backward; only what changes the tensors
    has to wait for them.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._room: dict[str, Tensor] = {}
        self._copies: dict[Any, Tensor] = {}  # of this snapshot, so that shared memory stays so
        self._copied: Any = None  # a torch.cuda.Event
        self._stream: Any = None

    def take(self, content: Any) -> Any:
        """Copy nested dicts and lists with every tensor in them to the CPU.

        What was taken before changes: whoever reads it must be done.
        """
        self._copies = {}
        if self.device.type != "cuda":
            return self._copy(content, "")
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            copy = self._copy(content, "")
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        return copy

    def hold_device(self) -> None:
        """Make the device's next work wait until the tensors are copied; returns at once."""
        if self._copied is not None:
            self._copied.wait(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Wait until the copies are whole; for the thread that writes them."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, content: Any, name: str) -> Any:
        if isinstance(content, Tensor):
            return self._copy_tensor(content.detach(), name)
        if isinstance(content, dict):
            return {k: self._copy(v, f"{name}/{k}") for k, v in content.items()}
        if isinstance(content, list | tuple):
            return type(content)(self._copy(v, f"{name}/{i}") for i, v in enumerate(content))
        return content

    def _copy_tensor(self, tensor: Tensor, name: str) -> Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if key in self._copies:
            return self._copies[key]
        room = self._room.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            # from page-locked memory a GPU copies without its owner waiting
            pinned = tensor.device.type == "cuda"
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._room[name] = room
        self._copies[key] = room.copy_(tensor, non_blocking=True)
        return room


class Saver:
    """Runs saves one after another, in a thread, or at once.

    Args:
        beside: whether there is a thread.
    """

    def __init__(self, beside: bool) -> None:
        self.beside = beside
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: deque[tuple[Any, Future[None]]] = deque()

    def run(self, name: Any, job: Callable[[], None]) -> None:
        """Run a job, or leave it to the thread; its error comes out of `finished`."""
        if self.beside:
            self._thread = self._thread or ThreadPoolExecutor(1, "mypt-fast-save")
            self._jobs.append((name, self._thread.submit(job)))
            return
        try:
            job()
        except Exception as e:
            self.fail(name, e)
        else:
            self._jobs.append((name, _ended(None)))

    def fail(self, name: Any, error: Exception) -> None:
        """Note a job that could not even be tried."""
        self._jobs.append((name, _ended(error)))

    def finished(self) -> list[tuple[Any, BaseException | None]]:
        """What has ended since the last call, in order: names, and errors or None."""
        ended = []
        while self._jobs and self._jobs[0][1].done():
            name, job = self._jobs.popleft()
            ended.append((name, job.exception()))
        return ended

    def wait(self) -> None:
        """Wait until every job has ended."""
        for _, job in self._jobs:
            job.exception()

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _ended(error: Exception | None) -> Future[None]:
    done: Future[None] = Future()
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
    return done


def saves_beside(settings: Settings, device: torch.device) -> bool:
    """Whether saves run beside the training: as asked, or where memory has room for the copy.

    The memory that a CPU trains in is planned but for a share; the copy has to fit in that.
    """
    if settings.train.async_save != "auto":
        return settings.train.async_save == "on"
    share = HOST_SHARE if device.type == "cuda" else 1 - MEMORY_SHARE
    needed = STATE_BYTES * accounting.count_parameters(settings.model).total
    return needed <= share * devices.free_bytes(torch.device("cpu"))
