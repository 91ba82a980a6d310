"""F1 and F5: death and disk errors at every request that a save makes to the file system."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("no gcc to build the faulty disk with")
    target = tmp_path_factory.mktemp("shim") / "shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", str(HERE / "shim.c"), "-o", str(target), "-ldl"]
    subprocess.run(command, check=True)
    return target


def run(shim: Path, folder: Path, modes: list[tuple[int, int]]) -> dict[str, dict[str, int]]:
    env = {**os.environ, "LD_PRELOAD": str(shim)}
    command = [sys.executable, "-W", "ignore", str(HERE / "saves.py"), str(folder)]
    done = subprocess.run(
        [*command, json.dumps(modes)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    for name, found in results.items():
        print(f"{name}: {found}")
    return results


def test_death_at_every_request_leaves_the_old_or_the_new(shim: Path, tmp_path: Path) -> None:
    """Before it and, where it is a write, after half of it; with the exchange and without."""
    results = run(shim, tmp_path, [(1, 0), (2, 0)])
    assert len(results) == 4
    for found in results.values():
        assert sum(found.values()) > 30  # requests of one save
        kinds = {what.split(",")[0] for what in found}
        assert kinds == {"old", "new"}  # some before the swap and some after


@pytest.mark.parametrize("mode", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_disk_error_at_every_request_is_one_refusal(shim: Path, tmp_path: Path, mode) -> None:
    """Once, and for good from there on: never a traceback, never a mixture."""
    results = run(shim, tmp_path, [(mode, errno.ENOSPC)])
    for found in results.values():
        assert any("old, refused" in what for what in found)
        assert sum(found.values()) > 30


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.EROFS])
def test_other_disk_errors_too(shim: Path, tmp_path: Path, code: int) -> None:
    assert len(run(shim, tmp_path, [(4, code)])) == 2
