"""`mypt-fast prepare --chat`: JSONL of conversations to an episode dataset, in two passes.

The first pass hashes the rows, to choose those of validation; the second serialises and writes
them. Memory holds one row, one packed row a split and 10 bytes a row of the input.
"""

from __future__ import annotations

import gzip
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mypt_fast import __version__
from mypt_fast.data.chat import DEFAULT_SYSTEM, BadRowError, ChatSerializer, parse_row
from mypt_fast.data.chat_files import EpisodeWriter
from mypt_fast.data.dataset_dir import METADATA_NAME, SPLITS, STATE_NAME
from mypt_fast.data.format import read_metadata
from mypt_fast.errors import DataError, MyptError
from mypt_fast.publish import restore, staged, sync_directory, write_json
from mypt_fast.tokenizer import Tokenizer

SCHEMA = "episode_indexed_sft_v1"
LINEAGE_NAME = "dataset_lineage.json"
OWNED = frozenset({METADATA_NAME, STATE_NAME, LINEAGE_NAME, *SPLITS})
_SHOWN = 3  # bad rows that are named one by one
_STEP = 1 << 20  # bytes between two reports of progress

Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class ChatOptions:
    """What `mypt-fast prepare --chat` takes.

    Attributes:
        out_dir: the dataset.
        chat: JSONL files, .gz too.
        val_fraction: share of the rows that validate; 0 makes no val split.
        pack_block_size: tokens of a packed row; None: one conversation a row.
        system_prompt: of conversations that bring none; "" for none.
        skip_bad_rows: leave out rows that are no conversations, rather than stop at the first.
        overwrite: replace an episode dataset.
    """

    out_dir: str | Path
    chat: tuple[str, ...]
    val_fraction: float = 0.1
    pack_block_size: int | None = None
    system_prompt: str = DEFAULT_SYSTEM
    skip_bad_rows: bool = False
    overwrite: bool = False


def prepare_chat(
    options: ChatOptions, progress: Progress | None = None, note: Note | None = None
) -> dict[str, Any]:
    """Build the dataset, which appears complete or not at all; returns its metadata.

    Raises:
        DataError: an option, a row or the output directory cannot be used. What was at `out_dir`
            before is untouched then.
    """
    _check(options)
    progress, note = progress or (lambda *_: None), note or (lambda _: None)
    paths = [_existing(name) for name in options.chat]
    out_dir = Path(os.path.realpath(options.out_dir))
    serializer = ChatSerializer(tokenizer := Tokenizer.gpt2(), options.system_prompt)
    hashes, is_good = _hashes(paths, serializer if options.skip_bad_rows else None, progress)
    is_val = np.zeros(len(hashes), dtype=bool)
    is_val[is_good] = _chosen(hashes[is_good], options.val_fraction)
    restore(out_dir)
    _refuse_foreign(out_dir, options.overwrite)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with staged(out_dir, OWNED) as folder:
            metadata = _build(options, paths, serializer, is_val, folder, progress, note)
            write_json(folder / STATE_NAME, tokenizer.get_state())
            write_json(folder / LINEAGE_NAME, _lineage(options, metadata))
            write_json(folder / METADATA_NAME, metadata)
        return metadata
    except OSError as error:
        reason = error.strerror or str(error)
        cure = "choose another --out_dir or make room"
        raise DataError(f"--out_dir {options.out_dir}", reason, cure) from error


def _check(options: ChatOptions) -> None:
    if not 0 <= options.val_fraction < 1:
        raise DataError("--val_fraction", f"{options.val_fraction}", "name a share from 0 to 1")
    if options.pack_block_size is not None and options.pack_block_size < 2:
        raise DataError("--pack_block_size", f"{options.pack_block_size}", "name 2 tokens or more")


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        found = "not a file" if path.exists() else "no such file"
        raise DataError(f"--chat {name}", found, "name a JSONL file; it is read twice")
    return path


def _refuse_foreign(out_dir: Path, overwrite: bool) -> None:
    """Replace nothing but an episode dataset of ours, and that one only where it was asked."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    try:
        is_ours = out_dir.is_dir() and read_metadata(out_dir).get("schema") == SCHEMA
    except MyptError:
        is_ours = False
    if not is_ours:
        found, cure = "is there, and no episode dataset", "choose another, or move it away yourself"
        raise DataError(f"--out_dir {out_dir}", found, cure)
    if not overwrite:
        raise DataError(f"--out_dir {out_dir}", "holds an episode dataset", "pass --overwrite")


def _opened(path: Path) -> IO[bytes]:
    try:
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        return path.open("rb")
    except OSError as error:
        raise DataError(f"--chat {path}", error.strerror or str(error)) from error


def _lines(paths: list[Path], phase: str, progress: Progress) -> Iterator[tuple[Path, int, bytes]]:
    """Lines that are not empty, with their numbers."""
    done, total = 0, sum(path.stat().st_size for path in paths)
    total = 0 if any(path.suffix.lower() == ".gz" for path in paths) else total
    shown = 0
    for path in paths:
        try:
            with _opened(path) as file:
                for number, line in enumerate(file, 1):
                    done += len(line)
                    if done - shown >= _STEP:
                        shown = done
                        progress(phase, done, total)
                    if line.strip():
                        yield path, number, line
        except (EOFError, OSError) as error:  # of gzip: cut short, or damaged
            raise DataError(f"--chat {path}", str(error), "copy the file again") from error
    progress(phase, done, total)


def _hashes(
    paths: list[Path], judge: ChatSerializer | None, progress: Progress
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Hash the rows, and say which are good: one that is left out must not be the one of a split.

    Without `judge` all count as good; the first that is not ends the second pass.
    """
    found, good = array("Q"), bytearray()
    for _, _, line in _lines(paths, "reading", progress):
        found.append(xxhash.xxh3_64_intdigest(line.strip()))
        good.append(judge is None or _is_good(judge, line))
    if not found:
        raise DataError(f"--chat {', '.join(map(str, paths))}", "no row", "name JSONL with rows")
    return np.array(found, dtype=np.uint64), np.array(good, dtype=bool)


