"""Batches made ahead of time, in buffers that stay where they are, by a thread of the extension."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mypt_fast.data.reader import native_module

Array = NDArray[Any]
Allocate = Callable[[tuple[int, ...], DTypeLike], Array]
_ALIGNMENT = 64  # a cache line, and the widest vector


class Gate(Protocol):
    """What says that a device has done with a batch: torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether it has."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which samples the batches of a rank hold.

    Attributes:
        first: sample of the first batch.
        global_batch: samples a step, of all ranks.
        share: of them, the samples of this rank.
        rows: samples a batch; the last one of a step may have fewer.
    """

    first: int
    global_batch: int
    share: int
    rows: int


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Allocate an array that begins at a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    block = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    skip = -block.ctypes.data % _ALIGNMENT
    return block[skip : skip + size].view(dtype).reshape(shape)


class Prefetch:
    """A ring of slots that a worker fills in the order of a plan.

    A batch that was taken stays as it is until the next is taken; or, if a gate was put on it with
    `hold`, until that says so: a copy to a device may still be reading it.

    Args:
        reader: the extension's, of one corpus in one order.
        plan: which samples come.
        seq_len: tokens a row, T.
        narrow: batches are one array (rows, T + 1) of the corpus's own width, not two (rows, T) of
            int64.
        slots: batches in flight; what the device still reads and what waits are among them.
        allocate: makes an array of a shape and dtype, such as in page-locked memory.

    Attributes:
        next_rows: of the batch that is taken next.
    """

    def __init__(
        self,
        reader: Any,
        plan: Plan,
        seq_len: int,
        narrow: bool,
        slots: int,
        allocate: Allocate = aligned,
    ) -> None:
        module, problem = native_module()
        if module is None:
            raise RuntimeError(problem)
        rows = plan.rows
        kinds: list[tuple[int, DTypeLike]] = [(seq_len, np.int64), (seq_len, np.int64)]
        if narrow:
            kinds = [(seq_len + 1, np.uint16 if reader.width == 2 else np.uint32)]
        arrays = [tuple(allocate((rows, n), dtype) for n, dtype in kinds) for _ in range(slots)]
        self.plan, self.narrow = plan, narrow
        self._whole = arrays
        rest = plan.share % rows
        self._short = [tuple(a[:rest] for a in slot) for slot in arrays] if rest else arrays
        self._batches_a_step = -(-plan.share // rows)
        self._batch = 0  # within the step
        self._last_rows = rest or rows
        self.next_rows = rows if self._batches_a_step > 1 else self._last_rows
        self._lent: deque[Gate | None] = deque()
        self._ring = module.Ring(
            reader, plan.first, plan.global_batch, plan.share, rows, arrays, max(1, slots // 4)
        )

    def take(self) -> tuple[tuple[Array, ...], int]:
        """Return the arrays of the next batch and its largest token id; waits where it must.

        Raises:
            DataError, IntegrityError: what the worker met, after the batches before it.
        """
        lent, back = self._lent, 0
        while lent and ((gate := lent[0]) is None or gate.query()):
            lent.popleft()
            back += 1
        if len(lent) == len(self._whole) and (gate := lent.popleft()) is not None:
            gate.synchronize()
            back += 1
        slot, largest = self._ring.take(back)
        lent.append(None)
        self._batch = done = (self._batch + 1) % self._batches_a_step
        self.next_rows = self._last_rows if done + 1 == self._batches_a_step else self.plan.rows
        return (self._whole if done else self._short)[slot], largest

    def hold(self, gate: Gate) -> None:
        """Keep the batch taken last until `gate` opens."""
        self._lent[-1] = gate

    @property
    def waits(self) -> int:
        """How often a batch was not there yet."""
        return int(self._ring.waits)

    def close(self) -> None:
        """Wait for the device, then stop the worker."""
        for gate in self._lent:
            if gate is not None:
                gate.synchronize()
        self._lent.clear()
        self._ring = None
