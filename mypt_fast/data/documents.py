"""Sources to pieces of text in bounded memory: decode, split into documents, clean, cut.

A document longer than a block is cut only where GPT-2's pre-tokenisation has a boundary whatever
surrounds it, so encoding the pieces gives the very tokens of encoding the whole.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO, NamedTuple

import xxhash

from mypt_fast.data.corpus import Source, unreadable
from mypt_fast.errors import DataError

BLOCK_CHARS = 1 << 20
READ_BYTES = 1 << 20
# JSON cannot be parsed in pieces; a longer row is a mistake or has to be made a text file.
MAX_ROW_BYTES = 256 << 20
# mypt_clean works on whole lines; a longer one is treated as several.
MAX_LINE_CHARS = 1 << 22
_LINES_PER_BLOCK = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")


class Piece(NamedTuple):
    """Part of a document, or all of it.

    `digest` is the XXH3-128 of the document's text before cleaning: on its last piece, on its
    first one if the reader was asked for that, None on the others.
    """

    text: str
    split: str
    starts: bool
    ends: bool
    digest: bytes | None = None


class _Document(NamedTuple):
    blocks: Iterable[str]
    digest: Callable[[], bytes]  # to be called when the blocks are exhausted, or before


@dataclass(frozen=True)
class Position:
    """How far a reader has come.

    Attributes:
        source: the source to begin with.
        pieces: how many of its pieces were delivered; they are read again and passed over.
        documents: documents before this source, and likewise the other two.
    """

    source: int = 0
    pieces: int = 0
    documents: int = 0
    skipped_empty: int = 0
    skipped_undecodable: int = 0


@dataclass(frozen=True)
class LineCleaning:
    """MyPT's line pipeline and its three switches."""

    normalize: bool = True
    filter: bool = True
    dedup: bool = True


@dataclass
class Reader:
    """Read sources as documents and pieces.

    Args:
        text_field: the key of a JSONL row that holds the text.
        cleaning: MyPT's line pipeline, or None to leave every character as it is.
        val_fraction: share of the documents that a hash of their beginning sends to validation;
            the first 1 / val_fraction documents always go to training.
        block_chars: the longest piece.
        digest_first: give a document's digest with its first piece: long files are read twice.
        on_bytes: called with the number of input bytes after each read.
    """

    text_field: str = "text"
    cleaning: LineCleaning | None = None
    val_fraction: float = 0.1
    block_chars: int = BLOCK_CHARS
    digest_first: bool = False
    on_bytes: Callable[[int], None] = lambda count: None
    skipped_empty: int = 0
    skipped_undecodable: int = 0
    _documents_seen: int = 0
    _seen: set[bytes] = field(default_factory=set)
    _base: Position = Position()
    _delivered: int = 0

    def pieces(self, sources: Sequence[Source], start: Position | None = None) -> Iterator[Piece]:
        """Yield every document in order, in pieces of at most `block_chars` characters.

        Args:
            sources: the inputs.
            start: where to go on, from `position`.
        """
        self._base = start = start or Position()
        self._documents_seen = start.documents
        self.skipped_empty = start.skipped_empty
        self.skipped_undecodable = start.skipped_undecodable
        self._seen.clear()
        self._delivered = 0
        self.on_bytes(sum(source.size for source in sources[: start.source]))
        for number in range(start.source, len(sources)):
            if number > start.source and not self._depends_on_all_before():
                self._base = Position(
                    number, 0, self._documents_seen, self.skipped_empty, self.skipped_undecodable
                )
                self._delivered = 0
            passed_over = start.pieces if self._base == start else 0
            for document in self._documents(sources[number]):
                for piece in self._pieces_of(document, sources[number].split):
                    self._delivered += 1
                    if self._delivered > passed_over:
                        yield piece

    def position(self) -> dict[str, int]:
        """Return the `Position` after the piece that came last, as plain numbers."""
        return asdict(replace(self._base, pieces=self._delivered))

    def _depends_on_all_before(self) -> bool:
        # Which lines were seen is not kept: everything is read again, which takes a small part of
        # the time of encoding it.
        return self.cleaning is not None and self.cleaning.dedup

    def _pieces_of(self, document: _Document, split: str | None) -> Iterator[Piece]:
        blocks, digest = document
        if self.cleaning is not None:
            blocks = clean_lines(blocks, self.cleaning, self._seen)
        chosen, starts = "", True
        held: str | None = None
        for text in cut(blocks, self.block_chars):
            if held is not None:
                is_named = starts and self.digest_first
                yield Piece(held, chosen, starts, False, digest() if is_named else None)
                starts = False
            else:
                chosen = split or self._choose_split(text)
            held = text
        if held is None:
            self.skipped_empty += 1
        else:
            is_named = starts or not self.digest_first
            yield Piece(held, chosen, starts, True, digest() if is_named else None)

    def _choose_split(self, text: str) -> str:
        # With fewer documents than this a hash has nothing to spread; the writer then takes the
        # end of the text for validation, and finds it in one piece.
        self._documents_seen += 1
        is_leading = self._documents_seen - 1 < 1 / self.val_fraction  # which may be infinite
        return "train" if is_leading else split_of(text, self.val_fraction)

    def _documents(self, source: Source) -> Iterator[_Document]:
        if source.is_jsonl:
            for text in self._rows(source):
                data = text.encode("utf-8", "surrogatepass")
                yield _Document([text], functools.partial(xxhash.xxh3_128_digest, data))
        elif source.is_demo:
            digest = xxhash.xxh3_128()
            try:
                yield _Document(list(self._decoded(source, digest)), digest.digest)
            except NotTextError:
                self.skipped_undecodable += 1
        else:
            digest = xxhash.xxh3_128()
            blocks: Iterable[str] = self._decoded(source, digest)
            if self.digest_first and source.size < READ_BYTES and not source.is_gzip:
                blocks = list(blocks)
            elif self.digest_first:
                for _ in blocks:
                    pass
                blocks = self._decoded(source, xxhash.xxh3_128(), is_again=True)
            yield _Document(blocks, digest.digest)

    def _decoded(self, source: Source, digest: Any, is_again: bool = False) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0
        with _opened(source) as file:
            while True:
                data = file.read(READ_BYTES)
                if not is_again:
                    self.on_bytes(len(data))
                digest.update(data)
                pending = len(decoder.getstate()[0])
                if (nul := data.find(b"\0")) >= 0:
                    raise NotTextError(source.name, offset + nul, "a NUL byte")
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    at = offset - pending + error.start
                    raise NotTextError(source.name, at, "bytes that are not UTF-8") from error
                if text:
                    yield text
                if not data:
                    return
                offset += len(data)

    def _rows(self, source: Source) -> Iterator[str]:
        with _opened(source) as file:
            number = 0
            while line := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                self.on_bytes(len(line))
                where = f"{source.name} line {number}"
                if len(line) > MAX_ROW_BYTES:
                    limit = f"is longer than {MAX_ROW_BYTES >> 20} MiB"
                    raise DataError(where, limit, "put long documents into text files")
                if line.strip():
                    yield _row_text(line, where, self.text_field)


