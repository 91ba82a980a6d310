"""What prepare does when it is stopped, or asked for what cannot be."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from prepared import build, check_whole

from mypt_fast import publish
from mypt_fast.data import prepare
from mypt_fast.data.prepare import PrepareOptions
from mypt_fast.errors import DataError

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
def test_a_replacement_that_fails_at_the_last_step_keeps_both_datasets(
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

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", fail_to_publish)
        patch.setattr(publish, "_exchange", refuse if has_exchange else lambda a, b: False)
        with pytest.raises(DataError, match="Permission denied"):
            build(tmp_path / "out", texts, tokens_per_shard=50)
    check_whole(tmp_path / "out", before)
    assert len(list(tmp_path.glob(".out.tmp-*"))) == 1
    check_whole(tmp_path / "out", build(tmp_path / "out", texts, tokens_per_shard=50))
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


@pytest.mark.parametrize("tokenization", ["gpt2", "char"])
def test_a_closed_standard_input_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenization: str
) -> None:
    monkeypatch.setattr("sys.stdin", None)  # what Python makes of `<&-`
    with pytest.raises(DataError, match=r"input -; standard input is closed; "):
        build(tmp_path / "out", "-", tokenization=tokenization)
    assert os.listdir(tmp_path) == []


def test_a_share_that_has_no_inverse_still_gives_both_splits(texts: Path, tmp_path: Path) -> None:
    metadata = build(tmp_path / "out", texts, val_fraction=1e-320)
    assert metadata["num_val_tokens"] == 1
    check_whole(tmp_path / "out", metadata)


def test_metadata_that_is_a_pipe_is_refused_without_waiting_for_a_writer(
    texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "dataset_metadata.json")

    def too_late(*_: object) -> None:
        raise AssertionError("waited for a writer")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    try:
        with pytest.raises(DataError, match=r"no dataset of ours \(dataset_metadata\.json\)"):
            build(tmp_path / "out", texts)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
