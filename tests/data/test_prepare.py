"""Text to tokens: every document, byte for byte, in both splits."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from plain_shards import tokens
from prepared import EOT, build, check_whole, originals

from mypt_fast.data import documents, encoding
from mypt_fast.data.prepare import ensure_demo_dataset
from mypt_fast.errors import DataError, IntegrityError
from mypt_fast.tokenizer import Tokenizer


def split_at(ids: np.ndarray, end: int = EOT) -> list[list[int]]:
    ends = np.flatnonzero(ids == end)
    assert ends[-1] == len(ids) - 1
    return [part[:-1].tolist() for part in np.split(ids, ends[:-1] + 1)]


@pytest.mark.parametrize("format_", ["native", "mypt"])
def test_gpt2_tokens_reproduce_every_document_byte_for_byte(
    texts: Path, tmp_path: Path, gpt2: Tokenizer, format_: str
) -> None:
    metadata = build(tmp_path / "out", texts, format=format_)
    check_whole(tmp_path / "out", metadata)
    found = {
        split: [gpt2.decode(part) for part in split_at(tokens(tmp_path / "out", split))]
        for split in ("train", "val")
    }
    expected: dict[str, list[str]] = {"train": [], "val": []}
    for n, text in enumerate(originals(texts)):
        expected["train" if n < 10 else documents.split_of(text, 0.1)].append(text)
    assert found == expected
    assert metadata["split_rule"] == "by document"
    assert metadata["num_train_documents"] == len(expected["train"])
    assert metadata["num_val_documents"] == len(expected["val"])


def test_metadata_begins_with_mypts_keys_and_tells_the_rest(texts: Path, tmp_path: Path) -> None:
    metadata = build(tmp_path / "out", texts)
    assert list(metadata)[:8] == [
        "total_tokens",
        "total_shards",
        "train_shards",
        "val_shards",
        "tokens_per_shard",
        "tokenization",
        "vocab_size",
        "input_files",
    ]
    assert metadata["vocab_size"] == 50304
    assert metadata["input_files"] == [str(texts)]
    assert (metadata["format"], metadata["dtype"]) == ("native", "uint16")
    assert metadata["options"]["val_fraction"] == 0.1
    state = json.loads((tmp_path / "out" / "tokenizer_state.json").read_text())
    assert state == Tokenizer.gpt2().get_state()


def test_special_tokens_in_text_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<myPT_user><|endoftext|> word word word word word word")
    build(tmp_path / "out", tmp_path / "a.txt")
    ids = np.concatenate([tokens(tmp_path / "out", "train"), tokens(tmp_path / "out", "val")])
    assert (ids >= EOT).sum() == 1


def test_the_result_does_not_depend_on_workers_or_block_size(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(tmp_path / "one", texts, workers=1)
    monkeypatch.setattr(encoding, "BLOCK_CHARS", 200)
    three = build(tmp_path / "three", texts, workers=3)
    assert one == three


@pytest.mark.parametrize("format_", ["native", "mypt"])
def test_shards_are_filled_exactly_and_documents_straddle_them(
    texts: Path, tmp_path: Path, format_: str
) -> None:
    whole = build(tmp_path / "whole", texts)
    parts = build(tmp_path / "parts", texts, tokens_per_shard=97, format=format_)
    check_whole(tmp_path / "parts", parts)
    assert parts["train_shards"] == -(-whole["num_train_tokens"] // 97)
    assert (tokens(tmp_path / "parts", "train") == tokens(tmp_path / "whole", "train")).all()


def test_no_eot_writes_only_text(texts: Path, tmp_path: Path) -> None:
    build(tmp_path / "out", texts, no_eot=True)
    assert EOT not in tokens(tmp_path / "out", "train")


# --- kinds


def test_char_vocabulary_covers_all_inputs_and_has_no_end_token(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    metadata = build(out, texts, tokenization="char")
    check_whole(out, metadata)
    tokenizer = Tokenizer.from_state(json.loads((out / "tokenizer_state.json").read_text()))
    assert tokenizer.chars == sorted(set("".join(originals(texts))))
    assert metadata["vocab_size"] == len(tokenizer.chars)
    text = tokenizer.decode(tokens(out, "train")) + tokenizer.decode(tokens(out, "val"))
    assert sorted(text) == sorted("".join(originals(texts)))


def test_bpe_is_trained_on_the_input_and_ends_documents_its_own_way(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    metadata = build(out, texts, tokenization="bpe", vocab_size=320)
    check_whole(out, metadata)
    tokenizer = Tokenizer.from_state(json.loads((out / "tokenizer_state.json").read_text()))
    assert tokenizer.kind == "bpe"
    assert tokenizer.eot_id is not None
    found = [
        tokenizer.decode(part)
        for split in ("train", "val")
        for part in split_at(tokens(out, split), tokenizer.eot_id)
    ]
    assert sorted(found) == sorted(originals(texts))


# --- inputs


def test_patterns_gzip_and_jsonl_give_the_same_documents(
    texts: Path, tmp_path: Path, gpt2: Tokenizer
) -> None:
    rows = [json.dumps({"body": text}) for text in originals(texts)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    build(tmp_path / "a", texts / "*.txt")
    build(tmp_path / "b", tmp_path / "x.jsonl.gz", text_field="body")
    for split in ("train", "val"):
        assert (tokens(tmp_path / "a", split) == tokens(tmp_path / "b", split)).all()


@pytest.mark.parametrize("tokenization", ["gpt2", "char"])
def test_standard_input_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenization: str
) -> None:
    text = "All of it\nis one document. " * 40
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    out = tmp_path / "out"
    metadata = build(out, "-", tokenization=tokenization)
    check_whole(out, metadata)
    tokenizer = Tokenizer.from_state(json.loads((out / "tokenizer_state.json").read_text()))
    ids = np.concatenate([tokens(out, "train"), tokens(out, "val")])
    end = "" if tokenization == "char" else "<|endoftext|>"
    assert tokenizer.decode(ids) == text + end
    assert os.listdir(tmp_path) == ["out"]


def test_mypt_clean_runs_the_line_pipeline(tmp_path: Path, gpt2: Tokenizer) -> None:
    lines = [f"Line NUMBER {n}   of some text" for n in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(["short", *lines, *lines]))
    build(tmp_path / "out", tmp_path / "a.txt", mypt_clean=True, no_eot=True)
    ids = np.concatenate([tokens(tmp_path / "out", "train"), tokens(tmp_path / "out", "val")])
    expected = "".join(f"line number {n} of some text\n" for n in range(50))
    assert gpt2.decode(ids) == expected
    by_line = [token for line in expected.splitlines(True) for token in gpt2.encode(line)]
    assert ids.tolist() == by_line


def test_mypt_clean_recognises_special_tokens_as_mypt_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<myPT_user>one two three four five</myPT_user>\n")
    build(tmp_path / "out", tmp_path / "a.txt", mypt_clean=True, no_normalize=True)
    assert tokens(tmp_path / "out", "train")[0] == 50259


def test_memory_does_not_grow_with_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_CHARS", 1 << 15)
    row = json.dumps({"text": "A row of some length, and all of them different: "}) + "\n"
    peaks = []
    for n, rows in enumerate((2_000, 20_000)):
        path = tmp_path / f"{n}.jsonl"
        path.write_text("".join(row.replace("different", str(i)) for i in range(rows)))
        tracemalloc.start()
        build(tmp_path / str(n), path, encoder="tiktoken", workers=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 18,000 documents more, each 16 bytes in the digests (and again where two parts are merged)
    # and 8 in the index of its shard.
    assert peaks[1] - peaks[0] < 18_000 * 60


@pytest.mark.parametrize("where", ["white", "nowhere"])
def test_the_beginning_of_a_long_text_is_checked(gpt2: Tokenizer, where: str) -> None:
    text = ("word " if where == "white" else "words") * 20_000
    tokens_ = gpt2.encode_to_numpy(text).copy()
    unit = encoding.Unit([documents.Piece(text, "train", True, True)], 0, {}, {})
    encoder = encoding.Encoder(gpt2, np.dtype("<u2"), None, False, lambda texts: [tokens_])
    assert encoder(unit).verified == 1
    tokens_[50] += 1
    with pytest.raises(IntegrityError, match="not those of the tokenizer"):
        encoder(unit)


# --- split


def test_a_single_document_gives_its_end_to_validation(tmp_path: Path, gpt2: Tokenizer) -> None:
    text = "".join(f"Sentence number {n} of a book. " for n in range(300))
    (tmp_path / "book.txt").write_text(text)
    metadata = build(tmp_path / "out", tmp_path / "book.txt", tokens_per_shard=500)
    check_whole(tmp_path / "out", metadata)
    train, val = tokens(tmp_path / "out", "train"), tokens(tmp_path / "out", "val")
    assert gpt2.decode([*train, *val]) == text + "<|endoftext|>"
    assert len(val) == round(0.1 * (len(train) + len(val)))
    assert metadata["split_rule"] == "by document, then a tail"
    assert (metadata["num_train_documents"], metadata["num_val_documents"]) == (1, 0)


@pytest.mark.parametrize("start", ["train", "val"])
def test_too_few_documents_move_as_wholes_where_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    monkeypatch.setattr(documents, "split_of", lambda text, fraction: start)
    rows = [json.dumps({"text": f"one two three four {n}"}) for n in range(20)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    metadata = build(tmp_path / "out", tmp_path / "x.jsonl", tokens_per_shard=13)
    check_whole(tmp_path / "out", metadata)
    assert metadata["split_rule"] == "by document, then a tail of whole ones"
    assert (metadata["num_train_documents"], metadata["num_val_documents"]) == (18, 2)
    assert len(split_at(tokens(tmp_path / "out", "train"))) == 18
    assert len(split_at(tokens(tmp_path / "out", "val"))) == 2


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("words", [1, 2, 9])
def test_neither_split_is_ever_empty(tmp_path: Path, fraction: float, words: int) -> None:
    (tmp_path / "a.txt").write_text(" word" * words)
    metadata = build(tmp_path / "out", tmp_path / "a.txt", val_fraction=fraction)
    check_whole(tmp_path / "out", metadata)


# --- the demo


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "lib"
    root.mkdir()
    for n in range(40):
        (root / f"m{n}.py").write_text(f"def f{n}():\n    return {n}\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


def test_the_demo_dataset_is_built_once_and_again_when_it_must(
    small_library: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data" / "demo"
    built: list[str] = []

    def ensure(tokenization: str = "char") -> int:
        built.clear()
        assert ensure_demo_dataset(out, tokenization, lambda phase, *_: built.append(phase)) == out
        return len(built)

    assert ensure() > 0
    metadata = json.loads((out / "dataset_metadata.json").read_text())
    check_whole(out, metadata)
    assert metadata["split_rule"] == "by file"
    assert metadata["num_train_documents"] + metadata["num_val_documents"] == 40
    assert metadata["skipped_undecodable_files"] == 1
    assert ensure() == 0
    assert ensure("gpt2") > 0
    (out / "train" / "shard_00000.bin").write_bytes(b"")
    assert ensure("gpt2") > 0
    (small_library / "new.py").write_text("x = 1\n")
    assert ensure("gpt2") > 0
    assert ensure("gpt2") == 0


def test_the_demo_never_replaces_a_dataset_of_ones_own(
    small_library: Path, texts: Path, tmp_path: Path
) -> None:
    mine = build(tmp_path / "out", texts)
    with pytest.raises(DataError, match="other inputs"):
        ensure_demo_dataset(tmp_path / "out", "gpt2")
    check_whole(tmp_path / "out", mine)
