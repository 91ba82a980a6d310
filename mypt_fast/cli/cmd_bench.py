"""`mypt-fast bench`: how fast this machine trains, in a table and one file to share."""

import argparse
import json
from pathlib import Path
from typing import Any

from mypt_fast import console, publish
from mypt_fast.errors import ConfigError, DataError

HELP = "measure how fast this machine trains"
DESCRIPTION = """\
Measure the token loader, the output head with its loss, and a training step of a preset that fits,
beside a bare matmul of the same precision. It takes under two minutes on a CPU, and writes one JSON
file with every sample, which holds no name of this machine or its user and no path."""
EXAMPLES = """\
examples:
  mypt-fast bench                     a table, and mypt-fast-bench.json
  mypt-fast bench --quick             smaller shapes, in seconds
  mypt-fast bench --json mine.json    another file"""
DEFAULT_FILE = "mypt-fast-bench.json"
MAX_BYTES = 16 << 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to measure, and where the record goes."""
    parser.add_argument("--quick", action="store_true", help="smaller shapes, fewer samples")
    parser.add_argument(
        "--json", metavar="FILE", default=DEFAULT_FILE, help=f"the record (default: {DEFAULT_FILE})"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: a GPU")


def run(args: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    path = Path(args.json)
    check_target(path)
    from mypt_fast.benchmark import quick
    from mypt_fast.training import device as devices

    device, note = devices.pick(args.device, explicit=True)
    if note:
        console.notice(note)
    record = quick.measure(device, args.quick, console.notice)
    publish.write_json(path, record)
    print("\n".join(report(record, quick.lines(record))))
    print(f"\nsaved to {path}")
    return 0


def report(record: dict[str, Any], rows: list[tuple[str, str, str, str]]) -> list[str]:
    """The head line and the table."""
    facts = record["machine"]
    name = facts["gpu"]["name"] if "gpu" in facts else f"{facts['cpu']}, {facts['threads']} threads"
    first = f"{name}; torch {facts['torch']}; mypt_fast {record['mypt_fast']}"
    return [first, "", *console.table(["part", "what", "time", "rate"], rows, left=2)]


def check_target(path: Path) -> None:
    """Refuse, before anything is measured, a target that cannot be written or holds other things.

    Raises:
        ConfigError: for a directory, or a folder that is not there.
        DataError: for a file that is no record of this command.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"--json {path}", f"there is no folder {path.parent}", "make it first")
    if path.is_dir():
        raise ConfigError(f"--json {path}", "that is a directory", "name a file in it")
    if not path.exists():
        return
    try:
        small = path.stat().st_size <= MAX_BYTES
        held = json.loads(path.read_text("utf-8")) if small else None
    except (ValueError, RecursionError):
        held = None
    if not (isinstance(held, dict) and {"schema", "mypt_fast", "rows"} <= set(held)):
        raise DataError(
            f"--json {path}", "it holds something other than a record of bench", "name another file"
        )
