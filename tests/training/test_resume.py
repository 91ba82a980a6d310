"""A run that was stopped and continued equals one that never was, bit for bit."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, events, write_dataset

from mypt_fast.checkpoint import bundle
from mypt_fast.data.loader import TokenLoader
from mypt_fast.kernels import dropped_attention
from mypt_fast.training import device as devices
from mypt_fast.training.journal import Journal
from mypt_fast.training.store import Store
from mypt_fast.training.trainer import Trainer

WALL_CLOCK = (
    "timestamp",
    "elapsed_s",
    "eval_duration_s",
    "tokens_per_sec",
    "mfu",
    "tokens_processed",
    "progress_pct",
)


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it, nothing is saved."""


def projected(name: str) -> list[dict]:
    """What the log says about the training, without clocks and restarts."""
    kept = [e for e in events(name) if e["event"] not in ("training_start", "training_complete")]
    return [{k: v for k, v in e.items() if k not in WALL_CLOCK} for e in kept]


def assert_same_run(a: str, b: str) -> None:
    """Weights, moments, data position, RNG and log of two runs are equal."""
    one, two = (bundle.read(Path("checkpoints") / n) for n in (a, b))
    assert one.training_state["step"] == two.training_state["step"]
    for key, weight in one.state_dict.items():
        assert torch.equal(weight, two.state_dict[key]), key
    for group in (one.optimizer, two.optimizer):
        assert len(group["state"]) == sum(len(g["params"]) for g in group["param_groups"])
    for i, moments in one.optimizer["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, two.optimizer["state"][i][key])
    for key in ("rng", "data", "progress"):
        assert one.manifest[key] == two.manifest[key]
    assert projected(a) == projected(b)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, target: type, method: str) -> None:
    """Send this process SIGINT at the n-th call of a method."""
    original, count = getattr(target, method), [0]

    def counted(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(target, method, counted)


# 12 steps of 4 micro-steps each, evaluations at 0, 5, 10 and the end
@pytest.mark.parametrize(("target", "method", "call"), [
    (TokenLoader, "next", 1),  # first micro-step of all
    (TokenLoader, "next", 4 * 3 + 2),  # inside the accumulation of step 3
    (TokenLoader, "next", 4 * 3 + 4),  # its last micro-step
    (TokenLoader, "next", 4 * 11 + 3),  # inside the last step
    (TokenLoader, "read", 1),  # inside the first evaluation
    (TokenLoader, "read", 4),  # inside the second
    (TokenLoader, "read", 8),  # inside the final one
    (Journal, "step", 7),  # between steps
    (Journal, "evaluation", 2),  # after an evaluation, before its save
])  # fmt: skip
def test_interrupted_and_resumed_equals_uninterrupted(
    train, monkeypatch: pytest.MonkeyPatch, target: type, method: str, call: int
) -> None:
    assert train("whole") == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, call, target, method)
        assert train("parts") == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


def test_interrupted_again_and_again_equals_uninterrupted(train, monkeypatch) -> None:
    assert train("whole") == 0
    code, starts = 130, 0
    while code == 130:
        with monkeypatch.context() as patched:
            interrupt_at(patched, 2, Journal, "step")
            code = train("parts", resume=starts > 0)
        starts += 1
    assert (code, starts) == (0, 7)  # two steps each, and the last start only finishes
    assert_same_run("whole", "parts")


def test_killed_between_saves_repeats_the_lost_steps_exactly(train, monkeypatch) -> None:
    assert train("whole", "--save_interval", "3") == 0

    def die(self: Journal, step: int, *_: object) -> None:
        if step == 8:  # saves were made at 0, 3, 5, 6
            raise Killed
        original(self, step, *_)

    original = Journal.step
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "step", die)
        with pytest.raises(Killed):
            train("parts", "--save_interval", "3")
    assert [e["iter"] for e in events("parts", "train")] == list(range(8))
    assert train("parts", resume=True) == 0
    assert [e["iter"] for e in events("parts", "train")] == list(range(12))
    assert_same_run("whole", "parts")


