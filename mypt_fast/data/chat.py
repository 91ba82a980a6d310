"""Conversations to tokens, with a mask and a weight for each (specification 8.2).

    <system>prompt</system><user>...</user><assistant>...</assistant> ... <eot>

Tags are single tokens and nothing stands between them. What the assistant writes counts, its
closing tag and the end of the turn included; all else is read and not learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mypt_fast.errors import DataError
from mypt_fast.tokenizer import SPECIAL_STRINGS, Tokenizer

DEFAULT_SYSTEM = "You are MyPT."
ROLES = ("system", "user", "assistant")
CLOSING_WEIGHT = 2.0  # of the assistant's closing tag and of the end of the turn
TAG_WEIGHTS = {"toolcall": 2.0, "think": 1.5, "cite": 1.5}  # of the tags inside an answer
# Tags that a content may not hold: they would end the message, or the conversation, within it.
_STRUCTURE = [
    SPECIAL_STRINGS[f"myPT_{role}_{side}"] for role in ROLES for side in ("open", "close")
]
_STRUCTURE.append(SPECIAL_STRINGS["myPT_eot"])
_MAX_LINE = 64 << 20  # bytes


@dataclass
class Episode:
    """A serialised row.

    Attributes:
        tokens: ids.
        mask: 1 where a token is learned, else 0.
        weights: how much it counts; 0 where the mask is.
    """

    tokens: list[int]
    mask: list[int]
    weights: list[float]

    def last(self, count: int) -> Episode:
        """The last tokens of it, all where there are fewer."""
        return Episode(self.tokens[-count:], self.mask[-count:], self.weights[-count:])


class BadRowError(DataError):
    """A row that is no conversation."""


class ChatSerializer:
    """Turns rows of JSONL into episodes.

    Args:
        tokenizer: with MyPT's special tokens.
        system: the prompt of conversations that bring none; "" for no system tags there.

    Raises:
        DataError: the tokenizer lacks a special token.
    """

    def __init__(self, tokenizer: Tokenizer, system: str = DEFAULT_SYSTEM) -> None:
        missing = [name for name in SPECIAL_STRINGS if tokenizer.special_id(name) is None]
        if missing:
            raise DataError(
                f"conversations with a {tokenizer.kind} tokenizer",
                f"it has no {missing[0]}",
                "use --tokenization gpt2",
            )
        self._tokenizer = tokenizer
        self._system = _content(system, "the system prompt") if system else ""
        self._id = {name: tokenizer.special_tokens[name] for name in SPECIAL_STRINGS}
        self.eot_id = self._id["myPT_eot"]
        self._tag_weights = {
            self._id[f"myPT_{tag}_{side}"]: weight
            for tag, weight in TAG_WEIGHTS.items()
            for side in ("open", "close")
        }

    def episode(self, row: Any) -> Episode:
        """Serialise one row: a conversation, or `_replay` with a `text` that is learned whole.

        Raises:
            BadRowError: it is neither.
        """
        if not isinstance(row, Mapping):
            raise BadRowError(f"a JSON {type(row).__name__}, not an object")
        if row.get("_replay"):
            text = _text(row.get("text"), "text of a _replay row")
            tokens = self._tokenizer.encode(text)
            return Episode(tokens, [1] * len(tokens), [1.0] * len(tokens))
        out = Episode([], [], [])
        answers = 0
        for role, content in self._messages(row):
            learned = role == "assistant"
            answers += learned
            self._add(out, [self._id[f"myPT_{role}_open"]])
            self._add(out, self._tokenizer.encode(content), learned)
            closing = [self._id[f"myPT_{role}_close"]]
            self._add(out, closing, learned, CLOSING_WEIGHT)
        if not answers:
            raise BadRowError("no message of the assistant, so nothing to learn")
        self._add(out, [self.eot_id], True, CLOSING_WEIGHT)
        return out

    def _add(
        self, out: Episode, tokens: list[int], learned: bool = False, weight: float = 1.0
    ) -> None:
        out.tokens += tokens
        out.mask += [int(learned)] * len(tokens)
        weights = (max(weight, self._tag_weights.get(t, 0.0)) for t in tokens)
        out.weights += weights if learned else [0.0] * len(tokens)

    def _messages(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRowError("no list of messages, and no _replay with a text")
        first = messages[0] if isinstance(messages[0], Mapping) else {}
        system = row.get("system")
        if first.get("role") == "system":
            if system is not None:
                raise BadRowError("a system prompt beside the messages and another as the first")
        elif prompt := self._system if system is None else _content(system, "system"):
            yield "system", prompt
        for number, message in enumerate(messages):
            where = f"messages[{number}]"
            if not isinstance(message, Mapping):
                raise BadRowError(f"{where} is a JSON {type(message).__name__}, not an object")
            role = message.get("role")
            if role not in ROLES or (role == "system" and number):
                found = "system, which comes first or not at all" if role == "system" else role
                raise BadRowError(f"{where}.role is {found!r:.60}; roles are {', '.join(ROLES)}")
            yield role, _content(message.get("content"), f"{where}.content")


def parse_row(line: bytes) -> Any:
    """Parse a line of JSONL.

    Raises:
        BadRowError: it is not JSON.
    """
    try:
        if len(line) > _MAX_LINE:
            raise ValueError(f"longer than {_MAX_LINE} bytes")
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise BadRowError(f"not JSON: {error}") from None


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        found = "empty" if value == "" else f"{value!r:.40}"
        raise BadRowError(f"{what} is {found}, not a text")
    return value


def _content(value: Any, what: str) -> str:
    text = _text(value, what)
    for tag in _STRUCTURE:
        if tag in text:
            raise BadRowError(f"{what} holds {tag}, which would end the message within it")
    return text
