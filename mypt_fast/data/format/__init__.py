"""Find and validate token shards: MyPT directories of flat little-endian uint32 (or uint16).

    <dir>/dataset_metadata.json          optional; "dtype", "vocab_size", "shards" are read
    <dir>/train/*.bin  <dir>/val/*.bin   no header; `*_mask.bin` are not tokens

Nothing is guessed: without a "dtype" a shard is uint32, as MyPT writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mypt_fast.errors import DataError, IntegrityError

Split = Literal["train", "val"]
METADATA = "dataset_metadata.json"
WIDTHS = {"uint16": 2, "uint32": 4}

_METADATA_LIMIT = 64 << 20  # bytes; 100,000 shards with their hashes stay below 16 MiB
_SAMPLE_BYTES = 64 << 10
_MIN_SAMPLE_WORDS = 32  # below this a pattern of zeros proves nothing
SAMPLE_BYTES = 4096
_PREPARE = "prepare the dataset again"


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
        path: the file.
        width: bytes per token, 2 or 4.
        n_tokens: how many tokens it holds.
        offset: bytes before the first token.
        digest: XXH3-128 of the file as its metadata records it; when it records none, a hash of
            samples of the file, so that another file of the same name and size is told apart.
    """

    path: Path
    width: int
    n_tokens: int
    offset: int = 0
    digest: str = ""

    @property
    def name(self) -> str:
        """The name within the dataset, such as train/shard_00000.bin."""
        return f"{self.path.parent.name}/{self.path.name}"


def has_split(dataset_dir: Path, split: Split) -> bool:
    """Say whether the dataset has at least one shard of this split."""
    return bool(_shard_paths(Path(dataset_dir) / split))


