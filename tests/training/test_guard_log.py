"""The JSONL log under power cuts and full disks, and what reads its events."""

import errno
import io
import json
import sys
import types
from pathlib import Path

import pytest
from conftest import events

from mypt_fast import run_log
from mypt_fast.cli import main
from mypt_fast.training.events import SCHEMA, EventLog

LINE = b'{"event": "train", "iter": 1}\n'


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("torn", [
    b"{", b'{"event": "train", "iter": 2, "lo', b'{"event": "train"', b"\0" * 4096,
    b'{"event": "tr\0\0\0\0', LINE[:-2],
])  # fmt: skip
def test_a_torn_last_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + torn)
    log = EventLog(path)
    log.write("eval", iter=3)
    log.close()
    assert path.read_bytes().startswith(LINE + b'{"event": "eval"')
    assert len(lines(path)) == 2


@pytest.mark.parametrize("tail", [LINE[:-1], b"a note of mine", b'{"mine": 1}'])
def test_what_is_whole_or_not_ours_is_kept(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + tail)
    log = EventLog(path)
    assert log.position == len(LINE + tail) + 1
    log.write("eval", iter=3)
    log.close()
    assert path.read_bytes().startswith(LINE + tail + b'\n{"event": "eval"')


def test_every_prefix_of_a_log_can_be_continued(tmp_path: Path) -> None:
    """Where a power cut may end the file: no line before is lost, none after is spoiled."""
    whole = LINE + b'{"event": "eval", "iter": 5, "name": "\xe6\x97\xa5"}\n' + LINE
    for size in range(len(whole)):
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(whole[:size])
        log = EventLog(path)
        log.write("new")
        log.close()
        found = path.read_bytes().splitlines()
        assert found[:-1] in (whole[:size].splitlines()[:-1], whole[:size].splitlines())
        assert [json.loads(line) for line in found][-1]["event"] == "new"


def test_a_full_disk_delays_events_and_loses_none(tmp_path: Path, monkeypatch, capsys) -> None:
    path, room = tmp_path / "a.jsonl", [60]
    write = io.FileIO.write

    class Disk(io.FileIO):
        """Takes what there is room for, as write(2) does."""

        def write(self, data) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = write(self, bytes(data)[: room[0]])
            room[0] -= taken
            return taken

    monkeypatch.setattr("mypt_fast.training.events.io.FileIO", Disk)
    log = EventLog(path)
    positions = []
    for i in range(5):
        log.write("train", iter=i)
        positions.append(log.position)
    assert len(path.read_bytes()) == 60
    assert set(positions) <= {0, path.read_bytes().find(b"\n") + 1}  # whole lines only
    log.sync()
    room[0] = 1 << 20
    log.write("train", iter=5)
    assert log.position == path.stat().st_size
    log.close()
    assert [e["iter"] for e in lines(path)] == list(range(6))
    said = capsys.readouterr().err
    assert said.count("No space left") == 1
    assert said.count("has taken the events") == 1


def test_a_run_outlives_a_log_on_a_full_disk(train, monkeypatch) -> None:
    assert train("whole") == 0

    def full(self, data) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Disk(io.FileIO):
        write = full

    monkeypatch.setattr("mypt_fast.training.events.io.FileIO", Disk)
    assert train("full") == 0
    assert events("full") == []


def test_the_start_says_which_schema(train) -> None:
    assert train("a", "--max_iters", "1") == 0
    assert events("a", "training_start")[0]["schema"] == SCHEMA


# plot


def test_plot_copes_with_every_kind_of_event(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    start = {"event": "training_start", "schema": SCHEMA, "config": {"start_step": 0}}
    steps = [{"event": "train", "iter": i, "loss": 3.0 - i / 10} for i in range(8)]
    again = [{"event": "train", "iter": i, "loss": 2.0 - i / 10} for i in range(4, 12)]
    problems = [
        {"event": "skipped_step", "iter": 8, "loss": None, "samples": [64, 72]},
        {"event": "loss_spike", "iter": 8, "loss": 9.0, "samples": [72, 80]},
        {"event": "loss_scale", "iter": 8, "scale": 4.0},
        {"event": "oom", "iter": 8, "micro_batch_size": 1, "samples": None},
        {"event": "rollback", "iter": 8, "back_to": 4, "samples": [32, 80]},
        {"event": "rollback", "iter": "x", "back_to": "y"},
        {"event": "of_the_future", "iter": 9},
    ]
    log = Path("m_eval.jsonl")
    log.write_text("".join(json.dumps(e) + "\n" for e in [start, *steps, *problems[:4]]))
    assert len(run_log.read_log(log).train) == 8
    with log.open("a") as f:
        f.writelines(json.dumps(e) + "\n" for e in [problems[4], *again, *problems[5:]])
    read = run_log.read_log(log)
    x, y = run_log.series(read.train, "loss", "step")
    assert (x, y[4]) == (list(range(12)), pytest.approx(1.6))  # the steps before count no more
    assert [p.values["event"] for p in read.incidents] == [
        "skipped_step", "loss_spike", "oom", "rollback",
    ]  # fmt: skip
    assert main(["plot", str(log), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["logs"][0]
    assert report["incidents"]["rollback"] == 1
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")


# TensorBoard


def test_tensorboard_shows_the_events_of_the_log(train, monkeypatch) -> None:
    shown, closed = [], []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            shown.append(("begin", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            shown.append((name, value, step))

        def add_text(self, name: str, text: str, step: int) -> None:
            shown.append((name, json.loads(text), step))

        def close(self) -> None:
            closed.append(True)

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert train("a", "--tensorboard", "board") == 0
    assert shown[0] == ("begin", "board", 0)
    for key in ("loss", "lr", "grad_norm", "tokens_per_sec", "mfu"):
        want = [(f"train/{key}", e[key], e["iter"]) for e in events("a", "train")]
        assert [s for s in shown if s[0] == f"train/{key}"] == want
    want = [("eval/val_loss", e["val_loss"], e["iter"]) for e in events("a", "eval")]
    assert [s for s in shown if s[0] == "eval/val_loss"] == want
    assert {s[0] for s in shown} >= {"gold/val_loss", "eval/train_loss"}
    assert train("a", "--max_iters", "13", resume=True) == 0  # the flag is kept
    assert shown[-5:][0][2] == 12
    assert ("begin", "board", 12) in shown
    assert closed == [True, True]


def test_without_tensorboard_one_line_names_the_cure(train, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train("a", "--tensorboard", "board") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --tensorboard needs TensorBoard")
    assert "pip install 'mypt_fast[log]'" in error
    assert not Path("checkpoints/a").exists()
