"""Help and wrong settings answer without loading torch. Checked by sys.modules, not by a clock."""

import json
import os
import subprocess
import sys

import pytest

from mypt_fast.cli import COMMANDS

HEAVY = ["torch", "numpy", "triton", "tiktoken", "tokenizers", "matplotlib", "tqdm"]
PROBE = """\
import json, sys
from mypt_fast.cli import main
code = main(json.loads(sys.argv[1]))
print(json.dumps([code, [m for m in json.loads(sys.argv[2]) if m in sys.modules]]))
"""


def python(*argv, cwd=None):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip


def probe(words, cwd):
    """Run a command line in a fresh interpreter: exit code, heavy modules loaded, messages."""
    done = python("-c", PROBE, json.dumps(words), json.dumps(HEAVY), cwd=cwd)
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    return code, loaded, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], []], ids=["help", "version", "bare"])
def test_the_front_page_loads_nothing_heavy(words, tmp_path):
    assert probe(words, tmp_path)[:2] == (0, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_loads_nothing_heavy(command, tmp_path):
    assert probe([command, "--help"], tmp_path)[:2] == (0, [])


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, mypt_fast; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("source", ["flag", "preset", "saved run"])
def test_a_wrong_setting_is_reported_before_torch_is_loaded(source, tmp_path):
    words = ["train", "--dropout", "1.5"]
    if source == "preset":
        (tmp_path / "mine.json").write_text('{"n_embed": 3}')
        words = ["train", "--config", "mine.json"]
    if source == "saved run":
        run = tmp_path / "checkpoints/old"
        run.mkdir(parents=True)
        (run / "config.json").write_text('{"n_layer": "four"}')
        (run / "model.pt").write_bytes(b"")
        words = ["train", "--model_name", "old"]
    code, loaded, stderr = probe(words, tmp_path)
    assert (code, loaded) == (2, [])
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
