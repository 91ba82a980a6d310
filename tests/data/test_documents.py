"""Reading, cutting and cleaning text in bounded memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data import documents
from mypt_fast.data.corpus import Source, find_inputs
from mypt_fast.data.documents import LineCleaning, Piece, Reader, clean_lines, cut
from mypt_fast.errors import DataError
from mypt_fast.tokenizer import Tokenizer

# Everything the pre-tokenisation treats specially: contractions, runs of each class, all white.
SPIKY = st.lists(
    st.sampled_from(
        [*"aBé漢0１²'_-.,!😀\u0301 \n\t\r\u00a0\u2028\u1680\u0085\x1c\u200b", "'s", " '"]
    ),
    min_size=1,
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(["it's the test's 100 tests\n\n  we'll  test\t" * 20], 330)


@settings(max_examples=250, deadline=None)
@given(left=SPIKY, right=SPIKY)
def test_cutting_where_it_is_allowed_changes_no_token(
    gpt2: Tokenizer, bpe: Tokenizer, left: str, right: str
) -> None:
    text = left + right
    for at in range(1, len(text)):
        if documents.is_before_white(text, at) or documents.is_before_mark(text, at):
            for tokenizer in (gpt2, bpe):
                parts = tokenizer.encode_ordinary(text[:at]) + tokenizer.encode_ordinary(text[at:])
                assert parts == tokenizer.encode_ordinary(text)


def test_pieces_of_a_long_document_encode_like_the_whole(gpt2: Tokenizer) -> None:
    text = Path(documents.__file__).read_text()
    blocks = [text[n : n + 1000] for n in range(0, len(text), 1000)]
    pieces = list(cut(blocks, 300))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 300
    assert len(pieces) > len(text) / 300
    tokens = [token for piece in pieces for token in gpt2.encode_ordinary(piece)]
    assert tokens == gpt2.encode_ordinary(text)


def test_a_document_that_fits_is_not_cut_and_a_boundless_one_is() -> None:
    assert list(cut(["ab c", "de f"], 8)) == ["ab cde f"]
    assert list(cut(["x" * 25], 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(cut(["aaaa.bbbb,cccc"], 6)) == ["aaaa", ".bbbb", ",cccc"]
    assert list(cut([], 5)) == list(cut([""], 5)) == []


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), size=st.integers(1, 7))
def test_blocks_of_any_size_decode_to_the_same_text(text: str, size: int) -> None:
    assert "".join(cut([text[n : n + size] for n in range(0, len(text), size)], 5)) == text


def read(sources: list[Source], **options: object) -> list[Piece]:
    return list(Reader(**options).pieces(sources))  # type: ignore[arg-type]


def test_characters_split_across_reads_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "READ_BYTES", 3)
    (tmp_path / "a.txt").write_bytes("é漢😀\r\n\ufeff end".encode())
    (piece,) = read(find_inputs([str(tmp_path)]))
    assert piece.text == "é漢😀\r\n\ufeff end"
    assert (piece.starts, piece.ends) == (True, True)


@pytest.mark.parametrize(
    ("data", "offset"),
    [(b"abc\0def", 3), (b"abcd\xff\xfe", 4), (b"abcdefg\xc3", 7), (b"ab\xe6\xbcX", 2)],
)
def test_binary_junk_is_refused_with_file_and_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, offset: int
) -> None:
    (tmp_path / "junk.txt").write_bytes(data)
    for size in (2, 3, 1 << 20):
        monkeypatch.setattr(documents, "READ_BYTES", size)
        with pytest.raises(DataError, match=rf"junk\.txt; .* at byte {offset}: not a UTF-8"):
            read(find_inputs([str(tmp_path / "junk.txt")]))


def test_a_demo_file_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    paths[0].write_bytes(b"# caf\xe9\n")
    paths[1].write_text("x = 1\n")
    reader = Reader()
    pieces = list(reader.pieces([Source(str(p), p, split="train", is_demo=True) for p in paths]))
    assert [piece.text for piece in pieces] == ["x = 1\n"]
    assert reader.skipped_undecodable == 1


def jsonl(path: Path, *lines: str) -> list[Source]:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return find_inputs([str(path)])


def test_each_jsonl_row_is_a_document(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {n}\nmore"}) for n in range(3)]
    reader = Reader()
    pieces = list(reader.pieces(jsonl(tmp_path / "x.jsonl", rows[0], "", rows[1], '{"text": ""}')))
    assert [piece.text for piece in pieces] == ["row 0\nmore", "row 1\nmore"]
    assert reader.skipped_empty == 1
    (piece,) = read(jsonl(tmp_path / "y.jsonl", '{"body": "b", "text": 3}'), text_field="body")
    assert piece.text == "b"
    (piece,) = read(jsonl(tmp_path / "z.jsonl", r'{"text": "a\ud800b \ud83d\ude00"}'))
    assert piece.text == "a\ufffdb 😀"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ('{"body": "x", "id": 1}', "has no field 'text'; it has body, id"),
        ('{"text": 3}', "field 'text' is a int"),
        ("[1]", "is a list"),
        ('{"text": "x"', "is not JSON"),
        ("[" * 200_000, "is not JSON"),
    ],
)
def test_a_bad_jsonl_row_is_named_by_its_line(tmp_path: Path, row: str, found: str) -> None:
    sources = jsonl(tmp_path / "x.jsonl", '{"text": "fine"}', "", row)
    with pytest.raises(DataError, match=f"x.jsonl line 3; {found}"):
        read(sources)


def test_an_endless_jsonl_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_ROW_BYTES", 100)
    with pytest.raises(DataError, match="line 1; is longer than"):
        read(jsonl(tmp_path / "x.jsonl", json.dumps({"text": "x" * 200})))


def test_gzip_is_read_and_a_truncated_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(bytes(range(32, 127)) * 50)
    path.write_bytes(data)
    (piece,) = read(find_inputs([str(path)]))
    assert piece.text == "".join(map(chr, range(32, 127))) * 50
    for broken in (data[:60], b"not gzip at all"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.txt\.gz"):
            read(find_inputs([str(path)]))


def test_a_file_that_vanishes_is_one_error(tmp_path: Path) -> None:
    sources = jsonl(tmp_path / "x.txt", "text")
    (tmp_path / "x.txt").unlink()
    with pytest.raises(DataError, match=r"x\.txt; No such file"):
        read(sources)


def test_equal_documents_get_the_same_split() -> None:
    assert documents.split_of("same", 0.5) == documents.split_of("same", 0.5)
    share = sum(documents.split_of(f"document {n}", 0.1) == "val" for n in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_the_first_documents_are_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "split_of", lambda text, fraction: "val")
    sources = jsonl(tmp_path / "x.jsonl", *[json.dumps({"text": "a"})] * 6)
    reader = Reader(val_fraction=0.3)
    for _ in range(2):
        splits = [piece.split for piece in reader.pieces(sources)]
        assert splits == ["train"] * 4 + ["val"] * 2


def test_a_long_documents_pieces_share_a_split_and_mark_their_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    pieces = read(find_inputs([str(tmp_path)]), block_chars=50)
    assert len({piece.split for piece in pieces}) == 1
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


# --- MyPT's line pipeline

LINES = [
    "  A Line   of TEXT that is kept  ",
    "too short a b c",
    "onlyonewordwithoutanyspacesinit",
    "a line of text that is kept",
    "x y z " + "w" * 2000,
    "Another line of text that is kept\r",
]


@pytest.mark.parametrize(
    ("cleaning", "kept"),
    [
        (
            LineCleaning(),
            ["a line of text that is kept", "another line of text that is kept"],
        ),
        (
            LineCleaning(normalize=False),
            ["A Line   of TEXT that is kept", LINES[3], LINES[5].strip()],
        ),
        (
            LineCleaning(dedup=False),
            [LINES[3], LINES[3], "another line of text that is kept"],
        ),
        (LineCleaning(False, False, False), [line.strip() for line in LINES]),
    ],
)
def test_the_line_pipeline_and_its_switches(cleaning: LineCleaning, kept: list[str]) -> None:
    text = "\n".join(LINES)
    blocks = [text[n : n + 7] for n in range(0, len(text), 7)]
    assert "".join(clean_lines(blocks, cleaning, set())) == "".join(f"{line}\n" for line in kept)


def test_repeated_lines_are_found_across_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the very same line of text\n")
    reader = Reader(cleaning=LineCleaning())
    for _ in range(2):
        assert len(list(reader.pieces(find_inputs([str(tmp_path)])))) == 1
        assert reader.skipped_empty == 1


def test_a_huge_document_needs_only_a_few_blocks_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "READ_BYTES", 1 << 16)
    path = tmp_path / "huge.txt"
    path.write_bytes(b"one line without end " * 400_000)  # 8.4 MB, no newline

    def sizes() -> Iterator[int]:
        for piece in Reader(block_chars=1 << 16).pieces(find_inputs([str(path)])):
            yield len(piece.text)

    tracemalloc.start()
    total = sum(sizes())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == path.stat().st_size
    assert peak < 1 << 20
