"""Training steps of one model in a process of its own: gpu_suite.py and bench_step.py ask it.

    python bench/steps.py --variant triton --preset base/750M_unified_v1 --micro-batch 2

It builds, compiles and warms up, says so in one line of JSON, and then answers every line it
reads: a number with the seconds of that many steps, `loss` with the loss on a batch never trained
on (dropout off), after which it takes no more steps. A variant is KIND[/SAVE][-eager|-whole]:

| KIND | what |
|---|---|
| auto, triton, inductor, reference | ours: what `GPT(kernels=...)` takes; /SAVE is its `mlp_save` |
| plain | the same model in plain PyTorch (plain_gpt.py) |
| mypt | in MyPT's manner (mypt_gpt.py); always eager |
| hf | transformers' LLaMA with Liger where installed (hf_gpt.py) |

All start from the same weights and see the same batches, AdamW, clipping and autocast, and are
compiled unless their name ends in -eager: ours as the trainer does, or whole where the name says
so, the others whole.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hf_gpt
import torch
from mypt_gpt import MyptGPT, mypt_adamw
from plain_gpt import PlainGPT, take
from torch import Tensor, nn

from mypt_fast import presets
from mypt_fast.accounting import count_parameters
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.optim import adamw

WARM_UP = 3
UNSEEN = 1 << 40  # the number of the batch that no step trains on
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LossOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """What a variant's name says."""

    kind: str
    save: str
    compiled: bool
    whole: bool  # one graph of all layers

    @classmethod
    def named(cls, name: str) -> "Variant":
        """Parse KIND[/SAVE][-eager|-whole]."""
        rest, _, way = name.partition("-")
        kind, _, save = rest.partition("/")
        if way not in ("", "eager", "whole"):
            raise ValueError(f"variant {name}: expected KIND[/SAVE][-eager|-whole]")
        return cls(kind, save or "all", way != "eager" and kind != "mypt", way == "whole")

    @property
    def ours(self) -> bool:
        """Whether it is this engine."""
        return self.kind not in ("plain", "mypt", "hf")


def batch(cfg: ModelConfig, rows: int, number: int, device: str) -> tuple[Tensor, Tensor]:
    """Batch `number`, (B, T) twice: arithmetic sequences, so that there is something to learn."""
    draw, modulus = torch.Generator().manual_seed(number), min(cfg.vocab_size, 251)
    first = torch.randint(modulus, (rows, 1), generator=draw)
    stride = torch.randint(1, 8, (rows, 1), generator=draw)
    windows = (first + stride * torch.arange(cfg.block_size + 1)) % modulus
    x, y = windows[:, :-1], windows[:, 1:]
    return x.contiguous().to(device), y.contiguous().to(device)


def build(name: str, cfg: ModelConfig, device: str) -> tuple[nn.Module, LossOf, LossOf]:
    """The model, its mean loss, and the same compiled where the variant is."""
    variant = Variant.named(name)
    ours = GPT(cfg, 0, variant.kind if variant.ours else "auto", variant.save)
    if variant.ours:
        model: nn.Module = ours.to(device).train()
        assert sum(p.numel() for p in model.parameters()) == count_parameters(cfg).total

        def mean(x: Tensor, y: Tensor) -> Tensor:
            return model(x, y) / y.numel()

        if variant.whole:
            model.hidden = torch.compile(model.hidden)
        elif variant.compiled:
            model.compile_blocks()  # as the trainer does
        return model, mean, mean
    if variant.kind == "hf":
        model = hf_gpt.HfGPT(cfg, device)
        model.take(ours.state_dict(), cfg.n_embd)
    else:
        model = MyptGPT(cfg) if variant.kind == "mypt" else PlainGPT(cfg)
        take(model, ours.state_dict())
    model.to(device).train()
    if variant.kind == "mypt":
        return model, model, model
    return model, model, torch.compile(model) if variant.compiled else model


