"""Checkpoints of MyPT's first months, made and computed by plain PyTorch.

Written from the specification (2.6, 5.2) and from nothing of ours: this file imports only torch,
so that what it computes can be held against what we make of its files.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

LETTERS = "abcdefghijklmnop"
CHAR = {"token_kind": "char", "chars": list(LETTERS)}
SIZES = {
    "batch_size": 4, "block_size": 12, "vocab_size": len(LETTERS), "n_embd": 16, "n_head": 2,
    "n_layer": 2, "dropout": 0.0, "bias": False, "device": "cpu",
}  # fmt: skip
GPT2 = {**SIZES, "vocab_size": 50304, "n_embd": 8}
# The 15 special tokens of before 2026-02-15; assistant_open and eot as specification 9.3 has them.
OLD_TAGS = ("system", "user", "toolcall", "assistant", "toolresult", "user_context", "think")
FIFTEEN = {
    f"myPT_{tag}_{side}": 50257 + 2 * n + (side == "close")
    for n, tag in enumerate(OLD_TAGS)
    for side in ("open", "close")
} | {"myPT_eot": 50271}


def fifteen_state() -> dict[str, Any]:
    """The tokenizer state of a model with 15 special tokens."""
    strings = {
        f"<{'/' * name.endswith('_close')}{name.removesuffix('_open').removesuffix('_close')}>": i
        for name, i in FIFTEEN.items()
    }
    return {
        "token_kind": "gpt2", "chars": None, "base_vocab_size": 50257, "model_vocab_size": 50304,
        "special_token_encoder": strings, "special_tokens_by_name": FIFTEEN,
        "special_token_version": 1,
    }  # fmt: skip


class Head(nn.Module):
    """One head with matrices of its own."""

    def __init__(self, cfg: dict[str, Any], tril: bool) -> None:
        super().__init__()
        size = cfg["n_embd"] // cfg["n_head"]
        self.key = nn.Linear(cfg["n_embd"], size, bias=cfg["bias"])
        self.query = nn.Linear(cfg["n_embd"], size, bias=cfg["bias"])
        self.value = nn.Linear(cfg["n_embd"], size, bias=cfg["bias"])
        if tril:
            block = cfg["block_size"]
            self.register_buffer("tril", torch.tril(torch.ones(block, block)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(-2, -1) / math.sqrt(self.key.out_features)
        allowed = torch.arange(T)[:, None] >= torch.arange(T)[None, :]
        exponents = torch.where(allowed, scores, torch.tensor(-math.inf))
        exponents = (exponents - exponents.amax(-1, keepdim=True)).exp()
        return exponents / exponents.sum(-1, keepdim=True) @ self.value(x)


class Heads(nn.Module):
    """The heads beside each other, and a projection that always has a bias."""

    def __init__(self, cfg: dict[str, Any], tril: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(cfg, tril) for _ in range(cfg["n_head"]))
        self.proj = nn.Linear(cfg["n_embd"], cfg["n_embd"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class Feed(nn.Module):
    """C -> 4C -> ReLU -> C."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        C = cfg["n_embd"]
        self.net = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class OldBlock(nn.Module):
    """Order of its parts: sa, fwd, ln1, ln2."""

    def __init__(self, cfg: dict[str, Any], tril: bool) -> None:
        super().__init__()
        self.sa, self.fwd = Heads(cfg, tril), Feed(cfg)
        self.ln1, self.ln2 = nn.LayerNorm(cfg["n_embd"]), nn.LayerNorm(cfg["n_embd"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.fwd(self.ln2(x))


class OldGPT(nn.Module):
    """The model of L0 and L1 (with `tril`), or of L2."""

    def __init__(self, cfg: dict[str, Any], tril: bool = True, seed: int = 3) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(cfg["vocab_size"], cfg["n_embd"])
        self.position_embedding_table = nn.Embedding(cfg["block_size"], cfg["n_embd"])
        self.blocks = nn.Sequential(*(OldBlock(cfg, tril) for _ in range(cfg["n_layer"])))
        self.ln_f = nn.LayerNorm(cfg["n_embd"])
        self.lm_head = nn.Linear(cfg["n_embd"], cfg["vocab_size"])
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():  # none of them zero or one: every tensor has to count
            p.data = torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1) * 0.1

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        T = idx.shape[1]
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T))
        return self.lm_head(self.ln_f(self.blocks(x)))

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        log_p = self(idx).log_softmax(-1)
        return -log_p.gather(-1, targets[..., None]).mean()


def batch(cfg: dict[str, Any], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets, (4, block_size)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, cfg["block_size"] + 1)
    ids = torch.randint(cfg["vocab_size"], shape, generator=generator)
    return ids[:, :-1], ids[:, 1:]


def old_groups(model: OldGPT) -> list[dict[str, Any]]:
    """The two groups of 2025-12-27 and later."""
    plain = {
        n for n, p in model.named_parameters()
        if p.dim() == 1 or "embedding" in n.lower() or "ln" in n.lower()
    }  # fmt: skip
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if n not in plain], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n in plain], "weight_decay": 0.0},
    ]


