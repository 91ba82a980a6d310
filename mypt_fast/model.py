"""The GPT, whole: embedding, blocks, head, initialisation, loss.

Shapes: B batch, T time, C n_embd, D head size, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mypt_fast import kernels
from mypt_fast.attention import KVCache, Segments
from mypt_fast.block import (
    SAVES,
    Block,
    Embedding,
    LayerNorm,
    Linear,
    Pair,
    Place,
    RMSNorm,
    join,
    run_block,
    run_whole,
)
from mypt_fast.config import ModelConfig
from mypt_fast.kernels import rope_tables
from mypt_fast.recompute import POLICIES, Again


class GPT(nn.Module):
    """A pre-norm decoder with MyPT's options.

    Args:
        cfg: the architecture; `cfg.check()` has passed.
        seed: of the initial weights; None leaves them unset (for loading).
        kernels: which implementation of the operators runs, `impl` of `mypt_fast.kernels`.
        recompute: what the backward makes again, one of `recompute.POLICIES`; None: every block
            with `cfg.use_checkpoint`, else nothing.

    Raises:
        ValueError: for a `recompute` that there is not.

    Attributes:
        residual: dtype of the residual stream; None: as the embedding's.
        chunk_rows: rows of logits at a time in training; 0: as the head chooses.
    """

    block: type[Block] = Block
    run_block = staticmethod(run_block)
    run_whole = staticmethod(run_whole)

    def __init__(
        self,
        cfg: ModelConfig,
        seed: int | None = 0,
        kernels: str = "auto",
        recompute: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.impl = cfg, kernels
        self.recompute = recompute or ("block" if cfg.use_checkpoint else "none")
        if self.recompute not in POLICIES or (self.recompute in SAVES and cfg.per_head_era):
            raise ValueError(
                f"GPT: expected recompute to be one of {', '.join(POLICIES)}, and beside the ReLU "
                f"of older weights none of {', '.join(SAVES)}; found {self.recompute!r}"
            )
        self.residual: torch.dtype | None = None
        self.chunk_rows = 0
        self.token_embedding_table = Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.pos_encoding != "rope":
            self.position_embedding_table = Embedding(cfg.block_size, cfg.n_embd)
        else:
            tables = rope_tables(
                cfg.block_size, cfg.n_embd // cfg.n_head, cfg.rope_theta, cfg.rope_scale
            )
            self.register_buffer("rope_cos", tables[0], persistent=False)
            self.register_buffer("rope_sin", tables[1], persistent=False)
        self.blocks = nn.ModuleList(
            self.block(cfg, kernels, self.recompute) for _ in range(cfg.n_layer)
        )
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
        if self.training and self._drops():
            check_memory_budget()
        if segment_ids is not None:
            documents = Segments.from_ids(segment_ids)
        x = self.hidden(idx, documents, cache, self._seeds(idx.device))
        if targets is None:
            return self.lm_head(x)
        return kernels.linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, self.lm_head.bias, targets.flatten(),
            token_weight=None if loss_mask is None else loss_mask.flatten().float(),
            reduction="sum", chunk=self.chunk_rows or None, impl=self.impl,
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
        self.run_whole = graphs(torch.compile(run_whole))

    def plain_blocks(self) -> dict[str, Any]:
        """Run the blocks as they are from here on; returns what brings compiled ones back."""
        names = [name for name in ("run_block", "run_whole") if name in self.__dict__]
        return {name: self.__dict__.pop(name) for name in names}

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run them as they are meanwhile."""
        kept = self.plain_blocks()
        try:
            yield
        finally:
            self.__dict__.update(kept)

    def _seeds(self, device: torch.device) -> Tensor | None:
        """Seeds of every residual dropout, (2 n_layer,), for the kernels that draw it themselves.

        Drawn here, outside of what is compiled or recomputed: recomputation repeats the masks.
        The plain expressions take torch's own dropout, which is faster there.
        """
        fused = self.impl in ("triton", "reference") and self.recompute == "none"
        remade = self.recompute in SAVES
        if not ((fused or remade) and self.training and self._drops()):
            return None
        return torch.randint(2**63 - 1, (2 * self.config.n_layer,), device=device)

    def _drops(self) -> bool:
        """Whether anything is dropped out in training; a block's probabilities may be set."""
        return self.config.dropout > 0 or any(block.drops for block in self.blocks)

    def hidden(
        self,
        idx: Tensor,
        documents: Segments | None = None,
        cache: KVCache | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised last hidden states, (B, T, C); arguments as in `forward`."""
        T = idx.shape[1]
        if seeds is None and self.recompute in SAVES:
            seeds = self._seeds(idx.device)
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
        branch, again = None, Again(x.device)
        run = self.run_block if cache is None else run_block  # each length would be compiled anew
        for layer, block in enumerate(self.blocks):
            if self.training and cache is None and block.recompute in Again.POLICIES:
                x, branch = again.run(self.run_whole, block, x, branch, place), None
            else:
                seeds_here = per_join[2 * layer : 2 * layer + 2]
                x, branch = run(block, x, branch, place, layer, seeds_here)  # type: ignore[arg-type]
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
            rows = here if place.positions is None else place.positions
            x = x + self.position_embedding_table.weight[rows]
        else:
            tables: Pair = (self.rope_cos, self.rope_sin)  # type: ignore[assignment]
            if place.positions is None:
                tables = (tables[0][here], tables[1][here])
            place.rope = tables
        # outside autocast the matmuls are of the weights' dtype, and so is the stream
        if self.residual is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual)
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
