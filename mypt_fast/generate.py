"""Write text with a trained model: KV cache, sampling, streaming.

A window slides: the cache holds `block_size` positions, and when it is full the most recent three
quarters of it are read again from scratch. That costs one pass over 3/4 T per T/4 tokens, where
keeping exactly T tokens of context would cost a pass over T for every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mypt_fast.attention import KVCache
from mypt_fast.checkpoint import bundle, legacy
from mypt_fast.checkpoint.eras import misfit
from mypt_fast.config import ModelConfig
from mypt_fast.errors import CheckpointError, ConfigError, IntegrityError
from mypt_fast.model import GPT
from mypt_fast.schema import build, field_names
from mypt_fast.tokenizer import Tokenizer

REPEAT_WINDOW = 32


@dataclass
class Loaded:
    """A model ready to write."""

    model: GPT
    tokenizer: Tokenizer
    step: int | None
    notices: list[str] = field(default_factory=list)


def load(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """Read a checkpoint for inference: verified, without optimizer, in evaluation mode.

    Args:
        path: a run's directory, or its `_gold` or `_fp16` sibling, or an old single file.
        device: where the model goes.
        dtype: of the weights. Rotary tables stay fp32: rounded, they misplace far positions.

    Raises:
        CheckpointError: if there is no bundle, no tokenizer, or weights and config disagree.
        IntegrityError: if a file is not what was saved.
    """
    is_file = path.is_file()
    saved = legacy.read(path, optimizer=False) if is_file else bundle.read(path, optimizer=False)
    if saved.tokenizer is None:
        raise CheckpointError(
            f"{path} holds no tokenizer" if is_file else f"{path / 'tokenizer.json'} is missing",
            cure="convert it, and copy its data's tokenizer_state.json there as tokenizer.json"
            if is_file
            else "copy it from the run this came from",
        )
    known = {k: v for k, v in saved.config.items() if k in set(field_names(ModelConfig))}
    cfg = build(ModelConfig, known, str(path / "config.json"))
    cfg.check(str(path / "config.json"))
    tokenizer = Tokenizer.from_state(saved.tokenizer)
    if tokenizer.n_tokens > cfg.vocab_size:
        raise CheckpointError(
            f"{path}: tokenizer.json does not fit the model",
            f"{tokenizer.n_tokens} tokens, model {cfg.vocab_size}",
            "restore the tokenizer.json that was saved with it",
        )
    model = GPT(cfg, seed=None)
    try:
        model.load_state_dict(saved.state_dict)
    except RuntimeError as e:
        raise CheckpointError(
            f"{path}: model.pt does not fit config.json", misfit(saved.state_dict, cfg)
        ) from e
    model.to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
        p.requires_grad_(False)
    step = saved.training_state.get("step")
    return Loaded(model.eval(), tokenizer, step, saved.notices)


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    repetition_penalty: float = 1.1,
    stop_tokens: Sequence[int] = (),
    seed: int | None = None,
    recent_penalty_window: int = 256,
    use_default_stops: bool = True,
    repeat_window: int = REPEAT_WINDOW,
) -> Generation:
    """Continue a prompt; iterate over the result for the new token ids, one by one.

    Args:
        model: in evaluation mode.
        tokenizer: of that model.
        prompt: text, or token ids. An empty one becomes the token that starts a document, or
            id 0 for a char model, which has none. Only its last `block_size` ids are read.
        max_new_tokens: at most so many.
        temperature: logits are divided by it; 0 takes the likeliest token and filters nothing.
        top_k: keep the k likeliest, ties included; 0 keeps all.
        top_p: keep the fewest likeliest whose mass exceeds p; 1 keeps all.
        repetition_penalty: of ids among the last `recent_penalty_window`; 1 is none.
        stop_tokens: further ids to stop after.
        seed: of this text's own generator; None draws one from the system. Torch's global
            generator is never touched.
        recent_penalty_window: see `repetition_penalty`; the prompt counts.
        use_default_stops: stop after the end of a document (GPT-2's 50256 included: base models
            are trained with it between texts), of a turn, and of the assistant's answer.
        repeat_window: stop when the last so many ids repeat the ones before; 0 never does.

    Raises:
        ConfigError: for a setting out of range.
        DataError: for text the tokenizer cannot express.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, recent_penalty_window)
    sampling.check()
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        ids = [0 if tokenizer.eot_id is None else tokenizer.eot_id]
    stops = set(stop_tokens)
    if use_default_stops:
        stops.update(tokenizer.stop_ids())
    outside = [i for i in (*ids, *stop_tokens) if not 0 <= i < model.config.vocab_size]
    if outside:
        raise ConfigError(f"token id {outside[0]}", f"the model has {model.config.vocab_size} ids")
    return Generation(model, ids, sampling, max_new_tokens, stops, seed, repeat_window)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    recent_penalty_window: int = 256

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        rules = (
            ("temperature", 0 <= self.temperature < float("inf"), ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "> 0 and <= 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, ">= 0.01 and <= 100"),
        )
        for name, good, allowed in rules:
            if not good:
                found = f"found {getattr(self, name)}"
                raise ConfigError(f"{name} is out of range", found, f"use {allowed}")

    def choose(
        self, logits: Tensor, recent: Sequence[int], generator: torch.Generator | None
    ) -> int:
        """Choose a token id from fp32 logits: (V,); without a generator, by torch's global one.

        Something always stays to choose from: top-k keeps its k, top-p the likeliest.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits / max(self.temperature, 1e-8)  # below it, the division would overflow
        logits = penalised(logits, recent, self.repetition_penalty)
        kept = keep_top_p(keep_top_k(logits, self.top_k), self.top_p)
        return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))


def penalised(logits: Tensor, recent: Sequence[int], penalty: float) -> Tensor:
    """Make recent ids less likely: positive logits divided, others multiplied (1909.05858)."""
    if penalty == 1 or not recent:
        return logits
    ids = torch.tensor(sorted(set(recent)), device=logits.device)
    scores = logits[ids]
    return logits.scatter(0, ids, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Mask all but the k largest; what ties with the k-th stays."""
    if k <= 0 or k >= logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Mask all but the smallest set of likeliest ids whose mass exceeds p; never the first."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    mass = ordered.softmax(-1).cumsum(-1)
    drop = torch.zeros_like(mass, dtype=torch.bool)
    drop[1:] = mass[:-1] > p  # the id that crosses p is still needed
    return logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), float("-inf"))


