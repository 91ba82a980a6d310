"""GPT-2 tokens by `gigatoken`, an optional package, wherever it proves to give tiktoken's.

It is many times faster (docs/decisions.md has the figures) and younger: before it is used, texts
chosen to be hard and texts drawn at random are encoded both ways. All that differs is an error.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mypt_fast.errors import DataError
from mypt_fast.gpt2_files import gpt2_encoding, gpt2_ranks

# Texts to tokens, with the GIL released.
EncodeBatch = Callable[[Sequence[str]], list[npt.NDArray[np.uint32]]]
PACKAGE = "gigatoken"
ENCODERS = ("auto", "tiktoken", "gigatoken")
_CHECKED_STRINGS = 1000

# Where pre-tokenisers go wrong: contractions, runs of white space of every kind, letters and
# numbers outside ASCII, marks that join, case pairs with odd partners, controls, special tokens.
ALPHABET = (
    *"aZ09'_-.,!?#\\/\"<>|{}()[]@^~`$%&*+=:;",
    *" \n\t\r\v\f\x00\x01\x1b\x1c\x1f\x7f\x85\u00a0\u00ad\u1680\u180e\u2002\u2028\u2029\u202f",
    *"\u200b\u200d\u205f\u2060\u3000\ufeff\ufffd\ufffe\U000e0001",
    *"éßÆſKİıǅΣςÅ²½¹٣०Ⅷⅷ①〇漢字かなカ한글ไทย\u0301\u0308\u064b\u093e\u20e3\ufe0f",
    *"😀👩\U0001f1e9🏽𝔘𝟘\U00010400\U0001e900\U0003ffff\U0010ffff",
    *("'s", "'S", "'ll", "'LL", "'ve", "'re", "'t", "'d", "'m", "'ſ", " '", "''"),
    *("  ", "    ", "\n\n", "\r\n", " \n ", "<|endoftext|>", "the", " the", "ing", "1234"),
)


def hard_strings(count: int, seed: int) -> Iterator[str]:
    """Yield strings of the alphabet above, and every so often one of any characters."""
    draw = random.Random(seed)
    for n in range(count):
        length = draw.choice((1, 2, 3, 5, 8, 13, 40))
        if n % 4:
            yield "".join(draw.choices(ALPHABET, k=length))
        else:
            codes = (draw.randrange(0x110000 if n % 8 else 0x800) for _ in range(length))
            yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def choose(wanted: str) -> tuple[EncodeBatch | None, str]:
    """Return the encoder to use, None for tiktoken's, and its name with its version.

    Args:
        wanted: "auto" takes gigatoken where it is installed and proves right.

    Raises:
        DataError: "gigatoken" is wanted and is not there, or differs.
    """
    if wanted != "tiktoken":
        try:
            return _checked_gigatoken(), f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
        except ImportError as error:
            found = "is not installed" if _is_missing() else f"cannot be imported: {error}"
            cure = "pip install 'mypt_fast[prep]', or --encoder tiktoken"
        except Exception as error:  # whatever a foreign package raises must not stop `auto`
            found, cure = f"{error}", "--encoder tiktoken is slower and always right"
        if wanted == PACKAGE:
            raise DataError(f"--encoder {PACKAGE}", found, cure)
    return None, f"tiktoken {importlib.metadata.version('tiktoken')}"


def _is_missing() -> bool:
    return importlib.util.find_spec(PACKAGE) is None


def _checked_gigatoken() -> EncodeBatch:
    encode = _gigatoken()
    reference = gpt2_encoding()
    for seed, count in ((0, _CHECKED_STRINGS), (random.randrange(1 << 30), _CHECKED_STRINGS)):
        texts = list(hard_strings(count, seed))
        for text, tokens in zip(texts, encode(texts), strict=True):
            if tokens.tolist() != reference.encode_ordinary(text):
                raise ValueError(f"does not give tiktoken's tokens for {text!r}")
    return encode


def _gigatoken() -> EncodeBatch:
    import gigatoken

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gpt2.tiktoken")
        lines = (b"%s %d\n" % (base64.b64encode(t), n) for t, n in gpt2_ranks().items())
        path.write_bytes(b"".join(lines))
        tokenizer = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {})

    def encode(texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        # Of its calls only those for batches release the GIL; its own threads are left alone.
        return _arrays(tokenizer.encode_batch(list(texts), parallel=False)) if texts else []

    return encode


def _arrays(rows: Any) -> list[npt.NDArray[np.uint32]]:
    """Turn what gigatoken returns, an awkward array or a list of arrays, into the latter."""
    if isinstance(rows, list):
        return [np.asarray(row, dtype=np.uint32) for row in rows]
    import awkward

    ends = np.cumsum(np.asarray(awkward.num(rows)))
    return np.split(np.asarray(awkward.flatten(rows), dtype=np.uint32), ends[:-1])
