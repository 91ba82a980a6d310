"""Write a dataset again in another format: every byte is checked first, nothing is lost silently.

native, mypt, episodes and llmc keep one file (or folder) a shard; nanogpt and megatron have one a
split. The new dataset appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mypt_fast import publish
from mypt_fast.data.format.episodes import EpisodeReader
from mypt_fast.data.format.metadata import METADATA
from mypt_fast.data.format.shard import WIDTHS, PlaneKind, Shard, Split, dataset_fingerprint
from mypt_fast.data.format.source import Source, open_source, read_blocks
from mypt_fast.data.format.tokenizer_file import TOKENIZER, read_tokenizer
from mypt_fast.data.format.verify import verify_source
from mypt_fast.data.format.writers import EpisodeWriter, FlatWriter, MegatronWriter, NativeWriter
from mypt_fast.errors import DataError, TokenRangeError
from mypt_fast.tokenizer import Tokenizer

CARRIES: dict[str, frozenset[str]] = {
    "native": frozenset({"documents", "mask", "segments"}),
    "mypt": frozenset(),
    "episodes": frozenset({"documents", "mask", "weights", "segments"}),
    "nanogpt": frozenset(),
    "llmc": frozenset(),
    "megatron": frozenset({"documents"}),
}
_SINGLE = ("nanogpt", "megatron")  # one file a split
# What the metadata says of files that are not written, or of a `prepare` that did not write these.
_REPLACED = (
    "format", "dtype", "schema", "shards", "total_tokens", "total_shards", "tokens_per_shard",
    "options", "corpus_fingerprint", "converted_from",
)  # fmt: skip


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        out: the new dataset.
        width: bytes a token.
        tokens: of all splits.
        seconds: reading twice and writing once.
        notes: one line each, for people.
    """

    out: Path
    width: int
    tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def convert(
    path: Path,
    out: Path,
    target: str,
    *,
    dtype: str | None = None,
    input_dtype: str | None = None,
    lossy: bool = False,
    workers: int | None = None,
    tokenization: str | None = None,
) -> Conversion:
    """Convert a dataset or a file.

    Args:
        path: what to read; see `open_source`.
        out: the new folder, which does not exist or is empty.
        target: a key of CARRIES.
        dtype: "uint16" or "uint32"; by default the narrower that holds the vocabulary, and
            uint32 for MyPT's own formats.
        input_dtype: of a file that has no magic number.
        lossy: leave out what the target cannot carry, instead of refusing.
        workers: threads that check what is read.
        tokenization: "gpt2" says that the tokens are GPT-2's, of a dataset that does not.

    Raises:
        DataError: `out` is taken, something would be lost, or the dataset has a tokenizer already.
        IntegrityError: what is read is damaged.
        TokenRangeError: an id does not fit the width.
    """
    started = time.perf_counter()
    source = open_source(Path(path), input_dtype)
    _refuse_taken(source, Path(out))
    notes = _losses(source, target, lossy)
    state = read_tokenizer(source.path)
    if tokenization is not None and state is not None:
        where = f"--tokenization {tokenization} for {source.path}"
        raise DataError(where, f"it has a {TOKENIZER}, which is kept", "leave the flag out")
    largest = verify_source(source, workers=workers).max_token
    if tokenization is not None:
        state = _gpt2_state(source, largest)
    result = Conversion(Path(out), _width(source, target, dtype, largest), notes=notes)
    with publish.staged(result.out, frozenset()) as folder:
        metadata = _describe(source, target, result.width)
        for split, shards in source.splits.items():
            entries = list(_write_split(folder, split, shards, target, result.width))
            metadata["shards"] += entries
            count = sum(entry["tokens"] for entry in entries)
            metadata |= {f"num_{split}_tokens": count, f"{split}_shards": len(entries)}
            result.tokens += count
        metadata["total_tokens"] = result.tokens
        if state is not None:  # written anew: no bytes of whatever a link leads to are copied
            publish.write_json(folder / TOKENIZER, state)
        if tokenization is not None:
            metadata["tokenization"] = tokenization
        publish.write_json(folder / METADATA, metadata)
        for entry in os.scandir(folder):
            if entry.is_dir():
                publish.sync_directory(Path(entry.path))
    result.seconds = time.perf_counter() - started
    return result


def _refuse_taken(source: Source, out: Path) -> None:
    where = f"output {out}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(where, "exists and is not an empty folder", "choose another name")
    if not out.resolve().parent.is_dir():
        raise DataError(where, f"{out.parent} is no folder", "create it first")
    if source.path.is_dir() and source.path.resolve() in out.resolve().parents:
        raise DataError(where, "lies within what is read", "choose a place outside of it")


