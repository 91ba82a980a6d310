"""What attention sees: documents packed in rows, which do not see each other, and cached tokens.

Shapes: B batch, T time, H heads, D head size. Nothing here is (.., T, T) for a row
unless a caller says so (`Segments.allowed`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.config import ModelConfig

FLASH_ARCH = (8, 0)  # the oldest that variable-length flash attention is built for
FLASH_MAX_HEAD = 192  # above, the backward needs more shared memory than small cards have


@dataclass
class Segments:
    """The documents of a batch, as stretches of its flattened B*T tokens; none is in two rows.

    Padding is a segment of its own: it attends to itself, so it is finite, and weighs nothing.

    Attributes:
        cu_seqlens: (n + 1,) int32 on the batch's device: where segments begin, and B*T.
        positions: (B, T) int64 on that device, from 0 in each segment.
        lengths: of the segments, on the host.
        allowed: (B, 1, T, T) bool, of a batch whose equal segments are not all in one piece; None
            otherwise. The only way to say that one stretch sees another.
    """

    cu_seqlens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    allowed: Tensor | None = None

    @classmethod
    def from_ids(cls, segment_ids: Tensor) -> Segments:
        """Segments where the ids of a row change; an id that comes again sees itself (`allowed`).

        Args:
            segment_ids: (B, T). A run of equal ids is one segment, with positions of its own.
        """
        B, T = segment_ids.shape
        change = torch.ones_like(segment_ids, dtype=torch.bool)
        change[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = change.flatten().nonzero().flatten()
        cu_seqlens = F.pad(starts, (0, 1), value=B * T)
        lengths = tuple(cu_seqlens.diff().tolist())
        ordered = segment_ids.sort(1).values
        different = int((ordered[:, 1:] != ordered[:, :-1]).sum()) + B
        allowed = None
        if different < len(lengths):  # never so in data that is packed in order
            allowed = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]).tril()
        return cls(cu_seqlens.int(), segment_positions(segment_ids), lengths, allowed)


class KVCache:
    """Keys and values of the tokens seen so far, preallocated for `length` positions."""

    def __init__(self, cfg: ModelConfig, batch: int, like: Tensor) -> None:
        shape = (batch, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(cfg.n_layer)]
        self.length = 0

    @classmethod
    def over(cls, layers: list[tuple[Tensor, Tensor]], length: int) -> KVCache:
        """A cache in the caller's own tensors, (B, H, positions, D), `length` of them filled."""
        cache = cls.__new__(cls)
        cache.layers, cache.length = layers, length
        return cache

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v: (B, H, T, D) behind the cached ones and return all of them."""
        end = self.length + k.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Positions that restart wherever the segment id changes. (B, T) int64."""
    T = segment_ids.shape[1]
    steps = torch.arange(T, device=segment_ids.device)
    change = torch.ones_like(segment_ids, dtype=torch.bool)
    change[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return steps - torch.where(change, steps, 0).cummax(1).values


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout_p: float) -> Tensor:
    """Causal attention of each segment to itself, scale 1/sqrt(D).

    One variable-length flash kernel where there is one; elsewhere (a CPU, fp32, a card before
    Ampere, dropout, which that kernel does not have) one call a segment, exact and differentiable.

    Args:
        q: (B, H, T, D).
        k: as q.
        v: as q.
        segments: of the batch.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (B, H, T, D), a transposed view of (B, T, H, D).
    """
    if segments.allowed is not None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=segments.allowed, dropout_p=dropout_p
        )
    if has_flash(q, dropout_p):
        return _flash(q, k, v, segments.cu_seqlens)
    return _per_segment(q, k, v, segments, dropout_p)


def has_flash(q: Tensor, dropout_p: float) -> bool:
    """Whether the variable-length flash kernel can take these queries."""
    D = q.shape[-1]
    return (
        q.device.type == "cuda"
        and dropout_p == 0
        and q.dtype in (torch.float16, torch.bfloat16)
        and D % 8 == 0
        and D <= FLASH_MAX_HEAD
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= FLASH_ARCH
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = q.shape
    q, k, v = (_flattened(t).contiguous() for t in (q, k, v))
    # T, not the longest segment: a number that changes would be compiled anew
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, window_size=(-1, 0))
    assert isinstance(y, Tensor)
    return y.unflatten(0, (B, T)).transpose(1, 2)


@torch.compiler.disable  # the lengths differ in every batch: what reads them is not traced
def _per_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout_p: float) -> Tensor:
    B, _, T, _ = q.shape
    parts = zip(*(_flattened(t).split(segments.lengths) for t in (q, k, v)), strict=True)
    done = []
    for part in parts:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in part)  # (1, H, L, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        done.append(y.squeeze(0).transpose(0, 1))
    return torch.cat(done).unflatten(0, (B, T)).transpose(1, 2)


def _flattened(t: Tensor) -> Tensor:
    """(B, H, T, D) as (B*T, H, D)."""
    return t.transpose(1, 2).flatten(0, 1)
