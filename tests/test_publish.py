"""Publishing a directory: a reader sees the old one or the new one, whenever the process dies."""

import os
import socket
from pathlib import Path

import pytest

from mypt_fast import publish

OWNED = frozenset({"model.pt", "state.json"})


def put(target: Path, text: str) -> None:
    with publish.staged(target, OWNED) as aside:
        for name in sorted(OWNED):
            (aside / name).write_text(text)


def seen(target: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in target.iterdir() if p.is_file()}


def leftovers(target: Path) -> list[str]:
    return [p.name for p in target.parent.iterdir() if p.name != target.name]


@pytest.fixture(params=["exchange", "two renames"])
def target(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to publish, with the system's exchange and without it."""
    if request.param == "two renames":
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    return tmp_path / "run"


def test_first_and_later_publications(target: Path) -> None:
    for text in ("one", "two", "three"):
        put(target, text)
        assert seen(target) == dict.fromkeys(OWNED, text)
        assert leftovers(target) == []


def test_what_is_not_ours_is_kept_and_what_is_ours_is_not(target: Path) -> None:
    put(target, "one")
    (target / "notes.txt").write_text("mine")
    (target / "folder").mkdir()
    (target / "folder" / "deep.txt").write_text("mine too")
    (target / "link").symlink_to("notes.txt")
    inode = (target / "notes.txt").stat().st_ino
    with publish.staged(target, OWNED) as aside:
        (aside / "model.pt").write_text("two")
    assert (target / "notes.txt").stat().st_ino == inode
    assert (target / "folder" / "deep.txt").read_text() == "mine too"
    assert os.readlink(target / "link") == "notes.txt"
    assert not (target / "state.json").exists()
    assert (target / "model.pt").read_text() == "two"


def test_an_error_while_building_leaves_the_old_directory(target: Path) -> None:
    put(target, "one")

    def fail() -> None:
        with publish.staged(target, OWNED) as aside:
            (aside / "model.pt").write_text("half")
            raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert seen(target) == dict.fromkeys(OWNED, "one")
    assert leftovers(target) == []


@pytest.mark.parametrize("call", ["mkdir", "link", "fsync", "rename", "rmtree"])
def test_death_at_any_call_leaves_the_old_or_the_new(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Fork, die at the n-th call of one kind, look, and let the next save clean up."""
    for n in range(1, 6):
        put(target, "old")
        (target / "notes.txt").write_text("mine")
        pid = os.fork()
        if pid == 0:  # the child: no cleanup runs after _exit
            _die_at(call, n)
            put(target, "new")
            os._exit(0)
        os.waitpid(pid, 0)
        publish.clean_stale(target)
        texts = {(target / name).read_text() for name in OWNED}
        assert texts in ({"old"}, {"new"})
        assert (target / "notes.txt").read_text() == "mine"
        assert leftovers(target) == []


def _die_at(call: str, n: int) -> None:
    import shutil

    module = shutil if call == "rmtree" else os
    original, count = getattr(module, call), [0]

    def counted(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == n:
            os._exit(9)
        return original(*args, **kwargs)

    setattr(module, call, counted)


def test_temporaries_of_a_living_process_are_left_alone(target: Path) -> None:
    put(target, "one")
    busy = target.parent / f".run.tmp-{os.getppid()}"
    busy.mkdir()
    publish.clean_stale(target)
    assert busy.exists()


def test_the_old_state_comes_back_after_death_between_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "run"
    put(target, "one")
    target.rename(tmp_path / ".run.old-999999999")
    publish.clean_stale(target)
    assert seen(target) == dict.fromkeys(OWNED, "one")


def test_between_two_renames_a_living_process_is_left_to_finish(tmp_path: Path) -> None:
    target = tmp_path / "run"
    put(target, "one")
    busy = tmp_path / f".run.old-{socket.gethostname()}-{os.getppid()}"
    target.rename(busy)
    publish.clean_stale(target)
    assert busy.exists()
    assert not target.exists()


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_another_machines_processes_are_not_judged_by_their_number(
    tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "run"
    put(target, "one")
    theirs = tmp_path / f".run.{kind}-not-{socket.gethostname()}-999999999"
    theirs.mkdir()
    publish.clean_stale(target)
    put(target, "two")
    assert theirs.exists()


def test_what_a_killed_process_left_can_be_continued(target: Path) -> None:
    left = target.parent / ".run.tmp-999999999"
    left.mkdir()
    (left / "model.pt").write_text("half")
    with publish.staged(target, OWNED, lambda path: (path / "model.pt").exists()) as aside:
        assert (aside / "model.pt").read_text() == "half"
        assert not left.exists()
        (aside / "state.json").write_text("half")
    assert seen(target) == dict.fromkeys(OWNED, "half")
    assert leftovers(target) == []


@pytest.mark.parametrize("is_worth_it", [True, False])
def test_an_interruption_leaves_what_can_be_continued(target: Path, is_worth_it: bool) -> None:
    def interrupted() -> None:
        with publish.staged(target, OWNED, lambda path: is_worth_it) as aside:
            (aside / "model.pt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(leftovers(target)) == is_worth_it


def test_what_a_user_adds_while_the_directory_is_being_swapped_stays(tmp_path, monkeypatch):
    target = tmp_path / "run"
    (target / "notes").mkdir(parents=True)
    (target / "notes" / "old.txt").write_text("old")
    (target / "ours").write_text("1")
    sync = publish.sync_directory

    def late(path):
        if path.name != tmp_path.name:  # after the carrying over, before the swap
            (target / "late.txt").write_text("mine")
            (target / "notes" / "late.txt").write_text("mine too")
        sync(path)

    monkeypatch.setattr(publish, "sync_directory", late)
    with publish.staged(target, frozenset({"ours"}), retire=lambda old: None) as aside:
        (aside / "ours").write_text("2")
    assert (target / "ours").read_text() == "2"
    found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert found == {"ours", "late.txt", "notes/old.txt", "notes/late.txt"}
