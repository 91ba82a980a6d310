"""The command line: one table of commands, one spelling rule, one place for exit codes.

Only the command named in argv is imported; torch and numpy are imported inside `run`.
"""

import argparse
import difflib
import importlib
import io
import os
import sys
import traceback
from typing import NoReturn

from mypt_fast import __version__, cache, console
from mypt_fast.errors import MyptError

COMMANDS = {
    "train": "train a model, or continue a run",
    "run": "run a script written for MyPT on this engine",
    "generate": "write text with a trained model",
    "inspect": "show what a run directory holds",
    "convert": "turn old checkpoints into bundles",
    "verify": "compare every byte of a checkpoint with its hashes",
    "verify-resume": "prove that a run continues bit for bit",
    "configs": "list, show and check model presets",
    "params": "count parameters and bytes of an architecture",
    "plan": "predict memory and speed of training, without a GPU",
    "ceiling": "measure what this device's matmuls and memory reach",
    "prepare": "turn text into a dataset of token shards",
    "data": "inspect, verify and convert datasets of token shards",
    "plot": "draw loss curves from training logs",
    "bench": "measure how fast this machine trains",
    "tune": "choose how kernels are launched on this GPU",
}
TRAINING = ("train", "run", "bench", "verify-resume")  # commands that fill a GPU's memory
# Settings of torch's allocator, which reads them at its first allocation on a GPU; the one with
# CUDA in it is the older name, which torch still prefers.
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
COMPILING = (*TRAINING, "generate", "tune")
ALIASES = {"--config": "--config_file"}
EPILOG = """\
start here:
  mypt-fast prepare book.txt --out_dir data/book    text to tokens
  mypt-fast train --config tiny --dataset_dir data/book --model_name book
  mypt-fast generate --model_name book --prompt "Once upon"

`mypt-fast COMMAND --help` explains a command. Names take - or _ alike.
exit codes: 0 done, 1 a defect of ours, 2 usage or input, 3 corrupt data, 130 interrupted;
train saves and stops at SIGINT (130), SIGTERM (143), SIGUSR1 (138) and SIGHUP (129)
"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        raise MyptError(message, cure=f"see `{self.prog} --help`")

    def parse_or_suggest(self, argv: list[str]) -> argparse.Namespace:
        """Parse, and turn an unknown flag into an error with a suggestion."""
        args, unknown = self.parse_known_args(argv)
        unknown = [w for w in unknown if w != "--"]  # a bare -- ends the flags, no more
        if unknown:
            flags = [s for a in self._actions for s in a.option_strings]
            word = next((w for w in unknown if w.startswith("-")), unknown[0])
            near = difflib.get_close_matches(word.split("=")[0].lower(), flags, 1)
            cure = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
            raise MyptError(f"unknown argument {word}", cure=cure)
        return args


def spell(argv: list[str]) -> list[str]:
    """Write flag names one way: dashes become underscores, aliases their flag.

    Only the name part before `=` of a `--word` changes, and nothing after a bare `--`.
    """
    out: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return out + argv[i:]
        if word.startswith("--"):
            name, eq, value = word.partition("=")
            name = "--" + name[2:].replace("-", "_")
            word = ALIASES.get(name, name) + eq + value
        out.append(word)
    return out


def _front() -> Parser:
    rows = "\n".join(f"  {name:<13} {line}" for name, line in COMMANDS.items())
    parser = Parser(
        prog="mypt-fast",
        usage="mypt-fast COMMAND [options]",
        description=f"Train GPTs on the hardware you have.\n\ncommands:\n{rows}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mypt-fast {__version__}")
    return parser


def dispatch(argv: list[str]) -> int:
    """Run the command that `argv` names and return its exit code; raises what the command does."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name.startswith("-"):
        later = next((w for w in argv if w in COMMANDS), None)
        if later and name not in ("-h", "--help", "--version"):
            cure = f"flags follow their command: mypt-fast {later} {name} ..."
            raise MyptError(f"{name} comes before the command", cure=cure)
        _front().parse_or_suggest(spell(argv) or ["--help"])
        raise MyptError("no command given", cure="see `mypt-fast --help`")
    name = name.replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.lower(), COMMANDS, 1)
        cure = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(COMMANDS)}"
        raise MyptError(f"unknown command '{name}'", cure=cure)
    # One other busy program makes OpenMP's default spinning cost 11x of a step; sleeping costs
    # nothing measurable (docs/decisions.md). Read by the runtime when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if name in TRAINING and has_expandable_segments() and not ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    module = importlib.import_module(f"mypt_fast.cli.cmd_{name.replace('-', '_')}")
    parser = Parser(
        prog=f"mypt-fast {name}",
        description=getattr(module, "DESCRIPTION", module.HELP),
        epilog=getattr(module, "EXAMPLES", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS if getattr(module, "SUPPRESS", False) else None,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", default=False, help="show tracebacks")
    module.add_flags(parser)
    # what follows the script of `run` is the script's, spelling and all
    if hasattr(module, "split"):
        own, passed_on = module.split(rest)
        args = parser.parse_or_suggest(spell(own))
        args.passed_on = passed_on
    else:
        args = parser.parse_or_suggest(spell(rest))
    if name in COMPILING and (why := cache.keep_compiled()):
        console.notice(f"note: what is compiled is not kept in the cache folder: {why}")
    return int(module.run(args))


def has_expandable_segments() -> bool:
    """Whether CUDA's allocator can grow its segments here, and never fragments.

    Not on Windows, and under WSL the first allocation may fail with them (pytorch #192330).
    """
    return sys.platform == "linux" and "microsoft" not in os.uname().release.lower()


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # no terminal without 🏆 stops a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = dispatch(argv)
        except SystemExit as e:  # argparse after --help and --version
            code = e.code if isinstance(e.code, int) else 0
        if sys.stdout:
            sys.stdout.flush()
        return code
    except MyptError as e:
        return _fail(str(e), e.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except BrokenPipeError:  # `mypt-fast ... | head` closed the pipe: not an error of anyone's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # full disk, permission: the environment's, with its own words
        return _fail(f"{e.filename or 'input/output'}: {e.strerror or e}", 2, debug)
    except Exception as e:
        if (
            isinstance(e, MemoryError)
            or "OutOfMemory" in type(e).__name__
            or "can't allocate" in str(e)
        ):
            cure = "lower --micro_batch_size or --batch_size, or pass --recompute block"
            return _fail(
                f"out of memory; {str(e).splitlines()[0] if str(e) else ''}; {cure}", 2, debug
            )
        text = f"internal error: {type(e).__name__}: {e}; this is a defect of mypt-fast"
        return _fail(text + "; rerun with --debug and report it", 1, debug)


def _fail(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # one line, whatever a file's name or key holds: no control character reaches the terminal
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.replace("\n", " "))
    print(f"error: {line}", file=sys.stderr)
    return code