def _losses(source: Source, target: str, lossy: bool) -> list[str]:
    """Refuse to lose anything unless that was asked for; return what to tell."""
    held = {plane.kind for shard in source.shards for plane in shard.planes} | {
        "documents" for shard in source.shards if shard.documents
    }
    if any(_is_irregular(shard) for shard in source.shards):
        held.add("gaps and empty documents")
    lost = sorted(held - CARRIES[target])
    if lost and not lossy:
        able = " or ".join(name for name, carried in CARRIES.items() if held <= carried)
        raise DataError(
            f"--format {target} for {source.path}",
            f"cannot carry {' and '.join(lost)}",
            f"{f'choose --format {able}, or ' if able else ''}pass --lossy to leave them out",
        )
    notes = [f"left out, as {target} cannot carry them: {', '.join(lost)}"] if lost else []
    if target in ("episodes", "megatron") and "documents" not in held:
        notes.append("documents are not known: each shard is written as one")
    notes += [shard.notice for shard in source.shards if shard.notice]
    return notes


def _is_irregular(shard: Shard) -> bool:
    """Whether tokens lie between documents, or documents have none: ends alone do not tell that."""
    if shard.documents is None or shard.format == "native":
        return False
    reader = shard.documents.read
    if isinstance(reader, EpisodeReader) and int(reader.spans()[1].sum()) != shard.n_tokens:
        return True
    return len(shard.document_ends()) != shard.documents.count


def _width(source: Source, target: str, dtype: str | None, largest: int) -> int:
    if dtype is not None and target == "nanogpt" and dtype != "uint16":
        raise DataError(f"--dtype {dtype}", "nanoGPT reads uint16", "choose another --format")
    if dtype is not None:
        return WIDTHS[dtype]
    if target == "nanogpt":
        return 2
    if target in ("mypt", "episodes"):
        return 4  # what MyPT itself reads
    vocab_size = max(shard.vocab_size for shard in source.shards)
    return 2 if max(vocab_size, largest + 1) <= 1 << 16 else 4


def _describe(source: Source, target: str, width: int) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in source.metadata.items()
        if key not in _REPLACED and not key.endswith(("_shards", "_tokens", "_documents"))
    }
    vocab_size = max(shard.vocab_size for shard in source.shards)
    if vocab_size:
        kept["vocab_size"] = vocab_size
    if target == "episodes":
        kept["schema"] = "episode_indexed_sft_v1"
    kept["converted_from"] = {
        "format": source.shards[0].format,
        **{split: dataset_fingerprint(shards) for split, shards in source.splits.items()},
    }
    return {"format": target, "dtype": f"uint{8 * width}", **kept, "shards": []}


def _write_split(
    folder: Path, split: Split, shards: list[Shard], target: str, width: int
) -> Iterator[dict[str, Any]]:
    """Write one split; yield an entry of the metadata's "shards" for each file."""
    groups = [shards] if target in _SINGLE else [[shard] for shard in shards]
    for index, group in enumerate(groups):
        with contextlib.ExitStack() as stack:
            writer = _writer(folder, split, index, group[0], target, width)
            stack.callback(writer.abandon)
            continued = {shard.continues for shard in group}
            for shard in group:
                goes_on = shard.documents is not None and shard.path in continued
                for block in read_blocks(shard, goes_on):
                    writer.append(block)
                if isinstance(writer, MegatronWriter) and not goes_on:
                    writer.end_shard()
            writer.finish()
        entry = {
            "name": writer.path.relative_to(folder).as_posix(),
            "tokens": writer.n_tokens,
            "xxh3_128": writer.hash.hexdigest(),
        }
        yield entry | ({"continues": True} if group[0].continues else {})


def _writer(
    folder: Path, split: Split, index: int, shard: Shard, target: str, width: int
) -> FlatWriter:
    kinds: tuple[PlaneKind, ...] = tuple(
        plane.kind for plane in shard.planes if plane.kind in CARRIES[target]
    )
    if target == "nanogpt":
        return FlatWriter(folder / f"{split}.bin", width)
    if target == "megatron":
        return MegatronWriter(folder / f"{split}.bin", width)
    if target == "llmc":
        return FlatWriter(folder / f"{split}_{index:06d}.bin", width, llmc_tokens=shard.n_tokens)
    if target == "episodes":
        return EpisodeWriter(folder / split / f"shard_{index:05d}", width, kinds)
    (folder / split).mkdir(exist_ok=True)
    path = folder / split / f"shard_{index:05d}.bin"
    if target == "mypt":
        return FlatWriter(path, width)
    return NativeWriter(
        path, width, vocab_size=shard.vocab_size, eot_id=shard.eot_id, tokenizer=shard.tokenizer,
        planes=kinds,
    )  # fmt: skip


def _gpt2_state(source: Source, largest: int) -> dict[str, Any]:
    """The state of GPT-2's tokenizer, for tokens that may be its own."""
    tokenizer = Tokenizer.gpt2()
    if largest >= tokenizer.n_tokens:
        raise TokenRangeError(
            f"--tokenization gpt2 for {source.path}",
            f"it holds token {largest}, GPT-2 has {tokenizer.n_tokens}",
            f"copy the {TOKENIZER} that belongs to it there",
        )
    return tokenizer.get_state()
