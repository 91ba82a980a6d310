"""What `mypt-fast bench` measures: loader, head, a training step, and a bare matmul to compare.

Medians of a handful of samples, under two minutes on two CPU cores. Nothing is compared with
anybody here: bench/ does that, both sides in one run.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mypt_fast import __version__, kernels, presets
from mypt_fast.accounting import count_parameters, flops_per_token, mfu
from mypt_fast.benchmark.machine import facts
from mypt_fast.benchmark.timing import Clock, median
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DeviceError
from mypt_fast.kernels.ceiling import matmul_tflops
from mypt_fast.model import GPT
from mypt_fast.planner import options, search
from mypt_fast.training import device as devices
from mypt_fast.training.compiling import settled
from mypt_fast.training.memory import MemoryPlan, as_plan, card_of, step_bytes
from mypt_fast.training.optim import clip, make_optimizer
from mypt_fast.training.utilisation import of_measured

SCHEMA = 1
SAMPLES = 7
CEILING_S = 0.5  # of measuring matmuls in a dtype
# preset and sequences a step, the first that fits; a CPU stays under two minutes with the small
STEPS = {
    "cuda": (
        ("750M_1024", 4), ("500M_1024", 8), ("350M_1024", 8), ("150M_1024", 8), ("small", 8),
        ("tiny", 16),
    ),
    "cpu": (("small", 8), ("tiny", 16)),
}  # fmt: skip
QUICK = {"cuda": (("150M_1024", 4), ("tiny", 16)), "cpu": (("tiny", 8),)}
SHARE_OF_FREE = 0.8  # of free memory that a step may be estimated to need
STEP_SECONDS = 40.0  # after which no further sample of a step is begun
TOKENS, BATCH = 4_000_000, (8, 1024)  # of the loader
# rows, width and vocabulary of the head
HEAD = {"cuda": (8192, 1024, 50304), "cpu": (1024, 512, 50304)}
HEAD_QUICK = (256, 192, 50304)


def measure(device: torch.device, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """All parts; the record that a user can share: no name of the machine or user, no path.

    Args:
        device: where.
        quick: smaller shapes and fewer samples.
        say: told which part is about to run.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision, _ = devices.precision(device, True, "bf16", explicit=False)
    clock, samples = Clock(device.type), 3 if quick else SAMPLES
    say("ceiling: a bare matmul")
    ceiling = ceilings(device, precision.dtype)
    rows = []
    for name, part in (("loader", loader), ("head", head), ("step", step)):
        say(f"{name} ...")
        rows.append({"part": name, **part(clock, precision, quick, samples)})
    rate = ceiling[precision.name]
    for row in rows:
        if "tokens_per_step" in row:
            per_token = row["flops"] / row["tokens_per_step"]
            row["mfu"] = mfu(row["tokens_per_s"], per_token, rate / 1e12)
        elif "flops" in row:
            row["of_matmul"] = row["flops"] / row["median_s"] / rate
    return {
        "schema": SCHEMA, "mypt_fast": __version__, "quick": quick,
        "device": device.type, "dtype": precision.name, "machine": facts(device.type),
        "matmul_flops_per_s": ceiling, "rows": rows,
    }  # fmt: skip


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP per second of matmuls in the dtype that training takes here, and in fp32.

    Measured as `mypt-fast ceiling` does, and anew: a share is of what the machine does now.
    """
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    kinds = dict.fromkeys((dtype, torch.float32))
    with torch.inference_mode():
        return {names[kind]: 1e12 * matmul_tflops(device, kind, CEILING_S) for kind in kinds}


def sampled(work: Callable[[], float], samples: int, seconds: float) -> dict[str, Any]:
    """Samples of `work`, which returns its own time; the first three always, the rest in time."""
    began = time.monotonic()
    found: list[float] = []
    while len(found) < samples and (len(found) < 3 or time.monotonic() - began < seconds):
        found.append(work())
    return {"median_s": median(found), "samples_s": found}


def loader(clock: Clock, precision: devices.Precision, quick: bool, samples: int) -> dict[str, Any]:
    """Batches of 8 x 1024 from a file in the page cache, on the host: one call, no prefetch."""
    B, T = BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train").mkdir()
        ids = np.random.default_rng(0).integers(0, 50_304, TOKENS, dtype=np.uint16)
        ids.tofile(folder / "train" / "shard_00000.bin")
        (folder / "dataset_metadata.json").write_text(json.dumps({"dtype": "uint16"}))
        corpus = TokenCorpus.from_dataset(folder, "train")
        batches = TokenLoader(corpus, T, seed=0, global_batch=B, vocab_size=50_304)
        x, y = (np.empty((B, T), np.int64) for _ in "xy")

        def many() -> float:
            began = time.perf_counter()
            for _ in range(20):
                batches.next(B, x, y)
            return (time.perf_counter() - began) / 20

        many()
        found = sampled(many, 10 * samples, 5.0)
    rate = B * T / found["median_s"]
    return {"shape": f"{B} x {T}", "backend": corpus.backend, "tokens_per_s": rate, **found}


def head(clock: Clock, precision: devices.Precision, quick: bool, samples: int) -> dict[str, Any]:
    """The head with its loss, forward and backward, as training runs it."""
    N, C, V = HEAD_QUICK if quick else HEAD[clock.device]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=draw).to(clock.device, precision.dtype).requires_grad_()
    w = (0.02 * torch.randn(V, C, generator=draw)).to(clock.device).requires_grad_()
    targets = torch.randint(V, (N,), generator=draw).to(clock.device)

    def once() -> None:
        with precision.autocast():
            kernels.linear_cross_entropy(x, w, None, targets).backward()
        x.grad = w.grad = None

    once()
    found = sampled(lambda: clock.sample(once)[0], samples, STEP_SECONDS / 2)
    return {"shape": f"{N} x {C} x {V}", "flops": 6.0 * N * C * V, **found}


def choose(
    device: torch.device, precision: devices.Precision, quick: bool
) -> tuple[str, ModelConfig, MemoryPlan]:
    """The first preset that is estimated to fit, its shape, and how it is trained.

    Raises:
        DeviceError: if not even the smallest fits.
    """
    free = devices.free_bytes(device)
    for name, rows in (QUICK if quick else STEPS)[device.type]:
        cfg = presets.load(presets.shipped_dir() / f"{name}.json").model
        if device.type == "cuda":
            plan = planned(dataclasses.replace(cfg, batch_size=rows), device, precision, free)
            if plan is not None:
                return name, cfg, plan
            continue
        whole = MemoryPlan(rows)
        if step_bytes(whole, cfg, rows, precision) <= SHARE_OF_FREE * free:
            return name, cfg, whole
    raise DeviceError(
        f"bench trains at least {name}", f"{free >> 20} MiB are free, which is too little",
        "end other programs, or pass --device cpu" if device.type == "cuda" else "free some memory",
    )  # fmt: skip


def planned(
    cfg: ModelConfig, device: torch.device, precision: devices.Precision, free: int
) -> MemoryPlan | None:
    """The plan of a batch on a GPU, as `train` makes it; None where none fits."""
    card = card_of(device, precision, int(SHARE_OF_FREE * free))
    choices = options.options_of(cfg, TrainConfig(), precision.name)
    best = search.search(cfg, cfg.batch_size, card, choices)[0]
    return as_plan(best, "bf16" if precision.name == "bf16" else "fp32") if best.fits else None


def step(clock: Clock, precision: devices.Precision, quick: bool, samples: int) -> dict[str, Any]:
    """One optimizer step, with the plan that `mypt-fast train` makes, on tokens at random."""
    device = torch.device(clock.device)
    name, cfg, plan = choose(device, precision, quick)
    train = TrainConfig(state=plan.state)
    model = GPT(cfg, recompute=plan.recompute).to(device).train()
    model.residual = torch.bfloat16 if plan.residual == "bf16" else None
    model.chunk_rows, rows = plan.chunk_rows, sequences(name, device, quick)
    compiled = bool(settled(train, device))
    if compiled:
        model.compile_blocks()
    optimizer = make_optimizer(model, train)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scaler)
    draw = torch.Generator().manual_seed(0)
    shape = (rows, cfg.block_size)
    x, y = (torch.randint(cfg.vocab_size, shape, generator=draw).to(device) for _ in "xy")
    parts = list(zip(x.split(plan.micro_batch), y.split(plan.micro_batch), strict=True))

    def once() -> float:
        began = time.perf_counter()
        one_step(model, optimizer, scaler, precision, parts)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = once()
    once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = sampled(once, samples, STEP_SECONDS)
    tokens = x.numel()
    return {
        "preset": name, "sequences": rows, "parameters": count_parameters(cfg).total,
        "compiled": compiled, **plan.fields(), "tokens_per_step": tokens, "first_step_s": first,
        "tokens_per_s": tokens / found["median_s"], "flops": tokens * flops_per_token(cfg),
        "peak_bytes": devices.peak_bytes(device), **found,
    }  # fmt: skip


def sequences(name: str, device: torch.device, quick: bool) -> int:
    """Sequences of a step of that preset."""
    return dict((QUICK if quick else STEPS)[device.type])[name]


def one_step(
    model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    precision: devices.Precision, parts: list[tuple[Tensor, Tensor]],
) -> None:  # fmt: skip
    """Forward and backward of every micro-batch, clipping and AdamW."""
    tokens = sum(y.numel() for _, y in parts)
    for x, y in parts:
        with precision.autocast():
            loss = model(x, y) / tokens
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip(optimizer, model, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def lines(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The rows as people read them: part, what, time, rate."""
    ceiling = record["matmul_flops_per_s"]
    rows = [
        ("matmul", f"{name}, square", "", f"{rate / 1e12:.3g} TFLOP/s")
        for name, rate in ceiling.items()
    ]
    for row in record["rows"]:
        what = row.get("preset") or row["shape"]
        if row["part"] == "loader":
            rate = f"{row['tokens_per_s'] / 1e6:,.0f}M tokens/s ({row['backend']})"
        elif row["part"] == "head":
            rate = f"{row['of_matmul']:.0%} of the matmul"
        else:
            what += f", {row['sequences']} sequences, {record['dtype']}"
            what += ", compiled" if row["compiled"] else ""
            share = of_measured(row["mfu"], ceiling[record["dtype"]] / 1e12, advises=False)
            rate = f"{row['tokens_per_s']:,.0f} tokens/s, MFU {share}"
        rows.append((row["part"], what, _time(row["median_s"]), rate))
    return rows


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"
