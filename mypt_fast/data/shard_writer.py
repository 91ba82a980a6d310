"""Write a dataset directory: token shards filled to the brim, hashed as they grow, published whole.

Nothing appears under the final name until every byte is on the disk: shards and JSON are written
into a hidden sibling directory, which is renamed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mypt_fast.errors import DataError

METADATA_NAME = "dataset_metadata.json"
STATE_NAME = "tokenizer_state.json"
DTYPE = np.dtype("<u4")
_COPY_TOKENS = 1 << 20

Tokens = npt.NDArray[np.uint32]


class SplitWriter:
    """The shards of one split, each of exactly `tokens_per_shard` tokens but the last."""

    def __init__(self, folder: Path, tokens_per_shard: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.tokens = 0
        self.documents = 0
        self.max_token = -1
        self.shards: list[dict[str, Any]] = []
        # Where documents begin, 8 bytes each: in a nameless file, not in memory.
        self._starts = tempfile.TemporaryFile(dir=folder.parent)  # noqa: SIM115 - see abandon
        self._per_shard = tokens_per_shard
        self._file: BinaryIO | None = None

    def append(self, tokens: Tokens, starts: Sequence[int] = ()) -> None:
        """Write tokens, opening the next shard whenever one is full.

        Args:
            tokens: what to write.
            starts: the positions in `tokens` at which a document begins.
        """
        if starts:
            self._starts.write((np.array(starts, dtype="<u8") + np.uint64(self.tokens)).data)
            self.documents += len(starts)
        if len(tokens):
            self.max_token = max(self.max_token, int(tokens.max()))
        start = 0
        while start < len(tokens):
            if self._file is None:
                self._open()
            room = self._per_shard - self.shards[-1]["tokens"]
            part = np.ascontiguousarray(tokens[start : start + room], dtype=DTYPE)
            assert self._file is not None
            self._file.write(part.data)
            self._hash.update(part.data)
            self.shards[-1]["tokens"] += len(part)
            self.tokens += len(part)
            start += len(part)
            if self.shards[-1]["tokens"] == self._per_shard:
                self.close()

    def _open(self) -> None:
        import xxhash

        name = f"shard_{len(self.shards):05d}.bin"
        self._file = (self.folder / name).open("wb")
        self._hash = xxhash.xxh3_128()
        self.shards.append({"name": f"{self.folder.name}/{name}", "tokens": 0})

    def close(self) -> None:
        """Finish the open shard: flush it to the disk and note its hash."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self.shards[-1]["xxh3_128"] = self._hash.hexdigest()

    def abandon(self) -> None:
        """Let go of every file without caring whether it could be written."""
        for file in (self._file, self._starts):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._file = None

    def document_starts(self) -> npt.NDArray[np.uint64]:
        """Return the position of each document's first token, ascending, without loading them."""
        self._starts.flush()
        if not self.documents:
            return np.zeros(0, dtype="<u8")
        return np.memmap(self._starts, dtype="<u8", mode="r")

    def move_tail(self, count: int, target: SplitWriter) -> None:
        """Move the last `count` tokens to the end of `target`; both are closed afterwards."""
        self.close()
        keep = self.tokens - count
        for tokens in self._read_from(keep):
            target.append(tokens)
        target.close()
        moved = self.documents - int(np.searchsorted(self.document_starts(), keep))
        self.documents -= moved
        target.documents += moved
        self._truncate(keep)

    def _read_from(self, position: int) -> Iterator[Tokens]:
        begin = 0
        for shard in self.shards:
            end = begin + shard["tokens"]
            at = max(position, begin)
            while at < end:
                size = min(_COPY_TOKENS, end - at)
                path = self.folder / Path(shard["name"]).name
                yield np.fromfile(path, DTYPE, size, offset=(at - begin) * DTYPE.itemsize)
                at += size
            begin = end

    def _truncate(self, keep: int) -> None:
        import xxhash

        # max_token is left as it is: still an upper bound of what the split holds.
        self.tokens = keep
        while self.shards and keep <= (before := sum(s["tokens"] for s in self.shards[:-1])):
            (self.folder / Path(self.shards.pop()["name"]).name).unlink()
            if keep == before:
                return
        last = self.shards[-1]
        last["tokens"] = keep - sum(s["tokens"] for s in self.shards[:-1])
        digest = xxhash.xxh3_128()
        with (self.folder / Path(last["name"]).name).open("r+b") as file:
            file.truncate(last["tokens"] * DTYPE.itemsize)
            while data := file.read(_COPY_TOKENS):
                digest.update(data)
            os.fsync(file.fileno())
        last["xxh3_128"] = digest.hexdigest()


def balance(train: SplitWriter, val: SplitWriter, val_fraction: float) -> str:
    """Move a tail between the splits where chance left validation too small or too large.

    Returns:
        The rule by which the split came about, in words.
    """
    total = train.tokens + val.tokens
    low = max(1, int(total * val_fraction / 2))
    high = min(total - 1, int(total * min(2 * val_fraction, (1 + val_fraction) / 2)))
    if low <= val.tokens <= high:
        return "by document"
    wanted = min(max(round(total * val_fraction), 1), total - 1)
    if val.tokens < low:
        source, target, count = train, val, wanted - val.tokens
        fewest, most = low - val.tokens, high - val.tokens
    else:
        source, target, count = val, train, val.tokens - wanted
        fewest, most = val.tokens - high, val.tokens - low
    starts = source.document_starts()
    # A view of the starts that would leave the share acceptable.
    fitting = starts[
        np.searchsorted(starts, source.tokens - most) : np.searchsorted(
            starts, source.tokens - fewest, side="right"
        )
    ]
    if len(fitting):
        at = min(int(np.searchsorted(fitting, source.tokens - count)), len(fitting) - 1)
        count = source.tokens - int(fitting[at])
    source.move_tail(count, target)
    return "by document, then a tail of whole ones" if len(fitting) else "by document, then a tail"


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is complete or absent: a temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a dataset this program wrote, None for anything else."""
    try:
        value = json.loads((folder / METADATA_NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("format") == "mypt" else None


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
    metadata = read_metadata(folder)
    if metadata is None:
        raise DataError(f"--out_dir {folder}", f"is not empty and no dataset of ours ({names[0]})")
    for path in folder.rglob("*"):
        if not re.fullmatch(
            r"(train|val)(/shard_\d+\.bin)?|tokenizer_state\.json|dataset_metadata\.json",
            path.relative_to(folder).as_posix(),
        ):
            raise DataError(f"--out_dir {folder}", f"holds {path.name}, no part of a dataset", cure)
    return metadata


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Yield a sibling directory to fill; rename it to `target` on success, else remove it."""
    mark = f".{target.name}.preparing-{socket.gethostname()}-"
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target, mark)
    folder = target.with_name(f"{mark}{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    for path in (folder / "train", folder / "val", folder):
        _sync_directory(path)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(replaced, target)
            raise
    else:
        os.rename(folder, target)
    _sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(target: Path, mark: str) -> None:
    """Remove what a killed run on this machine left behind, and undo a half-done replacement."""
    replaced = target.with_name(f".{target.name}.replaced")
    if replaced.is_dir() and not target.exists():
        os.rename(replaced, target)
    for path in target.parent.iterdir():
        pid = path.name[len(mark) :]
        if path.name.startswith(mark) and pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
