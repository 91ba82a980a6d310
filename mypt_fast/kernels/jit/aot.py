"""Compile every kernel for GPUs that are not here, and hold what it needs against the bars."""

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import torch

from mypt_fast.kernels import _operator
from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.jit.launch import Case
from mypt_fast.kernels.jit.lowering import Usage, compile_group, cuobjdump, refuse_interpreter

MAX_SHARED = 99 << 10  # what a program may have on consumer cards
MAX_SHARED_SM_75 = 64 << 10


@dataclass(frozen=True)
class Job:
    """A case to compile; `dtype` is only a label."""

    case: Case
    arch: int
    dtype: str = ""


@dataclass(frozen=True)
class Gate:
    """What the gate saw: a usage per distinct binary, and a line per offence."""

    usages: tuple[Usage, ...]
    failures: tuple[str, ...]
    cases: int
    seconds: float


def gate(
    archs: Iterable[int],
    shapes: Iterable[dict[str, int]],
    dtypes: Iterable[torch.dtype],
    workers: int = 2,
) -> Gate:
    """Compile every kernel of these shapes for these architectures; nothing may spill.

    Args:
        archs: as in `launch.ARCHS`.
        shapes: as `launch.all_cases` takes them.
        dtypes: of the activations; bf16 is left out where the hardware has none.
        workers: processes.
    """
    start = time.perf_counter()
    shapes, dtypes = list(shapes), list(dtypes)
    jobs = [
        Job(case, arch, launch.NAMES[dtype])
        for arch in archs
        for dtype in dtypes
        if dtype is not torch.bfloat16 or arch >= _operator.FIRST_BF16_ARCH
        for shape in shapes
        for case in launch.all_cases(shape, dtype, arch)
    ]
    distinct = list({(_key(job.case), job.arch): job for job in jobs}.values())
    usages = compile_all(distinct, workers)
    failures = offences(distinct, usages)
    return Gate(tuple(usages), tuple(failures), len(jobs), time.perf_counter() - start)


def offences(jobs: Sequence[Job], usages: Sequence[Usage]) -> list[str]:
    """A line for every kernel that misses a bar, with its numbers."""
    lines = []
    for job, found in zip(jobs, usages, strict=True):
        limit = MAX_SHARED_SM_75 if job.arch < _operator.FIRST_BF16_ARCH else MAX_SHARED
        wrong = []
        if not found.spill_free:
            wrong.append(
                f"spills: {found.stack_bytes} bytes of stack, {found.local_bytes} of local memory"
                f" a thread beside {found.registers} registers"
            )
        if found.shared_bytes > limit:
            wrong.append(f"{found.shared_bytes} bytes of shared memory, at most {limit}")
        if job.arch < _operator.FIRST_BF16_ARCH and "*bf16" in job.case.signature.values():
            wrong.append("bf16, which this architecture has not")
        lines += [
            f"{found.name}, sm_{job.arch}, {job.dtype}, {_size(job.case)}: {w}" for w in wrong
        ]
    return lines


def _size(case: Case) -> str:
    """The constants that tell cases of one name apart, and the launch."""
    sizes = (f"{k}={v}" for k, v in case.constants.items() if type(v) is int and k.isupper())
    return f"{' '.join(sizes)}, {case.warps} warps"


def compile_all(jobs: Sequence[Job], workers: int = 2) -> list[Usage]:
    """Usage of each job, in order; equal binaries are compiled once, in `workers` processes.

    Nothing is left behind: compilers work in a temporary folder with an empty cache, and end with
    this process or before.

    Raises:
        DeviceError: under TRITON_INTERPRET=1, or without cuobjdump.
        RuntimeError: if a compiler fails.
    """
    refuse_interpreter()
    cuobjdump()
    cases: dict[Any, Case] = {}
    wanted: dict[Any, set[int]] = defaultdict(set)
    for job in jobs:
        key = _key(job.case)
        cases.setdefault(key, job.case)
        wanted[key].add(job.arch)
    # cases of one kernel and one set of types go to one process: they share what they can
    groups: dict[Any, list[Any]] = defaultdict(list)
    for key, case in cases.items():
        name = key[0]
        plain = replace(case, function=name)  # a kernel does not travel between processes
        types = frozenset(t for t in case.signature.values() if t.startswith(("*fp", "*bf")))
        groups[name, types].append((key, plain, sorted(wanted[key])))
    found: dict[Any, Usage] = {}
    for results in _farm(sorted(groups.values(), key=_weight, reverse=True), workers):
        found.update(results)
    return [
        replace(found[_key(job.case), job.arch], name=job.case.name, dtype=job.dtype)
        for job in jobs
    ]


def _weight(group: list[Any]) -> int:
    return sum(len(archs) for _, _, archs in group)


def _key(case: Case) -> tuple[Any, ...]:
    """What decides the machine code of a case."""
    function = case.function
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__name__}"
    return (
        name,
        tuple(case.signature.items()),
        tuple((k, type(v).__name__, v) for k, v in sorted(case.constants.items())),
        case.warps,
        case.stages,
        tuple(sorted(case.aligned)),
    )


def _farm(groups: list[list[Any]], workers: int) -> Iterator[dict[Any, Usage]]:
    """Deal the groups out to processes, the heaviest first; yields results as they come."""
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp(prefix="mypt_fast_aot_")
    left = list(reversed(groups))
    running: dict[Any, Any] = {}
    try:
        for i in range(min(workers, len(groups))):
            ours, theirs = context.Pipe()
            home = os.path.join(folder, str(i))
            process = context.Process(target=_serve, args=(theirs, home), daemon=True)
            process.start()
            theirs.close()
            ours.send(left.pop())
            running[ours] = process
        busy = set(running)
        while busy:
            ready: list[Any] = wait(list(busy))
            for pipe in ready:
                try:
                    failure, results = pipe.recv()
                except EOFError:
                    raise RuntimeError("a process that compiles kernels died") from None
                if failure:
                    raise RuntimeError(f"a kernel could not be compiled:\n{failure}")
                yield results
                if left:
                    pipe.send(left.pop())
                else:
                    busy.discard(pipe)
    finally:
        for process in running.values():
            process.terminate()
        for pipe, process in running.items():
            process.join()
            pipe.close()
        shutil.rmtree(folder, ignore_errors=True)


def _serve(pipe: Any, home: str) -> None:
    """A compiler process: groups come in, usages go out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this one
    os.makedirs(home)
    os.environ["TRITON_CACHE_DIR"] = home
    tempfile.tempdir = home
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Triton prints the PTX of what fails)
    gc.disable()  # a tenth of the time, for garbage that a collection between groups finds
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            gc.collect()
            group = pipe.recv()
            try:
                pipe.send(("", compile_group(group, home)))
            except Exception:
                pipe.send((traceback.format_exc(), {}))
    shutil.rmtree(home, ignore_errors=True)  # the parent may have been killed
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(home))  # by the last
