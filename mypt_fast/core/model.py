"""GPT as MyPT's scripts know it: the engine's model with a tokenizer, files, loss and text.

Shapes: B batch, T time, C n_embd, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mypt_fast import console, kernels
from mypt_fast import model as engine
from mypt_fast.attention import KVCache, Segments
from mypt_fast.block import Pair
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.core import files, measures, writing
from mypt_fast.core.config import GPTConfig
from mypt_fast.core.errors import ContextError
from mypt_fast.core.layers import (
    Block,
    CausalSelfAttention,
    FeedForward,
    GrowingCache,
    RMSNorm,
    SwiGLUFeedForward,
    apply_rotary_emb,
    cache_over,
    check_heads,
    precompute_rope_frequencies,
)
from mypt_fast.core.tokenizer import Tokenizer
from mypt_fast.kernels import rope_tables
from mypt_fast.training.optim import adamw

__all__ = [
    "GPT",
    "Block",
    "CausalSelfAttention",
    "FeedForward",
    "GPTConfig",
    "RMSNorm",
    "SwiGLUFeedForward",
    "apply_rotary_emb",
    "precompute_rope_frequencies",
]

Loaded = tuple["GPT", dict[str, Any] | None, int | None, dict[str, Any] | None]


class GPT(engine.GPT):
    """A pre-norm decoder (MyPT specification 2), with all of MyPT's options.

    Its initial weights follow torch's global generator: `torch.manual_seed` decides them.

    Args:
        config: a GPTConfig.
        tokenizer: of its text; default: a new `Tokenizer(config, token_kind)`.
        token_kind: kind of that; default "gpt2".

    Attributes:
        config: as given.
        tokenizer: as given, or made.
        token_embedding_table: and `position_embedding_table` (not with rope), `rope_cos`,
            `rope_sin` (with rope), `blocks`, `ln_f`, `lm_head`: the modules.

    Raises:
        AssertionError: if n_head does not divide n_embd.
        TokenizerError: (a ValueError) if the default tokenizer does not fit vocab_size.
    """

    block = Block
    config: ModelConfig
    rope_cos: Tensor
    rope_sin: Tensor
    _told_segments = False

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None = None,
        token_kind: str | None = None,
    ) -> None:
        check_heads(config)
        if tokenizer is None:
            tokenizer = Tokenizer(config, token_kind or "gpt2")
        super().__init__(config, seed=int(torch.randint(2**63 - 1, (), device="cpu")))
        self.tokenizer = tokenizer
        if config.tie_weights:
            console.say("Weight tying: lm_head.weight is token_embedding_table.weight")

    @property
    def _use_rope(self) -> bool:
        return self.config.pos_encoding == "rope"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """What .to() and .half() do; rotary tables stay fp32: rounded, they misplace tokens."""
        super()._apply(fn, recurse)
        if self._use_rope and self.rope_cos.dtype is not torch.float32:
            self.build_rope(self.rope_cos.device)
        return self

    def build_rope(self, device: torch.device | str) -> None:
        """Make the rotary tables of the config's block_size, theta and scale."""
        cfg = self.config
        size = cfg.n_embd // cfg.n_head
        tables = rope_tables(cfg.block_size, size, cfg.rope_theta, cfg.rope_scale)
        self.rope_cos, self.rope_sin = (t.to(device) for t in tables)

    def forward(  # type: ignore[override]  # MyPT's signature, not the engine's
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        past_kv: list[Pair] | None = None,
        use_cache: bool = False,
        kv_cache: list[Pair] | None = None,
        cache_pos: int = 0,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Return logits, the loss where there are targets, and the cache where it is used.

        Training does without the logits: see `summed_loss`.

        Args:
            idx: (B, T) int64 token ids.
            targets: (B, T) int64.
            loss_mask: (B, T) weights of the targets: the loss is sum(ce mask) / max(sum(mask), 1).
            past_kv: (k, v), (B, H, P, D) of each layer, as `present` was.
            use_cache: return a `present`, and read `kv_cache`.
            kv_cache: (k, v), (B, H, block_size, D) of each layer, written in place.
            cache_pos: how many of its positions are filled.
            segment_ids: (B, T); tokens attend within their id, 0 is padding. Not with a cache.

        Returns:
            Logits (B, T, V), the 0-dim fp32 loss or None, and `present`: None; with `use_cache`
            (k, v) of each layer, or `(kv_cache, cache_pos + T)` with a kv_cache.

        Raises:
            ContextError: (an IndexError and a ValueError) beyond block_size or the kv_cache.
        """
        cache: KVCache | None = None
        if use_cache and kv_cache is not None:
            cache = cache_over(kv_cache, int(cache_pos), idx.shape[1])
        elif use_cache or past_kv is not None:
            cache = GrowingCache(past_kv)
        self._check_context(idx.shape[1], cache)
        documents = None if cache is not None else self.documents(segment_ids)
        logits = self.lm_head(self.hidden(idx, documents, cache, self._seeds(idx.device)))
        loss = None if targets is None else self._loss(logits, targets, loss_mask)
        if cache is None or not use_cache:
            return logits, loss, None
        return logits, loss, (kv_cache, cache.length) if kv_cache is not None else cache.layers

    def _check_context(self, T: int, cache: KVCache | None) -> None:
        past = cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise ContextError(
                f"the model reads at most block_size={self.config.block_size} tokens",
                f"found {past + T}",
                "give the last ones; generate() moves its window by itself",
            )

    def documents(self, segment_ids: Tensor | None) -> Segments | None:
        """The segments of (B, T) ids as the engine has them, None for None; told once."""
        if segment_ids is None:
            return None
        if not self._told_segments:
            self._told_segments = True
            console.say("Packed batch: attention stays within each segment")
        return Segments.from_ids(segment_ids)

    def _loss(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """The mean loss of logits that exist, in fp32 whatever their dtype."""
        rows, goal = logits.flatten(0, 1), targets.flatten()
        if mask is None:
            return kernels.cross_entropy(rows, goal, impl=self.impl)
        weight = mask.flatten().float()
        total = kernels.cross_entropy(
            rows, goal, token_weight=weight, reduction="sum", impl=self.impl
        )
        return total / weight.sum().clamp(min=1.0)

    def summed_loss(
        self,
        idx: Tensor,
        targets: Tensor,
        loss_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        documents: Segments | None = None,
    ) -> Tensor:
        """The summed loss through the fused head, whose logits are never made as a whole.

        Arguments are the engine's; the 0-dim fp32 sum is to be divided by the weights' sum.
        """
        if segment_ids is not None:
            documents, segment_ids = self.documents(segment_ids), None
        return super().forward(idx, targets, loss_mask, documents=documents)

    def as_engine(self) -> engine.GPT:
        """This model as the engine's class: the same modules and mode, the engine's `forward`."""
        twin = engine.GPT.__new__(engine.GPT)
        own = {k: v for k, v in self.__dict__.items() if k != "forward"}
        twin.__dict__ = own if "forward" in self.__dict__ else self.__dict__
        return twin

    def encode(self, text: str) -> list[int]:
        """Encode text with the model's tokenizer."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids with the model's tokenizer."""
        return self.tokenizer.decode(ids)

    def configure_optimizer(
        self,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        optimizer_state: dict[str, Any] | None = None,
    ) -> torch.optim.AdamW:
        """AdamW, betas (0.9, 0.95), of two groups: what decays, then what does not.

        A state that does not fit is reported, and the optimizer starts afresh.
        """
        cfg = TrainConfig(learning_rate=learning_rate, weight_decay=weight_decay)
        made = adamw(self, cfg)
        decays, stays = (sum(p.numel() for p in g["params"]) for g in made.param_groups)
        console.say(f"Optimizer: {decays:,} parameters with weight decay, {stays:,} without")
        if optimizer_state is None:
            return made
        try:
            made.load_state_dict(optimizer_state)
            files.check_moments(made)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as e:
            reason = " ".join(str(e).split())[:200]
            console.say(f"Optimizer state was not loaded, starting afresh: {reason}")
            return adamw(self, cfg)
        return made

    def fit(
        self,
        data_loader: Any,
        optimizer: Any,
        max_iters: int = 1000,
        eval_interval: int = 20,
        eval_iters: int = 50,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        start_step: int = 0,
        learning_rate: float | None = None,
        save_dtype: str | None = "bf16",
        final_save_dtype: str | None = "fp16",
        warmup_iters: float = 0,
        grad_clip: float = 1.0,
        use_amp: bool = True,
        amp_dtype: str = "bf16",
        eval_data_loaders: dict[str, Any] | None = None,
        log_file: str | os.PathLike[str] | None = None,
        eval_seed: int | None = None,
        config_file: str | None = None,
        dataset_dir: str | None = None,
        eval_prompts_file: str | None = None,
        eval_max_new_tokens: int = 64,
        data_loader_schedule: Any = None,
        grad_accum_steps: int = 1,
        initial_phase: str | None = None,
        model_name: str | None = None,
        gold_selection: dict[str, Any] | None = None,
        token_accuracy_saturation: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Train (MyPT specification 4.5); returns the final losses of both splits."""
        given = {k: v for k, v in locals().items() if k not in ("self", "data_loader", "optimizer")}
        from mypt_fast.core.fit import fit

        return fit(self, data_loader, optimizer, **given)

    def estimate_loss(
        self, data_loader: Any, eval_iters: int, splits: Sequence[str] = ("train", "val")
    ) -> dict[str, Tensor]:
        """Mean loss of `eval_iters` batches of each split; leaves the model in training mode.

        Args:
            data_loader: anything with `get_batch(split)` that returns (x, y), (x, y, mask) or
                (x, y, mask, segment_ids).
            eval_iters: batches.
            splits: their names.

        Returns:
            0-dim fp32 CPU tensors by split.
        """
        return measures.losses(self, data_loader, eval_iters, splits)

    def estimate_masked_token_accuracy(
        self, data_loader: Any, eval_iters: int, splits: Sequence[str] = ("train", "val")
    ) -> dict[str, dict[str, Any]]:
        """Share of the targets with a mask that the likeliest token hits.

        Arguments as in `estimate_loss`.

        Returns:
            {"acc": share or None, "count": targets} by split; None where there are no masks.
        """
        return measures.accuracies(self, data_loader, eval_iters, splits)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int,
        temperature: float | None = 0.8,
        top_k: int | None = 50,
        top_p: float | None = 0.95,
        repetition_penalty: float | None = 1.1,
        stop_tokens: Iterable[int] | None = None,
        recent_penalty_window: int = 256,
        use_default_stop_tokens: bool = True,
    ) -> str:
        """Continue a prompt, drawing from torch's global generator (specification 10.2).

        Past block_size tokens the window moves on. A temperature of 0 takes the likeliest token
        and filters nothing.

        Returns:
            The text of the prompt (its last block_size tokens) and of what follows, stop token
            included.
        """
        return writing.sampled(
            self, prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty,
            stop_tokens, recent_penalty_window, use_default_stop_tokens,
        )  # fmt: skip

    def generate_simple(self, prompt: str, max_new_tokens: int) -> str:
        """Continue a prompt with unfiltered samples, reading the window anew for every token."""
        return writing.unfiltered(self, prompt, max_new_tokens)

    def generate_nocache_greedy(self, prompt: str, max_new_tokens: int) -> str:
        """Continue a prompt with the likeliest tokens, reading the window anew for every one."""
        return writing.greedy(self, prompt, max_new_tokens)

    def save(self, checkpoint_dir: str | os.PathLike[str], save_dtype: str | None = None) -> None:
        """Write model.pt alone: the state_dict itself, or with a dtype wrapped and cast to it."""
        files.save_weights(self, checkpoint_dir, save_dtype)

    def save_checkpoint_bundle(
        self,
        checkpoint_dir: str | os.PathLike[str],
        step: int | None = None,
        optimizer_state: dict[str, Any] | None = None,
        training_config: dict[str, Any] | None = None,
        save_dtype: str | None = None,
    ) -> None:
        """Write the bundle (specification 5), published whole or not at all.

        Args:
            checkpoint_dir: its directory.
            step: of training.
            optimizer_state: `optimizer.state_dict()`.
            training_config: what a resume wants to know; its `config_file`, if it is there, is
                kept as original_config.json.
            save_dtype: of the weights in model.pt; default: config.save_dtype. The exact ones go
                into optimizer.pt, if there is one.

        Raises:
            SettingError: (a ValueError) for an unknown dtype.
        """
        files.save_bundle(self, checkpoint_dir, step, optimizer_state, training_config, save_dtype)

    @classmethod
    def load(
        cls,
        checkpoint_dir: str | os.PathLike[str],
        map_location: Any = None,
        load_dtype: str | None = None,
        load_optimizer: bool = True,
    ) -> Loaded:
        """Read a bundle.

        Args:
            checkpoint_dir: its directory.
            map_location: device; default: the config's, or the CPU where that is not here.
            load_dtype: of the weights; default: as specification 5.1 says, but fp32 to train on.
            load_optimizer: read optimizer.pt, and the exact weights behind rounded ones.

        Returns:
            The model in evaluation mode, the tokenizer's state, step and the optimizer's state;
            what is not there is None.

        Raises:
            NoCheckpointError: (a FileNotFoundError) if config.json or model.pt is missing.
            UnfitWeightsError: (a RuntimeError) if they do not fit each other.
            IntegrityError: if a file is not what was saved.
            SettingError: (a ValueError) for an unknown dtype.
        """
        saved = files.read_bundle(checkpoint_dir, load_optimizer)
        return files.revived(cls, saved, map_location, load_dtype, load_optimizer)

    @classmethod
    def load_legacy(cls, path: str | os.PathLike[str], map_location: Any = None) -> Loaded:
        """Read a single-file checkpoint of any era; returns and raises as `load`."""
        return files.revived(cls, files.read_legacy(path), map_location, None, True)

    def to_inference(self, device: Any = None) -> GPT:
        """Evaluation mode, fp16 on a GPU and fp32 on a CPU; sets config.device."""
        where = torch.device(device or self.lm_head.weight.device)
        self.to(where, torch.float16 if where.type == "cuda" else torch.float32)
        self.config.device = str(where)
        return self.eval()

    def compile_for_inference(self, mode: str = "default") -> GPT:
        """Let torch.compile run `forward`; where its compiler fails, the backend aot_eager does."""
        self.forward = writing.compiled(self.forward, mode)  # type: ignore[method-assign]
        return self


def tie(model: GPT) -> None:
    """Let the output matrix be the embedding, both replaced by their mean."""
    with torch.no_grad():
        mean = (model.token_embedding_table.weight + model.lm_head.weight) / 2
    model.token_embedding_table.weight = nn.Parameter(mean)
    model.lm_head.weight = model.token_embedding_table.weight
