"""What torch is told for a run on a GPU, and untold at its end; and the C library, for a CPU.

A caller's own process keeps its settings: the command line enters `applied`, `fit` does not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from mypt_fast.training import attention_choice
from mypt_fast.training import device as devices
from mypt_fast.training.run import Run


@contextlib.contextmanager
def applied(run: Run) -> Iterator[None]:
    """Set the switches of torch as the run decided, and back afterwards.

    On a CPU they stay, and memory that is freed is kept (`devices.keep_freed_memory`), for good.
    """
    if run.device.type == "cpu":
        devices.keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if run.device.type == "cuda":
            stack.enter_context(fp32_matmuls(run.settings.train.tf32))
            if run.attention is not None:
                stack.enter_context(attention_choice.first(run.attention))
        yield


@contextlib.contextmanager
def fp32_matmuls(tf32: bool) -> Iterator[None]:
    """Let matmuls of fp32 tensors round their factors to TF32, or not.

    By the older of torch's two switches, which sets both: the compilers of torch 2.11 to 2.13 ask
    the older one, which raises where only the newer says tf32 (pytorch #166387).
    """
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer was set
        older = "highest"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with warnings.catch_warnings():  # torch.compile recommends TF32; it is decided here
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
            yield
    finally:
        torch.set_float32_matmul_precision(older)
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
