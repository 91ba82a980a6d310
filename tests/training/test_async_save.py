"""Saves beside the training: what they hold, when they are waited for, what if they fail."""

import threading
from pathlib import Path

import pytest
import torch
from conftest import events
from test_resume import assert_same_run

from mypt_fast.checkpoint import bundle
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.settings import DataConfig, Settings
from mypt_fast.training import saver, store
from mypt_fast.training.saver import Saver, Snapshot, saves_beside

CPU = torch.device("cpu")
SAVES = ("--save_interval", "3")


def weights(path: str) -> dict[str, torch.Tensor]:
    return bundle.read(Path(path)).state_dict


@pytest.mark.parametrize("extra", [(), ("--tie_weights",), ("--save_dtype", "bf16")])
def test_a_run_saved_beside_equals_one_that_waits(train, extra) -> None:
    for name, beside in (("beside", "on"), ("waits", "off")):
        assert train(name, *SAVES, "--async_save", beside, *extra) == 0
    assert_same_run("waits", "beside")
    sizes = [Path(f"checkpoints/{n}/model.pt").stat().st_size for n in ("beside", "waits")]
    assert sizes[0] == sizes[1]  # shared memory is stored once in both


def test_a_save_holds_the_state_it_was_asked_for(train) -> None:
    """Training goes on for two steps while the save of step 3 has not begun to write."""
    seen, write = {}, store.bundles.write
    moved, at_three = threading.Event(), threading.Event()
    before_move = store.Store.before_move

    def late(target, **content):
        step = content["training_state"]["step"]
        if (target.name, step) == ("late", 3):
            at_three.set()
            assert moved.wait(60)
            seen["weights"] = {k: v.clone() for k, v in content["state_dict"].items()}
            seen["live"] = {k: v.detach().clone() for k, v in seen["model"].state_dict().items()}
        write(target, **content)

    def counted(self):
        before_move(self)
        seen["model"] = self.model
        seen["moves"] = seen.get("moves", 0) + 1
        if seen["moves"] == 4:  # the save of step 3 is under way
            assert at_three.wait(60)
        if seen["moves"] == 6:  # steps 3 and 4 were taken
            moved.set()
            self.wait()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store.bundles, "write", late)
        patched.setattr(store.Store, "before_move", counted)
        assert train("late", *SAVES, "--eval_interval", "50", "--async_save", "on") == 0
    assert train("three", "--max_iters", "12", "--save_interval", "3", "--keep_last", "4",
                 "--eval_interval", "50", "--async_save", "off") == 0  # fmt: skip
    states = [bundle.read(p) for p in Path("checkpoints").glob(".three.step-*")]
    (expected,) = [s.state_dict for s in states if s.training_state["step"] == 3]
    assert seen["weights"].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, seen["weights"][name]), name
    assert any(not torch.equal(seen["live"][k], v) for k, v in expected.items())
    assert_same_run("three", "late")


def test_a_save_that_fails_beside_is_logged_and_made_up(train, monkeypatch, capsys) -> None:
    assert train("whole", *SAVES) == 0
    write, failed = store.bundles.write, []

    def sometimes(target, **content):
        step = content["training_state"]["step"]
        if target.name == "parts" and step in (3, 5):
            failed.append(step)
            raise store.CheckpointError(f"cannot save {target}", "No space left on device")
        write(target, **content)

    monkeypatch.setattr(store.bundles, "write", sometimes)
    assert train("parts", *SAVES, "--async_save", "on") == 0
    assert failed == [3, 5]
    assert [e["iter"] for e in events("parts", "save_failed")] == [3, 5]
    assert capsys.readouterr().err.count("training goes on") == 2
    assert bundle.read(Path("checkpoints/parts")).training_state["step"] == 12
    for name, value in weights("checkpoints/whole").items():
        assert torch.equal(value, weights("checkpoints/parts")[name])


def test_a_last_save_that_fails_beside_is_exit_code_2(train, monkeypatch, capsys) -> None:
    write = store.bundles.write

    def never_the_end(target, **content):
        if content["training_state"]["step"] == 12:
            raise store.CheckpointError(f"cannot save {target}", "Input/output error")
        write(target, **content)

    monkeypatch.setattr(store.bundles, "write", never_the_end)
    assert train("parts", *SAVES, "--async_save", "on") == 2
    assert "Input/output error" in capsys.readouterr().err.splitlines()[-1]
    assert not [t for t in threading.enumerate() if t.name.startswith("mypt-fast-save")]


