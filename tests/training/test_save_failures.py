"""F5: a disk that refuses a save ends no run; damage leads back to the newest good state."""

import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import events
from test_resume import assert_same_run

from mypt_fast.checkpoint import bundle
from mypt_fast.training import space, store


@pytest.fixture
def full_disk(monkeypatch):
    """A function that makes some fsyncs of a run fail, counted from 1, and says how many failed."""

    def install(*calls: int, code: int = errno.ENOSPC) -> list[int]:
        original, count, failed = os.fsync, [0], []

        def fsync(handle: int) -> None:
            count[0] += 1
            if count[0] in calls:
                failed.append(count[0])
                raise OSError(code, os.strerror(code))
            original(handle)

        monkeypatch.setattr(bundle.os, "fsync", fsync)
        return failed

    return install


def test_a_full_disk_keeps_the_run_and_the_old_checkpoint(train, full_disk, capsys) -> None:
    """12 steps, saves at 0, 3, 5 (gold and run), 6, 9, 10, 12; the disk is full for a while."""
    assert train("whole", "--save_interval", "3") == 0
    capsys.readouterr()
    failed = full_disk(*range(12, 16))
    assert train("parts", "--save_interval", "3") == 0
    failures = events("parts", "save_failed")
    assert len(failed) == 4
    assert 1 < len(failures) <= 4  # the log, too, waits for room, and loses nothing
    for event in failures:
        assert event["error"] == "No space left on device"
        assert event["target"] in ("checkpoints/parts", "checkpoints/parts_gold")
    err = capsys.readouterr().err
    assert err.count("training goes on") == len(failures)
    assert bundle.read(Path("checkpoints/parts")).training_state["step"] == 12
    log = Path("logs/train/parts_eval.jsonl")  # the same run, but for the failures it tells of
    kept = [line for line in log.read_text().splitlines(True) if "save_failed" not in line]
    log.write_text("".join(kept))
    assert_same_run("whole", "parts")


def test_a_disk_that_stays_full_is_exit_code_2_and_the_old_state_resumes(
    train, full_disk, capsys
) -> None:
    assert train("whole", "--save_interval", "3") == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store.bundles, "write", once(store.bundles.write, 4))
        assert train("parts", "--save_interval", "3") == 2
    err = capsys.readouterr().err
    assert "previous checkpoint is intact" in err.splitlines()[-1]
    saved = bundle.read(Path("checkpoints/parts"))
    assert saved.notices == []
    assert 0 < saved.training_state["step"] < 12
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


def once(write, n: int):
    """The first `n` saves work, and none after them."""
    count = [0]

    def limited(target: Path, **content: object) -> None:
        count[0] += 1
        if count[0] > n:
            cure = "the previous checkpoint is intact; fix this and rerun"
            raise store.CheckpointError(f"cannot save {target}", "No space left on device", cure)
        write(target, **content)

    return limited


def test_a_first_save_that_cannot_fit_is_refused_before_training(
    train, monkeypatch, capsys
) -> None:
    original = os.statvfs

    def small(path: object) -> object:
        real = original(path)
        return type("Disk", (), {"f_bavail": 10, "f_frsize": 4096, "f_blocks": real.f_blocks})()

    monkeypatch.setattr(os, "statvfs", small)
    assert train("a") == 2
    assert "the first save needs 1.1 MiB; checkpoints has 40.0 KiB free" in capsys.readouterr().err
    assert not Path("checkpoints/a").exists()


def test_the_expected_bytes_are_those_of_a_save(train) -> None:
    for dtype in ("fp32", "bf16"):
        assert train(dtype, "--save_dtype", dtype, "--n_embd", "128", "--max_iters", "1") == 0
        folder = Path("checkpoints", dtype)
        real = sum(p.stat().st_size for p in folder.iterdir())
        state = bundle.read_info(folder)
        cfg = space.Settings(dtype, folder, bundle_config(state["config"]), None, None)  # type: ignore[arg-type]
        assert real <= space.save_bytes(cfg) <= real + (1 << 20)


def bundle_config(raw: dict):
    from mypt_fast.config import ModelConfig

    return ModelConfig(**raw)


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "config.json", "manifest.json"])
def test_a_damaged_run_goes_back_to_its_snapshot_and_ends_the_same(
    train, capsys, name: str
) -> None:
    assert train("whole") == 0
    assert train("parts") == 0
    path = Path("checkpoints/parts") / name
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    assert train("parts", resume=True) == 0
    err = capsys.readouterr().err
    assert f"parts/{name}" in err
    assert "went back to step 10" in err
    assert_same_run("whole", "parts")


def test_generate_reads_the_snapshot_of_a_damaged_run(train, capsys) -> None:
    from mypt_fast.cli import main

    assert train("a") == 0
    words = ["--prompt", "abc", "--max_new_tokens", "3", "--seed", "1"]
    path = Path("checkpoints/a/model.pt")
    path.write_bytes(path.read_bytes()[:-100])
    before = {p: p.read_bytes() for p in Path("checkpoints").rglob("*") if p.is_file()}
    assert main(["generate", "--model_name", "a", *words]) == 0
    assert "reading its state of step 10" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("checkpoints").rglob("*") if p.is_file()} == before


def test_edited_settings_are_named_and_used(train, capsys) -> None:
    assert train("a") == 0
    path = Path("checkpoints/a/training_state.json")
    path.write_text(path.read_text().replace('"max_iters": 12', '"max_iters": 14'))
    assert train("a", resume=True) == 0
    assert capsys.readouterr().err.count("training_state.json was edited since it was saved") == 1
    assert bundle.read_info(Path("checkpoints/a"))["training_state"]["step"] == 14


def test_a_missing_training_state_is_taken_from_the_manifest(train, capsys) -> None:
    assert train("a") == 0
    Path("checkpoints/a/training_state.json").unlink()
    assert train("a", "--max_iters", "14", "--dataset_dir", "data/toy", resume=True) == 0
    assert "using the manifest's copy" in capsys.readouterr().err
    saved = bundle.read_info(Path("checkpoints/a"))["training_state"]
    assert (saved["step"], saved["training_config"]["start_step"]) == (14, 12)
    assert torch.isfinite(bundle.read(Path("checkpoints/a")).state_dict["lm_head.weight"]).all()
