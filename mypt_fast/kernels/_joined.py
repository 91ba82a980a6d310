"""A norm of the residual stream and what reads it, as one operator: the parts they share.

Autograd keeps the output of a norm for the matmul that reads it, a 16-bit copy of every fp32
weight, and dropout's masks. `norm_qkv` and `norm_mlp` keep h, the residual stream, and the weights
as they are stored; their backward makes the norm, the casts and the mask again, which costs memory
traffic and no matmul.

Shapes: N tokens as (B, T), C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mypt_fast.kernels import _operator as op
from mypt_fast.kernels import norm as norms

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm as the operators take it.

    Attributes:
        weight: (C,).
        bias: (C,) of a LayerNorm, or None.
        eps: added to the variance, or to the mean square.
        center: whether it is a LayerNorm; else an RMSNorm.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    center: bool


@dataclass(frozen=True)
class Join:
    """What is normalised: h = residual + dropout(branch).

    Attributes:
        branch: (B, T, C), or None: h is the residual stream.
        residual: (B, T, C).
        p: probability to drop an element of the branch.
        seed: 0-d int64 of the mask; needed where p > 0 and there is a branch.
    """

    branch: Tensor | None
    residual: Tensor
    p: float = 0.0
    seed: Tensor | None = None


def checked(
    name: str, join: Join, norm: Norm, weights: dict[str, Tensor | None], impl: str
) -> tuple[bool, torch.dtype, Tensor | None]:
    """Whether Triton runs it, the dtype of the matmuls, and the seed where one is used.

    Of the weights only the first one's shape is checked, which gives the others theirs: (K, C).
    """
    x = join.residual
    dtype = op.autocast_dtype(x)
    path = op.choose(name, impl, x, dtype=dtype, saves_memory=True)
    if impl == "inductor":
        raise ValueError(f"{name}: impl='inductor' keeps what this makes again; use another impl")
    tensors = {"branch": join.branch, "norm.weight": norm.weight, "norm.bias": norm.bias}
    op.expect_floating(name, residual=x, **tensors, **weights)
    op.expect_same_device(name, x, **tensors, **weights)
    if x.dim() < 2:
        raise ValueError(f"{name}: expected residual (B, T, C); found {tuple(x.shape)}")
    op.expect_shape(name, "branch", join.branch, tuple(x.shape))
    op.expect_shape(name, "norm.weight", norm.weight, (x.shape[-1],))
    op.expect_shape(name, "norm.bias", norm.bias, (x.shape[-1],))
    expect_matrix(name, *next(iter(weights.items())), x.shape[-1])
    if join.branch is None or not join.p:
        return path == "triton", dtype, None
    return path == "triton", dtype, norms._checked_seed(name, x, join.p, join.seed)


def expect_matrix(name: str, argument: str, weight: Tensor | None, columns: int) -> None:
    """Raise ValueError unless the weight is a matrix of `columns` columns."""
    if weight is None or weight.dim() != 2 or weight.shape[1] != columns:
        found = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{name}: expected {argument} of shape (K, {columns}); found {found}")


def normed(
    branch: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor | None,
    seed: Tensor | None, eps: float, center: bool, p: float, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The norm's output, h (empty without a branch) and the statistics."""
    x, old = (residual, None) if branch is None else (branch, residual)
    p = 0.0 if seed is None else p
    return norms._norm(x, old, weight, bias, seed, eps, 0.0, center, p, dtype, triton)


def norm_gradients(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor | None,
    statistics: Pair, seed: Tensor | None, center: bool, p: float,
    branch_dtype: torch.dtype | None, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d branch, d residual, d weight, d bias), empty where there is none.

    That of the branch is empty, too, where it is that of the residual stream: see `shared`.
    """
    apart = _apart(h, seed, branch_dtype)
    p = 0.0 if seed is None else p
    dresidual, dbranch, dweight, dbias = norms._norm_backward(
        dy, dh, h, weight, *statistics, seed, 0.0, center, p, branch_dtype if apart else None,
        bias.dtype if bias is not None else None, triton,
    )  # fmt: skip
    return dbranch, dresidual, dweight, dbias


def _apart(h: Tensor, seed: Tensor | None, branch_dtype: torch.dtype | None) -> bool:
    """Whether the branch's gradient is not that of the stream itself."""
    return branch_dtype is not None and (seed is not None or branch_dtype is not h.dtype)


def norm_like(
    h: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None,
    branch_dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """Empty results of `norm_gradients`."""
    apart = _apart(h, seed, branch_dtype)
    dbranch = h.new_empty(h.shape if apart else 0, dtype=branch_dtype or h.dtype)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return [dbranch, h.new_empty(h.shape), torch.empty_like(weight), dbias]


def shared(
    grads: Sequence[Tensor], branch_dtype: torch.dtype | None, inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients that exist, with the one that branch and residual stream have in common.

    An operator may not return a tensor twice.
    """
    dbranch, dresidual, *rest = grads
    own = dbranch if dbranch.numel() else dresidual
    kept = [None if t is None else g for g, t in zip(rest, inputs, strict=True)]
    return [None if branch_dtype is None else own, dresidual, *kept]


def low(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def gradient_like(dtype: torch.dtype, h: Tensor, *weights: Tensor | None) -> list[Tensor]:
    """Empty gradients of a matmul's weights, of no elements where there is none."""
    return [h.new_empty(0 if w is None else w.shape, dtype=dtype) for w in weights]
