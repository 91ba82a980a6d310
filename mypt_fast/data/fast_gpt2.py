"""GPT-2 tokens by `gigatoken`, an optional package, wherever it proves to give tiktoken's.

It is many times faster and follows another version of Unicode: a character that one of the two
takes for a letter and the other for a hole in the table is split differently from its neighbours.
So texts with characters younger than Unicode 3.2 (symbols apart) go to tiktoken, and before
anything is encoded, hard texts and random ones are encoded both ways.
"""

from __future__ import annotations

import base64
import functools
import importlib.metadata
import importlib.util
import random
import re
import tempfile
import unicodedata
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
_CHECKED_STRINGS = 500
_SYMBOLS = (  # currencies, miscellaneous, arrows, mah-jong to cards, flags, pictographs
    (0x20A0, 0x20CF),
    (0x2600, 0x27BF),
    (0x2B00, 0x2BFF),
    (0x1F000, 0x1F0FF),
    (0x1F1E6, 0x1F1FF),
    (0x1F300, 0x1FAFF),
)
_ASCII = bytes(range(0x80))
_LAST_OF_EXTENSION_B = 0x2A6D6

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


@functools.lru_cache(maxsize=1)
def disputed() -> re.Pattern[str]:
    """Return a pattern that finds a character whose class could depend on the Unicode version.

    Classes are letter, number, white space, other. Settled: what Unicode 3.2 has, which every
    Python knows; private use; blocks of symbols, where a character is "other" before and after
    it is assigned.
    """
    category = unicodedata.ucd_3_2_0.category
    young = [code for code in range(0x80, 0x20000) if category(chr(code)) == "Cn"]
    ranges: list[list[int]] = []
    for code in young:
        if any(first <= code <= last for first, last in _SYMBOLS):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    ranges.append([_LAST_OF_EXTENSION_B + 1, 0xEFFFF])
    body = "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges)
    return re.compile(f"[{body}]")


def is_disputed(text: str) -> bool:
    """Whether a text has a character that `disputed` finds."""
    # ASCII is sorted out at a gigabyte a second, which leaves the pattern little of most texts.
    rest = text.encode("utf-8", "surrogatepass").translate(None, _ASCII)
    return disputed().search(rest.decode("utf-8", "surrogatepass")) is not None


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
        slow = {n for n, text in enumerate(texts) if not text.isascii() and is_disputed(text)}
        quick = [text for n, text in enumerate(texts) if n not in slow]
        # Of its calls only those for batches release the GIL; its own threads are left alone.
        rows = iter(_arrays(tokenizer.encode_batch(quick, parallel=False)) if quick else [])
        return [
            gpt2_encoding().encode_to_numpy(text, disallowed_special=())
            if n in slow
            else next(rows)
            for n, text in enumerate(texts)
        ]

    return encode


def _arrays(rows: Any) -> list[npt.NDArray[np.uint32]]:
    """Turn what gigatoken returns, an awkward array or a list of arrays, into the latter."""
    if isinstance(rows, list):
        return [np.asarray(row, dtype=np.uint32) for row in rows]
    import awkward

    ends = np.cumsum(np.asarray(awkward.num(rows)))
    return np.split(np.asarray(awkward.flatten(rows), dtype=np.uint32), ends[:-1])
