"""A caller's loader, an object with `get_batch(split)`, as the source of training batches.

Such a loader draws from the global generators of Python, NumPy and torch (MyPT specification 8.3),
so its position is their state, and its own where it can tell it. A batch is one micro-batch, drawn
when it is needed: between the dropout of two micro-batches, where MyPT draws it.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mypt_fast import console
from mypt_fast.data.document_loader import Loader
from mypt_fast.errors import DataError
from mypt_fast.training import device as devices

ALGORITHM = "get_batch/v1"
Inputs = dict[str, Any]


class MicroBatch(NamedTuple):
    """What one forward takes.

    Attributes:
        inputs: arguments of `GPT.summed_loss`.
        weight: what its summed loss is divided by.
        left: sequences of the step that are still to come.
    """

    inputs: Inputs
    weight: float | Tensor
    left: int


@dataclass(frozen=True)
class Generators:
    """The states of the global generators."""

    python: Any
    numpy: Any
    tensors: dict[str, Tensor]

    @classmethod
    def now(cls, device: torch.device) -> Generators:
        """Their states now."""
        return cls(random.getstate(), np.random.get_state(), devices.rng_state(device))

    def restore(self, device: torch.device) -> None:
        """Put them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        devices.set_rng_state(self.tensors, device)


def seed_all(seed: int) -> None:
    """Seed the global generators as MyPT does before an evaluation."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


class Borrowed:
    """A loader that belongs to the caller, with the positions that a trainer needs.

    One step takes `accum` batches, and its loss is the mean of their means, as MyPT's is: a token
    of a batch in which few count weighs more. Until the next one begins, a step can be undone: its
    batches are served again, each with the generators as they were after it was drawn.

    Args:
        loader: has `get_batch(split)`, giving (x, y), (x, y, mask) or (x, y, mask, segment_ids).
        batch_size: rows of a batch; a short one counts as many.
        accum: batches per step.
        device: of the model.
        name: of the data, as messages call it.

    Attributes:
        position: nominal rows in finished steps.
    """

    n_windows = sys.maxsize  # nobody can know

    def __init__(
        self,
        loader: Any,
        *,
        batch_size: int,
        accum: int,
        device: torch.device,
        name: str,
        position: int = 0,
    ) -> None:
        if not callable(getattr(loader, "get_batch", None)):
            raise DataError(
                f"{name} is no loader", f"{type(loader).__name__} has no get_batch(split)",
                "give an object with that method",
            )  # fmt: skip
        self.loader, self.name, self.fingerprint = loader, name, f"{ALGORITHM} of {name}"
        both = ("state_dict", "load_state_dict")
        self._tells = all(callable(getattr(loader, name, None)) for name in both)
        self._size, self._accum, self._device = batch_size, accum, device
        self._position = self._at = position  # `_at`: where the step of `_kept` begins
        self._kept: list[tuple[Inputs, Generators]] = []
        self._begin: tuple[Generators, Any] | None = None
        self._failed: tuple[Generators, Any] | None = None  # at the end of what was undone
        self._reached: tuple[int, Generators, Any] | None = None  # the end of what was left out
        self._is_open = self._again = False
        self._noted = False

    # a step

    def micro_batches(self, rows: int) -> Iterator[MicroBatch]:
        """The next step, at most `rows` rows at a time, none of them from two batches."""
        if not self._again:
            self._at, self._kept = self._position, []
            self._begin = (Generators.now(self._device), self._loader_state())
        self._again, self._is_open = False, True
        for number in range(self._accum):
            inputs = self._batch(number)
            weight = valid_targets(inputs).clamp(min=1.0) * self._accum
            later, size = (self._accum - 1 - number) * self._size, len(inputs["idx"])
            for first in range(0, size, rows):
                part = {k: v[first : first + rows] for k, v in inputs.items()}
                yield MicroBatch(part, weight, later + max(0, size - first - rows))
        self._position, self._is_open = self._at + self._size * self._accum, False

    def _batch(self, number: int) -> Inputs:
        if number < len(self._kept):  # of a step that was undone
            inputs, after = self._kept[number]
            after.restore(self._device)
            if number == len(self._kept) - 1 and self._failed:
                self._set_loader_state(self._failed[1])
            return inputs
        inputs = self.draw("train")
        self._kept.append((inputs, Generators.now(self._device)))
        return inputs

    def draw(self, split: str) -> Inputs:
        """Ask the loader for a batch; returns arguments of `GPT.summed_loss`.

        Raises:
            DataError: for what is no batch.
        """
        batch = self.loader.get_batch(split)
        names = ("idx", "targets", "loss_mask", "segment_ids")
        parts = tuple(batch) if isinstance(batch, (tuple, list)) else ()
        shapes = [tuple(getattr(part, "shape", ())) for part in parts if part is not None]
        if not 2 <= len(parts) <= 4 or len(set(shapes)) != 1 or len(shapes[0]) != 2:
            raise DataError(
                f"get_batch('{split}') of {self.name}",
                f"gave {type(batch).__name__} of shapes {shapes}",
                "give x, y and perhaps mask and segment_ids, each (batch, time)",
            )
        named = zip(names, parts, strict=False)
        inputs = {
            key: devices.moved(torch.as_tensor(v), self._device)
            for key, v in named
            if v is not None
        }
        if "loss_mask" in inputs:
            inputs["loss_mask"] = inputs["loss_mask"].float()
        for key in ("idx", "targets"):
            inputs[key] = inputs[key].long()
        return inputs

    # positions

    @property
    def position(self) -> int:
        """Nominal rows in finished steps."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        """Undo the step before, go past the one that was undone, or past batches never drawn."""
        step = self._size * self._accum
        if value == self._at and self._position == self._at + step and self._kept:
            self._go_back()
        elif value == self._at + step and self._again and self._failed:
            self._failed[0].restore(self._device)
            self._set_loader_state(self._failed[1])
            self._reached = (value, *self._failed)
            self._again, self._position = False, value
        elif self._reached and value == self._reached[0] != self._position:  # after a roll back
            self._reached[1].restore(self._device)
            self._set_loader_state(self._reached[2])
            self._position = value
        else:
            for _ in range(self._position, value, self._size):
                self.draw("train")
            self._position = value

    def rewind_step(self) -> None:
        """Undo what was drawn of an unfinished step."""
        if self._is_open:
            self._go_back()

    def _go_back(self) -> None:
        assert self._begin is not None
        self._failed = (Generators.now(self._device), self._loader_state())
        self._begin[0].restore(self._device)
        self._set_loader_state(self._begin[1])
        self._position, self._is_open, self._again = self._at, False, True

    # state

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the position, the generators beside torch's, and the loader's own state."""
        now = Generators.now(self._device)
        _, words, gauss = now.python
        kind, keys, *rest = now.numpy
        return {
            "algo": ALGORITHM,
            "fingerprint": self.fingerprint,
            "position": self._position,
            "python": [_text(np.asarray(words, "<u4")), gauss],
            "numpy": [kind, _text(np.asarray(keys, "<u4")), *rest],
            "loader": self._plain_loader_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`; raises ValueError, TypeError or KeyError for no state."""
        words, gauss = state["python"]
        kind, keys, *rest = state["numpy"]
        random.setstate((3, tuple(_numbers(words).tolist()), gauss))
        np.random.set_state((kind, _numbers(keys), *rest))
        try:
            self._set_loader_state(state["loader"])
        except DataError as e:
            console.notice(f"note: {e}; its order starts anew")
        self._position = self._at = int(state["position"])
        self._kept, self._again, self._is_open = [], False, False

    def close(self) -> None:
        """Keep it open: it is the caller's."""

    def _loader_state(self) -> Any:
        return copy.deepcopy(self.loader.state_dict()) if self._tells else None

    def _set_loader_state(self, state: Any) -> None:
        if state is not None and self._tells:
            self.loader.load_state_dict(copy.deepcopy(state))

    def _plain_loader_state(self) -> Any:
        state = self._loader_state()
        try:
            if json.loads(json.dumps(state)) == state:
                return state
        except (TypeError, ValueError):
            pass
        if not self._noted:
            console.notice(f"note: the state of {self.name} is not plain JSON: it is not saved")
            self._noted = True
        return None

    # reading without moving

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """A context after which nothing was drawn: generators and loader are as before it."""
        before, state = Generators.now(self._device), self._loader_state()
        try:
            yield
        finally:
            before.restore(self._device)
            self._set_loader_state(state)


def valid_targets(inputs: Inputs) -> Tensor:
    """How many targets count, weighted as they do: 0-dim fp32 on the batch's device."""
    mask = inputs.get("loss_mask")
    return ((inputs["targets"] != -100) if mask is None else mask).sum(dtype=torch.float32)


def _text(numbers: Any) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _numbers(text: str) -> Any:
    return np.frombuffer(base64.b64decode(text), "<u4")


Source = Loader | Borrowed