class Stepper:
    """One optimizer step at a time, each on its own batch."""

    def __init__(self, name: str, cfg: ModelConfig, rows: int, device: str, dtype: str) -> None:
        torch.manual_seed(0)
        self.cfg, self.rows, self.device = cfg, rows, device
        self.dtype, self.steps, self.kind = DTYPES[dtype], 0, Variant.named(name).kind
        self.model, self.mean, self.loss_of = build(name, cfg, device)
        make = {"mypt": mypt_adamw, "hf": hf_gpt.hf_adamw}.get(self.kind, adamw)
        self.optimizer = make(self.model, TrainConfig())
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == "fp16")

    def forward(self, loss_of: LossOf, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        """What the model returned, which must live until the backward, and the mean loss."""
        amp = self.dtype is not torch.float32
        with torch.autocast(self.device, dtype=self.dtype, enabled=amp):
            found = loss_of(x, y)
        return found, found[1] if isinstance(found, tuple) else found

    def __call__(self) -> float:
        """Seconds of a step, on a GPU until the device is done."""
        x, y = batch(self.cfg, self.rows, self.steps, self.device)
        self.wait()
        began = time.perf_counter()
        kept, loss = self.forward(self.loss_of, x, y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        del kept, loss
        self.wait()
        self.steps += 1
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def final_loss(self) -> float:
        """The loss on a batch never trained on, dropout off; what was compiled is taken off."""
        self.model.eval()
        if isinstance(self.model, GPT):
            self.model.__dict__.pop("hidden", None)
            self.model.plain_blocks()
        x, y = batch(self.cfg, self.rows, UNSEEN, self.device)
        return self.forward(self.mean, x, y)[1].item()


def ready(
    variant: str, cfg: ModelConfig, rows: int, device: str, dtype: str
) -> tuple[Stepper, dict[str, Any]]:
    """The stepper, warmed up, at the largest micro-batch of rows, rows/2, ... that fits the cap."""
    tried: list[int] = []
    while True:
        try:
            began = time.perf_counter()
            step = Stepper(variant, cfg, rows, device, dtype)
            first = [step()]
            at = {"first_step_at": time.monotonic(), "first_step_cpu_s": cpu_seconds()}
            first += [step() for _ in range(WARM_UP - 1)]
            return step, {
                "ready": variant, "micro_batch": rows, "did_not_fit": tried, **at,
                "tokens_per_step": rows * cfg.block_size, "warm_up_s": first,
                "start_s": time.perf_counter() - began, **compile_counts(),
            }  # fmt: skip
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        step = None  # the model goes with it
        tried.append(rows)
        rows //= 2
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def cpu_seconds() -> float:
    """CPU time of this process and the compilers it has started."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def compile_counts() -> dict[str, Any]:
    """Graph breaks and compilations so far."""
    from torch._dynamo.utils import counters

    return {
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"].get("unique_graphs", 0),
    }


def memory(device: str) -> dict[str, int]:
    """Peaks of this process: since they were last reset on a GPU, since its start on a CPU."""
    if device == "cpu":
        return {"peak_resident_bytes": devices.peak_bytes(torch.device("cpu"))}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def answers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What goes to the asker: ready, then one answer per line read."""
    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    cfg = presets.load(args.preset).model
    step, about = ready(args.variant, cfg, args.micro_batch, args.device, args.dtype)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield about
    for line in sys.stdin:
        if line.strip() == "loss":
            yield {"loss": step.final_loss(), "steps": step.steps}
            return
        seconds = [step() for _ in range(int(line))]
        yield {"seconds": seconds, **memory(args.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variant", required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--cap-gib", type=float, default=16.0, help="of GPU memory")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    try:
        for answer in answers(parser.parse_args()):
            print(json.dumps(answer), flush=True)
    except Exception as e:  # the asker wants a line, whatever went wrong
        print(json.dumps({"failed": f"{type(e).__name__}: {e}"[:1000]}), flush=True)
        raise


if __name__ == "__main__":
    main()
