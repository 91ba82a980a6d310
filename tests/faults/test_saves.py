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


def run(
    shim: Path, folder: Path, modes: list[tuple[int, int]], exchange: bool
) -> dict[str, dict[str, int]]:
    env = {**os.environ, "LD_PRELOAD": str(shim)}
    command = [sys.executable, "-W", "ignore", str(HERE / "saves.py"), str(folder)]
    command += [json.dumps(modes), json.dumps([exchange])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    for name, found in results.items():
        print(f"{name}: {found}")
    assert len(results) == len(modes)
    assert all(sum(found.values()) > 30 for found in results.values())  # requests of one save
    return results


# the other one, two renames, in `make test-slow`; test_publish.py has its deaths by the call
EXCHANGE = [True, pytest.param(False, marks=pytest.mark.slow)]


@pytest.mark.parametrize("exchange", EXCHANGE)
def test_death_at_every_request_leaves_the_old_or_the_new(
    shim: Path, tmp_path: Path, exchange: bool
) -> None:
    """Before it and, where it is a write, after half of it."""
    for found in run(shim, tmp_path, [(1, 0), (2, 0)], exchange).values():
        kinds = {what.split(",")[0] for what in found}
        assert kinds == {"old", "new"}  # some before the swap and some after


@pytest.mark.parametrize("exchange", EXCHANGE)
def test_a_full_disk_at_every_request_is_one_refusal(
    shim: Path, tmp_path: Path, exchange: bool
) -> None:
    """Never a traceback, never a mixture, and the next save works."""
    for found in run(shim, tmp_path, [(4, errno.ENOSPC)], exchange).values():
        assert any("old, refused" in what for what in found)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "code"), [(4, errno.EIO), (4, errno.EROFS), (5, errno.ENOSPC)])
def test_other_errors_and_a_disk_that_stays_full(
    shim: Path, tmp_path: Path, mode: int, code: int
) -> None:
    for found in run(shim, tmp_path, [(mode, code)], True).values():
        assert any("old, refused" in what for what in found)
