"""What torch is told for a run on a GPU, and that it forgets it."""

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


def test_a_cpu_is_left_alone(before) -> None:
    with applied(run_of("cpu", True)):
        assert switches() == before


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
