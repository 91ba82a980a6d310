"""The parts of the model under MyPT's names: in a model they are the engine's, alone they run too.

A script that builds one by itself, or calls a block of a model, gets what MyPT's modules return;
the engine's own calls, told by the `Place` they carry, go straight through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mypt_fast import block as engine
from mypt_fast.attention import KVCache, Segments
from mypt_fast.block import Pair, Place
from mypt_fast.config import ModelConfig
from mypt_fast.core.errors import ContextError, SettingError
from mypt_fast.kernels import rope_tables
from mypt_fast.kernels.reference.rope import turn
from mypt_fast.recompute import Again

RMSNorm = engine.RMSNorm
SEEDS = (None, None)


def precompute_rope_frequencies(
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    scale: float = 1.0,
    device: Any = "cpu",
) -> Pair:
    """Cosines and sines of (position / scale) theta^(-2i/D), each (max_seq_len, D/2), fp32."""
    return rope_tables(max_seq_len, head_dim, theta, scale, device or "cpu")


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head, in the dtype of x.

    Args:
        x: (.., T, D), as queries (B, H, T, D).
        cos: (T, D/2), or (B, T, D/2) where rows stand at positions of their own.
        sin: as cos.
    """
    if cos.dim() == 3 and x.dim() == 4:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return turn(x, cos.to(x.dtype), sin.to(x.dtype))


