"""Cross-entropy over rows of logits in plain PyTorch.

Shapes: N rows, V vocabulary. With c = softcap * tanh(logits / softcap) (or the logits), the loss
of a row with target t is

    (1 - s) (lse - c_t) + s (lse - mean c) + z lse^2,   lse = log sum_j exp c_j

for label smoothing s (arXiv 1512.00567) and z-loss z (arXiv 2204.02311).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mypt_fast.kernels import _operator

TILE_ROWS = 64  # on a CPU: 13 MB of fp32 logits of 50,304 columns, worked on while in its cache


@dataclass(frozen=True)
class Rule:
    """What a row's loss is made of; 0 switches a term off."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether this is textbook cross-entropy."""
        return not (self.label_smoothing or self.z_loss or self.softcap)


def row_losses(logits: Tensor, targets: Tensor, rule: Rule) -> Tensor:
    """Loss of each row, (N,), differentiable; fp32, or fp64 for fp64 logits (N, V)."""
    c = _capped(_wide(logits), rule)
    kept, inside, index = _targets(targets, c.shape[1], rule)
    if not (rule.label_smoothing or rule.z_loss):
        # -100 is PyTorch's own: it leaves those rows out, whatever they hold
        safe = index.where(kept, -100)
        return _poisoned(F.cross_entropy(c, safe, reduction="none"), kept, inside)
    c = c.where(kept.unsqueeze(1), 0)
    lse = c.logsumexp(-1)
    target = c.gather(1, index.unsqueeze(1)).squeeze(1)
    s = rule.label_smoothing
    loss = (1 - s) * (lse - target) + s * (lse - c.mean(-1)) + rule.z_loss * lse.square()
    return _poisoned(loss, kept, inside)


