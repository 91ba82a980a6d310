"""fit stopped, killed and called again: the run that was never interrupted."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_help import (
    LETTERS,
    EpisodeLoader,
    ShardLoader,
    TextLoader,
    adamw,
    config,
    events,
    letters,
    model_of,
    run,
)

from mypt_fast.checkpoint import bundle
from mypt_fast.cli import main
from mypt_fast.core.fit import fit
from mypt_fast.errors import DataError

STEPS = 12
# of the wall clock, or counted anew by each call, as MyPT counts them
PROJECTED = (
    "timestamp", "started_at", "elapsed_s", "eval_duration_s", "tokens_per_sec", "mfu",
    "steps_per_sec", "total_elapsed_s", "total_elapsed_h", "total_steps", "total_tokens",
    "tokens_processed", "progress_pct",
)  # fmt: skip
RUN = {"grad_accum_steps": 2, "checkpoint_dir": "runs/toy", "eval_seed": 7, "warmup_iters": 0.25}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def again(cfg, loader, steps=STEPS, name="toy", **arguments):
    """What a script does that finds a checkpoint: load it, and call fit with its step."""
    saved = bundle.read(Path("runs", name))
    model = model_of(cfg, seed=99)
    model.load_state_dict(saved.state_dict)
    optimizer = adamw(model)
    optimizer.load_state_dict(saved.optimizer)
    torch.manual_seed(5)  # wherever a new process begins
    np.random.seed(6)
    given = {"eval_interval": 4, "eval_iters": 2, "log_file": "fit.jsonl", **RUN, **arguments}
    start = saved.training_state["step"]
    losses = fit(model, loader, optimizer, steps, start_step=start, **given)
    return model, optimizer, losses


def state(result):
    model, optimizer, losses = result
    moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [*model.state_dict().values(), *moments, *losses.values()]


def story(path="fit.jsonl"):
    told = [e for e in events(path) if e["event"] != "training_start"]
    return [{k: v for k, v in e.items() if k not in PROJECTED} for e in told]


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


class Stops:
    """A loader that something happens to at its n-th training batch."""

    def __init__(self, loader, n, what):
        self.loader, self.left, self.what = loader, n, what
        self.dataset_dir = type(loader).__name__  # the same data under both names
        if hasattr(loader, "state_dict"):
            self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def get_batch(self, split):
        batch = self.loader.get_batch(split)
        self.left -= split == "train"
        if self.left == 0 and split == "train":
            self.what()
        return batch


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def die():
    raise RuntimeError("the machine died")


# in the middle of a step, between two steps after an evaluation, and in the first one
STOPS = [(loader, what, at) for loader in (TextLoader, ShardLoader, EpisodeLoader)
         for what in (interrupt, die) for at in (14, 17, 1)]  # fmt: skip
SOME = [(TextLoader, interrupt, 14), (ShardLoader, die, 17), (EpisodeLoader, interrupt, 17)]


@pytest.mark.parametrize(
    ("loader", "what", "at"),
    [s if s in SOME else pytest.param(*s, marks=pytest.mark.slow) for s in STOPS],
)
def test_a_resumed_run_is_the_one_that_never_stopped(loader, what, at) -> None:
    cfg = config(dropout=0.2)
    if loader is EpisodeLoader:  # two training batches for the accuracy of each evaluation before
        cfg.use_loss_mask = True
        at += 2 * ((at - 1) // 8 + 1)
    whole = run(cfg, Stops(loader(cfg), -1, die), STEPS, **RUN)
    told = story()
    Path("runs").rename("whole")
    Path("fit.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt if what is interrupt else RuntimeError):
        run(cfg, Stops(loader(cfg), at, what), STEPS, **RUN)
    resumed = again(cfg, Stops(loader(cfg), -1, die))
    assert_same(state(whole), state(resumed))
    assert story() == told
    for name in ("toy", "toy_gold", "toy_fp16"):
        one, two = bundle.read(Path("whole", name)), bundle.read(Path("runs", name))
        assert_same(list(one.state_dict.values()), list(two.state_dict.values()))
        assert one.training_state["step"] == two.training_state["step"]


def test_a_curriculum_goes_on_where_it_was() -> None:
    """The script gives the phase it is in, and the whole schedule again, as MyPT's does."""
    cfg = config(dropout=0.2)

    def curriculum(at=-1, what=die):
        first, second = TextLoader(cfg), Stops(EpisodeLoader(cfg), at, what)
        return first, second, {"data_loader_schedule": [(5, second, "second")], **RUN}

    first, _, given = curriculum()
    whole = run(cfg, first, STEPS, initial_phase="first", **given)
    told = story()
    shutil.rmtree("runs")
    Path("fit.jsonl").unlink()
    first, _, given = curriculum(9, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, first, STEPS, initial_phase="first", **given)
    _, second, given = curriculum()
    resumed = again(cfg, second, initial_phase="second", **given)
    assert_same(state(whole), state(resumed))
    assert story() == told


