"""The front of the command line: spelling, suggestions, switches, exit codes, frozen help."""

import argparse
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mypt_fast import __version__, cli
from mypt_fast.cli import COMMANDS, flags, main, spell
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import CheckpointError, IntegrityError
from mypt_fast.schema import opt

GOLDEN = Path(__file__).parent / "golden"
CANNOT_RUN = {"train": ["train", "--dropout", "9"]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whatever a command writes by mistake, it does not write here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(monkeypatch):
    """A function that puts a command of our making in the place of `train`."""

    def install(run, add_flags=lambda parser: None, **attributes):
        module = types.SimpleNamespace(HELP="x", run=run, add_flags=add_flags, **attributes)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)

    return install


@pytest.fixture
def seen(command):
    """Return the arguments that reached a command with train's flags."""
    arrived = {}

    def add(parser):
        parser.add_argument("--config_file")
        parser.add_argument("words", nargs="*", default=argparse.SUPPRESS)
        flags.add_section(parser, TrainConfig, "training")
        flags.add_section(parser, ModelConfig, "model")

    def run(args):
        arrived.update(vars(args))
        arrived.pop("debug")
        return 0

    command(run, add, SUPPRESS=True)

    def parse(*argv):
        arrived.clear()
        return main(["train", *argv]), dict(arrived)

    return parse


def fails(capsys, *argv, code=2):
    """Run a command line that must fail; return its one line of error."""
    assert main(list(argv)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    return err[:-1]


@pytest.mark.parametrize(
    ("typed", "spelt"),
    [
        (["--config-file=a-b.json"], ["--config_file=a-b.json"]),
        (["--config", "a-b"], ["--config_file", "a-b"]),
        (["--config=a=b-c"], ["--config_file=a=b-c"]),
        (["--learning-rate", "-1e-3"], ["--learning_rate", "-1e-3"]),
        (["--no-use-amp"], ["--no_use_amp"]),
        (["-h", "a-b", "-"], ["-h", "a-b", "-"]),
        (["--a-b", "--", "--c-d", "--config"], ["--a_b", "--", "--c-d", "--config"]),
        ([], []),
    ],
)
def test_a_flag_has_one_spelling_and_values_have_their_own(typed, spelt):
    assert spell(typed) == spelt


@pytest.mark.parametrize(
    "argv",
    [["--config", "x"], ["--config-file", "x"], ["--config_file=x"], ["--config=x"]],
)
def test_config_is_config_file(argv, seen):
    assert seen(*argv) == (0, {"config_file": "x"})


def test_words_after_a_bare_dash_dash_are_left_alone(seen):
    assert seen("--", "--max-iters", "a-b") == (0, {"words": ["--max-iters", "a-b"]})


def test_only_typed_flags_arrive(seen):
    assert seen("--max-iters=5") == (0, {"max_iters": 5})
    assert seen() == (0, {})


def test_a_flag_is_read_as_its_fields_type(seen):
    _, given = seen("--learning_rate", "1e-3", "--n_layer", "3", "--device", "cpu", "--seed=0")
    assert given == {"learning_rate": 1e-3, "n_layer": 3, "device": "cpu", "seed": 0}


@pytest.mark.parametrize(
    ("typed", "kind"), [("5", int), ("0.05", float), (".5", float), ("5.0", float), ("1e3", float)]
)
def test_warmup_keeps_a_count_and_a_share_apart(typed, kind, seen):
    _, given = seen("--warmup_iters", typed)
    assert type(given["warmup_iters"]) is kind
    assert given["warmup_iters"] == float(typed)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--use_amp"], True),
        (["--use-amp"], True),
        (["--use_amp", "True"], True),
        (["--use_amp=yes"], True),
        (["--use_amp", "1"], True),
        (["--use_amp", "False"], False),
        (["--use-amp=no"], False),
        (["--use_amp", "off"], False),
        (["--no_use_amp"], False),
        (["--no-use-amp"], False),
        (["--no-use-amp=false"], True),
        (["--use_amp", "--no_use_amp"], False),
        (["--no_use_amp", "--use_amp"], True),
    ],
)
def test_a_switch_reads_what_people_write(argv, value, seen):
    assert seen(*argv) == (0, {"use_amp": value})


@pytest.mark.parametrize("word", ["maybe", "", "2", "Tru", "none", "a\nb"])
def test_a_switch_refuses_nonsense(word, seen, capsys):
    line = fails(capsys, "train", f"--use_amp={word}")
    assert "--use_amp: expected true or false; found '" in line


