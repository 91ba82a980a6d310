"""Text from a core model: MyPT's settings and stops over the engine's generation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mypt_fast import console
from mypt_fast.attention import KVCache
from mypt_fast.core.errors import ContextError, TokenizerError
from mypt_fast.generate import REPEAT_WINDOW, Generation, Sampling
from mypt_fast.training.evaluate import evaluating

if TYPE_CHECKING:
    from mypt_fast.core.model import GPT

STOPS = ("myPT_assistant_close", "myPT_eot")


def sampled(
    model: GPT,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    stop_tokens: Iterable[int] | None,
    recent_penalty_window: int,
    use_default_stop_tokens: bool,
) -> str:
    """As `GPT.generate`."""
    stops = {int(token) for token in stop_tokens or ()}
    if use_default_stop_tokens:
        stops |= stop_ids(model)
    sampling = Sampling(
        max(temperature or 0.0, 0.0), top_k or 0, 1.0 if top_p is None else top_p,
        repetition_penalty or 1.0, recent_penalty_window or 0,
    )  # fmt: skip
    with evaluating(model):
        text = Generation(
            model, prompt_ids(model, prompt), sampling, max_new_tokens, stops, None,
            REPEAT_WINDOW, global_generator=True,
        )  # fmt: skip
        if os.environ.get("DEBUG_KV_CACHE") == "1":
            compare_cache(model, text.ids)
        for _ in text:
            pass
    return model.decode(text.ids)


@torch.no_grad()
def compare_cache(model: GPT, ids: list[int]) -> None:
    """Print how far the logits of a text with a cache are from those without."""
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    cache = KVCache(model.config, 1, model.lm_head.weight)
    parts = [model.hidden(one, cache=cache) for one in idx.split(1, dim=1)]
    cached, plain = (model.lm_head(x)[0].float() for x in (torch.cat(parts, 1), model.hidden(idx)))
    same = int((cached.argmax(-1) == plain.argmax(-1)).sum())
    console.say(
        f"DEBUG_KV_CACHE: largest difference {float((cached - plain).abs().max()):.2e}; "
        f"the likeliest token is the same at {same} of {len(ids)} positions"
    )


def unfiltered(model: GPT, prompt: str, n: int) -> str:
    """As `GPT.generate_simple`."""
    return _anew(model, prompt, n, lambda x: int(torch.multinomial(x.softmax(-1), 1)))


def greedy(model: GPT, prompt: str, n: int) -> str:
    """As `GPT.generate_nocache_greedy`."""
    return _anew(model, prompt, n, lambda x: int(x.argmax()), stop_ids(model))


@torch.no_grad()
def _anew(
    model: GPT, prompt: str, n: int, choose: Callable[[Tensor], int], stops: Iterable[int] = ()
) -> str:
    """Write with the whole window read for every token: no cache."""
    ids, head = prompt_ids(model, prompt), model.lm_head
    with evaluating(model):
        for _ in range(n):
            window = torch.tensor([ids[-model.config.block_size :]], device=head.weight.device)
            ids.append(choose(head(model.hidden(window)[0, -1]).float()))
            if ids[-1] in stops:
                break
    return model.decode(ids)


def prompt_ids(model: GPT, prompt: str) -> list[int]:
    """The prompt's last block_size ids, [0] for an empty one.

    Raises:
        TokenizerError: (a ValueError) for an id that the model has no embedding for.
    """
    ids = (model.encode(prompt) or [0])[-model.config.block_size :]
    if max(ids) >= model.config.vocab_size:
        raise TokenizerError(
            "the tokenizer is not this model's",
            f"it made id {max(ids)}, the model has {model.config.vocab_size}",
        )
    return ids


def stop_ids(model: GPT) -> set[int]:
    """Where an answer ends: the assistant's close and the end of a turn, where there are any."""
    known = getattr(model.tokenizer, "special_tokens", None)  # a script's own may have none
    return {known[name] for name in STOPS if name in known} if isinstance(known, dict) else set()


def compiled(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """A forward that torch.compile runs; where its compiler fails, the backend aot_eager does."""
    running: list[Callable[..., Any]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if running:
            return running[0](*args, **kwargs)
        try:
            first = torch.compile(forward, mode=mode)
            result = first(*args, **kwargs)
        except ContextError:
            raise
        except Exception as e:  # the compiler's toolchain fails in as many ways as it has parts
            console.say(f"torch.compile failed ({type(e).__name__}); using aot_eager")
            first = torch.compile(forward, backend="aot_eager")
            result = first(*args, **kwargs)
        running.append(first)
        return result

    return run
