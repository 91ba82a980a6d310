"""Every shell and Python block of MyPT's documents runs through `mypt-fast run`.

The blocks are in tests/documents, word for word. What a test changes in a command is in `SCALED`
and `fitted` below and nowhere else: numbers of steps, sizes that cost hours, and where data is.
"""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mypt_fast import presets
from mypt_fast.cli import main

FOLDER = Path(__file__).parent / "documents"
TEXT = "The river ran past the mill, and the miller's girl counted the boats that passed. " * 400

# Blocks that save models of 20 M parameters and more
SLOW = {("configs", 7), ("training", 0), ("training", 9), ("checkpoints", 14)}

# Steps: a 250th. These presets train for hours and want gigabytes: their commands check everything
# and open the data (--max_iters 0), and stop there.
STEPS, LARGE = 250, ("150M", "200M")
SCALED = "--eval_interval 4 --eval_iters 1 --batch_size 1"


def blocks():
    for path in sorted(FOLDER.glob("*.md")):
        found = re.finditer(r"^```(bash|python)\n(.*?)^```$", path.read_text("utf-8"), re.S | re.M)
        for number, match in enumerate(found):
            key = (path.stem, number)
            marks = [pytest.mark.slow] if key in SLOW else []
            yield pytest.param(*key, *match.groups(), marks=marks, id=f"{path.stem}-{number}")


BLOCKS = list(blocks())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project with a small GPT-2-token model `dante`, trained by the command itself."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("input.txt", "input_dante.txt"):
            Path(name).write_text(TEXT, "utf-8")
        for name in ("domain_corpus", "general_eval"):
            words = [
                "prepare_dataset.py",
                "--input_files",
                "input.txt",
                "--out_dir",
                f"data/{name}",
            ]
            assert main(["run", *words, "--no_dedup", "--no_filter"]) == 0
        shutil.copytree(presets.shipped_dir(), "configs")
        words = "--model_name dante --input_file input.txt --n_layer 2 --n_head 2 --n_embd 8"
        words += f" --block_size 16 --max_iters 4 {SCALED}"
        assert main(["run", "train.py", *words.split()]) == 0
    return folder


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A copy of the project in which the test works; `main` may be called on scripts in it."""
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * 5))  # every question: as proposed
    names = [n for n in sys.modules if n == "core" or n.startswith("core.")]
    before = {n: sys.modules.pop(n) for n in names} | {"__main__": sys.modules["__main__"]}
    yield folder
    for name in [n for n in sys.modules if n == "core" or n.startswith("core.")]:
        del sys.modules[name]
    sys.modules.update(before)


def commands(text):
    """The commands of a shell block: joined lines, comments and ellipses left out."""
    text = re.sub(r"[ \t]*(\\)?[ \t]+#.*|^#.*", r" \1", text, flags=re.M)  # `\  # why` goes on
    text = re.sub(r"\\\s*\n", " ", text).replace(" ...", "")
    windows = {"copy ": "cp ", "type ": "cat "}
    for line in filter(str.strip, text.splitlines()):
        for theirs, ours in windows.items():
            if line.startswith(theirs):
                line = ours + line.removeprefix(theirs).replace("\\", "/")
        yield shlex.split(line)


def fitted(words):
    """A training command with its numbers of steps scaled and data where it names none."""
    words = list(words)
    config = words[words.index("--config_file") + 1] if "--config_file" in words else ""
    name = words[words.index("--model_name") + 1] if "--model_name" in words else "default"
    is_large = any(size in config for size in LARGE)
    at = words.index("--max_iters") + 1 if "--max_iters" in words else 0
    steps = -(-int(words[at] if at else 1000) // STEPS)
    words[at - 1 : at + 1] = [] if at else words[at - 1 : at + 1]
    words += ["--max_iters", str(0 if is_large else steps), *SCALED.split()]
    knows_data = Path("checkpoints", name, "training_state.json").is_file()
    if not knows_data and "--input_file" not in words and "--dataset_dir" not in words:
        words += ["--dataset_dir", "data/domain_corpus"]
    return words


def run_shell(text):
    for words in commands(text):
        if words[0] in ("cat", "cp"):
            subprocess.run(words, check=True)
        elif words[0] == "python":
            script, args = words[1], words[2:]
            args = fitted(args) if script == "train.py" else args
            assert main(["run", script, *args]) == 0, words
        else:  # not ours: a tool of the driver's, and the place of a file
            assert words[0] in ("nvidia-smi", "logs/train/<model_name>_eval.jsonl")


# What a Python block has before it in its document: `config`, `model` and the like by name.
PREAMBLE = {
    ("training", 12): "loaders", ("checkpoints", 0): "display", ("checkpoints", 1): "fit",
    ("checkpoints", 2): "fit", ("checkpoints", 4): "texts", ("checkpoints", 5): "choice",
}  # fmt: skip
BEFORE = {
    "loaders": """\
