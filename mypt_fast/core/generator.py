"""MyPT's Generator: a model and a few settings for the kinds of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypt_fast.core.model import GPT


class Generator:
    """Writes text with a model, which it puts into evaluation mode."""

    def __init__(self, model: GPT) -> None:
        self.model = model.eval()

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        temperature: float | None = 0.8,
        top_k: int | None = 50,
        top_p: float | None = 0.95,
        repetition_penalty: float | None = 1.1,
        stop_tokens: Iterable[int] | None = None,
    ) -> str:
        """Return the prompt and its continuation, as `GPT.generate`."""
        return self.model.generate(
            prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, stop_tokens
        )

    def generate_creative(self, prompt: str, max_new_tokens: int = 500) -> str:
        """Write freely."""
        return self.generate(prompt, max_new_tokens, 1.0, 100, 0.95, 1.2)

    def generate_factual(self, prompt: str, max_new_tokens: int = 100) -> str:
        """Write close to what is likeliest."""
        return self.generate(prompt, max_new_tokens, 0.3, 10, 0.8, 1.0)

    def generate_code(self, prompt: str, max_new_tokens: int = 200) -> str:
        """Write code."""
        return self.generate(prompt, max_new_tokens, 0.2, 40, 0.95, 1.0)
