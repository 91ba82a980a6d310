"""A model with MyPT's forward, loaders of a user's own, and a plain trainer to compare with.

The plain side shares no code with the engine: modules of torch.nn under MyPT's names, full logits,
F.cross_entropy, torch's AdamW, the schedule and the draws written from the specification.
"""

import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mypt_fast import model as engine
from mypt_fast.config import ModelConfig
from mypt_fast.core.fit import fit
from mypt_fast.core.layers import Block
from mypt_fast.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnop"


class CoreGPT(engine.GPT):
    """MyPT's forward: always a 3-tuple, logits included. Training must do without them."""

    tokenizer: Tokenizer
    block = Block  # PyTorch's dropout for the same seeds, also in attention

    def forward(self, idx, targets=None, *args, **kwargs):
        raise AssertionError("fit made logits")


def config(**changes):
    small = {
        "batch_size": 4, "block_size": 12, "vocab_size": len(LETTERS), "n_embd": 16, "n_head": 2,
        "n_layer": 2, "dropout": 0.1, "device": "cpu",
    }  # fmt: skip
    return ModelConfig(**{**small, **changes})


def model_of(cfg, seed=3):
    made = CoreGPT(cfg, seed)
    made.tokenizer = Tokenizer.from_text(LETTERS)
    return made


def groups(model, decay=0.1):
    """MyPT specification 1.4, written again."""
    parts = ([], [])
    for name, p in model.named_parameters():
        low = name.lower()
        parts[p.ndim == 1 or "embedding" in low or "ln" in low].append(p)
    return [{"params": parts[0], "weight_decay": decay}, {"params": parts[1], "weight_decay": 0.0}]


def adamw(model, lr=1e-3):
    return torch.optim.AdamW(groups(model), lr=lr, betas=(0.9, 0.95), eps=1e-8)


def letters(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.choice([1, 1, 1, 2, 5], size=n)) % len(LETTERS)


class TextLoader:
    """MyPT's in-memory loader: torch.randint on the global generator (specification 8.3)."""

    def __init__(self, cfg, tokens=None):
        data = torch.as_tensor(letters() if tokens is None else tokens).long()
        cut = int(0.9 * len(data))
        self.cfg, self.data = cfg, {"train": data[:cut], "val": data[cut:]}
        self.drawn = []

    def get_batch(self, split="train"):
        data, T = self.data[split], self.cfg.block_size
        starts = torch.randint(len(data) - T, (self.cfg.batch_size,))
        self.drawn.append((split, starts.tolist()))
        x = torch.stack([data[i : i + T] for i in starts])
        y = torch.stack([data[i + 1 : i + T + 1] for i in starts])
        return x, y


class ShardLoader:
    """MyPT's sharded loader: NumPy's global generator, a discarded draw, one shard a batch."""

    def __init__(self, cfg, sizes=(400, 900, 1500)):
        self.cfg, self.drawn = cfg, []
        self.shards = [letters(n, seed) for seed, n in enumerate(sizes)]

    def get_batch(self, split="train"):
        T = self.cfg.block_size
        np.random.randint(0, len(self.shards))
        while True:
            number = np.random.randint(0, len(self.shards))
            most = len(self.shards[number]) - T - 1
            if most > 0:
                break
        starts = np.random.randint(0, most, size=self.cfg.batch_size)
        self.drawn.append((split, int(number), starts.tolist()))
        rows = np.stack([self.shards[number][i : i + T + 1] for i in starts])
        return torch.as_tensor(rows[:, :-1]).long(), torch.as_tensor(rows[:, 1:]).long()


class EpisodeLoader:
    """A loader with a position of its own, random masks and packed segments."""

    def __init__(self, cfg, packed=True, stateful=True):
        self.cfg, self.packed, self.stateful = cfg, packed, stateful
        self.at = {"train": 0, "val": 0}
        self.drawn = []
        if not stateful:
            self.state_dict = None

    def get_batch(self, split="train"):
        at = self.at[split]
        self.at[split] += 1
        rng = np.random.default_rng([split == "val", at])
        B, T = self.cfg.batch_size, self.cfg.block_size
        tokens = torch.as_tensor(letters(B * (T + 1), at + 1)).long().view(B, T + 1)
        mask = torch.as_tensor(rng.choice([0.0, 1.0, 2.0], size=(B, T))).float()
        mask[at % B] = 0  # weights differ from batch to batch
        self.drawn.append((split, at))
        batch = tokens[:, :-1], tokens[:, 1:], mask
        segments = torch.as_tensor(np.sort(rng.integers(1, 4, (B, T)), axis=1)).long()
        return (*batch, segments) if self.packed else batch

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = dict(state["at"])


# the plain side


class PlainAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.heads, self.p = cfg.n_head, cfg.dropout

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        y = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.p, self.training)


class PlainMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.net = nn.Sequential(
            nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(cfg.dropout)
        )

    def forward(self, x):
        return self.net(x)


class PlainBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.sa, self.fwd = PlainAttention(cfg), PlainMLP(cfg)
        self.ln1, self.ln2 = nn.LayerNorm(cfg.n_embd), nn.LayerNorm(cfg.n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.fwd(self.ln2(x))


class PlainGPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.token_embedding_table = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.position_embedding_table = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size)

    def forward(self, idx, targets, mask=None):
        x = self.token_embedding_table(idx)
        x = x + self.position_embedding_table(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x)).flatten(0, 1)
        if mask is None:
            return F.cross_entropy(logits, targets.flatten())
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return (losses * mask.flatten()).sum() / mask.sum().clamp(min=1.0)


def mypt_lr(step, peak, warmup, most):
    """MyPT specification 4.3, written again."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min((step - warmup) / max(1, most - warmup), 1)
    return 0.1 * peak + 0.45 * peak * (1 + math.cos(math.pi * share))


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def plain_fit(
    model, loader, steps, *, lr=1e-3, warmup=3, accum=1, eval_interval=20, eval_iters=2,
    eval_seed=None, restore=True,
):  # fmt: skip
    """MyPT's loop (specification 4.5); with `restore` an evaluation leaves no trace (Q-1)."""
    optimizer, losses, values = adamw(model, lr), [], []

    def evaluate():
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        if eval_seed is not None:
            seed_everything(eval_seed)
        model.eval()
        with torch.no_grad():
            found = [float(model(*loader.get_batch("val"))) for _ in range(eval_iters)]
        model.train()
        if restore:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_rng_state(kept[2])
        return sum(found) / eval_iters

    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = mypt_lr(step, lr, warmup, steps)
        if step % eval_interval == 0:
            values.append(evaluate())
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(accum):
            loss = model(*loader.get_batch("train")) / accum
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses, values


# what a run left


def events(path, kind=None):
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [e for e in found if kind is None or e["event"] == kind]


def run(cfg, loader, steps=8, *, seed=11, model=None, **arguments):
    """fit of a fresh model after `seed`, logged to fit.jsonl unless told otherwise."""
    model = model or model_of(cfg)
    optimizer = arguments.pop("optimizer", None) or adamw(model)
    seed_everything(seed)
    given = {"eval_interval": 4, "eval_iters": 2, "log_file": "fit.jsonl", **arguments}
    return model, optimizer, fit(model, loader, optimizer, steps, **given)
