"""A MyPT user's week: train from a config, resume, fine-tune, generate, look, convert an old file.

Once with scripts of the user's own, written against MyPT's interface and started with
`mypt-fast run` in processes of their own; once with the commands that stand in for MyPT's scripts.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mypt_fast.cli import main

ROOT = Path(__file__).parent.parent
TEXT = "the river ran past the mill and the boats went down to the sea. " * 60
CONFIG = {
    "name": "Mine", "description": "small enough for a test", "batch_size": 2, "block_size": 16,
    "vocab_size": 256, "n_embd": 16, "n_head": 2, "n_layer": 2, "dropout": 0.0, "bias": False,
    "learning_rate": 0.01, "max_iters": 6, "eval_interval": 3, "eval_iters": 2, "warmup_iters": 0.1,
    "save_every": 100, "comment_why": "archived configs carry such keys", "device": "cpu",
}  # fmt: skip

# Scripts of a user's, in a sub-folder, with the wrong sys.path entry that theirs have.
HEAD = """\
import os, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)) + "/..")
import json
from core import (CheckpointManager, GPT, GPTConfig, GPTDataLoader, Generator, banner_train,
                  calculate_dataset_coverage, get_model_info, load_model)
"""
TRAIN = (
    HEAD
    + """\
name, max_iters, base = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or [None])[0]
banner_train()
raw = json.load(open_once("configs/mine.json"))
fields = GPTConfig().to_dict()
config = GPTConfig(**{k: v for k, v in raw.items() if k in fields})
text = GPTDataLoader.read_text("input.txt")
manager = CheckpointManager(name)
model, optimizer, start = manager.initialize_for_training(
    config, "char", text, raw["learning_rate"], init_from_model=base,
    dataset_tokenizer_state=GPT_state(base),
)
loader = GPTDataLoader(model.config, model.tokenizer)
loader.prepare_data(text)
coverage = calculate_dataset_coverage(max_iters, 2, 16, len(loader.train_data))
losses = model.fit(
    loader, optimizer, max_iters, eval_interval=raw["eval_interval"], eval_iters=2,
    checkpoint_dir=manager.checkpoint_dir, start_step=start, learning_rate=raw["learning_rate"],
    log_file=f"logs/train/{name}_eval.jsonl",
)
print(json.dumps({"start": start, "losses": {k: float(v) for k, v in losses.items()},
                  "coverage": coverage["coverage_ratio"]}))
"""
)
HELPERS = """\
from pathlib import Path
import io
def open_once(path):
    return io.StringIO(Path(path).read_text())
def GPT_state(base):
    return get_model_info(base)["tokenizer"] if base else None
"""
WRITE = (
    HEAD
    + """\
info = get_model_info("mine_gold")
model = load_model("mine_gold")
text = Generator(model).generate("the ", max_new_tokens=5, temperature=0.0)
print(json.dumps({"text": text, "format": info["format"], "n_embd": info["config"]["n_embd"],
                  "greedy": model.generate_nocache_greedy("the ", 5)}))
"""
)
OLD = (
    HEAD
    + """\
import torch
model = load_model("mine")
os.makedirs("checkpoints/old")
torch.save({"model_state_dict": model.state_dict(), "config": model.config.to_dict(), "step": 9,
            "tokenizer": {"token_kind": "char", "chars": model.tokenizer.chars},
            "optimizer_state_dict": None}, "checkpoints/old/latest.pt")