class NotTextError(DataError):
    """An input that is binary or in another encoding."""

    def __init__(self, name: str, offset: int, what: str) -> None:
        super().__init__(
            f"input {name}",
            f"has {what} at byte {offset}: not a UTF-8 text",
            "leave it out, or convert it first (iconv -t UTF-8)",
        )


def split_of(text: str, val_fraction: float) -> str:
    """Choose the split by a hash of the document's beginning: equal documents stay together."""
    digest = xxhash.xxh3_64_intdigest(text[:65536].encode("utf-8", "surrogatepass"))
    return "val" if digest < val_fraction * 2**64 else "train"


def cut(blocks: Iterable[str], limit: int) -> Iterator[str]:
    """Re-cut a document's blocks into pieces of at most `limit` characters, none empty."""
    held = ""
    for block in blocks:
        held += block
        start = 0
        while len(held) - start > limit:
            end = cut_position(held, start, start + limit)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


_CUT_WHITE = " \n\t\r"
_CUT_MARKS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~。，、；：！？")


def is_before_white(text: str, at: int) -> bool:
    """Whether `at` is where white space follows something else: no token spans such a place.

    No piece of GPT-2's pattern runs on into white space, and its look-ahead concerns only runs of
    white space, which stay in one part. str.isspace knows every character that the pattern counts
    as white space, so "not isspace" is safe on the left.
    """
    return text[at] in _CUT_WHITE and not text[at - 1].isspace()


def is_before_mark(text: str, at: int) -> bool:
    """Whether `at` is where punctuation follows a letter or a number: other pieces begin there."""
    return text[at] in _CUT_MARKS and text[at - 1].isalnum()


def cut_position(text: str, start: int, end: int) -> int:
    """Return the last position in (start, end] where cutting changes no token; else `end`.

    Only a run of `end - start` characters without any boundary (a megabyte of one letter) has
    none; it is cut at `end` and may differ there by a token from the uncut text.
    """
    for is_boundary in (is_before_white, is_before_mark):
        for at in range(end, start, -1):
            if is_boundary(text, at):
                return at
    return end


def clean_lines(blocks: Iterable[str], cleaning: LineCleaning, seen: set[bytes]) -> Iterator[str]:
    """Apply MyPT's line pipeline; yields blocks of kept lines, each ended by a newline.

    Normalise: lower-case, white space collapsed (off: stripped). Filter: 20 to 2,000 characters
    and at least three spaces. De-duplicate: by MD5 of the line over the whole input; the memory
    for that grows with the number of different lines, about 100 bytes each.
    """
    kept: list[str] = []
    for line in _lines(blocks):
        line = " ".join(line.lower().split()) if cleaning.normalize else line.strip()
        if cleaning.filter and not (20 <= len(line) <= 2000 and line.count(" ") >= 3):
            continue
        if cleaning.dedup:
            data = line.encode("utf-8", "surrogatepass")
            digest = hashlib.md5(data, usedforsecurity=False).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(line + "\n")
        if len(kept) == _LINES_PER_BLOCK:
            yield "".join(kept)
            kept = []
    if kept:
        yield "".join(kept)


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    held = ""
    for block in blocks:
        *lines, held = (held + block).split("\n")
        yield from lines
        while len(held) > MAX_LINE_CHARS:
            end = cut_position(held, 0, MAX_LINE_CHARS)
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _row_text(line: bytes, where: str, text_field: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = re.sub(r": line 1 column (\d+) .*", r" at column \1", str(error))
        raise DataError(where, f"is not JSON: {reason}", "each line must be one object") from error
    if not isinstance(row, dict):
        raise DataError(where, f"is a {type(row).__name__}, expected an object")
    text = row.get(text_field)
    if isinstance(text, str):
        if text.isascii() or not _SURROGATE.search(text):
            return text
        # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if text_field in row:
        raise DataError(where, f"field {text_field!r} is a {type(text).__name__}, expected text")
    keys = ", ".join(list(row)[:8]) or "nothing"
    raise DataError(
        where, f"has no field {text_field!r}; it has {keys}", "name the field with --text_field"
    )


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    try:
        if source.path is None:
            yield sys.stdin.buffer
        else:
            with source.path.open("rb") as raw:
                yield gzip.GzipFile(fileobj=raw) if source.is_gzip else raw  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(source.name, error) from error
