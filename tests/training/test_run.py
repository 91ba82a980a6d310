"""What a run leaves behind, what it prints, and how it refuses what it cannot use."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import LETTERS, events, write_dataset

from mypt_fast import console
from mypt_fast.checkpoint import bundle
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.signals import StopSignal

GOLDEN = Path(__file__).parent / "golden"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused command."""
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ")
    assert not any("Traceback" in line for line in err)
    return err[-1]


# what a run leaves behind


def test_the_bundle_has_mypts_files_and_fields(train) -> None:
    assert train("a") == 0
    root = Path("checkpoints/a")
    names = {p.name for p in root.iterdir()}
    assert names == {
        "model.pt",
        "optimizer.pt",
        "config.json",
        "tokenizer.json",
        "training_state.json",
        "gold_selection_state.json",
        "manifest.json",
    }
    config = json.loads((root / "config.json").read_text())
    assert list(config) == list(ModelConfig().to_dict())
    assert (config["vocab_size"], config["device"]) == (len(LETTERS), "cpu")
    model = torch.load(root / "model.pt", weights_only=True)
    assert list(model) == ["state_dict", "checkpoint_dtype", "model_dtype"]
    state = json.loads((root / "training_state.json").read_text())
    assert (state["step"], state["optimizer_file"]) == (12, "optimizer.pt")
    seed_003 = {
        "max_iters": 12,
        "eval_interval": 5,
        "eval_iters": 2,
        "learning_rate": 0.01,
        "start_step": 0,
        "grad_accum_steps": 2,
    }
    assert seed_003.items() <= state["training_config"].items()
    assert state["training_config"]["model_params"]["total_params"] == sum(
        v.numel() for v in model["state_dict"].values()
    )
    optimizer = torch.load(root / "optimizer.pt", weights_only=True)
    assert [g["weight_decay"] for g in optimizer["param_groups"]] == [0.1, 0.0]
    assert {"step", "exp_avg", "exp_avg_sq"} == set(optimizer["state"][0])


def test_the_fp16_copy_has_no_optimizer_and_gold_has_one(train) -> None:
    assert train("a") == 0
    assert not Path("checkpoints/a_fp16/optimizer.pt").exists()
    weights = torch.load("checkpoints/a_fp16/model.pt", weights_only=True)["state_dict"]
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert Path("checkpoints/a_gold/optimizer.pt").exists()


def test_every_file_is_in_the_manifest_with_its_hash(train) -> None:
    import xxhash

    assert train("a") == 0
    for folder in ("a", "a_gold", "a_fp16"):
        root = Path("checkpoints", folder)
        manifest = json.loads((root / "manifest.json").read_text())
        assert set(manifest["files"]) == {p.name for p in root.iterdir()} - {"manifest.json"}
        for name, entry in manifest["files"].items():
            data = (root / name).read_bytes()
            assert entry == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def test_the_log_holds_the_events_of_the_format_in_order(train) -> None:
    assert train("a") == 0
    log = events("a")
    assert [e["event"] for e in log if e["event"] != "train"][:2] == ["training_start", "eval"]
    assert log[-1]["event"] == "training_complete"
    start, evals, steps = log[0], events("a", "eval"), events("a", "train")
    assert list(start)[:2] == ["event", "timestamp"]
    assert start["config"]["tokens_per_step"] == 8 * 12
    assert start["model"]["total_params"] == ModelParams.total
    assert [e["iter"] for e in evals] == [0, 5, 10]
    wanted = [
        "event",
        "iter",
        "timestamp",
        "elapsed_s",
        "tokens_processed",
        "progress_pct",
        "lr",
        "phase",
        "val_loss",
    ]
    assert list(evals[1])[: len(wanted)] == wanted
    assert evals[1]["tokens_processed"] == 5 * 96
    assert evals[1]["progress_pct"] == 41.67
    assert [e["iter"] for e in steps] == list(range(12))
    complete = log[-1]
    assert (complete["total_steps"], complete["total_tokens"]) == (12, 12 * 96)
    gold = [e for e in log if e["event"].startswith("gold_checkpoint")]
    assert complete["gold_step"] == gold[-1]["iter"]
    assert {"val_loss", "prev_best", "best_gold_val_loss"} <= set(gold[0])
    assert complete["final_train_loss"] < steps[0]["loss"]