def trained(
    cfg: dict[str, Any], tril: bool = True, steps: int = 3, groups: int = 1
) -> tuple[OldGPT, torch.optim.AdamW]:
    """A model after some steps of its era's AdamW, with the moments of them."""
    model = OldGPT(cfg, tril)
    over: Any = model.parameters() if groups == 1 else old_groups(model)
    optimizer = torch.optim.AdamW(over, lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(*batch(cfg, step)).backward()
        optimizer.step()
    return model, optimizer


def single_file(
    path: Path,
    model: OldGPT | dict[str, torch.Tensor],
    cfg: Any,
    tokenizer: Any = CHAR,
    optimizer: torch.optim.Optimizer | None = None,
    step: int | None = 3,
    **changes: Any,
) -> Path:
    """Write what MyPT of 2025-11 wrote; a change of None leaves a key out."""
    content = {
        "model_state_dict": model.state_dict() if isinstance(model, OldGPT) else model,
        "config": cfg,
        "tokenizer": tokenizer,
        "step": step,
        "optimizer_state_dict": optimizer.state_dict() if optimizer else None,
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v for k, v in content.items() if v is not None or k == "tokenizer"}, path)
    return path


def old_bundle(
    folder: Path,
    model: OldGPT | dict[str, torch.Tensor],
    cfg: dict[str, Any],
    tokenizer: Any = CHAR,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 3,
    wrapped: bool = False,
) -> Path:
    """Write a bundle of 2025-12 or later, of a per-head model or of the weights given."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if isinstance(model, OldGPT) else model
    content = {"state_dict": weights, "checkpoint_dtype": None, "model_dtype": "float32"}
    torch.save(content if wrapped else weights, folder / "model.pt")
    state: dict[str, Any] = {"step": step}
    if optimizer is not None:
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        state["optimizer_file"] = "optimizer.pt"
    for name, value in (
        ("config", cfg), ("tokenizer", tokenizer), ("training_state", state)
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


# today's layout (2025-12-28 and later)

LLAMA = {
    **SIZES, "pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm",
    "tie_weights": True, "rope_theta": 500.0, "rope_scale": 2.0,
}  # fmt: skip


def fused_weights(cfg: dict[str, Any], seed: int = 4) -> dict[str, torch.Tensor]:
    """A state_dict with one qkv per block: key, shape and order of the specification's 2.5."""
    C, V = cfg["n_embd"], cfg["vocab_size"]
    llama = "mlp_type" in cfg
    hidden = math.ceil(int(8 * C / 3) / 64) * 64
    shapes = {"token_embedding_table.weight": (V, C)}
    if not llama:
        shapes["position_embedding_table.weight"] = (cfg["block_size"], C)
    for i in range(cfg["n_layer"]):
        linear = {"sa.qkv": (3 * C, C), "sa.proj": (C, C)}
        for name, shape in linear.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            if cfg["bias"]:
                shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        if llama:
            wide = {"w_gate": (hidden, C), "w_up": (hidden, C), "w_down": (C, hidden)}
            shapes |= {f"blocks.{i}.fwd.{k}.weight": s for k, s in wide.items()}
        else:
            for name, shape in {"net.0": (4 * C, C), "net.2": (C, 4 * C)}.items():
                shapes[f"blocks.{i}.fwd.{name}.weight"] = shape
                shapes[f"blocks.{i}.fwd.{name}.bias"] = shape[:1]
        for norm in ("ln1", "ln2"):
            shapes |= {f"blocks.{i}.{norm}.{k}": (C,) for k in ("weight", "bias")[: 2 - llama]}
    shapes |= {f"ln_f.{k}": (C,) for k in ("weight", "bias")[: 2 - llama]}
    shapes |= {"lm_head.weight": (V, C), "lm_head.bias": (V,)}
    generator = torch.Generator().manual_seed(seed)
    weights = {
        k: torch.randn(s, generator=generator) * 0.3 + (len(s) == 1) * 0.1
        for k, s in shapes.items()
    }
    if cfg.get("tie_weights"):
        weights["lm_head.weight"] = weights["token_embedding_table.weight"]
    return weights


def fused_logits(w: dict[str, torch.Tensor], cfg: dict[str, Any], idx: torch.Tensor) -> Any:
    """Logits of those weights, (B, T, V): every head by itself, no operator of PyTorch's fused."""
    T, H = idx.shape[1], cfg["n_head"]
    D = cfg["n_embd"] // H
    llama = "mlp_type" in cfg

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if llama:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        if not llama:
            return x
        frequency = cfg["rope_theta"] ** (-2 * torch.arange(D // 2) / D)
        angle = torch.arange(T)[:, None] / cfg["rope_scale"] * frequency
        low, high = x[..., : D // 2], x[..., D // 2 :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    x = w["token_embedding_table.weight"][idx]
    if not llama:
        x = x + w["position_embedding_table.weight"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(cfg["n_layer"]):
        at = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{at}.ln1"), f"{at}.sa.qkv").chunk(3, dim=-1)
        heads = []
        for h in range(H):
            own = slice(h * D, (h + 1) * D)
            scores = rotated(q[..., own]) @ rotated(k[..., own]).transpose(-2, -1) / math.sqrt(D)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., own])
        x = x + linear(torch.cat(heads, dim=-1), f"{at}.sa.proj")
        y = norm(x, f"{at}.ln2")
        if llama:
            gate = linear(y, f"{at}.fwd.w_gate")
            y = linear(gate * torch.sigmoid(gate) * linear(y, f"{at}.fwd.w_up"), f"{at}.fwd.w_down")
        else:
            y = linear(y, f"{at}.fwd.net.0")
            y = linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), f"{at}.fwd.net.2")
        x = x + y
    return linear(norm(x, "ln_f"), "lm_head")
