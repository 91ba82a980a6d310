"""Training steps of one model in a process of its own: gpu_suite.py and bench_step.py ask it.

    python bench/steps.py --variant auto/norms+exact16 --preset base/750M_unified_v1 --sequences 96

It builds, compiles and warms up, says so in one line of JSON, and then answers every line it
reads: a number with the seconds of that many steps, `loss` with the loss on a batch never trained
on (dropout off), after which it takes no more steps. A step of --sequences is taken in the largest
micro-batches that fit, or in those of ROWS where the name of the variant says so. A variant is
KIND[/POLICY[+STATE]][@ROWS][-eager|-whole][~kept]:

| KIND | what |
|---|---|
| auto, triton, inductor, reference | ours: what `GPT(kernels=...)` takes |
| plain | the same model in plain PyTorch (plain_gpt.py) |
| mypt | in MyPT's manner (mypt_gpt.py); always eager |
| hf | transformers' LLaMA with Liger where installed (hf_gpt.py) |

Of ours, POLICY and STATE are those of `train --recompute` and `--state`, none and exact where they
are not named; the policy "plan" is what the planner chooses under the cap. All start from the same
weights and see the same batches, AdamW, clipping and autocast, and are compiled unless their name
ends in -eager: ours as the trainer does, or whole where the name says so, the others whole. On a
CPU ours keep freed memory, as the trainer does; the others give it back, as PyTorch does by itself,
unless their name ends in ~kept.

What fits is found on a GPU without compiling, since compiling takes minutes: the first compiled one
is two sizes above it, as a compiled model may need less. One that fits only because the allocator
frees and asks again in every step is slow for it: then the next smaller is timed, too, and the
faster of the two is kept.
"""

import argparse
import dataclasses
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
from mypt_fast.benchmark.timing import median
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.model import GPT
from mypt_fast.planner import options, search, step, table
from mypt_fast.planner.operators import Setup
from mypt_fast.training import device as devices
from mypt_fast.training.memory import card_of
from mypt_fast.training.optim import adamw, clip, make_optimizer

WARM_UP = 3
SIZES_ABOVE = 2  # what fits eagerly is where a compiled model's search begins
UNSEEN = 1 << 40  # the number of the batch that no step trains on
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REFERENCES = ("plain", "mypt", "hf")
LossOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """What a variant's name says."""

    kind: str
    policy: str
    state: str
    compiled: bool
    whole: bool  # one graph of all layers
    rows: int | None  # of a micro-batch; None: the largest that fits
    keeps: bool  # freed memory, on a CPU

    @classmethod
    def named(cls, name: str) -> "Variant":
        """Parse KIND[/POLICY[+STATE]][@ROWS][-eager|-whole][~kept]."""
        rest, tilde, memory = name.partition("~")
        rest, _, way = rest.partition("-")
        rest, at, rows = rest.partition("@")
        kind, _, how = rest.partition("/")
        policy, _, state = how.partition("+")
        policy, state = policy or "none", state or "exact"
        known = policy in (*table.POLICIES, "plan") and state in table.SEARCHED_LAYOUTS
        counted = rows.isdecimal() and int(rows) > 0 if at else True
        known = known and way in ("", "eager", "whole") and memory == ("kept" if tilde else "")
        if not known or not counted:
            form = "KIND[/POLICY[+STATE]][@ROWS][-eager|-whole][~kept]"
            raise ValueError(f"variant {name}: expected {form}")
        return cls(
            kind, policy, state, way != "eager" and kind != "mypt", way == "whole",
            int(rows) if at else None, bool(tilde) or kind not in REFERENCES,
        )  # fmt: skip

    @property
    def ours(self) -> bool:
        """Whether it is this engine."""
        return self.kind not in REFERENCES


