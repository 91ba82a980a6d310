"""A training step on this CPU, ours beside a plain PyTorch GPT of the same shape.

Both models take the same batch, dtype, AdamW (fused) and gradient clipping, in one process, in
turn: every round runs the reference once and ours once, and the ratio is taken pair by pair.

    pytest bench/bench_step.py --benchmark-only          the rows
    python bench/bench_step.py                           the rows, saved to bench/results/cpu/
"""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does, for both sides

import pytest
import torch
import torch.nn.functional as F
from record import machine, save
from torch import Tensor, nn

from mypt_fast import presets
from mypt_fast.accounting import count_parameters
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.optim import adamw

ROUNDS = 7
# the preset's batch for tiny; 8 of small's 32 sequences keep the whole file under 6 minutes
SEQUENCES = {"tiny": 16, "small": 8}
CASES = [("tiny", "fp32"), ("small", "fp32"), ("tiny", "bf16")]


class PlainBlock(nn.Module):
    """A pre-norm block as every plain GPT writes it."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        C = cfg.n_embd
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (t.reshape(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_2(x)))))


class PlainGPT(nn.Module):
    """The reference: full logits, then cross-entropy."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.positions = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def stepper(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., float]:
    """One optimizer step on a batch; returns the seconds it took."""
    optimizer = adamw(model, TrainConfig())

    def step(x: Tensor, y: Tensor) -> float:
        began = time.perf_counter()
        loss_of(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return step


def pair(
    preset: str, dtype: str, compiled: bool
) -> tuple[Callable[[], float], Callable[[], float], int]:
    """Reference step, our step, tokens per step."""
    cfg = presets.load(preset).model
    torch.manual_seed(0)
    plain, ours = PlainGPT(cfg).train(), GPT(cfg).train()
    assert sum(p.numel() for p in plain.parameters()) == count_parameters(cfg).total
    shape = (SEQUENCES[preset], cfg.block_size)
    x, y = (torch.randint(cfg.vocab_size, shape) for _ in "xy")
    reference_loss: Callable[[Tensor, Tensor], Tensor] = plain
    if compiled:
        reference_loss = torch.compile(plain)
        ours.hidden = torch.compile(ours.hidden)  # as the trainer does
    amp = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16")

    def under_amp(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x: Tensor, y: Tensor) -> Tensor:
            with amp:
                return loss(x, y)

        return call

    reference = stepper(plain, under_amp(reference_loss))
    own = stepper(ours, under_amp(lambda x, y: ours(x, y) / y.numel()))
    for step in (reference, own, reference, own):  # compile and warm up
        step(x, y)
    return lambda: reference(x, y), lambda: own(x, y), x.numel()


def compare(preset: str, dtype: str, compiled: bool) -> dict:
    """Run both in turn; returns samples and the median of the pairwise ratios."""
    reference, own, tokens = pair(preset, dtype, compiled)
    pairs = [(reference(), own()) for _ in range(ROUNDS)]
    return row(preset, dtype, compiled, pairs, tokens)


def row(
    preset: str, dtype: str, compiled: bool, pairs: list[tuple[float, float]], tokens: int
) -> dict:
    ratios = [r / o for r, o in pairs]
    return {
        "preset": preset,
        "dtype": dtype,
        "mode": "compiled" if compiled else "eager",
        "sequences": SEQUENCES[preset],
        "tokens_per_step": tokens,
        "reference_s": [r for r, _ in pairs],
        "ours_s": [o for _, o in pairs],
        "speedup_median": statistics.median(ratios),
        "speedup_min": min(ratios),
        "ours_tokens_per_s": tokens / statistics.median(o for _, o in pairs),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("preset", "dtype"), CASES)
def test_step(benchmark, preset: str, dtype: str, compiled: bool) -> None:
    if dtype == "bf16" and not devices.cpu_has_bf16():
        pytest.skip("this CPU has no bf16 instructions")
    benchmark.group = f"training step, {preset} {dtype}"
    reference, own, tokens = pair(preset, dtype, compiled)
    reference_s: list[float] = []
    own_s: list[float] = []
    benchmark.pedantic(
        lambda: own_s.append(own()),
        setup=lambda: reference_s.append(reference()),  # untimed here, timed by itself
        rounds=ROUNDS,
    )
    result = row(preset, dtype, compiled, list(zip(reference_s, own_s, strict=True)), tokens)
    benchmark.extra_info.update(result)
    print(f"\n{preset} {result['mode']}: {result['speedup_median']:.3f}x plain PyTorch")


if __name__ == "__main__":
    cases = [c for c in CASES if c[1] == "fp32" or devices.cpu_has_bf16()]
    rows = [compare(p, d, c) for p, d in cases for c in (False, True)]
    for r in rows:
        ratio = f"{r['speedup_median']:.3f}x (min {r['speedup_min']:.3f})"
        case = f"{r['preset']:6} {r['dtype']} {r['mode']:9}"
        print(f"{case} {ratio} {r['ours_tokens_per_s']:,.0f} tokens/s")
    save("step", machine(), rows)
