"""Open everything a run needs: device, tokenizer, data, micro-batch. Training starts after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mypt_fast.data.document_loader import Loader
from mypt_fast.settings import Settings
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.training import device as devices
from mypt_fast.training.memory import choose_micro_batch
from mypt_fast.training.sources import DataOpener, Phase


@dataclass
class Run:
    """An opened run."""

    settings: Settings
    device: torch.device
    precision: devices.Precision
    tokenizer: Tokenizer
    phases: list[Phase]
    eval_sets: dict[str, Loader]
    micro_batch: int
    loader_note: str
    train_tokens: int
    val_tokens: int
    free_bytes: int
    notices: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Let go of the data files."""
        loaders = [*self.eval_sets.values(), *(x for p in self.phases for x in (p.train, p.val))]
        for loader in loaders:
            loader.close()

    def phase_at(self, step: int) -> Phase:
        """The phase that supplies the data of `step`."""
        for phase in self.phases:
            if phase.until is None or step < phase.until:
                return phase
        return self.phases[-1]


def not_done(settings: Settings) -> list[str]:
    """Settings that are understood and saved, but do nothing in this version: one line each."""
    notices = []
    if settings.model.use_loss_mask:
        notices.append("use_loss_mask: masks stored with the data count under --documents mask")
    gold = settings.train.gold_selection
    if gold and (gold.strategy != "val_loss" or gold.external_gate.enabled):
        notices.append("gold_selection: external gates are not run yet; gold follows val_loss")
    return notices


def open_run(settings: Settings, progress: Callable[..., Any] | None = None) -> Run:
    """Open device, tokenizer and data, and choose the micro-batch.

    `settings` is completed on the way: vocabulary from the tokenizer, device, dataset.

    Raises:
        DeviceError, DataError, ConfigError: one line each, before any weight is made.
    """
    cfg, typed = settings.model, settings.typed
    device, note = devices.pick(cfg.device, explicit="device" in typed)
    cfg.device = str(device) if device.index else device.type
    plan = settings.saved_state.get("plan")
    was_mixed = isinstance(plan, dict) and plan.get("precision") in ("bf16", "fp16")
    precision, amp_note = devices.precision(
        device,
        settings.train.use_amp,
        settings.train.amp_dtype,
        explicit="amp_dtype" in typed or was_mixed,
    )
    devices.check_kernels(settings.train.kernels, device, precision)
    notices = [n for n in (note, amp_note) if n]
    opener = DataOpener(settings, notices, progress, device)
    tokenizer, phases, train_tokens, val_tokens = opener.open()
    eval_sets = opener.eval_sets(tokenizer)
    notices += not_done(settings)
    free = devices.free_bytes(device)
    return Run(
        settings=settings,
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        phases=phases,
        eval_sets=eval_sets,
        micro_batch=choose_micro_batch(settings, precision, free, notices),
        loader_note=opener.loader_note,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        free_bytes=free,
        notices=notices,
    )
