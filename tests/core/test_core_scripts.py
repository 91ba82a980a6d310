"""MyPT's scripts as commands: their flags, their questions, what they leave behind."""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mypt_fast.cli import cmd_configs, cmd_train, main
from mypt_fast.core.training_utils import calculate_dataset_coverage

TEXT = "".join(
    f"Line {n} tells of the {n * 7919 % 1000} boats that came up the river.\n" for n in range(400)
)
SMALL = [
    "--n_layer", "1", "--n_head", "2", "--n_embd", "8", "--block_size", "16", "--batch_size", "2",
    "--eval_interval", "4", "--eval_iters", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a text, a GPT-2 dataset made by the script, and no one at the keyboard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    Path("input.txt").write_text(TEXT, "utf-8")


def run(*words):
    return main(["run", *words])


def prepared(out="data/mine", *flags):
    assert run("prepare_dataset.py", "--input_files", "input.txt", "--out_dir", out, *flags) == 0
    return out


def tokens_of(folder, split):
    paths = sorted(Path(folder, split).glob("*.bin"))
    return np.concatenate([np.fromfile(path, "<u4") for path in paths]), len(paths)


def state_of(name):
    return json.loads(Path(f"checkpoints/{name}/training_state.json").read_text())


# prepare_dataset.py: the line pipeline of MyPT specification 8.1


def test_a_dataset_is_what_the_line_pipeline_gives(capsys):
    from mypt_fast.tokenizer import Tokenizer

    Path("input.txt").write_text(
        "The  River RAN past the\tmill all day.\nshort\n\nThe river ran past the mill all day.\n"
        "nospacesatallinthislinewhichislong\n" + TEXT.replace("Line 0", "Line zero"), "utf-8"
    )  # fmt: skip
    prepared("data/mine", "--tokens_per_shard", "2000", "--val_fraction", "0.2")
    train, n_train = tokens_of("data/mine", "train")
    val, n_val = tokens_of("data/mine", "val")
    text = Tokenizer.gpt2().decode(np.concatenate([train, val]).tolist())
    lines = text.splitlines()
    assert lines[0] == "the river ran past the mill all day."
    assert len(lines) == 401
    assert all(line == " ".join(line.lower().split()) for line in lines)
    assert n_train > 1
    assert n_val >= 1
    total = len(train) + len(val)
    assert 0.1 < len(val) / total < 0.4
    meta = json.loads(Path("data/mine/dataset_metadata.json").read_text())
    assert (meta["total_tokens"], meta["tokenization"]) == (total, "gpt2")
    assert (meta["total_shards"], meta["tokens_per_shard"]) == (n_train + n_val, 2000)
    assert Path("data/mine/train/shard_00000.bin").is_file()


def test_the_pipelines_switches_turn_its_steps_off():
    Path("input.txt").write_text("Keep  ME\n" * 300, "utf-8")
    folder = prepared("data/raw", "--no_normalize", "--no_filter", "--no_dedup", "--tokenization",
                      "char")  # fmt: skip
    state = json.loads(Path(folder, "tokenizer_state.json").read_text())
    assert state["token_kind"] == "char"
    assert {"K", "M", "E"} <= set(state["chars"])
    assert len(tokens_of(folder, "train")[0]) + len(tokens_of(folder, "val")[0]) == 300 * 9


def test_several_files_and_one_shard_can_be_trained_on():
    Path("more.txt").write_text(TEXT.replace("boats", "barges"), "utf-8")
    words = ["--input_files", "input.txt", "more.txt", "--out_dir", "data/two"]
    assert run("scripts/data_prep/prepare_dataset.py", *words) == 0
    for split in ("train", "val"):
        tokens, shards = tokens_of("data/two", split)
        assert len(tokens) > 100
        assert shards == 1
    words = ["--model_name", "two", "--dataset_dir", "data/two", "--max_iters", "2", *SMALL]
    assert run("train.py", *words) == 0
    assert state_of("two")["step"] == 2


# train.py


def test_every_flag_of_the_specification_is_taken(monkeypatch):
    prepared()
    prepared("data/other")
    Path("prompts.json").write_text('{"prompts": {"a": "The river"}, "notes": 1}')
    words = [
        "--model_name", "all", "--dataset_dir", "data/mine", "--tokenization", "gpt2",
        "--eval_dataset_dir", "data/other", "--max_iters", "4", "--learning_rate", "1e-3",
        "--warmup_iters", "0.5", "--grad_clip", "0.5", "--weight_decay", "0.01", "--use_amp",
        "False", "--amp_dtype", "fp16", "--dropout", "0.1", "--bias", "--save_dtype", "bf16",
        "--eval_prompts_file", "prompts.json", "--eval_max_new_tokens", "2",
        "--terminal_log_file", "logs/terminal.txt", "--log_file", "logs/mine.jsonl",
        "--grad_accum_steps", "2", "--seed", "7", "--vocab_size", "50304", *SMALL,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # both are replaced by the log's copies
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert run("train.py", *words) == 0
    sys.stdout._file.close()
    saved = state_of("all")["training_config"]
    assert saved["use_amp"] is False
    assert (saved["grad_accum_steps"], saved["seed"], saved["grad_clip"]) == (2, 7, 0.5)
    events = [json.loads(line) for line in Path("logs/mine.jsonl").read_text().splitlines()]
    evaluations = [e for e in events if e["event"] == "eval"]
    assert {"eval_general", "gen"} <= set(evaluations[0])
    assert list(evaluations[0]["gen"]) == ["a"]
    assert "step 0/4" in Path("logs/terminal.txt").read_text()
    assert json.loads(Path("checkpoints/all/config.json").read_text())["bias"] is True


def test_nothing_but_a_name_is_asked_for_and_the_name_is_default():
    prepared()
    assert run("train.py", "--dataset_dir", "data/mine", "--max_iters", "1", *SMALL) == 0
    assert state_of("default")["step"] == 1


@pytest.mark.parametrize(
    ("command", "terminal", "answer", "trains", "asks"),
    [
        (["run", "train.py"], True, "y\n", True, True),
        (["run", "train.py"], True, "YES\n", True, True),
        (["run", "train.py"], True, "\n", False, True),
        (["run", "train.py"], True, "", False, True),
        (["run", "train.py", "--yes"], True, "n\n", True, False),
        (["run", "train.py"], False, "n\n", True, False),
        (["train"], True, "n\n", True, False),
    ],
)
def test_only_train_py_on_a_terminal_asks_before_it_reads_too_little(
    command, terminal, answer, trains, asks, capsys, monkeypatch
):
    stdin = io.StringIO(answer)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    words = ["--model_name", "m", "--input_file", "input.txt", "--max_iters", "1", *SMALL]
    assert main([*command, *words]) == 0
    captured = capsys.readouterr()
    assert ("Train anyway? [y/N]" in captured.err) is asks
    assert "note: 1 steps are 0.00" in captured.err
    assert Path("checkpoints/m/model.pt").is_file() is trains
    assert ("not started" in captured.out) is not trains


def test_a_run_that_reads_its_data_some_times_gets_no_line(capsys):
    settings = argparse.Namespace(
        model=argparse.Namespace(batch_size=2, block_size=5),
        train=argparse.Namespace(max_iters=100, grad_accum_steps=1),
    )
    assert cmd_train._covers(500, settings, asks=True)
    assert capsys.readouterr().err == ""
    assert cmd_train._covers(10, settings, asks=True)  # too often is no question
    assert "100 steps are 1e+02 passes over the data, very high" in capsys.readouterr().err
    assert calculate_dataset_coverage(100, 2, 5, 500)["coverage_ratio"] == 2


def test_a_run_goes_on_whatever_architecture_the_preset_names(capsys):
    prepared()
    for name, layers in (("a", 1), ("b", 2)):
        sizes = {"n_layer": layers, "n_head": 2, "n_embd": 8, "block_size": 16, "batch_size": 2}
        Path(f"{name}.json").write_text(json.dumps({**sizes, "eval_iters": 1, "dropout": 0.1}))
    words = ["--dataset_dir", "data/mine", "--model_name", "m"]
    assert run("train.py", "--config_file", "a.json", "--max_iters", "1", *words) == 0
    assert main(["train", "--config_file", "b.json", "--max_iters", "2", *words]) == 2
    assert "n_layer is 1 in the run and 2 in the preset" in capsys.readouterr().err
    assert run("train.py", "--config_file", "b.json", "--max_iters", "2", *words) == 0
    assert "goes on with n_layer 1: b.json has 2" in capsys.readouterr().err
    assert state_of("m")["step"] == 2
    assert json.loads(Path("checkpoints/m/config.json").read_text())["n_layer"] == 1


# generate.py, inspect_model.py, show_configs.py


def test_generate_takes_its_flags_and_reads_escapes(capsys):
    words = ["--model_name", "c", "--input_file", "input.txt", "--tokenization", "char",
             "--max_iters", "1", *SMALL]  # fmt: skip
    assert run("train.py", *words) == 0
    capsys.readouterr()
    flags = [
        "--model_name",
        "c",
        "--prompt",
        r"river.\nLine",
        "--max_new_tokens",
        "4",
        "--seed",
        "1",
    ]
    for more in (
        ["--mode", "qa"], ["--mode", "creative"], ["--mode", "factual"], ["--mode", "code"],
        ["--preset", "chat"], ["--preset", "deterministic", "--show_info"], ["--force_fp16"],
        ["--temperature", "0.5", "--top_k", "5", "--top_p", "0.9", "--repetition_penalty", "1.2"],
    ):  # fmt: skip
        assert run("generate.py", *flags, *more) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith("river.\nLine"), more
        assert ("--force_fp16 needs a GPU" in captured.err) is ("--force_fp16" in more)
    assert run("scripts/model/inspect_model.py", "--model_name", "c") == 0
    out = capsys.readouterr().out
    heads = [line for line in out.splitlines() if line.startswith("===")]
    assert heads[:4] == [
        "=== FORMAT ===", "=== CONFIG ===", "=== TOKENIZER ===", "=== TRAINING STATE ===",
    ]  # fmt: skip
    assert "kind      : char" in out


def test_a_model_that_is_not_there_makes_no_folder(capsys):
    for words in (["generate.py"], ["inspect_model.py"]):
        assert run(*words, "--model_name", "nobody") == 2
        assert "nobody" in capsys.readouterr().err
    assert not Path("checkpoints").exists()


def test_every_preset_in_a_folder_is_checked(capsys):
    folder = Path("configs/sft/_archive")
    folder.mkdir(parents=True)
    good = {"n_layer": 1, "n_head": 2, "n_embd": 8, "comment_why": "kept"}
    (folder / "good.json").write_text(json.dumps(good))
    assert run("show_configs.py", "--validate", "configs") == 0
    assert "ok   configs/sft/_archive/good.json: " in capsys.readouterr().out
    (folder / "bad.json").write_text(json.dumps({**good, "n_head": 3}))
    assert main(["configs", "--validate", "configs/sft"]) == 2
    captured = capsys.readouterr()
    assert "bad  configs/sft/_archive/bad.json: " in captured.out
    assert "1 of 2 files are not valid presets" in captured.err
    Path("empty").mkdir()
    assert main(["configs", "--validate", "empty"]) == 2
    assert "no .json file in the folder" in capsys.readouterr().err


def test_the_detail_page_has_the_documents_lines(capsys):
    assert run("scripts/utils/show_configs.py", "--config_file", "configs/150M.json") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{cmd_configs.RULE}\nConfig: GPT-150M\nFile: configs/150M.json\n")
    assert "  Total       : 190,872,192 (190.87M)" in out