@pytest.mark.parametrize("at", [2, 4, 5, 12, 15, 16])
def test_an_evaluation_that_was_interrupted_is_made_again(at) -> None:
    """Of val, of another set, of training data for an accuracy: each loader with its position."""
    cfg = config(dropout=0.0, use_loss_mask=True)

    def interrupted(at, calls):
        loader = EpisodeLoader(cfg)
        given = loader.get_batch

        def get_batch(split="train"):
            calls[0] += 1
            if calls[0] == at:
                interrupt()
            return given(split)

        loader.get_batch = get_batch
        return loader

    def losses(name, at):
        calls = [0]
        one, two = (interrupted(at, calls) for _ in "ab")
        where = {"checkpoint_dir": f"runs/{name}", "log_file": f"{name}.jsonl"}
        given = {"eval_data_loaders": {"more": two}, "eval_interval": 3, "eval_iters": 2, **where}
        if not at:
            run(cfg, one, 4, **given)
            return story(f"{name}.jsonl")
        with pytest.raises(KeyboardInterrupt):
            run(cfg, one, 4, **given)
        given["eval_data_loaders"] = {"more": EpisodeLoader(cfg)}
        again(cfg, EpisodeLoader(cfg), 4, **given, grad_accum_steps=1, eval_seed=None,
              learning_rate=1e-3, warmup_iters=0, name=name)  # fmt: skip
        return story(f"{name}.jsonl")

    assert losses("parts", at) == losses("whole", 0)


def test_the_line_that_says_what_is_continued(capsys) -> None:
    cfg = config()
    with pytest.raises(KeyboardInterrupt):
        run(cfg, Stops(TextLoader(cfg), 9, interrupt), STEPS, **RUN)
    assert "run the script again to continue" in capsys.readouterr().out
    again(cfg, Stops(TextLoader(cfg), -1, die))
    line = "continuing runs/toy at step 4: random numbers, data position, gold and log are restored"
    assert line in capsys.readouterr().out


def test_rounded_weights_become_the_exact_ones(capsys) -> None:
    """Q-2, Q-3: MyPT's script makes a model bf16, which must not cost what was learned."""
    cfg = config(dropout=0.2)
    whole = run(cfg, TextLoader(cfg), STEPS, **RUN)
    Path("runs").rename("whole")
    Path("fit.jsonl").unlink()
    with pytest.raises(RuntimeError):
        run(cfg, Stops(TextLoader(cfg), 19, die), STEPS, **RUN)
    saved = torch.load("runs/toy/model.pt")["state_dict"]
    assert {v.dtype for v in saved.values()} == {torch.bfloat16}
    model = model_of(cfg)
    model.load_state_dict({k: v.float() for k, v in saved.items()})
    optimizer = adamw(model)
    optimizer.load_state_dict(bundle.read(Path("runs/toy")).optimizer)
    model.to(torch.bfloat16)  # as train.py does on a new GPU, after the optimizer was made
    loader = TextLoader(cfg)
    loader.dataset_dir = "TextLoader"
    given = {"eval_interval": 4, "eval_iters": 2, "log_file": "fit.jsonl", **RUN}
    losses = fit(model, loader, optimizer, STEPS, start_step=8, **given)
    assert "weights came in bfloat16; training keeps them in fp32" in capsys.readouterr().err
    assert_same(state(whole), state((model, optimizer, losses)))


