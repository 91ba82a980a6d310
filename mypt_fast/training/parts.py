"""What a trainer moves: made from settings or from its last checkpoint, or a caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mypt_fast.checkpoint.bundle import check_writable
from mypt_fast.model import GPT
from mypt_fast.settings import Settings
from mypt_fast.training import init_from
from mypt_fast.training.events import EventLog
from mypt_fast.training.optim import freeze, make_optimizer
from mypt_fast.training.run import Run
from mypt_fast.training.selection import Selection
from mypt_fast.training.store import Store


@dataclass
class Parts:
    """Model, optimizer and what records them; the trainer does not ask where they come from."""

    log: EventLog
    store: Store
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    selection: Callable[[Run, Store, Callable[[], None]], Selection] = Selection

    def __post_init__(self) -> None:
        self.store.model, self.store.optimizer = self.model, self.optimizer
        self.store.scaler = self.scaler


def make(run: Run) -> Parts:
    """Make a run's model and optimizer, or restore them from its directory.

    Raises:
        CheckpointError, IntegrityError: if the run directory cannot be read or written.
    """
    settings, train_cfg = run.settings, run.settings.train
    check_writable(settings.run_dir)
    log = EventLog(log_path(settings))
    store = Store(run, log)
    saved = store.read()
    seed = None if saved or settings.init_dir else train_cfg.seed
    model = store.model = GPT(settings.model, seed, train_cfg.kernels, run.plan.recompute)
    model.residual = torch.bfloat16 if run.plan.residual == "bf16" else None
    model.chunk_rows = run.plan.chunk_rows
    if saved is not None:
        store.restore_weights(saved)
    elif settings.init_dir:
        init_from.fill(model, settings.init_dir, train_cfg.seed)
    model.to(run.device).train()
    freeze(model, train_cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision.scaler)
    parts = Parts(log, store, model, make_optimizer(model, train_cfg), scaler)
    torch.manual_seed(train_cfg.seed)  # dropout; weights and data have their own
    if saved is not None:
        store.restore(saved)
    else:
        store.start_anew()
    return parts


def log_path(settings: Settings) -> Path:
    """The JSONL log of a run: as set, else logs/train/<model_name>_eval.jsonl."""
    default = Path("logs") / "train" / f"{settings.model_name}_eval.jsonl"
    return Path(settings.train.log_file) if settings.train.log_file else default
