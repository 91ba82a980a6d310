"""Triton kernels of rotary position embedding on a packed qkv projection.

A row is one head of one token: D elements in two halves, a tile [ROWS, HALF] each, where HALF is
the power of two from D/2 up. Heads lie side by side in packed memory, so a row's address is that
of its token plus head * D. Which tensor a row belongs to (q, k or v) chooses a pointer per row,
never per element.
"""

# mypy: disable-error-code="no-untyped-def"
# (the parameters of a kernel have no Python types)

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.jit.launch import Case

MAX_ROWS = 2**30  # rows are counted in 32 bits (their addresses are not), the last tile's too


@triton.jit
def _place(row, T, HEADS: tl.constexpr):
    """Row = (batch * T + time) * HEADS + head, taken apart; int64 where it makes an address."""
    token = row // HEADS
    return (token // T).to(tl.int64), (token % T).to(tl.int64), row % HEADS


@triton.jit
def _halves(row_ptr, ok, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr):
    """Both halves of each row, fp32; 0 where not ok."""
    cols = tl.arange(0, HALF)[None, :]
    mask = ok[:, None] & (cols < HEAD_SIZE // 2)
    a = tl.load(row_ptr[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(row_ptr[:, None] + HEAD_SIZE // 2 + cols, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_halves(row_ptr, a, b, ok, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr):
    cols = tl.arange(0, HALF)[None, :]
    mask = ok[:, None] & (cols < HEAD_SIZE // 2)
    dtype = row_ptr.dtype.element_ty
    tl.store(row_ptr[:, None] + cols, a.to(dtype), mask=mask)
    tl.store(row_ptr[:, None] + HEAD_SIZE // 2 + cols, b.to(dtype), mask=mask)


@triton.jit
def _angles(
    cos_ptr, sin_ptr, positions_ptr,
    positions_batch, positions_time,
    batch, time, length, ok,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of each row's position; NaN, and no access, outside the table."""
    if positions_ptr is None:
        at, inside = time, ok
    else:
        at = tl.load(
            positions_ptr + batch * positions_batch + time * positions_time, mask=ok, other=0
        )
        inside = ok & (at >= 0) & (at < length)
    cols = tl.arange(0, HALF)[None, :]
    mask = inside[:, None] & (cols < HEAD_SIZE // 2)
    offsets = at[:, None] * (HEAD_SIZE // 2) + cols
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    if positions_ptr is not None:
        cos = tl.where(inside[:, None], cos, float("nan"))
    return cos, sin


@triton.jit
def _weights(q_weight_ptr, k_weight_ptr, is_q, ok, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr):
    """The weights of each row's norm, in halves."""
    zero = tl.zeros_like(is_q).to(tl.int32)
    return _halves(tl.where(is_q, q_weight_ptr + zero, k_weight_ptr + zero), ok, HEAD_SIZE, HALF)


@triton.jit
def _forward(
    # data
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr,
    # strides
    qkv_batch, qkv_time, positions_batch, positions_time,
    # sizes
    rows, T, length,
    # constants
    EPS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin), of x or of x / rms(x) * weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    batch, time, head = _place(row, T, Q_HEADS + K_HEADS)
    is_q = head < Q_HEADS
    source = qkv_ptr + batch * qkv_batch + time * qkv_time + head * HEAD_SIZE
    a, b = _halves(source, ok, HEAD_SIZE, HALF)
    if q_weight_ptr is not None:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) * (1.0 / HEAD_SIZE) + EPS)[:, None]
        wa, wb = _weights(q_weight_ptr, k_weight_ptr, is_q, ok, HEAD_SIZE, HALF)
        a, b = a * rstd * wa, b * rstd * wb
    cos, sin = _angles(
        cos_ptr, sin_ptr, positions_ptr, positions_batch, positions_time,
        batch, time, length, ok, HEAD_SIZE, HALF,
    )  # fmt: skip
    token = batch * T + time
    target = tl.where(
        is_q,
        q_ptr + (token * Q_HEADS + head) * HEAD_SIZE,
        k_ptr + (token * K_HEADS + head - Q_HEADS) * HEAD_SIZE,
    )
    _store_halves(target, a * cos - b * sin, b * cos + a * sin, ok, HEAD_SIZE, HALF)


def rope_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward; as `reference.rope.rope_forward`."""
    (B, T, _), D = qkv.shape, 2 * cos.shape[1]
    q = torch.empty((B, T, n_head, D), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((B, T, n_kv_head, D), dtype=qkv.dtype, device=qkv.device)
    rows = _count(B, T, n_head + n_kv_head)
    if rows:
        qkv = _unit_columns(qkv)
        constants, config = _constants(
            "rope_forward", (n_head, n_kv_head), D, eps, qkv.dtype, launch.arch_of(qkv)
        )
        with launch.device_guard(qkv):
            _forward[(-(-rows // constants["ROWS"]),)](
                qkv, *_tables(cos, sin), positions, *_vectors(q_weight, k_weight), q, k,
                qkv.stride(0), qkv.stride(1), *_position_strides(positions),
                rows, T, cos.shape[0],
                **constants, **_options(config),
            )  # fmt: skip
    return q.transpose(1, 2), k.transpose(1, 2)


@triton.jit
def _gradients(
    dq_ptr, dk_ptr, dv_ptr,
    dq_batch, dq_head, dq_time, dk_batch, dk_head, dk_time, dv_batch, dv_head, dv_time,
    batch, time, head, ok,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradients of each row of the packed heads, in halves."""
    k_head, v_head = head - Q_HEADS, head - Q_HEADS - K_HEADS
    k_or_v = tl.where(
        v_head < 0,
        dk_ptr + batch * dk_batch + time * dk_time + k_head.to(tl.int64) * dk_head,
        dv_ptr + batch * dv_batch + time * dv_time + v_head.to(tl.int64) * dv_head,
    )
    source = tl.where(
        k_head < 0,
        dq_ptr + batch * dq_batch + time * dq_time + head.to(tl.int64) * dq_head,
        k_or_v,
    )
    return _halves(source, ok, HEAD_SIZE, HALF)


@triton.jit
def _backward(
    # data
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, positions_ptr, dqkv_ptr,
    # strides
    dq_batch, dq_head, dq_time, dk_batch, dk_head, dk_time, dv_batch, dv_head, dv_time,
    positions_batch, positions_time,
    # sizes
    rows, T, length,
    # constants
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos + b sin, b cos - a sin) for heads of q and k; those of v are copied."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    batch, time, head = _place(row, T, Q_HEADS + 2 * K_HEADS)
    is_v = head >= Q_HEADS + K_HEADS
    a, b = _gradients(
        dq_ptr, dk_ptr, dv_ptr,
        dq_batch, dq_head, dq_time, dk_batch, dk_head, dk_time, dv_batch, dv_head, dv_time,
        batch, time, head, ok, Q_HEADS, K_HEADS, HEAD_SIZE, HALF,
    )  # fmt: skip
    cos, sin = _angles(
        cos_ptr, sin_ptr, positions_ptr, positions_batch, positions_time,
        batch, time, length, ok & ~is_v, HEAD_SIZE, HALF,
    )  # fmt: skip
    turned_a = tl.where(is_v[:, None], a, a * cos + b * sin)
    turned_b = tl.where(is_v[:, None], b, b * cos - a * sin)
    target = dqkv_ptr + row.to(tl.int64) * HEAD_SIZE
    _store_halves(target, turned_a, turned_b, ok, HEAD_SIZE, HALF)


@triton.jit
def _norm_backward(
    # data
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, cos_ptr, sin_ptr, positions_ptr, q_weight_ptr, k_weight_ptr,
    dqkv_ptr, partials_ptr,
    # strides
    dq_batch, dq_head, dq_time, dk_batch, dk_head, dk_time, dv_batch, dv_head, dv_time,
    qkv_batch, qkv_time, positions_batch, positions_time,
    # sizes
    rows, T, length, rows_each,
    # constants
    EPS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn back to g, then dx = rstd (w g - u mean(w g u)) and dw = sum g u, u = x rstd.

    A program owns `rows_each` rows, one after the other, and the sums of dw over them.
    """
    program = tl.program_id(0)
    q_a = tl.zeros((ROWS, HALF), tl.float32)
    q_b = tl.zeros((ROWS, HALF), tl.float32)
    k_a = tl.zeros((ROWS, HALF), tl.float32)
    k_b = tl.zeros((ROWS, HALF), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = program * rows_each + start + tl.arange(0, ROWS)
        ok = row < rows
        batch, time, head = _place(row, T, Q_HEADS + 2 * K_HEADS)
        is_q, is_v = ok & (head < Q_HEADS), head >= Q_HEADS + K_HEADS
        normed = ok & ~is_v
        a, b = _gradients(
            dq_ptr, dk_ptr, dv_ptr,
            dq_batch, dq_head, dq_time, dk_batch, dk_head, dk_time, dv_batch, dv_head, dv_time,
            batch, time, head, ok, Q_HEADS, K_HEADS, HEAD_SIZE, HALF,
        )  # fmt: skip
        cos, sin = _angles(
            cos_ptr, sin_ptr, positions_ptr, positions_batch, positions_time,
            batch, time, length, normed, HEAD_SIZE, HALF,
        )  # fmt: skip
        source = qkv_ptr + batch * qkv_batch + time * qkv_time + head * HEAD_SIZE
        x_a, x_b = _halves(source, normed, HEAD_SIZE, HALF)
        rstd = tl.rsqrt(tl.sum(x_a * x_a + x_b * x_b, 1) * (1.0 / HEAD_SIZE) + EPS)[:, None]
        u_a, u_b = x_a * rstd, x_b * rstd
        g_a, g_b = a * cos + b * sin, b * cos - a * sin
        w_a, w_b = _weights(q_weight_ptr, k_weight_ptr, is_q, normed, HEAD_SIZE, HALF)
        q_a += tl.where(is_q[:, None], g_a * u_a, 0.0)
        q_b += tl.where(is_q[:, None], g_b * u_b, 0.0)
        k_a += tl.where((normed & ~is_q)[:, None], g_a * u_a, 0.0)
        k_b += tl.where((normed & ~is_q)[:, None], g_b * u_b, 0.0)
        g_a, g_b = g_a * w_a, g_b * w_b
        mean = (tl.sum(g_a * u_a + g_b * u_b, 1) * (1.0 / HEAD_SIZE))[:, None]
        a = tl.where(is_v[:, None], a, rstd * (g_a - u_a * mean))
        b = tl.where(is_v[:, None], b, rstd * (g_b - u_b * mean))
        _store_halves(dqkv_ptr + row.to(tl.int64) * HEAD_SIZE, a, b, ok, HEAD_SIZE, HALF)
    cols = tl.arange(0, HALF)
    mask = cols < HEAD_SIZE // 2
    sums = partials_ptr + program.to(tl.int64) * 2 * HEAD_SIZE + cols
    tl.store(sums, tl.sum(q_a, 0), mask=mask)
    tl.store(sums + HEAD_SIZE // 2, tl.sum(q_b, 0), mask=mask)
    tl.store(sums + HEAD_SIZE, tl.sum(k_a, 0), mask=mask)
    tl.store(sums + HEAD_SIZE + HEAD_SIZE // 2, tl.sum(k_b, 0), mask=mask)


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the backward; as `reference.rope.rope_backward`."""
    B, n_head, T, D = dq.shape
    n_kv_head = dk.shape[1]
    width = (n_head + 2 * n_kv_head) * D
    dqkv = torch.empty((B, T, width), dtype=dq.dtype, device=dq.device)
    rows = _count(B, T, n_head + 2 * n_kv_head)
    constants, config = _constants(
        "rope_backward", (n_head, n_kv_head), D, None if qkv is None else eps, dq.dtype,
        launch.arch_of(dq),
    )  # fmt: skip
    gradients = [_unit_columns(g) for g in (dq, dk, dv)]
    strides = [g.stride(i) for g in gradients for i in range(3)]
    places = _position_strides(positions)
    if qkv is None:
        if rows:
            with launch.device_guard(dq):
                _backward[(-(-rows // constants["ROWS"]),)](
                    *gradients, *_tables(cos, sin), positions, dqkv, *strides, *places,
                    rows, T, cos.shape[0],
                    **constants, **_options(config),
                )  # fmt: skip
        return dqkv, torch.empty((0, D), dtype=torch.float32, device=dq.device)
    tiles = -(-rows // constants["ROWS"])
    tiles_each = max(1, -(-tiles // max(1, config.programs)))
    programs = -(-tiles // tiles_each)
    partials = torch.empty((programs, 2, D), dtype=torch.float32, device=dq.device)
    if rows:
        qkv = _unit_columns(qkv)
        with launch.device_guard(dq):
            _norm_backward[(programs,)](
                *gradients, qkv, *_tables(cos, sin), positions, *_vectors(q_weight, k_weight),
                dqkv, partials, *strides, qkv.stride(0), qkv.stride(1), *places,
                rows, T, cos.shape[0], tiles_each * constants["ROWS"],
                **constants, **_options(config),
            )  # fmt: skip
    return dqkv, partials.sum(0)


def _constants(
    kernel: str,
    heads: tuple[int, int],
    size: int,
    eps: float | None,
    dtype: torch.dtype,
    arch: int,
) -> tuple[dict[str, Any], launch.Config]:
    """Constexpr arguments of a kernel for (query, key) heads of `size`; eps None: no norm."""
    config = launch.config(kernel, size, dtype, arch)
    constants = {
        "Q_HEADS": heads[0], "K_HEADS": heads[1], "HEAD_SIZE": size,
        "HALF": triton.next_power_of_2(size // 2), "ROWS": config.rows,
    }  # fmt: skip
    return constants if eps is None else {"EPS": eps, **constants}, config


def _options(config: launch.Config) -> dict[str, int]:
    return launch.options(config.warps, config.stages)


def _count(B: int, T: int, heads: int) -> int:
    if B * T * heads > MAX_ROWS:
        raise ValueError(
            f"rope_qkv: expected at most {MAX_ROWS} heads of tokens; found {B * T * heads}"
        )
    return B * T * heads


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.contiguous(), sin.contiguous()


def _vectors(*weights: Tensor | None) -> list[Tensor | None]:
    return [w if w is None else w.contiguous() for w in weights]


def _position_strides(positions: Tensor | None) -> tuple[int, int]:
    if positions is None:
        return 0, 0
    return positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1)


def cases(shape: dict[str, int], dtype: torch.dtype, arch: int) -> Iterator[Case]:
    """The kernels of this shape: plain, with positions, with positions and QK-norm."""
    heads, size = (shape["n_head"], shape["n_head"]), shape["head_size"]
    pointers = dict.fromkeys(
        ("qkv_ptr", "q_ptr", "k_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "dqkv_ptr"),
        f"*{launch.NAMES[dtype]}",
    )
    # a norm's weights are parameters: fp32 under autocast
    pointers |= dict.fromkeys(
        ("cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr", "partials_ptr"), "*fp32"
    )
    pointers["positions_ptr"] = "*i64"
    for positions, norm in ((False, False), (True, False), (True, True)):
        if not shape.get("everything" if norm else "rope", True):  # no shipped model has QK-norm
            continue
        for name, kernel in (
            ("rope_forward", _forward),
            ("rope_backward", _norm_backward if norm else _backward),
        ):
            eps = 1e-6 if norm or kernel is _forward else None
            constants, config = _constants(name, heads, size, eps, dtype, arch)
            if not positions:
                constants["positions_ptr"] = None
            if kernel is _forward and not norm:
                constants |= {"q_weight_ptr": None, "k_weight_ptr": None}
            signature = {a: pointers.get(a, "i32") for a in kernel.arg_names if a not in constants}
            yield Case(
                name + "_positions" * positions + "_norm" * norm, kernel, signature, constants,
                config.warps, config.stages,
                tuple(a for a in signature if a.endswith(("_ptr", "_batch", "_time", "_head"))),
            )  # fmt: skip