class ModelParams:
    """Of the model of these tests, by hand: 2VC + V + TC + L(12CC + 9C) + 2C."""

    total = 2 * 16 * 16 + 16 + 12 * 16 + 2 * (12 * 256 + 9 * 16) + 2 * 16


def test_the_console_reads_as_the_documents_say(train, capsys) -> None:
    assert train("a") == 0
    out = capsys.readouterr().out
    for pattern, shown in (
        (r"\d\d:\d\d:\d\d", "HH:MM:SS"), (r"\| ETA [\d.]+[mh]", "| ETA 0m"),
        (r"\| \d+m", "| 0m"), (r"in \d+s \| [\d,]+ tokens/s", "in 0s | N tokens/s"),
        (r"MFU \d+ % of (.*) [\d.e-]+ TFLOP/s", r"MFU N % of \1 N TFLOP/s"),
        (r"(?m)^(device|memory|time ).*$", r"\1 ..."),
    ):  # fmt: skip
        out = re.sub(pattern, shown, out)
    out = re.sub(r"(\d\.\d\d)\d\d", r"\1..", out)  # the last digits differ between CPUs
    golden = GOLDEN / "console.txt"
    if os.environ.get("MYPT_UPDATE_GOLDEN"):
        golden.write_text(out, encoding="utf-8")
    assert out == golden.read_text(encoding="utf-8")


def test_gold_lines_are_the_seeds() -> None:
    assert console.gold_saved_line(0.6326, 200) == (
        "  🏆 New GOLD checkpoint! val_loss=0.6326 at step 200"
    )
    assert console.gold_blocked_line(0.49, 0.5173, "overfit: val/train=490.0x, threshold=5.0x") == (
        "  ⚠️  GOLD blocked: val 0.4900 < best 0.5173 but overfit (val/train=490.0x, threshold=5.0x)"
    )
    lines = console.finished_lines(
        "checkpoints/my_model", "checkpoints/my_model_fp16",
        ("checkpoints/my_model_gold", 300, 0.5173),
    )  # fmt: skip
    assert lines == [
        "Training finished!",
        "  Resume training from: checkpoints/my_model",
        "  Deploy inference from: checkpoints/my_model_fp16",
        "  🏆 Best (GOLD) checkpoint: checkpoints/my_model_gold (step 300, val_loss=0.5173)",
    ]


def test_the_eval_summary_is_the_seeds() -> None:
    sets = {"general": 4.2346, "domain": 4.3457, "code": 3.9877, "retrieval": 4.5679}
    lines = console.eval_lines(
        step=350, start_step=0, max_iters=75000, elapsed_s=887.0, tokens=34406400,
        val_loss=4.123456, lr=1.4e-5, phase="circuit_formation", eval_sets=sets, clock="14:45:12",
    )  # fmt: skip
    assert lines == [
        "step 350/75000 (0.5%) | 14:45:12 | 14m | ETA 52.6h | 34M tokens",
        "  val 4.1235 | lr 1.40e-05 | phase: circuit_formation | general 4.2346 | domain 4.3457"
        " | code 3.9877 | retrieval 4.5679",
    ]


# phases, further sets, text in memory


