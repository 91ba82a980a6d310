"""From what a loader reads to what the model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mypt_fast.attention import Segments
from mypt_fast.data.document_loader import DocumentLoader, Loader
from mypt_fast.data.packing import Documents

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
    if isinstance(loader, DocumentLoader):
        return max(loader.step_weight(), 1.0)
    return tokens_per_step


def to_device(device: torch.device) -> Put:
    """A `put` that copies at once."""
    return lambda array: torch.from_numpy(array).to(device)
