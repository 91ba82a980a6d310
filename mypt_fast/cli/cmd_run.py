"""`mypt-fast run`: execute a script written for MyPT, with `core` resolved to this engine."""

import argparse
import builtins
import difflib
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mypt_fast.cli import core_alias
from mypt_fast.errors import ConfigError

HELP = "run a script written for MyPT on this engine"
DESCRIPTION = """\
Execute an unmodified script, or a module with -m, in which `import core` means mypt_fast.core.
Submodules that mypt_fast does not have (core.rag, core.agent ...) come from the script's own
core/ folder. Where a script of MyPT's is not there, the command of the same purpose runs."""
EXAMPLES = """\
examples:
  mypt-fast run my_experiment.py --steps 100         as `python my_experiment.py --steps 100`
  mypt-fast run -m pytest tests/                     as `python -m pytest tests/`
  mypt-fast run train.py --config_file configs/tiny.json --input_file book.txt
  torchrun --nproc_per_node 2 -m mypt_fast run train_mine.py

stand-ins: train.py, generate.py, inspect_model.py, show_configs.py, calculate_params.py,
convert_checkpoints.py, prepare_dataset.py, also with scripts/ before them. What the script starts
with sys.executable is plain Python: give it `-m mypt_fast run` too where it needs `core`."""

# MyPT's script -> our command, and the flags that make it act as the script does
STAND_INS: dict[str, tuple[str, ...]] = {
    "train.py": ("train", "--ask", "--model_name", "default"),
    "generate.py": ("generate", "--escapes"),
    "inspect_model.py": ("inspect",),
    "show_configs.py": ("configs",),
    "calculate_params.py": ("params",),
    "convert_checkpoints.py": ("convert",),
    "convert_legacy_checkpoints.py": ("convert",),
    "prepare_dataset.py": ("prepare", "--mypt_clean", "--no_eot", "--format", "mypt"),
}
FOLDERS = ("", "scripts/", "scripts/model/", "scripts/utils/", "scripts/data_prep/")
MARKERS = ("core", "configs", "checkpoints")
OWN_FLAGS = ("-h", "--help", "--debug")


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Part our own words from the script's: everything behind the script's name is its own."""
    for i, word in enumerate(argv):
        if word == "-m":
            return argv[: i + 2], argv[i + 2 :]
        if word not in OWN_FLAGS:
            return argv[: i + 1], argv[i + 1 :]
    return argv, []


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to run."""
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="a Python file, and its words")
    parser.add_argument("-m", dest="module", metavar="MODULE", help="a module, and its words")


def run(args: argparse.Namespace) -> int:
    """Run the script; returns its exit code."""
    if args.module:
        return _run_module(args.module, args.passed_on)
    if not args.script:
        raise ConfigError("nothing to run", cure="name a script, or a module with -m")
    if os.path.isfile(args.script):
        return _run_script(args.script, args.passed_on)
    name = args.script.replace("\\", "/").removeprefix("./")
    folder, last = name[: name.rfind("/") + 1], name[name.rfind("/") + 1 :]
    if folder in FOLDERS and last in STAND_INS:
        from mypt_fast.cli import dispatch

        return dispatch([*STAND_INS[last], *args.passed_on])
    found = "it is a folder" if os.path.isdir(args.script) else "no such file"
    raise ConfigError(f"script {args.script}", found, _nearest(last))


def _nearest(name: str) -> str:
    """Names that are close to one that is not there."""
    here = [p.as_posix() for pattern in ("*.py", "scripts/*.py", "scripts/*/*.py")
            for p in sorted(Path().glob(pattern))][:1000]  # fmt: skip
    known = {path.rsplit("/", 1)[-1]: path for path in [*here, *STAND_INS]}
    near = difflib.get_close_matches(name, known, 3)
    if near:
        return f"the nearest names: {', '.join(known[n] for n in near)}"
    return f"check the path; without a file there are {', '.join(STAND_INS)}"


def _run_script(script: str, argv: list[str]) -> int:
    path = os.path.realpath(script)
    file = os.path.join(os.getcwd(), script)  # as Python writes it: ./ stays
    loader = importlib.machinery.SourceFileLoader("__main__", file)
    source = loader.get_data(file)  # what cannot be read is no failure of the script's

    def execute() -> None:
        module = types.ModuleType("__main__")
        module.__dict__.update(
            __file__=file, __cached__=None, __builtins__=builtins, __loader__=loader
        )
        sys.modules["__main__"] = module
        exec(loader.source_to_code(source, file), module.__dict__)

    return _executed(execute, Path(path).parent, [script, *argv])


def _run_module(name: str, argv: list[str]) -> int:
    def execute() -> None:
        try:
            is_there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError as e:  # of a package above it
            if e.name is None or not f"{name}.".startswith(f"{e.name}."):
                raise
            is_there = False
        except (ImportError, ValueError, AttributeError):
            is_there = True  # runpy says what is wrong with it
        if not is_there:
            raise _NoModule(name)
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    try:
        return _executed(execute, Path.cwd(), ["-m", *argv])
    except _NoModule:
        cure = "install it, or check the name"
        raise ConfigError(f"module {name}", "no module of that name", cure) from None


class _NoModule(BaseException):
    """The module to be run is not there; no user code has run."""


def _executed(execute: Callable[[], None], folder: Path, argv: list[str]) -> int:
    """Execute with Python's own surroundings; returns the exit code Python would have given."""
    _surround(folder, argv)
    try:
        execute()
    except SystemExit as e:
        return _exit_code(e.code)
    except _NoModule:
        raise
    except BaseException as e:
        e.__traceback__ = _without_ours(e.__traceback__)
        sys.excepthook(type(e), e, e.__traceback__)
        return 130 if isinstance(e, KeyboardInterrupt) else 1
    return 0


def _surround(folder: Path, argv: list[str]) -> None:
    """Set sys.argv, sys.path and `core` for a script in `folder`; from here the process is its own.

    The project's root follows the script's folder on sys.path, whatever the script adds itself:
    a script two folders down finds the packages of its project.
    """
    cwd = Path(os.path.realpath(os.getcwd()))
    root = core_alias.project_root([folder, cwd], _is_root)
    path = list(sys.path)
    if path and path[0] in _launchers(cwd):
        del path[0]  # where mypt-fast lies, or where it was called: a script's sys.path has neither
    sys.path[:] = dict.fromkeys([str(folder), *([str(root)] if root else []), *path])
    sys.argv = argv
    near = [*core_alias.own_and_parents(folder), *([root] if root else []), cwd]
    core_alias.install(near)


def _launchers(cwd: Path) -> tuple[str, ...]:
    """What sys.path[0] is when this program was started as a command or with -m."""
    if getattr(sys.flags, "safe_path", False):
        return ()
    return ("", os.getcwd(), str(cwd), os.path.dirname(os.path.realpath(sys.argv[0])))


def _is_root(folder: Path) -> bool:
    has_folder = any((folder / name).is_dir() for name in MARKERS)
    return has_folder or (folder / "pyproject.toml").is_file()


def _exit_code(code: Any) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1


def _without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback from the script's first line on."""
    skipped = (__file__, runpy.__file__, "<frozen runpy>")
    while trace and trace.tb_frame.f_code.co_filename.startswith((*skipped, "<frozen importlib")):
        trace = trace.tb_next
    return trace
