"""Attention with dropout on a CPU, forward and backward: in strips, and PyTorch's.

pytest bench/bench_attention.py --benchmark-only     one shape
python bench/bench_attention.py                      all of them, to bench/results/cpu/
"""

import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does, for both sides

import pytest
import torch
import torch.nn.functional as F
from record import machine, save

from mypt_fast.benchmark.timing import median
from mypt_fast.kernels.dropped_attention import dropped_attention

P, ROUNDS = 0.2, 9
# sequences, heads, length, head size: of 150M_1024, small and tiny
SHAPES = {"150M_1024": (1, 12, 1024, 64), "small": (8, 8, 256, 48), "tiny": (16, 6, 128, 32)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """A forward and backward by either side."""
    B, H, T, D = shape
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, generator=draw).to(dtype)
    q, k, v = (qkv[:, :, i].transpose(1, 2).requires_grad_() for i in range(3))
    dy = torch.randn(B, H, T, D, generator=draw).to(dtype)

    def strips() -> None:
        torch.autograd.grad(dropped_attention(q, k, v, P), (q, k, v), dy)

    def torchs() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=P)
        torch.autograd.grad(y, (q, k, v), dy)

    return {"strips": strips, "torch": torchs}


def measure(name: str, dtype: str) -> dict:
    """Both in turn, after a first round that does not count."""
    sides = calls(SHAPES[name], DTYPES[dtype])
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(ROUNDS + 1):
        for side, call in sides.items():
            began = time.perf_counter()
            call()
            if turn:
                samples[side].append(time.perf_counter() - began)
    pairs = [b / a for a, b in zip(samples["strips"], samples["torch"], strict=True)]
    return {
        "preset": name, "shape": list(SHAPES[name]), "dtype": dtype, "dropout": P,
        "median_s": {side: median(s) for side, s in samples.items()},
        "times_torch": {"median": median(pairs), "min": min(pairs), "max": max(pairs)},
        "samples_s": samples,
    }  # fmt: skip


@pytest.mark.parametrize("side", ["strips", "torch"])
def test_attention_with_dropout(benchmark, side: str) -> None:
    benchmark.group = "attention with dropout, small, fp32"
    benchmark.pedantic(calls(SHAPES["small"], torch.float32)[side], rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    rows = [measure(name, dtype) for name in SHAPES for dtype in DTYPES]
    for r in rows:
        print(f"{r['preset']:10} {r['dtype']} {r['times_torch']['median']:.2f}x PyTorch's speed")
    save("attention", machine(), rows)
