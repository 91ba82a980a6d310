"""Shards read the slow and obvious way, from the description of the format alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash


class PlainShard(NamedTuple):
    tokens: np.ndarray
    ends: list[int]
    header: dict[str, Any]


_NAMES = (
    "magic", "version", "endian", "width", "flags", "n_tokens", "n_docs", "vocab_size", "eot_id",
    "max_token", "tokenizer", "payload_hash", "mask_hash", "segments_hash",
)  # fmt: skip


def read_native(path: Path) -> PlainShard:
    """Read one MYPTSHD1 file, every promise of it checked."""
    data = path.read_bytes()
    head = dict(zip(_NAMES, struct.unpack_from("<8sIIIIQQQqQ32s16s8s8s", data), strict=True))
    assert (head["magic"], head["version"], head["endian"]) == (b"MYPTSHD1", 1, 0x01020304)
    assert data[4088:4096] == xxhash.xxh3_64_intdigest(data[:4088]).to_bytes(8, "little")
    size = head["n_tokens"] * head["width"]
    payload = data[4096 : 4096 + size]
    assert head["payload_hash"] == xxhash.xxh3_128_digest(payload)
    tokens = np.frombuffer(payload, {2: "<u2", 4: "<u4"}[head["width"]])
    assert head["max_token"] == tokens.max() < head["vocab_size"]
    at = 4096 + -(-size // 8) * 8
    assert data[4096 + size : at] == bytes(at - 4096 - size)
    ends = np.frombuffer(data, "<u8", head["n_docs"], at)
    assert (np.diff(ends.astype(np.int64)) > 0).all()
    assert ends[0] > 0
    assert ends[-1] == head["n_tokens"]
    blocks = [payload[n : n + (1 << 20)] for n in range(0, size, 1 << 20)]
    footer = at + 8 * len(ends) + 8 * len(blocks)
    assert data[at + 8 * len(ends) : footer] == b"".join(
        xxhash.xxh3_64_intdigest(block).to_bytes(8, "little") for block in blocks
    )
    assert data[footer:] == struct.pack(
        "<8sQQ", b"MYPTEND1", len(data), xxhash.xxh3_64_intdigest(data[at:footer])
    )
    return PlainShard(tokens, ends.tolist(), head)


def is_native(folder: Path) -> bool:
    return json.loads((folder / "dataset_metadata.json").read_text())["format"] == "native"


def tokens(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split of a dataset of either format."""
    paths = sorted((folder / split).glob("*.bin"))
    if is_native(folder):
        return np.concatenate([read_native(path).tokens for path in paths])
    return np.concatenate([np.fromfile(path, "<u4") for path in paths])
