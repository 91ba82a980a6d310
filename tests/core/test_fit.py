"""What fit promises: its signature, the order of events, files, log lines, and bad input."""

import inspect
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_help import (
    EpisodeLoader,
    TextLoader,
    adamw,
    config,
    events,
    letters,
    model_of,
    mypt_lr,
    run,
    seed_everything,
)

from mypt_fast import model as engine
from mypt_fast.checkpoint import bundle
from mypt_fast.core.fit import fit
from mypt_fast.errors import DataError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def names(path):
    return sorted(p.name for p in Path(path).iterdir())


def test_the_signature_is_mypts_with_max_iters_of_the_seed() -> None:
    given = {k: p.default for k, p in list(inspect.signature(fit).parameters.items())[3:]}
    assert given == {
        "max_iters": 1000, "eval_interval": 20, "eval_iters": 50, "checkpoint_dir": None,
        "start_step": 0, "learning_rate": None, "save_dtype": "bf16", "final_save_dtype": "fp16",
        "warmup_iters": 0, "grad_clip": 1.0, "use_amp": True, "amp_dtype": "bf16",
        "eval_data_loaders": None, "log_file": None, "eval_seed": None, "config_file": None,
        "dataset_dir": None, "eval_prompts_file": None, "eval_max_new_tokens": 64,
        "data_loader_schedule": None, "grad_accum_steps": 1, "initial_phase": None,
        "model_name": None, "gold_selection": None, "token_accuracy_saturation": None,
    }  # fmt: skip
    assert list(inspect.signature(fit).parameters)[:3] == ["model", "data_loader", "optimizer"]


def test_it_moves_the_callers_model_and_optimizer_and_returns_the_final_losses() -> None:
    cfg = config()
    model = model_of(cfg)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = adamw(model)
    _, same, losses = run(cfg, TextLoader(cfg), 3, model=model, optimizer=optimizer)
    assert same is optimizer
    assert {s["step"].item() for s in optimizer.state.values()} == {3.0}
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert list(losses) == ["train", "val"]
    assert all(v.shape == () and v.dtype == torch.float32 for v in losses.values())
    done = events("fit.jsonl", "training_complete")[0]
    assert losses["val"] == pytest.approx(done["final_val_loss"], abs=1e-6)
    assert losses["train"] == pytest.approx(done["final_train_loss"], abs=1e-6)


def test_mfu_is_in_the_log_and_not_among_mypts_lines(capsys) -> None:
    cfg = config()
    run(cfg, TextLoader(cfg), 3)
    start, steps = events("fit.jsonl", "training_start")[0], events("fit.jsonl", "train")
    assert start["ceiling_tflops"] > 0
    assert all(0 <= e["mfu"] < 10 for e in [*steps, *events("fit.jsonl", "training_complete")])
    out = capsys.readouterr().out
    assert "TRAINING COMPLETE" in out
    assert "MFU" not in out


@pytest.mark.parametrize("start", [4, 9])
def test_a_start_at_or_past_the_end_evaluates_and_trains_nothing(start, capsys) -> None:
    cfg = config()
    model, optimizer, losses = run(
        cfg, TextLoader(cfg), 4, start_step=start, checkpoint_dir="runs/x"
    )
    assert 2 < losses["val"] < 4
    assert not optimizer.state
    assert model.training
    assert not Path("runs").exists() or names("runs") == []
    assert "nothing to train" in capsys.readouterr().out


def test_the_learning_rate_is_mypts_at_absolute_steps() -> None:
    cfg = config()
    run(cfg, TextLoader(cfg), 12, learning_rate=1e-3, warmup_iters=0.25, start_step=2)
    found = {e["iter"]: e["lr"] for e in events("fit.jsonl", "train")}
    assert found == pytest.approx({s: mypt_lr(s, 1e-3, 3, 12) for s in range(2, 12)})
    vector = {2: 1e-3, 3: 1e-3, 4: 9.728617e-4, 8: 4.718583e-4, 11: 1.271383e-4}
    assert {s: found[s] for s in vector} == pytest.approx(vector, rel=1e-6)
    evals = events("fit.jsonl", "eval")
    assert [(e["iter"], e["tokens_processed"], e["progress_pct"]) for e in evals] == [
        (4, 2 * 48, 20.0), (8, 6 * 48, 60.0),
    ]  # fmt: skip
    assert evals[0]["lr"] == pytest.approx(vector[4], rel=1e-6)


