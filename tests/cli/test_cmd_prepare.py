"""`mypt-fast prepare`: its flags, its summary, its progress."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from mypt_fast.cli import cmd_prepare
from mypt_fast.data.prepare import PrepareOptions
from mypt_fast.errors import DataError


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n:02d}.txt").write_text(f"Document {n}\n")
    return folder


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cmd_prepare.add_flags(parser)
    return parser.parse_args(words)


def test_the_command_prints_a_summary_or_the_metadata(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert (
        cmd_prepare.run(parse(str(texts / "01.txt"), "--out_dir", out, "--input_files", str(texts)))
        == 0
    )
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == f"dataset     {out}"
    assert shown.out.splitlines()[-2].endswith(f"--dataset_dir {out}")
    assert shown.out.splitlines()[-1] == "documents: 30, exact duplicates: 0 (0.0 %)"
    assert shown.err.startswith("encode ")
    assert (
        cmd_prepare.run(
            parse("--input_files", str(texts), "--out_dir", out, "--json", "--overwrite")
        )
        == 0
    )
    written = json.loads((tmp_path / "out" / "dataset_metadata.json").read_text())
    assert json.loads(capsys.readouterr().out) == written


@pytest.mark.parametrize(
    ("n_texts", "kind", "line"),
    [
        (
            1,
            "gpt2",
            "1 sampled text: tiktoken gives the same tokens, and they decode",
        ),
        (
            3,
            "gpt2",
            "3 sampled texts: tiktoken gives the same tokens, and they decode",
        ),
        (1, "char", "1 sampled text: the first tokens decode to the same"),
    ],
)
def test_the_summary_says_what_was_checked_in_singular_and_plural(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    n_texts: int, kind: str, line: str,
) -> None:  # fmt: skip
    words = [str(path) for path in sorted(texts.iterdir())[:n_texts]]
    words += ["--out_dir", str(tmp_path / "out"), "--tokenization", kind]
    assert cmd_prepare.run(parse(*words)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [found for found in lines if found.startswith("checked")] == [f"checked     {line}"]
    train, val = (next(x for x in lines if x.startswith(split)) for split in ("train ", "val "))
    assert train.endswith(", 1 shard")
    assert f"{n_texts} document{'s' * (n_texts > 1)}" in train + val


def test_on_a_terminal_there_is_a_bar(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    words = (str(texts), "--out_dir", str(tmp_path / "out"), "--tokenization", "char")
    assert cmd_prepare.run(parse(*words)) == 0
    shown = capsys.readouterr()
    assert "read vocabulary: 100%" in shown.err
    assert "encode: 100%" in shown.err


def test_mypts_habitual_switches_alone_are_noted_not_obeyed(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cmd_prepare.run(parse(str(texts), "--out_dir", str(tmp_path / "o"), "--no_dedup")) == 0
    assert "--no_dedup without --mypt_clean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"), [(("x.txt",), "--out_dir"), (("--out_dir", "x"), "no input")]
)
def test_the_command_says_what_is_missing(words: tuple[str, ...], found: str) -> None:
    with pytest.raises(DataError, match=found):
        cmd_prepare.run(parse(*words))


def test_every_option_is_a_flag_with_the_same_default(tmp_path: Path) -> None:
    args = vars(parse())
    for name, default in vars(PrepareOptions("out")).items():
        assert name in args
        if name not in ("out_dir", "input_files"):
            assert args[name] == default