def test_saving_mid_run_changes_nothing(train) -> None:
    assert train("plain") == 0
    assert train("saving", "--save_interval", "1") == 0
    assert_same_run("plain", "saving")


def test_low_precision_bundles_resume_from_the_exact_weights(train, monkeypatch) -> None:
    assert train("whole", "--save_dtype", "bf16") == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6, Journal, "step")
        assert train("parts", "--save_dtype", "bf16") == 130
    stored = torch.load("checkpoints/parts/model.pt", weights_only=True)
    assert stored["state_dict"]["lm_head.weight"].dtype is torch.bfloat16
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


def test_mixed_precision_resumes_bit_for_bit_too(train, monkeypatch) -> None:
    """In bf16 where this CPU has it; elsewhere the flag falls back to fp32."""
    assert train("whole", "--use_amp", "--amp_dtype", "bf16") == 0
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 6 + 3, TokenLoader, "next")
        assert train("parts", "--use_amp", "--amp_dtype", "bf16") == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")
    plan = bundle.read_info(Path("checkpoints/parts"))["training_state"]["plan"]
    assert plan["precision"] == ("bf16" if devices.cpu_has_bf16() else "fp32")


@pytest.mark.parametrize("policy", ["none", "norms", "block"])
def test_attention_in_strips_resumes_bit_for_bit_too(train, monkeypatch, policy) -> None:
    """The dropout of long rows, here of 12: it draws from the generator that a resume restores."""
    monkeypatch.setattr(dropped_attention, "LEAST_LENGTH", 12)
    monkeypatch.setattr(dropped_attention, "STRIP", 5)
    drawn, draw = [0], dropped_attention._keep_

    def counted(*args) -> None:
        drawn[0] += 1
        draw(*args)

    monkeypatch.setattr(dropped_attention, "_keep_", counted)
    assert train("whole", "--recompute", policy) == 0
    # steps, micro-steps, layers, strips
    assert drawn == [12 * 4 * 2 * 3 * (2 if policy == "block" else 1)]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 6 + 3, TokenLoader, "next")
        assert train("parts", "--recompute", policy) == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


def test_a_longer_run_continues_from_a_finished_one(train, capsys) -> None:
    assert train("a", "--schedule", "constant") == 0
    assert train("a", resume=True) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert train("a", "--max_iters", "20", resume=True) == 0
    assert train("b", "--schedule", "constant", "--max_iters", "20") == 0
    a, b = (events(n, "train") for n in "ab")
    assert [e["iter"] for e in a] == list(range(20))
    assert [e["loss"] for e in a] == [e["loss"] for e in b]


def test_resuming_takes_what_is_not_given_from_the_run(train) -> None:
    flags = ["--weight_decay", "0.3", "--eval_interval", "6", "--seed", "7", "--save_interval", "4"]
    assert train("a", *flags) == 0
    assert train("a", "--max_iters", "14", "--learning_rate", "1e-4", resume=True) == 0
    state = bundle.read_info(Path("checkpoints/a"))["training_state"]
    config = state["training_config"]
    assert (state["step"], config["start_step"], config["max_iters"]) == (14, 12, 14)
    assert (config["weight_decay"], config["eval_interval"], config["seed"]) == (0.3, 6, 7)
    assert config["learning_rate"] == 1e-4
    assert config["dataset_dir"] == "data/toy"
    assert state["plan"]["micro_batch_size"] == 2


def test_gold_state_survives_a_resume(train) -> None:
    assert train("a") == 0
    best = bundle.read_info(Path("checkpoints/a"))["manifest"]["progress"]["gold"]
    assert best["gold_step"] is not None
    # a hopeless learning rate makes every further evaluation worse
    assert train("a", "--max_iters", "16", "--learning_rate", "5", resume=True) == 0
    again = bundle.read_info(Path("checkpoints/a"))["manifest"]["progress"]["gold"]
    assert again["gold_step"] == best["gold_step"]
    assert len(again["history"]) > len(best["history"])
    gold = bundle.read_info(Path("checkpoints/a_gold"))["training_state"]
    assert gold["step"] == best["gold_step"]


