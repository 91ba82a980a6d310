"""`mypt-fast verify`: every byte of a checkpoint against its hashes."""

import argparse
from pathlib import Path

from mypt_fast import console
from mypt_fast.errors import IntegrityError

HELP = "compare every byte of a checkpoint with its hashes"
DESCRIPTION = """\
Hash every file of a checkpoint and every tensor in them, and compare with the manifest. What
differs is named, down to the tensor. Hidden snapshots of the run are checked too."""
EXAMPLES = """\
examples:
  mypt-fast verify book
  mypt-fast verify /mnt/backup/book_gold

exit codes: 0 every byte is what was saved, 3 something differs"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to verify."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="name of a run, or a directory")


def run(args: argparse.Namespace) -> int:
    """Verify; returns the exit code."""
    from mypt_fast.checkpoint.snapshots import snapshots
    from mypt_fast.checkpoint.verify import verify

    path = find(args.checkpoint)
    problems = []
    for folder in (path, *snapshots(path)):
        report = verify(folder)
        problems += [f"{folder}: {problem}" for problem in report.problems]
        for line in [] if report.problems else report.lines:
            print(f"{folder}: {line} ({console.bytes_text(report.n_bytes)})")
    if problems:
        found = "; ".join(problems)
        cure = f"restore it from a backup, or use {path.name}_gold if that is whole"
        raise IntegrityError(f"{args.checkpoint} is not what was saved", found, cure)
    return 0


def find(name: str) -> Path:
    """Resolve a name or path, damaged bundles included; raises CheckpointError."""
    from mypt_fast.checkpoint.manifest import locate

    for path in (Path("checkpoints") / name, Path(name)):
        if name and (path / "manifest.json").is_file():
            return path  # locate wants config.json and model.pt, which may be what is missing
    return locate(name)