class GrowingCache(KVCache):
    """MyPT's concatenating cache: keys and values of every layer, joined behind the past ones."""

    def __init__(self, past: list[Pair] | None) -> None:
        self.past = past
        self.layers: list[Pair] = []
        self.length = 0 if not past else past[0][0].shape[2]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Join k, v: (B, H, T, D) to the past of a layer; layers come in order."""
        if self.past:
            keys, values = self.past[layer]
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        self.layers.append((k, v))
        return k, v


def cache_over(kv_cache: list[Pair], cache_pos: int, new: int) -> KVCache:
    """The caller's own tensors as a cache of which `cache_pos` positions are filled.

    Raises:
        ContextError: (a ValueError, an IndexError) if `new` more have no room.
    """
    room = kv_cache[0][0].shape[2]
    if cache_pos + new > room:
        raise ContextError(
            f"kv_cache: no room for {new} tokens at cache_pos {cache_pos}", f"it holds {room}",
            "start a new cache with the last tokens, or use generate(), which does",
        )  # fmt: skip
    return KVCache.over(kv_cache, cache_pos)


class CausalSelfAttention(engine.CausalSelfAttention):
    """Multi-head attention; alone: `(y, present) = CausalSelfAttention(config)(x)`.

    Attributes:
        dropout_p: of the attention weights in training.
    """

    strips = False  # for the same seeds MyPT's dropout, which is PyTorch's

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        check_heads(config)
        super().__init__(config, impl or "auto")
        self.config = config
        filled(self, impl is None)

    @property
    def dropout_p(self) -> float:
        """Probability of dropping an attention weight in training."""
        return self.dropout

    @dropout_p.setter
    def dropout_p(self, p: float) -> None:
        self.dropout = p

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x: (B, T, C). Called by the engine: (B, T, C); by a script as `alone` says."""
        if args and isinstance(args[0], Place):
            return super().forward(x, *args, **kwargs)
        return self.alone(x, *args, **kwargs)

    def alone(
        self,
        x: Tensor,
        past_kv: Pair | None = None,
        use_cache: bool = False,
        kv_cache: Pair | None = None,
        cache_pos: int = 0,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Attend, project and drop out.

        Args:
            x: (B, T, C).
            past_kv: keys and values (B, H, P, D) of earlier tokens.
            use_cache: return the keys and values.
            kv_cache: tensors (B, H, block_size, D) to write them into, at `cache_pos`.
            cache_pos: how many positions of `kv_cache` are filled.
            segment_ids: (B, T); equal ids attend to each other.

        Returns:
            (B, T, C), and (k, v), the cache, or None.

        Raises:
            SettingError: (a ValueError) for a kv_cache without use_cache.
            ContextError: (a ValueError, an IndexError) where there is no room.
        """
        place = place_of(self.config, x, past_kv, use_cache, kv_cache, cache_pos, segment_ids)
        y = F.dropout(super().forward(x, place, 0), self.config.dropout, self.training)
        return y, present_of(place, use_cache, kv_cache)


class FeedForward(engine.FeedForward):
    """C -> 4C -> C with exact GELU. Its dropout is where it joins the residual stream."""

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(config, impl or "auto")
        filled(self, impl is None)


class SwiGLUFeedForward(engine.SwiGLUFeedForward):
    """w_down(silu(w_gate x) * (w_up x)). Its dropout is where it joins the residual stream."""

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(config, impl or "auto")
        filled(self, impl is None)


class Block(engine.Block):
    """x + sa(ln1(x)), then x + fwd(ln2(x)); alone: `(x, present) = Block(config)(x)`."""

    parts = (CausalSelfAttention, FeedForward, SwiGLUFeedForward)

    def __init__(
        self, config: ModelConfig, impl: str | None = None, recompute: str | None = None
    ) -> None:
        check_heads(config)
        as_configured = "block" if config.use_checkpoint else "none"
        super().__init__(config, impl or "auto", recompute or as_configured)
        self.config = config
        filled(self, impl is None)

    @property
    def use_checkpoint(self) -> bool:
        """Whether the backward runs the block again; may be set."""
        return self.recompute == "block"

    @use_checkpoint.setter
    def use_checkpoint(self, on: bool) -> None:
        self.recompute = "block" if on else "none"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x: (B, T, C). Called by the engine: its pair; by a script as `alone` says.

        Where a hook looks at the block, the branch that the engine would leave to the next block
        is joined here, so that the hook sees the residual stream.
        """
        if not (len(args) > 1 and isinstance(args[1], Place)):
            return self.alone(x, *args, **kwargs)
        x, branch = super().forward(x, *args, **kwargs)
        if self._forward_hooks or self._forward_pre_hooks:
            return x + self._dropped(branch), None
        return x, branch

    def alone(
        self,
        x: Tensor,
        past_kv: Pair | None = None,
        use_cache: bool = False,
        kv_cache: Pair | None = None,
        cache_pos: int = 0,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the residual stream behind both branches and (k, v), the cache or None.

        Arguments and errors are those of `CausalSelfAttention.alone`.
        """
        place = place_of(self.config, x, past_kv, use_cache, kv_cache, cache_pos, segment_ids)
        if self.use_checkpoint and self.training and place.cache is None:
            return Again(x.device).run(engine.Block.whole, self, x, None, place), None
        x, branch = super().forward(x, None, place, 0, SEEDS)
        return x + self._dropped(branch), present_of(place, use_cache, kv_cache)


def place_of(
    config: ModelConfig,
    x: Tensor,
    past_kv: Pair | None,
    use_cache: bool,
    kv_cache: Pair | None,
    cache_pos: int,
    segment_ids: Tensor | None,
) -> Place:
    """Where the tokens of a module called alone stand."""
    if kv_cache is not None and not use_cache:
        raise SettingError("kv_cache needs use_cache=True", "found use_cache=False")
    place, T = Place(), x.shape[1]
    if kv_cache is not None:
        place.cache = cache_over([kv_cache], cache_pos, T)
    elif past_kv is not None or use_cache:
        place.cache = GrowingCache(None if past_kv is None else [past_kv])
    elif segment_ids is not None:
        place.segments = Segments.from_ids(segment_ids)
        if config.segment_position_reset:
            place.positions = place.segments.positions
    if config.pos_encoding == "rope":
        past = place.cache.length if place.cache else 0
        size = config.n_embd // config.n_head
        cos, sin = rope_tables(past + T, size, config.rope_theta, config.rope_scale, x.device)
        place.rope = (cos[past:], sin[past:])
    return place


def present_of(place: Place, use_cache: bool, kv_cache: Pair | None) -> Pair | None:
    """What a module called alone returns of its cache."""
    if not use_cache or place.cache is None:
        return None
    return kv_cache if kv_cache is not None else place.cache.layers[0]


def check_heads(config: ModelConfig) -> None:
    """MyPT's only check of a config; raises AssertionError."""
    if config.n_embd % config.n_head:
        raise AssertionError(
            f"n_embd must be divisible by n_head; found {config.n_embd} and {config.n_head}"
        )


def filled(module: nn.Module, is_alone: bool) -> None:
    """Give a module that no GPT will initialise PyTorch's own initial weights."""
    if is_alone:
        for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
            nn.Linear.reset_parameters(linear)
