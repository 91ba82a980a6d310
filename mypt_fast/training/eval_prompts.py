"""What the model writes at each evaluation: greedy, so that only the weights can change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mypt_fast.errors import ConfigError, MyptError
from mypt_fast.generate import generate
from mypt_fast.model import GPT
from mypt_fast.presets import read_json
from mypt_fast.schema import shown
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.training.evaluate import evaluating

MOST_PROMPTS = 64


@dataclass
class Samples:
    """Texts by the name of their prompt.

    Attributes:
        gen: with a key-value cache; None where the model's output is not finite.
        gen_nocache: the whole context read again for each token, where it fits the window.
        cache_mismatches: names for which the two differ.
    """

    gen: dict[str, str | None] = field(default_factory=dict)
    gen_nocache: dict[str, str | None] = field(default_factory=dict)
    cache_mismatches: list[str] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """Fields of an eval event (MyPT specification 7)."""
        return vars(self)


def read_prompts(path: str, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Read an eval_prompts_file: {"prompts": {name: text}}, other keys ignored.

    Returns:
        The prompts' token ids; none is empty.

    Raises:
        ConfigError: for a file that is missing or not that, and for more than 64 prompts.
        DataError: for text the tokenizer cannot express.
    """
    content = read_json(Path(path), "eval prompts")
    prompts = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(prompts, dict) or not prompts:
        raise ConfigError(
            f"{path}: expected an object with prompts", f"found {shown(prompts)}",
            'write {"prompts": {"name": "text"}}',
        )  # fmt: skip
    if len(prompts) > MOST_PROMPTS:
        raise ConfigError(f"{path}: at most {MOST_PROMPTS} prompts", f"found {len(prompts)}")
    encoded = {}
    for name, text in prompts.items():
        if not name.isprintable():  # half a surrogate pair has no UTF-8
            raise ConfigError(f"{path}: the name of a prompt is printable", f"found {shown(name)}")
        if not isinstance(text, str):
            raise ConfigError(f"{path}: prompts.{name}: expected text", f"found {shown(text)}")
        ids = list(tokenizer.encode(text))
        encoded[name] = ids or [tokenizer.eot_id or 0]
    return encoded


def write_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: dict[str, list[int]],
    max_new_tokens: int,
    between: Callable[[], None] = lambda: None,
) -> Samples:
    """Continue every prompt with the likeliest tokens; no global random state is touched.

    Args:
        model: left in the mode it came in.
        tokenizer: of that model.
        prompts: token ids by name.
        max_new_tokens: at most so many each.
        between: called before every token; may raise to stop.
    """
    samples = Samples()
    with evaluating(model), model.uncompiled():
        for name, ids in prompts.items():
            try:
                new = _cached(model, tokenizer, ids, max_new_tokens, between)
            except MyptError:  # weights that became NaN: the losses beside it say so
                samples.gen[name] = None
                continue
            samples.gen[name] = tokenizer.decode(new)
            if len(ids) + max_new_tokens > model.config.block_size:
                continue  # a window that slides is not read the same way twice
            again = _uncached(model, ids, len(new), between)
            samples.gen_nocache[name] = tokenizer.decode(again)
            if again != new:
                samples.cache_mismatches.append(name)
    return samples


def _cached(
    model: GPT, tokenizer: Tokenizer, ids: list[int], most: int, between: Callable[[], None]
) -> list[int]:
    new: list[int] = []
    for token in generate(
        model, tokenizer, ids, max_new_tokens=most, temperature=0, seed=0, repeat_window=0
    ):
        between()
        new.append(token)
    return new


@torch.inference_mode()
def _uncached(model: GPT, ids: list[int], count: int, between: Callable[[], None]) -> list[int]:
    """The `count` likeliest tokens, one whole forward each."""
    device, all_ids = model.lm_head.weight.device, list(ids)
    for _ in range(count):
        between()
        x = model.hidden(torch.tensor([all_ids], device=device))
        all_ids.append(int(model.lm_head(x[0, -1]).float().argmax()))
    return all_ids[len(ids) :]
