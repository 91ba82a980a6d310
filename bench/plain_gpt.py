"""The baseline: a GPT in the plain PyTorch that small trainers write, with full logits.

It computes what mypt_fast.model computes: with the same weights it has the same loss. Fused QKV,
PyTorch's attention, one `F.cross_entropy` over (B T, V) logits, whole-model torch.compile, as in
nanoGPT. Its names carry "embedding", so that AdamW leaves the same parameters undecayed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mypt_fast.accounting import swiglu_hidden
from mypt_fast.config import ModelConfig
from mypt_fast.kernels import rope_tables

# part of a name in mypt_fast.model: part of its name here
NAMES = {
    "sa.qkv": "qkv", "sa.proj": "out", "fwd.net.0": "up", "fwd.net.2": "down",
    "fwd.w_gate": "gate", "fwd.w_up": "up", "fwd.w_down": "down", "ln1": "norm_1",
    "ln2": "norm_2", "ln_f": "norm", "lm_head": "head",
    "token_embedding_table": "token_embedding", "position_embedding_table": "position_embedding",
}  # fmt: skip


def norm_of(cfg: ModelConfig) -> nn.Module:
    """The norm a config names."""
    return nn.RMSNorm(cfg.n_embd, 1e-6) if cfg.norm_type == "rmsnorm" else nn.LayerNorm(cfg.n_embd)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves, (B, H, T, D) by tables of (T, D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class PlainBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        C, self.gated = cfg.n_embd, cfg.mlp_type == "swiglu"
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.norm_1, self.norm_2 = norm_of(cfg), norm_of(cfg)
        self.qkv, self.out = nn.Linear(C, 3 * C, cfg.bias), nn.Linear(C, C, cfg.bias)
        hidden = swiglu_hidden(C) if self.gated else 4 * C
        if self.gated:
            self.gate = nn.Linear(C, hidden, False)
        self.up = nn.Linear(C, hidden, not self.gated)
        self.down = nn.Linear(hidden, C, not self.gated)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, place: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (t.reshape(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        if place is not None:
            q, k = turned(q, *place), turned(k, *place)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(B, T, C)))
        h = self.norm_2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.gated else F.gelu(self.up(h))
        return x + self.drop(self.down(h))


class PlainGPT(nn.Module):
    """Tokens and targets (B, T) to the mean loss."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.rope = cfg.pos_encoding == "rope"
        if self.rope:
            width = cfg.n_embd // cfg.n_head
            tables = rope_tables(cfg.block_size, width, cfg.rope_theta, cfg.rope_scale)
            for name, table in zip(("cos", "sin"), tables, strict=True):
                self.register_buffer(name, table, persistent=False)
        else:
            self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = norm_of(cfg)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)
        if cfg.tie_weights:
            self.head.weight = self.token_embedding.weight

    def logits(self, idx: Tensor) -> Tensor:
        """All of them, (B, T, V)."""
        x, T, place = self.token_embedding(idx), idx.shape[1], None
        if self.rope:
            place = (self.cos[:T], self.sin[:T])
        else:
            x = x + self.position_embedding(torch.arange(T, device=idx.device))
        for block in self.blocks:
            x = block(x, place)
        return self.head(self.norm(x))

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(idx)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


@torch.no_grad()
def take(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a reference the weights of a mypt_fast model, by NAMES."""
    renamed = {}
    for key, value in weights.items():
        for theirs, name in NAMES.items():
            key = key.replace(theirs, name)
        renamed[key] = value
    model.load_state_dict(renamed)