def test_a_curriculum_switches_data_at_its_step_and_resumes(dataset: Path, capsys) -> None:
    write_dataset(Path("data/second"), seed=9)
    preset = {
        "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 12, "batch_size": 2, "dropout": 0.0,
        "vocab_size": 50304, "bias": False, "eval_interval": 4, "eval_iters": 1,
        "eval_sets": {"other": "data/second"},
        "curriculum": {"phases": [
            {"name": "first", "dataset_dir": "data/toy", "until_iter": 4},
            {"name": "second", "dataset_dir": "data/second", "until_iter": None},
        ]},
    }  # fmt: skip
    Path("c.json").write_text(json.dumps(preset))
    assert main(["train", "--config", "c.json", "--model_name", "whole", "--max_iters", "8"]) == 0
    assert [e["iter"] for e in events("whole", "phase_switch")] == [4]
    evals = events("whole", "eval")
    assert [e["phase"] for e in evals] == ["first", "first"]
    assert all("eval_other" in e for e in evals)
    for last in ("3", "6", "8"):
        flags = ["--schedule", "constant", "--warmup_iters", "0"]
        assert (
            main(
                [
                    "train",
                    "--config",
                    "c.json",
                    "--model_name",
                    "parts",
                    "--max_iters",
                    last,
                    *flags,
                ]
            )
            == 0
        )
    assert (
        main(["train", "--config", "c.json", "--model_name", "one", "--max_iters", "8", *flags])
        == 0
    )
    parts, one = (events(n, "train") for n in ("parts", "one"))
    assert [e["loss"] for e in parts] == [e["loss"] for e in one]


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_a_text_file_trains_in_memory_and_resumes(dataset: Path, kind: str) -> None:
    Path("t.txt").write_text("Nel mezzo del cammin di nostra vita più è bello. " * 40, "utf-8")
    flags = [
        "--n_layer",
        "1",
        "--n_head",
        "1",
        "--n_embd",
        "8",
        "--block_size",
        "8",
        "--batch_size",
        "2",
    ]
    run = ["train", "--model_name", "m", "--max_iters", "3", "--eval_iters", "1"]
    assert main([*run, *flags, "--input_file", "t.txt", "--tokenization", kind]) == 0
    assert main([*run, "--max_iters", "5"]) == 0
    assert [e["iter"] for e in events("m", "train")] == [0, 1, 2, 3, 4]
    tokenizer = json.loads(Path("checkpoints/m/tokenizer.json").read_text())
    assert tokenizer["token_kind"] == kind
    vocabulary = json.loads(Path("checkpoints/m/config.json").read_text())["vocab_size"]
    assert vocabulary == (50304 if kind == "gpt2" else len(tokenizer["chars"]))


def test_frozen_parts_do_not_move(train) -> None:
    assert train("b", "--freeze_layers", "1", "--freeze_embeddings") == 0
    after = bundle.read(Path("checkpoints/b")).state_dict
    config = bundle.read_info(Path("checkpoints/b"))["config"]
    start = GPT(ModelConfig(**config), seed=1337).state_dict()
    for key, value in after.items():
        frozen = key.startswith(("blocks.0.", "token_embedding", "position_embedding"))
        assert torch.equal(value, start[key]) == frozen, key


# refusals


def test_a_dry_run_prints_the_plan_and_writes_nothing(train, capsys) -> None:
    assert train("a", "--dry_run") == 0
    assert train("a", "--max_iters", "0") == 0
    out = capsys.readouterr().out
    assert "8 sequences = 96 tokens a step, in 4 micro-step(s) of 2" in out
    assert not Path("checkpoints").exists()
    assert not Path("logs").exists()


def test_a_missing_text_file_is_one_line(dataset: Path, capsys) -> None:
    assert main(["train", "--model_name", "a", "--input_file", "nope.txt"]) == 2
    assert "nope.txt" in error_line(capsys)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "empty"), (b"  \n ", "empty"), (b"\xff\xfe\x00junk", "not UTF-8"),
    (b"text\x00text" * 99, "NUL"), (b"short", "one window needs"),
])  # fmt: skip
def test_unusable_text_is_one_line(dataset: Path, capsys, content: bytes, words: str) -> None:
    Path("t.txt").write_bytes(content)
    flags = ["--tokenization", "char", "--block_size", "64", "--n_layer", "1"]
    assert main(["train", "--model_name", "a", "--input_file", "t.txt", *flags]) == 2
    assert words in error_line(capsys)
    assert not Path("checkpoints").exists()


def test_a_dataset_shorter_than_the_context_names_both_numbers(train, capsys) -> None:
    assert train("a", "--block_size", "5000") == 2
    line = error_line(capsys)
    assert "3000 tokens" in line
    assert "5001" in line


