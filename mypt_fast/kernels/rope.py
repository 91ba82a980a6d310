"""Rotary position embedding (arXiv 2104.09864) of a packed qkv projection."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mypt_fast.kernels import _operator as op
from mypt_fast.kernels.reference import rope as reference


def rope_tables(
    length: int, head_size: int, theta: float, scale: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of (position / scale) * theta^(-2i/D), each (length, D/2), fp32.

    Built in fp64 and rounded once: at position 4095 an fp32 angle is already off by 2e-4.

    Raises:
        ValueError: for an odd head_size, and for a scale that is not positive.
    """
    if head_size < 2 or head_size % 2 or not scale > 0:
        raise ValueError(
            f"rope_tables: expected an even head_size and scale > 0; found {head_size} and {scale}"
        )
    i = torch.arange(0, head_size, 2, dtype=torch.float64, device=device)
    inverse = theta ** (-i / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device) / scale, inverse)
    return angle.cos().float(), angle.sin().float()


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int | None = None,
    *,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into heads and rotate the queries and the keys.

    Pairs (i, i + D/2) of a head turn by the angle of its token's position (half-split layout of
    arXiv 2104.09864), after an optional RMSNorm of each head over D (QK-norm, arXiv 2302.05442).
    The arithmetic is fp32 (fp64 for fp64), rounded once. The tables get no gradient; the
    backward writes the packed gradient of qkv in one pass.

    Args:
        qkv: (B, T, (n_head + 2 n_kv_head) D): heads of q, then of k, then of v.
        cos: (length, D/2) fp32, of `rope_tables`.
        sin: as `cos`.
        n_head: heads of the queries.
        n_kv_head: heads of the keys and of the values, a divisor of n_head; None: n_head.
        positions: (B, T) or (T,) int64 rows of the tables; None: 0 .. T-1. With a key-value
            cache pass the rows cos[past : past + T] and None.
        q_weight: (D,) of the QK-norm; None, together with `k_weight`: no norm.
        k_weight: (D,), of the dtype of `q_weight`.
        eps: of the QK-norm.
        impl: as in `choose`.

    Returns:
        q (B, n_head, T, D), k and v (B, n_kv_head, T, D), of the dtype of qkv, transposed views
        of (B, T, heads, D); v is a view of qkv.

    Raises:
        ValueError: if shapes or devices disagree, and on a CPU for a position outside the
            tables. On a GPU, which is not asked, such a token's q, k and gradients are NaN.
        TypeError: for other dtypes, and for a DTensor.
    """
    n_kv_head = n_head if n_kv_head is None else n_kv_head
    path = op.choose("rope_qkv", impl, qkv)
    _check(qkv, cos, sin, n_head, n_kv_head, positions, q_weight, k_weight)
    if path == "inductor":
        return op.run_expression(
            reference.rope_qkv, impl, qkv, cos.detach(), sin.detach(), positions, q_weight,
            k_weight, n_head, n_kv_head, eps,
        )  # fmt: skip
    return _RopeQKV.apply(
        qkv, cos, sin, positions, q_weight, k_weight, n_head, n_kv_head, eps, path == "triton"
    )


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    name = "rope_qkv"
    op.expect_same_device(name, qkv, q_weight=q_weight, k_weight=k_weight)
    op.expect_floating(name, qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    check_tables(name, qkv, cos, sin, positions)
    if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(
            f"{name}: expected n_kv_head to divide n_head, both positive; "
            f"found n_head={n_head}, n_kv_head={n_kv_head}"
        )
    length, size = cos.shape[0], 2 * cos.shape[1]
    width = (n_head + 2 * n_kv_head) * size
    if qkv.dim() != 3 or qkv.shape[2] != width:
        raise ValueError(
            f"{name}: expected qkv (B, T, {width}) for {n_head} + 2 x {n_kv_head} heads of "
            f"{size}; found {tuple(qkv.shape)}"
        )
    if (q_weight is None) is not (k_weight is None):
        raise ValueError(f"{name}: expected both q_weight and k_weight or neither; found one")
    op.expect_shape(name, "q_weight", q_weight, (size,))
    op.expect_shape(name, "k_weight", k_weight, (size,))
    if q_weight is not None and k_weight is not None and q_weight.dtype is not k_weight.dtype:
        raise TypeError(
            f"{name}: expected q_weight and k_weight of one dtype; "
            f"found {q_weight.dtype}, {k_weight.dtype}"
        )
    check_positions(name, positions, qkv.shape[0], qkv.shape[1], length)


def check_tables(
    name: str, like: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> None:
    """Raise for tables or positions on another device than `like`, and for no fp32 tables."""
    op.expect_same_device(name, like, cos=cos, sin=sin, positions=positions)
    if cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        raise TypeError(f"{name}: expected cos and sin of fp32; found {cos.dtype}, {sin.dtype}")
    if cos.dim() != 2 or not cos.shape[1]:
        raise ValueError(f"{name}: expected cos (length, D/2), D > 0; found {tuple(cos.shape)}")
    op.expect_shape(name, "sin", sin, tuple(cos.shape))


def check_positions(name: str, positions: Tensor | None, B: int, T: int, length: int) -> None:
    """Raise for positions of another shape or dtype, and on a CPU for those outside the tables."""
    if positions is None:
        if length < T:
            raise ValueError(f"{name}: expected at most {length} positions (cos); found {T}")
        return
    if positions.dtype is not torch.int64:
        raise TypeError(f"{name}: expected positions of int64; found {positions.dtype}")
    if tuple(positions.shape) not in ((T,), (B, T)):
        raise ValueError(
            f"{name}: expected positions of shape {(T,)} or {(B, T)}; "
            f"found {tuple(positions.shape)}"
        )
    # reading a value would stop a GPU and break a traced graph: there the result is NaN
    readable = type(positions) is Tensor and positions.device.type == "cpu"
    if readable and positions.numel() and not torch.compiler.is_compiling():
        smallest, largest = (int(t) for t in positions.aminmax())
        if smallest < 0 or largest >= length:
            worst = smallest if smallest < 0 else largest
            raise ValueError(
                f"{name}: expected positions from 0 to {length - 1}, cos and sin have {length} "
                f"rows; found {worst}"
            )


def _rope_qkv_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    eps: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (qkv, cos, sin, positions, q_weight, k_weight, n_head, n_kv_head, eps)
    if triton:
        from mypt_fast.kernels.jit import rope as jit

        return jit.rope_forward(*arguments)
    return reference.rope_forward(*arguments)


def _forward_fake(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    n_head: int,
    n_kv_head: int,
    eps: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    (B, T, _), D = qkv.shape, 2 * cos.shape[1]
    q, k = (qkv.new_empty(B, T, heads, D).transpose(1, 2) for heads in (n_head, n_kv_head))
    return q, k


def _rope_qkv_backward(
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
    triton: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (dq, dk, dv, qkv, cos, sin, positions, q_weight, k_weight, eps)
    if triton:
        from mypt_fast.kernels.jit import rope as jit

        return jit.rope_backward(*arguments)
    return reference.rope_backward(*arguments)


def _backward_fake(
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
    triton: bool,
) -> tuple[Tensor, Tensor]:
    B, heads, T, D = dq.shape
    wide = torch.float64 if dq.dtype is torch.float64 and q_weight is not None else torch.float32
    dqkv = dq.new_empty(B, T, (heads + 2 * dk.shape[1]) * D)
    return dqkv, dq.new_empty(0 if q_weight is None else 2, D, dtype=wide)


_forward = op.operator(_rope_qkv_forward, fake=_forward_fake)
_backward = op.operator(_rope_qkv_backward, fake=_backward_fake)


class _RopeQKV(torch.autograd.Function):
    """Around the two operators, because an operator may not return v, a view of its argument."""

    @staticmethod
    def forward(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        n_head: int,
        n_kv_head: int,
        eps: float,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = _forward(
            qkv, cos, sin, positions, q_weight, k_weight, n_head, n_kv_head, eps, triton
        )
        v = reference.split_heads(qkv, n_head, n_kv_head)[2]
        return q, k, v.transpose(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        qkv, cos, sin, positions, q_weight, k_weight, _, _, ctx.eps, ctx.triton = inputs
        kept = qkv if q_weight is not None else None  # a rotation alone does not need its input
        ctx.save_for_backward(kept, cos, sin, positions, q_weight, k_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint hands them out once
        q_weight = saved[4]
        dqkv, dweights = _backward(dq, dk, dv, *saved, ctx.eps, ctx.triton)
        dq_weight = dk_weight = None
        if q_weight is not None:
            dq_weight, dk_weight = dweights.to(q_weight.dtype)
        return dqkv, None, None, None, dq_weight, dk_weight, None, None, None, None
