"""MyPT's model of every era in plain PyTorch, written from the specification alone.

Nothing of mypt_fast is imported: a function from a state_dict to logits. Per-head weights
(specification 2.6, until the end of 2025) are read as they lie, head by head, and mean ReLU.
Shapes: B batch, T time, C width, H heads, D head size.
"""

import math

import torch
import torch.nn.functional as F


def default_config(**options):
    """The fields of a config that decide what the weights compute."""
    return {
        "block_size": 8, "n_head": 2, "n_layer": 2, "pos_encoding": "learned", "mlp_type": "gelu",
        "norm_type": "layernorm", "rope_theta": 10000.0, "rope_scale": 1.0,
        "segment_position_reset": True, **options,
    }  # fmt: skip


def rotate(x, positions, theta, scale):
    """Half-split rotation of x: (B, H, T, D) at positions (B, T)."""
    D = x.shape[-1]
    half = D // 2
    frequency = torch.tensor([theta ** (-2 * i / D) for i in range(half)], dtype=torch.float64)
    angle = (positions.double() / scale)[..., None] * frequency  # (B, T, D/2)
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def segment_positions(segment_ids):
    """Positions that count from every change of the id, row by row, token by token."""
    rows = []
    for row in segment_ids.tolist():
        out = []
        for t, one in enumerate(row):
            out.append(out[-1] + 1 if t and one == row[t - 1] else 0)
        rows.append(out)
    return torch.tensor(rows)


def norm(state, name, x, kind):
    if kind == "rmsnorm":
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def projected(state, prefix, x, n_head):
    """Queries, keys and values (B, H, T, D), from a packed matrix or from one per head."""
    if f"{prefix}.qkv.weight" in state:
        packed = F.linear(x, state[f"{prefix}.qkv.weight"], state.get(f"{prefix}.qkv.bias"))
        B, T, _ = x.shape
        return [p.view(B, T, n_head, -1).transpose(1, 2) for p in packed.chunk(3, -1)]
    out = []
    for part in ("query", "key", "value"):
        heads = [f"{prefix}.heads.{h}.{part}" for h in range(n_head)]
        out.append(
            torch.stack(
                [F.linear(x, state[f"{h}.weight"], state.get(f"{h}.bias")) for h in heads], 1
            )
        )
    return out


def attention(state, prefix, x, config, positions, allowed):
    q, k, v = projected(state, prefix, x, config["n_head"])
    if config["pos_encoding"] == "rope":
        q, k = (rotate(t, positions, config["rope_theta"], config["rope_scale"]) for t in (q, k))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    y = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1) @ v
    y = y.transpose(1, 2).flatten(2)
    return F.linear(y, state[f"{prefix}.proj.weight"], state.get(f"{prefix}.proj.bias"))


def feed_forward(state, prefix, x, config):
    if config["mlp_type"] == "swiglu":
        gate, up = (F.linear(x, state[f"{prefix}.w_{n}.weight"]) for n in ("gate", "up"))
        return F.linear(gate * torch.sigmoid(gate) * up, state[f"{prefix}.w_down.weight"])
    h = F.linear(x, state[f"{prefix}.net.0.weight"], state[f"{prefix}.net.0.bias"])
    per_head = any(".sa.heads." in key for key in state)
    h = h.clamp(min=0) if per_head else 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return F.linear(h, state[f"{prefix}.net.2.weight"], state[f"{prefix}.net.2.bias"])


def logits(state, config, idx, segment_ids=None):
    """(B, T, V) of token ids (B, T); config as `default_config` makes it."""
    B, T = idx.shape
    positions = torch.arange(T).expand(B, T)
    allowed = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
        if config["segment_position_reset"]:
            positions = segment_positions(segment_ids)
    x = state["token_embedding_table.weight"][idx]
    if config["pos_encoding"] != "rope":
        x = x + state["position_embedding_table.weight"][positions]
    for i in range(config["n_layer"]):
        h = norm(state, f"blocks.{i}.ln1", x, config["norm_type"])
        x = x + attention(state, f"blocks.{i}.sa", h, config, positions, allowed)
        h = norm(state, f"blocks.{i}.ln2", x, config["norm_type"])
        x = x + feed_forward(state, f"blocks.{i}.fwd", h, config)
    x = norm(state, "ln_f", x, config["norm_type"])
    return F.linear(x, state["lm_head.weight"], state["lm_head.bias"])


def loss(rows, targets, mask=None):
    """Mean over the targets, or weighted: sum(ce mask) / max(sum(mask), 1)."""
    each = -rows.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    if mask is None:
        return each.mean()
    return (each * mask).sum() / max(float(mask.sum()), 1.0)