from core import GPT, GPTConfig, Tokenizer
config = GPTConfig(batch_size=1, block_size=8, n_embd=8, n_head=2, n_layer=1, device="cpu")
tokenizer = Tokenizer(config, "gpt2")
model = GPT(config, tokenizer=tokenizer)
optimizer = model.configure_optimizer()
import functools
model.fit = functools.partial(model.fit, max_iters=4, eval_interval=4, eval_iters=1)  # STEPS
""",
    "fit": """\
from core import GPT, GPTConfig, GPTDataLoader, Tokenizer
config = GPTConfig(batch_size=1, block_size=8, n_embd=8, n_head=2, n_layer=1, device="cpu")
tokenizer = Tokenizer(config, "gpt2")
model = GPT(config, tokenizer=tokenizer)
optimizer = model.configure_optimizer()
data_loader = GPTDataLoader(config, tokenizer, dataset_dir="data/domain_corpus")
import shutil
shutil.rmtree("checkpoints/dante")
""",
    "texts": """\
from pathlib import Path
from core import GPTConfig
config, text = GPTConfig(device="cpu"), Path("input.txt").read_text()
""",
    "choice": """\
from os.path import exists
from core import CheckpointManager
def load_new_format(): print(type(CheckpointManager.load_for_inference("dante")).__name__)
def load_legacy_format(): raise AssertionError("there is a new one")
""",
    "display": """\
import os, torch
os.chdir("checkpoints/dante")
tensor = lambda rows: rows
""",
}


def run_python(key, text):
    if key == ("checkpoints", 1):
        text = text.replace(
            "max_iters=1000", f"max_iters={1000 // STEPS}, eval_interval=4, eval_iters=1"
        )
    Path("block.py").write_text(BEFORE.get(PREAMBLE.get(key, ""), "") + text, "utf-8")
    assert main(["run", "block.py"]) == 0


def state_of(name):
    return json.loads(Path(f"checkpoints/{name}/training_state.json").read_text())


@pytest.fixture
def before(project):
    """What a document's reader has done before a block, by the names the block uses."""

    def make(key, text):
        # `test` of configs 7 and whatever a block trains anew is not there yet
        for name in re.findall(r"modelA|modelB|dante_base|dante_purgatorio|base_model", text):
            shutil.copytree("checkpoints/dante", f"checkpoints/{name}", dirs_exist_ok=True)
        if "unified_v1" in text:
            shutil.copy("logs/train/dante_eval.jsonl", "logs/train/unified_v1_eval.jsonl")
        if key == ("training", 0):
            shutil.rmtree("checkpoints/dante")
        if key in (("checkpoints", 6), ("checkpoints", 7), ("checkpoints", 8), ("checkpoints", 13)):
            legacy(("latest.pt", "final.pt"), keep_bundle=key[1] in (8, 13))

    return make


