"""Who may import whom. A new top-level module has to be placed on a floor here."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    {"__init__", "errors"},
    {
        "schema",
        "config",
        "presets",
        "settings",
        "accounting",
        "console",
        "cache",
        "run_log",
        "publish",
        "planner",
    },
    {"kernels", "tokenizer", "tokenizer_state", "gpt2_files", "data", "_native"},
    {"attention", "block", "model", "recompute"},
    {"lora", "generate", "plot", "checkpoint"},
    {"training", "benchmark"},
    {"core", "cli", "__main__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted((ROOT / "mypt_fast").rglob("*.py"))
HEAVY = {"torch", "numpy", "triton", "tiktoken", "tokenizers", "matplotlib", "tqdm", "xxhash"}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES} | {"mypt_fast._native": None}


def unit(module):
    """The part of a module's name that has a floor: mypt_fast.data.loader -> data."""
    return [*module.split("."), "__init__"][1]


def imported(path, nodes=None):
    """Names of the modules a file imports, anywhere in it unless `nodes` says where."""
    for node in nodes or ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def ours(path, nodes=None):
    return {name for name in imported(path, nodes) if name.split(".")[0] == "mypt_fast"}


def body(path):
    """The statements that run on import; those of functions and TYPE_CHECKING do not."""
    return ast.parse(path.read_text("utf-8")).body


def test_every_module_has_a_floor():
    assert {unit(module) for module in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_module_imports_only_its_own_floor_and_those_below(path):
    floor = FLOOR[unit(module_of(path))]
    assert {name for name in ours(path) if FLOOR[unit(name)] > floor} == set()


def test_no_module_needs_itself_to_be_imported():
    graph = {module_of(p): ours(p, body(p)) - {module_of(p)} for p in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(FILES)  # raises on a cycle


def test_kernels_take_tensors_and_numbers_never_a_config():
    for path in (ROOT / "mypt_fast/kernels").rglob("*.py"):
        assert {unit(name) for name in ours(path)} <= {"kernels", "errors"}, path


# The parts of `core` are tensors too; `core/__init__` loads each when a name of it is asked for.
LIGHT = [
    p
    for p in FILES
    if FLOOR.get(unit(module_of(p))) in (0, 1, 6)
    and (p.parent.name != "core" or p.stem == "__init__")
]


@pytest.mark.parametrize("path", LIGHT, ids=module_of)
def test_the_ground_floors_and_the_command_line_import_nothing_heavy_at_module_level(path):
    assert {name.split(".")[0] for name in imported(path, body(path))} & HEAVY == set()


def test_only_the_bindings_know_python_and_nothing_native_knows_torch():
    sources = sorted((ROOT / "csrc").iterdir())
    for path in sources:
        includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text("utf-8"), re.M)
        heads = {name.split("/")[0] for name in includes}
        assert not heads & {"torch", "ATen", "c10", "cuda.h", "cuda_runtime.h"}, path
        if path.name != "bindings.cpp":
            assert not heads & {"pybind11", "Python.h"}, path
    assert "bindings.cpp" in {path.name for path in sources}
