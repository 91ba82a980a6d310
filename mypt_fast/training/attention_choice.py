"""Which of torch's attention kernels a run on a GPU tries first: measured on the user's own card.

torch decides by a fixed order, made for a few data-centre cards. Here every kernel that takes the
run's shape is run forward and backward, its result compared with plain attention in fp32, and the
fastest is kept in the cache folder beside what `ceiling` and `tune` measure.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mypt_fast import publish
from mypt_fast.errors import DeviceError
from mypt_fast.kernels.ceiling import best_seconds
from mypt_fast.planner.ceiling import MAX_BYTES, ceiling_file
from mypt_fast.settings import Settings
from mypt_fast.training import device as devices

# In the order they are tried behind the chosen one: what takes masks, and needs no plan for each
# new shape, comes before cuDNN's.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# `math` is never measured: it keeps T x T scores, which the memory of a run is not planned for.
FUSED = ("flash", "efficient", "cudnn")
SECONDS = 0.04  # of measuring each, beyond the first call
SMALL = 256  # positions at which results are compared
# Largest norm of an error, of output and gradient, as a share of the norm of what it should be.
# torch's kernels on a CPU are off by a ninth of it or less (docs/decisions.md).
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Shape:
    """The attention of a micro-batch: (rows, heads, length, size), causal."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    heads: int
    length: int
    size: int
    dropout: float

    def key(self) -> str:
        """What a measurement is kept under; kernels come with torch, and cuDNN's take few p."""
        card, dtype = devices.describe(self.device), str(self.dtype).removeprefix("torch.")
        shape = f"size {self.size}, length {self.length}, dropout {self.dropout:g}"
        return f"{card}, torch {torch.__version__}: {dtype}, {shape}"


def check_typed(settings: Settings, shape: Shape) -> None:
    """Raise DeviceError for a kernel that was typed and cannot run."""
    wanted = settings.train.attention
    if wanted == "auto" or "attention" not in settings.typed:
        return
    if shape.device.type != "cuda":
        raise DeviceError(
            f"--attention {wanted} names a kernel of a GPU", "this run is on the CPU", "drop it"
        )
    if why := fault(wanted, shape):
        raise DeviceError(
            f"--attention {wanted} cannot run", why, "drop it, or use --attention auto"
        )


def choose(
    settings: Settings, shape: Shape, is_plain: bool, notices: list[str], keeps: bool = True
) -> str | None:
    """The kernel that a run tries first, a name of `BACKENDS`; None: as torch decides.

    As asked for, else the one that the run was saved with (another one adds in another order, and
    the resumed run would not be the same), else the fastest.

    Args:
        settings: of the run; what was typed passed `check_typed`.
        shape: of its micro-batches.
        is_plain: rows are one piece; documents have lengths and kernels of their own.
        notices: one more where a kernel that is stored in a file cannot run here.
        keeps: whether what had to be measured is kept.
    """
    wanted, is_typed = settings.train.attention, "attention" in settings.typed
    if shape.device.type != "cuda":
        return None
    if wanted != "auto":
        why = fault(wanted, shape)
        if why is None:
            return wanted
        notices.append(f"attention {wanted} cannot run here ({why}): another is chosen")
    plan = settings.saved_state.get("plan")
    plan = plan if isinstance(plan, dict) and not is_typed else {}
    saved = plan.get("attention")
    if "attention" in plan and saved is None and plan.get("device") == shape.device.type:
        return None  # as torch decides, from the first step on
    if isinstance(saved, str) and saved in BACKENDS:
        why = fault(saved, shape)
        if why is None:
            return saved
        notices.append(f"attention {saved} of the saved run cannot run here ({why})")
    return fastest(shape, keeps=keeps, anew=is_typed) if is_plain else None


def fastest(shape: Shape, *, keeps: bool = True, anew: bool = False) -> str | None:
    """The fastest fused kernel that is right, kept or measured; `math` where none is.

    None where memory did not suffice to measure any.

    Args:
        shape: of a micro-batch.
        keeps: whether what had to be measured is kept.
        anew: measure, whatever is kept.
    """
    kept = _read()
    entry = {} if anew else kept.get(shape.key())
    name = entry.get("attention") if isinstance(entry, dict) else None
    if name in FUSED and fault(name, shape) is None:
        return str(name)
    right = [name for name in FUSED if fault(name, shape) is None]
    if not right:
        return "math"
    seconds = measure(shape, right)
    if not seconds:
        return None
    name = min(seconds, key=lambda each: seconds[each])
    kept[shape.key()] = {
        "attention": name,
        "ms": {each: round(1e3 * t, 4) for each, t in seconds.items()},
        "measured": time.strftime("%Y-%m-%d"),
    }
    if keeps:
        with contextlib.suppress(OSError):  # then it is measured again
            cache_file().parent.mkdir(parents=True, exist_ok=True)
            publish.write_json(cache_file(), kept)
    return name


