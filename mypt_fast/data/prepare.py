"""Text to a dataset: read, encode on all cores, write shards; memory does not grow with input.

How documents are split. The first 1 / `val_fraction` documents (text files, JSONL rows, all of
standard input) are training data. A later one goes to validation when the hash of its first 65,536
characters falls under `val_fraction`, so equal documents stay together. Hashing leaves the share to
chance: when validation holds under half or over twice `val_fraction` of the tokens, the end of one
stream moves to the other until the share is right, beginning at a document's start if one will do,
else inside a document: of a single document, the last tokens are validation. Neither split is ever
empty. The demo corpus is split by file.

A run that was killed goes on from its last checkpoint, which is written whenever a shard is full:
see `journal`. The dataset comes out byte for byte as if nothing had happened.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mypt_fast import __version__
from mypt_fast.data import fast_gpt2
from mypt_fast.data.build import Build, damaged_shard
from mypt_fast.data.corpus import DEMO_NAME, Source, find_inputs, fingerprint, stdlib_sources
from mypt_fast.data.dataset_dir import (
    METADATA_NAME,
    OWNED,
    SPLITS,
    STATE_NAME,
    has_all_shards,
    own_metadata,
    refuse_foreign,
)
from mypt_fast.data.documents import LineCleaning, Reader
from mypt_fast.data.encoding import Encoder, cores, in_order, units
from mypt_fast.data.journal import Journal, has_journal, last_checkpoint, run_key
from mypt_fast.data.shard_writer import FORMATS, ShardKind, balance, settle
from mypt_fast.errors import DataError
from mypt_fast.presets import read_json
from mypt_fast.publish import left_alone, restore, staged, sync_directory, write_json
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.tokenizer_state import state_digest

TOKENIZATIONS = ("gpt2", "char", "bpe")
# Called with (phase, bytes read so far in this phase, bytes in all or 0 where unknown).
Progress = Callable[[str, int, int], None]
# Called with a line that the user should see.
Note = Callable[[str], None]
_MAX_STATE_BYTES = 256 << 20


@dataclass(frozen=True)
class PrepareOptions:
    """What `mypt-fast prepare` takes; the fields are its flags."""

    out_dir: str | Path
    input_files: tuple[str, ...] = ()
    tokenization: str = "gpt2"
    format: str = "native"
    tokens_per_shard: int = 10_000_000
    val_fraction: float = 0.1
    text_field: str = "text"
    dedup: bool = False
    no_eot: bool = False
    mypt_clean: bool = False
    no_normalize: bool = False
    no_filter: bool = False
    no_dedup: bool = False
    vocab_size: int = 8192
    demo: bool = False
    overwrite: bool = False
    workers: int | None = None
    encoder: str = "auto"


def prepare(
    options: PrepareOptions, progress: Progress | None = None, note: Note | None = None
) -> dict[str, Any]:
    """Build the dataset and return its metadata.

    Raises:
        DataError: an option, an input or the output directory cannot be used. Whatever was at
            `out_dir` before is untouched then.
    """
    _check_options(options)
    progress, note = progress or (lambda *_: None), note or (lambda _: None)
    out_dir = Path(os.path.realpath(options.out_dir))
    sources = stdlib_sources() if options.demo else find_inputs(options.input_files)
    digest = fingerprint(sources)
    restore(out_dir)
    existing = refuse_foreign(out_dir)
    if existing is not None and not options.overwrite:
        _refuse_other(existing, out_dir, digest, sources)
    key = run_key({**_recorded(options), "version": __version__}, sources)
    is_once = any(source.once for source in sources)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        for folder in left_alone(out_dir):
            reason = "a process that fills it lives, or may live on another machine"
            note(f"{folder} is left alone: {reason}; if that one is gone, remove it")
        with ExitStack() as stack:
            adopt = _Adoption(key, options.format, is_once, note)
            folder = stack.enter_context(staged(out_dir, OWNED, adopt))
            adopt.is_started = True
            sources = _made_rereadable(sources, options, stack, folder)
            journal = stack.enter_context(closing(Journal(folder, key)))
            metadata = _build(options, sources, digest, folder, journal, is_once, progress, note)
            _make_publishable(folder, metadata)
        # Until here it is the journal that makes a finished dataset publishable after a kill.
        Journal.remove(out_dir)
        return metadata
    except OSError as error:
        # Inputs report their own errors: what arrives here concerns the output.
        reason = error.strerror or str(error)
        cure = "choose another --out_dir or make room"
        raise DataError(f"--out_dir {options.out_dir}", reason, cure) from error


@dataclass
class _Adoption:
    """Whether what a killed run left can be continued; says why if it cannot."""

    key: str
    format: str
    is_once: bool
    note: Note
    is_started: bool = False

    def __call__(self, folder: Path) -> bool:
        last = None if self.is_once else last_checkpoint(folder, self.key)
        if self.is_started:
            if last is not None:
                cure = "the same command goes on from there"
                self.note(f"what is finished stays in {folder}: {cure}")
            return last is not None
        damaged = damaged_shard(folder, last, self.format) if last is not None else ""
        if last is not None and not damaged:
            return True
        if has_journal(folder):
            if self.is_once:
                reason = "standard input and pipes cannot be read twice"
            elif damaged:
                reason = f"{damaged} is not what was written"
            else:
                reason = "it had finished no shard, or its inputs or options were others"
            self.note(f"an interrupted run cannot be continued, so this one starts over: {reason}")
        return False


def ensure_demo_dataset(out_dir: Path, tokenization: str, progress: Progress | None = None) -> Path:
    """Return `out_dir` holding the demo corpus, built now unless it is already there and whole.

    With several processes, call it in one and let the others wait: two builders at a time would
    take each other's result away.

    Raises:
        DataError: `out_dir` holds something else, which is left alone.
    """
    options = PrepareOptions(out_dir, tokenization=tokenization, demo=True)
    metadata = own_metadata(out_dir)
    used = metadata.get("options") if metadata is not None else None
    if metadata is not None and used == _recorded(options):
        is_same = metadata.get("corpus_fingerprint") == fingerprint(stdlib_sources())
        if is_same and (out_dir / STATE_NAME).is_file() and has_all_shards(out_dir, metadata):
            return out_dir
    # An older demo makes way; a dataset that someone prepared from text of their own does not.
    is_demo = isinstance(used, dict) and used.get("demo") is True
    prepare(replace(options, overwrite=is_demo), progress)
    return out_dir


def _recorded(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that decide what the tokens are."""
    used = asdict(options)
    for key in ("out_dir", "input_files", "overwrite", "workers", "encoder"):
        del used[key]
    return used


