"""The GPT, whole: attention, feed-forward, block, initialisation, forward.

Shapes: B batch, T time, C n_embd, H heads, D head size, F feed-forward width, V vocabulary.
Attribute names are MyPT's state_dict keys (specification 2.5), so a bundle needs no translation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mypt_fast import kernels
from mypt_fast.accounting import swiglu_hidden
from mypt_fast.attention import KVCache, Segments, attend
from mypt_fast.config import ModelConfig
from mypt_fast.kernels import rope_tables

Pair = tuple[Tensor, Tensor]


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

    def join(self, branch: Tensor, x: Tensor, p: float, seed: Tensor | None) -> Pair:
        """Return the norm of h = x + dropout(branch), and h; both (B, T, C)."""
        return kernels.add_rms_norm(
            branch, x, self.weight, eps=self.eps, dropout_p=p, seed=seed, impl=self.impl
        )


class CausalSelfAttention(nn.Module):
    """Multi-head attention over one packed qkv projection; scale 1/sqrt(D)."""

    def __init__(self, cfg: ModelConfig, impl: str = "auto") -> None:
        super().__init__()
        self.n_head, self.dropout, self.impl = cfg.n_head, cfg.dropout, impl
        self.qkv = Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias or cfg.per_head_era)

    def forward(self, x: Tensor, place: "Place", layer: int) -> Tensor:
        """x: (B, T, C)."""
        B, T, C = x.shape
        qkv, cache, mask = self.qkv(x), place.cache, None
        if place.rope is not None:
            q, k, v = kernels.rope_qkv(
                qkv, *place.rope, self.n_head, positions=place.positions, impl=self.impl
            )
        else:
            q, k, v = (
                t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                for t in qkv.split(C, dim=2)
            )
        dropout_p = self.dropout if self.training else 0.0
        if place.segments is not None:
            y = attend(q, k, v, place.segments, dropout_p)
            return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        past = cache.length if cache is not None else 0
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            if past and T > 1:  # a block of new tokens behind cached ones: causal, shifted by past
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and not past, dropout_p=dropout_p
        )
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class FeedForward(nn.Module):
    """C -> 4C -> C with exact GELU, or the per-head era's ReLU; always with biases."""

    def __init__(self, cfg: ModelConfig, impl: str = "auto", save: str = "all") -> None:
        super().__init__()
        self.impl, self.save = impl, save
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
        return kernels.gelu_mlp(
            x, up.weight, up.bias, down.weight, down.bias, save=self.save, impl=self.impl
        )


