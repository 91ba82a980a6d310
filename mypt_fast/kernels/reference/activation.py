"""SwiGLU and GELU, alone and between two matmuls, in plain PyTorch.

The expressions are what a CPU runs and what torch.compile fuses; autograd makes their gradients.
The formulas below them have the signatures of the Triton launchers. F is the hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Weight = Tensor | tuple[Tensor, Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202); both (..., F).

    Of 16-bit tensors silu is rounded to 16 bits on the way: on a CPU, forward and backward take
    2/3 of the time that they take in fp32 with conversions at both ends (measured in bf16).
    """
    return F.silu(gate) * up


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """The same for gate_up: (..., 2F), halves [gate | up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return swiglu(gate, up)


def swiglu_mlp(x: Tensor, w_gate_up: Weight, w_down: Tensor) -> Tensor:
    """w_down (silu(w_gate x) * (w_up x)); a pair of weights is not packed, which would copy it."""
    if isinstance(w_gate_up, Tensor):
        h = swiglu_packed(F.linear(x, w_gate_up))
    else:
        w_gate, w_up = w_gate_up
        h = swiglu(F.linear(x, w_gate), F.linear(x, w_up))
    return F.linear(h, w_down)


def gelu_mlp(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None
) -> Tensor:
    """w_down gelu(w_up x + b_up) + b_down with the exact GELU (arXiv 1606.08415)."""
    return F.linear(F.gelu(F.linear(x, w_up, b_up)), w_down, b_down)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """Return h (N, F) = silu(gate) * up of gate_up (N, 2F), rounded once."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(_wide(gate)).mul_(up).to(gate_up.dtype)


def swiglu_backward(
    dh: Tensor, gate_up: Tensor, h: Tensor | None = None, dgate_up: Tensor | None = None
) -> Tensor:
    """Gradient of `swiglu_forward`, (N, 2F).

    Args:
        dh: (N, F).
        gate_up: (N, 2F).
        h: recreated into this, if given; may be `dh` itself.
        dgate_up: where the gradient goes; may be `gate_up` itself.
    """
    gate, up = gate_up.chunk(2, dim=1)
    recreated = swiglu_forward(gate_up) if h is not None else None
    g, d = _wide(gate), _wide(dh)
    dup = F.silu(g).mul_(d)
    dgate = torch.ops.aten.silu_backward(d * up, g)
    out = torch.empty_like(gate_up) if dgate_up is None else dgate_up
    hidden = out.shape[1] // 2
    out[:, :hidden] = dgate
    out[:, hidden:] = dup
    if h is not None and recreated is not None:
        h.copy_(recreated)
    return out


def gelu_forward(up: Tensor) -> Tensor:
    """Return h = up * Phi(up), (N, F), rounded once."""
    return F.gelu(_wide(up)).to(up.dtype)


def gelu_backward(
    dh: Tensor, up: Tensor, h: Tensor | None = None, dup: Tensor | None = None
) -> Tensor:
    """Gradient dh * (Phi(up) + up * phi(up)) of `gelu_forward`; arguments as `swiglu_backward`."""
    recreated = gelu_forward(up) if h is not None else None
    gradient = torch.ops.aten.gelu_backward(_wide(dh), _wide(up))
    out = gradient.to(up.dtype) if dup is None else dup.copy_(gradient)
    if h is not None and recreated is not None:
        h.copy_(recreated)
    return out


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
