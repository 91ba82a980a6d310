"""`mypt-fast verify-resume`: execute some steps again and prove that they come out equal."""

import argparse

from mypt_fast.errors import ConfigError, IntegrityError

HELP = "prove that a run continues bit for bit"
DESCRIPTION = """\
Continue a copy of a run twice for some steps, from its older snapshot where there is one, and
compare weights, moments, random numbers, data position and losses bit for bit; where the run's
log has these steps, compare its losses too. The run itself is not touched."""
EXAMPLES = """\
examples:
  mypt-fast verify-resume book
  mypt-fast verify-resume book --steps 20

Needs the disk space of two checkpoints. exit codes: 0 equal, 3 not equal"""
LARGEST = 10**6


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add which run and how many steps."""
    parser.add_argument("run", metavar="RUN", help="name of a run, or its directory")
    parser.add_argument(
        "--steps", metavar="K", type=int, default=5, help="steps to execute (default: 5)"
    )


def run(args: argparse.Namespace) -> int:
    """Execute and compare; returns the exit code."""
    if not 1 <= args.steps <= LARGEST:
        raise ConfigError("--steps is out of range", f"found {args.steps}", f"use 1 to {LARGEST}")
    from mypt_fast.checkpoint.manifest import locate
    from mypt_fast.checkpoint.snapshots import check, snapshots
    from mypt_fast.training.rerun import prove

    path = locate(args.run)
    source = next(iter(snapshots(path)), path)
    check(source)
    lines, problems = prove(path, source, args.steps)
    if problems:
        raise IntegrityError(
            f"{path} does not continue bit for bit from {source.name}", "; ".join(problems),
            "was it trained on another machine, or with other versions?",
        )  # fmt: skip
    print("\n".join(lines))
    return 0
