"""RMSNorm and LayerNorm, with or without the residual add and dropout before them.

A row stays in registers as tiles of BLOCK columns, in the dtype it has in memory; all arithmetic
is fp32. `reference/norm.py` states the formulas.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (the parameters of a kernel have no Python types; a tuple of tiles grows)

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mypt_fast.kernels.jit import launch
from mypt_fast.kernels.reference.norm import drop_threshold


@triton.jit
def _load(row_ptr, ok, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The rows at `row_ptr` as a tuple of tiles; 0 beyond the end."""
    lanes = tl.arange(0, BLOCK)[None, :]
    tiles = ()
    for j in tl.static_range(TILES):
        mask = ok
        if (j + 1) * BLOCK > COLUMNS:
            mask = ok & (j * BLOCK + lanes < COLUMNS)
        tiles += (tl.load(row_ptr + j * BLOCK + lanes, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _store(row_ptr, tile, ok, j: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Tile j of the rows at `row_ptr`, rounded to the dtype they have there."""
    columns = j * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = ok
    if (j + 1) * BLOCK > COLUMNS:
        mask = ok & (columns < COLUMNS)
    tl.store(row_ptr + columns, tile, mask=mask)


@triton.jit
def _parameter(
    ptr, j: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Tile j of a weight or bias in fp32, alike in all rows.

    Each row loads its own, from the cache: a (1, BLOCK) tile would be in another layout than the
    rows, and go to them through shared memory and a barrier.
    """
    columns = j * BLOCK + tl.arange(0, BLOCK)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    if (j + 1) * BLOCK > COLUMNS:
        return tl.load(ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    return tl.load(ptr + columns).to(tl.float32)


@triton.jit
def _keep(seed, rows, like, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The dropout mask of the rows as a tuple of tiles: one call of Philox serves four.

    `like` is a tile of the rows. A zero made of it, which only LLVM sees through, gives the mask
    that tile's layout; with a layout of its own it would pass through shared memory.
    """
    low, high = rows.to(tl.uint32), (rows >> 32).to(tl.uint32)
    zero = (tl.abs(like.to(tl.float32)) < -1.0).to(tl.uint32)
    lanes = tl.arange(0, BLOCK)[None, :].to(tl.uint32) + zero
    threshold = tl.full((), THRESHOLD, tl.uint32)
    tiles = ()
    for j in tl.static_range(TILES):
        if j % 4 == 0:
            words = tl.philox(seed, lanes, low, high, tl.full((), j // 4, tl.uint32))
        tiles += (words[j % 4] >= threshold,)
    return tiles


def _constants(
    row: launch.Config, columns: int, offset: float, dropout_p: float, **flags: Any
) -> dict[str, Any]:
    """The constexpr arguments that both kernels have, and `flags`, their own."""
    block, tiles = launch.tiles(columns)
    return {
        "OFFSET": offset,
        "KEPT_SCALE": 1.0 / (1.0 - dropout_p),
        "THRESHOLD": drop_threshold(dropout_p),
        "DROPOUT": dropout_p > 0.0,
        "COLUMNS": columns,
        "BLOCK": block,
        "TILES": tiles,
        "ROWS": row.rows,
        **flags,
    }


def _as_rows(t: Tensor) -> Tensor:
    """(rows, columns), without a copy where the rows lie at one stride and are dense inside."""
    return (t if t.stride(-1) == 1 else t.contiguous()).reshape(-1, t.shape[-1])


@triton.jit
def _norm_forward(
    # data
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    # strides
    x_stride, residual_stride,
    # sizes
    n_rows,
    # constants
    EPS: tl.constexpr, OFFSET: tl.constexpr, KEPT_SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, CENTER: tl.constexpr,
    DROPOUT: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum h = residual + dropout(x) and y = (h - mean) rstd (weight + OFFSET) + bias.

    rstd = 1 / sqrt(mean((h - mean)^2) + EPS); without CENTER the mean is 0. The mean comes first
    and the squares are of the centred row: E[h^2] - E[h]^2 would cancel.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ok = rows < n_rows
    lanes = tl.arange(0, BLOCK)[None, :]
    row = _load(x_ptr + rows * x_stride, ok, COLUMNS, BLOCK, TILES)
    if HAS_RESIDUAL:
        residual = _load(residual_ptr + rows * residual_stride, ok, COLUMNS, BLOCK, TILES)
        if DROPOUT:
            keep = _keep(tl.load(seed_ptr), rows, row[0], THRESHOLD, BLOCK, TILES)
        added = ()
        for j in tl.static_range(TILES):
            x = row[j].to(tl.float32)
            if DROPOUT:
                x = tl.where(keep[j], x * KEPT_SCALE, 0.0)
            # the norm is of what the next layer reads, the rounded sum
            h = (residual[j].to(tl.float32) + x).to(residual[j].dtype)
            _store(h_ptr + rows * COLUMNS, h, ok, j, COLUMNS, BLOCK)
            added += (h,)
        row = added

    if CENTER:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for j in tl.static_range(TILES):
            total += row[j].to(tl.float32)
        mean = tl.sum(total, 1, keep_dims=True) / COLUMNS
        tl.store(mean_ptr + rows, mean, mask=ok)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in tl.static_range(TILES):
        h = row[j].to(tl.float32)
        if CENTER:
            h -= mean
            if (j + 1) * BLOCK > COLUMNS:
                h = tl.where(j * BLOCK + lanes < COLUMNS, h, 0.0)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / COLUMNS + EPS)
    tl.store(rstd_ptr + rows, rstd, mask=ok)

    for j in tl.static_range(TILES):
        h = row[j].to(tl.float32)
        if CENTER:
            h -= mean
        y = h * rstd * (_parameter(weight_ptr, j, COLUMNS, BLOCK, ROWS) + OFFSET)
        if HAS_BIAS:
            y += _parameter(bias_ptr, j, COLUMNS, BLOCK, ROWS)
        _store(y_ptr + rows * COLUMNS, y, ok, j, COLUMNS, BLOCK)


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; as `reference.norm.norm_forward`."""
    shape, columns, device = x.shape, x.shape[-1], x.device
    n_rows, has_residual = x.numel() // columns, residual is not None
    stream = residual if residual is not None else x
    y = torch.empty(shape, dtype=out_dtype, device=device)
    h = torch.empty(shape if has_residual else 0, dtype=stream.dtype, device=device)
    mean = torch.empty(shape[:-1] if center else 0, dtype=torch.float32, device=device)
    rstd = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    if n_rows == 0:
        return y, h, mean, rstd
    x, stream = _as_rows(x), _as_rows(stream)  # what a flag turns off is passed and not touched
    weight = weight.contiguous()
    shift = bias.contiguous() if bias is not None else weight
    widest = max(x.dtype, stream.dtype, key=lambda t: t.itemsize)
    row = launch.config("norm_forward", columns, widest, launch.arch_of(x))
    flags = {"HAS_RESIDUAL": has_residual, "HAS_BIAS": bias is not None, "CENTER": center}
    data = (x, stream, weight, shift, seed if seed is not None else x, y, h, mean, rstd)
    strides = (x.stride(0), stream.stride(0))
    constants = _constants(row, columns, offset, dropout_p, EPS=eps, **flags)
    with launch.device_guard(x):
        _norm_forward[(-(-n_rows // row.rows),)](
            *data, *strides, n_rows, **constants, **launch.options(row.warps, row.stages)
        )
    return y, h, mean, rstd


@triton.jit
def _norm_backward(
    # data
    dy_ptr, dh_out_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dh_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    # strides
    dy_stride, dh_out_stride, h_stride,
    # sizes
    n_rows, rows_per_program,
    # constants
    OFFSET: tl.constexpr, KEPT_SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    HAS_DH_OUT: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTER: tl.constexpr, DROPOUT: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients dh = rstd (g - xhat mean(g xhat) - mean(g)) + dh_out, dx = dropout'(dh).

    xhat = (h - mean) rstd, g = dy (weight + OFFSET), mean(g) only if CENTER. Program p has
    rows_per_program rows; it writes row p of the partial sums of dy xhat and of dy.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    dweight = ()
    dbias = ()
    for _ in tl.static_range(TILES):
        dweight += (tl.zeros((ROWS, BLOCK), tl.float32),)
        if HAS_BIAS:
            dbias += (tl.zeros((ROWS, BLOCK), tl.float32),)

    for i in range(0, rows_per_program, ROWS):
        rows = first + i + tl.arange(0, ROWS)[:, None]
        ok = rows < last
        h = _load(h_ptr + rows * h_stride, ok, COLUMNS, BLOCK, TILES)
        dy = _load(dy_ptr + rows * dy_stride, ok, COLUMNS, BLOCK, TILES)
        if HAS_DH_OUT:
            dh_out = _load(dh_out_ptr + rows * dh_out_stride, ok, COLUMNS, BLOCK, TILES)
        rstd = tl.load(rstd_ptr + rows, mask=ok, other=0.0)
        if CENTER:
            mean = tl.load(mean_ptr + rows, mask=ok, other=0.0)

        along = tl.zeros((ROWS, BLOCK), tl.float32)
        level = tl.zeros((ROWS, BLOCK), tl.float32)
        new_dweight = ()
        new_dbias = ()
        for j in tl.static_range(TILES):
            d, xhat = dy[j].to(tl.float32), h[j].to(tl.float32)
            if CENTER:
                xhat -= mean
            xhat *= rstd
            g = d * (_parameter(weight_ptr, j, COLUMNS, BLOCK, ROWS) + OFFSET)
            along += g * xhat
            if CENTER:
                level += g
            new_dweight += (dweight[j] + d * xhat,)
            if HAS_BIAS:
                new_dbias += (dbias[j] + d,)
        dweight, dbias = new_dweight, new_dbias
        along_mean = tl.sum(along, 1, keep_dims=True) / COLUMNS
        if CENTER:
            level_mean = tl.sum(level, 1, keep_dims=True) / COLUMNS

        if DROPOUT:
            keep = _keep(tl.load(seed_ptr), rows, dy[0], THRESHOLD, BLOCK, TILES)
        for j in tl.static_range(TILES):
            d, xhat = dy[j].to(tl.float32), h[j].to(tl.float32)
            if CENTER:
                xhat -= mean
            xhat *= rstd
            dh = d * (_parameter(weight_ptr, j, COLUMNS, BLOCK, ROWS) + OFFSET) - xhat * along_mean
            if CENTER:
                dh -= level_mean
            dh *= rstd
            if HAS_DH_OUT:
                dh += dh_out[j].to(tl.float32)
            _store(dh_ptr + rows * COLUMNS, dh, ok, j, COLUMNS, BLOCK)
            if HAS_BRANCH:
                if DROPOUT:
                    dh = tl.where(keep[j], dh * KEPT_SCALE, 0.0)
                _store(dx_ptr + rows * COLUMNS, dh, ok, j, COLUMNS, BLOCK)

    own = program * COLUMNS + tl.zeros((1, 1), tl.int64)
    everywhere = own >= 0
    for j in tl.static_range(TILES):
        total = tl.sum(dweight[j], 0, keep_dims=True)
        _store(dweight_ptr + own, total, everywhere, j, COLUMNS, BLOCK)
        if HAS_BIAS:
            total = tl.sum(dbias[j], 0, keep_dims=True)
            _store(dbias_ptr + own, total, everywhere, j, COLUMNS, BLOCK)


def norm_backward(
    dy: Tensor,
    dh_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    offset: float,
    center: bool,
    dropout_p: float,
    branch_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel; as `reference.norm.norm_backward`."""
    shape, columns, device = h.shape, h.shape[-1], h.device
    n_rows = h.numel() // columns
    has_branch, has_bias = branch_dtype is not None, bias_dtype is not None
    dh = torch.empty(shape, dtype=h.dtype, device=device)
    dx = torch.empty(shape if has_branch else 0, dtype=branch_dtype or dy.dtype, device=device)
    if n_rows == 0:
        dweight = torch.zeros(columns, dtype=weight.dtype, device=device)
        return dh, dx, dweight, dy.new_zeros(columns if has_bias else 0, dtype=bias_dtype)
    dy, h = _as_rows(dy), _as_rows(h)
    upper = _as_rows(dh_out) if dh_out is not None else dy  # not touched if the flag is off
    widest = max(h.dtype, dy.dtype, key=lambda t: t.itemsize)
    row = launch.config("norm_backward", columns, widest, launch.arch_of(h))
    programs = min(row.programs, -(-n_rows // row.rows))
    rows_per_program = -(-n_rows // (programs * row.rows)) * row.rows
    parts = torch.empty((1 + has_bias, programs, columns), dtype=torch.float32, device=device)
    flags = {"HAS_DH_OUT": dh_out is not None, "HAS_BRANCH": has_branch, "HAS_BIAS": has_bias}
    inputs = (dy, upper, h, weight.contiguous(), mean, rstd, seed if seed is not None else dy)
    outputs = (dh, dx, parts[0], parts[-1])
    sizes = (dy.stride(0), upper.stride(0), h.stride(0), n_rows, rows_per_program)
    constants = _constants(row, columns, offset, dropout_p, CENTER=center, **flags)
    with launch.device_guard(h):
        _norm_backward[(programs,)](
            *inputs, *outputs, *sizes, **constants, **launch.options(row.warps, row.stages)
        )
    dweight = parts[0].sum(0).to(weight.dtype)
    dbias = parts[-1].sum(0).to(bias_dtype) if has_bias else dy.new_empty(0)
    return dh, dx, dweight, dbias


def cases(shape: dict[str, int], dtype: torch.dtype, arch: int) -> Iterator[launch.Case]:
    """The kernels of a model whose branches are of `dtype`, its residual stream of that or fp32."""
    columns, low = shape["n_embd"], f"*{launch.NAMES[dtype]}"
    modes = ((False, 0.0), (True, 0.0), (True, 0.1))
    for stream, center, (add, p) in product(
        dict.fromkeys((dtype, torch.float32)), (False, True), modes
    ):
        if not shape.get("layer_norm" if center else "rms_norm", True):
            continue
        # training keeps a bf16 stream beside bf16 branches, an fp32 one beside others, unless
        # asked otherwise; an fp16 stream is met where a trained model writes text
        usual = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        trained = stream is usual or shape.get("everything", True)
        if not trained and (p > 0 or stream is torch.float32):
            continue
        wide = f"*{launch.NAMES[stream]}"
        what = f"{'layer' if center else 'rms'}{' add' * add}{' dropout' * (p > 0)} {wide[1:]}"
        flags: dict[str, Any] = {"HAS_BIAS": center, "CENTER": center}
        row = launch.config("norm_forward", columns, stream, arch)
        yield launch.Case(
            f"norm_forward {what}",
            _norm_forward,
            {"x_ptr": low if add else wide, "residual_ptr": wide}
            | {"weight_ptr": "*fp32", "bias_ptr": "*fp32"}
            | {"seed_ptr": "*i64", "y_ptr": low, "h_ptr": wide}
            | {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
            | dict.fromkeys(("x_stride", "residual_stride", "n_rows"), "i32"),
            _constants(row, columns, 0.0, p, EPS=1e-6, HAS_RESIDUAL=add, **flags),
            row.warps,
            row.stages,
            _aligned(_norm_forward, columns),
        )
        if not trained:
            continue
        row = launch.config("norm_backward", columns, stream, arch)
        flags |= {"HAS_DH_OUT": add, "HAS_BRANCH": add and (p > 0 or stream is not dtype)}
        yield launch.Case(
            f"norm_backward {what}",
            _norm_backward,
            {"dy_ptr": low, "dh_out_ptr": wide, "h_ptr": wide, "weight_ptr": "*fp32"}
            | {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "seed_ptr": "*i64"}
            | {"dh_ptr": wide, "dx_ptr": low, "dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
            | dict.fromkeys(("dy_stride", "dh_out_stride", "h_stride", "n_rows"), "i32")
            | {"rows_per_program": "i32"},
            _constants(row, columns, 0.0, p, **flags),
            row.warps,
            row.stages,
            _aligned(_norm_backward, columns),
        )


def _aligned(kernel: Any, columns: int) -> tuple[str, ...]:
    """Pointers, and, where rows are whole multiples of 16 elements, their strides."""
    suffixes = ("_ptr", "_stride") if columns % 16 == 0 else ("_ptr",)
    return tuple(name for name in kernel.arg_names if name.endswith(suffixes))
