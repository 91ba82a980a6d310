"""Weights and moments of MyPT's older layouts, brought into today's (MyPT specification 2.6).

Until 2025-12-28 every attention head had three matrices of its own, the feed-forward was ReLU,
and the attention's output had a bias whatever the config said. The matrices concatenate into one
`qkv` without loss; the rest is the config key `per_head_era`. The optimizer was one AdamW group in
the order of the parameters, then two groups as today, always with a state for every head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.config import ModelConfig
from mypt_fast.errors import FormatError
from mypt_fast.model import GPT, decays
from mypt_fast.schema import build, field_names

HEAD = re.compile(r"blocks\.(\d+)\.sa\.heads\.(\d+)\.(?:(key|query|value)\.(weight|bias)|tril)")
MOMENTS = ("exp_avg", "exp_avg_sq")
Parts = dict[str, list[str]]  # name in today's layout -> names in the file, to be concatenated


@dataclass
class Modern:
    """An old checkpoint in today's layout."""

    config: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    is_per_head: bool = False
    notices: list[str] = field(default_factory=list)


def is_per_head(names: Iterable[object]) -> bool:
    """Whether a state_dict with these keys is of the per-head era."""
    return any(isinstance(name, str) and HEAD.fullmatch(name) for name in names)


def modernise(
    config: Mapping[str, Any], weights: Mapping[str, Any], optimizer: Any, where: str
) -> Modern:
    """Return config, weights and moments in today's layout, every key and shape checked.

    Args:
        config: GPTConfig fields of any age; unknown ones are left out.
        weights: the state_dict in the file's own order, which is that of its parameters.
        optimizer: its optimizer's state_dict, or None.
        where: the file, for messages.

    Raises:
        ConfigError: for a setting that cannot be.
        FormatError: naming the key, what was expected and what was found.
    """
    per_head = is_per_head(weights)
    known = {k: v for k, v in config.items() if k in set(field_names(ModelConfig))}
    if per_head:
        known["per_head_era"] = True
    cfg = build(ModelConfig, known, f"{where}: config")
    cfg.check(f"{where}: config")
    check_layers(weights, cfg, where)
    shapes = parameter_shapes(cfg)
    parts = {name: _parts(name, cfg.n_head) if per_head else [name] for name in shapes}
    check_shapes(weights, shapes, parts, where)
    joined = {name: _joined([weights[n] for n in names]) for name, names in parts.items()}
    out = Modern(cfg, joined, is_per_head=per_head)
    if optimizer is not None:
        try:
            out.optimizer = _moments(optimizer, weights, parts, cfg)
        except _Unmapped as e:
            out.notices.append(
                f"{where}: the optimizer's state does not fit the weights ({e}); "
                "its moments start from zero"
            )
    return out


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state_dict of a config's model; takes no memory for them."""
    with torch.device("meta"):
        model = GPT(cfg, seed=None)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_layers(weights: Mapping[str, Any], cfg: ModelConfig, where: str) -> None:
    """Compare the numbers of blocks and heads with the config's; raises FormatError."""
    names = [n for n in weights if isinstance(n, str)]
    matrices = 3 * cfg.n_layer * cfg.n_head  # named below: no more than the file accounts for
    if is_per_head(names) and matrices > 2 * len(names):
        raise FormatError(
            f"{where}: the weights do not fit the config",
            f"expected {matrices} matrices of heads, found {len(names)} tensors in all",
        )
    blocks = {m[1] for n in names if (m := re.match(r"blocks\.(\d+)\.", n))}
    heads = {m[2] for n in names if (m := HEAD.fullmatch(n))}
    for what, found, expected in (
        ("n_layer", len(blocks), cfg.n_layer),
        ("n_head", len(heads) or cfg.n_head, cfg.n_head),
    ):
        if found != expected:
            raise FormatError(
                f"{where}: the weights do not fit the config",
                f"expected {what} {expected}, found {found}",
            )


def check_shapes(
    weights: Mapping[str, Any], shapes: dict[str, tuple[int, ...]], parts: Parts, where: str
) -> None:
    """Compare every key and shape of a file with its config's; raises FormatError."""
    expected = {
        old: _part_shape(shapes[name], len(names)) for name, names in parts.items() for old in names
    }
    for name, shape in expected.items():
        value = weights.get(name)
        if value is None:
            raise FormatError(f"{where}: {name} is missing", f"expected {_text(shape)}")
        if not isinstance(value, Tensor):
            raise FormatError(
                f"{where}: {name}: expected {_text(shape)}", f"found a {type(value).__name__}"
            )
        if tuple(value.shape) != shape or not value.is_floating_point():
            kind = "" if value.is_floating_point() else f" of {value.dtype}"
            raise FormatError(
                f"{where}: {name}: expected {_text(shape)}",
                f"found {_text(tuple(value.shape))}{kind}",
            )
    for name in weights:
        if name not in expected and not _is_mask(name):
            raise FormatError(
                f"{where}: {str(name)[:80]} is no weight of this architecture",
                f"expected {len(expected)} others, all of them found",
                "it may be of a newer version, or config and weights of different models",
            )


def misfit(weights: Mapping[str, Any], cfg: ModelConfig) -> str:
    """Say in one line which key does not fit a config's model: what was expected and found."""
    shapes = parameter_shapes(cfg)
    try:
        check_layers(weights, cfg, "model.pt")
        check_shapes(weights, shapes, {name: [name] for name in shapes}, "model.pt")
    except FormatError as e:
        return str(e)
    return ""


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _is_mask(name: object) -> bool:
    match = HEAD.fullmatch(name) if isinstance(name, str) else None
    return match is not None and match[3] is None


