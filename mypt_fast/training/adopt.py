"""A caller's model and optimizer as the parts of a trainer, moved in place."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mypt_fast import console
from mypt_fast.checkpoint import bundle as bundles
from mypt_fast.checkpoint.bundle import check_writable
from mypt_fast.checkpoint.tensors import tensor_entries
from mypt_fast.config import TrainConfig
from mypt_fast.errors import DivergedError, IntegrityError
from mypt_fast.kernels import rope_tables
from mypt_fast.model import GPT
from mypt_fast.training.borrowed_selection import BorrowedSelection
from mypt_fast.training.events import EventLog, NoLog
from mypt_fast.training.gold import from_selection_file
from mypt_fast.training.memory import saved_plan
from mypt_fast.training.parts import Parts
from mypt_fast.training.run import Run
from mypt_fast.training.schedule import learning_rate
from mypt_fast.training.store import Store


class NoStore(Store):
    """The store of a run that keeps nothing."""

    keeps = False

    def save(self, step: int) -> None:
        """Save nothing."""

    def save_gold(self, step: int) -> None:
        """Save nothing."""

    def save_final(self, step: int) -> Path | None:
        """Save nothing."""
        return None

    def roll_back(self) -> int:
        """Raise DivergedError: there is nothing to go back to."""
        raise DivergedError(
            "the run cannot go back", "it saves no checkpoints", "give fit a checkpoint_dir"
        )


def adopt(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    run: Run,
    *,
    keeps: bool,
    save_dtype: str | None,
    final_dtype: str | None,
    eval_seed: int | None,
) -> Parts:
    """Make a trainer's parts of what a caller has.

    Args:
        model: on its device; its weights become fp32.
        optimizer: of its parameters; its moments become fp32.
        run: with the caller's loaders as phases.
        keeps: whether anything is saved.
        save_dtype: of saved weights; the exact ones are in optimizer.pt.
        final_dtype: of the copy without optimizer; None: no copy.
        eval_seed: of the evaluations, None where the caller gave none.

    Raises:
        CheckpointError: if the run directory or the log cannot be written.
    """
    if keeps:
        check_writable(run.settings.run_dir)
    log = EventLog(Path(run.settings.train.log_file)) if run.settings.train.log_file else NoLog()
    store = Store(run, log) if keeps else NoStore(run, log)
    store.save_dtype, store.final_dtype = save_dtype, final_dtype
    lowered = make_fp32(model, optimizer)
    if lowered:
        console.notice(f"note: weights came in {lowered}; training keeps them in fp32")
    optimizer.zero_grad(set_to_none=True)
    model.train()
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision.scaler)
    return Parts(
        log, store, model, optimizer, scaler, functools.partial(BorrowedSelection, seed=eval_seed)
    )


@torch.no_grad()
def make_fp32(model: GPT, optimizer: torch.optim.Optimizer) -> str:
    """Widen weights and moments in place; returns the dtype that some weights came in, or ''.

    A step of a small learning rate is less than half a unit of a bf16 weight: it would not move.
    """
    found = ""
    for p in model.parameters():
        if p.is_floating_point() and p.dtype is not torch.float32:
            found = str(p.dtype).removeprefix("torch.")
            p.grad = None
            p.data = p.data.float()
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                state[name] = value.float()
    cfg = model.config
    if cfg.pos_encoding == "rope" and model.rope_cos.dtype is not torch.float32:
        tables = rope_tables(
            cfg.block_size, cfg.n_embd // cfg.n_head, cfg.rope_theta, cfg.rope_scale
        )
        model.rope_cos, model.rope_sin = (t.to(p.device) for t in tables)
    return found


def go_on(run: Run, parts: Parts, start_step: int, peak_given: bool) -> None:
    """Continue the run that saved the weights the caller loaded; one line says so.

    Where the directory holds them, at that step, random numbers, data position, gold and log are
    restored from it, and weights that were rounded on their way become the exact ones. Other
    weights are another run: nothing of the directory's state is theirs.

    Args:
        run: of the caller's loaders.
        parts: as `adopt` made them.
        start_step: of the caller.
        peak_given: whether the caller named a learning rate. The optimizer's own, once it is
            restored, is what the schedule had come to: the peak is the saved run's.

    Raises:
        IntegrityError: if the state is not as it was written.
    """
    store, path = parts.store, run.settings.run_dir
    store.start_step = start_step
    if not store.keeps:
        return
    if not bundles.exists(path):
        if not start_step:
            store.start_anew()
        return
    info = bundles.read_info(path)
    state, manifest = info.get("training_state", {}), info.get("manifest")
    if state.get("step") != start_step:
        if start_step:
            console.notice(f"note: {path} is at step {state.get('step')}, not {start_step}")
        return
    if manifest is None or "data" not in manifest:
        if start_step:  # MyPT's own: it keeps no more than this, and never reads it
            store.progress.gold = from_selection_file(info.get("gold_selection_state"))
        return
    if not _holds(manifest, parts.model):
        if start_step:
            console.notice(f"note: {path} holds other weights than these: its state is not used")
        return
    _make_exact(path, manifest, parts.model)
    run.settings.saved_state = state
    if not peak_given:
        now = parts.optimizer.param_groups[0]["lr"]
        run.settings.train.learning_rate = _peak(state, start_step, now)
    run.plan.micro_batch = saved_plan(run.settings, run.device).get(
        "micro_batch", run.plan.micro_batch
    )
    try:
        store.restore_state({**manifest, "data": _by_phase(run, manifest["data"])})
    except (KeyError, TypeError, ValueError) as e:
        raise IntegrityError(
            f"{path}/manifest.json cannot be used", f"{type(e).__name__}: {e}",
            "delete it to continue without RNG, data position and gold state",
        ) from e  # fmt: skip
    console.say(
        f"continuing {path} at step {start_step}: random numbers, data position, gold and log "
        "are restored"
    )


def _holds(manifest: Mapping[str, Any], model: GPT) -> bool:
    """Whether model.pt was written from these weights, or from those they were rounded from."""
    saved = manifest.get("tensors", {}).get("model.pt", {})
    weights = model.state_dict()
    if not weights.keys() <= saved.keys():
        return False
    for name, value in weights.items():
        dtype = getattr(torch, str(saved[name].get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            return False
        if tensor_entries({name: value.to(dtype)})[name] != saved[name]:
            return False
    return True


@torch.no_grad()
def _make_exact(path: Path, manifest: Mapping[str, Any], model: GPT) -> None:
    """Load the exact weights behind a rounded model.pt, if it is the rounded ones that are here."""
    saved, weights = manifest["tensors"]["model.pt"], model.state_dict()
    for name, value in weights.items():
        dtype = getattr(torch, saved[name]["dtype"])
        if dtype is torch.float32 or not torch.equal(value, value.to(dtype).float()):
            return
    exact = bundles.read(path, walk_back=False).state_dict
    for name, value in weights.items():
        value.copy_(exact[name])


def _peak(state: Mapping[str, Any], step: int, now: float) -> float:
    """The saved run's peak learning rate, if `now` is what its schedule gave before `step`."""
    saved = state.get("training_config") or {}
    try:
        cfg = TrainConfig(
            learning_rate=float(saved["learning_rate"]), max_iters=int(saved["max_iters"]),
            warmup_iters=saved["warmup_iters"],
        )  # fmt: skip
        before = learning_rate(step - 1, cfg) if step else now
    except (KeyError, TypeError, ValueError):
        return now
    return cfg.learning_rate if math.isclose(before, now) else now


def _by_phase(run: Run, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved states in the order of these phases: a caller names only those still to come."""
    named = {entry.get("phase"): entry for entry in reversed(saved)}
    placed = {entry.get("source"): entry for entry in reversed(saved)}
    return [named.get(p.name) or placed.get(p.source) or {} for p in run.phases]
