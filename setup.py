"""Build the one compiled part, `mypt_fast._native`, through Ninja; everything else: pyproject.toml.

The extension is optional. Without a C++17 compiler the installation succeeds, says so in one line,
and the NumPy loader is used. Set MYPT_REQUIRE_NATIVE=1 to make that an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))

# No -march=native: a wheel must run anywhere, so instruction sets are chosen at run time.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
LINK_FLAGS = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-pthread"]
# For `make sanitize`: which of GCC's sanitizers watch the tests.
if sanitizers := os.environ.get("MYPT_SANITIZE"):
    LINK_FLAGS += [f"-fsanitize={sanitizers}"]
    CXX_FLAGS += [LINK_FLAGS[-1], "-fno-sanitize-recover=all", "-g", "-O1"]

BUILD_NINJA = """\
rule cxx
  command = {cxx} {flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in {link_flags} -o $out
{objects}
build {target}: link {inputs}
"""


class NinjaBuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self._build_with_ninja(ext)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("MYPT_REQUIRE_NATIVE") == "1":
                raise
            # Never install what an earlier build left here.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            sys.stderr.write(
                f"mypt_fast: the native data loader was not built ({error}); "
                "the slower NumPy loader will be used\n"
            )

    def _build_with_ninja(self, ext: Extension) -> None:
        work = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(_build_file(compiler(), ext.sources, work, target))
        # Quiet leaves what the compiler says; stderr keeps it out of a build backend's answer.
        command = [ninja_executable(), "--quiet", "-C", str(work)]
        subprocess.run(command, stdout=sys.stderr, check=True)


def compiler() -> str:
    """Return the C++ compiler as a command prefix; raises where there is none."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    for candidate in [command] if "CXX" in os.environ else [command, "c++", "g++", "clang++"]:
        if shutil.which(candidate.split()[0]):
            return candidate
    raise FileNotFoundError(f"no C++ compiler: {command} not found")


def ninja_executable() -> str:
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def _build_file(cxx: str, sources: list[str], work: Path, target: Path) -> str:
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    if not Path(includes[1], "Python.h").is_file():
        raise FileNotFoundError(f"no Python.h in {includes[1]}: install Python's headers")
    objects = {str(Path(s).resolve()): str(work / f"{Path(s).stem}.o") for s in sources}
    return BUILD_NINJA.format(
        cxx=cxx,
        flags=" ".join([*CXX_FLAGS, *(f'-isystem "{path}"' for path in includes)]),
        link_flags=" ".join(LINK_FLAGS),
        objects="\n".join(f"build {_escape(o)}: cxx {_escape(s)}" for s, o in objects.items()),
        target=_escape(str(target)),
        inputs=" ".join(map(_escape, objects.values())),
    )


def _escape(path: str) -> str:
    for character in "$ :":
        path = path.replace(character, "$" + character)
    return path


setup(
    ext_modules=[
        Extension("mypt_fast._native", SOURCES, depends=HEADERS, language="c++", optional=True)
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
