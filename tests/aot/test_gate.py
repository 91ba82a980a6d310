"""Every kernel, compiled for every architecture: nothing spills, everything fits. No GPU needed."""

import os
import re
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)
pytest.importorskip("triton", reason="there is nothing to compile without Triton")

import triton
import triton.language as tl

from mypt_fast.cli.cmd_tune import shipped_shapes
from mypt_fast.errors import DeviceError
from mypt_fast.kernels.jit import aot, launch, lowering
from mypt_fast.kernels.jit.launch import Case

pytestmark = pytest.mark.slow
SHAPE = {"n_embd": 1280, "hidden": 3456, "n_head": 20, "head_size": 64, "vocab_size": 50304}
# of the cases at width 1280, those that a training step spends its memory traffic on
MAIN = (
    "norm_forward rms add fp16", "norm_backward rms add fp16", "swiglu_forward",
    "swiglu_backward", "gelu_forward", "rope_forward", "rope_backward", "cross_entropy_head",
)  # fmt: skip


@pytest.fixture(autouse=True)
def private(tmp_path, monkeypatch) -> None:
    """Neither the user's launch tables nor what Triton compiled before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    launch.forget()
    yield
    launch.forget()


def test_no_kernel_of_a_preset_spills_on_any_architecture() -> None:
    seen = aot.gate(launch.ARCHS, shipped_shapes(), launch.NAMES)
    assert not seen.failures, f"{len(seen.failures)} offences:\n" + "\n".join(seen.failures)
    assert {usage.arch for usage in seen.usages} == set(launch.ARCHS)
    assert {u.dtype for u in seen.usages if u.arch == 75} == {"fp16", "fp32"}
    assert len(seen.usages) > 3000


@triton.jit
def spilling(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Holds BLOCK / 32 elements a thread for a sum that comes after their use."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x / tl.sum(tl.exp(x)), mask=i < n)


HUGE = Case(
    "spilling", spilling, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, {"BLOCK": 16384},
    warps=1, stages=1,
)  # fmt: skip


def test_a_kernel_that_spills_is_reported() -> None:
    small = replace(HUGE, constants={"BLOCK": 1024}, warps=4)
    jobs = [aot.Job(case, arch, "fp32") for arch in (80, 120) for case in (HUGE, small)]
    usages = aot.compile_all(jobs)
    assert [usage.spill_free for usage in usages] == [False, True] * 2
    lines = aot.offences(jobs, usages)
    assert len(lines) == 2
    for line, arch in zip(lines, (80, 120), strict=True):
        pattern = rf"spilling, sm_{arch}, fp32, BLOCK=16384, 1 warps: spills: \d+ bytes of stack, "
        assert re.match(pattern, line)


def test_shared_memory_and_bf16_are_held_against_the_architecture() -> None:
    case = replace(HUGE, signature={**HUGE.signature, "x_ptr": "*bf16"})
    jobs = [aot.Job(case, arch, "bf16") for arch in (75, 80)]
    found = [lowering.Usage("spilling", arch, 255, 0, 0, 70_000) for arch in (75, 80)]
    lines = aot.offences(jobs, found)
    assert len(lines) == 2
    assert lines[0].endswith("70000 bytes of shared memory, at most 65536")
    assert lines[1].endswith("bf16, which this architecture has not")
    found = [replace(usage, shared_bytes=101_377) for usage in found]
    assert "101377 bytes of shared memory, at most 101376" in aot.offences(jobs, found)[-1]


def test_shared_stages_give_what_triton_gives() -> None:
    shape = {**SHAPE, "n_embd": 192, "vocab_size": 256}
    cases = list(launch.all_cases(shape, torch.float16, 80))[::7]
    jobs = [aot.Job(case, arch) for case in cases for arch in (75, 89, 100)]
    assert aot.compile_all(jobs) == [lowering.compile_case(job.case, job.arch) for job in jobs]


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_16_bit_kernels_load_16_bytes_a_lane(arch) -> None:
    cases = {case.name: case for case in launch.all_cases(SHAPE, torch.float16, arch)}
    for name in MAIN:
        ptx = lowering.compiled(cases[name], arch).asm["ptx"]
        wide = r"ld\.global[.\w:]*\.(v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu](16|32)|b128)"
        assert re.search(wide, ptx), f"{name} on sm_{arch} has no load of 16 bytes a lane"


def test_the_interpreter_and_a_missing_tool_are_named(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(DeviceError, match="found TRITON_INTERPRET=1"):
        aot.compile_all([aot.Job(HUGE, 80)])
    with pytest.raises(DeviceError, match="found TRITON_INTERPRET=1"):
        lowering.compile_case(HUGE, 80)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(triton.knobs.NvidiaTool, "from_path", staticmethod(lambda path: None))
    with pytest.raises(DeviceError, match="needs cuobjdump"):
        aot.compile_all([aot.Job(HUGE, 80)])


def test_a_failing_compiler_is_an_error_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(aot.tempfile, "tempdir", str(tmp_path))
    wrong = replace(HUGE, constants={"BLOCK": 1000})  # not a power of two
    with pytest.raises(RuntimeError, match="could not be compiled"):
        aot.compile_all([aot.Job(wrong, 80)])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("mypt_fast_aot_")] == []
    assert aot.multiprocessing.active_children() == []