def test_gold_is_remembered() -> None:
    """Q-4: with MyPT the first evaluation after a resume is always gold."""
    cfg = config()
    run(cfg, TextLoader(cfg), 4, **RUN)
    best = events("fit.jsonl", "training_complete")[-1]["best_gold_val_loss"]
    step = bundle.read(Path("runs/toy_gold")).training_state["step"]
    model = again(cfg, TextLoader(cfg), 8, learning_rate=3.0, eval_interval=2)[0]  # it breaks
    later = [e["val_loss"] for e in events("fit.jsonl", "eval")][-2:]
    assert min(later[1], events("fit.jsonl", "training_complete")[-1]["final_val_loss"]) > best
    assert bundle.read(Path("runs/toy_gold")).training_state["step"] == step
    assert model.training


def test_other_weights_do_not_inherit_a_directory(capsys) -> None:
    cfg = config()
    run(cfg, TextLoader(cfg), 4, **RUN)
    _, optimizer, _ = run(cfg, TextLoader(cfg), 6, model=model_of(cfg, 50), start_step=4, **RUN)
    assert "holds other weights than these" in capsys.readouterr().err
    assert next(iter(optimizer.state.values()))["step"] == 2
    assert len(events("fit.jsonl", "training_start")) == 2
    run(cfg, TextLoader(cfg), 9, model=model_of(cfg, 51), start_step=8, **RUN)
    assert "runs/toy is at step 6, not 8" in capsys.readouterr().err


def test_a_finished_run_trains_no_further_step() -> None:
    """Q-20: with MyPT every call at the same max_iters makes one more update."""
    cfg = config()
    whole = run(cfg, TextLoader(cfg), 6, **RUN)
    log, files = Path("fit.jsonl").read_text(), sorted(Path("runs/toy").iterdir())
    stamps = [f.stat().st_mtime_ns for f in files]
    assert bundle.read(Path("runs/toy")).training_state["step"] == 6
    result = again(cfg, TextLoader(cfg), 6)
    assert_same(state(whole), state(result))
    assert next(iter(result[1].state.values()))["step"] == 6
    assert Path("fit.jsonl").read_text() == log
    assert [f.stat().st_mtime_ns for f in files] == stamps


def test_a_step_with_a_nan_is_left_out_and_training_goes_on_with_the_next_batches() -> None:
    cfg = config(dropout=0.0)

    class Poisoned(EpisodeLoader):
        def get_batch(self, split="train"):
            x, y, mask = super().get_batch(split)
            if split == "train" and self.at["train"] == 4:
                mask[1, 2] = float("nan")
            return x, y, mask

    loader = Poisoned(cfg, packed=False)
    run(cfg, loader, 6, grad_accum_steps=2)
    skipped = events("fit.jsonl", "skipped_step")
    assert [(e["iter"], e["samples"]) for e in skipped] == [(1, [8, 16])]
    assert [at for split, at in loader.drawn if split == "train"][:14] == list(range(14))
    assert len(events("fit.jsonl", "train")) == 6


