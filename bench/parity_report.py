"""A pytest plugin: one line of JSON per finished test, so that a killed run leaves what it did."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

LONGEST = 3000  # characters of a failure


def _append(line: dict[str, Any]) -> None:
    path = os.environ.get("MYPT_PARITY_LINES")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:  # workers report through their master
        with Path(path).open("a") as f:
            f.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr
        if report.skipped and isinstance(why, tuple):
            why = why[2]
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        _append(line | ({"why": str(why)[-LONGEST:]} if why else {}))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        why = str(report.longrepr)[-LONGEST:]
        _append({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "why": why})


def _read(lines: Path) -> list[dict[str, Any]]:
    """What was reported, without a line that is only half written yet."""
    found = []
    for line in lines.read_text(errors="replace").splitlines() if lines.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [t for t in found if isinstance(t, dict) and {"test", "outcome", "seconds"} <= t.keys()]


def summary(lines: Path) -> dict[str, Any]:
    """Counts, failures with their text, tests that lost the device, skips, the slowest."""
    found = _read(lines)
    skips: dict[str, int] = {}
    for t in found:
        if t["outcome"] == "skipped":
            skips[t.get("why", "")] = skips.get(t.get("why", ""), 0) + 1
    slowest = sorted(found, key=lambda t: -t["seconds"])[:20]
    return {
        "passed": sum(t["outcome"] == "passed" for t in found),
        "failed": sum(t["outcome"] == "failed" for t in found),
        "skipped": sum(skips.values()),
        "failures": [t for t in found if t["outcome"] == "failed"],
        "device_lost": [t for t in found if t["outcome"] == "device lost"],
        "skips": skips,
        "slowest": [{"test": t["test"], "seconds": round(t["seconds"], 2)} for t in slowest],
    }
