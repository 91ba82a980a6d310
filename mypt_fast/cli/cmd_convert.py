"""`mypt-fast convert`: old checkpoints as bundles in today's layout."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mypt_fast import console
from mypt_fast.errors import CheckpointError, ConfigError, MyptError

if TYPE_CHECKING:
    from mypt_fast.checkpoint.converting import Converted

HELP = "turn old checkpoints into bundles"
DESCRIPTION = """\
Turn MyPT's single-file checkpoints (latest.pt, final.pt) into bundles beside them, and bundles of
the per-head era into today's layout. Old files stay: a replaced model.pt as model.pt.legacy. The
bundle is read back, and what it computes is compared with what the old file computes."""
EXAMPLES = """\
examples:
  mypt-fast convert --model_name dante                  latest.pt, else final.pt
  mypt-fast convert --model_name dante --checkpoint final.pt
  mypt-fast convert --all --dry_run                     load everything, write nothing

exit codes: 0 done, 2 nothing to convert there, 3 a damaged file"""
ROOT = Path("checkpoints")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to convert and how."""
    parser.add_argument("path", nargs="?", metavar="NAME_OR_PATH", help="run, directory or file")
    parser.add_argument("--model_name", metavar="NAME", help="the same, as a flag")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="file in the run's directory (default: latest.pt)"
    )
    parser.add_argument(
        "--all", action="store_true", help="every run under checkpoints/ that has no bundle yet"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="read the file, build the model, run it once and compare; write nothing",
    )
    parser.add_argument("--yes", action="store_true", help="replace a bundle without asking")


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    name = args.model_name if args.path is None else args.path
    if (args.path is not None) + (args.model_name is not None) + args.all != 1:
        raise ConfigError("convert needs one model", cure="give a name, a path or --all")
    if args.all:
        if args.checkpoint is not None:
            raise ConfigError("--checkpoint names a file of one model", cure="drop it, or --all")
        return _all(args.dry_run)
    directory, file = _place(name, args.checkpoint)
    _one(directory, file, args.dry_run, args.yes)
    return 0


def _place(name: str, checkpoint: str | None) -> tuple[Path, str | None]:
    """The run's directory and the file to convert, None for the usual one."""
    for path in (ROOT / name, Path(name)):
        if name and path.is_dir():
            return path, checkpoint
        if name and path.is_file() and checkpoint is None:
            return path.parent, path.name
    here = sorted(p.name for p in ROOT.iterdir() if p.is_dir()) if ROOT.is_dir() else []
    here = [n for n in here if not n.startswith(".")]
    raise CheckpointError(
        f"no model '{name}'", f"nothing in {ROOT / name}",
        f"runs here: {', '.join(here[:8])}" if here else f"{ROOT}/ holds no runs",
    )  # fmt: skip


def _one(directory: Path, file: str | None, dry_run: bool, yes: bool) -> None:
    from mypt_fast.checkpoint.converting import convert, source_of
    from mypt_fast.checkpoint.legacy import is_per_head_bundle
    from mypt_fast.checkpoint.lock import RunLock
    from mypt_fast.checkpoint.manifest import exists

    if file is None and exists(directory) and not is_per_head_bundle(directory):
        print(f"{directory} is a bundle in today's layout: nothing to convert")
        return
    source = source_of(directory, file)
    if not dry_run and source != directory and exists(directory) and not yes:
        _ask(directory, source)
    if dry_run:
        _report(convert(directory, file, write=False), dry_run)
        return
    with RunLock([directory]) as lock:
        lock.acquire()
        _report(convert(directory, file), dry_run)


def _ask(directory: Path, source: Path) -> None:
    """Have it confirmed at a terminal that a bundle is replaced; elsewhere refuse."""
    text = f"{directory} holds a bundle already; replace it with {source.name}?"
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(text, "no terminal to answer at", "--yes replaces it")
    print(f"{text} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError(f"{source} was not converted", "the bundle stays as it is")


def _report(done: "Converted", dry_run: bool) -> None:
    for text in done.notices:
        console.notice(f"note: {text}")
    step = "no step recorded" if done.step is None else f"step {done.step}"
    verb = "can be converted" if dry_run else f"-> {done.target}"
    print(f"{done.source} {verb}: {step}, {console.count(done.n_params)} parameters")
    compared = "the model built from it" if dry_run else "the bundle read back"
    print(f"  largest difference of logits, file and {compared}: {done.difference:.1e}")
    print(
        f"  optimizer moments: {'taken over' if done.has_moments else 'none, they start at zero'}"
    )
    if done.kept:
        print(f"  kept: {', '.join(p.name for p in done.kept)}")


def _all(dry_run: bool) -> int:
    """Convert what there is, file by file; a file that fails does not stop the others."""
    from mypt_fast.checkpoint.converting import scan

    if not ROOT.is_dir():
        raise CheckpointError(f"no folder {ROOT}", cure="run where the checkpoints are")
    code = found = 0
    for directory, file in scan(ROOT):
        found += 1
        try:
            _one(directory, file, dry_run, yes=False)
        except MyptError as e:
            console.notice(f"failed: {directory}: {e}")
            code = max(code, e.exit_code)
    if not found:
        print(f"nothing to convert in {ROOT}")
    if code:
        raise _Failed(code)
    return 0


class _Failed(MyptError):
    """Some of the files could not be converted."""

    def __init__(self, code: int) -> None:
        super().__init__("not everything could be converted", cure="see the lines above")
        self.exit_code = code
