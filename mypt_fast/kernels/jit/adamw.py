"""AdamW over many tensors in one launch for each way that their state is kept.

The kernel finds tensors through a table of addresses; a program takes `CHUNK` elements of one of
them, whole blocks of codes. bf16 is read and written as its bits, which is exact everywhere.
"""

# mypy: disable-error-code="no-untyped-def"
# (the parameters of a kernel have no Python types)

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.jit.launch import Case
from mypt_fast.kernels.reference.adamw import BLOCK, LARGEST, SMALLEST_SCALE

if TYPE_CHECKING:
    from mypt_fast.kernels.adamw import Slot

GROUPS, WARPS = 4, 4  # blocks of a program: eight elements a thread
CHUNK = GROUPS * BLOCK
COLUMNS = 9  # of the table: weight, remainder, gradient, moments, scales, count, size


@triton.jit
def _ratios(x, SMALLEST: tl.constexpr, MOST: tl.constexpr):
    """Every element of a row as a share of the row's largest, and these."""
    x = tl.minimum(x, MOST)
    scales = tl.max(x, 1)
    scales = tl.where(scales < SMALLEST, 0.0, scales)
    divisor = tl.where(scales > 0.0, scales, 1.0)
    return tl.where(scales[:, None] > 0.0, tl.div_rn(x, divisor[:, None]), 0.0), scales