again, _, step, _ = GPT.load_legacy("checkpoints/old/latest.pt", map_location="cpu")
print(json.dumps({"step": step, "same": all(
    torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
)}))
"""
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT, "utf-8")
    for folder in ("configs", "scripts/mine", "core"):
        Path(folder).mkdir(parents=True)
    Path("core/__init__.py").write_text("raise RuntimeError('the engine that is replaced ran')")
    Path("configs/mine.json").write_text(json.dumps(CONFIG))
    for name, text in (("train", TRAIN), ("write", WRITE), ("old", OLD)):
        text = text.replace(HEAD, HEAD + HELPERS)
        Path(f"scripts/mine/{name}_mine.py").write_text(textwrap.dedent(text))
    return tmp_path


def script(name, *words):
    """Run one of the user's scripts; what it printed last, parsed."""
    done = subprocess.run(
        [sys.executable, "-m", "mypt_fast", "run", f"scripts/mine/{name}_mine.py", *words],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def events(name, kind):
    lines = Path(f"logs/train/{name}_eval.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def state_of(name):
    return json.loads(Path(f"checkpoints/{name}/training_state.json").read_text())


@pytest.mark.slow
def test_a_session_of_scripts_written_for_mypt(project):
    first, shown = script("train", "mine", "6")
    assert first["start"] == 0
    assert "step 0/6 (0.0%) | " in shown
    more, _ = script("train", "mine", "30")
    assert more["start"] == state_of("mine")["training_config"]["start_step"] == 6
    assert more["losses"]["val"] < first["losses"]["val"]
    starts = events("mine", "training_start")
    assert [e["config"]["start_step"] for e in starts] == [0, 6]
    assert [e["config"]["max_iters"] for e in starts] == [6, 30]
    evaluated = [e["iter"] for e in events("mine", "eval")]  # step 6 was the first run's last word
    assert [i for i in evaluated if i != 6] == [0, 3, *range(9, 30, 3)]
    tuned, _ = script("train", "tuned", "3", "mine")
    assert tuned["start"] == 0
    # it began where the base had ended, far below the loss of a new model
    assert events("tuned", "eval")[0]["val_loss"] < events("mine", "eval")[0]["val_loss"] - 0.3
    written, _ = script("write")
    assert written["text"] == written["greedy"]
    assert written["text"].startswith("the ")
    assert (written["format"], written["n_embd"]) == ("json", 16)
    old, _ = script("old")
    assert old == {"step": 9, "same": True}


def run(*words):
    assert main(["run", *words]) == 0


def test_a_session_of_the_commands(project, capsys):
    words = ["--config_file", "configs/mine.json", "--tokenization", "char", "--model_name", "mine"]
    run("train.py", *words, "--input_file", "input.txt")
    assert state_of("mine")["step"] == 6
    run("train.py", "--model_name", "mine", "--max_iters", "12", "--learning_rate", "5e-3")
    state = state_of("mine")
    assert (state["step"], state["training_config"]["start_step"]) == (12, 6)
    assert state["training_config"]["learning_rate"] == 0.005
    words = ["--config_file", "configs/mine.json", "--init_from_model", "mine", "--model_name"]
    run("train.py", *words, "tuned", "--input_file", "input.txt", "--max_iters", "3")
    assert events("tuned", "eval")[0]["val_loss"] < events("mine", "eval")[0]["val_loss"]
    capsys.readouterr()
    run("generate.py", "--model_name", "mine_gold", "--prompt", "the ", "--preset", "deterministic")
    assert capsys.readouterr().out.startswith("the ")
    run("scripts/inspect_model.py", "--model_name", "mine")
    assert "Last recorded training step: 12" in capsys.readouterr().out
    run("scripts/show_configs.py")
    assert "mine.json" in capsys.readouterr().out
    run("scripts/calculate_params.py", "--config_file", "configs/mine.json")
    assert "total" in capsys.readouterr().out


def test_an_old_file_is_converted_by_the_script_of_that_name(project, capsys):
    import torch

    words = ["--config_file", "configs/mine.json", "--tokenization", "char", "--model_name", "mine"]
    run("train.py", *words, "--input_file", "input.txt")
    folder, old = Path("checkpoints/mine"), Path("checkpoints/old")
    raw = torch.load(folder / "model.pt", weights_only=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    old.mkdir()
    torch.save(
        {
            "model_state_dict": raw.get("state_dict", raw), "step": 9,
            "config": {k: config[k] for k in config if k in CONFIG},
            "tokenizer": {k: tokenizer[k] for k in ("token_kind", "chars")},
            "optimizer_state_dict": None,
        },
        old / "latest.pt",
    )  # fmt: skip
    run("scripts/convert_legacy_checkpoints.py", "--model_name", "old", "--dry-run")
    assert not (old / "config.json").exists()
    run("scripts/convert_legacy_checkpoints.py", "--model_name", "old")
    assert (old / "latest.pt").is_file()
    assert state_of("old")["step"] == 9
    capsys.readouterr()
    texts = []
    for name in ("mine", "old"):
        run("generate.py", "--model_name", name, "--prompt", "the ", "--temperature", "0")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
