"""Optional packages that bench_kernels.py times: what they offer, or why they are absent."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Peers:
    """Optional packages: what they offer, or why they are absent."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.absent: dict[str, str] = {}
        self.versions: dict[str, str] = {}

    def get(self, provider: str, module: str, name: str) -> Any:
        """The attribute of the module, or None with the reason noted."""
        if self.device == "cpu":
            self.absent[provider] = "has no CPU kernels"
            return None
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as e:  # a peer may fail to import in any way; it is not ours to repair
            self.absent[f"{provider} ({name})"] = f"{type(e).__name__}: {e}"[:200]
            return None
        package = module.split(".")[0]
        self.versions[package] = _version(package)
        return found


def _version(package: str) -> str:
    for distribution in (package, package.replace("_", "-"), f"{package}-kernels"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def liger_swiglu(peers: Peers) -> Function | None:
    """Its kernel for a packed product where it has one, else the one for two tensors."""
    packed = peers.get("liger", "liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction")
    if packed is not None:
        return lambda t: packed.apply(t)
    pair = peers.get("liger", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    return None if pair is None else lambda t: pair.apply(*t.chunk(2, -1))


def liger_head_arguments(function: Any, budget: int) -> Sequence[Any] | None:
    """Its optional arguments by position (an autograd function takes no names), one changed."""
    parameters = list(inspect.signature(function.forward).parameters.values())[4:]
    values = {p.name: p.default for p in parameters}
    if "chunk_mem_const" not in values:
        return None
    return list((values | {"chunk_mem_const": budget}).values())
