"""A block and its layers: norms, attention, feed-forward.

Shapes: B batch, T time, C n_embd, H heads, D head size, F feed-forward width.
Attribute names are MyPT's state_dict keys (specification 2.5), so a bundle needs no translation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mypt_fast import kernels
from mypt_fast.accounting import swiglu_hidden
from mypt_fast.attention import KVCache, Segments, attend
from mypt_fast.config import ModelConfig
from mypt_fast.kernels import dropped_attention
from mypt_fast.planner.table import POLICIES

Pair = tuple[Tensor, Tensor]
# What a feed-forward keeps where a policy makes its norm again (`kernels.norm_mlp`).
SAVES = {name: policy.mlp_save for name, policy in POLICIES.items() if policy.norms}


class Linear(nn.Linear):
    """nn.Linear that leaves its memory alone: `GPT.init_weights` fills it once."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its memory alone."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm through the kernels, always with weight and bias."""

    def __init__(self, width: int, impl: str = "auto") -> None:
        super().__init__(width)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return kernels.layer_norm(x, self.weight, self.bias, impl=self.impl)

    def parts(self) -> kernels.Norm:
        """The norm as operators that contain it take it."""
        return kernels.Norm(self.weight, self.bias, self.eps, center=True)

    def join(self, branch: Tensor, x: Tensor, p: float, seed: Tensor | None) -> Pair:
        """Return the norm of h = x + dropout(branch), and h; both (B, T, C)."""
        return kernels.add_layer_norm(
            branch, x, self.weight, self.bias, dropout_p=p, seed=seed, impl=self.impl
        )


class RMSNorm(nn.Module):
    """RMSNorm, weight only."""

    def __init__(self, width: int, eps: float = 1e-6, impl: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.impl = eps, impl

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return kernels.rms_norm(x, self.weight, eps=self.eps, impl=self.impl)

    def parts(self) -> kernels.Norm:
        """The norm as operators that contain it take it."""
        return kernels.Norm(self.weight, None, self.eps, center=False)

    def join(self, branch: Tensor, x: Tensor, p: float, seed: Tensor | None) -> Pair:
        """Return the norm of h = x + dropout(branch), and h; both (B, T, C)."""
        return kernels.add_rms_norm(
            branch, x, self.weight, eps=self.eps, dropout_p=p, seed=seed, impl=self.impl
        )


class CausalSelfAttention(nn.Module):
    """Multi-head attention over one packed qkv projection; scale 1/sqrt(D).

    Attributes:
        strips: whether a CPU may take `kernels.dropped_attention`, whose dropout is not PyTorch's.
    """

    strips = True

    def __init__(self, cfg: ModelConfig, impl: str = "auto") -> None:
        super().__init__()
        self.n_head, self.dropout, self.impl = cfg.n_head, cfg.dropout, impl
        self.qkv = Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias or cfg.per_head_era)

    def forward(self, x: Tensor, place: "Place", layer: int) -> Tensor:
        """x: (B, T, C)."""
        return self.proj(self.mixed(*self._heads(self.qkv(x), place), place, layer))

    def remade(self, join: kernels.Join, norm: kernels.Norm, place: "Place") -> Pair:
        """The branch behind the norm of `join` and the residual stream, both (B, T, C).

        The backward makes again what `kernels.norm_qkv` does not keep.
        """
        qkv, x = kernels.norm_qkv(
            join, norm, self.qkv.weight, self.qkv.bias, self.n_head, place.rope, place.positions,
            impl=self.impl,
        )  # fmt: skip
        y = self.mixed(*self._split(qkv), place, 0)
        return kernels.linear(y, self.proj.weight, self.proj.bias), x

    def _heads(self, qkv: Tensor, place: "Place") -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, T, D), rotated where the model rotates."""
        if place.rope is None:
            return self._split(qkv)
        return kernels.rope_qkv(
            qkv, *place.rope, self.n_head, positions=place.positions, impl=self.impl
        )

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, width = qkv.shape
        heads = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in qkv.split(width // 3, 2))
        q, k, v = heads
        return q, k, v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, place: "Place", layer: int) -> Tensor:
        """What the heads attend to, (B, T, C), from q, k, v: (B, H, T, D)."""
        B, _, T, _ = q.shape
        cache, mask = place.cache, None
        dropout_p = self.dropout if self.training else 0.0
        if place.segments is not None:
            y = attend(q, k, v, place.segments, dropout_p)
            return y.transpose(1, 2).contiguous().view(B, T, -1)
        if self.strips and cache is None and dropped_attention.serves(q, dropout_p):
            y = dropped_attention.dropped_attention(q, k, v, dropout_p)
            return y.transpose(1, 2).contiguous().view(B, T, -1)
        past = cache.length if cache is not None else 0
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            if past and T > 1:  # a block of new tokens behind cached ones: causal, shifted by past
                mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and not past, dropout_p=dropout_p
        )
        return y.transpose(1, 2).contiguous().view(B, T, -1)


