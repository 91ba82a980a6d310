"""Find out what a folder holds, and open one split of it.

    <dir>/train/*.bin  <dir>/val/*.bin        MyPT's streams of tokens, native shards, llm.c's
                                              files, Megatron's pairs
    <dir>/train/episodes.idx or shard_*/      MyPT's episodes
    <dir>/train.bin  <dir>/val.bin            nanoGPT, where no dataset_metadata.json is beside them
    <dir>/*train*.bin  <dir>/*val*.bin        files with a header: native, llm.c, Megatron

Nothing is guessed: a format is the metadata's "format", a magic number, or one of these layouts;
without a "dtype" MyPT's tokens are uint32, as MyPT writes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mypt_fast.data.format import megatron, native, native_file, raw
from mypt_fast.data.format.episodes import TOKENS, find_folders, open_episodes
from mypt_fast.data.format.files import FileEnds, opened, read_at, read_ends
from mypt_fast.data.format.metadata import (
    METADATA,
    check_counts,
    check_listing,
    is_declared,
    is_numbered,
    natural_order,
    read_metadata,
    recorded_shards,
    splits_of,
)
from mypt_fast.data.format.shard import WIDTHS, Shard, Split
from mypt_fast.errors import DataError, FormatError, TruncatedShardError


@dataclass(frozen=True)
class Place:
    """Where the shards of a split are.

    Attributes:
        format: as `Shard.format`.
        paths: files of tokens, or folders of episodes, in reading order.
        flat: whether they lie in the dataset's own folder.
        explicit: whether the metadata names the format.
        notice: one line about what was found.
    """

    format: str
    paths: list[Path]
    flat: bool = False
    explicit: bool = False
    notice: str = ""


def has_split(dataset_dir: Path, split: Split, metadata: dict[str, Any] | None = None) -> bool:
    """Say whether the dataset has at least one shard of this split; as `open_split`."""
    dataset_dir = Path(dataset_dir)
    if metadata is None:
        metadata = read_metadata(dataset_dir)
    return bool(_locate(dataset_dir, split, metadata).paths)


def open_split(
    dataset_dir: Path,
    split: Split,
    *,
    int64: bool = False,
    metadata: dict[str, Any] | None = None,
) -> list[Shard]:
    """Return the shards of one split in reading order, each checked.

    Args:
        dataset_dir: the folder.
        split: "train" or "val".
        int64: also open files of 8 bytes a token, which no loader reads.
        metadata: the dataset's, where the caller has read it already.

    Raises:
        DataError: the directory or its shards are missing or cannot be read.
        IntegrityError: a file is not what its size, its header or the metadata says.
    """
    dataset_dir = Path(dataset_dir)
    if not dataset_dir.is_dir():
        raise DataError(
            f"dataset {dataset_dir}",
            "is a file" if dataset_dir.exists() else "no such directory",
            f"name a directory that holds {split}/*.bin",
        )
    if metadata is None:
        metadata = read_metadata(dataset_dir)
    place = _locate(dataset_dir, split, metadata)
    files = _named(place, split)
    recorded = recorded_shards(metadata, split)
    if place.format == "episodes" and recorded and not any(map(_is_of_episodes, recorded)):
        recorded = None  # another program's list, of something else than these files
    if recorded is not None:
        check_listing(dataset_dir, split, files.keys(), recorded)
        files = {name: files[name] for name in recorded}
    if not files and is_declared(metadata, split):
        check_counts(dataset_dir, split, 0, 0, metadata)
    if not files:
        raise DataError(
            f"{split} split of {dataset_dir}",
            f"no token shard; searched {dataset_dir / split}/*.bin (without *_mask.bin)",
            "prepare a dataset there or name another directory",
        )
    shards = _open_all(place, files, metadata, recorded or {}, int64)
    check_counts(dataset_dir, split, len(shards), sum(s.n_tokens for s in shards), metadata)
    if recorded:
        _join_documents(shards, recorded)
    if place.notice:
        shards[0] = replace(shards[0], notice=place.notice)
    if place.format in ("mypt", "episodes", "nanogpt"):
        for index in sorted({0, len(shards) // 2, len(shards) - 1}):
            raw.check_width(shards[index], metadata.get("vocab_size"))
    return shards


def open_file(path: Path, dtype: str | None = None) -> Shard:
    """Open one file of tokens by its magic number, or as plain tokens of a dtype that is named.

    Raises:
        DataError: it cannot be read, or has no magic number and no dtype is named.
        IntegrityError: it is not what its header says.
    """
    path = Path(path)
    format = magic_of(path)
    if format == "native":
        return native_file.open_native(path, path.name)[0]
    if format == "megatron":
        return megatron.open_megatron(path, path.name, int64=True)
    if format == "llmc":
        return raw.open_llmc(path, path.name)
    if dtype is None:
        with opened(path) as (descriptor, size):
            head = read_at(descriptor, min(8, size), 0, path)
        raise FormatError(
            f"shard {path}",
            f"no format's magic number: it begins with {head.hex() or 'nothing'}",
            "name its --input_dtype, uint16 or uint32, where it is nothing but tokens",
        )
    shard = raw.open_stream(
        path, WIDTHS[dtype], format="nanogpt", label=path.name, cure=raw.IN_FLAG
    )
    raw.check_width(shard, None, raw.IN_FLAG)
    return shard


def magic_of(path: Path) -> str:
    """The format that a file's first bytes, or an index beside it, name; "" where none does."""
    if path.with_suffix(".idx").exists():
        return "megatron"
    with opened(path) as (descriptor, size):
        head = read_at(descriptor, min(8, size), 0, path)
        if head == native.MAGIC:
            return "native"
        begin = max(0, size - native.FOOTER_BYTES)
        tail = read_at(descriptor, size - begin, begin, path)
    if tail.startswith(native.FOOTER_MAGIC):
        return "native"  # whose first bytes were damaged: its reader says so
    return "llmc" if int.from_bytes(head[:4], "little") in raw.LLMC_MAGICS else ""