class SwiGLUFeedForward(nn.Module):
    """w_down(silu(w_gate x) * (w_up x)); never with biases."""

    def __init__(self, cfg: ModelConfig, impl: str = "auto", save: str = "all") -> None:
        super().__init__()
        hidden = swiglu_hidden(cfg.n_embd)
        self.impl, self.save = impl, save
        self.w_gate = Linear(cfg.n_embd, hidden, bias=False)
        self.w_up = Linear(cfg.n_embd, hidden, bias=False)
        self.w_down = Linear(hidden, cfg.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C)."""
        return kernels.swiglu_mlp(
            x, (self.w_gate.weight, self.w_up.weight), self.w_down.weight,
            save=self.save, impl=self.impl,
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

    def __init__(self, cfg: ModelConfig, impl: str = "auto", mlp_save: str = "all") -> None:
        super().__init__()
        norm = RMSNorm if cfg.norm_type == "rmsnorm" else LayerNorm
        attention, gelu, swiglu = self.parts
        feed_forward = swiglu if cfg.mlp_type == "swiglu" else gelu
        self.use_checkpoint, self.dropout = cfg.use_checkpoint, cfg.dropout
        self.sa = attention(cfg, impl)
        self.fwd = feed_forward(cfg, impl, mlp_save)
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
        if self.use_checkpoint and self.training and place.cache is None:
            x = x if branch is None else x + self._dropped(branch)
            y = checkpoint(lambda h: self.sa(self.ln1(h), place, layer), x, use_reentrant=False)
            x = x + self._dropped(y)
            return x, checkpoint(lambda h: self.fwd(self.ln2(h)), x, use_reentrant=False)
        h, x = join(self.ln1, x, branch, self.dropout, seeds[0])
        h, x = join(self.ln2, x, self.sa(h, place, layer), self.dropout, seeds[1])
        return x, self.fwd(h)

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


def run_block(
    block: nn.Module, x: Tensor, branch: Tensor | None, place: Place, layer: int,
    seeds: Sequence[Tensor | None],
) -> Pair:  # fmt: skip
    """`Block.forward`, as what `GPT.compile_blocks` compiles once for all layers."""
    return block(x, branch, place, layer, seeds)


class GPT(nn.Module):
    """A pre-norm decoder with MyPT's options.

    Args:
        cfg: the architecture; `cfg.check()` has passed.
        seed: of the initial weights; None leaves them unset (for loading).
        kernels: which implementation of the operators runs, `impl` of `mypt_fast.kernels`.
        mlp_save: what a feed-forward keeps for its backward: "all", "gate_up" or "input".
    """

    block: type[Block] = Block
    run_block = staticmethod(run_block)

    def __init__(
        self,
        cfg: ModelConfig,
        seed: int | None = 0,
        kernels: str = "auto",
        mlp_save: str = "all",
    ) -> None:
        super().__init__()
        self.config, self.impl = cfg, kernels
        self.token_embedding_table = Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.pos_encoding != "rope":
            self.position_embedding_table = Embedding(cfg.block_size, cfg.n_embd)
        else:
            tables = rope_tables(
                cfg.block_size, cfg.n_embd // cfg.n_head, cfg.rope_theta, cfg.rope_scale
            )
            self.register_buffer("rope_cos", tables[0], persistent=False)
            self.register_buffer("rope_sin", tables[1], persistent=False)
        self.blocks = nn.ModuleList(self.block(cfg, kernels, mlp_save) for _ in range(cfg.n_layer))
        norm = RMSNorm if cfg.norm_type == "rmsnorm" else LayerNorm
        self.ln_f = norm(cfg.n_embd, impl=kernels)
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
        documents: Segments | None = None,
    ) -> Tensor:
        """Return logits, or the summed loss when there are targets.

        Args:
            idx: (B, T) int64 token ids, T <= block_size.
            targets: (B, T) int64; -100 is ignored.
            loss_mask: (B, T) factor of each position's loss.
            segment_ids: (B, T) int64 of packed rows, 0 for padding: documents, a run of equal ids
                each. Reading them stops a GPU; `documents` does not.
            cache: keys and values of earlier tokens; grows by T. Not beside documents.
            documents: what attends to itself alone; its positions start from 0, unless
                segment_position_reset is off.

        Returns:
            (B, T, V) logits; or with `targets` the fp32 sum of the losses, whose logits are
            never made as a whole. Divide it by the global number of valid tokens.
        """
        if self.training and self.config.dropout:
            check_memory_budget()
        if segment_ids is not None:
            documents = Segments.from_ids(segment_ids)
        x = self.hidden(idx, documents, cache, self._seeds(idx.device))
        if targets is None:
            return self.lm_head(x)
        return kernels.linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, self.lm_head.bias, targets.flatten(),
            token_weight=None if loss_mask is None else loss_mask.flatten().float(),
            reduction="sum", impl=self.impl,
        )  # fmt: skip

    def summed_loss(
        self,
        idx: Tensor,
        targets: Tensor,
        loss_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        documents: Segments | None = None,
    ) -> Tensor:
        """The summed loss of `GPT.forward`, also where a subclass's forward returns something else.

        Arguments as there.
        """
        return GPT.forward(
            self, idx=idx, targets=targets, loss_mask=loss_mask, segment_ids=segment_ids,
            documents=documents,
        )  # fmt: skip

    def compile_blocks(self) -> None:
        """Let torch.compile run the blocks: one is compiled, all layers share its code."""
        # the first block, evaluation, frozen layers, a smaller batch: each has a graph of its own
        graphs = torch._dynamo.config.patch(recompile_limit=64)
        self.run_block = graphs(torch.compile(run_block))

    def _seeds(self, device: torch.device) -> Tensor | None:
        """Seeds of every residual dropout, (2 n_layer,), for the kernels that draw it themselves.

        Drawn here, outside of what is compiled or recomputed: recomputation repeats the masks.
        The plain expressions take torch's own dropout, which is faster there.
        """
        cfg = self.config
        fused = self.impl in ("triton", "reference") and not cfg.use_checkpoint
        if not (fused and self.training and cfg.dropout):
            return None
        return torch.randint(2**63 - 1, (2 * cfg.n_layer,), device=device)

    def hidden(
        self,
        idx: Tensor,
        documents: Segments | None = None,
        cache: KVCache | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised last hidden states, (B, T, C); arguments as in `forward`."""
        T = idx.shape[1]
        past = cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(
                f"GPT: at most block_size={self.config.block_size} positions; found {past + T}"
            )
        if documents is not None:
            check_documents(documents, idx, cache)
        x, place = self._embed(idx, documents, cache, past)
        if self.training and self.config.neftune_alpha > 0:
            bound = self.config.neftune_alpha / math.sqrt(T * x.shape[2])
            x = x + torch.empty_like(x).uniform_(-bound, bound)
        # the first branch has no dropout before it: seeds belong to joins 1 .. 2 n_layer
        per_join = [None] * (2 * len(self.blocks) + 1) if seeds is None else [None, *seeds.unbind()]
        branch = None
        run = self.run_block if cache is None else run_block  # each length would be compiled anew
        for layer, block in enumerate(self.blocks):
            x, branch = run(block, x, branch, place, layer, per_join[2 * layer : 2 * layer + 2])
        if cache is not None:
            cache.length += T
        return join(self.ln_f, x, branch, self.config.dropout, per_join[-1])[0]

    def _embed(
        self, idx: Tensor, documents: Segments | None, cache: KVCache | None, past: int
    ) -> tuple[Tensor, Place]:
        """Embed the tokens, and say where they stand."""
        x, here = self.token_embedding_table(idx), slice(past, past + idx.shape[1])
        place = Place(cache=cache, segments=documents)
        if documents is not None and self.config.segment_position_reset:
            place.positions = documents.positions
        if self.config.pos_encoding != "rope":
            return x + self.position_embedding_table.weight[
                here if place.positions is None else place.positions
            ], place
        tables: Pair = (self.rope_cos, self.rope_sin)  # type: ignore[assignment]
        if place.positions is None:
            tables = (tables[0][here], tables[1][here])
        place.rope = tables
        return x, place