@triton.jit
def _adamw(
    # data
    table_ptr, owner_ptr, scale_ptr,
    # sizes
    lr, log2_beta1, log2_beta2, beta1, beta2, eps, decay,
    # constants
    SPLIT: tl.constexpr, LOW: tl.constexpr, CODED: tl.constexpr, SCALED: tl.constexpr,
    SMALLEST: tl.constexpr, MOST: tl.constexpr, TABLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One AdamW step of ROWS blocks of one tensor.

    SPLIT: the weight is bf16 beside a remainder; LOW: the gradient is bf16; CODED: the moments
    are codes beside scales; SCALED: gradients are multiplied by `scale_ptr`.
    """
    owner = tl.load(owner_ptr + 2 * tl.program_id(0))
    group = tl.load(owner_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    row = table_ptr + owner * TABLE
    size = tl.load(row + 8)
    groups = group * ROWS + tl.arange(0, ROWS)
    at = groups[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < size
    count = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.float32)))

    weight = tl.load(row)
    if SPLIT:
        rest = tl.load(row + 1).to(tl.pointer_type(tl.int16)) + at
        weights = weight.to(tl.pointer_type(tl.int16)) + at
        high = tl.load(weights, mask=inside, other=0).to(tl.int32)
        low = tl.load(rest, mask=inside, other=0).to(tl.int32)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        fp32 = weight.to(tl.pointer_type(tl.float32)) + at
        w = tl.load(fp32, mask=inside, other=0.0)
    if LOW:
        raw = tl.load(
            tl.load(row + 2).to(tl.pointer_type(tl.int16)) + at, mask=inside, other=0
        ).to(tl.int32)  # fmt: skip
        g = (raw << 16).to(tl.float32, bitcast=True)
    else:
        g = tl.load(
            tl.load(row + 2).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0
        )  # fmt: skip
    if SCALED:
        g = g * tl.load(scale_ptr)
    filled = groups * BLOCK < size
    if CODED:
        m_at = tl.load(row + 3).to(tl.pointer_type(tl.int8)) + at
        v_at = tl.load(row + 4).to(tl.pointer_type(tl.uint8)) + at
        ms_at = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + groups
        vs_at = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + groups
        share = tl.div_rn(tl.load(m_at, mask=inside, other=0).to(tl.float32), 127.0)
        m = share * tl.abs(share) * tl.load(ms_at, mask=filled, other=0.0)[:, None]
        share = tl.div_rn(tl.load(v_at, mask=inside, other=0).to(tl.float32), 255.0)
        square = share * share
        v = square * square * tl.load(vs_at, mask=filled, other=0.0)[:, None]
    else:
        m_fp32 = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + at
        v_fp32 = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + at
        m = tl.load(m_fp32, mask=inside, other=0.0)
        v = tl.load(v_fp32, mask=inside, other=0.0)

    w -= lr * decay * w
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    corrected1 = 1.0 - tl.exp2(count * log2_beta1)
    corrected2 = tl.sqrt_rn(1.0 - tl.exp2(count * log2_beta2))
    w -= (lr / corrected1) * m / (tl.sqrt_rn(v) / corrected2 + eps)

    if SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        low = bits - (high << 16)
        nan = w != w
        high = tl.where(nan, (bits >> 16) | 0x40, high)
        low = tl.where(nan, 0, low)
        tl.store(weights, high.to(tl.int16), mask=inside)
        tl.store(rest, low.to(tl.int16), mask=inside)
    else:
        tl.store(fp32, w, mask=inside)
    if CODED:
        ratio, scales = _ratios(tl.where(inside, tl.abs(m), 0.0), SMALLEST, MOST)
        codes = tl.floor(127.0 * tl.sqrt_rn(ratio) + 0.5)
        tl.store(m_at, tl.where(m < 0.0, -codes, codes).to(tl.int8), mask=inside)
        tl.store(ms_at, scales, mask=filled)
        v = tl.where(inside, v, 0.0)
        ratio, scales = _ratios(v, SMALLEST, MOST)
        codes = tl.floor(255.0 * tl.sqrt_rn(tl.sqrt_rn(ratio)) + 0.5)
        codes = tl.where((v > 0.0) & (scales > 0.0)[:, None], tl.maximum(codes, 1.0), codes)
        tl.store(v_at, codes.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(vs_at, scales, mask=filled)
    else:
        tl.store(m_fp32, m, mask=inside)
        tl.store(v_fp32, v, mask=inside)


def step(
    slots: Sequence["Slot"],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
) -> None:
    """As `kernels.adamw.adamw_step`, of slots on one device: a launch for each kind of them."""
    torch._foreach_add_([s.count for s in slots], 1)
    kinds: dict[tuple[bool, bool, bool], list[Slot]] = {}
    for s in slots:
        kind = (s.remainder is not None, s.gradient.dtype is torch.bfloat16, s.scales is not None)
        kinds.setdefault(kind, []).append(s)
    for (split, low, coded), some in kinds.items():
        device = some[0].weight.device
        owners = _owners(tuple(s.weight.numel() for s in some), device)
        if not owners.shape[0]:
            continue
        with launch.device_guard(some[0].weight):
            _adamw[(owners.shape[0],)](
                _table(some, device), owners, owners if scale is None else scale,
                lr, math.log2(betas[0]), math.log2(betas[1]), *betas, eps, weight_decay,
                SPLIT=split, LOW=low, CODED=coded, SCALED=scale is not None,
                SMALLEST=SMALLEST_SCALE, MOST=LARGEST, TABLE=COLUMNS, ROWS=GROUPS, BLOCK=BLOCK,
                **launch.options(WARPS, 1),
            )  # fmt: skip


def _table(slots: Sequence["Slot"], device: torch.device) -> Tensor:
    """(tensors, COLUMNS) int64 addresses and sizes; gradients lie elsewhere in every step."""
    rows = []
    for s in slots:
        rest = s.weight if s.remainder is None else s.remainder
        scales = s.scales or (s.weight, s.weight)
        tensors = (s.weight, rest, s.gradient, s.first, s.second, *scales, s.count)
        rows.append([*(t.data_ptr() for t in tensors), s.weight.numel()])
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(16)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(programs, 2) int32: the tensor of each program, and its first chunk there."""
    chunks = torch.tensor([-(-n // CHUNK) for n in sizes])
    tensors = torch.arange(len(sizes)).repeat_interleave(chunks)
    starts = (chunks.cumsum(0) - chunks).repeat_interleave(chunks)
    own = torch.arange(tensors.numel()) - starts
    return torch.stack((tensors, own), 1).to(device, torch.int32).contiguous()


def cases(shape: dict[str, int], dtype: torch.dtype, arch: int) -> Iterator[Case]:
    """The launches of the layouts; they do not depend on the model's shape."""
    floats = ("lr", "log2_beta1", "log2_beta2", "beta1", "beta2", "eps", "decay")
    for split, low, coded in ((True, True, True), (False, True, True), (False, False, False)):
        signature = {
            "table_ptr": "*i64", "owner_ptr": "*i32", "scale_ptr": "*fp32",
            **dict.fromkeys(floats, "fp32"),
        }  # fmt: skip
        constants = {
            "SPLIT": split, "LOW": low, "CODED": coded, "SCALED": True,
            "SMALLEST": SMALLEST_SCALE, "MOST": LARGEST, "TABLE": COLUMNS,
            "ROWS": GROUPS, "BLOCK": BLOCK,
        }  # fmt: skip
        yield Case(
            "adamw", _adamw, signature, constants, WARPS, 1, ("table_ptr", "owner_ptr", "scale_ptr")
        )
