"""The kernel tests on a GPU: the same tests, the compiled kernels, and bf16 as well.

Every test here is marked `gpu`, but for those of `ON_CPU`. Those imported from tests/kernels that
ask for no `way` show nothing about a GPU and are not run again; those that need the CPU skip
themselves and say why.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import Way

HERE = Path(__file__).parent
ON_CPU = HERE / "test_collection.py"  # what is collected here is known without a GPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE_LOST = 9  # exit code of a run whose device can do nothing more


@pytest.fixture
def way() -> Way:
    return Way("cuda", "triton")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param is torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        pytest.skip("this GPU has no bf16")
    return request.param


@pytest.fixture(autouse=True)
def default_device_state(request: pytest.FixtureRequest):
    """No test leaves the debug mode of another, or an error of the device, behind."""
    yield
    if torch.cuda.is_available():
        settle(request.node.nodeid)


def settle(test: str) -> None:
    """Wait for the device; end this process if it is lost, as every later test would fail too."""
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    except RuntimeError as e:
        why = f"{type(e).__name__}: {e}"
    else:
        return
    path = os.environ.get("MYPT_PARITY_LINES")
    if path:  # what pytest captured of this process's stderr dies with it
        line = {"test": test, "outcome": "device lost", "seconds": 0.0, "why": why[:1000]}
        with Path(path).open("a") as f:
            f.write(json.dumps(line) + "\n")
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # xdist names the test and starts another worker
    pytest.exit(f"the device was lost in {test}: {why}", returncode=DEVICE_LOST)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
    kept, left_out = [], []
    for item in items:
        if not item.path.is_relative_to(HERE) or item.path == ON_CPU:
            kept.append(item)
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(absent)
        is_own = item.function.__module__ == item.module.__name__  # not imported by a twin
        (kept if is_own or "way" in item.fixturenames else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
