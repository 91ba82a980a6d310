"""The plan of a run, as people read it before it starts."""

from __future__ import annotations

import dataclasses
import math

import torch

from mypt_fast import accounting, console, kernels
from mypt_fast.planner import search
from mypt_fast.training import device as devices
from mypt_fast.training import memory
from mypt_fast.training.run import Choice, Run

# 1 / MFU of a step on a CPU, measured there (docs/decisions.md): this for the matmuls, and that per
# element of the residual streams of a token and model FLOP for everything else.
CPU_COST = {torch.float32: (1.34, 8e3), torch.bfloat16: (1.66, 20e3), torch.float16: (1.66, 20e3)}

# What the start line says of a recompute policy.
AGAIN = {
    "norms": "norms and activations made again",
    "mlp": "norms, activations and first matmuls made again",
    "block": "blocks run again",
    "offload": "blocks run again from host memory",
}
# How the start line names a state layout; `exact` is the one nobody has to be told of.
STATES = {
    "exact16": "state exact16",
    "fast": "state fast (not exact: bf16 gradients, 8-bit moments)",
}


def estimated_tokens_per_s(run: Run) -> float | None:
    """A rough speed: an MFU as steps reach it; None where the device's ceiling is not known.

    On a GPU as `mypt-fast plan` estimates it from the same ceiling.
    """
    of_one = run.ceilings.mfu(1.0)
    if of_one is None or run.ceilings.measured is None:
        return None
    cfg = run.settings.model
    if run.device.type == "cpu":
        matmuls, rest = CPU_COST[run.precision.dtype]
        elements = cfg.n_layer * cfg.n_embd / run.ceilings.flops_per_token
        return 1 / (of_one * (matmuls + rest * elements))
    card = memory.card_of(run.device, run.precision, run.free_bytes)
    card = dataclasses.replace(card, own={run.precision.name: run.ceilings.measured})
    setup = run.plan.setup(cfg, run.settings.global_batch, run.precision)
    return search.evaluate(setup, card).tokens_per_s


def evaluation_work(run: Run, start_step: int) -> float:
    """Evaluations of the run, in training tokens of equal work: a forward is a third of a step."""
    s, train = run.settings, run.settings.train
    windows = train.eval_iters * s.model.batch_size
    per_set = [min(windows, v.n_windows) for v in (run.phases[0].val, *run.eval_sets.values())]
    during = sum(i >= start_step for i in range(0, train.max_iters, train.eval_interval))
    final = sum(per_set) + min(windows, run.phases[0].train.n_windows)
    return (during * sum(per_set) + final) * s.model.block_size / 3


def predicted_bytes(run: Run) -> int:
    """Peak memory of a step."""
    return memory.step_bytes(run.plan, run.settings.model, run.settings.global_batch, run.precision)


def plan_lines(run: Run, start_step: int, choice: Choice) -> list[str]:
    """The plan of a run as people read it."""
    s, cfg, train = run.settings, run.settings.model, run.settings.train
    tokens_per_step = s.global_batch * cfg.block_size
    speed = estimated_tokens_per_s(run)
    work = max(0, train.max_iters - start_step) * tokens_per_step + evaluation_work(run, start_step)
    passes = train.max_iters * tokens_per_step / run.train_tokens
    micro_steps = math.ceil(s.global_batch / run.plan.micro_batch)
    parameters = console.count(accounting.count_parameters(cfg).total)
    ways = [run.precision.name, choice.words]
    if train.tf32 and run.precision.name == "fp32" and devices.has_tf32(run.device):
        ways[0] = "fp32 with TF32 matmuls"
    ways.append(kernels.describe(train.kernels, run.device, run.precision.dtype, choice.compiled))
    ways += [f"attention {run.attention}"] if run.attention else []
    ways += [STATES[train.state]] if train.state in STATES else []
    ways += [AGAIN[run.plan.recompute]] if run.plan.recompute in AGAIN else []
    resumed = " (resumed)" if s.resume else ""
    count, size = console.count, console.bytes_text
    timing = []
    if speed is not None:
        timing.append(
            f"time    about {console.span(work / speed)} at {count(speed)} tokens/s with "
            "evaluations, guessed from the matmul ceiling"
        )
    return [
        f"run     {s.model_name}: steps {start_step} to {train.max_iters} in {s.run_dir}{resumed}",
        f"model   {parameters} parameters: {cfg.n_layer} layers x {cfg.n_embd}, context "
        f"{cfg.block_size}, {run.tokenizer.kind} vocabulary of {cfg.vocab_size}",
        f"data    {run.phases[0].source}: {count(run.train_tokens)} train and "
        f"{count(run.val_tokens)} val tokens; {passes:.2g} passes over it",
        f"batch   {s.global_batch} sequences = {tokens_per_step:,} tokens a step, in "
        f"{micro_steps} micro-step(s) of {run.plan.micro_batch}",
        f"device  {devices.describe(run.device)}: {', '.join(ways)}; {run.loader_note}",
        f"memory  about {size(predicted_bytes(run))} of {size(run.free_bytes)} free",
        *timing,
    ]