def test_the_optimizers_own_rate_is_the_default() -> None:
    cfg = config()
    model = model_of(cfg)
    run(cfg, TextLoader(cfg), 1, model=model, optimizer=adamw(model, lr=0.05))
    assert events("fit.jsonl", "train")[0]["lr"] == 0.05


class Named(TextLoader):
    """Says which loader was asked, in one list."""

    def __init__(self, cfg, name, asked):
        super().__init__(cfg)
        self.name, self.asked, self.dataset_dir = name, asked, name

    def get_batch(self, split="train"):
        self.asked.append((self.name, split))
        return super().get_batch(split)


def test_the_evaluation_at_a_switch_still_belongs_to_the_old_data(capsys) -> None:
    cfg, asked = config(), []
    one, two, three = (Named(cfg, name, asked) for name in "abc")
    run(
        cfg, one, 8, eval_iters=1, initial_phase="first",
        data_loader_schedule=[(6, three, "third"), (4, two, "second")],
    )  # fmt: skip
    steps = [("a", "val"), *[("a", "train")] * 4, ("a", "val"), *[("b", "train")] * 2]
    assert asked == [*steps, *[("c", "train")] * 3, ("c", "val")]
    assert [(e["iter"], e["phase"]) for e in events("fit.jsonl", "eval")] == [
        (0, "first"), (4, "first"),
    ]  # fmt: skip
    switches = events("fit.jsonl", "phase_switch")
    assert [(e["iter"], e["new_phase"]) for e in switches] == [(4, "second"), (6, "third")]
    assert "phase: second" in capsys.readouterr().out


def test_a_switch_before_the_start_is_the_callers_own() -> None:
    cfg, asked = config(), []
    one, two = (Named(cfg, name, asked) for name in "ab")
    run(cfg, one, 6, start_step=5, eval_iters=1, data_loader_schedule=[(4, two, "second")])
    assert {name for name, _ in asked} == {"a"}


