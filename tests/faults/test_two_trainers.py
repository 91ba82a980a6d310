"""F17: a second trainer in one run directory refuses; a dead one's lock is nobody's."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mypt_fast.checkpoint.lock import RunLock
from mypt_fast.cli import main
from mypt_fast.errors import CheckpointError

HOLD = """
import sys
from pathlib import Path
from mypt_fast.checkpoint.lock import RunLock
RunLock([Path(sys.argv[1])]).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A second process that holds the lock of checkpoints/a."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "checkpoints/a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_trainer_refuses_and_names_the_first(
    holder, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in Path("checkpoints").iterdir())
    assert main(["train", "--model_name", "a", "--max_iters", "1"]) == 2
    err = capsys.readouterr().err
    assert f"checkpoints/a is being trained already; by process {holder.pid} on" in err
    assert socket.gethostname() in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in Path("checkpoints").iterdir()) == before == [".a.lock"]


def test_what_a_run_also_writes_is_locked_with_it(holder, tmp_path: Path) -> None:
    mine = RunLock([tmp_path / "checkpoints/b", tmp_path / "checkpoints/a"])
    with pytest.raises(CheckpointError, match="checkpoints/a is being trained"):
        mine.acquire()
    with RunLock([tmp_path / "checkpoints/b"]) as other:
        other.acquire()  # the one that refused keeps nothing


def test_a_link_to_a_run_is_the_same_run(holder, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints/a")
    with pytest.raises(CheckpointError, match="link is being trained"):
        RunLock([tmp_path / "link"]).acquire()


def test_the_system_takes_a_killed_trainers_lock_back(holder, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "checkpoints/.a.lock").exists()
    with RunLock([tmp_path / "checkpoints/a"]) as lock:
        lock.acquire()
        assert f"process {os.getpid()} " in (tmp_path / "checkpoints/.a.lock").read_text()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_dry_run_and_readers_need_no_lock(holder, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--n_layer", "1", "--n_embd", "8", "--n_head", "1", "--device", "cpu", "--dry_run"]
    Path("t.txt").write_text("to be or not to be " * 200)
    source = ["--input_file", "t.txt", "--tokenization", "char", "--block_size", "8"]
    assert main(["train", "--model_name", "a", *words, *source]) == 0
    assert main(["inspect", "a"]) == 2
    assert "no model 'a'" in capsys.readouterr().err


def test_a_lock_removed_under_its_holder_is_taken_anew(tmp_path: Path, monkeypatch) -> None:
    """The holder removes the file between our open and our flock: ours would lock nothing."""
    path, original, turns = tmp_path / ".a.lock", fcntl.flock, []

    def slow(handle: int, how: int) -> None:
        if not turns:
            path.unlink()
        turns.append(1)
        original(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with RunLock([tmp_path / "a"]) as lock:
        lock.acquire()
        assert path.exists()
    assert len(turns) == 2


def test_where_the_file_system_has_no_locks_one_line_says_so(tmp_path: Path, monkeypatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock([tmp_path / "a"]) as lock:
        lock.acquire()
        assert len(lock.notices) == 1
        assert "knows no locks" in lock.notices[0]
