"""Training steps of one model in one process, under a cap on GPU memory: gpu_suite.py asks it.

    python bench/gpu_steps.py --variant triton --preset base/750M_unified_v1 --micro-batch 2

It builds, compiles and warms up, says so in one line of JSON, and then answers every number it
reads with the seconds of that many steps. A variant is `plain` (a GPT of the same architecture in
plain PyTorch) or what `GPT(kernels=...)` takes, with `/SAVE` behind it for `mlp_save`. All are
compiled, as the trainer does, and see the same batch, AdamW, clipping and autocast.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mypt_fast import presets
from mypt_fast.accounting import count_parameters, swiglu_hidden
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.kernels import rope_tables
from mypt_fast.model import GPT
from mypt_fast.training.optim import adamw

WARM_UP = 3


class PlainBlock(nn.Module):
    """Pre-norm block with RMSNorm, rotary embedding and SwiGLU, as plain code writes it."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        C, hidden = cfg.n_embd, swiglu_hidden(cfg.n_embd)
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.norm_1, self.norm_2 = nn.RMSNorm(C, 1e-6), nn.RMSNorm(C, 1e-6)
        self.qkv, self.out = nn.Linear(C, 3 * C, cfg.bias), nn.Linear(C, C, cfg.bias)
        self.gate, self.up = nn.Linear(C, hidden, False), nn.Linear(C, hidden, False)
        self.down, self.drop = nn.Linear(hidden, C, False), nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (t.reshape(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        p = self.dropout if self.training else 0.0
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(B, T, C)))
        h = self.norm_2(x)
        return x + self.drop(self.down(F.silu(self.gate(h)) * self.up(h)))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class PlainGPT(nn.Module):
    """The reference: full logits, then cross-entropy."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        kind = (cfg.pos_encoding, cfg.mlp_type, cfg.norm_type)
        if kind != ("rope", "swiglu", "rmsnorm"):
            raise ValueError(f"PlainGPT: expected rope, swiglu, rmsnorm; found {', '.join(kind)}")
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        tables = rope_tables(
            cfg.block_size, cfg.n_embd // cfg.n_head, cfg.rope_theta, cfg.rope_scale
        )
        self.register_buffer("cos", tables[0])
        self.register_buffer("sin", tables[1])
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, 1e-6)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)
        if cfg.tie_weights:
            self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x, T = self.tokens(idx), idx.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def build(variant: str, cfg: ModelConfig, device: str, compiled: bool) -> tuple[nn.Module, Any]:
    """The model, and its mean loss as a function of a batch."""
    kind, _, save = variant.partition("/")
    with torch.device(device):
        if kind == "plain":
            model: nn.Module = PlainGPT(cfg)
        else:
            model = GPT(cfg, None, kind, save or "all")
    model.to(device).train()
    assert sum(p.numel() for p in model.parameters()) == count_parameters(cfg).total
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.02)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    if kind == "plain":
        return model, torch.compile(model) if compiled else model
    if compiled:
        model.hidden = torch.compile(model.hidden)  # as the trainer does
    return model, lambda x, y: model(x, y) / y.numel()


def stepper(
    variant: str, cfg: ModelConfig, rows: int, device: str, compiled: bool = True
) -> Callable[[], float]:
    """One optimizer step on a fixed batch; returns the seconds it took on the device."""
    torch.manual_seed(0)
    model, loss_of = build(variant, cfg, device, compiled)
    optimizer = adamw(model, TrainConfig())
    x, y = (torch.randint(cfg.vocab_size, (rows, cfg.block_size), device=device) for _ in "xy")

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def ready(
    variant: str, cfg: ModelConfig, rows: int, device: str
) -> tuple[Callable[[], float], dict[str, Any]]:
    """The step, warmed up, at the largest micro-batch of rows, rows/2, ... that fits the cap."""
    tried: list[int] = []
    while True:
        try:
            began = time.perf_counter()
            step = stepper(variant, cfg, rows, device)
            first = [step() for _ in range(WARM_UP)]
            return step, {
                "ready": variant, "micro_batch": rows, "did_not_fit": tried,
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


def compile_counts() -> dict[str, Any]:
    """Graph breaks and compilations so far."""
    from torch._dynamo.utils import counters

    return {
        "graph_breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"].get("unique_graphs", 0),
    }


def memory() -> dict[str, int]:
    """Peaks of this process since they were last reset."""
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def answers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What goes to the asker: ready, then one answer per line read."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    cfg = presets.load(args.preset).model
    step, about = ready(args.variant, cfg, args.micro_batch, "cuda")
    torch.cuda.reset_peak_memory_stats()
    yield about
    for line in sys.stdin:
        seconds = [step() for _ in range(int(line))]
        yield {"seconds": seconds, **memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variant", required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--cap-gib", type=float, default=16.0)
    try:
        for answer in answers(parser.parse_args()):
            print(json.dumps(answer), flush=True)
    except Exception as e:  # the asker wants a line, whatever went wrong
        print(json.dumps({"failed": f"{type(e).__name__}: {e}"[:1000]}), flush=True)
        raise


if __name__ == "__main__":
    main()