def decays(name: str, dims: int) -> bool:
    """Whether AdamW decays a parameter of this name and number of dimensions.

    Not decayed: 1-D tensors and names containing "embedding" or "ln" (MyPT specification 1.4),
    so a tied output matrix, listed under the embedding's name, is not decayed either.
    """
    lower = name.lower()
    return dims > 1 and "embedding" not in lower and "ln" not in lower


def check_memory_budget() -> None:
    """Refuse torch.compile's activation memory budget beside dropout.

    It recomputes PyTorch's own dropout, attention's included, with other masks: torch 2.13 then
    returns gradients that are wrong by 17 to 300 % without a word (pytorch #190758).

    Raises:
        ValueError: if the budget is below 1.
    """
    budget = torch._functorch.config.activation_memory_budget
    if budget < 1:
        raise ValueError(
            f"activation_memory_budget is {budget} and dropout is on, which gives wrong gradients: "
            "leave it at 1, or train with dropout 0; use_checkpoint recomputes correctly"
        )


def check_documents(documents: Segments, idx: Tensor, cache: KVCache | None) -> None:
    """Refuse documents of another batch, and beside a cache; raises ValueError."""
    if cache is not None:
        raise ValueError("GPT: expected documents or a cache; found both")
    if documents.positions.shape != idx.shape:
        raise ValueError(
            f"GPT: expected documents of a batch {tuple(idx.shape)}; "
            f"found {tuple(documents.positions.shape)}"
        )
