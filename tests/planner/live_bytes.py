"""Bytes of live tensors of a real training step on a CPU, seen from below autograd."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mypt_fast.config import TrainConfig
from mypt_fast.kernels import _operator
from mypt_fast.model import GPT
from mypt_fast.training.device import Precision
from mypt_fast.training.optim import clip, make_optimizer


class LiveBytes(TorchDispatchMode):
    """Counts every storage from the call that makes it until it is freed."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def tracked_step(cfg, *, bf16, policy="none", layout="exact", micro_steps=1, monkeypatch):
    """(bytes of weights and moments, peak bytes) of the second step of a model.

    The operators take the path that they take with nobody looking on: behind it the tracker sees
    what they allocate inside.
    """
    monkeypatch.setattr(_operator, "observed", lambda: False)
    torch.manual_seed(0)
    model = GPT(cfg, seed=0, recompute=policy).train()
    optimizer = make_optimizer(model, TrainConfig(state=layout))
    idx = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size))
    precision = Precision(torch.bfloat16 if bf16 else torch.float32, False, "cpu")

    def step():
        for _ in range(micro_steps):
            with precision.autocast():
                loss = model(idx, idx) / idx.numel()
            loss.backward()
            del loss
        clip(optimizer, model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the moments exist after it
    live = LiveBytes()
    states = [t for state in optimizer.state.values() for t in state.values()]
    rest = getattr(optimizer, "remainders", {}).values()
    for tensor in (*model.parameters(), *model.buffers(), *states, *rest):
        live.add(tensor)
    fixed = live.now
    with live:
        step()
    return fixed, live.peak


def by_mem_tracker(cfg, monkeypatch):
    """Peak bytes of two fp32 steps as torch's MemTracker counts them."""
    from torch.distributed._tools.mem_tracker import MemTracker

    monkeypatch.setattr(_operator, "observed", lambda: False)
    model = GPT(cfg, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    idx = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size))
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for second in (False, True):
            (model(idx, idx) / idx.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if not second:
                tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