def test_a_run_continues_from_its_gold_directory(train) -> None:
    assert train("a") == 0
    step = bundle.read_info(Path("checkpoints/a_gold"))["training_state"]["step"]
    assert train("a_gold", "--max_iters", str(step + 3), resume=True) == 0
    assert [e["iter"] for e in events("a_gold", "train")] == [step, step + 1, step + 2]


def test_evaluations_leave_the_training_untouched(train) -> None:
    assert train("often", "--eval_interval", "1", "--eval_iters", "1") == 0
    assert train("never", "--eval_interval", "100") == 0
    often, never = (events(n, "train") for n in ("often", "never"))
    assert [e["loss"] for e in often] == [e["loss"] for e in never]


def test_the_split_into_micro_batches_does_not_change_the_objective(train) -> None:
    for rows in (8, 3, 1):
        assert train(f"m{rows}", "--dropout", "0", "--micro_batch_size", str(rows)) == 0
    whole = [e["loss"] for e in events("m8", "train")]
    for rows in (3, 1):
        assert [e["loss"] for e in events(f"m{rows}", "train")] == pytest.approx(whole, abs=2e-5)


def test_changed_data_is_refused(train, capsys) -> None:
    assert train("a") == 0
    shard = Path("data/toy/train/shard_00000.bin")
    shard.write_bytes(shard.read_bytes()[:-400])
    assert train("a", "--max_iters", "14", resume=True) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "fingerprint" in error


def test_another_data_source_is_named_and_a_moved_one_continues(train, capsys) -> None:
    assert train("a") == 0
    shutil.copytree("data/toy", "data/moved")
    assert train("a", "--max_iters", "13", "--dataset_dir", "data/moved", resume=True) == 0
    assert "data changed" not in capsys.readouterr().err
    assert position("a") == 13 * 8
    write_dataset(Path("data/other"), seed=9)
    assert train("a", "--max_iters", "14", "--dataset_dir", "data/other", resume=True) == 0
    assert "data changed from data/moved to data/other" in capsys.readouterr().err
    assert position("a") == 8


def position(name: str) -> int:
    """Global sample of the saved data position."""
    manifest = bundle.read_info(Path("checkpoints") / name)["manifest"]
    return manifest["data"][0]["state"]["global_sample"]


