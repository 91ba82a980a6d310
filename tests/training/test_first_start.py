"""A run that dies before its first checkpoint leaves a log that the next start begins anew."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import events

from mypt_fast.training import store
from mypt_fast.training.events import EventLog
from mypt_fast.training.first_start import FirstStart

LOG = Path("logs/train/run_eval.jsonl")
MARK = Path("checkpoints/.run.start")


class Killed(BaseException):
    """What a killed process would not even raise."""


def killed_before_its_first_save(train) -> None:
    with pytest.MonkeyPatch.context() as patched:

        def never(target, **content):
            raise Killed

        patched.setattr(store.bundles, "write", never)
        with pytest.raises(Killed):
            train("run", "--async_save", "off")
    assert events("run", "eval")
    assert not Path("checkpoints/run").exists()


def test_the_next_start_drops_what_the_dead_one_logged(train, capsys) -> None:
    killed_before_its_first_save(train)
    killed_before_its_first_save(train)
    assert train("run") == 0
    assert [e["iter"] for e in events("run", "eval")] == [0, 5, 10]
    assert [e["iter"] for e in events("run", "train")] == list(range(12))
    assert len(events("run", "training_start")) == 1
    assert "a start that saved nothing dropped" in capsys.readouterr().err
    assert not MARK.exists()


def test_what_was_in_the_log_before_stays(train) -> None:
    LOG.parent.mkdir(parents=True)
    LOG.write_text('{"event": "note", "text": "mine"}\n')
    killed_before_its_first_save(train)
    assert train("run") == 0
    assert [e["event"] for e in events("run")][:2] == ["note", "training_start"]
    assert [e["iter"] for e in events("run", "eval")] == [0, 5, 10]


def test_a_run_whose_checkpoint_was_removed_keeps_its_log(train) -> None:
    assert train("run") == 0
    shutil.rmtree("checkpoints/run")
    assert train("run") == 0
    assert [e["iter"] for e in events("run", "eval")] == [0, 5, 10] * 2


@pytest.mark.parametrize(
    ("note", "dropped"),
    [
        (b'{"log": "LOG", "bytes": 6}', 6),
        (b'{"log": "LOG", "bytes": 7}', 0),  # no line ends there
        (b'{"log": "LOG", "bytes": 600}', 0),
        (b'{"log": "LOG", "bytes": -6}', 0),
        (b'{"log": "LOG", "bytes": "6"}', 0),
        (b'{"log": "other.jsonl", "bytes": 6}', 0),
        (b'{"log": 3, "bytes": 6}', 0),
        (b"[]", 0),
        (b"\xff", 0),
        (b"", 0),
    ],
)
def test_only_a_note_of_this_log_drops_anything(tmp_path, note, dropped) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"first\nother\n")
    mark = tmp_path / ".run.start"
    mark.write_bytes(note.replace(b"LOG", str(path).encode()))
    log = EventLog(path)
    start = FirstStart(tmp_path / "run", log)
    assert start.begin() == dropped
    log.close()
    assert path.stat().st_size == 12 - dropped
    assert json.loads(mark.read_text()) == {"log": str(path), "bytes": 12 - dropped}
    start.end()
    assert not mark.exists()


def test_what_another_run_wrote_into_a_shared_log_is_not_dropped(train) -> None:
    shared = ("--log_file", "logs/all.jsonl")

    def starts() -> list[str]:
        lines = Path("logs/all.jsonl").read_text().splitlines()
        found = [e for e in map(json.loads, lines) if e["event"] == "training_start"]
        return [e["config"]["model_name"] for e in found]

    with pytest.MonkeyPatch.context() as patched:

        def never(target, **content):
            raise Killed

        patched.setattr(store.bundles, "write", never)
        with pytest.raises(Killed):
            train("run", "--async_save", "off", *shared)
    assert train("other", *shared) == 0
    assert train("run", "--max_iters", "6", *shared) == 0
    assert starts() == ["run", "other", "run"]
    assert train("other", "--max_iters", "14", resume=True) == 0
    assert train("run", "--max_iters", "14", resume=True) == 0
    assert starts() == ["run", "other", "run", "other", "run"]
