"""Open everything a run needs: device, tokenizer, data, micro-batch. Training starts after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mypt_fast.config import GoldSelection
from mypt_fast.data.loader import TokenLoader
from mypt_fast.settings import Settings
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.training import attention_choice
from mypt_fast.training import device as devices
from mypt_fast.training.borrowed import Source
from mypt_fast.training.eval_prompts import read_prompts
from mypt_fast.training.memory import MemoryPlan, choose_plan, saved_plan
from mypt_fast.training.sources import DataOpener, Phase
from mypt_fast.training.utilisation import Ceilings


@dataclass(frozen=True)
class Choice:
    """Whether a run is compiled, and the start line's words for it."""

    compiled: bool
    words: str


@dataclass
class Run:
    """An opened run."""

    settings: Settings
    device: torch.device
    precision: devices.Precision
    tokenizer: Tokenizer
    phases: list[Phase]
    eval_sets: dict[str, Source]
    plan: MemoryPlan
    loader_note: str
    train_tokens: int
    val_tokens: int
    free_bytes: int
    notices: list[str] = field(default_factory=list)
    prompts: dict[str, list[int]] = field(default_factory=dict)  # token ids by name
    how_to_continue: str = ""  # what a run that was stopped tells
    ceilings: Ceilings = field(default_factory=Ceilings)
    choice: Choice | None = None  # of `compiling.choose`
    mypt_words: bool = False  # scripts that call fit read MyPT's lines, not ours
    attention: str | None = None  # the kernel tried first; None: as torch decides

    def close(self) -> None:
        """Let go of the data files."""
        _close(self.phases, self.eval_sets)

    def phase_at(self, step: int) -> Phase:
        """The phase that supplies the data of `step`."""
        for phase in self.phases:
            if phase.until is None or step < phase.until:
                return phase
        return self.phases[-1]


def gate_notice(settings: Settings) -> list[str]:
    """A line where gold waits for a gate that will not run."""
    rules = settings.train.gold_selection or GoldSelection()
    ext, strategy = rules.external_gate, rules.strategy
    needed = strategy != "val_loss" or (ext.enabled and ext.require_pass)
    then = f"; without its pass nothing becomes gold (strategy {strategy})" if needed else ""
    if ext.enabled and not settings.allow_gate:
        return [f"the external gate {ext.script} is not run: --allow_gate lets it{then}"]
    if needed and not ext.enabled:
        return [f"gold_selection.external_gate is not enabled{then}"]
    return []


def layout_notice(settings: Settings) -> str | None:
    """A line where a run goes on in another state layout than it was saved in."""
    plan, now = settings.saved_state.get("plan"), settings.train.state
    was = plan.get("state", "exact") if isinstance(plan, dict) else "exact"
    if not settings.resume or was == now:
        return None
    rounded = ", moments rounded to 8 bits" if now == "fast" else ""
    return f"state layout changes from {was} to {now}: weights as they were{rounded}"


def open_run(
    settings: Settings, progress: Callable[..., Any] | None = None, keeps: bool = True
) -> Run:
    """Open device, tokenizer and data, and choose how the run lies in memory.

    `settings` is completed on the way: vocabulary from the tokenizer, device, dataset.

    Args:
        settings: of the run.
        progress: shows how far a dataset that has to be prepared is.
        keeps: whether what is measured on the device is kept.

    Raises:
        DeviceError, DataError, ConfigError: one line each, before any weight is made.
    """
    cfg = settings.model
    notices: list[str] = []
    device, precision = _device(settings, notices)
    shape = attention_choice.Shape(
        device, precision.dtype, 1, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head,
        cfg.dropout,
    )  # fmt: skip
    attention_choice.check_typed(settings, shape)
    opener = DataOpener(settings, notices, progress, device)
    tokenizer, phases, train_tokens, val_tokens = opener.open()
    eval_sets: dict[str, Source] = {}
    try:
        eval_sets.update(opener.eval_sets(tokenizer))
        prompts = {}
        if settings.train.eval_prompts_file:
            prompts = read_prompts(settings.train.eval_prompts_file, tokenizer)
        notices += gate_notice(settings)
        # the vocabulary is known by now
        free = devices.free_bytes(device)
        plan = choose_plan(settings, device, precision, free, notices)
        settings.train.state = plan.state
        notices += [n for n in (layout_notice(settings),) if n]
        is_plain = all(isinstance(p.train, TokenLoader) for p in phases)
        attention = attention_choice.choose(
            settings, replace(shape, rows=plan.micro_batch), is_plain, notices, keeps
        )
    except BaseException:
        _close(phases, eval_sets)
        raise
    return Run(
        settings, device, precision, tokenizer, phases, eval_sets, plan, opener.loader_note,
        train_tokens, val_tokens, free, notices, prompts,
        how_to_continue=f"continue with `mypt-fast train --model_name {settings.model_name}`",
        attention=attention,
    )  # fmt: skip


def _device(settings: Settings, notices: list[str]) -> tuple[torch.device, devices.Precision]:
    """Where the run computes, and in what; raises DeviceError or ConfigError."""
    cfg, train, typed = settings.model, settings.train, settings.typed
    device, note = devices.pick(cfg.device, explicit="device" in typed)
    cfg.device = str(device) if device.index else device.type
    plan = settings.saved_state.get("plan")
    was_mixed = isinstance(plan, dict) and plan.get("precision") in ("bf16", "fp16")
    precision, amp_note = devices.precision(
        device, train.use_amp, train.amp_dtype, explicit="amp_dtype" in typed or was_mixed
    )
    if train.state == "auto":
        train.state = saved_plan(settings, device).get("state", "auto")
    train.state, precision, state_note = devices.for_state(train.state, precision, train.use_amp)
    devices.check_kernels(train.kernels, device, precision)
    notices += [n for n in (note, amp_note, state_note) if n]
    if "tf32" in typed and train.tf32 and not devices.has_tf32(device):
        notices.append(f"no TF32 on {devices.describe(device)}: fp32 matmuls stay fp32")
    return device, precision


def _close(phases: list[Phase], eval_sets: dict[str, Source]) -> None:
    for loader in (*eval_sets.values(), *(x for p in phases for x in (p.train, p.val))):
        loader.close()
