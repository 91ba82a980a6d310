"""What the backward makes again, and where what it starts from waits.

| policy | kept of a block | made again |
|---|---|---|
| none | what autograd keeps | - |
| norms | residual streams, q, k, v, attention's output, the feed-forward's first product | norms, activation, 16-bit copies of weights, dropout's masks |
| mlp | likewise without the product | that, too |
| block | the residual stream before it | everything |
| offload | the same, in host memory | everything |

"norms" and "mlp" are ways of the operators `kernels.norm_qkv` and `kernels.norm_mlp`, which call no
module of a block: hooks on those do not run in training. The others run a block twice, with the
same random numbers.
"""  # noqa: E501

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

POLICIES = ("none", "norms", "mlp", "block", "offload")


class Again:
    """Runs blocks of one forward so that the backward makes them again.

    Args:
        device: of the residual stream.
    """

    POLICIES = ("block", "offload")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host: Host | None = None

    def run(self, whole: Callable[..., Tensor], block: Any, *args: Any) -> Tensor:
        """Call whole(block, *args), keeping those of `args` that are tensors alone."""
        if block.recompute == "block":
            return self._checkpointed(whole, block, *args)
        self.host = self.host or Host(self.device)
        with saved_tensors_hooks(self.host.take, self.host.give):
            return self._checkpointed(whole, block, *args)

    def _checkpointed(self, whole: Callable[..., Tensor], block: Any, *args: Any) -> Tensor:
        y: Tensor = checkpoint(
            whole, block, *args, use_reentrant=False, preserve_rng_state=block.drops
        )
        return y


@dataclass
class Waiting:
    """A tensor in host memory, on its way there or back."""

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    here: torch.cuda.Event | None = None


@dataclass
class Host:
    """Host memory for tensors of a device: copies run beside the computation.

    The backward asks in the opposite order: as one tensor is taken back, the one before it is sent
    for. Host memory is page-locked, and comes from PyTorch's cache of it after the first step.
    """

    device: torch.device
    waiting: list[Waiting] = field(default_factory=list)
    stream: torch.cuda.Stream | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            if self.device.index is None:  # a tensor's own device has one
                self.device = torch.device("cuda", torch.cuda.current_device())
            self.stream = copies(self.device)

    def take(self, t: Tensor) -> Waiting | Tensor:
        """Send a tensor to host memory; called by autograd for what it keeps."""
        if t.device != self.device or isinstance(t, torch.nn.Parameter) or not t.numel():
            return t
        host = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=self.stream is not None)
        kept = Waiting(host, t.device)
        if self.stream is None:
            host.copy_(t)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                host.copy_(t, non_blocking=True)
            t.record_stream(self.stream)
        self.waiting.append(kept)
        return kept

    def give(self, kept: Waiting | Tensor) -> Tensor:
        """Bring a tensor back; called by autograd when the backward reads it."""
        if isinstance(kept, Tensor):
            return kept
        self._send_for(kept)
        while self.waiting and self.waiting.pop() is not kept:
            pass
        if self.waiting:
            self._send_for(self.waiting[-1])
        back, kept.back = kept.back, None
        assert back is not None
        if kept.here is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(kept.here)
            back.record_stream(now)
        return back

    def _send_for(self, kept: Waiting) -> None:
        if kept.back is not None:
            return
        if self.stream is None:
            kept.back = kept.host.clone()
            return
        with torch.cuda.stream(self.stream):
            kept.back = kept.host.to(kept.device, non_blocking=True)
            kept.here = self.stream.record_event()


@functools.cache
def copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's copies: one, as free memory is kept for each stream apart."""
    return torch.cuda.Stream(device)
