"""Compile kernels for GPUs that are not here, and read from the machine code what they need.

Triton lowers a kernel in stages: its source to LLVM IR, that to PTX, that to machine code. Some
architectures get the same result from a stage (LLVM IR is the same on most, machine code on sm_86
and sm_89). Which ones is not assumed: the richest case of every kernel, in each of its types, goes
through all stages for all of them, and those that came out equal share that stage in the others.
"""

import hashlib
import importlib
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mypt_fast.errors import DeviceError
from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.jit.launch import Case

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

    refuse_interpreter()
    options = launch.options(case.warps, case.stages)
    return triton.compile(_source(case), target=GPUTarget("cuda", arch, 32), options=options)


def compile_group(group: list[Any], folder: str) -> dict[Any, Usage]:
    """Usages by (key, arch) of the cases of one kernel."""
    group = [(key, replace(case, function=_kernel(case.function)), a) for key, case, a in group]
    try:
        return _sharing(group, folder)
    except (AttributeError, ImportError, KeyError, TypeError):
        # another Triton, whose stages are called otherwise: its front door is slower and stays
        return {
            (key, arch): compile_case(case, arch) for key, case, archs in group for arch in archs
        }


def _kernel(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _sharing(group: list[Any], folder: str) -> dict[Any, Usage]:
    """As `compile_group`; what is shared says the head of this file."""
    cases = (case for _, case, _ in group)
    richest = max(cases, key=lambda case: sum(map(bool, case.constants.values())))
    alike = _alike(richest, sorted({arch for _, _, archs in group for arch in archs}))
    found: dict[Any, Usage] = {}
    for key, case, archs in group:
        made: dict[Any, Any] = {}  # by the digests up to a stage
        for arch in archs:
            llvm, ptx, code = (alike[arch][:stage] for stage in (1, 2, 3))
            lowering = _Lowering(case, arch)
            if code not in made:
                if llvm not in made:
                    made[llvm] = lowering.llvm()
                text, metadata = made[llvm]
                if ptx not in made:
                    made[ptx] = _body(lowering.ptx(text, metadata))
                cubin = lowering.cubin(alike[arch][3] + made[ptx], metadata)
                made[code] = _read(cubin, Usage("", arch, 0, 0, 0, metadata["shared"]), folder)
            found[key, arch] = replace(made[code], arch=arch)
    return found


def _alike(case: Case, archs: list[int]) -> dict[int, tuple[Any, ...]]:
    """By architecture: digests of a case's LLVM IR, PTX and machine code, and the PTX's head."""
    found = {}
    for arch in archs:
        lowering = _Lowering(case, arch)
        text, metadata = lowering.llvm()
        ptx = lowering.ptx(text, metadata)
        cubin = lowering.cubin(ptx, metadata)
        parts = (f"{metadata}\n{text}".encode(), _body(ptx).encode(), _instructions(cubin))
        digests = (hashlib.sha256(part).hexdigest() for part in parts)
        found[arch] = (*digests, ptx.removesuffix(_body(ptx)))
    return found


def _body(ptx: str) -> str:
    """PTX without its head: the version, the target and the size of addresses."""
    return ptx[re.search(r"^\.address_size.*$", ptx, re.MULTILINE).end() :]  # type: ignore[union-attr]


class _Lowering:
    """Triton's stages of one case for one architecture, to be walked in two parts."""

    def __init__(self, case: Case, arch: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self.source, self.target = _source(case), GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self.options = self.backend.parse_options(launch.options(case.warps, case.stages))
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

    def ptx(self, llvm: str, metadata: dict[str, Any]) -> str:
        """PTX of LLVM IR that this or an equal lowering made."""
        return self.stages["ptx"](llvm, self._all(metadata))

    def cubin(self, ptx: str, metadata: dict[str, Any]) -> bytes:
        """Machine code."""
        return self.stages["cubin"](ptx, self._all(metadata))

    def _all(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {"target": self.target, **vars(self.options), **metadata}


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
    numbers = _USAGE.search(text := _ask(cubin, "-res-usage", folder))
    if not numbers:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text[:200]}")
    registers, stack, local = map(int, numbers.groups())
    return replace(usage, registers=registers, stack_bytes=stack, local_bytes=local)


def _instructions(cubin: bytes) -> bytes:
    """Machine code without the rest of its ELF file, which names what it is for."""
    (table,), (count, names) = (
        struct.unpack_from("<Q", cubin, 40),
        struct.unpack_from("<2H", cubin, 60),
    )
    sections = [struct.unpack_from("<2I4Q", cubin, table + 64 * i) for i in range(count)]
    code = b""
    for name, _, _, _, start, size in sections:
        text = sections[names][4] + name
        if cubin[text:].startswith(b".text."):
            code += cubin[start : start + size]
    return code


def _ask(cubin: bytes, question: str, folder: str) -> str:
    path = Path(folder, "kernel.cubin")
    path.write_bytes(cubin)
    command = [cuobjdump(), question, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuobjdump() -> str:
    """The tool that ships with Triton and reads machine code; raises DeviceError without it."""
    from triton import knobs

    try:
        return knobs.nvidia.cuobjdump.path
    except (RuntimeError, OSError) as e:
        raise DeviceError(
            "compiling ahead of time needs cuobjdump",
            "this installation of Triton has none that runs",
            "install a Triton wheel for x86-64 Linux, or set TRITON_CUOBJDUMP_PATH",
        ) from e


def refuse_interpreter() -> None:
    """Raise DeviceError where kernels were imported for the interpreter."""
    from triton import knobs

    if knobs.runtime.interpret:
        raise DeviceError(
            "kernels cannot be compiled in this process",
            "found TRITON_INTERPRET=1, under which they were imported for the interpreter",
            "unset it",
        )