def _locate(dataset_dir: Path, split: Split, metadata: dict[str, Any]) -> Place:
    split_dir = dataset_dir / split
    declared = metadata.get("format", "")
    names = _names(split_dir)
    if names is None:
        return _locate_flat(dataset_dir, split, declared, bool(metadata))
    if declared in ("", "mypt", "episodes"):
        found = find_folders(split_dir, names)
        if found is not None:
            return Place("episodes", found.paths, notice=found.notice)
    # iterdir, because `split_dir / name` parses: of 10,000 files a third of the time to open them
    paths = [path for path in split_dir.iterdir() if _is_tokens(path.name)]
    if is_numbered([name for name in names if _is_tokens(name)]):
        paths.sort(key=lambda path: path.name)
    else:
        paths.sort(key=lambda path: natural_order(path.name))
    masks = sum(name.endswith("_mask.bin") for name in names)
    notice = f"not read: {masks} *_mask.bin in {split}/" if masks else ""
    if declared:
        return Place(declared, paths, explicit=True, notice=notice)
    return Place((paths and magic_of(paths[0])) or "mypt", paths, notice=notice)


def _locate_flat(dataset_dir: Path, split: Split, declared: str, described: bool) -> Place:
    """Find a split that has no folder of its own, in a dataset of which none has one."""
    other = dataset_dir / ("val" if split == "train" else "train")
    names = _names(dataset_dir)
    if names is None or other.is_dir() or declared in ("mypt", "episodes"):
        return Place("mypt", [])
    exact = [dataset_dir / f"{split}.bin"] if f"{split}.bin" in names else []
    named = exact or [
        dataset_dir / name
        for name in sorted(names, key=natural_order)
        if _is_tokens(name) and split in splits_of(name)
    ]
    if both := [path.name for path in named if len(splits_of(path.name)) > 1]:
        raise FormatError(
            f"{split} split of {dataset_dir}",
            f"{both[0]} names both splits: its tokens would be trained and validated on",
            "rename it, or move it to train/ or val/",
        )
    if declared or not named:
        return Place(declared or "mypt", named, flat=True, explicit=bool(declared))
    if found := magic_of(named[0]):
        return Place(found, named, flat=True)
    if exact and {"train.bin", "val.bin"} <= set(names) and not described:
        return Place("nanogpt", exact, flat=True)
    raise FormatError(
        f"{split} split of {dataset_dir}",
        f"{named[0].name} has no format's magic number, and the folder is not nanoGPT's "
        f"(train.bin and val.bin, no {METADATA})",
        f'say "format" in {METADATA}, or move it to {split}/',
    )


