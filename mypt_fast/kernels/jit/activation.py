"""SwiGLU and GELU: elementwise, a tile of rows x 256 columns a program."""

# mypy: disable-error-code="no-untyped-def"
# (the parameters of a kernel have no Python types)

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.jit.launch import Case


@triton.jit
def _tile(N, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program; programs of one block of rows are neighbours."""
    tiles = tl.cdiv(F, BLOCK)
    row_block = tl.program_id(0) // tiles
    rows = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    return rows[:, None], columns[None, :], (rows < N)[:, None] & (columns < F)[None, :]


@triton.jit
def _swiglu_forward(
    # data
    gate_up_ptr, h_ptr,
    # strides
    gate_up_stride, h_stride,
    # sizes
    N, F,
    # constants
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SwiGLU: h = g * sigmoid(g) * u of rows [g | u]."""
    rows, columns, inside = _tile(N, F, ROWS, BLOCK)
    at = gate_up_ptr + rows * gate_up_stride + columns
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    h = g * (1.0 / (1.0 + tl.exp(-g))) * u
    tl.store(h_ptr + rows * h_stride + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_forward(
    # data
    up_ptr, h_ptr,
    # strides
    up_stride, h_stride,
    # sizes
    N, F,
    # constants
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GELU: h = u * (1 + erf(u / sqrt(2))) / 2."""
    rows, columns, inside = _tile(N, F, ROWS, BLOCK)
    u = tl.load(up_ptr + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    h = u * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)))
    tl.store(h_ptr + rows * h_stride + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """As `reference.activation.swiglu_forward`."""
    return _forward("swiglu_forward", gate_up, gate_up.shape[1] // 2)


def gelu_forward(up: Tensor) -> Tensor:
    """As `reference.activation.gelu_forward`."""
    return _forward("gelu_forward", up, up.shape[1])


def _forward(name: str, pre: Tensor, columns: int) -> Tensor:
    pre = _unit_stride(pre)
    h = torch.empty((pre.shape[0], columns), dtype=pre.dtype, device=pre.device)
    _launch(name, (pre, h), columns)
    return h


@triton.jit
def _swiglu_backward(
    # data
    dh_ptr, gate_up_ptr, dgate_up_ptr, h_ptr,
    # strides
    dh_stride, gate_up_stride, dgate_up_stride, h_stride,
    # sizes
    N, F,
    # constants
    RECREATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SwiGLU, s = sigmoid(g): dg = dh u (s + g s (1 - s)), du = dh g s; RECREATE: h = g s u.

    Each element is read and written by one thread: dgate_up may be gate_up, and h may be dh.
    """
    rows, columns, inside = _tile(N, F, ROWS, BLOCK)
    at = gate_up_ptr + rows * gate_up_stride + columns
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh_ptr + rows * dh_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    silu = g * s
    dg = (s + silu * (1.0 - s)) * u * d
    du = silu * d
    to = dgate_up_ptr + rows * dgate_up_stride + columns
    tl.store(to, dg.to(dgate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(to + F, du.to(dgate_up_ptr.dtype.element_ty), mask=inside)
    if RECREATE:
        h = silu * u
        tl.store(h_ptr + rows * h_stride + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(
    # data
    dh_ptr, up_ptr, dup_ptr, h_ptr,
    # strides
    dh_stride, up_stride, dup_stride, h_stride,
    # sizes
    N, F,
    # constants
    RECREATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GELU: du = dh (Phi(u) + u exp(-u^2 / 2) / sqrt(2 pi)); RECREATE: h = u Phi(u).

    Outputs may be inputs, as above.
    """
    rows, columns, inside = _tile(N, F, ROWS, BLOCK)
    u = tl.load(up_ptr + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh_ptr + rows * dh_stride + columns, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
    du = d * (below + u * (tl.exp(-0.5 * u * u) * 0.3989422804014327))
    tl.store(dup_ptr + rows * dup_stride + columns, du.to(dup_ptr.dtype.element_ty), mask=inside)
    if RECREATE:
        h = u * below
        tl.store(h_ptr + rows * h_stride + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


def swiglu_backward(
    dh: Tensor, gate_up: Tensor, h: Tensor | None = None, dgate_up: Tensor | None = None
) -> Tensor:
    """As `reference.activation.swiglu_backward`."""
    return _backward("swiglu_backward", dh, gate_up, h, dgate_up)


def gelu_backward(
    dh: Tensor, up: Tensor, h: Tensor | None = None, dup: Tensor | None = None
) -> Tensor:
    """As `reference.activation.gelu_backward`."""
    return _backward("gelu_backward", dh, up, h, dup)


def _backward(name: str, dh: Tensor, pre: Tensor, h: Tensor | None, dpre: Tensor | None) -> Tensor:
    columns = dh.shape[1]
    dh, pre = _unit_stride(dh), _unit_stride(pre)
    if dpre is None:
        dpre = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    # without h its pointer is never used
    _launch(name, (dh, pre, dpre, dh if h is None else h), columns, RECREATE=h is not None)
    return dpre


def _launch(name: str, data: tuple[Tensor, ...], columns: int, **flags: bool) -> None:
    rows = data[0].shape[0]
    if rows == 0:
        return
    config, constants = _constants(name, columns, data[0].dtype, launch.arch_of(data[0]))
    programs = triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(columns, constants["BLOCK"])
    with launch.device_guard(data[0]):
        _KERNELS[name][(programs,)](
            *data, *(t.stride(0) for t in data), rows, columns,
            **flags, **constants, **launch.options(config.warps, config.stages),
        )  # fmt: skip


@functools.cache
def _constants(
    name: str, columns: int, dtype: torch.dtype, arch: int
) -> tuple[launch.Config, dict[str, Any]]:
    """What the launcher and the ahead-of-time gate both compile with."""
    config = launch.config(name, columns, dtype, arch)
    return config, {"ROWS": config.rows, "BLOCK": min(256, launch.tiles(columns)[0])}


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


_KERNELS: dict[str, Any] = {
    "swiglu_forward": _swiglu_forward,
    "swiglu_backward": _swiglu_backward,
    "gelu_forward": _gelu_forward,
    "gelu_backward": _gelu_backward,
}


def cases(shape: dict[str, int], dtype: torch.dtype, arch: int) -> Iterator[Case]:
    """Every kernel of a feed-forward of this hidden width, with and without recreating h."""
    for name, kernel in _KERNELS.items():
        config, constants = _constants(name, shape["hidden"], dtype, arch)
        data = [a for a in kernel.arg_names if a.endswith("_ptr")]
        strides = [a for a in kernel.arg_names if a.endswith("_stride")]
        signature = dict.fromkeys(data, f"*{launch.NAMES[dtype]}")
        signature |= dict.fromkeys([*strides, "N", "F"], "i32")
        aligned = (*data, *strides, "F") if shape["hidden"] % 16 == 0 else tuple(data)
        for recreate in (False, True) if "RECREATE" in kernel.arg_names else (None,):
            flags = {} if recreate is None else {"RECREATE": recreate}
            yield Case(
                name + ("_recreate" if recreate else ""), kernel, signature,
                flags | constants, config.warps, config.stages, aligned,
            )  # fmt: skip