def test_settings_given_on_resume_reach_the_optimizer(train) -> None:
    assert train("a") == 0
    assert train("a", "--max_iters", "13", "--weight_decay", "0.5", resume=True) == 0
    groups = bundle.read(Path("checkpoints/a")).optimizer["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert all(g["fused"] for g in groups)


def test_death_between_gold_and_run_repeats_both(train, monkeypatch) -> None:
    assert train("whole") == 0

    def die(self: Store, step: int) -> None:
        if step == 10:
            raise Killed
        original(self, step)

    original = Store.save
    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", die)
        with pytest.raises(Killed):
            train("parts")
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")
    gold = [bundle.read(Path(f"checkpoints/{n}_gold")) for n in ("whole", "parts")]
    assert gold[0].training_state["step"] == gold[1].training_state["step"]
    assert torch.equal(gold[0].state_dict["lm_head.weight"], gold[1].state_dict["lm_head.weight"])


def test_a_save_that_died_between_two_renames_is_found_again(train) -> None:
    assert train("a") == 0
    Path("checkpoints/a").rename("checkpoints/.a.old-999999999")
    assert train("a", "--max_iters", "13", resume=True) == 0
    assert [e["iter"] for e in events("a", "train")] == list(range(13))


def test_what_is_left_of_a_checkpoint_is_not_written_over(train, capsys) -> None:
    assert train("a", "--keep_last", "0") == 0
    Path("checkpoints/a/config.json").unlink()
    before = Path("checkpoints/a/model.pt").read_bytes()
    assert train("a") == 3
    assert "config.json is missing" in capsys.readouterr().err
    Path("checkpoints/a/manifest.json").unlink()
    assert train("a") == 2
    assert "model.pt without config.json" in capsys.readouterr().err
    assert Path("checkpoints/a/model.pt").read_bytes() == before


def test_continuing_from_gold_leaves_the_runs_own_log_alone(train) -> None:
    assert train("a", "--log_file", "mine.jsonl") == 0
    before = Path("mine.jsonl").read_bytes()
    step = bundle.read_info(Path("checkpoints/a_gold"))["training_state"]["step"]
    assert train("a_gold", "--max_iters", str(step + 1), resume=True) == 0
    assert Path("mine.jsonl").read_bytes() == before


def test_a_linked_run_directory_stays_a_link(train) -> None:
    Path("big").mkdir()
    assert train("a") == 0
    Path("checkpoints/a").rename("big/a")
    Path("checkpoints/a").symlink_to(Path("big/a").resolve())
    assert train("a", "--max_iters", "13", resume=True) == 0
    assert Path("checkpoints/a").is_symlink()
    assert bundle.read_info(Path("big/a"))["training_state"]["step"] == 13
    assert [p.name for p in Path("checkpoints").iterdir() if p.name[0] == "."] == [
        ".a.step-000000010"
    ]


def test_a_state_without_a_scaler_resumes_into_one_with(train, monkeypatch) -> None:
    assert train("a") == 0
    half = devices.Precision(torch.float32, True, "cpu")  # scaled, at a dtype a CPU can compute
    monkeypatch.setattr(devices, "precision", lambda *_, **__: (half, None))
    assert train("a", "--max_iters", "14", resume=True) == 0
    assert bundle.read_info(Path("checkpoints/a"))["manifest"]["scaler"]["scale"] == 65536.0
    assert train("a", "--max_iters", "15", resume=True) == 0


def test_freezing_more_on_resume_is_refused_without_blaming_the_file(train, capsys) -> None:
    assert train("a") == 0
    assert train("a", "--max_iters", "14", "--freeze_layers", "1", resume=True) == 2
    assert "freeze_layers and freeze_embeddings stay as they were" in capsys.readouterr().err


def test_training_goes_on_when_its_output_is_closed(train, monkeypatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert train("a") == 0
    assert [e["iter"] for e in events("a", "train")] == list(range(12))


def test_a_bundle_without_manifest_and_optimizer_continues_with_notices(train, capsys) -> None:
    assert train("a") == 0
    for name in ("manifest.json", "optimizer.pt"):
        Path("checkpoints/a", name).unlink()
    assert train("a", "--max_iters", "13", resume=True) == 0
    err = capsys.readouterr().err
    for words in ("cannot be verified", "moments start from zero", "counting it from the step"):
        assert words in err


def test_a_flipped_bit_is_found_before_it_is_used(train, capsys, monkeypatch) -> None:
    assert train("a", "--keep_last", "0") == 0
    path = Path("checkpoints/a/optimizer.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained on corrupt state"))
    assert train("a", "--max_iters", "14", resume=True) == 3
    assert "optimizer.pt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal_to_a_real_process_saves_and_sets_the_exit_code(
    train, dataset: Path, number: int, code: int
) -> None:
    assert train("whole", "--max_iters", "60") == 0
    command = [sys.executable, "-m", "mypt_fast", "train", "--model_name", "parts", *SMALL]
    command += ["--max_iters", "60", "--dataset_dir", str(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 10/"):
                process.send_signal(number)
                break
        rest = process.stdout.read()
    assert process.returncode == code
    assert "stopped at step" in rest
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")
