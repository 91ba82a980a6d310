"""Which device, which precision, how much memory: asked once at the start of a run."""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mypt_fast import kernels
from mypt_fast.errors import ConfigError, DeviceError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def pick(requested: str | None, explicit: bool) -> tuple[torch.device, str | None]:
    """Choose the device of a run.

    Args:
        requested: "cpu", "cuda", "cuda:N" or None.
        explicit: asked for by a flag; a device stored in a file is advice only.

    Returns:
        The device and a notice for the user, or None.

    Raises:
        DeviceError: for an explicit device that is not there, and for a GPU that torch cannot
            use (a driver too old): never a silent CPU run.
    """
    wanted = requested or "auto"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise DeviceError(f"unknown device '{wanted}'", cure="use cpu, cuda or cuda:N")
    if wanted == "cpu":
        return torch.device("cpu"), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        index = int(wanted.split(":")[1]) if wanted.startswith("cuda:") else 0
        if index >= torch.cuda.device_count():
            raise DeviceError(
                f"device {wanted}", f"found {torch.cuda.device_count()} GPU(s)",
                "number them from 0",
            )  # fmt: skip
        _check_built_for(index)
        return torch.device("cuda", index), None
    reason = _one_line(str(caught[-1].message)) if caught else ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    driver = _driver_present() and not hidden
    if torch.version.cuda and (reason or driver):
        raise DeviceError(
            "a GPU is here but torch cannot use it",
            reason or f"torch {torch.__version__} was built for CUDA {torch.version.cuda}",
            "update the driver, install a matching torch, or pass --device cpu",
        )
    if wanted != "auto" and explicit:
        built = torch.version.cuda or "no CUDA"
        raise DeviceError(
            f"device {wanted} was asked for",
            f"torch {torch.__version__} ({built}) finds no GPU",
            "drop --device, or pass --device cpu",
        )
    if wanted != "auto":
        return torch.device(
            "cpu"
        ), f"device {wanted} is stored in the config; no GPU here, using the CPU"
    without = f"a GPU driver is here, but torch {torch.__version__} is built without CUDA"
    return torch.device("cpu"), f"{without}: using the CPU" if driver else None


def _check_built_for(index: int) -> None:
    """Raise DeviceError for a GPU that this torch has no code for, as newer ones for a V100.

    A build lists machine code, sm_86, which runs from there to the end of its major version, and
    PTX, compute_90, which the driver compiles for every newer card. PTX of one family, compute_90a
    or compute_120f, goes no further than machine code.
    """
    card = torch.cuda.get_device_capability(index)
    named = (re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", a) for a in torch.cuda.get_arch_list())
    built = [(m[1] == "compute" and not m[4], (int(m[2]), int(m[3]))) for m in named if m]
    if not built or any(
        code <= card and (for_newer or code[0] == card[0]) for for_newer, code in built
    ):
        return
    codes = sorted({code for _, code in built})
    if card < codes[0]:
        cure = "install an older torch, or one built for an older CUDA"
    elif card > codes[-1]:
        cure = "install a newer torch, or one built for a newer CUDA"
    else:
        cure = "install a torch that was built for it"
    raise DeviceError(
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(index)}, "
        f"compute capability {card[0]}.{card[1]}",
        f"found code for {', '.join(f'{major}.{minor}' for major, minor in codes)}",
        f"{cure}, or pass --device cpu",
    )


def _driver_present() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


@dataclass(frozen=True)
class Precision:
    """How the forward computes."""

    dtype: torch.dtype  # of matmuls
    scaler: bool  # fp16 needs loss scaling
    device_type: str

    @property
    def name(self) -> str:
        """'fp32', 'bf16' or 'fp16'."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names[self.dtype]

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the forward pass."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        # a weight is read once in a forward: a cache of casts would only keep them all
        return torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=False)


def precision(
    device: torch.device, use_amp: bool, amp_dtype: str, explicit: bool
) -> tuple[Precision, str | None]:
    """Choose the matmul dtype: bf16 only where it is native, fp16 with a scaler on older GPUs.

    Weights, gradients and moments stay fp32. A CPU computes in bf16 where it has the
    instructions and in fp32 elsewhere; a notice says so if the dtype was asked for (`explicit`).
    """
    fp32 = Precision(torch.float32, False, device.type)
    if not use_amp:
        return fp32, None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if amp_dtype == "bf16" and native:
            return Precision(torch.bfloat16, False, "cuda"), None
        note = None if amp_dtype == "fp16" else "this GPU has no native bf16: using fp16"
        return Precision(torch.float16, True, "cuda"), note
    if amp_dtype == "bf16" and cpu_has_bf16():
        return Precision(torch.bfloat16, False, "cpu"), None
    return fp32, f"no native {amp_dtype} on this CPU: using fp32" if explicit else None


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies fp32 rounded to TF32: a GPU since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def moved(t: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to the device, and let the host not wait for it.

    A GPU copies from page-locked memory; from other memory the host would first wait for all that
    the GPU has to do. torch keeps that memory until the copy is done. What is page-locked already
    is its owner's, and copied at once.
    """
    if device.type != "cuda" or t.device.type != "cpu":
        return t.to(device)
    if t.is_pinned():  # its owner may write in it again: torch would copy from it later
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


def for_state(state: str, found: Precision, use_amp: bool) -> tuple[str, Precision, str | None]:
    """The state layout and precision that go together, and a notice where one had to move.

    The layouts `exact16` and `fast` compute with bf16 weights.

    Raises:
        ConfigError: where mixed precision is off.
    """
    if state in ("auto", "exact") or found.dtype is torch.bfloat16:
        return state, found, None
    if not use_amp:
        raise ConfigError(
            f"--state {state} computes with bf16 weights",
            "found use_amp off",
            "drop one of the two, or use --state exact",
        )
    if found.scaler:
        return "exact", found, f"state {state} needs bf16, and this run computes in fp16: exact"
    note = f"state {state} computes in bf16, which this CPU emulates"
    return state, Precision(torch.bfloat16, False, found.device_type), note


def check_kernels(impl: str, device: torch.device, precision: Precision) -> None:
    """Raise DeviceError if kernels were forced that this device cannot run."""
    reason = kernels.why_not(impl, device, precision.dtype)
    if reason:
        raise DeviceError(f"--kernels {impl} cannot run", reason, "drop it, or use --kernels auto")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the next step to take; whether it does.

    By default glibc gives large blocks back to the system, which hands out cleared pages for those
    of the next step (docs/decisions.md). Nothing is done where the environment sets the allocator,
    or where there is no glibc. It lasts as long as the process.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; None is no name on Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def free_bytes(device: torch.device) -> int:
    """Memory a run may use now: GPU memory that is free, or available RAM within the cgroup."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo_available(), *_cgroup_free()]
    known = [n for n in limits if n is not None]
    return min(known) if known else 8 << 30


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _cgroup_free() -> list[int]:
    root = Path("/sys/fs/cgroup")
    pairs = (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
    free = []
    for limit, used in pairs:
        try:
            taken = int((root / used).read_text()) - _page_cache(root / used)
            free.append(int((root / limit).read_text()) - taken)
        except (OSError, ValueError):  # absent, or "max"
            continue
    return free


def _page_cache(usage: Path) -> int:
    """Bytes of files among a cgroup's usage that the kernel gives up when memory is asked for."""
    for line in usage.with_name("memory.stat").read_text().splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(device: torch.device) -> str:
    """One phrase for the start line, and the name that its ceiling is kept under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def cpu_name() -> str:
    """The processor's own name, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(
            x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or f"{platform.machine()} CPU"


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
