"""Losses and accuracies over fixed windows; reads no random number, moves no training state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mypt_fast import kernels
from mypt_fast.data.document_loader import Loader
from mypt_fast.model import GPT
from mypt_fast.training.feed import Put, model_inputs, to_device, valid_targets

_LOGITS = 1 << 25  # of an accuracy at a time: 128 MiB in fp32


@dataclass
class Measured:
    """What one pass over the windows of a set found.

    Attributes:
        loss: mean cross-entropy per valid token.
        windows: mean loss of each window, NaN where no token counts; empty unless asked for.
        accuracy: share of the valid tokens that the likeliest token hits; None unless asked for,
            and where none is valid.
        count: valid tokens the accuracy is of.
    """

    loss: float
    windows: list[float] = field(default_factory=list)
    accuracy: float | None = None
    count: int = 0


def mean_loss(
    model: GPT,
    loader: Loader,
    windows: int,
    rows: int,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> float:
    """The loss of `measure`, no more."""
    return measure(model, loader, windows, rows, device, between).loss


@torch.no_grad()
def measure(
    model: GPT,
    loader: Loader,
    windows: int,
    rows: int,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
    *,
    per_window: bool = False,
    accuracy: bool = False,
) -> Measured:
    """Measure the model on the loader's first `windows` samples.

    Args:
        model: left in the mode it came in.
        loader: its own corpus and seed; its position is not used.
        windows: how many; one epoch at most, so small sets are read once, not many times.
        rows: sequences per forward; changes no loss beyond rounding.
        device: of the model.
        between: called between batches; may raise to stop.
        per_window: also find the loss of each window.
        accuracy: also find the accuracy of the likeliest token. A target counts in it where its
            weight is not 0, whatever the weight.
    """
    windows = max(1, min(windows, loader.n_windows))
    total, tokens, hits, count = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    each: list[float] = []
    put = to_device(device)
    with evaluating(model):
        for first in range(0, windows, rows):
            between()
            batch = loader.read(first, min(rows, windows - first))
            tokens += valid_targets(batch)
            if not (per_window or accuracy):
                total += model.summed_loss(**model_inputs(batch, put)).double().cpu()
                continue
            weights = _weights(batch, put).to(device)
            losses, hit, valid = token_losses(model, model_inputs(batch, put), weights, accuracy)
            sums = losses.double().sum(1).cpu()
            total += sums.sum()
            each += (
                (sums / weights.double().sum(1).cpu()).tolist() if per_window else []
            )  # 0 / 0 is NaN
            hits, count = hits + hit, count + valid
    share = hits / count if accuracy and count else None
    return Measured(float(total / max(tokens, 1.0)), each, share, count)


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode, and the mode it came in afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _weights(batch: tuple[Any, ...], put: Put) -> Tensor:
    """How much each target counts, (B, T)."""
    _, y, *more = batch
    return put(more[0].loss_mask) if more else torch.ones(y.shape)


def token_losses(
    model: GPT, inputs: dict[str, Any], weights: Tensor, accuracy: bool
) -> tuple[Tensor, int, int]:
    """Weighted losses of single tokens, (B, T), with hits and valid targets of the batch.

    Args:
        model: in evaluation mode.
        inputs: `idx`, `targets` and perhaps `documents`, as `GPT.summed_loss` takes them.
        weights: (B, T) of each target.
        accuracy: count hits and valid targets; 0 and 0 otherwise.
    """
    targets, head = inputs["targets"].flatten(), model.lm_head
    x = model.hidden(inputs["idx"], inputs.get("documents")).flatten(0, 1)
    losses = kernels.linear_cross_entropy(
        x, head.weight, head.bias, targets, reduction="none", impl=model.impl
    )
    flat = weights.flatten()
    hits = valid = 0
    if accuracy:
        counts = (flat != 0) & (targets != -100)
        step = max(1, _LOGITS // model.config.vocab_size)
        for rows, target, counted in zip(
            x.split(step), targets.split(step), counts.split(step), strict=True
        ):
            hits += int(((head(rows).argmax(-1) == target) & counted).sum())
        valid = int(counts.sum())
    return (losses.float() * flat).view(inputs["idx"].shape), hits, valid
