"""What torch is told for a run on a GPU, and that it forgets it."""

import os
import platform
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from mypt_fast.config import TrainConfig
from mypt_fast.training import device as devices
from mypt_fast.training.numerics import applied, fp32_matmuls

PLACES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def switches() -> tuple:
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # as torch answers where only the newer switch says tf32
        older = "mixed"
    order = torch._C._get_sdp_priority_order()
    return older, *(p.fp32_precision for p in PLACES), order, torch.compiler.config.cache_key_tag


def run_of(device: str, tf32: bool = False, attention: str | None = None) -> SimpleNamespace:
    settings = SimpleNamespace(train=TrainConfig(tf32=tf32))
    return SimpleNamespace(device=torch.device(device), settings=settings, attention=attention)


@pytest.fixture(params=["untouched", "high", "newer"])
def before(request):
    """What a caller may have set: nothing, or TF32 by either switch of torch."""
    torch.set_float32_matmul_precision("highest")
    for place in PLACES:
        place.fp32_precision = "none"
    if request.param == "high":
        torch.set_float32_matmul_precision("high")
    elif request.param == "newer":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield switches()
    torch.set_float32_matmul_precision("highest")
    for place in PLACES:
        place.fp32_precision = "none"


@pytest.mark.parametrize(("tf32", "name"), [(False, "ieee"), (True, "tf32")])
def test_fp32_is_what_the_run_says_until_it_ends(before, tf32, name) -> None:
    with applied(run_of("cuda", tf32, "flash")):
        assert torch.backends.cuda.matmul.fp32_precision == name
        # the compilers ask by the older switch, which raises where the two disagree
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert switches() == before


def test_it_ends_with_an_error_too(before) -> None:
    with pytest.raises(ZeroDivisionError), applied(run_of("cuda", True, "math")):
        raise ZeroDivisionError
    assert switches() == before


def test_on_a_cpu_torch_is_left_alone_and_memory_kept(before, monkeypatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: kept.append(True))
    with applied(run_of("cpu", True)):
        assert switches() == before
    assert kept == [True]
    with applied(run_of("cuda")):
        assert kept == [True]


FAULTS = """
import resource, torch
from mypt_fast.training import device
kept = device.keep_freed_memory()
for _ in range(8):  # the heap grows until all have their place
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5 << 20) for _ in range(4)]  # 20 MiB each
    del blocks
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
@pytest.mark.parametrize("own", [None, "GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_freed_memory_is_taken_again_unless_the_environment_decides(own) -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUN"))}
    settings = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "MALLOC_ARENA_MAX": "2"}
    env = {**plain, own: settings[own]} if own else plain
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(own is None)
    if own is None:  # of 20,480 small pages, or 40 huge ones
        assert int(faults) < 20


def test_torch_does_not_recommend_what_is_decided(recwarn) -> None:
    with fp32_matmuls(False):
        warnings.warn("TensorFloat32 tensor cores are there", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(w.message) for w in recwarn] == ["something else"]


def test_tf32_where_there_is_none_is_said(train, capsys, monkeypatch) -> None:
    monkeypatch.setattr(devices, "describe", lambda device: "A CPU")
    assert train("a", "--max_iters", "1", "--tf32") == 0
    out, err = capsys.readouterr()
    assert "note: no TF32 on A CPU: fp32 matmuls stay fp32" in err
    assert "device  A CPU: fp32, eager" in out


@pytest.mark.parametrize(("capability", "found"), [((7, 5), False), ((8, 0), True)])
def test_tf32_is_there_since_ampere(monkeypatch, capability, found) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.has_tf32(torch.device("cuda")) is found
    assert not devices.has_tf32(torch.device("cpu"))
