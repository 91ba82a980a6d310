"""Choose the rows of the launch table: by the clock on a GPU, else by what machine code needs.

Ahead of time a candidate must hold everything in registers, in every case that its row serves.
Of those the one is taken that (1) keeps enough bytes in flight on a multiprocessor to cover the
latency of its memory, (2) loads most bytes a lane, (3) keeps most warps resident, in eighths of
what fits, (4) is nearest to four warps, (5) needs fewest registers. An architecture takes the row
of one that needs more in flight wherever that row spills nothing on it, too: what was not measured
is no reason to differ, and there are fewer rows to read and fewer binaries to test.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mypt_fast.kernels import _operator
from mypt_fast.kernels.jit import activation, aot, cross_entropy, launch, lowering, norm, rope
from mypt_fast.kernels.jit.launch import Case, Config

STAGES = 2
LAST = 1 << 30  # columns of a bucket without end
# Partial sums of weight gradients: about two programs a multiprocessor of a large card.
PROGRAMS = {75: 80, 80: 216, 86: 144, 89: 144, 90: 264, 100: 296, 120: 144}


@dataclass(frozen=True)
class Limits:
    """A multiprocessor: what may reside, and the bytes in flight that its share of memory needs.

    These are its bandwidth times about a microsecond, of the card of its kind that has most.
    """

    threads: int
    programs: int
    shared: int
    in_flight: int


LIMITS = {
    75: Limits(1024, 16, 64 << 10, 8 << 10),
    80: Limits(2048, 32, 164 << 10, 20 << 10),
    86: Limits(1536, 16, 100 << 10, 12 << 10),
    89: Limits(1536, 24, 100 << 10, 8 << 10),
    90: Limits(2048, 32, 228 << 10, 36 << 10),
    100: Limits(2048, 32, 228 << 10, 54 << 10),
    120: Limits(1536, 24, 100 << 10, 12 << 10),
}


@dataclass(frozen=True)
class Kernel:
    """What the tuner knows of a kernel.

    Args:
        module: whose `cases` yield it.
        size: the key of a shape that its columns are.
        buckets: upper bounds of the columns that share a row.
        rows: candidates.
        inputs: arrays that a program reads.
        tile: columns of a tile, and elements of one array that a program reads at once, a row.
        programs: whether a launch has a fixed number of them.
    """

    module: Any
    size: str
    buckets: tuple[int, ...]
    rows: tuple[int, ...]
    inputs: int
    tile: Callable[[int, int], tuple[int, int]]
    programs: bool = False


def _row_of_tiles(columns: int, _: int) -> tuple[int, int]:
    return launch.tiles(columns)[0], columns


def _half(columns: int, _: int) -> tuple[int, int]:
    half = 1 << max(0, columns // 2 - 1).bit_length()
    return half, 2 * half


_ROWS = (1, 2, 4, 8, 16)
_NORM = (256, 512, 768, 1024, 1280, 1536, 2048, 4096, 8192, 16384, 32768)
_HEADS = (32, 64, 128, 256, 512, 32768)
KERNELS = {
    "norm_forward": Kernel(norm, "n_embd", _NORM, _ROWS, 2, _row_of_tiles),
    "norm_backward": Kernel(norm, "n_embd", _NORM, _ROWS, 3, _row_of_tiles, programs=True),
    **{
        name: Kernel(activation, "hidden", (LAST,), _ROWS, inputs, lambda c, _: (256, 256))
        for name, inputs in (
            ("swiglu_forward", 2), ("swiglu_backward", 3),
            ("gelu_forward", 1), ("gelu_backward", 2),
        )
    },
    "rope_forward": Kernel(rope, "head_size", _HEADS, (*_ROWS, 32, 64), 1, _half),
    "rope_backward": Kernel(rope, "head_size", _HEADS, (*_ROWS, 32, 64), 1, _half, programs=True),
    "cross_entropy": Kernel(
        cross_entropy, "vocab_size", (LAST,), (1,), 1,
        lambda c, bits: (cross_entropy.BLOCK_BYTES * 8 // bits,) * 2,
    ),
}  # fmt: skip
TYPICAL = {"n_embd": 1024, "hidden": 4096, "n_head": 16, "head_size": 64, "vocab_size": 50304}


@dataclass(frozen=True)
class Slot:
    """A row to be chosen: a kernel, element size and bucket, and the widths that it must serve."""

    kernel: str
    bits: int
    columns: int
    widths: tuple[int, ...]


def slots(shapes: Sequence[dict[str, int]], everything: bool) -> list[Slot]:
    """The rows that these shapes need; `everything`: those of all other widths, too."""
    found = []
    for (name, kernel), bits in product(KERNELS.items(), (16, 32)):
        below = 0
        for bound in kernel.buckets:
            used = {s[kernel.size] for s in shapes if below < s[kernel.size] <= bound}
            below = bound
            if not used and not everything:
                continue
            full = TYPICAL[kernel.size] if bound == LAST else bound
            if kernel.size == "head_size":
                full = min(full, 4096)  # wider heads than anyone's
            found.append(Slot(name, bits, bound, tuple(sorted({*used, full}))))
    return found


def candidates(slot: Slot, arch: int) -> list[Config]:
    """Launches worth a try: 4 to 64 elements of an array a thread, loaded 4 bytes at once or more.

    Cross-entropy has a block of its own, and only warps to choose.
    """
    kernel = KERNELS[slot.kernel]
    programs = PROGRAMS[_known(arch)] if kernel.programs else 0
    tried = []
    for rows, warps in product(kernel.rows, (1, 2, 4, 8, 16)):
        row = Config(
            slot.kernel, slot.bits, slot.columns, rows, warps, STAGES, programs, source="aot"
        )
        if slot.kernel == "cross_entropy":
            fits = warps in (4, 8, 16)
        else:
            each = rows * kernel.tile(slot.widths[-1], slot.bits)[1] / (32 * warps)
            fits = 4 <= each <= 64 and load_bytes(slot, row) >= 4
        if fits:
            tried.append(row)
    return tried


def _known(arch: int) -> int:
    return max((a for a in LIMITS if a <= arch), default=min(LIMITS))


def load_bytes(slot: Slot, row: Config) -> int:
    """Bytes that a lane loads at once, at most 16."""
    tile = KERNELS[slot.kernel].tile(slot.widths[-1], slot.bits)[0]
    return min(16, row.rows * tile * slot.bits // 8 // (32 * row.warps))


def cases_of(slot: Slot, row: Config, arch: int, width: int) -> Iterator[aot.Job]:
    """Every case that `row` serves at this width."""
    kernel = KERNELS[slot.kernel]
    shape = {**TYPICAL, kernel.size: width}
    with tried(row):
        for dtype, name in launch.NAMES.items():
            if dtype is torch.bfloat16 and arch < _operator.FIRST_BF16_ARCH:
                continue
            for case in kernel.module.cases(shape, dtype, arch):
                if case.name.startswith(slot.kernel) and _bits(case, dtype) == slot.bits:
                    yield aot.Job(case, arch, name)


def _bits(case: Case, dtype: torch.dtype) -> int:
    """Element size that a case's row is chosen by: of the residual stream, if it names one."""
    stream = {name: dtype for dtype, name in launch.NAMES.items()}.get(case.name.split()[-1], dtype)
    return launch.BITS[stream]


