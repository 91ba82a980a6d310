"""Text to a MyPT dataset: read, encode on all cores, write shards; memory does not grow with input.

How documents are split. The first 1 / `val_fraction` documents (text files, JSONL rows, all of
standard input) are training data. A later one goes to validation when the hash of its first 65,536
characters falls under `val_fraction`, so equal documents stay together. Hashing leaves the share to
chance: when validation holds under half or over twice `val_fraction` of the tokens, the end of one
stream moves to the other until the share is right, beginning at a document's start if one will do,
else inside a document: of a single document, the last tokens are validation. Neither split is ever
empty. The demo corpus is split by file.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mypt_fast.data.corpus import DEMO_NAME, Source, find_inputs, fingerprint, stdlib_sources
from mypt_fast.data.documents import BLOCK_CHARS, LineCleaning, Piece, Reader
from mypt_fast.data.shard_writer import (
    DTYPE,
    METADATA_NAME,
    STATE_NAME,
    SplitWriter,
    Tokens,
    balance,
    read_metadata,
    refuse_foreign,
    staging,
    write_json,
)
from mypt_fast.errors import DataError
from mypt_fast.tokenizer import Tokenizer

TOKENIZATIONS = ("gpt2", "char", "bpe")
# Called with (phase, bytes read so far in this phase, bytes in all or 0 where unknown).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareOptions:
    """What `mypt-fast prepare` takes; the fields are its flags."""

    out_dir: str | Path
    input_files: tuple[str, ...] = ()
    tokenization: str = "gpt2"
    tokens_per_shard: int = 10_000_000
    val_fraction: float = 0.1
    text_field: str = "text"
    no_eot: bool = False
    mypt_clean: bool = False
    no_normalize: bool = False
    no_filter: bool = False
    no_dedup: bool = False
    vocab_size: int = 8192
    demo: bool = False
    overwrite: bool = False
    workers: int | None = None


class _Encoded(NamedTuple):
    """One unit's tokens of one split, and where documents begin in them."""

    split: str
    tokens: Tokens
    starts: list[int]