def _is_good(judge: ChatSerializer, line: bytes) -> bool:
    try:
        judge.episode(parse_row(line))
    except BadRowError:
        return False
    return True


def _chosen(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """The rows of validation: those of the lowest hashes, so equal rows stay together."""
    none = np.zeros(len(hashes), dtype=bool)
    if fraction == 0 or len(hashes) < 2:
        return none
    count = min(len(hashes) - 1, max(1, round(len(hashes) * fraction)))
    order = np.argsort(hashes, kind="stable")
    together = hashes <= hashes[order[count - 1]]
    if not together.all():
        return np.asarray(together)
    none[order[:count]] = True  # one row many times: a split without data helps nobody
    return none


def _build(
    options: ChatOptions,
    paths: list[Path],
    serializer: ChatSerializer,
    is_val: NDArray[np.bool_],
    folder: Path,
    progress: Progress,
    note: Note,
) -> dict[str, Any]:
    names = SPLITS if is_val.any() else SPLITS[:1]
    bad: list[str] = []
    replays = 0
    with ExitStack() as stack:
        writers = {}
        for name in names:
            pack, pad = options.pack_block_size, serializer.eot_id
            writers[name] = EpisodeWriter(folder / name, pack, pad)
            stack.callback(writers[name].abandon)
        row = 0
        for path, number, line in _lines(paths, "writing", progress):
            if row == len(is_val):
                break
            try:
                parsed = parse_row(line)
                episode = serializer.episode(parsed)
            except BadRowError as error:
                bad.append(f"{path} line {number}: {error.what}")
                if not options.skip_bad_rows:
                    raise DataError(
                        f"{path} line {number}", error.what, "mend it, or pass --skip_bad_rows"
                    ) from None
            else:
                replays += bool(parsed.get("_replay"))
                writers["val" if is_val[row] else "train"].add(episode)
            row += 1
        if row != len(is_val):
            raise DataError(f"--chat {paths[0]}", "changed while it was read", "start again")
        digests = {name: writer.close() for name, writer in writers.items()}
    for line_ in bad[:_SHOWN]:
        note(f"left out: {line_}")
    if len(bad) > _SHOWN:
        note(f"left out: {len(bad) - _SHOWN} more rows")
    if not writers["train"].episodes:
        raise DataError("--chat", f"no row for training; {len(bad)} bad ones", "mend them")
    for name in writers:
        sync_directory(folder / name)
    return _metadata(options, writers, digests, len(bad), replays)


def _metadata(
    options: ChatOptions,
    writers: dict[str, EpisodeWriter],
    digests: dict[str, str],
    n_bad: int,
    replays: int,
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "format": "episodes",
        "dtype": "uint32",
        "tokenization": "gpt2",
        "version": __version__,
    }
    for name in SPLITS:
        writer = writers.get(name)
        out[f"num_{name}_episodes"] = writer.episodes if writer else 0
        out[f"num_{name}_tokens"] = writer.tokens if writer else 0
        out[f"num_{name}_conversations"] = writer.conversations if writer else 0
        out[f"num_{name}_learned_tokens"] = writer.learned if writer else 0
    return {
        **out,
        "num_replay_rows": replays,
        "num_bad_rows": n_bad,
        "num_cut_conversations": sum(writer.cut for writer in writers.values()),
        "packed": options.pack_block_size is not None,
        "pack_block_size": options.pack_block_size,
        "val_fraction": options.val_fraction,
        "system_prompt": options.system_prompt,
        "shards": [
            {"name": f"{name}/tokens.bin", "tokens": w.tokens, "xxh3_128": digests[name]}
            for name, w in writers.items()
        ],
    }


def _lineage(options: ChatOptions, metadata: dict[str, Any]) -> dict[str, Any]:
    """A leaf record (specification 8.4): the files named are where the rows come from."""
    total = sum(metadata[f"num_{name}_conversations"] for name in SPLITS)
    origins = ", ".join(map(str, options.chat))
    return {
        "lineage": {
            "direct_inputs": [
                {"path": origins, "sampled_rows": total, "effective_ratio": 1.0},
            ],
            "recursive_origins": [
                {"origin_path": origins, "rows": total, "notes": "no lineage metadata was read"}
            ],
            "flattened_contributions": [
                {"origin_path": origins, "effective_rows": total, "effective_percent": 100.0}
            ],
            "creation_context": {
                "timestamp": datetime.now(timezone.utc).isoformat(),
                "script": "mypt-fast prepare --chat",
                "args": {
                    "chat": list(options.chat),
                    "val_fraction": options.val_fraction,
                    "pack_block_size": options.pack_block_size,
                    "system_prompt": options.system_prompt,
                },
            },
            "upstream_configs": [],
        }
    }