def _check_options(options: PrepareOptions) -> None:
    for flag, value, known in (
        ("--tokenization", options.tokenization, TOKENIZATIONS),
        ("--format", options.format, FORMATS),
        ("--encoder", options.encoder, fast_gpt2.ENCODERS),
    ):
        if value not in known:
            raise DataError(f"{flag} {value}", f"is none of {', '.join(known)}")
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
    """Copy pipes to files where all text must be seen before any is encoded."""
    is_read_once = options.tokenization == "gpt2" and not options.dedup
    if is_read_once or not any(source.once for source in sources):
        return sources
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=near, prefix="pipes-")))
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
    journal: Journal,
    is_once: bool,
    progress: Progress,
    note: Note,
) -> dict[str, Any]:
    if journal.last is not None and journal.last.metadata is not None:
        return journal.last.metadata
    reader = Reader(
        text_field=options.text_field,
        cleaning=LineCleaning(not options.no_normalize, not options.no_filter, not options.no_dedup)
        if options.mypt_clean
        else None,
        val_fraction=options.val_fraction,
        digest_first=options.dedup,
    )
    is_continued = journal.last is not None
    tokenizer = _make_tokenizer(options, reader, sources, folder, is_continued, progress)
    kind = _shard_kind(options, tokenizer)
    if not is_continued:
        write_json(folder / STATE_NAME, tokenizer.get_state())
    build = Build(folder, options.tokens_per_shard, kind, options.dedup, journal, not is_once)
    with closing(build):
        if build.tokens:
            note(f"continuing an interrupted run after {build.tokens:,} tokens")
        elif options.tokenization != "gpt2":
            build.checkpoint()  # the vocabulary need not be made again
        _count_bytes(reader, sources, "encode", progress)
        encoder = _write_tokens(options, tokenizer, reader, sources, build)
        train, val = build.writers["train"], build.writers["val"]
        rule = "by file" if options.demo else balance(train, val, options.val_fraction)
        train.close()
        val.close()
        metadata = _metadata(options, tokenizer, reader, build, sources)
        metadata.update(encoder=encoder, split_rule=rule, corpus_fingerprint=digest)
        build.finish(metadata)
        return metadata


