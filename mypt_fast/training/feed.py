"""From what a loader reads to what the model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from mypt_fast.attention import Segments
from mypt_fast.data.document_loader import Loader
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.packing import Documents
from mypt_fast.training.borrowed import Borrowed, MicroBatch, Source
from mypt_fast.training.device import moved

Put = Callable[[NDArray[Any]], Tensor]


def model_inputs(batch: tuple[Any, ...], put: Put) -> dict[str, Any]:
    """Arguments of `GPT.forward` for a batch.

    Args:
        batch: x and y, and the documents where the loader knows them.
        put: moves an array to the model's device.
    """
    x, y, *more = batch
    inputs: dict[str, Any] = {"idx": put(x), "targets": put(y)}
    for documents in more:
        if len(documents.cu_seqlens):  # else rows are whole, and only weighed
            inputs["documents"] = segments(documents, put)
        inputs["loss_mask"] = put(documents.loss_mask)
    return inputs


def segments(documents: Documents, put: Put) -> Segments:
    """The documents of a batch, as attention takes them."""
    lengths = tuple(np.diff(documents.cu_seqlens).tolist())
    return Segments(put(documents.cu_seqlens), put(documents.position_ids), lengths)


def valid_targets(batch: tuple[Any, ...]) -> float:
    """Targets of a batch that count in its loss, weighted as they do."""
    _, y, *more = batch
    return float(more[0].loss_mask.sum(dtype=np.float64)) if more else y.size


def step_weight(loader: Loader, tokens_per_step: int) -> float:
    """What the summed loss of the loader's current step is divided by: its valid tokens.

    A step without any has loss 0, not NaN.
    """
    if not isinstance(loader, TokenLoader):
        return max(loader.step_weight(), 1.0)
    return tokens_per_step


def micro_batches(
    loader: Source, rows: int, global_batch: int, tokens_per_step: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Read the next step, at most `rows` sequences at a time."""
    if isinstance(loader, Borrowed):
        yield from loader.micro_batches(rows)
        return
    # of the whole step, known before its first token: accumulation never changes the objective
    weight, left = step_weight(loader, tokens_per_step), global_batch
    while left:
        inputs = next_inputs(loader, min(rows, left), device)
        left -= len(inputs["idx"])
        yield MicroBatch(inputs, weight, left)


def next_inputs(loader: Loader, rows: int, device: torch.device) -> dict[str, Any]:
    """Read the next rows and bring them to `device`, as arguments of `GPT.forward`.

    A GPU gets plain windows as they lie in the shards, two bytes a token, by a copy that nothing
    waits for, and widens them itself; the loader keeps the batch until the copy is done.
    """
    if device.type != "cuda" or not isinstance(loader, TokenLoader):
        return model_inputs(loader.next(rows), to_device(device))
    inputs = widened(
        torch.from_numpy(signed(loader.next_windows(rows))).to(device, non_blocking=True)
    )
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(device))
    loader.hold(copied)
    return inputs


def signed(windows: NDArray[Any]) -> NDArray[Any]:
    """The same bytes as signed integers: torch does little with unsigned ones."""
    return windows.view(f"i{windows.itemsize}")


def widened(windows: Tensor) -> dict[str, Tensor]:
    """Inputs and targets, (B, T) int64, of `signed` windows (B, T + 1)."""
    bits = 8 * windows.element_size()
    tokens = windows.long() & ((1 << bits) - 1)
    return {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def pinned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in page-locked memory, from which a GPU copies without the CPU."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(kind).reshape(shape)


def to_device(device: torch.device) -> Put:
    """A `put`; the array may change once it returns, and nothing waits for a GPU."""
    return lambda array: moved(torch.from_numpy(array), device)