class Generation(Iterator[int]):
    """The new token ids of one text, computed as they are asked for.

    Attributes:
        ids: prompt and new tokens so far.
        n_prompt: how many of them are the prompt.
        stopped: why it ended: "length", "stop_token" or "repetition"; None while it goes on.
        seed: what drew them; None where torch's global generator does, as MyPT's scripts expect.
    """

    def __init__(
        self,
        model: GPT,
        ids: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stops: set[int],
        seed: int | None,
        repeat_window: int,
        global_generator: bool = False,
    ) -> None:
        self.model, self.sampling, self.stops = model, sampling, stops
        self.ids, self.n_prompt = list(ids), len(ids)
        self.stopped: str | None = None
        self._limit = len(ids) + max_new_tokens
        weight = model.lm_head.weight
        self._generator, self.seed = None, seed
        if not global_generator:
            self._generator = torch.Generator(weight.device)
            self.seed = self._generator.seed() if seed is None else seed
            self._generator.manual_seed(self.seed)
        self._block = model.config.block_size
        self._cache = KVCache(model.config, 1, weight)
        self._pending = self.ids[-self._block :]
        self._repeat = repeat_window
        self._run = 0  # how many ids in a row equal the id `repeat_window` before them
        for n in range(repeat_window + 1, len(self.ids) + 1):
            self._count_repeat(n)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> int:
        """Compute the next token id."""
        if self.stopped is None and len(self.ids) >= self._limit:
            self.stopped = "length"
        if self.stopped is not None:
            raise StopIteration
        recent = self.ids[-self.sampling.recent_penalty_window :]
        token = self.sampling.choose(self._logits(), recent, self._generator)
        self.ids.append(token)
        self._pending.append(token)
        self._count_repeat(len(self.ids))
        if token in self.stops:
            self.stopped = "stop_token"
        elif self._repeat and self._run >= self._repeat:
            self.stopped = "repetition"
        return token

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        """Read what is pending and return the logits of the next token, (V,) fp32."""
        if self._cache.length + len(self._pending) > self._block:
            self._cache.length = 0
            self._pending = self.ids[-max(1, 3 * self._block // 4) :]
        head = self.model.lm_head
        idx = torch.tensor([self._pending], device=head.weight.device)
        # the last position only: the logits of a whole prompt would be T x V
        logits = head(self.model.hidden(idx, cache=self._cache)[0, -1]).float()
        self._pending = []
        if not math.isfinite(float(logits.max())):  # NaN anywhere shows here too
            raise IntegrityError("the model's output is not finite", "its weights may be damaged")
        return logits

    def _count_repeat(self, n: int) -> None:
        """Compare the n-th id with the one a window before: one comparison per token."""
        same = 0 < self._repeat < n and self.ids[n - 1] == self.ids[n - 1 - self._repeat]
        self._run = self._run + 1 if same else 0


def stream_text(tokenizer: Tokenizer, generation: Generation) -> Iterator[str]:
    """Yield the text of new tokens as whole characters; a stop token's own string is left out."""
    decoder = tokenizer.stream()
    for token in generation:
        if generation.stopped != "stop_token":
            yield decoder.push(token)
    yield decoder.flush()
