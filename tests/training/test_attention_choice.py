"""Which attention kernel a run takes: asked for, saved, kept or measured, and never a wrong one.

torch has two kernels on a CPU, flash and math: they are run and compared here as a GPU's are. What
a GPU adds is its name, which is faked.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import DeviceError
from mypt_fast.settings import Settings
from mypt_fast.training import attention_choice as choice
from mypt_fast.training import device as devices
from mypt_fast.training.sources import DataOpener

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = choice.Shape(CPU, torch.float32, 2, 2, 32, 16, 0.0)
ON_GPU = dataclasses.replace(SHAPE, device=GPU)
REASON = "it is not there"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mypt_fast" / "attention.json"


@pytest.fixture
def card(monkeypatch):
    """A GPU with these kernels, and their seconds; what was measured is listed."""
    measured: list[str] = []

    def install(**seconds: float | None) -> list[str]:
        def fault(name, shape):
            return None if name in seconds or name == "math" else REASON

        def timed(name, shape):
            measured.append(name)
            return seconds[name]

        monkeypatch.setattr(devices, "describe", lambda device: "A card")
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(choice, "fault", fault)
        monkeypatch.setattr(choice, "_seconds", timed)
        measured.clear()
        return measured

    return install


def settings(attention="auto", typed=False, saved=None) -> Settings:
    state = {"plan": {"attention": saved}} if saved else {}
    return Settings(
        "a", Path("a"), ModelConfig(), TrainConfig(attention=attention), SimpleNamespace(),
        saved_state=state, typed=frozenset({"attention"} if typed else ()),
    )  # fmt: skip


# by measurement


def test_the_fastest_is_taken_and_kept(card, cache) -> None:
    measured = card(flash=3.0, efficient=2.0, cudnn=1.0)
    assert choice.choose(settings(), ON_GPU, True, []) == "cudnn"
    assert measured == ["flash", "efficient", "cudnn"]
    measured.clear()
    assert choice.choose(settings(), ON_GPU, True, []) == "cudnn"
    assert measured == []
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["ms"] == {"flash": 3000.0, "efficient": 2000.0, "cudnn": 1000.0}


@pytest.mark.parametrize(
    "other",
    [{"dtype": torch.float16}, {"length": 64}, {"size": 80}, {"dropout": 0.1}, {"dropout": 0.125}],
)
def test_another_shape_is_measured_anew(card, other) -> None:
    measured = card(flash=1.0, efficient=2.0)
    choice.fastest(ON_GPU)
    measured.clear()
    choice.fastest(dataclasses.replace(ON_GPU, **other))
    assert measured == ["flash", "efficient"]


def test_what_is_kept_and_cannot_run_any_more_is_measured_anew(card) -> None:
    card(flash=1.0, efficient=2.0)
    assert choice.fastest(ON_GPU) == "flash"
    card(efficient=2.0)
    assert choice.fastest(ON_GPU) == "efficient"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"%s": {"attention": "math"}}', '{"%s": 3}'])
def test_a_cache_that_is_no_good_counts_as_none(card, cache, text) -> None:
    measured = card(efficient=1.0)
    cache.parent.mkdir()
    cache.write_text(text.replace("%s", ON_GPU.key()))
    assert choice.fastest(ON_GPU) == "efficient"
    assert measured == ["efficient"]
    assert json.loads(cache.read_text())[ON_GPU.key()]["attention"] == "efficient"


def test_a_cache_that_cannot_be_written_costs_a_measurement(card, cache) -> None:
    card(flash=1.0)
    cache.parent.write_text("a file where the folder should be")
    assert choice.fastest(ON_GPU) == "flash"


def test_what_does_not_fit_memory_is_left_out(card) -> None:
    card(flash=None, efficient=1.0)
    assert choice.fastest(ON_GPU) == "efficient"
    card(flash=None)
    assert choice.fastest(dataclasses.replace(ON_GPU, length=8)) is None


def test_where_no_fused_kernel_is_right_it_is_the_plain_one(card) -> None:
    measured = card()
    assert choice.fastest(ON_GPU) == "math"
    assert measured == []


def test_documents_are_not_measured(card) -> None:
    measured = card(flash=1.0)
    assert choice.choose(settings(), ON_GPU, False, []) is None
    assert measured == []


# asked for, and saved


def test_a_resumed_run_keeps_its_kernel(card) -> None:
    measured, notices = card(flash=1.0, efficient=2.0), []
    assert choice.choose(settings(saved="efficient"), ON_GPU, True, notices) == "efficient"
    assert choice.choose(settings(saved="efficient"), ON_GPU, False, notices) == "efficient"
    assert (measured, notices) == ([], [])
    assert choice.choose(settings("auto", True, saved="efficient"), ON_GPU, True, []) == "flash"


def test_auto_typed_measures_anew_and_a_dry_run_keeps_nothing(card, cache) -> None:
    measured = card(flash=1.0, efficient=2.0)
    assert choice.choose(settings(), ON_GPU, True, [], keeps=False) == "flash"
    assert measured == ["flash", "efficient"]
    assert not cache.exists()
    assert choice.choose(settings(), ON_GPU, True, []) == "flash"
    before = cache.read_text()
    measured = card(flash=2.0, efficient=1.0)  # the card was busy
    assert choice.choose(settings(), ON_GPU, True, []) == "flash"
    assert measured == []
    assert choice.choose(settings("auto", True), ON_GPU, True, [], keeps=False) == "efficient"
    assert cache.read_text() == before
    assert choice.choose(settings("auto", True), ON_GPU, True, []) == "efficient"
    assert choice.choose(settings(), ON_GPU, True, []) == "efficient"


def test_on_another_card_it_takes_another_and_says_so(card) -> None:
    notices: list[str] = []
    card(efficient=2.0)
    assert choice.choose(settings(saved="flash"), ON_GPU, True, notices) == "efficient"
    assert notices == [f"attention flash of the saved run cannot run here ({REASON})"]


@pytest.mark.parametrize("saved", [3, None, "none", ["flash"]])
def test_a_plan_that_was_edited_is_no_plan(card, saved) -> None:
    card(flash=1.0)
    assert choice.choose(settings(saved=saved), ON_GPU, True, []) == "flash"


def test_what_was_typed_is_taken_or_refused(card) -> None:
    card(flash=1.0, efficient=2.0)
    assert choice.choose(settings("efficient", True), ON_GPU, True, []) == "efficient"
    assert choice.choose(settings("math", True), ON_GPU, True, []) == "math"
    choice.check_typed(settings("efficient", True), ON_GPU)
    choice.check_typed(settings("cudnn"), ON_GPU)  # of a file
    with pytest.raises(DeviceError) as refused:
        choice.check_typed(settings("cudnn", True), ON_GPU)
    assert str(refused.value) == (
        f"--attention cudnn cannot run; {REASON}; drop it, or use --attention auto"
    )


def test_what_only_a_file_asks_for_is_advice(card) -> None:
    notices: list[str] = []
    card(flash=1.0)
    assert choice.choose(settings("cudnn"), ON_GPU, True, notices) == "flash"
    assert notices == [f"attention cudnn cannot run here ({REASON}): another is chosen"]
    assert choice.choose(settings("cudnn"), SHAPE, True, notices) is None
    assert len(notices) == 1


def test_a_cpu_has_no_choice(train, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patch:  # it is refused before any data is opened
        patch.setattr(DataOpener, "open", lambda self: pytest.fail("data was opened"))
        assert train("a", "--max_iters", "1", "--attention", "flash") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --attention flash names a kernel of a GPU; this run is on the CPU; drop it"
    )
    assert train("a", "--max_iters", "1") == 0
    plan = json.loads(Path("checkpoints/a/training_state.json").read_text())["plan"]
    assert plan["attention"] is None


def test_the_chosen_kernel_is_saved_with_the_run(train, monkeypatch) -> None:
    """And reaches the next start of the run."""
    seen = []

    def chosen(run_settings, *_, **__):
        seen.append((run_settings.saved_state.get("plan") or {}).get("attention"))
        return "flash"

    monkeypatch.setattr(choice, "choose", chosen)
    assert train("a", "--max_iters", "1") == 0
    assert train("a", "--max_iters", "2", resume=True) == 0
    assert seen == [None, "flash"]


# a kernel itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 80])
def test_torchs_kernels_on_a_cpu_are_right(dtype, size, recwarn) -> None:
    shape = dataclasses.replace(SHAPE, dtype=dtype, size=size)
    assert choice.fault("flash", shape) is None
    assert choice.fault("math", dataclasses.replace(shape, dropout=0.1)) is None
    assert set(choice.measure(shape, ["flash"])) == {"flash"}
    assert not recwarn


def test_what_cannot_run_is_one_line_without_a_warning(recwarn) -> None:
    assert choice.fault("cudnn", SHAPE).startswith("No viable backend")
    dropped = dataclasses.replace(SHAPE, dropout=0.1)
    assert choice.fault("flash", dropped) == "Both fused kernels do not support non-zero dropout."
    assert choice._seconds("flash", dropped) is None
    assert not recwarn


def test_torchs_reason_is_the_one_about_the_kernel() -> None:
    said = [
        "Memory efficient kernel not used because: (Triggered internally at x.cpp:1.)",
        "Mem Efficient attention has been runtime disabled. (Triggered internally at x.cpp:2.)",
        "Flash attention kernel not used because: (Triggered internally at x.cpp:3.)",
        "Flash attention only supports gpu architectures in the range\n [sm80, sm121]. (Triggered "
        "internally at x.cpp:4.)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.")
    expected = "Flash attention only supports gpu architectures in the range [sm80, sm121]."
    assert choice._reason(said, error) == expected
    assert choice._reason(said[:3], error) == "No available kernel. Aborting execution."


@pytest.mark.parametrize("what", ["result", "gradient"])
@pytest.mark.parametrize("wrong", [1.05, float("nan")])
def test_a_wrong_result_or_gradient_is_found(monkeypatch, what, wrong) -> None:
    right = choice._once

    def broken(name, shape, qkv, upstream):
        y, grad = right(name, shape, qkv, upstream)
        if name == "flash":
            y, grad = (y * wrong, grad) if what == "result" else (y, grad * wrong)
        return y, grad

    monkeypatch.setattr(choice, "_once", broken)
    for dtype in choice.LARGEST_ERROR:
        found = choice.fault("flash", dataclasses.replace(SHAPE, dtype=dtype))
        assert found.startswith(f"its {what} is off by")


def test_the_runs_random_numbers_do_not_move() -> None:
    before = torch.get_rng_state()
    choice.fault("flash", SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


# in force


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def attend(q: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_a_kernel_runs_by_itself_also_when_it_is_recomputed() -> None:
    for name, calls in (("flash", 2), ("math", 0)):
        q = torch.randn(1, 2, 16, 16, requires_grad=True)
        with sdpa_kernel(choice.BACKENDS[name]), Names() as names:
            checkpoint(attend, q, use_reentrant=False).sum().backward()
        assert names.found.count("_scaled_dot_product_flash_attention_for_cpu") == calls


def test_the_choice_is_in_force_and_ends() -> None:
    torch_order = torch._C._get_sdp_priority_order()
    tag = torch.compiler.config.cache_key_tag
    for name in ("math", "flash"):
        with choice.first(name):
            assert torch._C._get_sdp_priority_order()[0] == int(choice.BACKENDS[name])
            assert torch.compiler.config.cache_key_tag.endswith(f"attention={name}")
            assert torch.isfinite(attend(torch.randn(1, 2, 16, 16))).all()
    assert torch._C._get_sdp_priority_order() == torch_order
    assert torch.compiler.config.cache_key_tag == tag
    assert torch.backends.cuda.math_sdp_enabled()
