"""How each kernel is launched on each architecture: warps, rows of a tile, programs, stages.

The table ships as launch.json, made by `mypt-fast tune`; nothing is tuned while a model trains.
A card that is not in it takes the row of the nearest older architecture.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHS = (75, 80, 86, 89, 90, 100, 120)
INTERPRETER_ARCH = 80  # whose rows the interpreter takes on a CPU
BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32}
MAX_TABLE_BYTES = 1 << 20
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


def config(kernel: str, columns: int, dtype: torch.dtype, arch: int) -> Config:
    """The row for a kernel over rows of `columns` elements of `dtype`.

    Raises:
        ValueError: if the rows are wider than the widest entry.
    """
    rows = [c for c in _rows(arch) if c.kernel == kernel and c.bits == BITS[dtype]]
    fitting = [c for c in rows if c.columns >= columns]
    if not fitting:
        widest = max((c.columns for c in rows), default=0)
        raise ValueError(f"{kernel}: expected at most {widest} columns; found {columns}")
    return min(fitting, key=lambda c: c.columns)


def beats_compile(name: str, arch: int) -> bool:
    """Whether an operator was measured to beat torch.compile end to end on this architecture."""
    measured = _table()["beats_compile"]
    return name in measured.get(f"sm_{arch}", [])


def nearest(arch: int) -> int:
    """The newest architecture of the table that is not newer than `arch`, else its oldest."""
    known = sorted(int(name[3:]) for name in _table()["configs"])
    return max((a for a in known if a <= arch), default=known[0])


@functools.cache
def _rows(arch: int) -> tuple[Config, ...]:
    return tuple(Config(**row) for row in _table()["configs"][f"sm_{nearest(arch)}"])


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("launch.json").read_text())


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
        shape: n_embd, hidden (feed-forward width), n_head, head_size, vocab_size.
        dtype: of the activations.
        arch: as in `ARCHS`.
    """
    from mypt_fast.kernels.jit import activation, cross_entropy, norm, rope

    for module in (norm, activation, rope, cross_entropy):
        yield from module.cases(shape, dtype, arch)
