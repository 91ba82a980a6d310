"""Cross-entropy on logits that exist; training uses `linear_cross_entropy`, which makes none."""

from typing import Any

import torch
from torch import Tensor

from mypt_fast.kernels import _operator
from mypt_fast.kernels.reference import cross_entropy as reference
from mypt_fast.kernels.reference.cross_entropy import Rule

REDUCTIONS = ("mean", "sum", "none")


def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rule = Rule(ignore_index, label_smoothing, z_loss, softcap)
    return _implementation(triton).forward(logits, targets, rule)


def _fake(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    N = logits.shape[0]
    return logits.new_empty(N, dtype=wide), logits.new_empty(N, 3, dtype=wide)


def _cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, triton: bool,
) -> Tensor:  # fmt: skip
    rule = Rule(ignore_index, label_smoothing, z_loss, softcap)
    return _implementation(triton).backward(grad, logits, targets, stats, rule)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.options = inputs[2:]


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 6


def _implementation(triton: bool) -> Any:
    if not triton:
        return reference
    from mypt_fast.kernels.jit import cross_entropy as jit

    return jit


backward = _operator.operator(
    _cross_entropy_backward,
    fake=lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
forward = _operator.operator(_cross_entropy, fake=_fake, setup_context=_setup, backward=_gradient)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    denom: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of rows of logits, in fp32 whatever their dtype.

    Args:
        logits: (N, V); their gradient is made in the backward, in one pass.
        targets: (N,) int64. Out of range: ValueError on a CPU in eager mode, else a NaN loss:
            looking would stall a GPU, and break a traced graph.
        ignore_index: rows with this target count nothing.
        token_weight: (N,) factor of each row's loss.
        denom: what "mean" divides by, a number or 0-d tensor; None: the weights of the kept rows;
            0 counts as 1.
        label_smoothing: share of the target spread over all columns (arXiv 1512.00567).
        z_loss: factor of the squared log-sum-exp (arXiv 2204.02311).
        softcap: logits become softcap * tanh(logits / softcap) (arXiv 2408.00118).
        reduction: "mean", "sum" or "none". Nothing kept: 0, not NaN.
        impl: see `choose`.

    Returns:
        fp32 (fp64 for fp64 logits) scalar, or (N,) for "none".

    Raises:
        ValueError, TypeError: for arguments that do not fit each other.
    """
    name = "cross_entropy"
    path = _operator.choose(name, impl, logits, saves_memory=True)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"{name}: expected logits of shape (N, V), V > 0; found {tuple(logits.shape)}"
        )
    rule = check_rule(name, ignore_index, label_smoothing, z_loss, softcap, reduction)
    _operator.expect_floating(name, logits=logits)
    check_rows(name, logits, targets, token_weight, denom, logits.shape, rule)
    weight = kept_weight(logits, targets, token_weight, rule)
    if path == "inductor":
        losses = _operator.run_expression(reference.row_losses, impl, logits, targets, rule)
    else:
        options = (ignore_index, label_smoothing, z_loss, rule.softcap, path == "triton")
        losses = forward(logits, targets, *options)[0]
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    return losses.sum() / (divisor(targets, weight, denom, rule) if reduction == "mean" else 1)


def kept_weight(
    x: Tensor, targets: Tensor, token_weight: Tensor | None, rule: Rule
) -> Tensor | None:
    """The weights in the dtype of the losses; 0 for ignored rows, whatever they hold."""
    if token_weight is None:
        return None
    wide = torch.promote_types(x.dtype, torch.float32)
    return token_weight.to(wide).where(targets != rule.ignore_index, 0)


def divisor(
    targets: Tensor, weight: Tensor | None, denom: Tensor | float | None, rule: Rule
) -> Tensor | float:
    """What a mean divides by: `denom`, else the kept weights; 1 where that is 0."""
    if denom is None:
        denom = ((targets != rule.ignore_index).float() if weight is None else weight).sum()
    if not isinstance(denom, Tensor):
        return float(denom) or 1.0
    return denom.to(torch.promote_types(denom.dtype, torch.float32)).where(denom != 0, 1)


def check_rule(
    name: str, ignore_index: int, smoothing: float, z_loss: float, softcap: float | None,
    reduction: str,
) -> Rule:  # fmt: skip
    """Return the options as a `Rule`; raises ValueError for one out of range."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"{name}: expected 0 <= label_smoothing < 1; found {smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{name}: expected z_loss >= 0; found {z_loss}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{name}: expected softcap > 0 or None; found {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: expected reduction to be one of {', '.join(REDUCTIONS)}; found {reduction!r}"
        )
    return Rule(ignore_index, float(smoothing), float(z_loss), float(softcap or 0))


def check_rows(
    name: str, x: Tensor, targets: Tensor, token_weight: Tensor | None,
    denom: Tensor | float | None, shape: tuple[int, ...], rule: Rule,
) -> None:  # fmt: skip
    """Check what every row has: a target within `shape[1]` columns, perhaps a weight."""
    N, V = shape
    _operator.expect_tensors(name, targets=targets)
    _operator.expect_same_device(name, x, targets=targets, token_weight=token_weight)
    _operator.expect_floating(name, token_weight=token_weight)
    if targets.dtype is not torch.int64:
        raise TypeError(f"{name}: expected targets of int64; found {targets.dtype}")
    _operator.expect_shape(name, "targets", targets, (N,))
    _operator.expect_shape(name, "token_weight", token_weight, (N,))
    if isinstance(denom, Tensor):
        _operator.expect_same_device(name, x, denom=denom)
        _operator.expect_shape(name, "denom", denom, ())
    elif denom is not None and not isinstance(denom, (int, float)):
        raise TypeError(
            f"{name}: expected denom to be a number or a 0-d tensor; found {type(denom).__name__}"
        )
    readable = type(targets) is Tensor and _operator.is_on_host(targets)
    if readable and not torch.compiler.is_compiling() and N:
        kept = targets[targets != rule.ignore_index]
        wrong = kept[(kept < 0) | (kept >= V)]
        if len(wrong):
            raise ValueError(
                f"{name}: expected targets in 0..{V - 1} or {rule.ignore_index}; "
                f"found {int(wrong[0])}"
            )
