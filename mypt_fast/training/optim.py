"""Which parameters are trained, their groups and the optimizer."""

import torch
from torch import nn

from mypt_fast.config import TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.model import GPT, decays


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters: matrices decay (`model.decays`), the rest does not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[decays(name, p.dim())].append(p)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), betas (0.9, 0.95), PyTorch's fused kernel."""
    groups = parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def freeze(model: GPT, cfg: TrainConfig) -> None:
    """Exclude embeddings and the lowest blocks from training, if asked; raises ConfigError."""
    if cfg.freeze_layers > len(model.blocks):
        raise ConfigError(
            "freeze_layers is larger than n_layer",
            f"found {cfg.freeze_layers} > {len(model.blocks)}",
        )
    frozen: list[nn.Module] = list(model.blocks[: cfg.freeze_layers])
    if cfg.freeze_embeddings:
        frozen.append(model.token_embedding_table)
        if model.config.pos_encoding != "rope":
            frozen.append(model.position_embedding_table)
    for module in frozen:
        module.requires_grad_(False)