def test_gpt2_tokens_in_a_small_vocabulary_are_refused(dataset: Path, capsys) -> None:
    Path("data/toy/tokenizer_state.json").write_text('{"token_kind": "gpt2"}')
    assert main(["train", "--config", "tiny_char", "--dataset_dir", "data/toy"]) == 2
    assert "vocab_size is 256" in error_line(capsys)


def test_data_of_another_vocabulary_than_the_runs_is_refused(train, capsys) -> None:
    assert train("a") == 0
    other = write_dataset(Path("data/other"))
    state = {"token_kind": "char", "chars": list("ABCDEFGHIJKLMNOP")}
    (other / "tokenizer_state.json").write_text(json.dumps(state))
    assert train("a", "--max_iters", "14", "--dataset_dir", "data/other", resume=True) == 2
    assert "another vocabulary than the saved run" in error_line(capsys)


def test_a_token_beyond_the_vocabulary_is_named(train, capsys) -> None:
    shard = Path("data/toy/train/shard_00000.bin")
    data = bytearray(shard.read_bytes())
    data[:] = b"\x63\x00\x00\x00" * (len(data) // 4)
    shard.write_bytes(data)
    assert train("a") == 2
    assert "id 99, where vocab_size is 16" in error_line(capsys)


def test_a_missing_dataset_and_tokenizer_state_are_named(dataset: Path, capsys) -> None:
    assert main(["train", "--dataset_dir", "data/none", "--model_name", "a"]) == 2
    assert "data/none" in error_line(capsys)
    Path("data/toy/tokenizer_state.json").unlink()
    assert main(["train", "--dataset_dir", "data/toy", "--model_name", "a"]) == 2
    assert "tokenizer_state.json" in error_line(capsys)


def test_an_unwritable_output_directory_is_refused_before_training(train, capsys) -> None:
    Path("checkpoints").write_text("a file where the folder should be")
    assert train("a") == 2
    assert "cannot write to checkpoints" in error_line(capsys)


def test_a_log_that_cannot_be_written_is_refused_before_training(train, capsys) -> None:
    Path("logs").mkdir()
    Path("logs/train").write_text("in the way")
    assert train("a") == 2
    assert "--log_file" in error_line(capsys)


def test_a_save_that_fails_keeps_the_old_bundle_and_says_so(train, capsys, monkeypatch) -> None:
    assert train("a") == 0
    before = {p.name: p.read_bytes() for p in Path("checkpoints/a").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mypt_fast.checkpoint.bundle.torch.save", full)
    assert train("a", "--max_iters", "20", resume=True) == 2
    line = error_line(capsys)
    assert "No space left on device" in line
    assert "previous checkpoint is intact" in line
    assert {p.name: p.read_bytes() for p in Path("checkpoints/a").iterdir()} == before
    assert [p.name for p in Path("checkpoints").iterdir() if ".tmp" in p.name] == []


def test_a_gpu_asked_for_by_flag_is_an_error_and_by_file_a_notice(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_driver_present", lambda: False)
    with pytest.raises(devices.DeviceError, match="finds no GPU"):
        devices.pick("cuda", explicit=True)
    device, notice = devices.pick("cuda", explicit=False)
    assert device.type == "cpu"
    assert "no GPU here" in (notice or "")
    with pytest.raises(devices.DeviceError, match="unknown device"):
        devices.pick("tpu", explicit=True)


def test_a_gpu_torch_cannot_use_is_never_a_silent_cpu_run(monkeypatch) -> None:
    def too_old() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old\n(found version 11040)")  # noqa: B028
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(devices.DeviceError, match="driver on your system is too old") as e:
        devices.pick(None, explicit=False)
    assert "\n" not in str(e.value)
    assert "--device cpu" in str(e.value)
    assert devices.pick("cpu", explicit=True)[0].type == "cpu"


def test_a_cpu_computes_in_bf16_only_with_the_instructions(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: True)
    assert devices.precision(cpu, True, "bf16", explicit=False)[0].name == "bf16"
    assert devices.precision(cpu, False, "bf16", explicit=True)[0].name == "fp32"
    assert devices.precision(cpu, True, "fp16", explicit=False)[0].name == "fp32"
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: False)
    assert devices.precision(cpu, True, "bf16", explicit=False) == (
        devices.Precision(torch.float32, False, "cpu"),
        None,
    )
    assert "using fp32" in (devices.precision(cpu, True, "bf16", explicit=True)[1] or "")


def test_signal_handlers_are_put_back() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_hostile_members_end_in_one_line(train, capsys) -> None:
    assert train("a", "--keep_last", "0") == 0
    state = Path("checkpoints/a/training_state.json")
    good = state.read_text()
    for text in (
        "[]",
        "{",
        '{"step": "x"}',
        '{"step": -1}',
        '{"step": 3, "training_config": {"max_iters": "many"}}',
    ):
        state.write_text(text)
        assert train("a", "--max_iters", "20", resume=True) in (2, 3)
        error_line(capsys)
    state.write_text(good)
    config = Path("checkpoints/a/config.json")
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    assert train("a", "--max_iters", "20", resume=True) == 3
    assert "n_layer cannot be edited" in error_line(capsys)
    Path("checkpoints/a/manifest.json").unlink()
    assert train("a", "--max_iters", "20", resume=True) == 2
    assert "do not fit" in error_line(capsys)


def test_a_pickle_that_would_run_code_is_refused(train, capsys) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (Path("executed"),))

    assert train("a") == 0
    Path("checkpoints/a/manifest.json").unlink()
    torch.save({"state_dict": Evil()}, "checkpoints/a/model.pt", pickle_module=pickle)
    assert train("a", "--max_iters", "20", resume=True) == 3
    error_line(capsys)
    assert not Path("executed").exists()


def test_compiling_on_a_cpu_without_a_compiler_is_one_line(train, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train("a", "--compile", "on") == 2
    assert "no-such-compiler" in error_line(capsys)


def test_settings_that_do_nothing_here_are_said(dataset: Path, capsys) -> None:
    preset = {
        "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 12, "use_loss_mask": True,
        "gold_selection": {"strategy": "external_gate", "external_gate": {"enabled": True}},
    }  # fmt: skip
    Path("c.json").write_text(json.dumps(preset))
    assert main(["train", "--config", "c.json", "--dataset_dir", "data/toy", "--dry_run"]) == 0
    err = capsys.readouterr().err
    assert err.count("use_loss_mask is off: train split of data/toy stores no masks") == 1
    assert "is not run: --allow_gate lets it; without its pass nothing becomes gold" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # likewise, hidden elsewhere
def test_a_compiled_run_resumes_bit_for_bit_and_follows_the_eager_one(train) -> None:
    flags = ["--dropout", "0", "--schedule", "constant"]
    assert train("eager", *flags) == 0
    assert train("whole", *flags, "--compile", "on") == 0
    assert train("parts", *flags, "--compile", "on", "--max_iters", "6") == 0
    assert train("parts", "--max_iters", "12", resume=True) == 0
    eager, whole, parts = (
        [e["loss"] for e in events(n, "train")] for n in ("eager", "whole", "parts")
    )
    assert whole == parts
    assert whole == pytest.approx(eager, abs=1e-4)


def test_inductor_kernels_are_compiled_or_refused(train, capsys, monkeypatch) -> None:
    assert train("a", "--kernels", "inductor", "--compile", "off") == 2
    assert "--kernels inductor" in error_line(capsys)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train("a", "--kernels", "inductor") == 2
    assert "--kernels inductor needs a C++ compiler" in error_line(capsys)


def test_forced_kernels_that_cannot_run_are_refused(train, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert train("a", "--kernels", "triton") == 2
    assert "--kernels triton cannot run" in error_line(capsys)


def test_a_run_says_which_kernels_it_trains_with(train, capsys) -> None:
    assert train("a", "--kernels", "reference") == 0
    assert "reference kernels" in capsys.readouterr().out