@contextlib.contextmanager
def tried(row: Config) -> Iterator[None]:
    """`launch.overridden`, past what a launcher remembers of the table."""
    remembered = getattr(activation._constants, "cache_clear", lambda: None)
    remembered()
    try:
        with launch.overridden(row):
            yield
    finally:
        remembered()


def resident(row: Config, usage: lowering.Usage, arch: int) -> int:
    """Programs that fit a multiprocessor at once."""
    limits, threads = LIMITS[_known(arch)], 32 * row.warps
    a_warp = -(-usage.registers * 32 // 256) * 256
    fits = min(
        limits.threads // threads,
        launch.REGISTERS // (a_warp * row.warps),
        limits.shared // (usage.shared_bytes + 1024),
        limits.programs,
    )
    return min(fits, 2) if row.programs else fits


def merit(slot: Slot, row: Config, usage: lowering.Usage, arch: int) -> tuple[Any, ...]:
    """The rule at the head of this file, larger is better."""
    kernel, limits = KERNELS[slot.kernel], LIMITS[_known(arch)]
    there = resident(row, usage, arch)
    elements = row.rows * kernel.tile(slot.widths[-1], slot.bits)[1]
    in_flight = there * elements * kernel.inputs * slot.bits // 8
    occupancy = 8 * 32 * row.warps * there // limits.threads
    away = abs(row.warps.bit_length() - 3)
    return (
        min(in_flight, limits.in_flight), load_bytes(slot, row), occupancy, -away,
        -usage.registers,
    )  # fmt: skip


Ranking = dict[tuple[Slot, int], dict[Config, tuple[Any, ...]]]


def choose(
    archs: Sequence[int],
    wanted: Sequence[Slot],
    workers: int = 2,
    say: Callable[[str], None] = lambda line: None,
    ranked: Ranking | None = None,
) -> dict[int, list[Config]]:
    """Rows for every architecture; by the clock if `ranked` says how fast they are.

    Else every candidate is compiled in its heaviest case. The best one is then compiled in all of
    them, and the next best where one spills. Where all spill, as very wide rows do, it is the one
    that does least.
    """
    archs = sorted(archs, key=lambda arch: -LIMITS[_known(arch)].in_flight)
    ranked = ranked or _rank(archs, wanted, workers)
    chosen: dict[tuple[Slot, int], Config] = {}
    open_ = [(slot, arch) for slot in wanted for arch in archs]
    refused: dict[tuple[Slot, int], set[Config]] = {place: set() for place in open_}
    while open_:
        say(f"{len(open_)} rows to check in every case that they serve")
        for place in open_:
            chosen[place] = _pick(place, ranked, refused, chosen, archs)
        jobs, owners = [], []
        for slot, arch in open_:
            for width in slot.widths:
                found = list(cases_of(slot, chosen[slot, arch], arch, width))
                jobs += found
                owners += [(slot, arch)] * len(found)
        usages = aot.compile_all(jobs, workers)
        bad = {o for o, j, u in zip(owners, jobs, usages, strict=True) if aot.offences([j], [u])}
        for place in bad:
            refused[place].add(_plain(chosen[place]))
        open_ = [place for place in open_ if place in bad]
        for place in [p for p in open_ if len(refused[p]) == len(ranked[p])]:
            refused[place].clear()
            chosen[place] = _pick(place, ranked, refused, chosen, archs)
            open_.remove(place)
    return {arch: [chosen[slot, arch] for slot in wanted] for arch in sorted(archs)}


def _plain(row: Config) -> Config:
    return replace(row, programs=0)


def _rank(archs: Sequence[int], wanted: Sequence[Slot], workers: int) -> Ranking:
    """Merit of every candidate by its heaviest case; what spills comes after what does not."""
    jobs, owners = [], []
    for slot, arch in product(wanted, archs):
        for row in candidates(slot, arch):
            found = list(cases_of(slot, row, arch, slot.widths[-1]))
            jobs.append(max(found, key=lambda j: sum(map(bool, j.case.constants.values()))))
            owners.append((slot, arch, row))
    ranked: Ranking = {}
    for (slot, arch, row), job, usage in zip(
        owners, jobs, aot.compile_all(jobs, workers), strict=True
    ):
        spilled = usage.stack_bytes + usage.local_bytes
        fits = not aot.offences([job], [usage]) and resident(row, usage, arch) > 0
        value = (fits, -spilled, *merit(slot, row, usage, arch))
        ranked.setdefault((slot, arch), {})[_plain(row)] = value
    return ranked


def _pick(
    place: tuple[Slot, int], ranked: Any, refused: Any, chosen: Any, archs: Sequence[int]
) -> Config:
    """The best row that was not refused, or a hungrier architecture's that is as good."""
    slot, arch = place
    programs = PROGRAMS[_known(arch)] if KERNELS[slot.kernel].programs else 0
    left = {row: m for row, m in ranked[place].items() if row not in refused[place]}
    best = max(left, key=lambda row: left[row])
    for other in archs[: archs.index(arch)]:
        row = _plain(chosen[slot, other])
        if row in left and left[row][:2] >= left[best][:2]:
            best = row
            break
    return replace(best, programs=programs)


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16 without a detour."""
    return _operator.device_arch(device.index or 0) >= _operator.FIRST_BF16_ARCH


def by_time(timings: dict[tuple[Slot, int], Any]) -> Ranking:
    """A ranking for `choose`: the faster, the better."""
    return {
        place: {
            _plain(replace(row, source="measured")): (-timing.milliseconds,)
            for row, timing in timed.items()
        }
        for place, timed in timings.items()
    }


def merge(rows: Iterable[Config]) -> tuple[Config, ...]:
    """Rows without those that the next wider bucket repeats."""
    kept: list[Config] = []
    for row in sorted(rows, key=lambda r: (list(KERNELS).index(r.kernel), r.bits, r.columns)):
        if kept and replace(kept[-1], columns=row.columns) == row:
            kept.pop()
        kept.append(row)
    return tuple(kept)


def update(path: Path, found: dict[int, list[Config]]) -> None:
    """Put rows into a table, or make it. What was measured gives way only to a measurement."""
    old = launch.read_table(path) if path.is_file() else {"configs": {}, "beats_compile": {}}
    configs: dict[int, tuple[Config, ...]] = dict(old["configs"])
    for arch, rows in found.items():
        known = {(row.kernel, row.bits, row.columns): row for row in configs.get(arch, ())}
        new = {
            (row.kernel, row.bits, row.columns): row
            for row in rows
            if row.source == "measured" or not _measured(known.values(), row)
        }
        configs[arch] = merge({**known, **new}.values())
    write_table(path, dict(sorted(configs.items())), old["beats_compile"])


def _measured(known: Iterable[Config], row: Config) -> bool:
    """Whether the widths of `row` have one that was measured."""
    serving = [k for k in _of(known, row.kernel, row.bits) if k.columns >= row.columns]
    return bool(serving) and min(serving, key=lambda k: k.columns).source == "measured"


def write_table(path: Path, configs: dict[int, tuple[Config, ...]], wins: dict[str, Any]) -> None:
    """Write a table that `read_table` reads: a row a line, what architectures share once."""
    entries: list[str] = []
    above: dict[int, tuple[Config, ...]] = {}
    for arch, rows in configs.items():
        best, listed = None, list(rows)
        for other, its in above.items():
            differ = [
                row for row in rows
                if _of(its, row.kernel, row.bits) != _of(rows, row.kernel, row.bits)
            ]  # fmt: skip
            missing = {(r.kernel, r.bits) for r in its} - {(r.kernel, r.bits) for r in rows}
            if not missing and len(differ) < len(listed):
                best, listed = other, differ
        above[arch] = rows
        lines = ",\n".join(json.dumps(asdict(row), separators=(",", ":")) for row in listed)
        start = f'"same_as":"sm_{best}",' if best is not None else ""
        entries.append(f'"sm_{arch}":{{{start}"rows":[\n{lines}]}}')
    head = json.dumps(wins, separators=(",", ":"))
    text = f'{{"beats_compile":{head},\n"configs":{{\n' + ",\n".join(entries) + "}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)  # whoever reads now sees one table or the other


def _of(rows: Iterable[Config], kernel: str, bits: int) -> list[Config]:
    return [row for row in rows if (row.kernel, row.bits) == (kernel, bits)]
