"""How a run lies in memory: state layout, recompute policy, micro-batch, chunk of logits.

On a GPU the planner chooses what the user and the saved run leave open; tokens per step never
change. On a CPU the largest micro-batch that it predicts to fit is taken.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from mypt_fast import console
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import advice, cards, options, search, step, table
from mypt_fast.planner.operators import Setup
from mypt_fast.settings import Settings
from mypt_fast.training import device as devices

MEMORY_SHARE = 0.9  # of what is free: others use the machine
# Of the tensors of a step on a CPU: what its allocator loses, and its libraries' own work, on top.
CPU_OVERHEAD, CPU_LIBRARIES = 1.2, 256 << 20


@dataclass
class MemoryPlan:
    """What was chosen.

    Attributes:
        micro_batch: sequences per forward.
        recompute: policy of `recompute.POLICIES`.
        state: layout of `training/optim.py`.
        chunk_rows: rows of logits at a time, 0 where the head chooses.
        residual: dtype of the residual stream, "fp32" or "bf16".
        predicted: the peak of a step where it is to be checked against the real one.
    """

    micro_batch: int
    recompute: str = "none"
    state: str = "exact"
    chunk_rows: int = 0
    residual: str = "fp32"
    predicted: step.Peak | None = None

    def fields(self) -> dict[str, Any]:
        """What is saved with the run, and logged at its start."""
        return {
            "micro_batch_size": self.micro_batch, "recompute": self.recompute,
            "state": self.state, "chunk_rows": self.chunk_rows, "residual_dtype": self.residual,
        }  # fmt: skip

    def setup(self, cfg: ModelConfig, sequences: int, precision: devices.Precision) -> Setup:
        """The same as the planner sees it."""
        return Setup(
            cfg, self.micro_batch, sequences, table.POLICIES[self.recompute],
            table.LAYOUTS[self.state], self.chunk_rows or None, precision.name,
            precision.device_type, residual=2 if self.residual == "bf16" else 4,
        )  # fmt: skip


def choose_plan(
    settings: Settings,
    device: torch.device,
    precision: devices.Precision,
    free: int,
    notices: list[str],
) -> MemoryPlan:
    """What the user typed, else what the saved run had, else what fits and is fastest.

    Args:
        settings: of the run, vocabulary included; not changed.
        device: it trains on.
        precision: of its matmuls.
        free: bytes that it may use.
        notices: a line is added where something unasked has a price.

    Raises:
        ConfigError: for what cannot run here, and on a GPU for a model that cannot fit: before
            anything is allocated, with the smallest change that would.
    """
    options.check_rows(settings.train.micro_batch_size, settings.global_batch)
    kept = saved_plan(settings, device)
    train = _settled(settings, kept)
    _check_policy(train.recompute, device, settings)
    residual = residual_dtype(settings, precision, kept)
    if device.type == "cuda" and train.plan == "auto":
        return _planned(settings, train, kept, residual, device, precision, free, notices)
    return _plain(settings, train, kept, residual, device, precision, free, notices)


def saved_plan(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What the saved run was trained with, by field of `MemoryPlan`, as far as it makes sense.

    Only the state layout goes with a run to another device, or to another global batch: there
    other memory is to be filled.
    """
    plan = settings.saved_state.get("plan")
    if not isinstance(plan, dict):
        return {}
    found: dict[str, Any] = {}
    state = plan.get("state", "exact")  # absent in older bundles
    if state in table.SEARCHED_LAYOUTS:
        found["state"] = state
    same_device = plan.get("device", device.type) == device.type
    if plan.get("global_batch") != settings.global_batch or not same_device:
        return found
    rows, chunk = plan.get("micro_batch_size"), plan.get("chunk_rows", 0)
    if isinstance(rows, int) and 0 < rows <= settings.global_batch:
        found["micro_batch"] = rows
    if isinstance(chunk, int) and chunk >= 0:
        found["chunk_rows"] = chunk
    policy = plan.get("recompute") or ("block" if plan.get("use_checkpoint") is True else "none")
    if policy in table.POLICIES:
        found["recompute"] = policy
    if plan.get("residual_dtype", "fp32") in ("fp32", "bf16"):
        found["residual"] = plan.get("residual_dtype", "fp32")
    return found


def residual_dtype(settings: Settings, precision: devices.Precision, kept: dict[str, Any]) -> str:
    """Dtype of the residual stream: as asked for, as the saved run had it, else the device's.

    Raises:
        ConfigError: for bf16 beside another precision.
    """
    asked, bf16 = settings.train.residual_dtype, precision.name == "bf16"
    options.check_residual(asked, precision.name)
    if asked == "auto":
        asked = kept.get("residual", "bf16" if precision.device_type == "cuda" else "fp32")
    return asked if bf16 else "fp32"


def _settled(settings: Settings, kept: dict[str, Any]) -> TrainConfig:
    """The settings, and where they leave something open what the saved run had.

    A typed --use_checkpoint or --no_use_checkpoint goes before what was saved, as every flag.
    """
    train, typed = settings.train, settings.typed
    policy, saved = train.recompute, kept.get("recompute", "auto")
    if "use_checkpoint" in typed and "recompute" not in typed:
        remade = saved in ("block", "offload")
        if settings.model.use_checkpoint:
            policy = saved if remade else "block"
        else:
            policy = "none" if remade or policy in ("block", "offload") else policy
    if policy == "auto":
        policy = saved
    if policy == "auto" and settings.model.use_checkpoint:
        policy = "block"
    return dataclasses.replace(
        train,
        state=kept.get("state", "auto") if train.state == "auto" else train.state,
        recompute=policy,
        micro_batch_size=train.micro_batch_size or kept.get("micro_batch", 0),
        chunk_rows=train.chunk_rows or kept.get("chunk_rows", 0),
    )


