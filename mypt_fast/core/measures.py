"""MyPT's two measurements over any loader that has `get_batch(split)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mypt_fast.core.errors import SettingError
from mypt_fast.training.evaluate import evaluating

if TYPE_CHECKING:
    from mypt_fast.core.model import GPT

LOGITS = 1 << 25  # at a time: 128 MiB in fp32
Batch = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def parts(batch: Any, device: torch.device) -> Batch:
    """Split a loader's batch of 2, 3 or 4 tensors into x, y, mask and segment ids, on `device`.

    Raises:
        SettingError: (a ValueError) for another number of them.
    """
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 4:
        found = len(batch) if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise SettingError("get_batch returns (x, y[, mask[, segment_ids]])", f"found {found}")
    x, y, mask, segments = (*batch, None, None)[:4]
    placed = (t if t is None else t.to(device) for t in (mask, segments))
    return x.to(device), y.to(device), *placed


def mean_loss(model: GPT, batch: Batch) -> Tensor:
    """The loss of `GPT.forward`, 0-dim fp32, without its logits."""
    x, y, mask, segments = batch
    total = model.summed_loss(x, y, mask, segments)
    if mask is None:
        return total / (y != -100).sum()
    return total / mask.float().sum().clamp(min=1.0)


@torch.no_grad()
def losses(model: GPT, loader: Any, eval_iters: int, splits: Sequence[str]) -> dict[str, Tensor]:
    """As `GPT.estimate_loss`."""
    device, found = model.lm_head.weight.device, {}
    model.eval()
    try:
        for split in splits:
            each = torch.zeros(eval_iters)
            for i in range(eval_iters):
                each[i] = mean_loss(model, parts(loader.get_batch(split), device))
            found[split] = each.mean()
    finally:
        model.train()
    return found


@torch.no_grad()
def accuracies(
    model: GPT, loader: Any, eval_iters: int, splits: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """As `GPT.estimate_masked_token_accuracy`."""
    device, found = model.lm_head.weight.device, {}
    with evaluating(model):
        for split in splits:
            hits = count = 0
            for _ in range(eval_iters):
                batch = parts(loader.get_batch(split), device)
                if batch[2] is None:  # no further batch is taken from training for nothing
                    break
                hit, counted = _hits(model, batch)
                hits, count = hits + hit, count + counted
            found[split] = {"acc": hits / count if count else None, "count": count}
    return found


def _hits(model: GPT, batch: Batch) -> tuple[int, int]:
    """How many of the targets with a mask the likeliest token hits, and how many there are."""
    x, y, mask, segments = batch
    assert mask is not None
    hidden = model.hidden(x, model.documents(segments)).flatten(0, 1)
    counts = mask.flatten() != 0
    rows, targets = hidden[counts], y.flatten()[counts]
    step = max(1, LOGITS // model.config.vocab_size)
    hits = sum(
        int((model.lm_head(part).argmax(-1) == target).sum())
        for part, target in zip(rows.split(step), targets.split(step), strict=True)
    )
    return hits, len(targets)
