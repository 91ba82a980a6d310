"""F3 and F13: a run stopped at random moments ends as one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RESTARTS = Path(__file__).parent / "restarts.py"


def restarts(*words: str) -> dict:
    """Run the fork server; a seed in its output repeats what failed, up to the clock."""
    done = subprocess.run([sys.executable, str(RESTARTS), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_end_as_those_left_alone() -> None:
    assert restarts("--kills", "8", "--steps", "80")["stopped"] == 8


def test_signals_at_random_moments_are_saved_and_resumed() -> None:
    assert restarts("--kills", "12", "--steps", "120", "--signals")["stopped"] == 12


@pytest.mark.slow
def test_many_signals_are_saved_and_resumed() -> None:
    assert restarts("--kills", "100", "--steps", "1000", "--signals")["stopped"] == 100


@pytest.mark.slow
@pytest.mark.skipif(int(os.environ.get("MYPT_FAULTS", "0")) < 10_000, reason="for make faults")
def test_two_hundred_kills_change_nothing() -> None:
    result = restarts("--kills", "200", "--steps", "2000")
    print(f"\nF3: {result}")
    assert result["stopped"] == 200