def _make_publishable(folder: Path, metadata: dict[str, Any]) -> None:
    """Leave the dataset and nothing else but the journal; doing it again changes nothing."""
    write_json(folder / METADATA_NAME, metadata)
    for split in SPLITS:
        settle(folder / split, [s for s in metadata["shards"] if s["name"].startswith(split)])
        sync_directory(folder / split)
    Build.remove_work_files(folder)


def _shard_kind(options: PrepareOptions, tokenizer: Tokenizer) -> ShardKind:
    return ShardKind(
        options.format,
        tokenizer.model_vocab_size,
        -1 if tokenizer.eot_id is None or options.no_eot else tokenizer.eot_id,
        state_digest(tokenizer.get_state()),
    )


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
    options: PrepareOptions,
    reader: Reader,
    sources: list[Source],
    folder: Path,
    is_continued: bool,
    progress: Progress,
) -> Tokenizer:
    if options.tokenization == "gpt2":
        return Tokenizer.gpt2()
    if is_continued:
        return Tokenizer.from_state(read_json(folder / STATE_NAME, "tokenizer", _MAX_STATE_BYTES))
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
    build: Build,
) -> str:
    """Encode and write what is not written yet; returns what encoded it."""
    fast, name = None, tokenizer.kind
    if options.tokenization == "gpt2" and not options.mypt_clean:
        fast, name = fast_gpt2.choose(options.encoder)
    eot = None if options.no_eot else tokenizer.eot_id
    encoder = Encoder(tokenizer, build.kind.dtype, eot, options.mypt_clean, fast)
    source = units(reader, reader.pieces(sources, build.position), build.duplicates)
    with closing(in_order(encoder, source, options.workers or cores())) as results:
        for result in results:
            build.add(result)
    if build.tokens < 2:
        raise _no_text(options)
    return name


def _metadata(
    options: PrepareOptions,
    tokenizer: Tokenizer,
    reader: Reader,
    build: Build,
    sources: list[Source],
) -> dict[str, Any]:
    train, val = build.writers["train"], build.writers["val"]
    return {
        "total_tokens": train.tokens + val.tokens,
        "total_shards": len(train.shards) + len(val.shards),
        "train_shards": len(train.shards),
        "val_shards": len(val.shards),
        "tokens_per_shard": options.tokens_per_shard,
        "tokenization": options.tokenization,
        "vocab_size": tokenizer.model_vocab_size,
        "input_files": [DEMO_NAME] if options.demo else list(options.input_files),
        "format": options.format,
        "dtype": build.kind.dtype.name,
        "num_train_tokens": train.tokens,
        "num_val_tokens": val.tokens,
        "num_train_documents": train.documents,
        "num_val_documents": val.documents,
        "num_files": len(sources),
        "num_documents": build.duplicates.documents,
        "duplicate_documents": build.duplicates.duplicates,
        "duplicates_dropped": options.dedup,
        "skipped_empty_documents": reader.skipped_empty,
        "skipped_undecodable_files": reader.skipped_undecodable,
        "verified_pieces": build.verified,
        "max_token": max(train.max_token, val.max_token),
        "shards": [*train.shards, *val.shards],
        "options": _recorded(options),
    }
