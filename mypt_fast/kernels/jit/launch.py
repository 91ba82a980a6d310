"""How each kernel is launched on each architecture: warps, rows of a tile, programs, stages.

The table ships as launch.json, made by `mypt-fast tune`; nothing is tuned while a model trains.
A card that is not in it takes the row of the nearest older architecture. What a user measured on
the own card comes first: a table of the same form in the cache folder, see `user_table`.
"""

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mypt_fast.errors import ConfigError

ARCHS = (75, 80, 86, 89, 90, 100, 120)
INTERPRETER_ARCH = 80  # whose rows the interpreter takes on a CPU
BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32}
REGISTERS = 65536  # of a multiprocessor, on all of these
MAX_TABLE_BYTES = 1 << 20
MAX_TABLE_ROWS = 10_000
SOURCES = ("measured", "aot")
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Config:
    """One row of the table.

    `columns` is the widest row it serves; `source` tells a measured row from one that was only
    compiled ahead of time and read for registers and spills.
    """

    kernel: str
    bits: int
    columns: int
    rows: int
    warps: int
    stages: int
    programs: int
    source: str


POWERS = tuple(1 << i for i in range(9))
# What a row of a table may hold; sources are checked apart.
ALLOWED: dict[str, Any] = {
    "bits": (16, 32),
    "columns": range(1, (1 << 30) + 1),
    "rows": POWERS,
    "warps": POWERS[:6],
    "stages": range(1, 9),
    "programs": range(1 << 16),
}


@dataclass(frozen=True)
class Case:
    """One kernel as the ahead-of-time gate compiles it.

    `signature` maps the pointers and sizes to Triton's type names ("*bf16", "i32", "i64"), in the
    kernel's order; `constants` its constexpr arguments; `aligned` names the arguments that are
    divisible by 16.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    aligned: tuple[str, ...] = field(default=())


def arch_of(x: Tensor) -> int:
    """The architecture a kernel for `x` is launched on."""
    if x.device.type != "cuda":
        return INTERPRETER_ARCH
    from mypt_fast.kernels._operator import device_arch

    return device_arch(x.device.index or 0)


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


_override: ContextVar[Config | None] = ContextVar("override", default=None)


@contextlib.contextmanager
def overridden(row: Config) -> Iterator[None]:
    """Launch the kernel that `row` names as it says, in this thread, whatever the table says."""
    token = _override.set(row)
    try:
        yield
    finally:
        _override.reset(token)


def config(kernel: str, columns: int, dtype: torch.dtype, arch: int) -> Config:
    """The row for a kernel over rows of `columns` elements of `dtype`.

    Raises:
        ValueError: if the rows are wider than the widest entry.
    """
    row = _override.get()
    if row is not None and row.kernel == kernel and row.bits == BITS[dtype]:
        return row
    return _chosen(kernel, columns, BITS[dtype], arch)


@functools.cache
def _chosen(kernel: str, columns: int, bits: int, arch: int) -> Config:
    shipped = _shipped()["configs"]
    widest = 0
    for table in (_own(arch), shipped[nearest(arch)]):
        rows = [row for row in table if row.kernel == kernel and row.bits == bits]
        fitting = [row for row in rows if row.columns >= columns]
        if fitting:
            return min(fitting, key=lambda row: row.columns)
        widest = max([widest, *(row.columns for row in rows)])
    raise ValueError(f"{kernel}: expected at most {widest} columns; found {columns}")


def options(warps: int, stages: int) -> dict[str, int]:
    """What Triton is told of a launch besides the kernel's own arguments.

    The bound on registers is what the hardware gives a program of so many warps. Without one the
    assembler may spill a few bytes to fit one program more, which costs more than it brings, and
    another version of it does so in other kernels.
    """
    most = min(255, REGISTERS // (32 * warps))
    return {"num_warps": warps, "num_stages": stages, "maxnreg": most}


def beats_compile(name: str, arch: int) -> bool:
    """Whether an operator was measured to beat torch.compile end to end on this architecture."""
    return name in _shipped()["beats_compile"].get(f"sm_{arch}", [])


def nearest(arch: int) -> int:
    """The newest architecture of the table that is not newer than `arch`, else its oldest."""
    known = _shipped()["configs"]
    return max((a for a in known if a <= arch), default=min(known))


def user_table(arch: int) -> Path:
    """Where `mypt-fast tune` leaves what it measured: below $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~"), ".cache")
    return base / "mypt_fast" / f"launch-sm_{arch}.json"


@functools.cache
def _own(arch: int) -> tuple[Config, ...]:
    """The user's rows for exactly this architecture; a table that is no good is passed over."""
    path = user_table(arch)
    try:
        if path.is_file():
            return read_table(path)["configs"].get(arch, ())
    except (ConfigError, OSError) as e:
        line = str(e).replace("\n", " ")
        sys.stderr.write(f"warning: launch table {path} is ignored: {line}\n")
    return ()


@functools.cache
def _shipped() -> dict[str, Any]:
    table = read_table(Path(__file__).with_name("launch.json"))
    if not table["configs"]:
        raise ConfigError("the launch table that ships", "it is empty", "install again")
    return table


