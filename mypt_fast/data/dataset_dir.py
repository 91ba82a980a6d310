"""The directory that `prepare` makes: its two JSON files, and when it may be replaced."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mypt_fast.data.format import METADATA, WIDTHS, native, read_metadata
from mypt_fast.data.format.files import opened, read_at
from mypt_fast.errors import DataError, MyptError

METADATA_NAME = METADATA
STATE_NAME = "tokenizer_state.json"
SPLITS = ("train", "val")
# In a published dataset only where the process died at that moment.
JOURNAL_NAME = "journal.jsonl"
OWNED = frozenset({METADATA_NAME, STATE_NAME, JOURNAL_NAME, *SPLITS})
_FORMATS = ("native", "mypt")


def own_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a dataset this program wrote, None for anything else."""
    try:
        metadata = read_metadata(folder)
    except (MyptError, OSError):
        return None
    return metadata if metadata.get("format") in _FORMATS else None


def has_all_shards(folder: Path, metadata: dict[str, Any]) -> bool:
    """Whether every shard is there and as long as it has to be; tokens are not read."""
    try:
        is_native = metadata["format"] == "native"
        width = WIDTHS[metadata["dtype"]]
        for shard in metadata["shards"]:
            path, n_tokens = folder / shard["name"], shard["tokens"]
            size = n_tokens * width
            if is_native:
                with opened(path) as (descriptor, found):
                    data = read_at(descriptor, min(found, native.HEADER_BYTES), 0, path)
                header = native.unpack_header(data)
                if (header.n_tokens, header.width) != (n_tokens, width):
                    return False
                size = native.layout(header).file_size
            if path.stat().st_size != size:
                return False
    except (MyptError, OSError, KeyError, TypeError, ValueError):
        return False
    return True


def refuse_foreign(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of the dataset in `folder`, None when there is nothing to lose.

    Raises:
        DataError: the name is taken by something that is not a dataset of ours.
    """
    cure = "choose another --out_dir, or move it away yourself"
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out_dir {folder}", "exists and is not a directory", cure)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"--out_dir {folder}", error.strerror or str(error), cure) from error
    if not names:
        return None
    metadata = own_metadata(folder)
    if metadata is None:
        raise DataError(f"--out_dir {folder}", f"is not empty and no dataset of ours ({names[0]})")
    for path in folder.rglob("*"):
        if not re.fullmatch(
            r"(train|val)(/shard_\d+\.bin)?|tokenizer_state\.json|dataset_metadata\.json|journal\.jsonl",
            path.relative_to(folder).as_posix(),
        ):
            raise DataError(f"--out_dir {folder}", f"holds {path.name}, no part of a dataset", cure)
    return metadata
