"""Which parameters are trained, their groups and the optimizer."""

import torch
from torch import Tensor, nn

from mypt_fast.config import TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.model import GPT, decays
from mypt_fast.training.split_adamw import Remainders, SplitAdamW


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


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in the state layout of `cfg`; `exact16` and `fast` turn the model's matrices to bf16.

    The model is on its device, in fp32, and frozen where it will be.
    """
    if cfg.state in ("auto", "exact"):  # nobody planned: nothing to save memory for
        return adamw(model, cfg)
    coded = cfg.state == "fast"
    rest = Remainders(model, torch.bfloat16 if coded else torch.float32)
    groups = parameter_groups(model, cfg.weight_decay)
    return SplitAdamW(groups, rest.of, coded, lr=cfg.learning_rate)


def adamw(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), betas (0.9, 0.95), PyTorch's fused kernel; all in fp32."""
    groups = parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def clip(optimizer: torch.optim.Optimizer, model: nn.Module, limit: float) -> Tensor:
    """Clip the gradients to a norm of `limit`; returns their norm, 0-d, on their device."""
    if isinstance(optimizer, SplitAdamW):
        return optimizer.clip(model.parameters(), limit)
    return nn.utils.clip_grad_norm_(model.parameters(), limit)


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