def open_split(dataset_dir: Path, split: Split) -> list[Shard]:
    """Return the shards of one split in reading order, each checked.

    Raises:
        DataError: the directory or its shards are missing or cannot be read.
        IntegrityError: a file is not what its size or the metadata says.
    """
    dataset_dir = Path(dataset_dir)
    if not dataset_dir.is_dir():
        raise DataError(
            f"dataset {dataset_dir}",
            "is a file" if dataset_dir.exists() else "no such directory",
            f"name a directory that holds {split}/*.bin",
        )
    metadata = read_metadata(dataset_dir)
    width = WIDTHS[metadata.get("dtype", "uint32")]
    paths = _shard_paths(dataset_dir / split)
    recorded = _recorded_shards(metadata, split)
    if recorded is not None:
        _check_listing(dataset_dir, split, paths, recorded)
    if not paths:
        raise DataError(
            f"{split} split of {dataset_dir}",
            f"no token shard; searched {dataset_dir / split}/*.bin (without *_mask.bin)",
            "prepare a dataset there or name another directory",
        )
    shards = [_open_shard(path, width, (recorded or {}).get(path.name)) for path in paths]
    for index in sorted({0, len(shards) // 2, len(shards) - 1}):
        _check_width(shards[index], metadata.get("vocab_size"))
    return shards


def read_metadata(dataset_dir: Path) -> dict[str, Any]:
    """Return the checked dataset_metadata.json, or {} where there is none."""
    path = Path(dataset_dir) / METADATA
    try:
        with path.open("rb") as file:
            raw = file.read(_METADATA_LIMIT + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror}") from error
    if len(raw) > _METADATA_LIMIT:
        raise IntegrityError(str(path), f"more than {_METADATA_LIMIT} bytes", _PREPARE)
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(str(path), f"not JSON: {error}", _PREPARE) from error
    if not isinstance(metadata, dict):
        raise IntegrityError(str(path), f"a JSON {type(metadata).__name__}, not an object")
    _check_metadata(path, metadata)
    return metadata


def dataset_fingerprint(shards: list[Shard]) -> str:
    """Return 16 hex digits that change when a name, size, width or digest does."""
    lines = (f"{s.name} {s.width} {s.offset} {s.n_tokens} {s.digest}\n" for s in shards)
    return hashlib.blake2b("".join(lines).encode(), digest_size=8).hexdigest()


def _shard_paths(split_dir: Path) -> list[Path]:
    try:
        entries = sorted(split_dir.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(str(split_dir), f"cannot be listed: {error.strerror}") from error
    return [p for p in entries if p.name.endswith(".bin") and not p.name.endswith("_mask.bin")]


def _open_shard(path: Path, width: int, recorded: dict[str, Any] | None) -> Shard:
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            digest = (recorded or {}).get("xxh3_128") or _sampled_digest(file, info.st_size)
    except OSError as error:
        raise DataError(f"shard {path}", f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"shard {path}", "not a regular file")
    if info.st_size % width:
        raise IntegrityError(
            f"shard {path}",
            f"{info.st_size} bytes is not a multiple of {width} (uint{8 * width})",
            f"the file was cut short or has another dtype: {_PREPARE}, or set dtype in {METADATA}",
        )
    with path.open("rb") as file:  # TEMPORARY: the native format, until its own readers are here
        head = file.read(4096)
    if head[:8] == b"MYPTSHD1":
        from mypt_fast.data.format import native

        header = native.unpack_header(head)
        return Shard(path, header.width, header.n_tokens, native.HEADER_BYTES, digest)
    n_tokens = info.st_size // width
    if recorded is None:
        return Shard(path, width, n_tokens, digest=digest)
    if n_tokens != recorded["tokens"]:
        raise IntegrityError(
            f"shard {path}",
            f"{info.st_size} bytes, where {METADATA} says {recorded['tokens']} tokens of {width} "
            f"bytes = {recorded['tokens'] * width}",
            f"copy the file again or {_PREPARE}",
        )
    return Shard(path, width, n_tokens, digest=digest)


def _sampled_digest(file: BinaryIO, size: int) -> str:
    """Hash 64 blocks spread over a file, both ends among them: 256 KiB however large it is."""
    digest = hashlib.blake2b(digest_size=8)
    blocks = max(1, -(-size // SAMPLE_BYTES))
    for i in sorted({j * (blocks - 1) // 63 for j in range(64)}):
        file.seek(i * SAMPLE_BYTES)
        digest.update(file.read(SAMPLE_BYTES))
    return f"sampled-{digest.hexdigest()}"


def _check_metadata(path: Path, metadata: dict[str, Any]) -> None:
    dtype = metadata.get("dtype", "uint32")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise IntegrityError(f"dtype in {path}", f"{dtype!r}", f"use {' or '.join(WIDTHS)}")
    vocab_size = metadata.get("vocab_size")
    if vocab_size is not None and not _is_count(vocab_size):
        raise IntegrityError(f"vocab_size in {path}", f"{vocab_size!r} is not a count")
    shards = metadata.get("shards")
    if shards is None:
        return
    if not isinstance(shards, list):
        raise IntegrityError(f"shards in {path}", f"a {type(shards).__name__}, not a list")
    for index, entry in enumerate(shards):
        _check_entry(f"shards[{index}] in {path}", entry)
    names = [entry["name"] for entry in shards]
    if len(set(names)) != len(names):
        raise IntegrityError(f"shards in {path}", "a name is listed twice", _PREPARE)


def _check_entry(where: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise IntegrityError(where, f"{entry!r:.80} is not an object")
    if not isinstance(entry.get("name"), str) or not _is_count(entry.get("tokens")):
        raise IntegrityError(where, f'{entry!r:.80} lacks a "name" or a count of "tokens"')
    if not isinstance(entry.get("xxh3_128", ""), str):
        raise IntegrityError(where, f"xxh3_128 {entry['xxh3_128']!r:.80} is not a string")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _recorded_shards(metadata: dict[str, Any], split: Split) -> dict[str, dict[str, Any]] | None:
    if metadata.get("shards") is None:
        return None
    prefix = f"{split}/"
    return {
        entry["name"][len(prefix) :]: entry
        for entry in metadata["shards"]
        if entry["name"].startswith(prefix)
    }


def _check_listing(
    dataset_dir: Path, split: Split, paths: list[Path], recorded: dict[str, dict[str, Any]]
) -> None:
    """Refuse a directory and a shard list that differ: both ways the training data would change."""
    present = {path.name for path in paths}
    missing = sorted(recorded.keys() - present)
    if missing:
        raise IntegrityError(
            f"{split} split of {dataset_dir}",
            f"{len(missing)} shard(s) that {METADATA} lists are missing: {_few(missing)}",
            f"copy the files again or {_PREPARE}",
        )
    extra = sorted(present - recorded.keys())
    if extra:
        raise IntegrityError(
            f"{split} split of {dataset_dir}",
            f"{len(extra)} shard(s) that {METADATA} does not list: {_few(extra)}",
            f'move them away, or remove "shards" from {METADATA} to read every *.bin',
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_width(shard: Shard, vocab_size: int | None) -> None:
    """Refuse a shard whose first tokens say that it was written with the other width.

    uint32 read as uint16 is silent otherwise: every second token is 0. uint16 read as uint32 gives
    two tokens glued together, far above any vocabulary.
    """
    import numpy as np

    with shard.path.open("rb") as file:
        file.seek(shard.offset)
        raw = file.read(min(_SAMPLE_BYTES, shard.n_tokens * shard.width))
    words = np.frombuffer(raw, dtype=f"<u{shard.width}")
    if len(words) < _MIN_SAMPLE_WORDS:
        return
    if shard.width == 2:
        looks_wrong = not words[1::2].any() and bool(words[::2].any())
    else:
        limit = max(vocab_size, 1 << 16) if vocab_size else 1 << 20
        looks_wrong = bool((words >= limit).mean() > 0.5)
    if looks_wrong:
        declared, likely = (f"uint{8 * width}" for width in (shard.width, 6 - shard.width))
        raise IntegrityError(
            f"shard {shard.path}",
            f"declared {declared}, but its tokens look like {likely}",
            f'set "dtype": "{likely}" in {METADATA}, or {_PREPARE}',
        )
