"""transformers' LLaMA, with Liger's kernels where they are installed, for presets of that kind.

It has no bias on the head and no dropout but attention's: the rows say so. GPT-2-style presets have
no fair peer there (its Conv1D has biases everywhere, Liger does not patch it) and are left out.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from mypt_fast.accounting import swiglu_hidden
from mypt_fast.config import ModelConfig, TrainConfig

NAMES = {
    "token_embedding_table": "model.embed_tokens", "blocks.": "model.layers.",
    "sa.proj": "self_attn.o_proj", "fwd.w_gate": "mlp.gate_proj", "fwd.w_up": "mlp.up_proj",
    "fwd.w_down": "mlp.down_proj", "ln1": "input_layernorm", "ln2": "post_attention_layernorm",
    "ln_f": "model.norm",
}  # fmt: skip


def why_not(cfg: ModelConfig, device: str) -> str | None:
    """Why there is no such row; None if there is."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if (cfg.pos_encoding, cfg.mlp_type, cfg.norm_type) != ("rope", "swiglu", "rmsnorm"):
        return "only presets with rope, swiglu and rmsnorm have a peer in transformers"
    if cfg.bias or cfg.rope_scale != 1.0:
        return "transformers' LLaMA has neither biases here nor a linear scale of positions"
    return None


def liger_version(device: str) -> str | None:
    """Liger's version where it will be used: its kernels need a GPU."""
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        return None
    from importlib import metadata

    return metadata.version("liger-kernel")


def versions(device: str) -> dict[str, Any]:
    """What a row says of it: transformers' version, and Liger's or None where it has no part."""
    from importlib import metadata

    return {"transformers": metadata.version("transformers"), "liger": liger_version(device)}


class HfGPT(nn.Module):
    """Tokens and targets (B, T) to the mean loss."""

    def __init__(self, cfg: ModelConfig, device: str) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        if liger_version(device):
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(
                rope=True, swiglu=True, rms_norm=True, cross_entropy=False,
                fused_linear_cross_entropy=True,
            )  # fmt: skip
        asked: dict[str, Any] = {
            "vocab_size": cfg.vocab_size, "hidden_size": cfg.n_embd,
            "intermediate_size": swiglu_hidden(cfg.n_embd), "num_hidden_layers": cfg.n_layer,
            "num_attention_heads": cfg.n_head, "num_key_value_heads": cfg.n_head,
            "max_position_embeddings": cfg.block_size, "rms_norm_eps": 1e-6,
            "rope_theta": cfg.rope_theta, "tie_word_embeddings": cfg.tie_weights,
            "attention_dropout": cfg.dropout, "use_cache": False,
            "attn_implementation": "sdpa",
        }  # fmt: skip
        self.net = LlamaForCausalLM(LlamaConfig(**asked))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        # the targets are shifted already, so they go beside the labels that would be shifted
        return self.net(input_ids=idx, labels=targets, shift_labels=targets).loss

    @torch.no_grad()
    def take(self, weights: dict[str, Tensor], width: int) -> None:
        """The weights of a mypt_fast model; its head's bias, zero at first, has no place here."""
        renamed = {}
        for key, value in weights.items():
            for theirs, name in NAMES.items():
                key = key.replace(theirs, name)
            if "sa.qkv" in key:
                for i, part in enumerate("qkv"):
                    rows = value[i * width : (i + 1) * width]
                    renamed[key.replace("sa.qkv", f"self_attn.{part}_proj")] = rows
            elif key != "lm_head.bias":
                renamed[key] = value
        self.net.load_state_dict(renamed)


def hf_adamw(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """Our groups and numbers: matrices decay, embeddings and norms do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in embeddings]
    rest = [p for p in parameters if p.dim() <= 1 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
