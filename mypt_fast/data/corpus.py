"""Where text comes from: the files a user names, or this Python's own standard library.

The library's sources are the demo corpus: a text of tens of megabytes that every machine with
Python already has. It is split by file, so no document straddles train and validation.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mypt_fast.errors import DataError

STDIN = "-"
# What a directory is searched for; a file that is named itself may have any name. Prose and
# source code only: .json, .csv, .html and the like hold data more often than text.
_PROSE = ".txt .text .md .markdown .rst .tex .org .adoc"
_CODE = (
    ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .kt .scala .js .jsx .ts .tsx .rb .php"
    " .pl .lua .r .jl .sh .sql .swift .hs .ml"
)
TEXT_SUFFIXES = frozenset(f"{_PROSE} {_CODE}".split())
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
DEMO_NAME = f"python-{sys.version_info[0]}.{sys.version_info[1]}-standard-library"
_STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
_DEMO_VAL_EVERY = 10


@dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        name: what messages and metadata call it.
        path: the file, None for standard input.
        is_jsonl: whether each line is a JSON document; else the whole file is one text.
        size: bytes on disk, 0 where nobody knows.
        split: "train" or "val" where the source decides, None where a hash does.
        is_demo: the file may be left out when it is not UTF-8, it was not the user's choice.
        once: it can be read only once (a pipe).
        real_path: the absolute path without links, "" for standard input.
        mtime_ns: when it was changed last, 0 where nobody knows.
    """

    name: str
    path: Path | None
    is_jsonl: bool = False
    size: int = 0
    split: str | None = None
    is_demo: bool = False
    once: bool = False
    real_path: str = ""
    mtime_ns: int = 0

    @property
    def is_gzip(self) -> bool:
        """Whether the bytes are gzip-compressed, by name."""
        return self.path is not None and self.path.suffix.lower() == ".gz"


def stdlib_files(root: Path | None = None) -> list[tuple[Path, str]]:
    """List the demo corpus as (path, split), in the order of a hash of the relative path.

    Tests, idlelib, lib2to3 and installed packages are left out. Every tenth file is validation.
    A file that is not UTF-8 (a handful in some versions) is dropped when it is read: replacement
    characters would enter the char vocabulary without being in any source.

    Args:
        root: the library's directory; this interpreter's own when None.

    Raises:
        DataError: there are no sources, as in stripped installations.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for path in _walk(root, skipped=_STDLIB_SKIPPED):
        if path.suffix == ".py":
            name = path.relative_to(root).as_posix()
            found.append((hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), path))
    if len(found) < _DEMO_VAL_EVERY:
        raise DataError(
            f"the demo corpus, Python's standard library in {root}",
            f"has {len(found)} source files",
            "name text of your own with --input_files",
        )
    found.sort()
    return [
        (path, "val" if n % _DEMO_VAL_EVERY == _DEMO_VAL_EVERY - 1 else "train")
        for n, (_, path) in enumerate(found)
    ]


def stdlib_sources(root: Path | None = None) -> list[Source]:
    """Return the demo corpus as sources."""
    return [replace(_source(path), split=split, is_demo=True) for path, split in stdlib_files(root)]


def find_inputs(inputs: Sequence[str]) -> list[Source]:
    """Turn what the user named into sources, in the order given, each file once.

    A file may have any name (`.jsonl` and `.ndjson` hold one JSON document per line, `.gz` is
    decompressed). A directory is searched recursively for text files, hidden ones left out, in
    the order of their names. A pattern with `*`, `?` or `[` expands; `-` is standard input.

    Raises:
        DataError: something named does not exist, is not readable or holds no text file.
    """
    if not inputs:
        raise DataError("no input", cure="name files, directories or patterns, - for stdin")
    sources: list[Source] = []
    seen: set[str] = set()
    for entry in inputs:
        for source in _expand(entry):
            if source.real_path not in seen:
                seen.add(source.real_path)
                sources.append(source)
    return sources


def fingerprint(sources: Iterable[Source]) -> str:
    """Return a digest of which files these are and how large; equal inputs, equal digest.

    Contents are not read: this answers "is it the same corpus?" before each run of the demo.
    """
    digest = hashlib.sha256()
    for source in sources:
        where = source.real_path or STDIN
        digest.update(f"{where}\0{source.size}\0{source.split}\n".encode("utf-8", "replace"))
    return digest.hexdigest()[:32]


def _expand(entry: str) -> list[Source]:
    if entry == STDIN:
        if sys.stdin is None:
            raise DataError("input -", "standard input is closed", "pipe the text into it")
        return [Source(STDIN, None, once=True)]
    path = Path(entry)
    try:
        if path.is_dir():
            found = [file for file in _walk(path) if _is_text_name(file)]
            if not found:
                raise DataError(
                    f"input directory {entry}",
                    "holds no text file (.txt, .md, .py, .jsonl and the like)",
                    "name the files themselves, any name is accepted there",
                )
        elif path.exists() or not glob.has_magic(entry):
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(entry, recursive=True) if os.path.isfile(p))
            if not found:
                raise DataError(f"input pattern {entry}", "matches no file", "check the pattern")
        return [_source(file) for file in found]
    except (OSError, ValueError) as error:
        # ValueError: a NUL byte in the name.
        raise unreadable(entry, error) from error


def unreadable(name: str, error: Exception) -> DataError:
    """Return the error for an input that the operating system does not hand out."""
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"input {name}", reason, "check the path and its permissions")


def _source(path: Path) -> Source:
    info = path.stat()
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    is_jsonl = bool(suffixes) and suffixes[-1] in JSONL_SUFFIXES
    if stat.S_ISFIFO(info.st_mode):
        return Source(str(path), path, is_jsonl, once=True, real_path=os.path.realpath(path))
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"input {path}", "is neither a file, a directory nor a pipe")
    return Source(
        str(path),
        path,
        is_jsonl,
        size=info.st_size,
        real_path=os.path.realpath(path),
        mtime_ns=info.st_mtime_ns,
    )


def _is_text_name(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
    return suffix in TEXT_SUFFIXES or suffix in JSONL_SUFFIXES


def _walk(root: Path, skipped: frozenset[str] = frozenset({"__pycache__"})) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(root, onerror=refuse):
        names[:] = sorted(n for n in names if n not in skipped and not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path
