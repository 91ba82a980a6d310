"""A preparation killed at any moment goes on, and gives what it gives without being killed."""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import json
import os
import random
import resource
import signal
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from killed import content, events_of, killed_at, options
from plain_shards import is_native, read_native, tokens

from mypt_fast import publish
from mypt_fast.data import encoding, journal, prepare
from mypt_fast.data.documents import Reader
from mypt_fast.errors import DataError
from mypt_fast.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and units of a few hundred characters, so that small inputs have many.

    Processes are killed here, not machines: no need to wait for the disk.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(prepare.fast_gpt2, "choose", lambda wanted: (None, "tiktoken"))
    monkeypatch.setattr(encoding, "BLOCK_CHARS", 300)
    monkeypatch.setattr(prepare, "Reader", functools.partial(Reader, block_chars=250))


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, ...]:
    """Files, rows, a document of many pieces, and repeated documents of both kinds."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n:02d}.txt").write_text(f"Document number {n % 9} says\nwhat it says.\n" * 4)
    long = "".join(f"Sentence {n} of a long text. " for n in range(120))
    (folder / "20.txt").write_text(long)
    (folder / "21.txt").write_text(long)
    rows = [{"text": f"A row with the number {n % 30} in it"} for n in range(60)]
    (folder / "30.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "40.txt").write_text("")
    return (str(folder),)


CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "mypt format": {"format": "mypt"},
    "dedup": {"dedup": True},
    "char": {"tokenization": "char"},
    "bpe": {"tokenization": "bpe", "vocab_size": 290},
    "clean": {"mypt_clean": True, "no_filter": True},
    "much validation": {"val_fraction": 0.7},
    "little validation": {"val_fraction": 0.01},
    "one shard": {"tokens_per_shard": 1_000_000},
}


def some(cases: dict[str, Any], quick: tuple[str, ...]) -> list[Any]:
    """The cases as parameters; two seconds each, so that most are of the slow tier."""
    return [pytest.param(c, marks=() if c in quick else pytest.mark.slow) for c in cases]


@pytest.mark.parametrize("case", some(CASES, ("gpt2", "dedup", "char")))
def test_killed_anywhere_the_dataset_comes_out_the_same(
    inputs: tuple[str, ...], tmp_path: Path, case: str
) -> None:
    whole = options(tmp_path / "whole", inputs, **CASES[case])
    n_events = events_of(whole)
    expected = content(tmp_path / "whole")
    draw = random.Random(case)
    # The end is where shards are cut, moved and published: every step of it, and some before.
    moments = {*draw.sample(range(1, n_events), 6), *range(n_events - 12, n_events + 1)}
    for n, event in enumerate(sorted(moments)):
        run = options(tmp_path / "out" / str(n), inputs, **CASES[case])
        (tmp_path / "out").mkdir(exist_ok=True)
        assert killed_at(event, run)
        prepare.prepare(run)
        assert content(tmp_path / "out" / str(n)) == expected, event
        assert sorted(os.listdir(tmp_path / "out")) == sorted(map(str, range(n + 1)))


@pytest.mark.parametrize("owner", ["reused number", "renamed machine", "rebooted", "no locks"])
def test_a_dead_run_is_continued_whatever_its_name_says(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    n_events = events_of(options(tmp_path / "whole", inputs))
    run = options(tmp_path / "out", inputs)
    if owner == "no locks":
        refused = OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=refused))
    assert killed_at(n_events * 3 // 4, run)
    (left,) = tmp_path.glob(".out.tmp-*")
    if owner == "renamed machine":
        left.rename(tmp_path / ".out.tmp-elsewhere-4")
    elif owner != "no locks":
        left.rename(tmp_path / f".out.tmp-{socket.gethostname()}-{os.getppid()}")
    if owner == "rebooted":
        monkeypatch.setattr(publish, "_boot", lambda: b"another")
    notes: list[str] = []
    prepare.prepare(run, note=notes.append)
    assert [note.split(" ")[0] for note in notes] == ["continuing"]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("owner", ["locked", "another machine", "no locks"])
def test_a_run_that_may_live_is_left_alone_and_named(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    n_events = events_of(options(tmp_path / "whole", inputs))
    run = options(tmp_path / "out", inputs)
    assert killed_at(n_events * 3 // 4, run)
    (left,) = tmp_path.glob(".out.tmp-*")
    held = None
    if owner == "locked":
        held = (left / publish.LOCK_NAME).open("rb")
        fcntl.flock(held, fcntl.LOCK_EX)
    elif owner == "another machine":
        left = left.rename(tmp_path / ".out.tmp-elsewhere-4")
        monkeypatch.setattr(publish, "_boot", lambda: b"another")
    else:
        left = left.rename(tmp_path / f".out.tmp-{socket.gethostname()}-{os.getppid()}")
        refused = OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=refused))
    before = content(left)
    notes: list[str] = []
    prepare.prepare(run, note=notes.append)
    (note,) = notes
    assert note.startswith(f"{left} is left alone: ")
    assert content(left) == before
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    if held is not None:
        held.close()
        assert publish.left_alone(tmp_path / "out") == []


def test_a_run_that_is_killed_again_and_again_comes_to_an_end(
    inputs: tuple[str, ...], tmp_path: Path
) -> None:
    whole = options(tmp_path / "whole", inputs, dedup=True)
    n_events = events_of(whole)
    run = options(tmp_path / "out", inputs, dedup=True, workers=3)
    kills = 0
    while killed_at(40, run):
        kills += 1
        assert kills < n_events
    assert kills > 5
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "texts", "whole"]


def test_what_was_done_is_not_done_again(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = options(tmp_path / "out", inputs)
    n_events = events_of(options(tmp_path / "whole", inputs))
    encoded: list[str] = []
    encode = Tokenizer.encode_to_numpy

    def counted(self: Tokenizer, text: str) -> Any:
        encoded.append(text)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode_to_numpy", counted)
    prepare.prepare(options(tmp_path / "again", inputs))
    everything = sum(map(len, encoded))
    encoded.clear()
    notes: list[str] = []
    assert killed_at(n_events * 3 // 4, run)
    metadata = prepare.prepare(run, note=notes.append)
    assert 0 < sum(map(len, encoded)) < everything / 2
    (note,) = notes
    assert note.startswith("continuing an interrupted run after ")
    done = int(note.split()[-2].replace(",", ""))
    assert metadata["total_tokens"] / 2 < done < metadata["total_tokens"]


@pytest.mark.parametrize("change", ["options", "input", "short index", "open shard", "torn", "odd"])
def test_a_run_that_does_not_fit_is_never_continued(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    more: dict[str, Any] = {}
    if change == "open shard":
        monkeypatch.setattr("mypt_fast.data.build.CHECKPOINT_TOKENS", 100)
        more = {"tokens_per_shard": 1_000_000}
    n_events = events_of(options(tmp_path / "whole", inputs, **more))
    run = options(tmp_path / "out", inputs, **more)
    assert killed_at(n_events * 3 // 4, run)
    (left,) = tmp_path.glob(".out.tmp-*")
    if change == "options":
        run = options(tmp_path / "out", inputs, no_eot=True)
    elif change == "input":
        Path(inputs[0], "30.jsonl").write_text('{"text": "other rows than before"}\n')
    elif change == "short index":
        os.truncate(left / "train.documents", 5)
    elif change == "open shard":
        os.truncate(max((left / "train").iterdir()), 4096)
    elif change == "odd":
        with (left / journal.JOURNAL_NAME).open("ab") as file:
            file.write(b'{"shards": 3}\n')
    else:  # the line that was being written when the power went
        with (left / journal.JOURNAL_NAME).open("ab") as file:
            file.write(b'{"reader": {"source"')
    notes: list[str] = []
    if change in ("short index", "open shard"):
        with pytest.raises(DataError, match=r"the interrupted run; cannot be continued.*again"):
            prepare.prepare(run)
    prepare.prepare(run, note=notes.append)
    fresh = options(tmp_path / "fresh", inputs, no_eot=run.no_eot, **more)
    prepare.prepare(fresh)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    assert [note.split(" ")[0] for note in notes] == {"torn": ["continuing"]}.get(
        change, [] if change in ("short index", "open shard") else ["an"]
    )
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("shards", ["native", "mypt"])
@pytest.mark.parametrize(
    ("damage", "is_finished"),
    [("missing", False), ("short", False), ("long", False), ("token", False), ("token", True),
     ("other", False), ("other", True), ("pipe", False)],
)  # fmt: skip
def test_a_run_whose_finished_shards_were_damaged_starts_over_and_says_so(
    inputs: tuple[str, ...], tmp_path: Path, damage: str, is_finished: bool, shards: str
) -> None:
    more = {"format": shards, "val_fraction": 0.7}
    n_events = events_of(options(tmp_path / "whole", inputs, **more))
    run = options(tmp_path / "out", inputs, **more)
    # The last three events publish: then the journal ends with the metadata.
    assert killed_at(n_events - 2 if is_finished else n_events * 3 // 4, run)
    (left,) = tmp_path.glob(".out.tmp-*")
    path = left / "train" / "shard_00001.bin"
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "short":
        path.write_bytes(data[:-4])
    elif damage == "long":
        path.write_bytes(data + bytes(4))
    elif damage == "token":
        data[4096 + 7 if shards == "native" else 7] ^= 1
        path.write_bytes(data)
    elif damage == "other":
        path.write_bytes((left / "train" / "shard_00002.bin").read_bytes())
    elif damage == "pipe":
        os.mkfifo(path)
    notes: list[str] = []
    prepare.prepare(run, note=notes.append)
    assert notes == [
        "an interrupted run cannot be continued, so this one starts over: "
        "train/shard_00001.bin is not what was written"
    ]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out.*"))


def test_an_interruption_keeps_what_a_killed_run_would_leave(
    inputs: tuple[str, ...], tmp_path: Path
) -> None:
    def progress(phase: str, done: int, total: int) -> None:
        if done > total * 0.9:
            raise KeyboardInterrupt

    run = options(tmp_path / "out", inputs)
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(run, progress, notes.append)
    (note,) = notes
    (left,) = tmp_path.glob(".out.tmp-*")
    assert note == f"what is finished stays in {left}: the same command goes on from there"
    notes.clear()
    prepare.prepare(run, note=notes.append)
    assert [note.split(" ")[0] for note in notes] == ["continuing"]
    prepare.prepare(options(tmp_path / "whole", inputs))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_was_done_before_the_disk_was_full_is_kept(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mypt_fast.data.build.CHECKPOINT_TOKENS", 100)
    prepare.prepare(options(tmp_path / "whole", inputs, tokens_per_shard=1_000_000))
    largest = max(path.stat().st_size for path in (tmp_path / "whole" / "train").iterdir())
    run = options(tmp_path / "out", inputs, tokens_per_shard=1_000_000)
    told = tmp_path / "told"
    pid = os.fork()
    if pid == 0:  # no file may grow to what the largest one needs
        notes: list[str] = []
        try:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, ((4096 + largest) // 2, most))
            prepare.prepare(run, note=notes.append)
        except DataError as error:
            told.write_text("\n".join([*notes, str(error)]))
            os._exit(7)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WEXITSTATUS(status) == 7
    (left,) = tmp_path.glob(".out.tmp-*")
    note, error = told.read_text().splitlines()
    assert note == f"what is finished stays in {left}: the same command goes on from there"
    assert "File too large" in error
    notes = []
    prepare.prepare(run, note=notes.append)
    assert [note.split(" ")[0] for note in notes] == ["continuing"]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_finished_dataset_survives_a_kill_before_and_after_its_publication(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    expected = prepare.prepare(options(tmp_path / "whole", inputs))
    run = options(tmp_path / "out", inputs)
    if not is_first:
        prepare.prepare(options(tmp_path / "out", inputs, no_eot=True))

    def killed(before: bool) -> None:
        swap = publish._swap

        def die(new: Path, target: Path) -> None:
            if not before:
                swap(new, target)
            os.kill(os.getpid(), signal.SIGKILL)

        pid = os.fork()
        if pid == 0:
            try:
                monkeypatch.setattr(publish, "_swap", die)
                prepare.prepare(run)
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])

    killed(before=True)
    with monkeypatch.context() as patch:
        patch.setattr(encoding.Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
        assert prepare.prepare(run) == expected
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    killed(before=False)
    assert (tmp_path / "out" / journal.JOURNAL_NAME).exists()
    assert prepare.prepare(run) == expected
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("more", [{}, {"tokenization": "char"}], ids=["gpt2", "char"])
def test_standard_input_starts_over_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    text = "Everything came through a pipe. " * 300

    def give() -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    give()
    n_events = events_of(options(tmp_path / "whole", ("-",), **more))
    run = options(tmp_path / "out", ("-",), **more)
    give()
    assert killed_at(n_events // 2, run)
    give()
    notes: list[str] = []
    prepare.prepare(run, note=notes.append)
    (note,) = notes
    assert "starts over: standard input and pipes cannot be read twice" in note
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_checkpoint_does_not_wait_for_a_shard_that_never_fills(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mypt_fast.data.build.CHECKPOINT_TOKENS", 100)
    more = {"tokens_per_shard": 1_000_000}
    n_events = events_of(options(tmp_path / "whole", inputs, **more))
    run = options(tmp_path / "out", inputs, **more)
    assert killed_at(n_events // 2, run)
    notes: list[str] = []
    prepare.prepare(run, note=notes.append)
    assert [note.split(" ")[0] for note in notes] == ["continuing"]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# --- repeated documents


def document_texts(folder: Path) -> list[str]:
    tokenizer = Tokenizer.gpt2()
    return [
        document
        for split in ("train", "val")
        for document in tokenizer.decode(tokens(folder, split)).split("<|endoftext|>")[:-1]
    ]


@pytest.mark.parametrize("dedup", [False, True])
def test_repeated_documents_are_counted_and_dropped_if_asked(
    inputs: tuple[str, ...], tmp_path: Path, dedup: bool
) -> None:
    out = tmp_path / "out"
    metadata = prepare.prepare(options(out, inputs, dedup=dedup))
    assert metadata["num_documents"] == 12 + 2 + 60
    assert metadata["duplicate_documents"] == 3 + 1 + 30
    assert metadata["duplicates_dropped"] is dedup
    found = document_texts(out)
    assert len(found) == metadata["num_train_documents"] + metadata["num_val_documents"]
    assert len(found) == 74 - 34 * dedup
    assert len(set(found)) == 40
    assert is_native(out)


def test_a_document_that_goes_on_in_the_next_shard_is_marked(
    inputs: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    metadata = prepare.prepare(options(out, inputs))
    ended = {"train": True, "val": True}
    seen = 0
    for shard in metadata["shards"]:
        split = shard["name"].split("/")[0]
        assert shard.get("continues", False) is not ended[split]
        seen += "continues" in shard
        ended[split] = read_native(out / shard["name"]).tokens[-1] == 50256
    assert seen > 10
