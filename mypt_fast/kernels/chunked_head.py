"""The chunk loop of the head: one buffer of logits, written over again and again.

Shapes: N rows, C width, V vocabulary. Per chunk: logits = x W^T + b; the row step writes
softmax - one_hot over them; then dx = dlogits W and dW += dlogits^T x.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from mypt_fast.kernels.reference import cross_entropy as reference
from mypt_fast.kernels.reference.cross_entropy import Rule

# The one buffer of logits. Plain PyTorch holds three arrays of N x V (1.6 GB each at 32 x 256 rows
# of 50,304), and on a CPU faults their pages in anew each step. On a GPU a chunk must be tall
# enough that reading and writing dW, 8 V C bytes a chunk, hides behind its matmuls.
CPU_BUDGET_BYTES = 56 << 20
GPU_BUDGET_BYTES = 512 << 20
GPU_CHUNK_ROWS = 2048
MIN_CHUNK_ROWS = 64
ALIGNMENT = 64  # columns: rows of logits start where a GPU loads 16 bytes at once


def chunk_rows(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    cpu: bool,
    budget: int | None,
    most: int | None = None,
) -> int:
    """Rows of logits at a time: chunks of equal size, of `most` rows or of `budget` bytes.

    The default budget is 56 MiB on a CPU and 512 MiB, at most 2048 rows, on a GPU.
    """
    padded = -(-vocab // ALIGNMENT) * ALIGNMENT
    limit = budget or (CPU_BUDGET_BYTES if cpu else GPU_BUDGET_BYTES)
    fitting = max(MIN_CHUNK_ROWS, limit // (dtype.itemsize * padded))
    if not (budget or cpu):
        fitting = min(fitting, GPU_CHUNK_ROWS)
    chunks = max(1, -(-rows // (most or fitting)))
    return max(1, -(-rows // chunks))


class Head:
    """The chunk loop: what the forward, and the backward of single rows, have in common.

    Args:
        x: (N, C); weight: (V, C); bias: (V,) or None; targets: (N,).
        scale: (N,) fp32 factor of each row's gradient, in [-1, 1], or None for 1.
        dtype: of the matmuls.
        path: "triton", "reference" or "compiled": what works on a chunk of logits.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        scale: Tensor | None, rule: Rule, dtype: torch.dtype, rows: int, path: str,
    ) -> None:  # fmt: skip
        self.low, self.w = x.to(dtype), weight.to(dtype)
        self.b = bias.to(dtype) if bias is not None else None
        self.targets, self.scale, self.rule, self.path = targets, scale, rule, path
        self.rows, self.dtype = rows, dtype
        self.shape = (x.shape[0], weight.shape[0], x.shape[1])
        self.sum_dtype = torch.float64 if dtype is torch.float64 else torch.float32

    def run(
        self, need_x: bool, need_w: bool, need_b: bool, dw: Tensor | None = None
    ) -> list[Tensor]:
        """Losses (N,), and the gradients asked for (else of no elements): dx, dW, db.

        dx has the dtype of the matmuls, dW and db fp32. A given `dw` is added to.
        """
        (N, V, C), device = self.shape, self.low.device
        first = dw is None
        dx = torch.empty((N, C) if need_x else 0, dtype=self.dtype, device=device)
        if dw is None:
            make = torch.empty if N else torch.zeros
            dw = make((V, C) if need_w else 0, dtype=self.sum_dtype, device=device)
        db = torch.zeros(V if need_b else 0, dtype=self.sum_dtype, device=device)
        losses = torch.empty(N, dtype=self.sum_dtype, device=device)
        self._allocate(min(self.rows, N), need_w)
        for i in range(0, N, self.rows):
            part = slice(i, i + self.rows)
            x, logits = self.low[part], self.buffer[: min(self.rows, N - i), :V]
            if self.b is None:
                torch.mm(x, self.w.T, out=logits)
            else:
                torch.addmm(self.b, x, self.w.T, out=logits)
            losses[part] = self._step(logits, part, need_x or need_w or need_b)
            if need_b:
                self._add_column_sums(db, logits)
            if need_x:
                torch.mm(logits, self.w, out=dx[part])
            if need_w:
                self._add_product(dw, logits.T, x, first and i == 0)
        return [losses, dx, dw, db]

    def _allocate(self, rows: int, need_w: bool) -> None:
        """Make once what every chunk writes over: on a CPU fresh memory costs its page faults."""
        _, V, C = self.shape
        device, cpu = self.low.device, self.low.device.type == "cpu"
        padded = -(-V // ALIGNMENT) * ALIGNMENT
        self.buffer = torch.empty(rows, padded, dtype=self.dtype, device=device)
        self.wide = self.product = None
        if self.dtype in (torch.float16, torch.bfloat16):
            if self.path == "reference":
                tile = min(rows, reference.TILE_ROWS) if cpu else rows
                self.wide = torch.empty(tile, V, dtype=torch.float32, device=device)
            if cpu and need_w and self.dtype is torch.bfloat16:
                self.product = torch.empty(V, C, dtype=self.dtype, device=device)

    def _step(self, logits: Tensor, part: slice, gradient: bool) -> Tensor:
        """Losses of a chunk; its logits become their gradients, if wanted at all."""
        targets = self.targets[part]
        scale = None if self.scale is None else self.scale[part]
        if not gradient and self.path != "triton":
            return reference.row_losses(logits, targets, self.rule)
        if self.path == "triton":
            from mypt_fast.kernels.jit import cross_entropy as jit

            if gradient:
                return jit.step(logits, targets, scale, self.rule)
            return jit.forward(logits, targets, self.rule)[0]
        if self.path == "compiled":
            if scale is None:
                scale = torch.ones(len(logits), dtype=torch.float32, device=logits.device)
            return _compiled_step()(logits, targets, scale, self.rule)
        return reference.step(logits, targets, scale, self.rule, self.wide)

    def _add_column_sums(self, total: Tensor, logits: Tensor) -> None:
        if self.product is not None:
            # on a CPU a sum in another dtype makes a copy first; a product sums in fp32 inside
            total += torch.mv(logits.T, self.low.new_ones(len(logits)))
        else:
            total += logits.sum(0, dtype=self.sum_dtype)

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        """Set `total` to a b at first, add it later, summed in fp32."""
        if self.product is not None:
            product = torch.mm(a, b, out=self.product)
            total.copy_(product) if first else total.add_(product)
        elif self.dtype is torch.float16 and not total.is_cuda:
            # no instructions for it, and a product rounded to fp16 would lose what fp32 sums keep
            if first:
                total.zero_()
            for i in range(0, len(b), reference.TILE_ROWS):
                tile = slice(i, i + reference.TILE_ROWS)
                total.addmm_(a[:, tile].float(), b[tile].float())
        elif total.dtype is self.dtype:
            torch.mm(a, b, out=total) if first else total.addmm_(a, b)
        elif first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@functools.cache
def _compiled_step() -> Any:
    return torch.compile(reference.step_expression, fullgraph=True)
