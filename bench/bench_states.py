"""State layouts: the loss each comes to, from equal starts on equal data, and what a step costs.

pytest bench/bench_states.py --benchmark-only        the optimizer's step in each layout
python bench/bench_states.py                         that, and the parity report: a char model
    trained in every layout from several seeds; saved to bench/results/cpu/states.json
"""

import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from record import machine, run_suite, save
from torch import Tensor

from mypt_fast import accounting
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.model import GPT
from mypt_fast.training.optim import clip, make_optimizer
from mypt_fast.training.schedule import learning_rate

LAYOUTS = ("exact", "exact16", "fast")
SEEDS = (1, 2, 3)
STEPS, BATCH, WINDOWS = 300, 16, 256
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 256}
BYTES = 3_000_000  # of the corpus; the last tenth is validation


def corpus() -> Tensor:
    """Python's own sources as bytes, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(f.read_bytes() for f in files)[:BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def made(state: str, seed: int, steps: int = STEPS) -> tuple[GPT, Any, TrainConfig]:
    """A model, its optimizer and settings."""
    model = GPT(ModelConfig(**SHAPE, dropout=0.0), seed=seed).train()
    cfg = TrainConfig(
        state=state, learning_rate=1e-3, max_iters=steps, warmup_iters=steps // 10, seed=seed
    )
    return model, make_optimizer(model, cfg), cfg


def windows(data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets at `starts`."""
    at = starts[:, None] + torch.arange(SHAPE["block_size"] + 1)
    tokens = data[at].long()
    return tokens[:, :-1], tokens[:, 1:]


def mean_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Per token, computed in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.summed_loss(x, y) / y.numel()


def trained(state: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train one model; returns its losses and the gradient norm at the end."""
    data = corpus()
    cut = len(data) * 9 // 10
    model, optimizer, cfg = made(state, seed, steps)
    generator = torch.Generator().manual_seed(seed)
    losses, norm = [], 0.0
    for step in range(steps):
        starts = torch.randint(cut - SHAPE["block_size"] - 1, (BATCH,), generator=generator)
        loss = mean_loss(model, *windows(data[:cut], starts))
        loss.backward()
        norm = float(clip(optimizer, model, 1.0))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    held = torch.linspace(0, len(data) - cut - SHAPE["block_size"] - 2, WINDOWS).long()
    with torch.no_grad():
        val = mean_loss(model.eval(), *windows(data[cut:], held)).item()
    return {
        "state": state, "seed": seed, "steps": steps, "val_loss": val,
        "train_loss_last_50": statistics.mean(losses[-50:]), "grad_norm": norm,
        "losses": [round(x, 4) for x in losses[9::10]],
    }  # fmt: skip


@pytest.mark.parametrize("state", LAYOUTS)
def test_step(benchmark: Any, state: str) -> None:
    """The optimizer alone, on a CPU, where every layout goes over fp32 forms of its tensors."""
    model, optimizer, _ = made(state, 1)
    data = corpus()
    mean_loss(model, *windows(data, torch.arange(BATCH))).backward()
    benchmark.extra_info["state_bytes"] = accounting.state_bytes(model.config, state).total
    benchmark(optimizer.step)


def main() -> None:
    """Run, print and save everything."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = []
    for seed in SEEDS:
        for state in LAYOUTS:
            rows.append(trained(state, seed))
            print({k: v for k, v in rows[-1].items() if k != "losses"}, flush=True)
    facts = {**machine(), "shape": SHAPE, "batch": BATCH, "seconds": time.perf_counter() - began}
    rows += [
        {"step": b["params"]["state"], **b["extra_info"], "seconds": b["stats"]["data"]}
        for b in run_suite(__file__)
    ]
    print(save("states", facts, rows))


if __name__ == "__main__":
    main()
