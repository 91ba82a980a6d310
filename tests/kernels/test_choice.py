"""What keeps Triton from running on a GPU, and what is taken instead; without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mypt_fast import kernels
from mypt_fast.kernels import _operator

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes the machine one with these programs, and Python's header or not."""

    def made(*programs: str, header: bool = True) -> None:
        paths = {name: f"/bin/{name}" for name in programs}
        monkeypatch.setattr(_operator.shutil, "which", paths.get)
        monkeypatch.setattr(_operator.sysconfig, "get_path", lambda *names: str(tmp_path))
        (tmp_path / "Python.h").unlink(missing_ok=True)
        if header:
            (tmp_path / "Python.h").touch()
        _operator.missing_for_triton.cache_clear()

    for name in ("CC", "CPATH", "C_INCLUDE_PATH", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_operator, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(_operator, "device_arch", lambda index: 90)
    yield made
    _operator.missing_for_triton.cache_clear()


def on_gpu() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 8, device=GPU)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_triton_takes_gcc_or_clang(machine, name) -> None:
    machine(name)
    assert kernels.missing_for_triton() is None
    assert kernels.choose("rms_norm", "auto", on_gpu()) == "triton"
    assert kernels.why_not("triton", GPU, torch.float16) is None


@pytest.mark.parametrize("programs", [(), ("cc", "g++")])
def test_without_a_c_compiler_auto_is_pytorch(machine, programs) -> None:
    machine(*programs)
    assert kernels.missing_for_triton() == "a C compiler (gcc or clang)"
    assert kernels.choose("rms_norm", "auto", on_gpu()) == "inductor"
    assert kernels.choose("norm_qkv", "auto", on_gpu(), saves_memory=True) == "inductor"
    assert kernels.describe("auto", GPU, torch.float16, compiled=False) == "PyTorch kernels"
    said = (
        r"needs a C compiler \(gcc or clang\); found none: install it; impl='auto' takes what can$"
    )
    with pytest.raises(ValueError, match=f"^rms_norm: impl='triton' cannot run: {said}"):
        kernels.choose("rms_norm", "triton", on_gpu())
    reason = kernels.why_not("triton", GPU, torch.float16)
    assert reason == "needs a C compiler (gcc or clang); found none: install it"


def test_the_compiler_that_cc_names_is_the_one(machine, monkeypatch) -> None:
    monkeypatch.setenv("CC", "icx")
    machine("icx")
    assert kernels.missing_for_triton() is None
    machine("gcc", "clang")  # Triton looks for no other then
    assert kernels.missing_for_triton() == "a C compiler (CC is 'icx')"


def test_a_launch_needs_pythons_header(machine, tmp_path, monkeypatch) -> None:
    machine("gcc", header=False)
    found = kernels.missing_for_triton()
    assert found == f"Python's C header (Python.h of python3-dev, in {tmp_path})"
    assert kernels.choose("rms_norm", "auto", on_gpu()) == "inductor"
    # compilers look into these, too
    (tmp_path / "own").mkdir()
    (tmp_path / "own/Python.h").touch()
    monkeypatch.setenv("CPATH", f"/none:{tmp_path / 'own'}")
    machine("gcc", header=False)
    assert kernels.missing_for_triton() is None


def test_the_interpreter_needs_no_compiler(machine, monkeypatch) -> None:
    machine()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.choose("rms_norm", "auto", on_gpu()) == "triton"


def test_the_machine_is_asked_once_and_never_for_a_cpu(machine, monkeypatch) -> None:
    machine("gcc")
    asked = []
    monkeypatch.setattr(_operator.shutil, "which", lambda name: asked.append(name) or name)
    x = torch.ones(2, 8)
    kernels.rms_norm(x, x[0])
    kernels.why_not("triton", x.device, x.dtype)
    assert not asked
    for _ in range(2):
        kernels.choose("rms_norm", "auto", on_gpu())
    assert asked == ["gcc"]