def prepare(options: PrepareOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Build the dataset and return its metadata.

    Raises:
        DataError: an option, an input or the output directory cannot be used. Whatever was at
            `out_dir` before is untouched then.
    """
    _check_options(options)
    out_dir = Path(os.path.realpath(options.out_dir))
    sources = stdlib_sources() if options.demo else find_inputs(options.input_files)
    digest = fingerprint(sources)
    existing = refuse_foreign(out_dir)
    if existing is not None and not options.overwrite:
        _refuse_other(existing, out_dir, digest, sources)
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(staging(out_dir))
            sources = _made_rereadable(sources, options, stack, out_dir.parent)
            return _build(options, sources, digest, folder, progress or (lambda *_: None))
    except OSError as error:
        # Inputs report their own errors: what arrives here concerns the output.
        reason = error.strerror or str(error)
        cure = "choose another --out_dir or make room"
        raise DataError(f"--out_dir {options.out_dir}", reason, cure) from error


def ensure_demo_dataset(out_dir: Path, tokenization: str, progress: Progress | None = None) -> Path:
    """Return `out_dir` holding the demo corpus, built now unless it is already there and whole.

    With several processes, call it in one and let the others wait: two builders at a time would
    take each other's result away.

    Raises:
        DataError: `out_dir` holds something else, which is left alone.
    """
    options = PrepareOptions(out_dir, tokenization=tokenization, demo=True)
    metadata = read_metadata(out_dir)
    used = metadata.get("options") if metadata is not None else None
    if metadata is not None and used == _recorded(options):
        is_same = metadata.get("corpus_fingerprint") == fingerprint(stdlib_sources())
        if is_same and (out_dir / STATE_NAME).is_file() and _has_all_shards(out_dir, metadata):
            return out_dir
    # An older demo makes way; a dataset that someone prepared from text of their own does not.
    is_demo = isinstance(used, dict) and used.get("demo") is True
    prepare(replace(options, overwrite=is_demo), progress)
    return out_dir


def _recorded(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that decide what the tokens are."""
    used = asdict(options)
    for key in ("out_dir", "input_files", "overwrite", "workers"):
        del used[key]
    return used


def _has_all_shards(folder: Path, metadata: dict[str, Any]) -> bool:
    try:
        return all(
            (folder / shard["name"]).stat().st_size == shard["tokens"] * DTYPE.itemsize
            for shard in metadata["shards"]
        )
    except (OSError, KeyError, TypeError):
        return False


def _check_options(options: PrepareOptions) -> None:
    if options.tokenization not in TOKENIZATIONS:
        raise DataError(
            f"--tokenization {options.tokenization}", f"is none of {', '.join(TOKENIZATIONS)}"
        )
    if not 0 < options.val_fraction < 1:
        raise DataError(
            f"--val_fraction {options.val_fraction}",
            "is not between 0 and 1, both excluded",
            "training needs both splits; 0.1 is usual",
        )
    if options.tokens_per_shard < 1:
        raise DataError(f"--tokens_per_shard {options.tokens_per_shard}", "is less than 1")
    if options.workers is not None and options.workers < 1:
        raise DataError(f"--workers {options.workers}", "is less than 1")
    if options.demo and options.input_files:
        raise DataError("--demo", "is given together with inputs", "give one of the two")


def _refuse_other(
    existing: dict[str, Any], out_dir: Path, digest: str, sources: list[Source]
) -> None:
    is_once = any(source.once for source in sources)
    if is_once or existing.get("corpus_fingerprint") != digest:
        raise DataError(
            f"--out_dir {out_dir}",
            f"holds a dataset made from other inputs ({existing.get('input_files')!s:.120}), or "
            "they have changed since",
            "give --overwrite to replace it, or another --out_dir",
        )


def _made_rereadable(
    sources: list[Source], options: PrepareOptions, stack: ExitStack, near: Path
) -> list[Source]:
    """Copy pipes to files where the tokenizer needs to see all text before encoding any."""
    if options.tokenization == "gpt2" or not any(source.once for source in sources):
        return sources
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=near, prefix=".spool-")))
    result = []
    for n, source in enumerate(sources):
        if source.once:
            path = folder / str(n)
            with path.open("wb") as copy:
                if source.path is None:
                    shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
                else:
                    with source.path.open("rb") as pipe:
                        shutil.copyfileobj(pipe, copy, 1 << 20)
            source = replace(source, path=path, size=path.stat().st_size, once=False)
        result.append(source)
    return result


def _build(
    options: PrepareOptions,
    sources: list[Source],
    digest: str,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    reader = Reader(
        text_field=options.text_field,
        cleaning=LineCleaning(not options.no_normalize, not options.no_filter, not options.no_dedup)
        if options.mypt_clean
        else None,
        val_fraction=options.val_fraction,
    )
    tokenizer = _make_tokenizer(options, reader, sources, progress)
    _count_bytes(reader, sources, "encode", progress)
    writers = {
        split: SplitWriter(folder / split, options.tokens_per_shard) for split in ("train", "val")
    }
    try:
        _write_tokens(options, tokenizer, reader, sources, writers)
        rule = (
            "by file"
            if options.demo
            else balance(writers["train"], writers["val"], options.val_fraction)
        )
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    metadata = _metadata(options, tokenizer, reader, writers, sources)
    metadata.update(split_rule=rule, corpus_fingerprint=digest)
    write_json(folder / STATE_NAME, tokenizer.get_state())
    write_json(folder / METADATA_NAME, metadata)
    return metadata


def _count_bytes(reader: Reader, sources: list[Source], phase: str, progress: Progress) -> None:
    is_known = not any(source.once or source.is_gzip for source in sources)
    total = sum(source.size for source in sources) if is_known else 0
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total)

    reader.on_bytes = advance


def _make_tokenizer(
    options: PrepareOptions, reader: Reader, sources: list[Source], progress: Progress
) -> Tokenizer:
    if options.tokenization == "gpt2":
        return Tokenizer.gpt2()
    _count_bytes(reader, sources, "read vocabulary", progress)
    if options.tokenization == "bpe":
        texts = (piece.text for piece in reader.pieces(sources))
        return Tokenizer.train_bpe(texts, options.vocab_size)
    chars: set[str] = set()
    for piece in reader.pieces(sources):
        chars.update(piece.text)
    if not chars:
        raise _no_text(options)
    return Tokenizer.char(sorted(chars))