def test_files_of_a_run() -> None:
    cfg = config()
    Path("mine.json").write_text('{"n_layer": 2, "comment": "kept"}')
    model, _, _ = run(
        cfg, TextLoader(cfg), 8, checkpoint_dir="runs/toy/", config_file="mine.json",
        dataset_dir="data/x", grad_accum_steps=2, warmup_iters=0.25,
    )  # fmt: skip
    assert names("runs") == ["toy", "toy_fp16", "toy_gold"]
    common = ["config.json", "manifest.json", "model.pt", "original_config.json", "tokenizer.json",
              "training_state.json"]  # fmt: skip
    assert names("runs/toy_fp16") == common
    assert set(names("runs/toy")) == {*common, "optimizer.pt", "gold_selection_state.json"}
    assert Path("runs/toy/original_config.json").read_text() == Path("mine.json").read_text()
    assert json.loads(Path("runs/toy/config.json").read_text()) == cfg.to_dict()
    weights = torch.load("runs/toy/model.pt")
    assert (weights["checkpoint_dtype"], weights["model_dtype"]) == ("bf16", "float32")
    state = json.loads(Path("runs/toy/training_state.json").read_text())
    assert (state["step"], state["checkpoint_dtype"]) == (8, "bf16")
    told = state["training_config"]
    wanted = {
        "max_iters": 8, "eval_interval": 4, "eval_iters": 2, "learning_rate": 1e-3,
        "start_step": 0, "save_dtype": "bf16", "warmup_iters": 2, "grad_clip": 1.0,
        "grad_accum_steps": 2, "config_file": "mine.json", "dataset_dir": "data/x",
    }  # fmt: skip
    assert {k: told[k] for k in wanted} == wanted
    rest = ["gold_selection", "token_accuracy_saturation", "model_params"]
    assert list(told)[: len(wanted) + 3] == [*wanted, *rest]  # MyPT's, in its order
    exact = bundle.read(Path("runs/toy")).state_dict  # behind bf16 lies what was trained
    assert all(torch.equal(exact[k], v) for k, v in model.state_dict().items())
    half = torch.load("runs/toy_fp16/model.pt")["state_dict"]
    assert {v.dtype for v in half.values()} == {torch.float16}
    optimizer = torch.load("runs/toy/optimizer.pt")
    assert [len(g["params"]) for g in optimizer["param_groups"]] == [9, 17]
    assert set(optimizer["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_other_dtypes_and_no_copy() -> None:
    cfg = config()
    run(cfg, TextLoader(cfg), 1, checkpoint_dir="a", save_dtype="float32", final_save_dtype=None)
    assert torch.load("a/model.pt")["checkpoint_dtype"] == "float32"
    assert names(".") == ["a", "a_gold", "fit.jsonl"]
    cfg.save_dtype = "fp16"
    run(cfg, TextLoader(cfg), 1, checkpoint_dir="b", save_dtype=None, final_save_dtype="bf16")
    assert torch.load("b/model.pt")["checkpoint_dtype"] == "fp16"
    assert "b_bf16" in names(".")


def test_without_directory_and_log_nothing_is_written(capsys) -> None:
    cfg = config()
    model = model_of(cfg)
    model.tokenizer = None
    run(cfg, TextLoader(cfg), 4, model=model, log_file=None, eval_iters=1)
    assert names(".") == []
    out = capsys.readouterr().out
    assert "val 2." in out
    assert "GOLD" not in out
    assert "Resume training from" not in out


def test_lines_and_fields_of_an_evaluation(capsys) -> None:
    cfg = config()
    others = {"general": TextLoader(cfg, letters(seed=5)), "code": TextLoader(cfg)}
    run(cfg, TextLoader(cfg), 4, eval_data_loaders=others, eval_seed=7, model_name="toy")
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("step 0/4 (0.0%) | "))
    assert lines[at - 1] == ""
    assert lines[at].endswith(" | 0m | ETA ... | 0M tokens")
    told = events("fit.jsonl", "eval")[0]
    assert lines[at + 1] == (
        f"  val {told['val_loss']:.4f} | lr {1e-3:.2e} | phase: train | general "
        f"{told['eval_general']:.4f} | code {told['eval_code']:.4f}"
    )
    start = events("fit.jsonl")[0]
    assert start["event"] == "training_start"
    assert start["config"]["tokens_per_step"] == 48
    assert told["eval_code"] == told["val_loss"]  # the same data and the same seed


def test_an_evaluation_leaves_every_generator_as_it_was() -> None:
    """Q-1, with a loader that draws from all three of them."""

    class Draws(TextLoader):
        def get_batch(self, split="train"):
            self.drawn.append((split, random.random(), np.random.random()))
            return super().get_batch(split)

    def draws(**arguments):
        loader = Draws(cfg)
        run(cfg, loader, 8, **arguments)
        return [entry for entry in loader.drawn if entry[0] == "train"][:8]

    cfg = config(dropout=0.3)
    rarely = draws(eval_interval=100)
    assert draws(eval_interval=1) == draws(eval_interval=2, eval_seed=3) == rarely


def test_masked_accuracies_take_no_training_batches_away() -> None:
    """Q-8: MyPT skips the episodes that an evaluation looked at."""
    cfg = config(use_loss_mask=True)
    loader = EpisodeLoader(cfg)
    run(cfg, loader, 8, eval_iters=3)
    told = events("fit.jsonl", "eval")[1]
    assert 0 <= told["train_masked_token_acc"] <= 1
    assert told["train_masked_token_count"] > 20
    at = [n for split, n in loader.drawn if split == "train"]
    evaluated = [0, 1, 2, *range(4), 4, 5, 6, *range(4, 8), 8, 9, 10]
    assert at == evaluated  # the last three: the training loss at the end
    saturation = {"window": 2, "min_steps_before_check": 0, "unknown": 1}
    run(cfg, EpisodeLoader(cfg), 8, log_file="b.jsonl", token_accuracy_saturation=saturation)
    assert "saturation_detected" in events("b.jsonl", "eval")[1]


def test_masks_and_segments_reach_the_loss() -> None:
    cfg = config(dropout=0.0)
    x, y, mask, segments = EpisodeLoader(cfg).get_batch("train")
    with torch.no_grad():
        total = engine.GPT.forward(model_of(cfg), x, y, mask, segments)
        apart = engine.GPT.forward(model_of(cfg), x, y, mask)
    run(cfg, EpisodeLoader(cfg), 1, eval_iters=1)
    found = events("fit.jsonl", "train")[0]["loss"]
    assert found == pytest.approx(float(total / mask.sum()), abs=1e-5)
    assert abs(float((total - apart) / mask.sum())) > 1e-4


def test_a_short_batch_counts_for_the_tokens_it_has() -> None:
    """Specification 8.3: MyPT's loader gives fewer rows than asked for where shards are short."""
    cfg = config(dropout=0.0)

    class Short(TextLoader):
        def get_batch(self, split="train"):
            return tuple(part[:1] for part in super().get_batch(split))

    run(cfg, Short(cfg), 3, grad_accum_steps=2)
    losses = [e["loss"] for e in events("fit.jsonl", "train")]
    assert losses == pytest.approx([2.78] * 3, abs=0.3)  # not a fourth of it


def test_prompts_are_continued(capsys) -> None:
    cfg = config()
    Path("prompts.json").write_text(json.dumps({"prompts": {"one": "abc"}, "note": 1}))
    run(cfg, TextLoader(cfg), 1, eval_prompts_file="prompts.json", eval_max_new_tokens=3)
    told = events("fit.jsonl", "eval")[0]
    assert len(told["gen"]["one"]) == 3
    assert told["gen"] == told["gen_nocache"]
    assert told["cache_mismatches"] == []


def test_another_fit_of_the_same_model_goes_on_from_its_weights() -> None:
    cfg = config()
    model, optimizer, first = run(cfg, TextLoader(cfg), 4, log_file=None)
    _, _, second = run(
        cfg, TextLoader(cfg), 8, model=model, optimizer=optimizer, start_step=4, log_file=None
    )
    assert {s["step"].item() for s in optimizer.state.values()} == {8.0}
    assert second["val"] < first["val"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"loader": object()}, DataError, "has no get_batch"),
        ({"loader": type("L", (), {"get_batch": lambda *_: 3})()}, DataError, "gave int"),
        ({"eval_interval": 0}, ValueError, "eval_interval is at least 1; found 0"),
        ({"eval_iters": 0}, ValueError, "eval_iters is at least 1"),
        ({"save_dtype": "int8"}, ValueError, "save_dtype='int8'; use one of fp32"),
        ({"final_save_dtype": "f8"}, ValueError, "final_save_dtype='f8'"),
        ({"amp_dtype": "fp32"}, ValueError, "amp_dtype='fp32'; use one of bf16, fp16"),
        ({"data_loader_schedule": [(3, "x")]}, ValueError, "data_loader_schedule"),
        ({"gold_selection": {"guards": {"overfit_ratio": -1}}}, ValueError, "overfit_ratio"),
    ],
)  # fmt: skip
def test_bad_arguments_name_themselves_and_write_nothing(change, error, text) -> None:
    cfg = config()
    arguments = dict(change)
    loader = arguments.pop("loader", None) or TextLoader(cfg)
    with pytest.raises(error, match=text.replace("(", r"\(")):
        run(cfg, loader, 2, checkpoint_dir="runs/x", **arguments)
    assert not Path("runs/x/model.pt").exists()


def test_a_loader_that_fails_leaves_the_last_checkpoint_and_the_model_usable() -> None:
    cfg = config()

    class Fails(TextLoader):
        def get_batch(self, split="train"):
            if len(self.drawn) > 8:
                raise OSError("the disk is gone")
            return super().get_batch(split)

    model = model_of(cfg)
    with pytest.raises(OSError, match="the disk is gone"):
        run(cfg, Fails(cfg), 9, model=model, checkpoint_dir="runs/x")
    assert bundle.read(Path("runs/x")).training_state["step"] == 4
    assert model.training
    seed_everything(1)
    run(cfg, TextLoader(cfg), 5, start_step=4, model=model, checkpoint_dir="runs/x")  # unlocked