def _check_policy(policy: str, device: torch.device, settings: Settings) -> None:
    """Raise ConfigError for a recompute policy that cannot run here."""
    is_typed = "recompute" in settings.typed
    named = f"--recompute {policy}" if is_typed else f"recompute {policy}, of the run or its config"
    if policy == "offload" and device.type == "cpu":
        raise ConfigError(
            f"{named}, keeps residuals in host memory",
            "found a CPU, which computes there already", "use --recompute block",
        )  # fmt: skip
    options.check_policy(policy, settings.model, settings.train, named)
    both = {"use_checkpoint", "recompute"} <= settings.typed and settings.model.use_checkpoint
    if both and policy not in ("block", "offload"):
        raise ConfigError(
            "--use_checkpoint is --recompute block", f"found --recompute {policy} beside it",
            "drop one of the two",
        )  # fmt: skip


# a GPU


def card_of(device: torch.device, precision: devices.Precision, free: int) -> search.Device:
    """The GPU as the planner sees it: what is free now, and its matmul ceiling where known."""
    name = devices.describe(device)
    # a part of the context is there already, and not free any more
    memory = free + table.CONTEXT_BYTES // 2
    return search.device_for(memory, precision.name, cards.known(name), [name])


def _planned(
    settings: Settings, train: TrainConfig, kept: dict[str, Any], residual: str,
    device: torch.device, precision: devices.Precision, free: int, notices: list[str],
) -> MemoryPlan:  # fmt: skip
    cfg, card, sequences = settings.model, card_of(device, precision, free), settings.global_batch
    choices = options.options_of(cfg, train, precision.name)
    if train.kernels == "reference" or train.attention == "math":
        notices.append(
            "memory is predicted for fused kernels; --kernels reference and --attention math need "
            "more: lower --micro_batch_size if it does not suffice"
        )
    as_saved = train.micro_batch_size == kept.get("micro_batch") and train.recompute != "auto"
    if as_saved:  # it ran so before: it is not asked whether it could run better
        plan = MemoryPlan(
            train.micro_batch_size, train.recompute, choices.layouts[0], train.chunk_rows, residual
        )
        best = search.evaluate(plan.setup(cfg, sequences, precision), card)
        if not best.fits:
            notices.append(
                f"the saved plan may not fit: it takes {console.bytes_text(best.peak.total)} of "
                f"{console.bytes_text(card.room)}; --micro_batch_size and --recompute change it"
            )
        return as_plan(best, residual)
    wide = 2 if residual == "bf16" else 4
    plans = search.search(cfg, sequences, card, choices, residual=wide)
    best = plans[0]
    if not best.fits:
        everything = options.options_of(cfg, options.left_open(train), precision.name)
        raise advice.refusal(settings.model_name, cfg, card, best, choices, everything).error()
    if not best.exact and train.state == "auto":
        notices.append(
            f"state {best.setup.layout.name} is not exact ({best.setup.layout.says}): no exact "
            "layout fits this GPU's memory"
        )
    return as_plan(best, residual)


def as_plan(found: search.Plan, residual: str) -> MemoryPlan:
    """What the planner found, as a run keeps it."""
    setup = found.setup
    return MemoryPlan(
        setup.rows, setup.policy.name, setup.layout.name, setup.chunk or 0, residual, found.peak
    )


# a CPU, or no plan


def _plain(
    settings: Settings, train: TrainConfig, kept: dict[str, Any], residual: str,
    device: torch.device, precision: devices.Precision, free: int, notices: list[str],
) -> MemoryPlan:  # fmt: skip
    cfg, is_open = settings.model, train.recompute == "auto"
    plan = MemoryPlan(
        train.micro_batch_size, "none" if is_open else train.recompute,
        "exact" if train.state == "auto" else train.state, train.chunk_rows, residual,
    )  # fmt: skip
    if plan.micro_batch:
        return plan
    if device.type == "cuda":
        plan.micro_batch = cfg.batch_size
        return plan
    for policy in (plan.recompute, "block") if is_open else (plan.recompute,):
        plan.micro_batch = _fitting(plan, policy, cfg, settings.global_batch, precision, free)
        if plan.micro_batch:
            if policy != plan.recompute:
                notices.append("recompute block: keeping every activation would not fit memory")
            plan.recompute = policy
            return plan
    plan.micro_batch, plan.recompute = 1, "block" if is_open else plan.recompute
    need = console.bytes_text(step_bytes(plan, cfg, settings.global_batch, precision))
    notices.append(
        f"this model may not fit: a step takes about {need} of {console.bytes_text(free)} free"
    )
    return plan


def _fitting(
    plan: MemoryPlan, policy: str, cfg: ModelConfig, sequences: int, precision: devices.Precision,
    free: int,
) -> int:  # fmt: skip
    """The largest micro-batch that is predicted to fit, a divisor of the batch; 0: not even one."""
    for rows in reversed(search.micro_batches(cfg, cfg.batch_size)):
        tried = dataclasses.replace(plan, micro_batch=rows, recompute=policy)
        if step_bytes(tried, cfg, sequences, precision) <= MEMORY_SHARE * free:
            return rows
    return 0


def step_bytes(
    plan: MemoryPlan, cfg: ModelConfig, sequences: int, precision: devices.Precision
) -> int:
    """Peak memory of a step: predicted, and on a CPU what its allocator adds to it."""
    total = step.peak(plan.setup(cfg, sequences, precision)).total
    if precision.device_type == "cpu":
        return int(CPU_OVERHEAD * total) + CPU_LIBRARIES
    return total