def test_gold_and_run_of_one_step_share_a_copy(train, monkeypatch) -> None:
    copies, saves = [], []
    take, start = Snapshot.take, store.Store._start
    monkeypatch.setattr(Snapshot, "take", lambda self, c: copies.append(1) or take(self, c))
    monkeypatch.setattr(
        store.Store, "_start", lambda self, *a, **k: saves.append(a[:2]) or start(self, *a, **k)
    )
    assert train("run", "--async_save", "on") == 0
    steps = {step for _, step in saves}
    assert len(saves) > len(steps)
    assert len(copies) == len(steps)


def test_a_snapshot_keeps_shared_memory_shared_and_its_own_room() -> None:
    shared = torch.arange(6.0).view(2, 3)
    content = {"a": shared, "b": {"c": shared, 0: [torch.ones(2), 3]}, "d": (1, "x")}
    snapshot = Snapshot(CPU)
    first = snapshot.take(content)
    assert first["a"] is first["b"]["c"]
    assert first["d"] == (1, "x")
    assert torch.equal(first["a"], shared)
    shared += 1
    assert not torch.equal(first["a"], shared)
    room = first["a"].data_ptr()
    second = snapshot.take(content)
    assert second["a"].data_ptr() == room
    assert torch.equal(second["a"], shared)
    content["a"] = content["b"]["c"] = torch.zeros(5)  # another shape, such as of a first moment
    assert torch.equal(snapshot.take(content)["a"], torch.zeros(5))


def test_jobs_run_in_order_and_their_errors_come_out_once() -> None:
    ran, go = [], threading.Event()
    worker = Saver(beside=True)

    def job(n: int) -> None:
        go.wait(60)
        ran.append(n)
        if n == 1:
            raise OSError("disk")

    for n in range(3):
        worker.run(n, lambda n=n: job(n))
    assert worker.finished() == []
    go.set()
    worker.wait()
    ended = worker.finished()
    assert [name for name, _ in ended] == ran == [0, 1, 2]
    assert [type(error) for _, error in ended] == [type(None), OSError, type(None)]
    assert worker.finished() == []
    worker.close()


@pytest.mark.parametrize(
    ("asked", "device", "free", "beside"),
    [
        ("auto", "cpu", 1 << 40, True),
        ("auto", "cpu", 2_000_000_000, False),  # 12 bytes of 50 M parameters are over a tenth
        ("auto", "cuda", 2_000_000_000, True),  # and under half
        ("auto", "cuda", 1_000_000_000, False),
        ("on", "cpu", 1000, True),
        ("off", "cpu", 1 << 40, False),
    ],
)
def test_saves_run_beside_where_memory_has_room(monkeypatch, asked, device, free, beside) -> None:
    parts = (ModelConfig(), TrainConfig(), DataConfig())  # 50 M parameters
    settings = Settings("run", Path("checkpoints/run"), *parts)
    settings.train.async_save = asked
    monkeypatch.setattr(saver.devices, "free_bytes", lambda _: free)
    assert saves_beside(settings, torch.device(device)) is beside


def test_a_copy_that_memory_has_no_room_for_is_not_made(train, monkeypatch, capsys) -> None:
    """The saves are made by the training itself then, and none is lost."""
    assert train("whole", *SAVES) == 0
    take, calls = Snapshot.take, []

    def none_at_the_third(self, content):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return take(self, content)

    monkeypatch.setattr(Snapshot, "take", none_at_the_third)
    assert train("parts", *SAVES, "--async_save", "on") == 0
    assert len(calls) == 3
    assert "saves wait" in capsys.readouterr().err
    assert_same_run("whole", "parts")


def test_a_save_that_runs_out_of_memory_is_a_save_that_failed(train, monkeypatch) -> None:
    save = bundle.torch.save

    def short(content, f):
        if len(failed) < 2 and "state_dict" in content:
            failed.append(1)
            raise MemoryError
        save(content, f)

    failed: list[int] = []
    monkeypatch.setattr(bundle.torch, "save", short)
    assert train("parts", *SAVES, "--async_save", "on") == 0
    assert [e["error"] for e in events("parts", "save_failed")] == ["MemoryError"] * 2
    assert bundle.read(Path("checkpoints/parts")).training_state["step"] == 12


def test_an_error_that_nobody_foresaw_ends_the_run_and_leaves_the_last_state(
    train, monkeypatch
) -> None:
    write = store.bundles.write

    def odd(target, **content):
        if content["training_state"]["step"] == 3:
            raise TypeError("not JSON")
        write(target, **content)

    monkeypatch.setattr(store.bundles, "write", odd)
    assert train("parts", *SAVES, "--async_save", "on") == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("mypt-fast-save")]
    assert bundle.read(Path("checkpoints/parts")).training_state["step"] == 0
    assert not Path("checkpoints/.parts.start").exists()
