"""The plan of a run, as people read it before it starts."""

from __future__ import annotations

import math
import time

import torch

from mypt_fast import accounting, console, kernels
from mypt_fast.training import device as devices
from mypt_fast.training.compiling import Choice
from mypt_fast.training.run import Run

# Of a bare matmul's speed that a whole training step reaches, roughly (measured on a CPU: the
# faster the matmul, the more the rest weighs).
MODEL_SHARE = {torch.float32: 0.6, torch.bfloat16: 0.3, torch.float16: 0.3}

# How the start line names a state layout; `exact` is the one nobody has to be told of.
STATES = {
    "exact16": "state exact16",
    "fast": "state fast (not exact: bf16 gradients, 8-bit moments)",
}


def estimated_tokens_per_s(run: Run) -> float:
    """A rough speed: model FLOPs at a share of a short matmul's rate on this device."""
    n = 512
    a = torch.ones(n, n, device=run.device, dtype=run.precision.dtype)
    rates = []
    for _ in range(6):  # the first is warm-up; the best of the rest hides other programs
        began = time.perf_counter()
        a @ a
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        rates.append(2 * n**3 / (time.perf_counter() - began))
    share = MODEL_SHARE[run.precision.dtype]
    return share * max(rates[1:]) / accounting.flops_per_token(run.settings.model)


def evaluation_work(run: Run, start_step: int) -> float:
    """Evaluations of the run, in training tokens of equal work: a forward is a third of a step."""
    s, train = run.settings, run.settings.train
    windows = train.eval_iters * s.model.batch_size
    per_set = [min(windows, v.n_windows) for v in (run.phases[0].val, *run.eval_sets.values())]
    during = sum(i >= start_step for i in range(0, train.max_iters, train.eval_interval))
    final = sum(per_set) + min(windows, run.phases[0].train.n_windows)
    return (during * sum(per_set) + final) * s.model.block_size / 3


def plan_lines(run: Run, start_step: int, choice: Choice) -> list[str]:
    """The plan of a run as people read it."""
    s, cfg, train = run.settings, run.settings.model, run.settings.train
    tokens_per_step = s.global_batch * cfg.block_size
    speed = estimated_tokens_per_s(run)
    work = max(0, train.max_iters - start_step) * tokens_per_step + evaluation_work(run, start_step)
    passes = train.max_iters * tokens_per_step / run.train_tokens
    micro_steps = math.ceil(s.global_batch / run.micro_batch)
    parameters = console.count(accounting.count_parameters(cfg).total)
    ways = [run.precision.name, choice.words]
    ways.append(kernels.describe(train.kernels, run.device, run.precision.dtype, choice.compiled))
    ways += [STATES[train.state]] if train.state in STATES else []
    ways += ["activations recomputed"] if cfg.use_checkpoint else []
    needed = accounting.training_bytes(
        cfg, run.micro_batch, attention_matrix=run.device.type == "cpu", state=train.state
    )
    resumed = " (resumed)" if s.resume else ""
    count = console.count
    return [
        f"run     {s.model_name}: steps {start_step} to {train.max_iters} in {s.run_dir}{resumed}",
        f"model   {parameters} parameters: {cfg.n_layer} layers x {cfg.n_embd}, context "
        f"{cfg.block_size}, {run.tokenizer.kind} vocabulary of {cfg.vocab_size}",
        f"data    {run.phases[0].source}: {count(run.train_tokens)} train and "
        f"{count(run.val_tokens)} val tokens; {passes:.2g} passes over it",
        f"batch   {s.global_batch} sequences = {tokens_per_step:,} tokens a step, in "
        f"{micro_steps} micro-step(s) of {run.micro_batch}",
        f"device  {devices.describe(run.device)}: {', '.join(ways)}; {run.loader_note}",
        f"memory  about {console.bytes_text(needed)} of {console.bytes_text(run.free_bytes)} free",
        f"time    about {console.span(work / speed)} at {count(speed)} tokens/s with evaluations, "
        "guessed from a matmul",
    ]
