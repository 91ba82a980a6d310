"""How a run lies in memory: state layout, recompute policy, micro-batch, chunk of logits.

On a GPU the planner chooses what the user and the saved run leave open; tokens per step never
change. On a CPU the largest micro-batch that fits is taken.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from mypt_fast import accounting, console
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import advice, cards, ceiling, search, step, table
from mypt_fast.planner.operators import Setup
from mypt_fast.settings import Settings
from mypt_fast.training import device as devices

MEMORY_SHARE = 0.9  # of what is free: the estimate is not exact, and others use the machine


@dataclass
class MemoryPlan:
    """What was chosen.

    Attributes:
        micro_batch: sequences per forward.
        recompute: policy of `recompute.POLICIES`.
        state: layout of `training/optim.py`.
        chunk_rows: rows of logits at a time, 0 where the head chooses.
        predicted: the peak of a step, None where nobody predicted it.
    """

    micro_batch: int
    recompute: str = "none"
    state: str = "exact"
    chunk_rows: int = 0
    predicted: step.Peak | None = None


def choose_plan(
    settings: Settings,
    device: torch.device,
    precision: devices.Precision,
    free: int,
    notices: list[str],
) -> MemoryPlan:
    """What the user typed, else what the saved run had, else what fits and is fastest.

    Args:
        settings: of the run; not changed.
        device: it trains on.
        precision: of its matmuls.
        free: bytes that it may use.
        notices: a line is added where something unasked has a price.

    Raises:
        ConfigError: for what cannot run here, and on a GPU for a model that cannot fit: before
            anything is allocated, with the smallest change that would.
    """
    wanted = settings.train.micro_batch_size
    if wanted > settings.global_batch:
        raise ConfigError(
            "micro_batch_size is larger than the global batch",
            f"found {wanted} > {settings.global_batch}",
        )
    fixed = _fixed(settings)
    check_policy(fixed.get("recompute", "none"), device, settings)
    if device.type == "cuda" and settings.train.plan == "auto":
        return _planned(settings, fixed, device, precision, free, notices)
    return _plain(settings, fixed, device, precision, free, notices)


def check_policy(policy: str, device: torch.device, settings: Settings) -> None:
    """Raise ConfigError for a recompute policy that cannot run here."""
    if policy == "offload" and device.type == "cpu":
        raise ConfigError(
            "--recompute offload keeps residuals in host memory",
            "found a CPU, which computes there already", "use --recompute block",
        )  # fmt: skip
    if policy in _operators_policies() and settings.train.kernels == "inductor":
        raise ConfigError(
            f"--recompute {policy} is done by operators that torch.compile does not look into",
            "found --kernels inductor", "drop one of the two",
        )  # fmt: skip
    if policy in _operators_policies() and settings.model.per_head_era:
        raise ConfigError(
            f"--recompute {policy} knows GELU and SwiGLU", "found the ReLU of older checkpoints",
            "use --recompute block",
        )  # fmt: skip
    typed = {"use_checkpoint", "recompute"} <= settings.typed and settings.model.use_checkpoint
    if typed and policy not in ("block", "offload"):
        raise ConfigError(
            "--use_checkpoint is --recompute block", f"found --recompute {policy} beside it",
            "drop one of the two",
        )  # fmt: skip


def _operators_policies() -> list[str]:
    return [name for name, policy in table.POLICIES.items() if policy.norms]


def saved_plan(settings: Settings) -> dict[str, Any]:
    """What the saved run was trained with, if it is for the same global batch.

    Another split would draw dropout in another order. Values that no run has are left out.
    """
    plan = settings.saved_state.get("plan")
    if not isinstance(plan, dict) or plan.get("global_batch") != settings.global_batch:
        return {}
    found: dict[str, Any] = {}
    rows, chunk = plan.get("micro_batch_size"), plan.get("chunk_rows", 0)
    if isinstance(rows, int) and 0 < rows <= settings.global_batch:
        found["micro_batch"] = rows
    if isinstance(chunk, int) and chunk >= 0:
        found["chunk_rows"] = chunk
    # absent in older bundles
    state, policy = plan.get("state", "exact"), plan.get("recompute")
    policy = policy or ("block" if plan.get("use_checkpoint") is True else "none")
    if state in table.SEARCHED_LAYOUTS:
        found["state"] = state
    if policy in table.POLICIES:
        found["recompute"] = policy
    return found


def _fixed(settings: Settings) -> dict[str, Any]:
    """Fields of the plan that are not to be chosen: as typed, or as the saved run has them."""
    train, fixed = settings.train, saved_plan(settings)
    if train.micro_batch_size:
        fixed["micro_batch"] = train.micro_batch_size
    if train.state != "auto":
        fixed["state"] = train.state
    if train.chunk_rows:
        fixed["chunk_rows"] = train.chunk_rows
    if train.recompute != "auto":
        fixed["recompute"] = train.recompute
    elif settings.model.use_checkpoint and fixed.get("recompute") not in ("block", "offload"):
        fixed["recompute"] = "block"
    return fixed


# a GPU


def card_of(device: torch.device, precision: devices.Precision, free: int) -> search.Device:
    """The GPU as the planner sees it: what is free now, and its matmul ceiling where known."""
    name = devices.describe(device)
    card = cards.known(name)
    own = ceiling.measured_ceiling(name, precision.name) or 0.0
    published = card.tflops.get(precision.name, 0.0) if card else 0.0
    return search.Device(
        # a part of the context is there already, and not free any more
        memory=free + table.CONTEXT_BYTES // 2, dtype=precision.name, name=name,
        tflops=own or published, gb_per_s=card.gb_per_s if card else 0.0,
        share=card.share if card else 0.8, measured=bool(own),
    )  # fmt: skip


def able(settings: Settings, precision: devices.Precision, fixed: dict[str, Any]) -> search.Able:
    """What the planner may choose from."""
    everything = search.Able()
    layouts = everything.layouts if precision.name == "bf16" else ("exact",)
    policies = everything.policies
    if settings.train.kernels == "inductor" or settings.model.per_head_era:
        policies = tuple(p for p in policies if p not in _operators_policies())
    chunk = fixed.get("chunk_rows")
    return search.Able(
        (fixed["state"],) if "state" in fixed else layouts,
        (fixed["recompute"],) if "recompute" in fixed else policies,
        (chunk,) if chunk else everything.chunks,
        fixed.get("micro_batch"),
    )


def _planned(
    settings: Settings, fixed: dict[str, Any], device: torch.device, precision: devices.Precision,
    free: int, notices: list[str],
) -> MemoryPlan:  # fmt: skip
    cfg, card = settings.model, card_of(device, precision, free)
    residual = residual_bytes(settings.train, precision)
    choices = able(settings, precision, fixed)
    saved = saved_plan(settings)
    if saved and all(fixed.get(k) == v for k, v in saved.items()) and len(saved) == 4:
        setup = Setup(
            cfg, saved["micro_batch"], settings.global_batch, table.POLICIES[saved["recompute"]],
            table.LAYOUTS[saved["state"]], saved["chunk_rows"] or None, precision.name,
            residual=residual,
        )  # fmt: skip
        return MemoryPlan(**saved, predicted=step.peak(setup))  # it has run so before
    plans = search.search(cfg, settings.global_batch, card, choices, residual=residual)
    best = plans[0]
    if not best.fits:
        raise advice.does_not_fit(
            settings.model_name, cfg, settings.global_batch, card, plans, choices
        )
    if not best.exact and settings.train.state == "auto":
        notices.append(
            f"state {best.setup.layout.name} is not exact ({best.setup.layout.says}): no exact "
            "layout fits this GPU's memory"
        )
    return MemoryPlan(
        best.setup.rows, best.setup.policy.name, best.setup.layout.name, best.setup.chunk or 0,
        best.peak,
    )  # fmt: skip


def residual_bytes(train: TrainConfig, precision: devices.Precision) -> int:
    """Bytes an element of the residual stream."""
    return 2 if devices.residual_dtype(train.residual_dtype, precision) is not None else 4


# a CPU, or no plan


def _plain(
    settings: Settings, fixed: dict[str, Any], device: torch.device, precision: devices.Precision,
    free: int, notices: list[str],
) -> MemoryPlan:  # fmt: skip
    cfg, state = settings.model, fixed.get("state", "exact")
    plan = MemoryPlan(
        fixed.get("micro_batch", 0), fixed.get("recompute", "none"), state,
        fixed.get("chunk_rows", 0),
    )  # fmt: skip
    if plan.micro_batch:
        return plan
    if device.type == "cuda":
        plan.micro_batch = cfg.batch_size
        return plan
    for policy in (plan.recompute, *(() if "recompute" in fixed else ("block",))):
        rows = _fitting(cfg, policy, precision, free, state)
        if rows:
            if policy != plan.recompute:
                notices.append("recompute block: keeping every activation would not fit memory")
            plan.micro_batch, plan.recompute = rows, policy
            return plan
    need = console.bytes_text(accounting.state_bytes(cfg, state).total)
    notices.append(
        f"this model may not fit: weights, gradients and moments take {need} of "
        f"{console.bytes_text(free)} free"
    )
    if "recompute" not in fixed:
        plan.recompute = "block"
    plan.micro_batch = 1
    return plan


def _fitting(
    cfg: ModelConfig, policy: str, precision: devices.Precision, free: int, state: str
) -> int | None:
    changed = dataclasses.replace(cfg, use_checkpoint=table.POLICIES[policy].blocks)
    usable = int(free * MEMORY_SHARE)
    cpu = precision.device_type == "cpu"
    return accounting.micro_batch_that_fits(changed, usable, attention_matrix=cpu, state=state)
