"""A run that dies before its first checkpoint leaves a log that the next start begins anew."""

import json
from pathlib import Path

import pytest
from conftest import events

from mypt_fast.training import store

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
    import shutil

    assert train("run") == 0
    shutil.rmtree("checkpoints/run")
    assert train("run") == 0
    assert [e["iter"] for e in events("run", "eval")] == [0, 5, 10] * 2


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b'{"log": 3}', b'{"log": "LOG", "bytes": "x"}']
)
def test_a_damaged_note_drops_nothing(train, content) -> None:
    killed_before_its_first_save(train)
    before = LOG.read_text()
    MARK.write_bytes(content.replace(b"LOG", str(LOG).encode()))
    assert train("run") == 0
    assert LOG.read_text().startswith(before)


def test_the_note_of_another_log_drops_nothing(train) -> None:
    killed_before_its_first_save(train)
    before = LOG.read_text()
    assert train("run", "--log_file", "other.jsonl") == 0
    assert LOG.read_text() == before
    assert json.loads(Path("other.jsonl").read_text().splitlines()[0])["event"] == "training_start"