def test_every_setting_of_a_section_is_a_flag_and_every_boolean_can_be_turned_off():
    parser = argparse.ArgumentParser()
    flags.add_section(parser, ModelConfig, "model")
    options = {s for a in parser._actions for s in a.option_strings}
    for name, value in ModelConfig().to_dict().items():
        assert f"--{name}" in options
        assert (f"--no_{name}" in options) == isinstance(value, bool)


def test_a_flag_that_says_no_to_being_a_flag_is_none():
    assert "--eval_sets" not in cli_help("train")
    assert opt(1, "x", flag=False).metadata["flag"] is False


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["trian"], "did you mean 'train'?"),
        (["TRAIN"], "did you mean 'train'?"),
        (["zzz"], "commands: train, "),
        ([""], "commands: train, "),
        (["train", "--max_iter", "3"], "did you mean --max_iters?"),
        (["train", "--Max_Iters", "3"], "did you mean --max_iters?"),
        (["train", "--learningrate=3"], "did you mean --learning_rate?"),
        (["train", "--zzz"], "see `mypt-fast train --help`"),
        (["train", "extra"], "unknown argument extra"),
        (["train", "--", "extra"], "unknown argument extra"),
        (["train", "-x"], "unknown argument -x"),
        (["--versoin"], "did you mean --version?"),
        (["--batch_size", "3", "train"], "follow their command: mypt-fast train --batch_size"),
        (["--debug=no", "train"], "flags follow their command"),
    ],
)  # fmt: skip
def test_an_unknown_word_is_answered_with_a_suggestion(argv, hint, capsys):
    # were it ever accepted, the impossible dropout would keep it from training
    assert hint in fails(capsys, *(w for word in argv for w in CANNOT_RUN.get(word, [word])))