def _parts(name: str, n_head: int) -> list[str]:
    """The file's names for one of today's: all queries, all keys, all values."""
    block, middle, kind = name.partition(".sa.qkv.")
    if not middle:
        return [name]
    order = [(matrix, head) for matrix in ("query", "key", "value") for head in range(n_head)]
    return [f"{block}.sa.heads.{head}.{matrix}.{kind}" for matrix, head in order]


def _part_shape(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    return (shape[0] // count, *shape[1:])


def _joined(values: list[Tensor]) -> Tensor:
    return values[0].float() if len(values) == 1 else torch.cat([v.float() for v in values])


class _Unmapped(Exception):
    """Why moments cannot be taken over."""


def _moments(
    saved: Any, weights: Mapping[str, Tensor], parts: Parts, cfg: ModelConfig
) -> dict[str, Any]:
    """Return an optimizer state over today's two groups; raises _Unmapped.

    The file's learning rate, betas and decay stay: which of them hold is the next run's business.
    """
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise _Unmapped("it has no state and param_groups")
    if not 1 <= len(groups) <= 2 or not all(isinstance(g, dict) for g in groups):
        raise _Unmapped(f"expected 1 or 2 groups, found {len(groups)}")
    if any(g.get("amsgrad") for g in groups):
        raise _Unmapped("it is AMSGrad's")
    ids = [list(g.get("params") or []) for g in groups]
    ours = [n for n in parts if not (cfg.tie_weights and n == "lm_head.weight")]
    old = {part for name in ours for part in parts[name]}
    names = [n for n in weights if n in old]  # the order of the file is that of its parameters
    if len(groups) == 2:
        names = sorted(names, key=lambda n: not decays(n, weights[n].dim()))
        expected = sum(decays(n, weights[n].dim()) for n in names)
        if len(ids[0]) != expected:
            raise _Unmapped(f"expected {expected} decayed parameters, found {len(ids[0])}")
    flat = [i for group in ids for i in group]
    if len(flat) != len(names):
        raise _Unmapped(f"expected {len(names)} parameters, found {len(flat)}")
    by_name = {n: states.get(i) for n, i in zip(names, flat, strict=True)}
    dims = {name: weights[parts[name][0]].dim() for name in ours}
    order = [n for n in ours if decays(n, dims[n])]
    first = len(order)
    order += [n for n in ours if not decays(n, dims[n])]
    out: dict[int, dict[str, Any]] = {}
    for i, name in enumerate(order if states else ()):
        entries = [_entry(part, by_name[part], weights[part]) for part in parts[name]]
        if len({float(e["step"]) for e in entries}) > 1:
            raise _Unmapped(f"the heads of {name} are at different steps")
        joined = {key: _joined([e[key] for e in entries]) for key in MOMENTS}
        step = torch.tensor(float(entries[0]["step"]), dtype=torch.float32)
        out[i] = {"step": step, **joined}
    ranges = (list(range(first)), list(range(first, len(order))))
    settings = [{k: v for k, v in g.items() if k != "param_names"} for g in (groups[0], groups[-1])]
    return {
        "state": out,
        "param_groups": [{**g, "params": r} for g, r in zip(settings, ranges, strict=True)],
    }


def _entry(name: str, entry: Any, weight: Tensor) -> dict[str, Any]:
    """The state of one of the file's parameters, checked."""
    if not isinstance(entry, dict):
        raise _Unmapped(f"{name} has none")
    step = entry.get("step")
    if isinstance(step, Tensor) and step.numel() == 1:
        step = float(step)
    if not isinstance(step, (int, float)) or isinstance(step, bool) or not math.isfinite(step):
        raise _Unmapped(f"{name} has no step")
    for key in MOMENTS:
        value = entry.get(key)
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            found = _text(tuple(value.shape)) if isinstance(value, Tensor) else "none"
            expected = _text(tuple(weight.shape))
            raise _Unmapped(f"{key} of {name}: expected {expected}, found {found}")
    return {**entry, "step": step}


def per_head_logits(weights: Mapping[str, Tensor], n_head: int, idx: Tensor) -> Tensor:
    """Logits of per-head weights, head by head with an explicit softmax: what a conversion equals.

    Args:
        weights: the file's own.
        n_head: heads of each block.
        idx: (B, T) token ids.

    Returns:
        (B, T, V) fp32.
    """
    w = {k: v.float() for k, v in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    T = idx.shape[1]
    x = w["token_embedding_table.weight"][idx] + w["position_embedding_table.weight"][:T]
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    block = 0
    while f"blocks.{block}.ln1.weight" in w:
        at = f"blocks.{block}"
        h, heads = norm(x, f"{at}.ln1"), []
        for n in range(n_head):
            q, k, v = (linear(h, f"{at}.sa.heads.{n}.{m}") for m in ("query", "key", "value"))
            scores = (q @ k.transpose(1, 2) / math.sqrt(k.shape[2])).masked_fill(future, -math.inf)
            heads.append(scores.softmax(dim=-1) @ v)
        x = x + linear(torch.cat(heads, dim=2), f"{at}.sa.proj")
        h = norm(x, f"{at}.ln2")
        x = x + linear(F.relu(linear(h, f"{at}.fwd.net.0")), f"{at}.fwd.net.2")
        block += 1
    return linear(norm(x, "ln_f"), "lm_head")