@pytest.mark.parametrize("stateful", [True, False])
def test_a_step_that_ran_out_of_memory_is_made_again_from_the_same_batches(
    monkeypatch, stateful
) -> None:
    cfg = config(dropout=0.0)
    run(cfg, EpisodeLoader(cfg, stateful=stateful), 5, grad_accum_steps=2, eval_interval=100)
    wanted = [e["loss"] for e in events("fit.jsonl", "train")]
    Path("fit.jsonl").unlink()
    model, calls = model_of(cfg), [0]
    summed = type(model).summed_loss

    def short(self, **inputs):
        calls[0] += self.training
        if self.training and calls[0] == 4:  # the second batch of the second step
            raise MemoryError("too little")
        return summed(self, **inputs)

    monkeypatch.setattr(type(model), "summed_loss", short)
    loader = EpisodeLoader(cfg, stateful=stateful)
    run(cfg, loader, 5, model=model, grad_accum_steps=2, eval_interval=100)
    assert [e["micro_batch_size"] for e in events("fit.jsonl", "oom")] == [2]
    found = [e["loss"] for e in events("fit.jsonl", "train")]
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    drawn = [at for split, at in loader.drawn if split == "train"]
    assert drawn[:10] == list(range(10))  # none twice: they are kept


def test_another_thread_hears_no_signals_and_trains() -> None:
    cfg, found = config(), []
    handlers = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: found.append(run(cfg, TextLoader(cfg), 3)))
    thread.start()
    thread.join()
    assert set(found[0][2]) == {"train", "val"}
    assert signal.getsignal(signal.SIGINT) is handlers


def test_sigterm_saves_and_ends_the_script() -> None:
    cfg = config()
    stop = Stops(TextLoader(cfg), 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run(cfg, stop, STEPS, **RUN)
    assert ended.value.code == 143
    assert bundle.read(Path("runs/toy")).training_state["step"] == 4


def test_either_trainer_continues_the_others_run(capsys) -> None:
    """fit and `mypt-fast train` write one kind of checkpoint; only the order of data is another."""
    cfg = config(device="cpu")
    for split in ("train", "val"):
        Path("data", split).mkdir(parents=True)
        letters(2000).astype("<u4").tofile(Path("data", split, "shard_00000.bin"))
    kind = {"token_kind": "char", "chars": list(LETTERS)}
    Path("data/tokenizer_state.json").write_text(json.dumps(kind))
    loader = TextLoader(cfg)
    loader.dataset_dir = "data"
    given = {"checkpoint_dir": "checkpoints/toy", "dataset_dir": "data", "eval_seed": 7}
    run(cfg, loader, 4, **given)
    assert main(["train", "--model_name", "toy", "--max_iters", "6", "--no_use_amp"]) == 0
    assert "from get_batch/v1 of data to data: its order starts anew" in capsys.readouterr().err
    saved = bundle.read(Path("checkpoints/toy"))
    assert saved.training_state["step"] == 6
    model = model_of(cfg)
    model.load_state_dict(saved.state_dict)
    optimizer = adamw(model)
    optimizer.load_state_dict(saved.optimizer)
    fit(model, loader, optimizer, 8, 4, 2, start_step=6, log_file="fit.jsonl", **given)
    told = capsys.readouterr()
    assert "continuing checkpoints/toy at step 6" in told.out
    assert "from data to get_batch/v1 of data: its order starts anew" in told.err
    assert [e["iter"] for e in events("fit.jsonl", "train")] == list(range(8))
    assert next(iter(optimizer.state.values()))["step"] == 8


def test_a_loader_whose_data_changed_starts_its_order_anew(capsys) -> None:
    cfg = config()

    class Changed(EpisodeLoader):
        def state_dict(self):
            return {"at": self.at, "of": "other episodes"}

        def load_state_dict(self, state):
            if "of" not in state:
                raise DataError("these are other episodes")
            super().load_state_dict(state)

    run(cfg, Stops(EpisodeLoader(cfg), -1, die), 4, **RUN)
    loader = Stops(Changed(cfg), -1, die)
    loader.dataset_dir = "EpisodeLoader"
    again(cfg, loader, 5)
    assert "note: these are other episodes; its order starts anew" in capsys.readouterr().err
    drawn = [at for split, at in loader.loader.drawn if split == "train"]
    assert drawn[:2] == [0, 1]
