"""Preparing datasets: what is written, how it is split, and that it is whole or absent."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from plain_shards import read_native, tokens

from mypt_fast import publish
from mypt_fast.data import documents, encoding, prepare
from mypt_fast.data.prepare import PrepareOptions, ensure_demo_dataset
from mypt_fast.errors import DataError, IntegrityError
from mypt_fast.tokenizer import Tokenizer

EOT = 50256


def build(out: Path, *inputs: Path | str, **options: Any) -> dict[str, Any]:
    return prepare.prepare(PrepareOptions(out, tuple(map(str, inputs)), **options))


def split_at(ids: np.ndarray, end: int = EOT) -> list[list[int]]:
    ends = np.flatnonzero(ids == end)
    assert ends[-1] == len(ids) - 1
    return [part[:-1].tolist() for part in np.split(ids, ends[:-1] + 1)]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty small documents with line ends, spaces and Unicode that cleaning would change."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(60):
        text = f"Document {n}\r\n\r\n  It's  MIXED   case, café 漢😀\t{'x' * n}\n\n"
        (folder / f"{n:02d}.txt").write_bytes(text.encode())
    return folder


def originals(folder: Path) -> list[str]:
    return [path.read_bytes().decode() for path in sorted(folder.iterdir())]


def check_whole(out: Path, metadata: dict[str, Any]) -> None:
    """Every promise of the metadata holds for the files."""
    assert json.loads((out / "dataset_metadata.json").read_text()) == metadata
    assert sorted(os.listdir(out)) == [
        "dataset_metadata.json",
        "tokenizer_state.json",
        "train",
        "val",
    ]
    for split in ("train", "val"):
        shards = [s for s in metadata["shards"] if s["name"].startswith(f"{split}/")]
        assert [s["name"] for s in shards] == [
            f"{split}/shard_{n:05d}.bin" for n in range(len(shards))
        ]
        assert len(os.listdir(out / split)) == len(shards) == metadata[f"{split}_shards"]
        for shard in shards:
            check_shard(out, shard, metadata)
        sizes = [shard["tokens"] for shard in shards]
        assert all(size == metadata["tokens_per_shard"] for size in sizes[:-1])
        assert sum(sizes) == metadata[f"num_{split}_tokens"] > 0
    everything = np.concatenate([tokens(out, "train"), tokens(out, "val")])
    assert metadata["total_tokens"] == len(everything)
    assert metadata["max_token"] == everything.max() < metadata["vocab_size"]


def check_shard(out: Path, shard: dict[str, Any], metadata: dict[str, Any]) -> None:
    path = out / shard["name"]
    if metadata["format"] == "mypt":
        assert metadata["dtype"] == "uint32"
        assert path.stat().st_size == 4 * shard["tokens"]
        assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == shard["xxh3_128"]
        return
    found = read_native(path)
    assert found.header["n_tokens"] == shard["tokens"]
    assert found.header["payload_hash"].hex() == shard["xxh3_128"]
    assert found.header["vocab_size"] == metadata["vocab_size"]
    assert metadata["dtype"] == found.tokens.dtype.name == "uint16"
    state = json.loads((out / "tokenizer_state.json").read_text())
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    assert found.header["tokenizer"] == hashlib.sha256(canonical).digest()
    eot = Tokenizer.from_state(state).eot_id
    if eot is not None and not metadata["options"]["no_eot"]:
        assert found.header["eot_id"] == eot
        expected = (np.flatnonzero(found.tokens == eot) + 1).tolist()
        if not expected or expected[-1] != shard["tokens"]:
            expected.append(shard["tokens"])  # the last document goes on in the next shard
        assert found.ends == expected


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


# --- whole or absent


def test_an_interrupted_run_leaves_nothing_behind(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(PrepareOptions(tmp_path / "out", (str(texts),)), progress)
    assert os.listdir(tmp_path) == ["texts"]


def test_an_interrupted_replacement_keeps_the_old_dataset(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build(tmp_path / "out", texts)

    def fail(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_json", fail)
    with pytest.raises(DataError, match=r"--out_dir .*No space left on device.*make room"):
        build(tmp_path / "out", texts, tokens_per_shard=50)
    check_whole(tmp_path / "out", before)
    assert sorted(os.listdir(tmp_path)) == ["out", "texts"]


@pytest.mark.parametrize("has_exchange", [True, False])
def test_a_replacement_that_fails_at_the_last_step_puts_the_old_dataset_back(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    before = build(tmp_path / "out", texts)
    rename = os.rename

    def fail_to_publish(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    def refuse(a: Path, b: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.rename", fail_to_publish)
    monkeypatch.setattr(publish, "_exchange", refuse if has_exchange else lambda a, b: False)
    with pytest.raises(DataError, match="Permission denied"):
        build(tmp_path / "out", texts, tokens_per_shard=50)
    check_whole(tmp_path / "out", before)
    assert sorted(os.listdir(tmp_path)) == ["out", "texts"]


def test_a_linked_output_directory_is_followed(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    check_whole(tmp_path / "disk", build(tmp_path / "out", texts))
    assert (tmp_path / "out").is_symlink()


def test_what_a_killed_run_left_is_removed_and_a_half_replacement_undone(
    texts: Path, tmp_path: Path
) -> None:
    before = build(tmp_path / "out", texts)
    here = socket.gethostname()
    os.rename(tmp_path / "out", tmp_path / f".out.old-{here}-999999999")
    left = [f".out.tmp-{here}-1", ".out.tmp-elsewhere-999999999", ".other.tmp-999999999"]
    for name in (*left, f".out.tmp-{here}-999999999"):
        (tmp_path / name).mkdir()  # of a living process, another machine, another dataset
    with pytest.raises(DataError, match="other inputs"):
        build(tmp_path / "out", texts / "01.txt")
    check_whole(tmp_path / "out", before)
    assert build(tmp_path / "out", texts) == before
    check_whole(tmp_path / "out", before)
    assert sorted(os.listdir(tmp_path)) == sorted([*left, "out", "texts"])


def test_other_inputs_need_overwrite_and_the_same_do_not(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build(out, texts)
    assert build(out, texts) == first
    assert build(out, texts, tokens_per_shard=100)["train_shards"] > 1
    (texts / "new.txt").write_text("more")
    with pytest.raises(DataError, match=r"other inputs.*--overwrite"):
        build(out, texts)
    assert build(out, texts, overwrite=True)["num_files"] == 61
    check_whole(out, build(out, texts))


@pytest.mark.parametrize("foreign", ["notes.txt", "dataset_metadata.json", "train/shard_00000.bin"])
def test_a_directory_that_is_no_dataset_of_ours_is_never_replaced(
    texts: Path, tmp_path: Path, foreign: str
) -> None:
    path = tmp_path / "out" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(DataError, match="no dataset of ours"):
        build(tmp_path / "out", texts, overwrite=True)
    assert path.read_text() == "{}"


def test_a_dataset_with_a_strangers_file_is_not_replaced(texts: Path, tmp_path: Path) -> None:
    build(tmp_path / "out", texts)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt, no part of a dataset"):
        build(tmp_path / "out", texts, overwrite=True)


def test_an_empty_directory_is_filled(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_whole(tmp_path / "out", build(tmp_path / "out", texts))


# --- what cannot be used


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"tokenization": "word"}, "--tokenization word"),
        ({"format": "parquet"}, "--format parquet"),
        ({"encoder": "fastest"}, "--encoder fastest"),
        ({"val_fraction": 0.0}, "--val_fraction 0.0"),
        ({"val_fraction": 1.0}, "--val_fraction 1.0"),
        ({"val_fraction": float("nan")}, "--val_fraction nan"),
        ({"tokens_per_shard": 0}, "--tokens_per_shard 0"),
        ({"workers": 0}, "--workers 0"),
        ({"demo": True}, "--demo"),
        ({"tokenization": "bpe", "vocab_size": 10}, "--vocab_size 10"),
    ],
)
def test_impossible_options_are_one_error(
    texts: Path, tmp_path: Path, options: dict[str, Any], found: str
) -> None:
    with pytest.raises(DataError, match=found):
        build(tmp_path / "out", texts, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokenization", ["gpt2", "char", "bpe"])
@pytest.mark.parametrize("kind", ["empty", "cleaned"])
def test_inputs_without_text_are_refused(tmp_path: Path, tokenization: str, kind: str) -> None:
    (tmp_path / "a.txt").write_text("" if kind == "empty" else "short\n")
    with pytest.raises(DataError, match="fewer than two tokens"):
        build(
            tmp_path / "out",
            tmp_path / "a.txt",
            tokenization=tokenization,
            mypt_clean=kind == "cleaned",
        )
    assert os.listdir(tmp_path) == ["a.txt"]


def test_binary_junk_and_bad_rows_stop_the_run_and_name_the_place(
    texts: Path, tmp_path: Path
) -> None:
    (texts / "99.txt").write_bytes(b"text \0 more")
    with pytest.raises(DataError, match=r"99\.txt; has a NUL byte at byte 5"):
        build(tmp_path / "out", texts)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl line 2; has no field 'text'"):
        build(tmp_path / "out", tmp_path / "x.jsonl")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_one_error(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--out_dir /proc/nowhere/x"):
        build(Path("/proc/nowhere/x"), texts)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="not a directory"):
        build(tmp_path / "file", texts)
    with pytest.raises(DataError, match=r"--out_dir .*file/x"):
        build(tmp_path / "file" / "x", texts)


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
