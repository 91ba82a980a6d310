"""tokenizer_state.json beside shards: read with a limit, compared with what shards record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mypt_fast.data.format.files import opened, read_at
from mypt_fast.data.format.shard import Shard
from mypt_fast.errors import IntegrityError
from mypt_fast.tokenizer_state import state_digest

TOKENIZER = "tokenizer_state.json"
_LIMIT = 64 << 20  # bytes, as the trainer's
_CURE = "copy the file again, or prepare the dataset again"


def read_tokenizer(dataset_dir: Path) -> dict[str, Any] | None:
    """Return the tokenizer's state that lies in a dataset, None where there is none.

    A link is followed, wherever it leads: what is not a tokenizer's state goes no further.

    Raises:
        DataError: it cannot be read, or is no regular file.
        IntegrityError: it is too large, no JSON or no tokenizer's state.
    """
    path = Path(dataset_dir) / TOKENIZER
    if not os.path.lexists(path):
        return None
    with opened(path, "tokenizer") as (descriptor, size):
        if size > _LIMIT:
            raise IntegrityError(str(path), f"more than {_LIMIT} bytes", _CURE)
        raw = read_at(descriptor, size, 0, path)
    try:
        state = json.loads(raw)
    except (ValueError, RecursionError) as error:
        found = f"not JSON: {error}" if raw else "empty"
        raise IntegrityError(str(path), found, _CURE) from error
    if not isinstance(state, dict) or "token_kind" not in state:
        raise IntegrityError(str(path), 'no JSON object with a "token_kind"', _CURE)
    return state


def check_tokenizer(shards: Iterable[Shard], state: dict[str, Any] | None, source: object) -> None:
    """Refuse shards whose tokens were made by another tokenizer than the one beside them.

    Args:
        shards: those without a digest of their tokenizer say nothing and are passed over.
        state: what `tokenizer_state.json` holds, as parsed; None compares nothing.
        source: names the dataset in the error.

    Raises:
        IntegrityError: a shard records another tokenizer.
    """
    recorded: dict[bytes, Shard] = {}
    for shard in shards:
        if any(shard.tokenizer):
            recorded.setdefault(shard.tokenizer, shard)
    if state is None or not recorded:
        return
    expected = state_digest(state)
    for digest, shard in recorded.items():
        if digest != expected:
            raise IntegrityError(
                f"{TOKENIZER} of {source}",
                f"its SHA-256 is {expected.hex()[:16]}..., where shard {shard.name} was made with "
                f"{digest.hex()[:16]}...: its ids mean other text",
                _CURE,
            )