def forget() -> None:
    """Read the tables again when they are next asked."""
    for cached in (_chosen, _own, _shipped):
        cached.cache_clear()


def read_table(path: Path) -> dict[str, Any]:
    """Read and check a table: "configs" by architecture, "beats_compile" by its name.

    An architecture may be the "same_as" one above it, but for the rows of the kernels it lists.

    Raises:
        ConfigError: naming the entry that is wrong.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as f:
        data = f.read(MAX_TABLE_BYTES + 1)
    if len(data) > MAX_TABLE_BYTES:
        raise _bad("the file", f"at most {MAX_TABLE_BYTES} bytes", "more")
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise _bad("the file", "JSON", type(e).__name__) from e
    if not isinstance(table, dict) or not table.keys() <= {"beats_compile", "configs"}:
        raise _bad("the file", "an object of 'beats_compile' and 'configs'", table)
    configs: dict[int, tuple[Config, ...]] = {}
    for name, entry in _object(table.get("configs", {}), "configs").items():
        configs[_arch(name)] = _entry(name, entry, configs)
    wins = _object(table.get("beats_compile", {}), "beats_compile")
    for name, operators in wins.items():
        _arch(name)
        if not isinstance(operators, list) or not all(isinstance(o, str) for o in operators):
            raise _bad(f"beats_compile of {name}", "a list of operators", operators)
    return {"configs": configs, "beats_compile": wins}


def _entry(name: str, entry: Any, known: dict[int, tuple[Config, ...]]) -> tuple[Config, ...]:
    """The rows of one architecture."""
    if not _object(entry, name).keys() <= {"same_as", "rows"}:
        raise _bad(name, "an object of 'same_as' and 'rows'", entry)
    inherited: tuple[Config, ...] = ()
    if "same_as" in entry:
        other = _arch(entry["same_as"])
        if other not in known:
            raise _bad(f"same_as of {name}", "an architecture above it", entry["same_as"])
        inherited = known[other]
    listed = entry.get("rows", [])
    if not isinstance(listed, list) or len(listed) > MAX_TABLE_ROWS:
        raise _bad(f"rows of {name}", f"a list of at most {MAX_TABLE_ROWS}", listed)
    rows = [_row(f"{name}, row {i}", row) for i, row in enumerate(listed)]
    if len({(row.kernel, row.bits, row.columns) for row in rows}) < len(rows):
        raise _bad(f"rows of {name}", "one row a kernel, bits and columns", "two")
    own = {(row.kernel, row.bits) for row in rows}
    return (*(row for row in inherited if (row.kernel, row.bits) not in own), *rows)


def _row(where: str, row: Any) -> Config:
    names = [f.name for f in fields(Config)]
    if not isinstance(row, dict) or sorted(row) != sorted(names):
        raise _bad(where, f"an object of {', '.join(names)}", row)
    if not isinstance(row["kernel"], str) or not re.fullmatch(r"[a-z_]{1,64}", row["kernel"]):
        raise _bad(f"{where}, kernel", "the name of a kernel", row["kernel"])
    if row["source"] not in SOURCES:
        raise _bad(f"{where}, source", f"one of {', '.join(SOURCES)}", row["source"])
    for name, allowed in ALLOWED.items():
        if type(row[name]) is not int or row[name] not in allowed:
            some = ", ".join(map(str, allowed)) if isinstance(allowed, tuple) else None
            text = f"one of {some}" if some else f"{allowed[0]} to {allowed[-1]}"
            raise _bad(f"{where}, {name}", text, row[name])
    return Config(**row)


def _arch(name: Any) -> int:
    if not isinstance(name, str) or not re.fullmatch(r"sm_[1-9][0-9]{1,2}", name):
        raise _bad("an architecture", "a name like sm_90", name)
    return int(name[3:])


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(where, "an object", value)
    return value


def _bad(where: str, expected: str, found: Any) -> ConfigError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ConfigError(f"{where}: expected {expected}", f"found {shown}", "make it anew: tune")


def tiles(columns: int) -> tuple[int, int]:
    """Width and number of the column tiles that a row is held in: (BLOCK, TILES).

    A power of two that is wide enough to load 16 bytes a lane, and small enough that a width like
    1280 (5 x 256) wastes no lanes; at most 8 tiles, which are unrolled.
    """
    block = min(256, max(16, _power_of_two(columns)))
    while -(-columns // block) > 8:
        block *= 2
    return block, -(-columns // block)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def all_cases(shape: dict[str, int], dtype: torch.dtype, arch: int) -> Iterator[Case]:
    """Every kernel a model of this shape launches, as it is launched on `arch`.

    Args:
        shape: n_embd, hidden (feed-forward width), n_head, head_size, vocab_size; perhaps whether
            it has `rms_norm`, `layer_norm` and `rope`, and whether `everything` that the operators
            offer is wanted, not only what its training and inference launch.
        dtype: of the activations.
        arch: as in `ARCHS`.
    """
    from mypt_fast.kernels.jit import activation, adamw, cross_entropy, norm, rope

    for module in (norm, activation, rope, cross_entropy, adamw):
        yield from module.cases(shape, dtype, arch)
