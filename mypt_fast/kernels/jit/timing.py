"""Time launches on the GPU that is here, through the launchers that training uses."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mypt_fast.kernels.jit import activation, cross_entropy, norm, rope, tuning
from mypt_fast.kernels.jit.launch import Config
from mypt_fast.kernels.jit.tuning import Slot
from mypt_fast.kernels.reference.cross_entropy import Rule

ELEMENTS = 1 << 25  # of the largest array: far more than any L2 holds in fp32
FLUSH_BYTES = 256 << 20
WARM_UP, SAMPLES = 3, 21

Work = tuple[Callable[[], Any], int]  # a launch, and the bytes it must move


@dataclass(frozen=True)
class Timing:
    """The median time of one launch, and the bytes it moved."""

    milliseconds: float
    moved: int

    @property
    def gb_per_s(self) -> float:
        """Bytes that had to move, over the time."""
        return self.moved / self.milliseconds / 1e6


def time_all(
    arch: int,
    wanted: Sequence[Slot],
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> dict[tuple[Slot, int], dict[Config, Timing]]:
    """Time every candidate of every slot; those that the card refuses to launch are left out."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    timings: dict[tuple[Slot, int], dict[Config, Timing]] = {}
    for slot in wanted:
        launch_once, moved = workload(slot, slot.widths[-1], device)
        found = timings.setdefault((slot, arch), {})
        for row in tuning.candidates(slot, arch):
            with tuning.tried(row):
                milliseconds = _median(launch_once, flush)
            if milliseconds is not None:
                found[row] = Timing(milliseconds, moved)
        say(f"{slot.kernel}, {slot.bits} bits, {slot.widths[-1]} columns: {len(found)} timed")
    return timings


def _median(launch_once: Callable[[], Any], flush: Tensor) -> float | None:
    """Milliseconds with a cold L2, or None where a program does not fit the card."""
    from triton.runtime.errors import OutOfResources

    try:
        for _ in range(WARM_UP):
            launch_once()
    except OutOfResources:
        return None
    samples = []
    for _ in range(SAMPLES):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch_once()
        end.record()
        samples.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in samples)


def workload(slot: Slot, width: int, device: torch.device) -> Work:
    """One launch of a slot's kernel over rows of `width`, at the dtypes of a training step."""
    low = torch.bfloat16 if tuning.has_bf16(device) else torch.float16
    dtype = torch.float32 if slot.bits == 32 else low
    g = torch.Generator(device).manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    rows = max(64, ELEMENTS // max(width, 1))
    return _WORK[slot.kernel](rows, width, make, dtype, low)


def _norm_forward(rows: int, width: int, make: Any, dtype: torch.dtype, low: torch.dtype) -> Work:
    x, residual = make(rows, width, dtype=low), make(rows, width)
    weight = make(width, dtype=torch.float32)
    moved = 2 * (x.nbytes + residual.nbytes)
    options = (None, 1e-6, 0.0, False, 0.0, low)
    return lambda: norm.norm_forward(x, residual, weight, None, *options), moved


def _norm_backward(rows: int, width: int, make: Any, dtype: torch.dtype, low: torch.dtype) -> Work:
    dy, dh_out, h = make(rows, width, dtype=low), make(rows, width), make(rows, width)
    weight, rstd = make(width, dtype=torch.float32), make(rows, dtype=torch.float32)
    mean = rstd.new_empty(0)
    branch = None if dtype is low else low
    moved = dy.nbytes * (2 if branch else 1) + 3 * h.nbytes
    options = (None, 0.0, False, 0.0, branch, None)
    return lambda: norm.norm_backward(dy, dh_out, h, weight, mean, rstd, *options), moved


def _activation(name: str, parts: int, backward: bool) -> Callable[..., Work]:
    def build(rows: int, width: int, make: Any, dtype: torch.dtype, low: torch.dtype) -> Work:
        function: Any = getattr(activation, name)
        pre = make(rows // parts, parts * width)
        if not backward:
            return lambda: function(pre), pre.nbytes + pre.nbytes // parts
        dh = make(rows // parts, width)
        return lambda: function(dh, pre), 2 * pre.nbytes + dh.nbytes

    return build


def _heads(rows: int, width: int, make: Any) -> tuple[int, int, Tensor, Tensor]:
    """Heads and length of a sequence of `rows` heads, and its table of angles."""
    heads, length = 16, max(1, rows // 48)
    angles = make(length, width // 2, dtype=torch.float32)
    return heads, length, angles.cos(), angles.sin()


def _rope_forward(rows: int, width: int, make: Any, dtype: torch.dtype, low: torch.dtype) -> Work:
    heads, length, cos, sin = _heads(rows, width, make)
    qkv = make(1, length, 3 * heads * width)
    options = (None, None, None, heads, heads, 1e-6)
    return lambda: rope.rope_forward(qkv, cos, sin, *options), qkv.nbytes * 4 // 3


def _rope_backward(rows: int, width: int, make: Any, dtype: torch.dtype, low: torch.dtype) -> Work:
    heads, length, cos, sin = _heads(rows, width, make)
    dq, dk, dv = (make(1, heads, length, width) for _ in range(3))
    options = (None, None, None, 1e-6)
    return lambda: rope.rope_backward(dq, dk, dv, None, cos, sin, *options), 6 * dq.nbytes


def _cross_entropy(rows: int, width: int, make: Any, dtype: torch.dtype, low: torch.dtype) -> Work:
    stride = -(-width // 64) * 64
    logits = make(rows, stride)[:, :width]
    targets = torch.arange(rows, device=logits.device) % width
    rule = Rule()
    # the step leaves gradients where logits were: numbers all the same
    moved = 3 * rows * width * logits.itemsize
    return lambda: cross_entropy.step(logits, targets, None, rule), moved


_WORK: dict[str, Callable[..., Work]] = {
    "norm_forward": _norm_forward,
    "norm_backward": _norm_backward,
    "swiglu_forward": _activation("swiglu_forward", 2, False),
    "swiglu_backward": _activation("swiglu_backward", 2, True),
    "gelu_forward": _activation("gelu_forward", 1, False),
    "gelu_backward": _activation("gelu_backward", 1, True),
    "rope_forward": _rope_forward,
    "rope_backward": _rope_backward,
    "cross_entropy": _cross_entropy,
}
