"""Evaluation prompts that no training data may hold: training on them would spoil the test.

Membership is by whole text, case and white space aside. The lists are short on purpose: they hold
what the evaluation scripts' own examples ask, in this project's words.
"""

import re

FORBIDDEN_USER_PROMPTS: tuple[str, ...] = (
    "Who are you?",
    "What is your name?",
    "What is 2 + 2?",
    "What is the capital of France?",
    "Say hello.",
    "Repeat after me: hello world",
)
FORBIDDEN_PAYLOADS: tuple[str, ...] = (
    "hello world",
    "lorem ipsum",
    "foo bar",
    "The quick brown fox",
)
FORBIDDEN_TEMPLATES: tuple[str, ...] = ("Repeat after me: {payload}", "Say {payload} and stop.")


def _normal(text: object) -> str:
    """One spelling: lower case, single spaces."""
    return re.sub(r"\s+", " ", str(text)).strip().casefold()


def _is_among(text: str | None, forbidden: tuple[str, ...]) -> bool:
    return bool(text) and _normal(text) in {_normal(entry) for entry in forbidden}


def payload_is_forbidden(payload: str | None) -> bool:
    """Whether a payload (what is to be repeated, wrapped, counted) is one of an evaluation's."""
    return _is_among(payload, FORBIDDEN_PAYLOADS)


def user_prompt_is_forbidden(user_text: str | None) -> bool:
    """Whether a user message is one of an evaluation's."""
    return _is_among(user_text, FORBIDDEN_USER_PROMPTS)


def template_is_forbidden(template_sig: str | None) -> bool:
    """Whether a template's signature is one of an evaluation's."""
    return _is_among(template_sig, FORBIDDEN_TEMPLATES)


def is_eval_leak(
    user_text: str | None, payload: str | None, template_sig: str | None = None
) -> bool:
    """Whether any of the three would put an evaluation into training data."""
    return (
        user_prompt_is_forbidden(user_text)
        or payload_is_forbidden(payload)
        or template_is_forbidden(template_sig)
    )
