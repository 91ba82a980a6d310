"""Older states stay beside a run until their successor is known to be good, and lead back."""

from pathlib import Path

import pytest
from test_bundle import optimizer, put, weights

from mypt_fast.checkpoint import bundle, snapshots
from mypt_fast.errors import CheckpointError, IntegrityError


def save(path: Path, step: int, keep: int = 1) -> None:
    config = bundle.read_info(path).get("config") if bundle.exists(path) else None
    if config is None:
        put(path)  # for its config.json
        config = bundle.read_info(path)["config"]
    bundle.write(
        path,
        config=config,
        state_dict={k: v + step for k, v in weights().items()},
        training_state={"step": step, "training_config": {}},
        optimizer=optimizer(),
        state={"step": step},
        keep_last=keep,
    )


def names(path: Path) -> list[str]:
    return [p.name for p in snapshots.snapshots(path)]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run saved at steps 5, 10 and 15 that keeps two older states."""
    for step in (5, 10, 15):
        save(tmp_path / "m", step, keep=2)
    return tmp_path / "m"


def test_the_newest_are_kept_and_older_ones_removed(run: Path) -> None:
    assert names(run) == [".m.step-000000010", ".m.step-000000005"]
    save(run, 20, keep=2)
    assert names(run) == [".m.step-000000015", ".m.step-000000010"]
    save(run, 20, keep=2)  # the same step again is not a further state
    assert names(run) == [".m.step-000000015", ".m.step-000000010"]
    save(run, 25, keep=0)
    assert names(run) == []


def test_nothing_is_removed_before_the_new_state_was_read_back(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(bundle, "matches", lambda path, entry: path.name != "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer.pt reads back differently"):
        save(run, 20, keep=1)
    assert names(run) == [".m.step-000000010", ".m.step-000000005"]
    assert bundle.read(run).training_state["step"] == 15


def test_a_damaged_bundle_is_read_from_its_newest_good_snapshot(run: Path) -> None:
    damage(run / "model.pt")
    damage(run.with_name(".m.step-000000010") / "optimizer.pt")
    got = bundle.read(run)
    assert got.training_state["step"] == 5
    assert "m/model.pt is not the file that was saved" in got.notices[0]
    assert got.notices[0].endswith("reading its state of step 5")
    with pytest.raises(IntegrityError):
        bundle.read(run, walk_back=False)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.pt", "optimizer.pt"])
def test_settling_puts_the_snapshot_in_its_place_and_keeps_what_is_not_ours(
    run: Path, name: str
) -> None:
    (run / "notes.txt").write_text("mine")
    damaged = run / name
    damaged.write_bytes(damaged.read_bytes()[:-9])
    said = snapshots.settle(run)
    assert len(said) == 1
    assert name in said[0]
    assert "went back to step 10" in said[0]
    assert bundle.read(run, walk_back=False).training_state["step"] == 10
    assert (run / "notes.txt").read_text() == "mine"
    assert (run.with_name(".m.damaged") / name).exists()
    assert snapshots.settle(run) == []


def test_an_edit_is_not_taken_for_damage(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"n_layer": 1', '"n_layer": 2'))
    with pytest.raises(IntegrityError, match="n_layer cannot be edited"):
        snapshots.settle(run)
    assert bundle.read_info(run)["training_state"]["step"] == 15


def test_without_a_good_snapshot_the_damage_is_the_error(run: Path) -> None:
    damage(run / "model.pt")
    for older in snapshots.snapshots(run):
        damage(older / "model.pt")
    with pytest.raises(IntegrityError, match=r"m/model\.pt is not the file"):
        snapshots.settle(run)


def test_snapshots_of_a_run_that_is_gone_are_not_a_new_runs_past(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))
    assert "is gone and its snapshot" in snapshots.settle(run)[0]
    save(run, 3)
    assert names(run) == []
