"""Mean loss over fixed windows; reads no random number and moves no training state."""

from collections.abc import Callable

import torch

from mypt_fast.data.document_loader import Loader
from mypt_fast.model import GPT
from mypt_fast.training.feed import model_inputs, to_device, valid_targets


@torch.no_grad()
def mean_loss(
    model: GPT,
    loader: Loader,
    windows: int,
    rows: int,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross-entropy per valid token over the loader's first `windows` samples.

    Args:
        model: left in the mode it came in.
        loader: its own corpus and seed; its position is not used.
        windows: how many; one epoch at most, so small sets are read once, not many times.
        rows: sequences per forward; changes no loss beyond rounding.
        device: of the model.
        between: called between batches; may raise to stop.
    """
    windows = max(1, min(windows, loader.n_windows))
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0.0
    put = to_device(device)
    try:
        for first in range(0, windows, rows):
            between()
            batch = loader.read(first, min(rows, windows - first))
            total += model(**model_inputs(batch, put)).double().cpu()
            tokens += valid_targets(batch)
    finally:
        model.train(was_training)
    return float(total / max(tokens, 1.0))
