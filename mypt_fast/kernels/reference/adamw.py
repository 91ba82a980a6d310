"""AdamW over split weights and 8-bit moments: bits, codes and the plain step.

Split: an fp32 master weight is a bf16 weight, rounded to nearest, and a signed 16-bit remainder,
`master_bits = (bf16_bits << 16) + remainder`. Ties go away from zero: with ties to even a bf16 of
even bits would stand for 65,537 masters, one more than 16 bits can tell apart.

Codes: blocks of `BLOCK` elements share an fp32 scale, their largest magnitude. The first moment is
sign and square root in 127 steps, the second a fourth root in 255 steps, where what is above zero
stays above zero: a zero under the square root would make the update huge. Codes that are decoded
and encoded again come out the same, bit for bit.
"""

import torch
from torch import Tensor

BLOCK = 256
SMALLEST_SCALE = 1e-30  # below it the smallest codes would leave fp32's range: the block is zero
LARGEST = torch.finfo(torch.float32).max


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bf16 weight and the int16 remainder of an fp32 tensor, of its shape.

    Every value but NaN comes back from `merge` bit for bit; a NaN comes back as some NaN.
    """
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    rest = bits - (high << 16)
    nan = master.isnan()
    high = torch.where(nan, (bits >> 16) | 0x40, high)
    rest = rest.masked_fill(nan, 0)
    return high.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def merge(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 master of a bf16 weight and its int16 remainder."""
    high = weight.contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder).view(torch.float32)


def blocks(x: Tensor) -> Tensor:
    """(n,) elements as (ceil(n / BLOCK), BLOCK), zeros behind the last."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def encode_first(m: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 of the shape of `m`, and scales, (blocks,) fp32, of a first moment."""
    ratio, scales = _ratios(m.abs())
    codes = torch.floor(127.0 * ratio.sqrt() + 0.5).view(-1)[: m.numel()].view(m.shape)
    return torch.where(m < 0, -codes, codes).to(torch.int8), scales


def encode_second(v: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of the shape of `v`, and scales, (blocks,) fp32, of a second moment."""
    ratio, scales = _ratios(v)
    codes = torch.floor(255.0 * ratio.sqrt().sqrt() + 0.5)
    codes = torch.where((blocks(v) > 0) & (scales > 0)[:, None], codes.clamp(min=1), codes)
    return codes.view(-1)[: v.numel()].view(v.shape).to(torch.uint8), scales


def _ratios(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every element as a share of its block's largest, and these."""
    rows = blocks(x).clamp(max=LARGEST)
    scales = rows.amax(1)
    scales = torch.where(scales < SMALLEST_SCALE, torch.zeros_like(scales), scales)
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.where(scales[:, None] > 0, rows / divisor[:, None], 0.0), scales


def decode_first(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 first moment of codes, of their shape."""
    share = codes.to(torch.float32) / 127.0
    return share * share.abs() * _spread(scales, codes)


def decode_second(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 second moment of codes, of their shape."""
    share = codes.to(torch.float32) / 255.0
    square = share * share
    return square * square * _spread(scales, codes)


def _spread(scales: Tensor, like: Tensor) -> Tensor:
    return scales.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def step(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    *,
    remainder: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    scale: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of one tensor, in place: PyTorch's fused kernel on its fp32 form.

    With fp32 moments the result is that of PyTorch's kernel on an fp32 weight, bit for bit, on
    every device. Arguments as of `kernels.adamw.adamw_step`.
    """
    master = weight if remainder is None else merge(weight, remainder)
    g = gradient.to(torch.float32)
    if scale is not None:
        g = g * scale
    m, v = (first, second) if scales is None else (
        decode_first(first, scales[0]), decode_second(second, scales[1])
    )  # fmt: skip
    count += 1
    torch._fused_adamw_(
        [master], [g], [m], [v], [], [count], lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if remainder is not None:
        high, rest = split(master)
        weight.copy_(high)
        remainder.copy_(rest)
    if scales is not None:
        for target, of_target, encoded in (
            (first, scales[0], encode_first(m)), (second, scales[1], encode_second(v)),
        ):  # fmt: skip
            target.copy_(encoded[0])
            of_target.copy_(encoded[1])
