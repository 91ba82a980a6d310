"""The engine this one replaces, in its manner: MyPT's model as its specification describes it.

Beside plain_gpt.py: never compiled; the forward returns (logits, loss, cache), so that the fp32
or 16-bit logits of all positions live until the backward is over; RMSNorm is written out in the
input's dtype; AdamW is PyTorch's default (foreach), not the fused kernel. Everything that decides
the numbers, the decayed groups, betas, clipping, accumulation, is the same.
"""

import torch
import torch.nn.functional as F
from plain_gpt import PlainGPT
from torch import Tensor, nn

from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.training.optim import parameter_groups


class WrittenRMSNorm(nn.Module):
    """x rsqrt(mean(x^2) + 1e-6) weight, in x's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class MyptGPT(PlainGPT):
    """Tokens and targets (B, T) to logits (B, T, V), the mean loss, and no cache."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        if cfg.norm_type == "rmsnorm":
            for block in self.blocks:
                block.norm_1, block.norm_2 = (WrittenRMSNorm(cfg.n_embd) for _ in range(2))
            self.norm = WrittenRMSNorm(cfg.n_embd)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, None]:
        logits = self.logits(idx)
        B, T, V = logits.shape
        return logits, F.cross_entropy(logits.view(B * T, V), targets.view(B * T)), None


def mypt_adamw(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW as MyPT makes it: the same groups and numbers, PyTorch's default implementation."""
    groups = parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8)