@pytest.mark.parametrize("flag", ["--conf", "--max_it", "--learning", "--n_lay", "--use"])
def test_flags_are_not_abbreviated(flag, capsys):
    assert f"unknown argument {flag}" in fails(capsys, *CANNOT_RUN["train"], flag, "3")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch_size"], "--batch_size: expected one argument"),
        (["--batch_size="], "--batch_size: expected a whole number; found ''"),
        (["--batch_size", "1e3"], "--batch_size: expected a whole number; found '1e3'"),
        (["--batch-size=0x10"], "--batch_size: expected a whole number; found '0x10'"),
        (["--learning_rate", "1,5"], "--learning_rate: expected a number; found '1,5'"),
        (["--warmup_iters", "abc"], "--warmup_iters: expected a number; found 'abc'"),
        (["--learning_rate", "nan"], "learning_rate: expected a finite number; found nan"),
        (["--learning_rate=-1"], "learning_rate is out of range; found -1.0; use > 0 and <= 10"),
        (["--amp_dtype", "FP16"], "expected one of bf16, fp16; found 'FP16'; did you mean 'fp16'?"),
        (["--pos_encoding", "alibi"], "--pos_encoding: expected one of learned, rope"),
        (["--n_embd", "10", "--n_head", "3"], "the nearest n_head that divides is 2"),
        (["--model_name", "../x"], "--model_name is a plain name; found '../x'"),
        (["--model_name="], "--model_name is empty"),
        (["--config", "tinny"], "the nearest preset is 'tiny'"),
        (["--config", "/etc/passwd"], "/etc/passwd: not valid JSON"),
        (["--dataset_dir", ""], "--dataset_dir is empty"),
        (["--dataset_dir", "a", "--input_file", "b"], "are both given"),
        (["--config", "tiny", "--n_embd", "7", "--strict"], "--n_embd 7 is ignored"),
        (["--dry_run=yes"], "--dry_run: ignored explicit argument 'yes'"),
    ],
)
def test_a_wrong_train_command_is_refused_in_one_line(argv, said, capsys, tmp_path):
    assert said in fails(capsys, "train", "--dry_run", *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (CheckpointError("a", "b", "c"), 2, "error: a; b; c"),
        (IntegrityError("model.pt", "damaged"), 3, "error: model.pt; damaged"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(28, "No space left on device", "x.pt"), 2, "error: x.pt: No space left on device"),
        (ValueError("two\nlines"), 1, "error: internal error: ValueError: two lines; this is a"),
        (CheckpointError("a\x1b[2J\nb\u202e"), 2, r"error: a\x1b[2J b\u202e"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else None,
)
def test_a_problem_becomes_one_line_and_its_exit_code(problem, code, said, command, capsys):
    def run(args):
        raise problem

    command(run)
    assert fails(capsys, "train", code=code).startswith(said)
    assert main(["train", "--debug"]) == code
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith(said)


@pytest.mark.parametrize("code", [0, 3, 143])
def test_a_commands_own_exit_code_is_kept(code, command):
    command(lambda args: code)
    assert main(["train"]) == code


def test_the_front_page_lists_every_command_and_the_exit_codes(capsys):
    assert main([]) == 0
    page = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == page
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", page, re.MULTILINE)
    assert "exit codes: 0 done" in page


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mypt-fast {__version__}\n"


# As a process

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def process(*argv, **kwargs):
    return subprocess.run(
        [sys.executable, *argv],
        capture_output="stdout" not in kwargs, text=True, check=False,
        env={**ENV, **kwargs.pop("env", {})}, **kwargs,
    )  # fmt: skip


def test_python_dash_m_is_the_command():
    done = process("-m", "mypt_fast", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'trian'; did you mean 'train'?\n"


STUB = """\
import sys, types
from mypt_fast import cli
def run(args):
    {body}
    return 0
cli.importlib = types.SimpleNamespace(import_module=lambda n: types.SimpleNamespace(
    HELP="x", run=run, add_flags=lambda p: None))
sys.exit(cli.main(["train"]))
"""


@pytest.mark.parametrize("body", ["print('x')", "[print('x' * 100) for i in range(9999)]"])
def test_a_closed_pipe_ends_quietly(body):
    read, write = os.pipe()
    os.close(read)
    try:
        done = process("-c", STUB.format(body=body), stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_into_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    try:
        done = process("-m", "mypt_fast", "train", "--help", stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_under_stdout_is_an_error_of_the_environment():
    with open("/dev/full", "w") as full:
        code = STUB.format(body="print('x')")
        done = process("-c", code, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: input/output: No space left on device\n")


def test_a_terminal_that_cannot_show_a_sign_does_not_stop_a_run():
    done = process(
        "-c", STUB.format(body=r"print('\U0001f3c6 gold')"), env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\U0001f3c6 gold\n", "")


# Frozen help: a new flag is a visible change. MYPT_UPDATE_GOLDEN=1 writes the files anew.


def cli_help(*argv):
    from contextlib import redirect_stdout
    from io import StringIO

    out = StringIO()
    with redirect_stdout(out):
        assert main([*argv, "--help"]) == 0
    return out.getvalue()


def words(text):
    """Normalise what argparse of Python 3.10 to 3.13 lays out differently.

    Line breaks, and `-x N, --xx N` against `-x, --xx N`: the metavar before a comma goes.
    """
    return re.sub(r" (\[?[A-Z]+\]?|\{[^}]*\})(?=, -)", "", " ".join(text.split()))


@pytest.mark.parametrize("name", ["front", *COMMANDS])
def test_the_help_is_the_frozen_one(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = cli_help(*([] if name == "front" else [name]))
    path = GOLDEN / f"help_{name}.txt"
    if os.environ.get("MYPT_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert path.is_file(), "run MYPT_UPDATE_GOLDEN=1 pytest tests/cli/test_front.py"
    assert words(text) == words(path.read_text("utf-8"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lines_fit_and_say_what_they_should(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = cli_help(name)
    assert max(map(len, text.splitlines())) <= 100
    assert "%%" not in text
    assert "==SUPPRESS==" not in text
    assert "examples:" in text


@pytest.mark.parametrize(
    ("name", "release", "theirs", "wanted"),
    [
        ("train", "6.1.0-generic", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("generate", "6.1.0-generic", {}, {}),
        ("train", "5.15.90.1-microsoft-standard-WSL2", {}, {}),
        ("train", "6.1.0-generic", *[{"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}] * 2),
        ("train", "6.1.0-generic", *[{"PYTORCH_CUDA_ALLOC_CONF": ""}] * 2),
    ],
)
def test_segments_grow_unless_the_user_set_the_allocator(
    command, monkeypatch, name, release, theirs, wanted
) -> None:
    monkeypatch.setattr(cli, "os", types.SimpleNamespace(environ=dict(theirs)))
    monkeypatch.setattr(cli.os, "uname", lambda: types.SimpleNamespace(release=release), False)
    monkeypatch.setattr(cli.sys, "platform", "linux")
    seen = {}
    command(lambda args: seen.update(cli.os.environ) or 0)
    assert main([name]) == 0
    seen.pop("OMP_WAIT_POLICY")
    assert seen == wanted
