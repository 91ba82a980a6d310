import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path, **env):
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "MYPT_REQUIRE_NATIVE": "", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, list(tmp_path.glob("lib/mypt_fast/_native*"))


NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def test_without_a_compiler_the_build_succeeds_and_says_so_once(tmp_path):
    done, modules = build(tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert modules == []
    notes = [line for line in done.stderr.splitlines() if line.startswith("mypt_fast:")]
    assert len(notes) == 1
    assert "native data loader was not built" in notes[0]
    assert "/nonexistent/c++" in notes[0]


def test_a_required_module_fails_the_build(tmp_path):
    done, _ = build(tmp_path, **NO_COMPILER, MYPT_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr


@pytest.mark.slow
def test_ninja_builds_without_a_warning_and_a_later_failure_leaves_nothing_stale(tmp_path):
    if os.environ.get("MYPT_NO_NATIVE") == "1":
        pytest.skip("MYPT_NO_NATIVE=1: no compiler is expected")
    done, modules = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(modules) == 1
    assert "warning:" not in done.stderr
    assert (tmp_path / "temp/build.ninja").is_file()
    done, modules = build(tmp_path, **NO_COMPILER)
    assert done.returncode == 0
    assert modules == []


@pytest.mark.slow
def test_a_wheel_carries_the_presets_and_runs_from_anywhere(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("mypt_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shipped = {p.relative_to(ROOT / "configs") for p in ROOT.glob("configs/**/*.json")}
    inside = tmp_path / "site/mypt_fast/configs"
    assert {p.relative_to(inside) for p in inside.rglob("*.json")} == shipped
    find = "from mypt_fast import presets; print(presets.load('configs/tiny.json').path)"
    done = subprocess.run(
        [sys.executable, "-c", find],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(inside / "tiny.json"), done.stderr
