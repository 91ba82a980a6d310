"""The grid of the kernel tests, and the implementation they run.

The same tests run three ways: on the CPU with the PyTorch reference (the default suite), on the
CPU with the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), and, collected from
tests/gpu, on a GPU with the compiled kernels.
"""

import os
from dataclasses import dataclass

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# The interpreter computes bf16 wrongly (it truncates): that dtype is for the GPU.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [
    torch.float32, torch.bfloat16, torch.float16
]  # fmt: skip


@dataclass(frozen=True)
class Way:
    """Where a test runs, and on which implementation."""

    device: str
    impl: str


@pytest.fixture
def way() -> Way:
    return Way("cpu", "triton" if INTERPRETED else "reference")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
