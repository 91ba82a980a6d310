"""dataset_metadata.json: read with a limit, and believed only where it is well formed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from mypt_fast.data.format.files import opened, read_at
from mypt_fast.data.format.shard import WIDTHS, Split
from mypt_fast.errors import IntegrityError

METADATA = "dataset_metadata.json"
FORMATS = ("mypt", "episodes", "native", "nanogpt", "llmc", "megatron")
PREPARE = "prepare the dataset again"

_METADATA_LIMIT = 16 << 20  # bytes; 100,000 shards with their hashes stay below it
_WORDS: dict[Split, set[str]] = {"train": {"train"}, "val": {"val", "valid", "validation"}}
_NUMBERS = re.compile(r"([0-9]+)")


def read_metadata(dataset_dir: Path) -> dict[str, Any]:
    """Return the checked dataset_metadata.json, or {} where there is none."""
    path = Path(dataset_dir) / METADATA
    if not os.path.exists(path):  # which is false, no error, in a folder that may not be read
        return {}
    with opened(path, "metadata") as (descriptor, size):
        if size > _METADATA_LIMIT:
            raise IntegrityError(str(path), f"more than {_METADATA_LIMIT} bytes", PREPARE)
        raw = read_at(descriptor, size, 0, path)
    try:
        metadata = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(str(path), f"not JSON: {error}", PREPARE) from error
    if not isinstance(metadata, dict):
        raise IntegrityError(str(path), f"a JSON {type(metadata).__name__}, not an object")
    _check_metadata(path, metadata)
    return metadata


def _check_metadata(path: Path, metadata: dict[str, Any]) -> None:
    dtype = metadata.get("dtype", "uint32")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise IntegrityError(f"dtype in {path}", f"{dtype!r:.80}", f"use {' or '.join(WIDTHS)}")
    name = metadata.get("format", "mypt")
    if not isinstance(name, str) or name not in FORMATS:
        raise IntegrityError(f"format in {path}", f"{name!r:.80}", f"use {', '.join(FORMATS)}")
    vocab_size = metadata.get("vocab_size")
    if vocab_size is not None and not _is_count(vocab_size):
        raise IntegrityError(f"vocab_size in {path}", f"{vocab_size!r:.80} is not a count")
    shards = metadata.get("shards")
    if shards is None:
        return
    if not isinstance(shards, list):
        raise IntegrityError(f"shards in {path}", f"a {type(shards).__name__}, not a list")
    for index, entry in enumerate(shards):
        _check_entry(f"shards[{index}] in {path}", entry)
    names = [entry["name"] for entry in shards]
    if len(set(names)) != len(names):
        raise IntegrityError(f"shards in {path}", "a name is listed twice", PREPARE)


def _check_entry(where: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise IntegrityError(where, f"{entry!r:.80} is not an object")
    if not isinstance(entry.get("name"), str) or not _is_count(entry.get("tokens")):
        raise IntegrityError(where, f'{entry!r:.80} lacks a "name" or a count of "tokens"')
    if not isinstance(entry.get("continues", False), bool):
        raise IntegrityError(where, f"continues {entry['continues']!r:.80} is not true or false")
    digest = entry.get("xxh3_128", "")
    if not isinstance(digest, str) or not digest.isascii():
        raise IntegrityError(where, f"xxh3_128 {digest!r:.80} is no hash")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def recorded_shards(metadata: dict[str, Any], split: Split) -> dict[str, dict[str, Any]] | None:
    """What the metadata lists of one split, by name within the dataset, in its order.

    Returns:
        None where it lists nothing at all.
    """
    if metadata.get("shards") is None:
        return None
    return {e["name"]: e for e in metadata["shards"] if splits_of(e["name"]) == [split]}


def splits_of(name: str) -> list[Split]:
    """The splits that the name of a shard within the dataset names: one, none or both."""
    folder, slash, _ = name.partition("/")
    if slash:
        return [split for split in _WORDS if split == folder]
    words = set(re.split(r"[^a-z]+", name.lower()))
    return [split for split, known in _WORDS.items() if words & known]


def natural_order(name: str) -> tuple[list[Any], str]:
    """A key to sort by: numbers by their value, so that shard_99999 comes before shard_100000."""
    parts: list[Any] = _NUMBERS.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def is_numbered(names: list[str]) -> bool:
    """Whether sorted names of *.bin differ in one number of one width: so they are in order.

    Of 10,000 names it takes a tenth of the time of their natural order.
    """
    if not names:
        return True
    begin = len(os.path.commonprefix([names[0], names[-1]]))  # noqa: RUF071 - letters are meant
    end = len(names[0]) - len(".bin")
    numbers = "".join([name[begin:end] for name in names])
    is_one_width = len({len(name) for name in names}) == 1
    return is_one_width and numbers.isascii() and (numbers.isdigit() or len(names) == 1)


def is_declared(metadata: dict[str, Any], split: Split) -> bool:
    """Whether the metadata says that the split holds something."""
    return bool(recorded_shards(metadata, split)) or any(_declared(metadata, split))


def _declared(metadata: dict[str, Any], split: Split) -> tuple[int | None, int | None]:
    """How many shards and tokens the metadata counts; None where it does not."""
    shards, tokens = metadata.get(f"{split}_shards"), metadata.get(f"num_{split}_tokens")
    return shards if _is_count(shards) else None, tokens if _is_count(tokens) else None


def check_counts(
    dataset_dir: Path, split: Split, n_shards: int, n_tokens: int, metadata: dict[str, Any]
) -> None:
    """Refuse a split of other sizes than the metadata counts."""
    for name, found, said in zip(
        ("shard(s)", "tokens"), (n_shards, n_tokens), _declared(metadata, split), strict=True
    ):
        if said is not None and found != said:
            raise IntegrityError(
                f"{split} split of {dataset_dir}",
                f"{found} {name}, where {METADATA} says {said}",
                f"copy the files again or {PREPARE}",
            )


def check_listing(
    dataset_dir: Path, split: Split, present: Set[str], recorded: dict[str, dict[str, Any]]
) -> None:
    """Refuse a directory and a shard list that differ: both ways the training data would change."""
    missing = sorted(recorded.keys() - present)
    if missing:
        raise IntegrityError(
            f"{split} split of {dataset_dir}",
            f"{len(missing)} shard(s) that {METADATA} lists are missing: {_few(missing)}",
            f"copy the files again or {PREPARE}",
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
