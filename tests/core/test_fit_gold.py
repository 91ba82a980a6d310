"""Gold through fit, with validation losses from a script (MyPT specification 6)."""

import json
from pathlib import Path

import pytest
import torch
from fit_help import CoreGPT, config, events, run

from mypt_fast.checkpoint import bundle
from mypt_fast.tokenizer import Tokenizer

VAL, SIDE, TRAIN = 0, 1, 2  # what a batch is made of says where it is from


class Constant:
    def __init__(self, cfg, val=VAL):
        self.shape, self.val = (cfg.batch_size, cfg.block_size), val

    def get_batch(self, split):
        x = torch.full(self.shape, TRAIN if split == "train" else self.val)
        return x, x.clone()


class Scripted(CoreGPT):
    """Its losses in an evaluation are those of a script; it trains as ever."""

    def summed_loss(self, idx, targets, **more):
        if self.training:
            return super().summed_loss(idx=idx, targets=targets, **more)
        told = self.script[int(idx[0, 0])]
        return torch.tensor(told.pop(0) if told else 99.0) * targets.numel()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def play(vals, side=None, final=50.0, **arguments):
    """One evaluation for each value; returns the gold events as (kind, step, reason)."""
    cfg = config(dropout=0.0)
    model = Scripted(cfg, 3)
    model.tokenizer = Tokenizer.from_text("abc")
    model.script = {VAL: [*vals, final], SIDE: list(side or []), TRAIN: [2.0]}
    others = {"side": Constant(cfg, SIDE)} if side else None
    run(
        cfg, Constant(cfg), len(vals), model=model, eval_interval=1, eval_iters=1,
        checkpoint_dir="runs/toy", learning_rate=1e-5, eval_data_loaders=others, **arguments,
    )  # fmt: skip
    told = [e for e in events("fit.jsonl") if e["event"].startswith("gold")]
    return [(e["event"], e["iter"], e.get("reason", "")) for e in told]


def saved(*steps):
    return [("gold_checkpoint", step, "") for step in steps]


def test_the_dip_after_two_rises_is_blocked_and_the_next_one_is_not() -> None:
    assert play([5, 4, 4.1, 4.2, 3.9, 3.8]) == [
        *saved(0, 1), ("gold_blocked", 4, "trend: 2 consecutive val rises"), *saved(5),
    ]  # fmt: skip
    assert bundle.read(Path("runs/toy_gold")).training_state["step"] == 5


def test_an_equal_value_saves_nothing() -> None:
    assert play([5, 5, 5, 4, 4]) == saved(0, 3)


def test_a_block_that_hits_no_new_minimum_is_not_told() -> None:
    assert play([5, 4, 4.1, 4.2, 4.3]) == saved(0, 1)


def test_strict_compat_tells_it_as_mypt_does(monkeypatch) -> None:
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "1")
    assert play([5, 4, 4.1, 4.2, 4.3]) == [
        *saved(0, 1), ("gold_blocked", 4, "trend: 2 consecutive val rises")
    ]  # fmt: skip


@pytest.mark.parametrize(("now", "blocked"), [(2.41, True), (2.39, False)])
def test_another_set_that_rises_by_more_than_a_fifth_blocks(now, blocked) -> None:
    told = play([5, 4], side=[2.0, now])
    assert told[0] == saved(0)[0]
    assert told[1][:2] == ("gold_blocked" if blocked else "gold_checkpoint", 1)
    if blocked:
        assert told[1][2].startswith("eval regression: side 2.0000→2.4100 (+20.5%")


def test_the_end_of_a_run_passes_the_guards_too() -> None:
    """Q-5: MyPT promotes a lower final loss whatever the guards said."""
    told = play([5, 4, 4.1, 4.2], final=3.0)
    assert told[-1] == ("gold_blocked", 4, "trend: 2 consecutive val rises")
    assert bundle.read(Path("runs/toy_gold")).training_state["step"] == 1


def test_a_final_minimum_is_promoted_at_the_step_it_is_of() -> None:
    assert play([5, 4], final=3.0)[-1] == ("gold_checkpoint_final_eval", 2, "")
    state = json.loads(Path("runs/toy/gold_selection_state.json").read_text())
    assert (state["gold_step"], state["best_gold_val_loss"]) == (2, 3.0)
    assert bundle.read(Path("runs/toy_gold")).training_state["step"] == 2


def test_the_overfit_guard_fires() -> None:
    """Q-5: MyPT never computes the training loss that it compares with."""
    rules = {"guards": {"overfit_ratio": 1.5}}  # letters of one kind: loss 2.8 and falling
    told = play([5, 4.9], gold_selection=rules)
    assert told[0] == saved(0)[0]  # nothing was trained on yet
    assert told[1][0] == "gold_blocked"
    assert told[1][2].startswith("overfit: val/train=")