def _names(folder: Path) -> list[str] | None:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(str(folder), f"cannot be listed: {error.strerror}") from error


def _is_tokens(name: str) -> bool:
    """Whether a file is a shard; what is hidden is an editor's or a file system's, not data."""
    return name.endswith(".bin") and not name.endswith("_mask.bin") and not name.startswith(".")


def _is_of_episodes(name: str) -> bool:
    return name.endswith(f"/{TOKENS}")


def _named(place: Place, split: Split) -> dict[str, Path]:
    """The files of tokens by their names within the dataset, in reading order."""
    if place.format == "episodes":
        top = f"{split}/"
        return {
            (top if path.name == split else f"{top}{path.name}/") + TOKENS: path
            for path in place.paths
        }
    prefix = "" if place.flat else f"{split}/"
    return {prefix + path.name: path for path in place.paths}


def _open_all(
    place: Place,
    files: dict[str, Path],
    metadata: dict[str, Any],
    recorded: dict[str, dict[str, Any]],
    int64: bool,
) -> list[Shard]:
    width = WIDTHS[metadata.get("dtype", "uint16" if place.format == "nanogpt" else "uint32")]
    vocab_size = metadata.get("vocab_size") or 0
    if place.format == "native":
        return _open_natives(files, recorded)
    shards = []
    for label, path in files.items():
        if place.format == "episodes":
            shard = open_episodes(path, width, label, vocab_size=vocab_size)
        elif place.format == "llmc":
            shard = replace(raw.open_llmc(path, label), vocab_size=vocab_size)
        elif place.format == "megatron":
            shard = megatron.open_megatron(path, label, int64=int64)
            shard = replace(shard, vocab_size=vocab_size)
        else:
            shard = raw.open_stream(
                path, width, format=place.format, label=label, vocab_size=vocab_size,
                recorded=recorded.get(label), explicit=place.explicit,
            )  # fmt: skip
        _check_recorded(shard, recorded)
        shards.append(shard)
    return shards


def _open_natives(files: dict[str, Path], recorded: dict[str, dict[str, Any]]) -> list[Shard]:
    """Open native shards; the tables of the first ones are hashed, as many as take little time."""
    shards, budget = [], native_file.TABLES_AT_OPEN
    is_sampled = len(files) <= native_file.SAMPLED_SHARDS
    ahead: AbstractContextManager[Iterator[FileEnds | None]] = (
        nullcontext(iter([None] * len(files)))
        if is_sampled
        else read_ends(list(files.values()), native.HEADER_BYTES, native_file.TAIL_BYTES)
    )
    with ahead as ends:
        for (name, path), both in zip(files.items(), ends, strict=True):
            digest = recorded[name].get("xxh3_128", "") if recorded else ""
            shard, read = native_file.open_native(path, name, budget, digest, is_sampled, both)
            if recorded and recorded[name]["tokens"] != shard.n_tokens:
                _check_recorded(shard, recorded)
            budget -= read
            shards.append(shard)
    return shards


def _join_documents(shards: list[Shard], recorded: dict[str, dict[str, Any]]) -> None:
    """Note which shards begin within the last document of the one before them."""
    before: Shard | None = None
    for index, shard in enumerate(shards):
        if before and shard.n_tokens and recorded[shard.name].get("continues"):
            shards[index] = replace(shard, continues=before.path)
        before = shard if shard.n_tokens else before


def _check_recorded(shard: Shard, recorded: dict[str, dict[str, Any]]) -> None:
    entry = recorded.get(shard.name)
    if entry is not None and entry["tokens"] != shard.n_tokens:
        raise TruncatedShardError(
            f"shard {shard.path}",
            f"{shard.n_tokens} tokens, where {METADATA} says {entry['tokens']}",
            "copy the files again, or prepare the dataset again",
        )
