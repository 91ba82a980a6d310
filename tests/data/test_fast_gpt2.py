"""gigatoken is used where it gives tiktoken's tokens, and only there."""

from __future__ import annotations

import random
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data import fast_gpt2
from mypt_fast.data.corpus import stdlib_files
from mypt_fast.data.prepare import PrepareOptions, prepare
from mypt_fast.errors import DataError, IntegrityError
from mypt_fast.gpt2_files import gpt2_encoding

needs_gigatoken = pytest.mark.skipif(
    find_spec("gigatoken") is None, reason="gigatoken, the optional extra [prep], is not installed"
)


@pytest.fixture(scope="module")
def encode() -> fast_gpt2.EncodeBatch:
    found, name = fast_gpt2.choose("gigatoken")
    assert found is not None
    assert name.startswith("gigatoken ")
    return found


@needs_gigatoken
def test_it_encodes_20_000_hard_strings_as_tiktoken_does(encode: fast_gpt2.EncodeBatch) -> None:
    reference = gpt2_encoding()
    texts = list(fast_gpt2.hard_strings(20_000, seed=7))
    for text, found in zip(texts, encode(texts), strict=True):
        assert found.tolist() == reference.encode_ordinary(text), repr(text)


@needs_gigatoken
def test_it_encodes_every_settled_character_beside_others_as_tiktoken_does(
    encode: fast_gpt2.EncodeBatch,
) -> None:
    """Letters and numbers of all scripts in random company: where classes differ, merges do."""
    disputed, draw = fast_gpt2.disputed(), random.Random(3)
    settled = [chr(c) for c in range(0x80, 0x2A6D7) if not 0xD800 <= c < 0xE000]
    settled = [c for c in settled if not disputed.search(c)]
    draw.shuffle(settled)
    words = [c for c in settled if unicodedata.category(c)[0] in "LN"]
    texts = ["".join(settled[n : n + 50]) for n in range(0, len(settled), 50)]
    texts += ["".join(draw.choices(words, k=50)) for _ in range(2_000)]
    reference = gpt2_encoding()
    for text, found in zip(texts, encode(texts), strict=True):
        assert found.tolist() == reference.encode_ordinary(text), ascii(text)


@needs_gigatoken
def test_a_character_on_which_versions_of_unicode_differ_goes_to_tiktoken(
    encode: fast_gpt2.EncodeBatch,
) -> None:
    # U+32C88 became a letter in Unicode 17; before, the letter after it began a piece of its own.
    texts = ["plain", "\U00032c88讷", "讷", "and \U00032c88讷 again"]
    expected = [gpt2_encoding().encode_ordinary(text) for text in texts]
    assert [found.tolist() for found in encode(texts)] == expected


def test_common_text_is_not_disputed_and_young_characters_are() -> None:
    find = fast_gpt2.is_disputed
    common = (
        "Ünïcode – “naïve” €5 ½ ²; Ελληνικά, русский, עברית, العربية, हिन्दी, "
        "ไทย, 漢字かな한글 😀👩‍🚀🏽 🇩🇪 ₹ ✓"
    )
    assert not find(common)
    assert not find("".join(map(chr, range(0x80))))
    for young in "\U00032c88\U000323b0\U0001e900\u0560":
        assert find(f"text {young} tèxt")


@needs_gigatoken
def test_it_encodes_the_standard_library_as_tiktoken_does(encode: fast_gpt2.EncodeBatch) -> None:
    reference = gpt2_encoding()
    texts = [path.read_text("utf-8", "replace") for path, _ in stdlib_files()]
    with ThreadPoolExecutor(4) as pool:  # as prepare does: several threads, one encoder
        parts = list(pool.map(encode, [texts[n : n + 20] for n in range(0, len(texts), 20)]))
    for text, found in zip(texts, chain.from_iterable(parts), strict=True):
        expected = reference.encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(found, expected), text[:80]
    assert len(texts) > 300


@needs_gigatoken
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_it_encodes_any_text_as_tiktoken_does(encode: fast_gpt2.EncodeBatch, text: str) -> None:
    (found,) = encode([text])
    assert found.tolist() == gpt2_encoding().encode_ordinary(text)


@needs_gigatoken
def test_both_encoders_make_the_same_dataset(tmp_path: Path) -> None:
    for name in ("tiktoken", "gigatoken"):
        options = PrepareOptions(tmp_path / name, (str(Path(__file__).parent),), encoder=name)
        assert prepare(options)["encoder"].startswith(name)
    for path in (tmp_path / "tiktoken").rglob("*.bin"):
        other = tmp_path / "gigatoken" / path.relative_to(tmp_path / "tiktoken")
        assert path.read_bytes() == other.read_bytes()


def test_the_hard_strings_are_what_they_are_meant_to_be() -> None:
    strings = list(fast_gpt2.hard_strings(2_000, seed=1))
    assert strings == list(fast_gpt2.hard_strings(2_000, seed=1))
    text = "".join(strings)
    assert all(part in text for part in fast_gpt2.ALPHABET)
    assert text.encode()  # no lone surrogate
    assert len(set(strings)) > 1_500


# --- a package that is not what it should be


class _Fake:
    """Stands in for the package: encodes with tiktoken and spoils what `spoil` says."""

    def __init__(self, spoil: str) -> None:
        self.spoil = spoil

    def from_tiktoken(self, path: Path, pretokenizer: str, specials: dict[str, int]) -> _Fake:
        assert pretokenizer == "gpt2"
        assert specials == {}
        assert len(Path(path).read_bytes().splitlines()) == 50256
        return self

    def encode_batch(self, texts: list[str], parallel: bool) -> list[np.ndarray]:
        assert parallel is False
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> np.ndarray:
        if self.spoil == "raise":
            raise RuntimeError("panicked")
        ids = gpt2_encoding().encode_ordinary(text)
        if self.spoil and self.spoil in text:
            ids = [*ids[::-1], 0]
        return np.array(ids, dtype=np.uint32)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(spoil: str) -> None:
        module = ModuleType("gigatoken")
        module.Tokenizer = _Fake(spoil)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gigatoken", module)
        monkeypatch.setattr(fast_gpt2.importlib.metadata, "version", lambda name: "9.9")

    return install


@pytest.mark.parametrize("spoil", ["raise", "\u2028", "<|endoftext|>", "ſ"])
def test_a_package_that_differs_is_not_used(package: Any, spoil: str) -> None:
    package(spoil)
    assert fast_gpt2.choose("auto") == (None, "tiktoken 9.9")
    with pytest.raises(DataError, match=r"--encoder gigatoken; .*; --encoder tiktoken"):
        fast_gpt2.choose("gigatoken")
    assert fast_gpt2.choose("tiktoken") == (None, "tiktoken 9.9")


def test_a_package_that_proves_right_is_used(package: Any) -> None:
    package("")
    found, name = fast_gpt2.choose("auto")
    assert found is not None
    assert name == "gigatoken 9.9"


def test_one_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert fast_gpt2.choose("auto")[0] is None
    with pytest.raises(DataError, match=r"--encoder gigatoken; .*\[prep\]"):
        fast_gpt2.choose("gigatoken")


def test_what_slips_through_the_check_is_found_by_the_sample(package: Any, tmp_path: Path) -> None:
    package("a rare word")
    (tmp_path / "a.txt").write_text("Some text, and then a rare word in it. " * 20)
    options = PrepareOptions(tmp_path / "out", (str(tmp_path / "a.txt"),))
    with pytest.raises(IntegrityError, match=r"begins 'Some text.*--encoder tiktoken"):
        prepare(options)
    assert not (tmp_path / "out").exists()
