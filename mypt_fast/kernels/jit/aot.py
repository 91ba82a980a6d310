"""Compile kernels for GPUs that are not here, and read from the machine code what they need.

Triton lowers a kernel in stages: its source to LLVM IR, that to PTX, that to machine code. The
first is the slow one, and the text it gives is the same for most architectures. Which ones is not
assumed: the richest case of each kernel is lowered for all of them, and those whose LLVM IR came
out equal share it in the other cases. PTX and machine code are made for each architecture.
"""

import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from mypt_fast.errors import DeviceError
from mypt_fast.kernels import _operator
from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.jit.launch import Case

MAX_SHARED = 99 << 10  # what a program may have on consumer cards
MAX_SHARED_SM_75 = 64 << 10
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Usage:
    """What a kernel needs, a thread (registers, stack and local bytes) and a program (shared)."""

    name: str
    arch: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    dtype: str = ""

    @property
    def spill_free(self) -> bool:
        """Whether everything that a thread holds is in registers."""
        return self.stack_bytes == 0 and self.local_bytes == 0


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


def compile_case(case: Case, arch: int) -> Usage:
    """Compile one kernel for `arch`, by Triton's own front door.

    Raises:
        DeviceError: under TRITON_INTERPRET=1, or without cuobjdump.
    """
    kernel = compiled(case, arch)
    with tempfile.TemporaryDirectory() as folder:
        usage = Usage(case.name, arch, 0, 0, 0, kernel.metadata.shared)
        return _read(kernel.asm["cubin"], usage, folder)


def compiled(case: Case, arch: int) -> Any:
    """Triton's compiled kernel, with its stages in `asm`: ttir, ttgir, llir, ptx, cubin."""
    import triton
    from triton.backends.compiler import GPUTarget

    _refuse_interpreter()
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(_source(case), target=GPUTarget("cuda", arch, 32), options=options)


def compile_all(jobs: Sequence[Job], workers: int = 2) -> list[Usage]:
    """Usage of each job, in order; equal binaries are compiled once, in `workers` processes.

    Nothing is left behind: compilers work in a temporary folder with an empty cache, and end with
    this process or before.

    Raises:
        DeviceError: under TRITON_INTERPRET=1, or without cuobjdump.
        RuntimeError: if a compiler fails.
    """
    _refuse_interpreter()
    _cuobjdump()
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
        types = frozenset(case.signature.values())
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
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # the same code, and less to carry
    tempfile.tempdir = home
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Triton prints the PTX of what fails)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            group = pipe.recv()
            try:
                pipe.send(("", _compile_group(group, home)))
            except Exception:
                pipe.send((traceback.format_exc(), {}))
    shutil.rmtree(home, ignore_errors=True)  # the parent may have been killed
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(home))  # by the last


def _compile_group(group: list[Any], folder: str) -> dict[Any, Usage]:
    """Usages by (key, arch) of the cases of one kernel."""
    group = [(key, replace(case, function=_kernel(case.function)), a) for key, case, a in group]
    try:
        made = list(_sharing(group))
    except (AttributeError, ImportError, KeyError, TypeError):
        # another Triton, whose stages are called otherwise: its front door is slower and stays
        made = [
            ((key, arch), kernel.metadata.shared, kernel.asm["cubin"])
            for key, case, archs in group
            for arch in archs
            for kernel in [compiled(case, arch)]
        ]
    return {
        name: _read(cubin, Usage("", name[1], 0, 0, 0, shared), folder)
        for name, shared, cubin in made
    }


def _kernel(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _sharing(group: list[Any]) -> Iterator[tuple[Any, int, bytes]]:
    """(key, arch), shared bytes and machine code of every case; see the head of this file."""
    richest = max(
        (case for _, case, _ in group), key=lambda c: sum(map(bool, c.constants.values()))
    )
    everywhere = sorted({arch for _, _, archs in group for arch in archs})
    texts = {arch: _Lowering(richest, arch).llvm() for arch in everywhere}
    leader = {a: next(b for b in everywhere if texts[a] == texts[b]) for a in everywhere}
    for key, case, archs in group:
        made: dict[int, tuple[str, dict[str, Any]]] = {}
        for arch in archs:
            lowering = _Lowering(case, arch)
            if leader[arch] not in made:
                made[leader[arch]] = lowering.llvm()
            text, metadata = made[leader[arch]]
            yield (key, arch), metadata["shared"], lowering.machine_code(text, metadata)


class _Lowering:
    """Triton's stages of one case for one architecture, to be walked in two parts."""

    def __init__(self, case: Case, arch: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self.source, self.target = _source(case), GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self.options = self.backend.parse_options(
            {"num_warps": case.warps, "num_stages": case.stages}
        )
        self.stages: dict[str, Any] = {}
        self.backend.add_stages(self.stages, self.options, self.source.language)

    def llvm(self) -> tuple[str, dict[str, Any]]:
        """LLVM IR, and what Triton noted on the way that does not name the architecture."""
        from triton._C.libtriton import ir

        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        module = self.source.make_ir(
            self.target, self.options, self.backend.get_codegen_implementation(self.options),
            self.backend.get_module_map(), context,
        )  # fmt: skip
        metadata = {"target": self.target, **vars(self.options)}
        for stage in ("ttir", "ttgir", "llir"):
            module = self.stages[stage](module, metadata)
        return str(module), {"shared": metadata["shared"]}

    def machine_code(self, text: str, metadata: dict[str, Any]) -> bytes:
        """The cubin of LLVM IR that this or an equal lowering made."""
        metadata = {"target": self.target, **vars(self.options), **metadata}
        return self.stages["cubin"](self.stages["ptx"](text, metadata), metadata)


def _source(case: Case) -> Any:
    """The kernel, its types and its constants, as Triton's compiler takes them."""
    from triton.compiler import ASTSource

    names = [p.name for p in case.function.params]
    types = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    return ASTSource(
        case.function,
        signature={name: types[name] for name in names},
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )


def _read(cubin: bytes, usage: Usage, folder: str) -> Usage:
    """`usage` with what cuobjdump reads from the machine code."""
    path = Path(folder, "kernel.cubin")
    path.write_bytes(cubin)
    command = [_cuobjdump(), "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = _USAGE.search(text)
    if not numbers:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text[:200]}")
    registers, stack, local = map(int, numbers.groups())
    return replace(usage, registers=registers, stack_bytes=stack, local_bytes=local)


def _cuobjdump() -> str:
    """The tool that ships with Triton."""
    from triton import knobs

    try:
        return knobs.nvidia.cuobjdump.path
    except (RuntimeError, OSError) as e:
        raise DeviceError(
            "compiling ahead of time needs cuobjdump",
            "this installation of Triton has none that runs",
            "install a Triton wheel for x86-64 Linux, or set TRITON_CUOBJDUMP_PATH",
        ) from e


def _refuse_interpreter() -> None:
    from triton import knobs

    if knobs.runtime.interpret:
        raise DeviceError(
            "kernels cannot be compiled in this process",
            "found TRITON_INTERPRET=1, under which they were imported for the interpreter",
            "unset it",
        )