class FeedForward(nn.Module):
    """C -> 4C -> C with exact GELU, or the per-head era's ReLU; always with biases."""

    def __init__(self, cfg: ModelConfig, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        activation = nn.ReLU() if cfg.per_head_era else nn.GELU()
        self.net = nn.Sequential(
            Linear(cfg.n_embd, 4 * cfg.n_embd), activation, Linear(4 * cfg.n_embd, cfg.n_embd)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C)."""
        if isinstance(self.net[1], nn.ReLU):  # of old weights only: no kernel of its own
            return self.net(x)
        up: Linear = self.net[0]  # type: ignore[assignment]
        down: Linear = self.net[2]  # type: ignore[assignment]
        return kernels.gelu_mlp(x, up.weight, up.bias, down.weight, down.bias, impl=self.impl)

    def remade(self, join: kernels.Join, norm: kernels.Norm, save: str) -> Pair:
        """As `CausalSelfAttention.remade`; `save` is that of `kernels.norm_mlp`."""
        up: Linear = self.net[0]  # type: ignore[assignment]
        down: Linear = self.net[2]  # type: ignore[assignment]
        return kernels.norm_mlp(
            join, norm, (up.weight, None), up.bias, down.weight, down.bias,
            save=save, impl=self.impl,
        )  # fmt: skip


class SwiGLUFeedForward(nn.Module):
    """w_down(silu(w_gate x) * (w_up x)); never with biases."""

    def __init__(self, cfg: ModelConfig, impl: str = "auto") -> None:
        super().__init__()
        hidden = swiglu_hidden(cfg.n_embd)
        self.impl = impl
        self.w_gate = Linear(cfg.n_embd, hidden, bias=False)
        self.w_up = Linear(cfg.n_embd, hidden, bias=False)
        self.w_down = Linear(hidden, cfg.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C)."""
        return kernels.swiglu_mlp(
            x, (self.w_gate.weight, self.w_up.weight), self.w_down.weight, impl=self.impl
        )

    def remade(self, join: kernels.Join, norm: kernels.Norm, save: str) -> Pair:
        """As `CausalSelfAttention.remade`; `save` is that of `kernels.norm_mlp`."""
        return kernels.norm_mlp(
            join, norm, (self.w_gate.weight, self.w_up.weight), None, self.w_down.weight, None,
            save=save, impl=self.impl,
        )  # fmt: skip


@dataclass
class Place:
    """Where the tokens of a batch stand: what every block needs besides the hidden states."""

    rope: Pair | None = None  # cosines and sines, (positions, D/2)
    positions: Tensor | None = None  # (B, T) rows of those; None: 0 .. T-1
    segments: Segments | None = None  # documents that do not see each other
    cache: KVCache | None = None


class Block(nn.Module):
    """x + sa(ln1(x)), then x + fwd(ln2(x)).

    A branch joins the residual stream where the next norm reads it, in one pass: a block takes the
    branch that the one before it left, and leaves its own.

    Attributes:
        parts: the classes of attention, GELU and SwiGLU feed-forward.
    """

    parts: tuple[type[CausalSelfAttention], type[FeedForward], type[SwiGLUFeedForward]] = (
        CausalSelfAttention, FeedForward, SwiGLUFeedForward,
    )  # fmt: skip

    def __init__(self, cfg: ModelConfig, impl: str = "auto", recompute: str = "none") -> None:
        super().__init__()
        norm = RMSNorm if cfg.norm_type == "rmsnorm" else LayerNorm
        attention, gelu, swiglu = self.parts
        feed_forward = swiglu if cfg.mlp_type == "swiglu" else gelu
        self.recompute, self.dropout = recompute, cfg.dropout
        self.sa = attention(cfg, impl)
        self.fwd = feed_forward(cfg, impl)
        self.ln1 = norm(cfg.n_embd, impl=impl)
        self.ln2 = norm(cfg.n_embd, impl=impl)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        place: Place,
        layer: int = 0,
        seeds: Sequence[Tensor | None] = (None, None),
    ) -> Pair:
        """Return the residual stream and the branch that is to join it, both (B, T, C).

        Args:
            x: the residual stream.
            branch: what is to join it first; None before the first block.
            place: positions, documents and cache.
            layer: of the cache.
            seeds: of the dropout on `branch` and on the attention's.
        """
        p = self.dropout
        if self.recompute in SAVES and self.training and place.cache is None:
            first = kernels.Join(branch, x, p, seeds[0])
            y, x = self.sa.remade(first, self.ln1.parts(), place)
            second = kernels.Join(y, x, p, seeds[1])
            y, x = self.fwd.remade(second, self.ln2.parts(), SAVES[self.recompute])
            return x, y
        h, x = join(self.ln1, x, branch, p, seeds[0])
        h, x = join(self.ln2, x, self.sa(h, place, layer), p, seeds[1])
        return x, self.fwd(h)

    @property
    def drops(self) -> bool:
        """Whether its training draws random numbers."""
        return self.dropout > 0 or self.sa.dropout > 0

    def whole(self, x: Tensor, branch: Tensor | None, place: Place) -> Tensor:
        """The residual stream with every branch in it, (B, T, C)."""
        x, branch = self(x, branch, place)
        return x if branch is None else x + self._dropped(branch)

    def _dropped(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training)


def join(
    norm: LayerNorm | RMSNorm, x: Tensor, branch: Tensor | None, p: float, seed: Tensor | None
) -> Pair:
    """Add dropout(branch) to x; returns the norm of the sum and the sum.

    With a seed the norm's kernel draws the dropout itself; without, torch's generator does.
    """
    if branch is None:
        return norm(x), x
    if not norm.training:
        p = 0.0
    if norm._forward_hooks or norm._forward_pre_hooks:  # somebody looks at the norm: call it
        x = x + F.dropout(branch, p)
        return norm(x), x
    if seed is None:
        branch, p = F.dropout(branch, p), 0.0
    return norm.join(branch, x, p, seed)


# What `GPT.compile_blocks` compiles once for all layers.


def run_block(
    block: Block, x: Tensor, branch: Tensor | None, place: Place, layer: int,
    seeds: Sequence[Tensor | None],
) -> Pair:  # fmt: skip
    """`Block.forward`."""
    pair: Pair = block(x, branch, place, layer, seeds)
    return pair


def run_whole(block: Block, x: Tensor, branch: Tensor | None, place: Place) -> Tensor:
    """`Block.whole`."""
    return block.whole(x, branch, place)