def legacy(names, keep_bundle):
    """Single-file checkpoints of `dante`, in the layout of today's weights."""
    import torch

    folder = Path("checkpoints/dante")
    raw = torch.load(folder / "model.pt", weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    fields = ("batch_size", "block_size", "vocab_size", "n_embd", "n_head", "n_layer", "dropout",
              "bias", "device")  # fmt: skip
    content = {
        "model_state_dict": raw.get("state_dict", raw), "config": {k: config[k] for k in fields},
        "tokenizer": {"token_kind": "gpt2", "chars": None}, "step": 4,
        "optimizer_state_dict": None,
    }  # fmt: skip
    if not keep_bundle:
        shutil.rmtree(folder)
        folder.mkdir()
    for name in names:
        torch.save(content, folder / name)


@pytest.mark.parametrize(("document", "number", "language", "text"), BLOCKS)
def test_a_block_runs(document, number, language, text, before, capfd):
    key = (document, number)
    before(key, text)
    if language == "python":
        run_python(key, text)
    else:
        run_shell(text)
    out, err = capfd.readouterr()
    assert "error:" not in err
    EXPECTED.get(key, lambda out, err: None)(out, err)


def says(*words):
    def check(out, err):
        assert [word for word in words if word not in out + err] == []

    return check


def reaches(name, steps, *files):
    def check(out, err):
        assert state_of(name)["step"] == steps
        assert [f for f in files if not Path(f).is_file()] == []

    return check


def trained_a_little(out, err):
    """configs 7: tiny trained, its run gone on with under another preset, the large one checked."""
    assert state_of("test")["step"] == 4
    config = json.loads(Path("checkpoints/test/config.json").read_text())
    assert (config["n_layer"], config["n_embd"]) == (4, 192)
    assert "goes on with n_layer 4: configs/small.json has 6" in err
    assert not Path("checkpoints/production").exists()


def continued_the_old_file(out, err):
    """checkpoints 6: the small model of latest.pt went on from step 4; the file is kept."""
    reaches("dante", 5, "checkpoints/dante/latest.pt")(out, err)
    assert json.loads(Path("checkpoints/dante/config.json").read_text())["n_embd"] == 8
    assert state_of("dante")["training_config"]["start_step"] == 4


# What must have come out, block by block.
EXPECTED = {
    ("configs", 0): says("190.87M parameters", "dry run"),
    ("configs", 1): says("244.70M parameters", "dry run"),
    ("configs", 2): says("Available Model Configurations", "GPT-150M", "190.87M", "21.17M"),
    ("configs", 3): says(
        "Config: GPT-150M", "File: configs/150M.json", "Description: ", "  Layers      : 16",
        "  Bias        : False", "  Total       : 190,872,192 (190.87M)", "  Batch size  : 32",
    ),
    ("configs", 4): lambda out, err: presets.load("configs/my_custom.json"),
    ("configs", 5): says("191,462,016", "191.46M", "n_layer", "Total = token embeddings"),
    ("configs", 6): says("--n_layer 8 is ignored: configs/150M.json has 16", "16 layers x 768"),
    ("configs", 7): trained_a_little,
    ("training", 0): reaches("dante", 4, "checkpoints/dante_gold/model.pt"),
    ("training", 1): reaches("dante", 8, "checkpoints/dante/optimizer.pt"),
    ("training", 2): says('"step": 4', '"max_iters": 4'),
    ("training", 3): says("=== TRAINING STATE ===", "Last recorded training step: 4",
                          "Training configuration:", "  max_iters: 4", "  learning_rate: 0.0003"),
    ("training", 4): says("trained for 4 iterations", "Learning rate: 0.0003"),
    ("training", 5): says('"n_layer": 2', '"learning_rate": 0.0003'),
    ("training", 6): reaches("dante", 8),
    ("training", 9): reaches("my_model", 4, "logs/custom_log.jsonl"),
    ("training", 10): says("Best checkpoint at step"),
    ("training", 11): reaches("domain_adapted", 4, "checkpoints/domain_adapted_gold/model.pt"),
    ("training", 12): says("general"),
    ("checkpoints", 1): reaches("dante", 4, "checkpoints/dante/tokenizer.json"),
    ("checkpoints", 2): reaches("dante", 500, "checkpoints/dante/optimizer.pt"),
    ("checkpoints", 5): says("GPT"),
    ("checkpoints", 6): continued_the_old_file,
    ("checkpoints", 7): says("Converting dante/final.pt", "Converted to new format",
                             "No legacy checkpoint found: checkpoints/shakespeare/final.pt"),
    ("checkpoints", 8): says("=== FORMAT ==="),
    ("checkpoints", 9): says('"vocab_size": 50304'),
    ("checkpoints", 10): says('"token_kind": "gpt2"'),
    ("checkpoints", 12): says("=== FORMAT ===\nNew JSON-based", "Location: checkpoints/dante",
                              "=== CONFIG ===\nbatch_size:1, block_size:16, vocab_size:50304, ",
                              "kind      : gpt2", "GPT-2 BPE (fixed ~50k tokens)"),
    ("checkpoints", 14): reaches("shakespeare", 4, "my_config.json"),
    ("checkpoints", 15): says("Number of tensors: ", "Parameter names: ["),
}  # fmt: skip


def test_the_blocks_are_all_there():
    keys = [tuple(p.values[:2]) for p in BLOCKS]
    assert [sum(d == name for d, _ in keys) for name in ("configs", "training", "checkpoints")] == [
        9, 13, 16,
    ]  # fmt: skip
    assert SLOW | set(PREAMBLE) | set(EXPECTED) <= set(keys)


def test_only_steps_sizes_of_work_and_places_of_data_are_changed(project):
    """The rule of `fitted`, on one command of each kind."""
    changed = fitted(["--config_file", "configs/tiny.json", "--max_iters", "100", "--n_layer", "8"])
    assert changed == [
        "--config_file", "configs/tiny.json", "--n_layer", "8", "--max_iters", "1", *SCALED.split(),
        "--dataset_dir", "data/domain_corpus",
    ]  # fmt: skip
    assert fitted(["--config_file", "configs/150M.json", "--input_file", "x"])[4:6] == [
        "--max_iters", "0",
    ]  # fmt: skip
    assert fitted(["--model_name", "dante", "--max_iters", "2000"])[2:4] == ["--max_iters", "8"]