def test_guards_are_off_on_request_and_unknown_settings_are_defaults() -> None:
    rules = {"apply_loss_guards": False, "strategy": "luck", "guards": 3, "new": 1}
    assert play([5, 4, 4.1, 4.2, 3.9], gold_selection=rules) == saved(0, 1, 4)


def test_no_directory_no_gold() -> None:
    play([5, 4], gold_selection=None)
    Path("fit.jsonl").unlink()
    cfg = config()
    model = Scripted(cfg, 3)
    model.tokenizer, model.script = None, {VAL: [5.0, 4.0], TRAIN: [2.0]}
    run(cfg, Constant(cfg), 2, model=model, eval_interval=1, eval_iters=1)
    assert not [e for e in events("fit.jsonl") if e["event"].startswith("gold")]
    assert sorted(p.name for p in Path().iterdir()) == ["fit.jsonl", "runs"]


GATE = """
import json, pathlib, sys
saw = json.loads(pathlib.Path("runs/toy/training_state.json").read_text())["step"]
with open("seen.txt", "a") as f:
    f.write(f"{saw} {pathlib.Path.cwd().name} {sys.argv[1]}\\n")
json.dump({"gate_passed": saw != 1, "rate": saw / 10}, open(sys.argv[2], "w"))
"""


def test_the_gate_judges_the_checkpoint_of_its_own_evaluation() -> None:
    """Q-10: MyPT's sees the one before, and at the first evaluation none."""
    Path("gate.py").write_text(GATE)
    rules = {
        "strategy": "external_gate",
        "external_gate": {
            "enabled": True, "script": "gate.py", "args": ["{model_name}", "{output_json}"],
            "metric_path": "rate", "require_pass": True, "run_on_final_eval": False,
        },
    }  # fmt: skip
    told = play([5, 4, 6], gold_selection=rules, model_name="toy-run")
    here = Path.cwd().name
    assert Path("seen.txt").read_text().splitlines() == [
        f"{step} {here} toy-run" for step in range(3)
    ]
    assert [(kind, step) for kind, step, _ in told] == [
        ("gold_checkpoint", 0), ("gold_blocked", 1), ("gold_checkpoint", 2),
    ]  # fmt: skip
    assert [e["gold_gate"]["metric_value"] for e in events("fit.jsonl", "eval")] == [0.0, 0.1, 0.2]
    kept = json.loads(Path("runs/toy/gold_selection_state.json").read_text())["last_gate"]
    assert list(kept) == [
        "ran", "ok", "gate_pass", "metric_value", "returncode", "output_json", "error",
    ]  # fmt: skip


def gold_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "GOLD" in line]


def test_lines_of_gold_begin_as_mypts(capsys) -> None:
    """Specification 4.6."""
    play([5, 4, 4.1, 4.2, 3.9], final=3.0, side=[2.0] * 6)
    told = capsys.readouterr().out.splitlines()
    gold = [line for line in told if line.startswith("  GOLD")]
    assert gold == [
        "  GOLD checkpoint! strategy=val_loss val_loss=5.0000 step=0",
        "  GOLD checkpoint! strategy=val_loss val_loss=4.0000 step=1",
        "  GOLD blocked: trend: 2 consecutive val rises",
        "  GOLD checkpoint updated from final eval: strategy=val_loss val_loss=3.0000 step=5",
    ]
    assert [line for line in told if "baseline" in line] == ["  Eval baselines: side 2.0000"]
    assert told.count("TRAINING COMPLETE") == 1
    assert "  Best gold: val_loss=3.0000 at step 5" in told


def test_a_gate_is_in_the_line_of_gold(capsys) -> None:
    Path("gate.py").write_text(GATE)
    ext = {
        "enabled": True, "script": "gate.py", "args": ["toy", "{output_json}"],
        "metric_path": "rate", "run_on_final_eval": False,
    }  # fmt: skip
    play([5], gold_selection={"external_gate": ext})
    line = "  GOLD checkpoint! strategy=val_loss val_loss=5.0000 step=0 gate_metric=0.0"
    assert f"{line} gate_pass=True" in gold_lines(capsys)


def test_fields_of_gold_events_come_in_mypts_order() -> None:
    play([5, 4, 4.1, 4.2, 3.9])
    common = ["event", "iter", "timestamp", "strategy", "val_loss", "best_gold_val_loss",
              "best_gate_metric"]  # fmt: skip
    gate = ["gate_pass", "gate_metric"]
    by_kind = {e["event"]: list(e) for e in events("fit.jsonl")}
    assert by_kind["gold_checkpoint"] == [*common, *gate, "prev_best"]
    assert by_kind["gold_blocked"] == [*common, "reason", *gate, "best_val_loss"]
    complete = events("fit.jsonl", "training_complete")[0]
    assert type(complete["tokens_per_sec"]) is float
