"""Where benchmark results are kept: bench/results/<device>/<suite>.json, raw samples included."""

import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """The processor's own name, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(
            x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def machine() -> dict[str, Any]:
    """What a reader must know to place a number; never the machine's name."""
    import os

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


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