def _no_text(options: PrepareOptions) -> DataError:
    if options.mypt_clean:
        cure = "--mypt_clean drops lines under 20 characters or three spaces; try --no_filter"
    else:
        cure = "name inputs with more text"
    return DataError("the inputs", "hold fewer than two tokens of text", cure)


def _write_tokens(
    options: PrepareOptions,
    tokenizer: Tokenizer,
    reader: Reader,
    sources: list[Source],
    writers: dict[str, SplitWriter],
) -> None:
    workers = options.workers or _cores()
    eot = None if options.no_eot else tokenizer.eot_id

    def encode(unit: list[Piece]) -> list[_Encoded]:
        return _encode_unit(tokenizer, unit, eot, with_specials=options.mypt_clean)

    with closing(_in_order(encode, _units(reader.pieces(sources)), workers)) as results:
        for result in results:
            for split, tokens, starts in result:
                writers[split].append(tokens, starts)
    if sum(writer.tokens for writer in writers.values()) < 2:
        raise _no_text(options)


def _cores() -> int:
    # Not every system can tell which cores this process may use.
    known = getattr(os, "sched_getaffinity", None)
    return min(len(known(0)) if known else os.cpu_count() or 1, 32)


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group small documents, so that a thread gets enough to be worth its while."""
    unit: list[Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text)
        if size >= BLOCK_CHARS // 2:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _encode_unit(
    tokenizer: Tokenizer, unit: list[Piece], eot: int | None, with_specials: bool
) -> list[_Encoded]:
    end = None if eot is None else np.array([eot], dtype=np.uint32)
    parts: dict[str, list[Tokens]] = {}
    starts: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for piece in unit:
        if with_specials:
            # MyPT's pipeline encodes lines with its special tokens recognised.
            tokens = np.array(tokenizer.encode(piece.text), dtype=np.uint32)
        else:
            tokens = tokenizer.encode_to_numpy(piece.text)
        size = sizes.get(piece.split, 0)
        if piece.starts:
            starts.setdefault(piece.split, []).append(size)
        kept = parts.setdefault(piece.split, [])
        kept.append(tokens)
        size += len(tokens)
        if piece.ends and end is not None:
            kept.append(end)
            size += 1
        sizes[piece.split] = size
    return [_Encoded(s, np.concatenate(parts[s]), starts.get(s, [])) for s in parts]


def _in_order(
    work: Callable[[list[Piece]], list[_Encoded]], units: Iterable[list[Piece]], workers: int
) -> Generator[list[_Encoded], None, None]:
    """Map in threads (the tokenizers release the GIL), a bounded number of units in flight."""
    if workers == 1:
        yield from map(work, units)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    waiting: deque[Future[list[_Encoded]]] = deque()
    try:
        for unit in units:
            waiting.append(pool.submit(work, unit))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _metadata(
    options: PrepareOptions,
    tokenizer: Tokenizer,
    reader: Reader,
    writers: dict[str, SplitWriter],
    sources: list[Source],
) -> dict[str, Any]:
    train, val = writers["train"], writers["val"]
    return {
        "total_tokens": train.tokens + val.tokens,
        "total_shards": len(train.shards) + len(val.shards),
        "train_shards": len(train.shards),
        "val_shards": len(val.shards),
        "tokens_per_shard": options.tokens_per_shard,
        "tokenization": options.tokenization,
        "vocab_size": tokenizer.model_vocab_size,
        "input_files": [DEMO_NAME] if options.demo else list(options.input_files),
        "format": "mypt",
        "dtype": "uint32",
        "num_train_tokens": train.tokens,
        "num_val_tokens": val.tokens,
        "num_train_documents": train.documents,
        "num_val_documents": val.documents,
        "num_files": len(sources),
        "skipped_empty_documents": reader.skipped_empty,
        "skipped_undecodable_files": reader.skipped_undecodable,
        "max_token": max(train.max_token, val.max_token),
        "shards": [*train.shards, *val.shards],
        "options": _recorded(options),
    }
