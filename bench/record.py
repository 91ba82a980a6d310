"""Where benchmark results are kept: bench/results/<device>/<suite>.json, raw samples included."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mypt_fast.benchmark.machine import machine

__all__ = ["RESULTS", "machine", "rows_of", "run_suite", "save", "slug"]

RESULTS = Path(__file__).parent / "results"


def slug(name: str) -> str:
    """A device's name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_suite(file: str) -> list[dict[str, Any]]:
    """Run a benchmark file in its own process; returns what pytest-benchmark found, raw."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.json")
        command = [sys.executable, "-m", "pytest", file, "--benchmark-only", "-q"]
        subprocess.run([*command, f"--benchmark-json={raw}"], check=True)
        rows: list[dict[str, Any]] = json.loads(raw.read_text())["benchmarks"]
    return rows


def save(
    suite: str, facts: dict[str, Any], rows: list[dict[str, Any]], device: str = "cpu"
) -> Path:
    """Write one suite, a row a line, so that a change of one row is a change of one line."""
    path = RESULTS / device / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps({**facts, "rows": []}, indent=1).replace("[]", f"[\n  {lines}\n ]")
    path.write_text(text + "\n")
    return path


def rows_of(suite: str, facts: dict[str, Any], device: str = "cpu") -> list[dict[str, Any]]:
    """The rows of the file that `save` would write over; none where there is no file.

    Raises:
        ValueError: for rows of another machine, day, version or cap: one header stands for all.
    """
    path = RESULTS / device / f"{suite}.json"
    if not path.exists():
        return []
    held: dict[str, Any] = json.loads(path.read_text())
    rows: list[dict[str, Any]] = held.pop("rows")
    for key in sorted(held.keys() | facts.keys()):
        a, b = (side.get(key) for side in (held, facts))
        if key == "gpu" and a and b:  # its clocks are never twice the same
            a, b = a.get("name"), b.get("name")
        if a != b:
            raise ValueError(f"the file's {key} is {a}, not {b}")
    return rows
