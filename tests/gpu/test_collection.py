"""Every test that is written in this folder is collected for a GPU; needs none itself."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def written(path: Path) -> Iterator[str]:
    """Names of the test functions that a file defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield f"{path.name}::{node.name}"


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """What `-m gpu` keeps, as file::function; of a process of its own, as a run on a GPU is."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests/gpu"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line for line in done.stdout.splitlines() if "::" in line)
    return {line.partition("[")[0].removeprefix("tests/gpu/") for line in lines}


def test_every_test_of_this_folder_is_collected_for_a_gpu(collected) -> None:
    files = set(HERE.glob("test_*.py")) - {Path(__file__)}
    tests = {test for path in files for test in written(path)}
    assert tests - collected == set()
    # a twin of tests/kernels defines none, and takes those with a `way`
    assert {test.partition("::")[0] for test in collected} == {path.name for path in files}
