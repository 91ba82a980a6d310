"""The state layouts `exact16` and `fast`: which parameter is kept how, and their optimizer.

| layout | matrices of the blocks | embeddings, output matrix | vectors | gradients | moments |
|---|---|---|---|---|---|
| exact16 | bf16 + int16 remainder | fp32 | fp32 | fp32 | fp32 |
| fast | bf16 + int16 remainder | fp32 | fp32 | bf16; of vectors fp32 | 8 bits; of vectors fp32 |

Embeddings and output matrix stay fp32: both halves together take as many bytes, the look-up adds
to an fp32 residual stream, and the head sums its gradient in fp32. Under bf16 autocast the other
layout casts each matrix to bf16 for every forward; here it is bf16 already.

Outside, everything is fp32: `state_dict` of model and optimizer are those of the layout `exact`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mypt_fast.kernels import adamw as op
from mypt_fast.kernels.reference import adamw as bits

SMALLEST_CODED = 4096  # elements; below it 8 bits save nothing


def is_split(name: str, p: Tensor) -> bool:
    """Whether a parameter of this name becomes bf16 and remainder: a matrix of a block."""
    return name.startswith("blocks.") and p.dim() == 2


class Remainders:
    """What the bf16 matrices of a model lack of their fp32 masters.

    Making one turns those matrices to bf16, in place, and lets gradients keep a dtype of their
    own. From then on `model.state_dict()` holds the masters, `load_state_dict` takes them.

    Args:
        model: on its device, in fp32.
        gradient: dtype of the matrices' gradients.
    """

    def __init__(self, model: nn.Module, gradient: torch.dtype) -> None:
        self.of: dict[nn.Parameter, Tensor] = {}
        self._names: dict[str, nn.Parameter] = {}
        for name, p in model.named_parameters():
            if is_split(name, p):
                p.data, self.of[p] = bits.split(p.data)
                self._names[name] = p
            if p.dim() > 1 and p.is_leaf:
                p.grad_dtype = gradient
        # torch marks what it is given, which a bound method does not let it
        model.register_state_dict_post_hook(functools.partial(self._masters))
        model.register_load_state_dict_pre_hook(functools.partial(self._take))

    @torch.no_grad()
    def _masters(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Put fp32 masters into a state dict; a GPU's on the host, where there is room."""
        for name, p in self._names.items():
            if prefix + name in state:
                state[prefix + name] = bits.merge(p.detach().cpu(), self.of[p].cpu())

    @torch.no_grad()
    def _take(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Split the masters of a state dict, which then loads as ever; checks are the loader's."""
        for name, p in self._names.items():
            master = state.get(prefix + name)
            if isinstance(master, Tensor) and master.shape == p.shape:
                high, rest = bits.split(master.detach().float())
                state[prefix + name] = high
                self.of[p].copy_(rest)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW over split weights and, if asked, 8-bit moments.

    Equal to `torch.optim.AdamW(fused=True)` bit for bit on equal fp32 gradients, without 8-bit
    moments. Clipping is part of the step: `clip` only measures.

    Args:
        groups: as `torch.optim.AdamW` takes them.
        remainders: of the split parameters.
        coded: whether moments of matrices are 8-bit codes.
        lr, betas, eps, weight_decay: as of AdamW.
        impl: of `kernels.adamw.adamw_step`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        remainders: dict[nn.Parameter, Tensor],
        coded: bool,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        impl: str = "auto",
    ) -> None:
        # the rest of AdamW's settings, so that its state dicts and these are the same
        rest = {
            "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
            "differentiable": False, "fused": True, "decoupled_weight_decay": True,
        }  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **rest}
        super().__init__(groups, defaults)
        self.remainders, self.coded, self.impl = remainders, coded, impl
        self._scale: Tensor | None = None  # of the gradients at hand

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Return the norm of the gradients, 0-d fp32 on the device; the step scales them by it.

        As `nn.utils.clip_grad_norm_`, which scales at once.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms), 2.0)
        self._scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every optimizer; what `clip` found goes with the gradients."""
        self._scale = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step with the gradients at hand, scaled as `clip` found."""
        if closure is not None:
            raise ValueError("SplitAdamW takes no closure")
        for group in self.param_groups:
            slots = [self._slot(p) for p in group["params"] if p.grad is not None]
            op.adamw_step(
                slots, lr=float(group["lr"]), betas=tuple(group["betas"]), eps=group["eps"],
                weight_decay=group["weight_decay"], scale=self._scale, impl=self.impl,
            )  # fmt: skip
        self._scale = None

    def _slot(self, p: nn.Parameter) -> op.Slot:
        state, g = self.state[p], p.grad
        assert g is not None
        if not state:
            zeros = functools.partial(torch.zeros, device=p.device, dtype=torch.float32)
            self._keep(p, zeros(()), zeros(p.shape), zeros(p.shape))
        scales = None
        if "first_scales" in state:
            scales = (state["first_scales"], state["second_scales"])
        return op.Slot(
            p, g.contiguous(), state["exp_avg"], state["exp_avg_sq"], state["step"],
            self.remainders.get(p), scales,
        )  # fmt: skip

    def _keep(self, p: nn.Parameter, count: Tensor, m: Tensor, v: Tensor) -> None:
        """Keep fp32 moments of a parameter the way this layout does."""
        state = self.state[p]
        state["step"] = count
        if self.coded and p.dim() > 1 and p.numel() >= SMALLEST_CODED:
            state["exp_avg"], state["first_scales"] = bits.encode_first(m)
            state["exp_avg_sq"], state["second_scales"] = bits.encode_second(v)
        else:
            state["exp_avg"], state["exp_avg_sq"] = m, v

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state of `torch.optim.AdamW`: fp32 moments. Loading it brings back every code."""
        content = super().state_dict()
        for index, state in content["state"].items():
            if "first_scales" in state:
                content["state"][index] = {
                    "step": state["step"],
                    "exp_avg": bits.decode_first(*_host(state["exp_avg"], state["first_scales"])),
                    "exp_avg_sq": bits.decode_second(
                        *_host(state["exp_avg_sq"], state["second_scales"])
                    ),
                }
        return content

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of `torch.optim.AdamW` or of this class.

        Raises:
            ValueError, KeyError: if it is of other parameters; nothing has changed then.
        """
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the parameter groups are of other sizes")
        found: list[tuple[nn.Parameter, list[Tensor]]] = []
        for ours, theirs in zip(self.param_groups, saved, strict=True):
            for p, index in zip(ours["params"], theirs["params"], strict=True):
                state = state_dict["state"].get(index)
                if state:
                    found.append((p, self._checked(p, state)))
        self.state.clear()
        for ours, theirs in zip(self.param_groups, saved, strict=True):
            ours.update({k: v for k, v in theirs.items() if k != "params"})
        for p, values in found:
            count, m, v = (t.to(p.device, torch.float32, copy=True) for t in values)
            self._keep(p, count, m, v)

    @staticmethod
    def _checked(p: nn.Parameter, state: dict[str, Any]) -> list[Tensor]:
        count = torch.as_tensor(state["step"], dtype=torch.float32)
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        if any(m.shape != p.shape for m in moments):
            raise ValueError(f"moments of {list(moments[0].shape)} for {list(p.shape)}")
        return [count.reshape(()), *moments]


def _host(*tensors: Tensor) -> list[Tensor]:
    return [t.cpu() for t in tensors]
