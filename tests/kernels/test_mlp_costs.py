"""What the feed-forwards cost: memory kept and at worst, FLOPs, GEMMs under a checkpoint."""

import functools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from mypt_fast.kernels import mlp
from tests.kernels import oracle
from tests.kernels.test_mlp import BOTH, FUNCTIONS, OPERATOR_ONLY, SAVES, tensors


@BOTH
@pytest.mark.parametrize("save", SAVES)
def test_what_autograd_keeps(way, name, save):
    """Exactly x, then the up-projection, then h; and the weights, of which no bias but one."""
    T, C, H = 10, 24, 40
    inputs, _ = tensors(name, T // 2, C, H, torch.float32, way.device)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel() * t.element_size()), t)[1], lambda t: t
    ):
        FUNCTIONS[name][0](*leaves, save=save, impl=way.impl)
    K = 2 * H if name == "swiglu" else H
    activations = T * C + T * K * (save != "input") + T * H * (save == "all")
    weights = K * C + C * H + (H if name == "gelu" and save == "input" else 0)
    assert sum(kept) == 4 * (activations + weights)


class LiveBytes(TorchDispatchMode):
    """The most memory that results made inside have held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_leaves(args) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            storage = t.untyped_storage()
            if id(storage) not in known | self.known:
                self.known.add(id(storage))
                self.add(storage.nbytes())
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.add(-size)

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@BOTH
@pytest.mark.parametrize("save", SAVES)
def test_memory_at_its_worst(monkeypatch, name, save):
    """In (T, F) tensors: backward 3 for SwiGLU, 2 for GELU, besides what was saved.

    With stand-ins for the kernels that allocate what the launchers allocate, and compute nothing.
    """
    T, C, H = 5000, 100, 500
    K = 2 * H if name == "swiglu" else H

    def backward(dh: Tensor, pre: Tensor, h: Tensor | None, dpre: Tensor | None) -> Tensor:
        return torch.empty_like(pre) if dpre is None else dpre

    def forward(pre: Tensor) -> Tensor:
        return pre.new_empty(T, H)

    launchers = SimpleNamespace(**{f"{name}_forward": forward, f"{name}_backward": backward})
    monkeypatch.setattr(mlp, "formulas", lambda triton: launchers)
    x, w_in, w_down = torch.ones(T, C), torch.ones(K, C), torch.ones(C, H)
    with LiveBytes() as memory:
        _, pre, h = mlp._mlp(x, w_in, None, w_down, None, name, save, True)
    hidden = 4 * T * H
    # with save="input", the up-projection is gone before y (T, C) comes
    assert round(memory.peak / hidden, 1) == K / H + 1 + (C / H if save != "input" else 0)
    needs = [True, True, False, True, False]
    with LiveBytes() as memory:
        mlp._mlp_backward(x, x, w_in, None, w_down, pre, h, name, save, needs, True)
    assert round(memory.peak / hidden, 1) == K / H + 1


@BOTH
@pytest.mark.parametrize("save", SAVES)
def test_flops(way, name, save):
    """The counter sees 3 (GELU: 2) GEMMs of T x C x F forward, twice that backward, and replays."""
    T, C, H = 6, 8, 20
    inputs, dy = tensors(name, T // 2, C, H, torch.float32, way.device)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    gemm = 2 * T * C * H
    up, down = (2 if name == "swiglu" else 1), 1
    with FlopCounterMode(display=False) as counter:
        y = FUNCTIONS[name][0](*leaves, save=save, impl=way.impl)
    assert counter.get_total_flops() == gemm * (up + down)
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    replay = up if save == "input" else 0
    assert counter.get_total_flops() == gemm * (2 * (up + down) + replay)


def test_flops_of_the_operator_are_those_of_its_gemms(way):
    """Also where some gradients are not wanted: compared with the GEMMs that really run."""
    if way.impl == "triton":
        pytest.skip(OPERATOR_ONLY)
    x, w_in, w_down, dy = (torch.randn(*s) for s in ((6, 8), (40, 8), (8, 20), (6, 8)))
    h, pre = torch.randn(6, 20), torch.randn(6, 40)
    for save in SAVES:
        for bits in range(16):
            needs = [*(bool(bits >> i & 1) for i in range(4)), False]
            args = (dy, x, w_in, None, w_down, pre, h, "swiglu", save, needs, False)
            with FlopCounterMode(display=False) as inside:
                mlp._mlp_backward(*args)
            with FlopCounterMode(display=False) as counted:
                torch.ops.mypt_fast.mlp_backward(*args)
            assert counted.get_total_flops() == inside.get_total_flops()


@BOTH
@pytest.mark.parametrize("policy", ["MUST_SAVE", "PREFER_RECOMPUTE"])
def test_selective_checkpointing_recognises_the_operator(way, monkeypatch, name, policy):
    inputs, dy = tensors(name, 3, 8, 12, torch.float32, way.device)
    ours, eager = FUNCTIONS[name]
    ran = []
    linear = mlp._linear
    monkeypatch.setattr(mlp, "_linear", lambda *a: (ran.append(1), linear(*a))[1])

    def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        found = op is torch.ops.mypt_fast.mlp.default
        return CheckpointPolicy[policy if found else "PREFER_RECOMPUTE"]

    contexts = functools.partial(create_selective_checkpoint_contexts, decide)

    def step(*leaves: Tensor) -> Tensor:
        def branch(*t: Tensor) -> Tensor:
            return ours(*t, impl=way.impl).sin()  # so that something after it is recomputed

        return checkpoint(branch, *leaves, use_reentrant=False, context_fn=contexts)

    found = oracle.run(step, inputs, [dy])
    assert len(ran) == (2 if policy == "MUST_SAVE" else 4)  # two GEMMs a run
    want = oracle.run(lambda *t: eager(*t).sin(), inputs, [dy])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