def measure(shape: Shape, names: list[str]) -> dict[str, float]:
    """Seconds of a forward and backward by each of these kernels, of those that fit memory."""
    found = {name: _seconds(name, shape) for name in names}
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is the model's
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def _seconds(name: str, shape: Shape) -> float | None:
    # out of memory, with all the rows
    with contextlib.suppress(RuntimeError), _quiet(), _own_random_numbers(shape.device):
        work = functools.partial(_once, name, shape, *_inputs(shape))
        return best_seconds(work, shape.device, SECONDS)
    return None


def fault(name: str, shape: Shape) -> str | None:
    """Why a kernel cannot serve a run, in one line; None if it can.

    It is run once at the run's own length and dropout, and once without dropout at a small length,
    where its output and gradient are compared with plain attention in fp32 of the same numbers.
    """
    one = replace(shape, rows=1)
    small = replace(one, length=min(SMALL, shape.length), dropout=0.0)
    try:
        with _quiet() as said, _own_random_numbers(shape.device):
            _once(name, one, *_inputs(one))
            qkv, upstream = _inputs(small)
            found = _once(name, small, qkv, upstream)
    except torch.OutOfMemoryError:
        return None  # that says nothing about the kernel
    except RuntimeError as e:
        return _reason([str(w.message) for w in said], e)
    wanted = _once("math", small, qkv.detach().float().requires_grad_(), upstream.float())
    for what, a, b in zip(("result", "gradient"), found, wanted, strict=True):
        error = float((a.float() - b).norm() / b.norm())
        if not error <= LARGEST_ERROR[shape.dtype]:  # a NaN too
            return f"its {what} is off by {error:.2g} of plain attention's"
    return None


def _inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """Packed queries, keys and values as the projection leaves them, and a gradient.

    Drawn by a generator of their own.
    """
    draw = torch.Generator(shape.device).manual_seed(0)
    rows = (shape.rows, shape.length)
    options: dict[str, Any] = {"device": shape.device, "dtype": shape.dtype, "generator": draw}
    width = shape.heads * shape.size
    qkv = torch.randn(*rows, 3 * width, **options).requires_grad_()
    return qkv, torch.randn(*rows, width, **options)


def _once(name: str, shape: Shape, qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Output, (B, T, C), and the gradient of `qkv`, by one kernel and no other."""
    q, k, v = (t.unflatten(2, (shape.heads, shape.size)).transpose(1, 2) for t in qkv.chunk(3, 2))
    with sdpa_kernel(BACKENDS[name]):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=shape.dropout)
    y = y.transpose(1, 2).flatten(2)
    return y.detach(), torch.autograd.grad(y, qkv, upstream)[0]


def _own_random_numbers(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The run's do not move: dropout draws from torch's generator."""
    devices_ = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices_)


@contextlib.contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings in which torch tells why a kernel is not used."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def _reason(said: list[str], error: RuntimeError) -> str:
    """The first of torch's reasons that is about the kernel, else the error itself."""
    beside = re.compile(r"not used because|runtime disabled")  # of the kernels that are off
    about = [text for text in said if not beside.search(text)]
    text = (about or [str(error)])[0].split("(Triggered internally")[0]
    return " ".join(text.split())[:160]


@contextlib.contextmanager
def first(name: str) -> Iterator[None]:
    """Try one kernel first, in every call of torch's attention, recomputed ones included.

    torch.compile decides while it traces, and its cache on disk does not tell apart what was
    traced under another choice: the choice is part of the cache's key here. `sdpa_kernel` is right
    once torch has set up its own order, which any call of attention does; `fault` made one.
    """
    config: Any = torch.compiler.config
    key = f"{config.cache_key_tag} attention={name}".strip()
    order = list(dict.fromkeys([BACKENDS[name], *BACKENDS.values()]))
    with sdpa_kernel(order, set_priority=True), config.patch(cache_key_tag=key):
        yield


def cache_file() -> Path:
    """Where measurements are kept: below $XDG_CACHE_HOME or ~/.cache."""
    return ceiling_file().with_name("attention.json")


def _read() -> dict[str, Any]:
    """Every measurement; a file that is missing or no good counts as none."""
    try:
        with cache_file().open("rb") as f:
            data = json.loads(f.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