def forward(logits: Tensor, targets: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Losses (N,) and statistics (N, 3): peak of c, sum of exp(c - peak), 1 - p of the target."""
    c = _capped(_wide(logits), rule)
    kept, inside, index = _targets(targets, c.shape[1], rule)
    losses, stats = _terms(c, index, rule)
    return _poisoned(losses, kept, inside), torch.stack(stats, 1)


def backward(grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, rule: Rule) -> Tensor:
    """Gradient of the logits, (N, V) in their dtype, for the gradients (N,) of the losses."""
    c = _capped(_wide(logits), rule)
    kept, inside, index = _targets(targets, c.shape[1], rule)
    scale = _poisoned(grad.to(c.dtype), kept, inside)
    gradient = _gradient(c, index, stats.unbind(1), scale, rule)
    return gradient.where(kept.unsqueeze(1), 0).to(logits.dtype)


def step(
    logits: Tensor, targets: Tensor, scale: Tensor | None, rule: Rule, wide: Tensor | None
) -> Tensor:
    """Losses of the rows; their gradients, times `scale`, are written over the logits.

    Worked in tiles of rows that stay in a CPU's cache; `wide` (tile rows, V) is the fp32 buffer
    that 16-bit logits are widened into.
    """
    losses = []
    rows = TILE_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    for i in range(0, len(logits), rows):
        tile, target = logits[i : i + rows], targets[i : i + rows]
        part = None if scale is None else scale[i : i + rows]
        if rule.plain:
            losses.append(_plain_tile(tile, target, part, rule, wide))
        else:
            losses.append(_tile(tile, target, part, rule))
    return torch.cat(losses) if losses else logits.new_zeros(0, dtype=torch.float32)


def _plain_tile(
    tile: Tensor, targets: Tensor, scale: Tensor | None, rule: Rule, wide: Tensor | None
) -> Tensor:
    """Textbook cross-entropy with as few passes over memory as PyTorch offers."""
    kept, inside, index = _targets(targets, tile.shape[1], rule)
    column = index.unsqueeze(1)
    probs = tile if wide is None else wide[: len(tile)].copy_(tile)
    above_target = probs.amax(-1) - probs.gather(1, column).squeeze(1)
    torch.softmax(probs, -1, out=probs)
    # lse - target = (peak - target) - log p_peak: no underflow however unlikely the target
    losses = above_target - probs.amax(-1).log()
    probs.scatter_add_(1, column, probs.new_full((len(tile), 1), -1.0))
    _scale_(probs, scale, kept, inside)
    if probs is not tile:
        tile.copy_(probs)
    return _poisoned(losses, kept, inside)


def _tile(tile: Tensor, targets: Tensor, scale: Tensor | None, rule: Rule) -> Tensor:
    c = _capped(_wide(tile), rule)
    kept, inside, index = _targets(targets, tile.shape[1], rule)
    losses, stats = _terms(c, index, rule)
    grad = _gradient(c, index, stats, torch.ones_like(losses), rule)
    tile.copy_(_scale_(grad, scale, kept, inside))
    return _poisoned(losses, kept, inside)


def _scale_(grad: Tensor, scale: Tensor | None, kept: Tensor, inside: Tensor) -> Tensor:
    """Multiply rows by their factors, in place; ignored rows become 0 even if they hold NaN."""
    factor = torch.ones_like(kept, dtype=grad.dtype) if scale is None else scale.to(grad.dtype)
    factor = _poisoned(factor, kept, inside)
    asks = _operator.is_on_host(grad)  # then it saves passes over the tile
    if not asks or not bool((factor == 1).all()):
        grad.mul_(factor.unsqueeze(1))
    if not asks or not bool(kept.all()):
        grad.masked_fill_(~kept.unsqueeze(1), 0)
    return grad


def step_expression(logits: Tensor, targets: Tensor, scale: Tensor, rule: Rule) -> Tensor:
    """`step` as one expression, for torch.compile to fuse."""
    c = _capped(_wide(logits), rule)
    kept, inside, index = _targets(targets, c.shape[1], rule)
    peak = c.amax(-1)
    exps = (c - peak.unsqueeze(1)).exp()
    total = exps.sum(-1)
    nll = (peak - c.gather(1, index.unsqueeze(1)).squeeze(1)) + total.log()
    losses = _losses(c, nll, peak + total.log(), rule)
    columns = torch.arange(c.shape[1], device=c.device)
    hit = columns.unsqueeze(0) == index.unsqueeze(1)
    s = rule.label_smoothing
    slope = (1 + 2 * rule.z_loss * (peak + total.log())) / total
    grad = exps * slope.unsqueeze(1) - s / c.shape[1] - torch.where(hit, 1 - s, 0.0)
    if rule.softcap:
        grad = grad * (1 - (c / rule.softcap).square())
    grad = grad * _poisoned(scale, kept, inside).unsqueeze(1)
    logits.copy_(grad.where(kept.unsqueeze(1), 0))
    return _poisoned(losses, kept, inside)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _capped(c: Tensor, rule: Rule) -> Tensor:
    return rule.softcap * torch.tanh(c / rule.softcap) if rule.softcap else c


def _targets(targets: Tensor, columns: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, whose target is a column, and an index that is one in any case."""
    kept = targets != rule.ignore_index
    inside = (targets >= 0) & (targets < columns)
    return kept, inside, targets.where(kept & inside, 0)


def _poisoned(rows: Tensor, kept: Tensor, inside: Tensor) -> Tensor:
    """Rows that count, 0 for those that do not, NaN where the target is no column."""
    return rows.where(inside, torch.nan).where(kept, 0)


def _terms(c: Tensor, index: Tensor, rule: Rule) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Losses, and the statistics of `forward`; exact for targets near certainty."""
    column = index.unsqueeze(1)
    target, peak = c.gather(1, column).squeeze(1), c.amax(-1)
    exps = (c - peak.unsqueeze(1)).exp_()
    total = exps.sum(-1)
    others = exps.scatter_(1, column, 0.0).sum(-1)
    nll = torch.where(target == peak, others.log1p(), total.log() + (peak - target))
    return _losses(c, nll, peak + total.log(), rule), (peak, total, others / total)


def _losses(c: Tensor, nll: Tensor, lse: Tensor, rule: Rule) -> Tensor:
    s, loss = rule.label_smoothing, nll
    if s:
        loss = (1 - s) * nll + s * (lse - c.mean(-1))
    return loss + rule.z_loss * lse.square() if rule.z_loss else loss


def _gradient(
    c: Tensor, index: Tensor, stats: tuple[Tensor, ...], scale: Tensor, rule: Rule
) -> Tensor:
    """d(scale * loss) / d logits; the target's column from 1 - p, where p - 1 would cancel."""
    peak, total, miss = stats
    s, V = rule.label_smoothing, c.shape[1]
    slope = 2 * rule.z_loss * (peak + total.log())
    grad = (c - peak.unsqueeze(1)).exp_().mul_(((1 + slope) / total).unsqueeze(1)).sub_(s / V)
    at_target = slope * (1 - miss) - miss + (s - s / V)
    grad.scatter_(1, index.unsqueeze(1), at_target.unsqueeze(1))
    if rule.softcap:
        grad.mul_(1 - (c / rule.softcap).square())
    return grad.mul_(scale.unsqueeze(1))