@dataclass(frozen=True)
class Case:
    """What is trained: a model, sequences of a step, where and in which dtype."""

    cfg: ModelConfig
    sequences: int
    device: str
    dtype: str
    cap_gib: float

    def setup(self, variant: Variant, rows: int) -> Setup:
        """What the planner calls it; its own choice for the policy "plan"."""
        if variant.policy != "plan":
            return Setup(
                self.cfg, rows, self.sequences, table.POLICIES[variant.policy],
                table.LAYOUTS[variant.state], dtype=self.dtype, device=self.device,
            )  # fmt: skip
        memory = int(self.cap_gib * table.GIB)
        card = search.Device(memory, self.dtype)
        if self.device == "cuda":
            precision = devices.Precision(DTYPES[self.dtype], False, "cuda")
            card = card_of(torch.device("cuda"), precision, memory - table.CONTEXT_BYTES // 2)
        best = search.search(self.cfg, self.sequences, card, options.Options())[0]
        if not best.fits:
            raise ValueError(f"no plan fits {self.cap_gib} GiB")
        return best.setup


def batch(cfg: ModelConfig, rows: int, number: int, device: str) -> tuple[Tensor, Tensor]:
    """Batch `number`, (B, T) twice: arithmetic sequences, so that there is something to learn."""
    draw, modulus = torch.Generator().manual_seed(number), min(cfg.vocab_size, 251)
    first = torch.randint(modulus, (rows, 1), generator=draw)
    stride = torch.randint(1, 8, (rows, 1), generator=draw)
    windows = (first + stride * torch.arange(cfg.block_size + 1)) % modulus
    x, y = windows[:, :-1], windows[:, 1:]
    return x.contiguous().to(device), y.contiguous().to(device)


def build(variant: Variant, setup: Setup) -> tuple[nn.Module, LossOf, LossOf]:
    """The model, its mean loss, and the same compiled where the variant is."""
    cfg, device = setup.cfg, setup.device
    kind = variant.kind if variant.ours else "auto"
    ours = GPT(cfg, 0, kind, setup.policy.name)
    if variant.ours:
        model: nn.Module = ours.to(device).train()
        assert sum(p.numel() for p in model.parameters()) == count_parameters(cfg).total
        narrow = device == "cuda" and setup.dtype == "bf16"  # as the trainer's `auto`
        model.residual = torch.bfloat16 if narrow else None
        model.chunk_rows = setup.chunk or 0

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

    def __init__(self, variant: Variant, case: Case, rows: int) -> None:
        torch.manual_seed(0)
        if variant.keeps and case.device == "cpu":
            devices.keep_freed_memory()
        setup = case.setup(variant, rows)
        self.case, self.cfg, self.device, self.setup = case, case.cfg, case.device, setup
        self.dtype, self.steps, self.rows = DTYPES[case.dtype], 0, setup.rows
        self.model, self.mean, self.loss_of = build(variant, setup)
        if variant.ours:
            self.optimizer = make_optimizer(self.model, TrainConfig(state=setup.layout.name))
        else:
            make = {"mypt": mypt_adamw, "hf": hf_gpt.hf_adamw}.get(variant.kind, adamw)
            self.optimizer = make(self.model, TrainConfig())
        self.begin()

    def begin(self) -> None:
        """Before the first step, and after one that did not come to its end."""
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self, loss_of: LossOf, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        """What the model returned, which must live until the backward, and the mean loss."""
        amp = self.dtype is not torch.float32
        # the others keep PyTorch's default
        cached = not isinstance(self.model, GPT)
        with torch.autocast(self.device, self.dtype, enabled=amp, cache_enabled=cached):
            found = loss_of(x, y)
        return found, found[1] if isinstance(found, tuple) else found

    def __call__(self) -> float:
        """Seconds of a step, on a GPU until the device is done."""
        x, y = batch(self.cfg, self.case.sequences, self.steps, self.device)
        self.wait()
        began = time.perf_counter()
        for xs, ys in zip(x.split(self.rows), y.split(self.rows), strict=True):
            kept, loss = self.forward(self.loss_of, xs, ys)
            self.scaler.scale(loss * (len(xs) / len(x))).backward()
            del kept, loss
        self.scaler.unscale_(self.optimizer)
        clip(self.optimizer, self.model, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
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
        # the same batch for all, whatever micro-batch fits
        x, y = batch(self.cfg, self.case.sequences, UNSEEN, self.device)
        parts = zip(x.split(self.rows), y.split(self.rows), strict=True)
        return sum(self.forward(self.mean, a, b)[1].item() * (len(a) / len(x)) for a, b in parts)


def ready(name: str, case: Case) -> tuple[Stepper, dict[str, Any]]:
    """The stepper, warmed up, at the largest micro-batch that fits the cap and is not slow there.

    Raises:
        torch.OutOfMemoryError: where not even the smallest fits.
    """
    variant = Variant.named(name)
    sizes, about = sizes_to_try(variant, case)
    did_not_fit: list[int] = []
    short: list[dict[str, Any]] = []  # those that fit by retries alone
    settled = False
    while sizes:
        rows = sizes.pop(0)
        stepper, found = warmed_up(variant, case, rows)
        if stepper is None:
            did_not_fit.append(rows)
        else:
            pace = median(found["warm_up_s"][1:])
            if short and not settled and short[-1]["step_s"] < pace:
                # it was the faster one: back to it, and stay
                sizes, settled = [short[-1]["micro_batch"]], True
            elif found.get("warm_up_retries") and sizes:
                grown = found["warm_up_retries"]
                short.append({"micro_batch": rows, "step_s": pace, "retries": grown})
            else:
                about |= {"short_of_memory": short} if short else {}
                return stepper, {"ready": name, "did_not_fit": did_not_fit, **about, **found}
        stepper = None  # the model goes with it
        forget()
    raise torch.OutOfMemoryError(f"{name}: {did_not_fit} sequences do not fit {case.cap_gib} GiB")


def sizes_to_try(variant: Variant, case: Case) -> tuple[list[int], dict[str, Any]]:
    """Micro-batches, the largest first, and what was found out about them."""
    if variant.rows and case.sequences % variant.rows:
        raise ValueError(f"micro-batches of {variant.rows} do not make {case.sequences} sequences")
    if variant.rows or variant.policy == "plan":  # the planner chooses its own
        return [variant.rows or case.sequences], {}
    every = [d for d in range(case.sequences, 0, -1) if case.sequences % d == 0]
    if case.device != "cuda":  # nothing limits the memory
        return every, {}
    eagerly = fits_eagerly(variant, case, every)
    above = SIZES_ABOVE if variant.compiled else 0
    return every[max(0, every.index(eagerly) - above) :], {"fits_eagerly": eagerly}


def fits_eagerly(variant: Variant, case: Case, every: list[int]) -> int:
    """The largest of `every` micro-batch that fits where nothing is compiled, the least unasked."""
    stepper = Stepper(dataclasses.replace(variant, compiled=False, whole=False), case, every[-1])
    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(stepper, case, every[middle]) else (middle + 1, high)
    stepper = None
    forget()
    return every[low]


def fits(stepper: Stepper, case: Case, rows: int) -> bool:
    """Whether steps fit in micro-batches of `rows`: two of a step, so that gradients add up."""
    stepper.rows = rows
    stepper.case = dataclasses.replace(case, sequences=rows * min(2, case.sequences // rows))
    enough = True
    try:
        for _ in range(2):  # the moments are there from the first on
            stepper()
    except torch.OutOfMemoryError:
        enough = False
    stepper.begin()  # outside the handler: what the failed step held is free now
    forget()
    return enough


def warmed_up(variant: Variant, case: Case, rows: int) -> tuple[Stepper | None, dict[str, Any]]:
    """A stepper after its first steps and what is known of it; none where it does not fit."""
    began = time.perf_counter()
    try:
        stepper = Stepper(variant, case, rows)
        first = [stepper()]
        at = {"first_step_at": time.monotonic(), "first_step_cpu_s": cpu_seconds()}
        before = retries(case.device)
        first += [stepper() for _ in range(WARM_UP - 1)]
    except torch.OutOfMemoryError:
        return None, {}
    grown = retries(case.device) - before
    return stepper, {
        "micro_batch": stepper.rows, **at,
        "tokens_per_step": case.sequences * case.cfg.block_size, "warm_up_s": first,
        "start_s": time.perf_counter() - began, **compile_counts(),
        **({"warm_up_retries": grown} if case.device == "cuda" else {}),
        **(planned(stepper.setup) if variant.ours else {}),
        **(hf_gpt.versions(case.device) if variant.kind == "hf" else {}),
    }  # fmt: skip


def forget() -> None:
    """Give back what nobody holds any more: memory, and what was compiled."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def retries(device: str) -> int:
    """How often the allocator had to free what it keeps before it got what was asked for."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device == "cuda" else 0


def planned(setup: Setup) -> dict[str, Any]:
    """How ours trains, and the bytes of tensors that the planner predicts for it."""
    return {
        "recompute": setup.policy.name, "state": setup.layout.name,
        "chunk_rows": step.chunk_rows(setup), "predicted_bytes": step.peak(setup).live,
    }  # fmt: skip


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
    case = Case(cfg, args.sequences, args.device, args.dtype, args.cap_gib)
    stepper, about = ready(args.variant, case)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield about
    for line in sys.stdin:
        if line.strip() == "loss":
            yield {"loss": stepper.final_loss(), "steps": stepper.steps}
            return
        before = retries(args.device)
        seconds = [stepper() for _ in range(int(line))]
        grown = {"alloc_retries": retries(args.device) - before} if args.device == "cuda" else {}
        yield {"seconds": seconds, **memory(args.device), **grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variant", required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--sequences", type=int, required=True, help="of a step")
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
