"""Signals at every phase: saved, resumable, and the exit code says which."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import events
from test_resume import assert_same_run

from mypt_fast.checkpoint import bundle
from mypt_fast.data.loader import TokenLoader
from mypt_fast.model import GPT
from mypt_fast.training import store
from mypt_fast.training.journal import Journal
from mypt_fast.training.signals import EXIT_CODES, StopRequested, StopSignal
from mypt_fast.training.store import Store


def stall_at(monkeypatch, target: type, method: str, call: int, number: int) -> None:
    """Make the n-th call of a method wait for ever; a signal comes while it does."""
    original, count = getattr(target, method), [0]

    def stalled(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            threading.Thread(target=os.kill, args=(os.getpid(), number)).start()
            threading.Event().wait()
        return original(*args, **kwargs)

    monkeypatch.setattr(target, method, stalled)


# evaluations read 4 batches, and forward as often; a step has 4 micro-steps
@pytest.mark.parametrize(("target", "method", "call", "number"), [
    (TokenLoader, "next", 4 * 3 + 2, signal.SIGINT),  # the loader, within a step
    (TokenLoader, "next", 4 * 3 + 1, signal.SIGUSR1),  # and at its beginning
    (TokenLoader, "read", 1, signal.SIGTERM),  # the first evaluation: nothing is saved yet
    (TokenLoader, "read", 3, signal.SIGTERM),
    (GPT, "forward", 3, signal.SIGHUP),  # a forward pass, such as one that compiles
    (GPT, "forward", 4 * 6, signal.SIGUSR1),
])  # fmt: skip
def test_what_waits_for_ever_is_left_saved_and_repeated(
    train, monkeypatch, target, method, call, number
) -> None:
    assert train("whole") == 0
    with monkeypatch.context() as patched:
        stall_at(patched, target, method, call, number)
        assert train("parts") == EXIT_CODES[number]
    trained = [e["iter"] for e in events("parts", "train")]
    state = bundle.read_info(Path("checkpoints/parts"))["training_state"]
    assert trained == list(range(state["step"]))
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


@pytest.mark.parametrize("resume", [False, True])
def test_before_training_a_signal_leaves_everything_as_it_was(
    train, monkeypatch, capsys, resume
) -> None:
    if resume:
        assert train("a") == 0
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    stall_at(monkeypatch, Store, "read", 1, signal.SIGTERM)
    assert train("a", "--max_iters", "20", resume=resume) == 143
    assert "before training began" in capsys.readouterr().err
    after = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and p.stat().st_size}
    assert after == before


def test_a_signal_while_saving_lets_the_save_finish_and_saves_no_second_time(
    train, monkeypatch
) -> None:
    assert train("whole") == 0
    saves, original = [], Store.save

    def save(self: Store, step: int) -> None:
        saves.append(step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", save)
        assert train("parts") == 143
    assert saves == [0, 5]
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


def test_sigusr2_saves_and_goes_on(train, monkeypatch, capsys) -> None:
    saves, original, step = [], Store.save, Journal.step

    def save(self: Store, number: int) -> None:
        saves.append(number)
        original(self, number)

    def asked(self: Journal, number: int, *rest) -> None:
        step(self, number, *rest)
        if number == 6:
            os.kill(os.getpid(), signal.SIGUSR2)

    assert train("whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", save)
        patched.setattr(Journal, "step", asked)
        assert train("asked") == 0
    assert saves == [0, 5, 7, 10, 12]
    assert "saved at step 7, as SIGUSR2 asked" in capsys.readouterr().out
    assert_same_run("whole", "asked")


def test_a_signal_that_came_before_the_work_stops_it_too() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested), stop.interruptible():
            pytest.fail("it began")
    assert stop.exit_code == 143


def test_work_that_cannot_be_left_is_not_interrupted() -> None:
    with StopSignal() as stop:
        with stop.interruptible():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        finished = True
        with pytest.raises(StopRequested):
            stop.raise_if_set()
    assert finished


def test_handlers_and_the_wakeup_are_put_back() -> None:
    names = [*EXIT_CODES, signal.SIGUSR2]
    before = [signal.getsignal(n) for n in names]
    threads = threading.active_count()
    with StopSignal():
        assert all(signal.getsignal(n) != b for n, b in zip(names, before, strict=True))
    assert [signal.getsignal(n) for n in names] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


STUCK = """
import hashlib, os
from mypt_fast.training.signals import StopSignal
with StopSignal():
    os.write(1, b"ready")
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # an hour in C: no Python handler runs
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigint_ends_a_process_that_is_stuck(first: int) -> None:
    command = [sys.executable, "-c", STUCK]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"ready"
        process.send_signal(first)
        said = b""
        while b"saving first" not in said:
            said += os.read(process.stderr.fileno(), 99)
        process.send_signal(signal.SIGINT)
        assert b"stopped at once" in process.stderr.read()
    assert process.returncode == 130


def test_a_save_that_was_asked_for_and_failed_is_not_called_one(train, monkeypatch, capsys) -> None:
    write, step = store.bundles.write, Journal.step

    def asked(self: Journal, number: int, *rest) -> None:
        step(self, number, *rest)
        if number == 6:
            os.kill(os.getpid(), signal.SIGUSR2)

    def not_at_seven(target, **content):
        if content["training_state"]["step"] == 7:
            raise store.CheckpointError(f"cannot save {target}", "No space left on device")
        write(target, **content)

    monkeypatch.setattr(Journal, "step", asked)
    monkeypatch.setattr(store.bundles, "write", not_at_seven)
    assert train("asked") == 0
    said = capsys.readouterr()
    assert "saved at step 7" not in said.out
    assert "step 7: cannot save" in said.err
