"""The GPT, whole: attention, feed-forward, block, initialisation, forward.

Shapes: B batch, T time, C n_embd, H heads, D head size, F feed-forward width, V vocabulary.
Attribute names are MyPT's state_dict keys (specification 2.5), so a bundle needs no translation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mypt_fast import kernels
from mypt_fast.accounting import swiglu_hidden
from mypt_fast.config import ModelConfig


class Linear(nn.Linear):
    """nn.Linear that leaves its memory alone: `GPT.init_weights` fills it once."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its memory alone."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class LayerNorm(nn.Module):
    """LayerNorm, always with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return kernels.layer_norm(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """RMSNorm, weight only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return kernels.rms_norm(x, self.weight)


class KVCache:
    """Keys and values of the tokens seen so far, preallocated for `length` positions."""

    def __init__(self, cfg: ModelConfig, batch: int, like: Tensor) -> None:
        shape = (batch, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(cfg.n_layer)]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v: (B, H, T, D) behind the cached ones and return all of them."""
        end = self.length + k.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head attention over one packed qkv projection; scale 1/sqrt(D)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.qkv = Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x: (B, T, C); rope: tables of the positions; mask: (B, 1, T, T) bool or None: causal."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        if rope is not None:
            q, k = kernels.apply_rope(q, *rope), kernels.apply_rope(k, *rope)
        past = cache.length if cache is not None else 0
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            if past and T > 1:  # a block of new tokens behind cached ones: causal, shifted by past
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and not past,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return F.dropout(self.proj(y), self.dropout, self.training)


class FeedForward(nn.Module):
    """C -> 4C -> C with exact GELU; always with biases."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Linear(cfg.n_embd, 4 * cfg.n_embd),
            nn.GELU(),
            Linear(4 * cfg.n_embd, cfg.n_embd),
            nn.Dropout(cfg.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C)."""
        return self.net(x)


class SwiGLUFeedForward(nn.Module):
    """w_down(silu(w_gate x) * (w_up x)); never with biases."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        hidden = swiglu_hidden(cfg.n_embd)
        self.w_gate = Linear(cfg.n_embd, hidden, bias=False)
        self.w_up = Linear(cfg.n_embd, hidden, bias=False)
        self.w_down = Linear(hidden, cfg.n_embd, bias=False)
        self.dropout = cfg.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C)."""
        y = self.w_down(kernels.swiglu(self.w_gate(x), self.w_up(x)))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """x + sa(ln1(x)), then x + fwd(ln2(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        norm = RMSNorm if cfg.norm_type == "rmsnorm" else LayerNorm
        self.use_checkpoint = cfg.use_checkpoint
        self.sa = CausalSelfAttention(cfg)
        self.fwd = SwiGLUFeedForward(cfg) if cfg.mlp_type == "swiglu" else FeedForward(cfg)
        self.ln1 = norm(cfg.n_embd)
        self.ln2 = norm(cfg.n_embd)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x: (B, T, C)."""
        if self.use_checkpoint and self.training and cache is None:
            x = x + checkpoint(lambda h: self.sa(self.ln1(h), rope, mask), x, use_reentrant=False)
            return x + checkpoint(lambda h: self.fwd(self.ln2(h)), x, use_reentrant=False)
        x = x + self.sa(self.ln1(x), rope, mask, cache, layer)
        return x + self.fwd(self.ln2(x))


class GPT(nn.Module):
    """A pre-norm decoder with MyPT's options.

    Args:
        cfg: the architecture; `cfg.check()` has passed.
        seed: of the initial weights; None leaves them unset (for loading).
    """

    def __init__(self, cfg: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = cfg
        self.token_embedding_table = Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.pos_encoding == "learned":
            self.position_embedding_table = Embedding(cfg.block_size, cfg.n_embd)
        else:
            tables = kernels.rope_tables(
                cfg.block_size, cfg.n_embd // cfg.n_head, cfg.rope_theta, cfg.rope_scale
            )
            self.register_buffer("rope_cos", tables[0], persistent=False)
            self.register_buffer("rope_sin", tables[1], persistent=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = RMSNorm(cfg.n_embd) if cfg.norm_type == "rmsnorm" else LayerNorm(cfg.n_embd)
        self.lm_head = Linear(cfg.n_embd, cfg.vocab_size)
        if cfg.tie_weights:
            self.lm_head.weight = self.token_embedding_table.weight
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the initial weights from a generator of their own (MyPT specification 2.2).

        | tensor | values |
        |---|---|
        | weights of Linear and Embedding | N(0, 0.02) |
        | last matrix of each feed-forward | N(0, 0.02 / sqrt(2 n_layer)) (GPT-2) |
        | biases | 0 |
        | norms | 1 (and 0) |
        """
        generator = torch.Generator().manual_seed(seed)
        small = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0 if "ln" in name and name.endswith("weight") else 0.0)
            else:
                last = name.endswith(("w_down.weight", "net.2.weight"))
                p.normal_(0.0, small if last else 0.02, generator=generator)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return logits, or the summed loss when there are targets.

        Args:
            idx: (B, T) int64 token ids, T <= block_size.
            targets: (B, T) int64; -100 is ignored.
            loss_mask: (B, T) factor of each position's loss.
            segment_ids: (B, T) int64 of packed rows, 0 for padding.
            cache: keys and values of earlier tokens; grows by T.

        Returns:
            (B, T, V) logits; or with `targets` the fp32 sum of the losses, whose logits are
            never made as a whole. Divide it by the global number of valid tokens.
        """
        x = self.hidden(idx, segment_ids, cache)
        if targets is None:
            return self.lm_head(x)
        return kernels.linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, self.lm_head.bias, targets.flatten(),
            row_weights=None if loss_mask is None else loss_mask.flatten().float(),
        )  # fmt: skip

    def hidden(
        self, idx: Tensor, segment_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the normalised last hidden states, (B, T, C); arguments as in `forward`."""
        T = idx.shape[1]
        past = cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(
                f"GPT: at most block_size={self.config.block_size} positions; found {past + T}"
            )
        x = self.token_embedding_table(idx)
        positions: slice | Tensor = slice(past, past + T)
        mask = None
        if segment_ids is not None:
            mask = segment_mask(segment_ids)
            if self.config.segment_position_reset:
                positions = segment_positions(segment_ids)
        rope = None
        if self.config.pos_encoding == "learned":
            x = x + self.position_embedding_table.weight[positions]
        else:
            tables: tuple[Tensor, Tensor] = (self.rope_cos, self.rope_sin)  # type: ignore[assignment]
            rope = (tables[0][positions], tables[1][positions])
            if rope[0].dim() == 3:  # per row: a head axis to broadcast over
                rope = (rope[0].unsqueeze(1), rope[1].unsqueeze(1))
        if self.training and self.config.neftune_alpha > 0:
            bound = self.config.neftune_alpha / math.sqrt(T * x.shape[2])
            x = x + torch.empty_like(x).uniform_(-bound, bound)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Who may attend to whom in packed rows: same segment and not later. (B, 1, T, T) bool."""
    same = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
    return same.tril().unsqueeze(1)


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Positions that restart wherever the segment id changes. (B, T) int64."""
    T = segment_ids.shape[1]
    steps = torch.arange(T, device=segment_ids.device)
    change = torch.ones_like(segment_ids, dtype=torch.bool)
    change[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return steps - torch.where(change, steps, 0).cummax(1).values
