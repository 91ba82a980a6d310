"""Datasets made by `prepare`, and what must hold for each."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from plain_shards import read_native, tokens

from mypt_fast.data import prepare
from mypt_fast.data.prepare import PrepareOptions
from mypt_fast.tokenizer import Tokenizer

EOT = 50256


def build(out: Path, *inputs: Path | str, **options: Any) -> dict[str, Any]:
    return prepare.prepare(PrepareOptions(out, tuple(map(str, inputs)), **options))


def originals(folder: Path) -> list[str]:
    return [path.read_bytes().decode() for path in sorted(folder.iterdir())]


def check_whole(out: Path, metadata: dict[str, Any]) -> None:
    """Every promise of the metadata holds for the files."""
    assert json.loads((out / "dataset_metadata.json").read_text()) == metadata
    assert sorted(os.listdir(out)) == [
        "dataset_metadata.json",
        "tokenizer_state.json",
        "train",
        "val",
    ]
    for split in ("train", "val"):
        shards = [s for s in metadata["shards"] if s["name"].startswith(f"{split}/")]
        assert [s["name"] for s in shards] == [
            f"{split}/shard_{n:05d}.bin" for n in range(len(shards))
        ]
        assert len(os.listdir(out / split)) == len(shards) == metadata[f"{split}_shards"]
        for shard in shards:
            check_shard(out, shard, metadata)
        sizes = [shard["tokens"] for shard in shards]
        assert all(size == metadata["tokens_per_shard"] for size in sizes[:-1])
        assert sum(sizes) == metadata[f"num_{split}_tokens"] > 0
    everything = np.concatenate([tokens(out, "train"), tokens(out, "val")])
    assert metadata["total_tokens"] == len(everything)
    assert metadata["max_token"] == everything.max() < metadata["vocab_size"]


def check_shard(out: Path, shard: dict[str, Any], metadata: dict[str, Any]) -> None:
    path = out / shard["name"]
    if metadata["format"] == "mypt":
        assert metadata["dtype"] == "uint32"
        assert path.stat().st_size == 4 * shard["tokens"]
        assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == shard["xxh3_128"]
        return
    found = read_native(path)
    assert found.header["n_tokens"] == shard["tokens"]
    assert found.header["payload_hash"].hex() == shard["xxh3_128"]
    assert found.header["vocab_size"] == metadata["vocab_size"]
    assert metadata["dtype"] == found.tokens.dtype.name == "uint16"
    state = json.loads((out / "tokenizer_state.json").read_text())
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    assert found.header["tokenizer"] == hashlib.sha256(canonical).digest()
    eot = Tokenizer.from_state(state).eot_id
    if eot is not None and not metadata["options"]["no_eot"]:
        assert found.header["eot_id"] == eot
        expected = (np.flatnonzero(found.tokens == eot) + 1).tolist()
        if not expected or expected[-1] != shard["tokens"]:
            expected.append(shard["tokens"])  # the last document goes on in the next shard
        assert found.ends == expected
