"""Finding inputs: what a name stands for, and the demo corpus."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mypt_fast.data.corpus import find_inputs, fingerprint, stdlib_files, stdlib_sources
from mypt_fast.errors import DataError


def names(sources: list) -> list[str]:
    return [Path(source.name).name for source in sources]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "c.jsonl", "d.txt.gz", "e.bin", "sub/f.py", ".git/g.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    return tmp_path


def test_a_directory_is_searched_for_text_in_name_order(tree: Path) -> None:
    sources = find_inputs([str(tree)])
    assert names(sources) == ["a.md", "b.txt", "c.jsonl", "d.txt.gz", "f.py"]
    assert [source.is_jsonl for source in sources] == [False, False, True, False, False]
    assert [source.is_gzip for source in sources] == [False, False, False, True, False]
    assert {source.split for source in sources} == {None}


def test_a_named_file_may_have_any_suffix_and_counts_once(tree: Path) -> None:
    sources = find_inputs([str(tree / "e.bin"), str(tree / "b.txt"), str(tree), str(tree / "*.md")])
    assert names(sources) == ["e.bin", "b.txt", "a.md", "c.jsonl", "d.txt.gz", "f.py"]


def test_patterns_expand_sorted_and_recursively(tree: Path) -> None:
    assert names(find_inputs([str(tree / "*.txt*")])) == ["b.txt", "d.txt.gz"]
    assert names(find_inputs([str(tree / "**" / "*.py")])) == ["f.py"]


def test_a_file_named_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(find_inputs([str(tmp_path / "a[1].txt")])) == ["a[1].txt"]


def test_stdin_and_pipes_are_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    stdin, pipe = find_inputs(["-", str(tmp_path / "pipe"), "-"])
    assert stdin.path is None
    assert stdin.once
    assert pipe.once


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("nowhere.txt", "No such file"),
        ("nothing-*.txt", "matches no file"),
        ("empty", "holds no text file"),
        ("nul\0.txt", "null|NUL|No such file"),
    ],
)
def test_an_input_that_is_not_there_is_named(tmp_path: Path, entry: str, found: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=found) as caught:
        find_inputs([str(tmp_path / entry)])
    assert entry in str(caught.value)


def test_devices_and_no_input_at_all_are_refused() -> None:
    with pytest.raises(DataError, match="neither a file"):
        find_inputs(["/dev/null"])
    with pytest.raises(DataError, match="no input"):
        find_inputs([])


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "python3"
    skipped = ("test/t.py", "json/tests/t.py", "idlelib/i.py", "site-packages/p/q.py")
    for name in [f"m{n}.py" for n in range(24)] + ["json/decoder.py", "data.txt", *skipped]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return root


def test_the_demo_corpus_leaves_out_tests_and_installed_packages(library: Path) -> None:
    found = {path.relative_to(library).as_posix() for path, _ in stdlib_files(library)}
    assert found == {f"m{n}.py" for n in range(24)} | {"json/decoder.py"}


def test_the_demo_corpus_is_in_hash_order_with_every_tenth_file_for_validation(
    library: Path,
) -> None:
    files = stdlib_files(library)
    assert [split for _, split in files] == (["train"] * 9 + ["val"]) * 2 + ["train"] * 5
    assert files == stdlib_files(library)
    assert [path for path, _ in files] != sorted(path for path, _ in files)


def test_a_missing_library_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0 source files.*--input_files"):
        stdlib_files(tmp_path)


def test_this_pythons_library_is_a_corpus_of_megabytes() -> None:
    sources = stdlib_sources()
    assert sum(source.size for source in sources) > 5_000_000
    assert not any("site-packages" in source.name for source in sources)
    assert 0.05 < sum(source.split == "val" for source in sources) / len(sources) < 0.15


def test_the_fingerprint_changes_with_the_files(tree: Path) -> None:
    before = fingerprint(find_inputs([str(tree)]))
    assert before == fingerprint(find_inputs([str(tree)]))
    (tree / "b.txt").write_text("longer")
    assert fingerprint(find_inputs([str(tree)])) != before


def test_listing_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=find_inputs, args=([str(tmp_path / "pipe")],), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
