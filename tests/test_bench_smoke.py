"""The benchmarks' own parts, at sizes that take no time: nothing here is timed for its own sake."""

import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from mypt_fast import kernels
from mypt_fast.benchmark import timing

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch) -> SimpleNamespace:
    """The modules of bench/, with nothing compiled and two rounds."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = (
        "bench_kernels", "bench_step", "gpu_suite", "hf_gpt", "kernel_cases", "kernel_measure",
        "mypt_gpt", "parity_report", "peers", "plain_gpt", "steps",
    )  # fmt: skip
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(modules.kernel_cases, "compiled", lambda function: function)
    monkeypatch.setitem(modules.kernel_measure.ROUNDS, "cpu", 2)
    return modules


def measured(bench, op, deadline=math.inf):
    """One operator at a small shape, on the CPU, without what compiles."""
    shape = bench.kernel_cases.Shape("small", 32, 64, 96, 300, 4, 16)
    case = bench.kernel_cases.BUILDERS[op](shape, torch.float32, "cpu", bench.peers.Peers("cpu"))
    case.providers.pop("ours inductor", None)
    return bench.kernel_measure.Measurement(case, timing.Clock("cpu"), deadline)


def operators() -> list[str]:
    return [
        "linear_cross_entropy", "cross_entropy", "rms_norm", "add_rms_norm", "layer_norm",
        "swiglu", "swiglu_mlp", "rope_qkv",
    ]  # fmt: skip


def test_every_operator_is_listed(bench) -> None:
    assert list(bench.kernel_cases.BUILDERS) == operators()


@pytest.mark.parametrize("op", operators())
def test_providers_agree_and_give_rows(bench, op) -> None:
    run = measured(bench, op)
    run.warm_up()
    assert not run.failed
    run.run()
    rows = run.rows(copy=1e9, matmul=1e9)
    ours = "ours all" if op == "swiglu_mlp" else "ours"
    assert {ours, "eager", "compile"} <= {r["provider"] for r in rows}
    assert {r["mode"] for r in rows} == {"forward", "backward", "both"}
    for row in rows:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert len(row["samples_ms"]) == row["count"] == 2
        if row["mode"] == "both":
            assert row["error"] < 1e-5
    rated = [r for r in rows if "gb_per_s" in r or "tflops" in r]
    assert {r["provider"] for r in rated} == {r["provider"] for r in rows}
    json.dumps(rows, allow_nan=False)


def test_a_deadline_ends_the_sampling(bench) -> None:
    run = measured(bench, "swiglu", deadline=0.0)
    run.warm_up()
    run.run()
    assert run.rows() == []
    assert set(run.failed.values()) == {bench.kernel_measure.NO_TIME}  # nor was it warmed up


def test_a_gradient_that_goes_to_a_buffer_is_checked_too(bench) -> None:
    run = measured(bench, "linear_cross_entropy")
    case, targets = run.case, bench.kernel_cases.targets_for(run.case.shape, "cpu")
    case.grad_into = {name: (1, torch.full((300, 64), 5.0)) for name in ("right", "wrong")}

    def into(x, w, name):
        buffer = case.grad_into[name][1]
        loss = kernels.linear_cross_entropy(x, w, None, targets, grad_into=buffer)
        buffer.mul_(2.0 if name == "wrong" else 1.0)
        return loss

    case.providers |= {n: functools.partial(into, name=n) for n in case.grad_into}
    run.warm_up()
    assert run.about["right"]["error"] < 1e-5
    assert set(run.failed) == {"wrong"}
    assert "relative error" in run.failed["wrong"]


def test_what_is_wrong_or_fails_is_named_and_not_timed(bench) -> None:
    run = measured(bench, "rms_norm")
    run.case.providers["wrong"] = lambda x, w: 2 * x * w
    run.case.providers["broken"] = lambda x, w: x.nonesuch
    run.warm_up()
    assert set(run.samples) == {"ours", "eager", "compile"}
    assert "relative error" in run.failed["wrong"]
    assert "AttributeError" in run.failed["broken"]


def test_what_a_provider_writes_over_is_restored(bench) -> None:
    run = measured(bench, "swiglu")
    case, before = run.case, run.case.inputs[0].clone()

    def spoiling(x):
        y = bench.kernel_cases.eager_swiglu(x)
        case.upstream[0].zero_()
        return y

    case.providers["spoiling"] = spoiling
    case.writes_over = frozenset({"spoiling"})
    again = bench.kernel_measure.Measurement(case, run.clock)
    wanted = case.upstream[0].clone()
    again.both("spoiling")
    assert not case.upstream[0].any()
    again.restore("spoiling")
    assert torch.equal(case.upstream[0], wanted)
    assert torch.equal(case.inputs[0], before)


def test_absent_peers_are_named(bench) -> None:
    found = bench.peers.Peers("cuda")
    assert found.get("nobody", "a_package_that_nobody_has", "thing") is None
    assert "ModuleNotFoundError" in found.absent["nobody (thing)"]


def test_logits_of_the_cpu_head_are_within_the_bar(bench) -> None:
    shape = bench.kernel_cases.CPU_HEAD
    case = SimpleNamespace(
        op="linear_cross_entropy", shape=shape, dtype=torch.float32, inputs=[torch.empty(0)]
    )
    made = bench.kernel_measure.logits_bytes(case, "ours")
    assert 30e6 < made <= bench.bench_kernels.BAR_LOGITS_BYTES
    assert bench.kernel_measure.logits_bytes(case, "eager") == 4 * 1024 * 50_304


@pytest.fixture
def kernel_bench(bench, tmp_path, monkeypatch):
    """bench_kernels.py over two small operators; `spoil` is called with each case."""
    module, shape = bench.bench_kernels, bench.kernel_cases.Shape("s", 32, 64, 96, 300, 4, 16)
    spoil = Mock()

    def build(op, shape, device, peers):
        case = bench.kernel_cases.BUILDERS[op](shape, torch.float32, device, peers)
        spoil(case)
        return case

    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "plan", lambda d: [(o, shape) for o in ("rms_norm", "swiglu")])
    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "copy_rate", lambda clock: 1e9)
    monkeypatch.setattr(module, "matmul_rate", lambda clock, dtype: 1e12)
    monkeypatch.setattr(module, "add_resident_growth", lambda rows, op: None)
    out = tmp_path / "kernels.json"

    def start(resume=False, minutes=1.0, until=math.inf):
        args = SimpleNamespace(out=out, minutes=minutes, until=until, ops=None, resume=resume)
        code = module.measure_all(args)[1]
        return code, json.loads(out.read_text())

    return SimpleNamespace(start=start, spoil=spoil, out=out)


def test_a_failing_case_is_recorded_and_the_next_one_runs(kernel_bench) -> None:
    kernel_bench.spoil.side_effect = [RuntimeError("no such thing"), None]
    code, found = kernel_bench.start()
    assert found["failed"] == {"rms_norm s": {"all": "RuntimeError: no such thing"}}
    assert {r["op"] for r in found["rows"]} == {"swiglu"}
    assert (code, found["not_run"], "running" in found) == (0, [], False)
    assert [p.name for p in kernel_bench.out.parent.iterdir()] == ["kernels.json"]


def test_what_a_bench_left_is_listed_and_run_by_the_next(kernel_bench) -> None:
    for found in (kernel_bench.start(minutes=0.0)[1], kernel_bench.start(until=0.0)[1]):
        assert (found["copy_gb_per_s"], found["rows"]) == (1.0, [])
        assert found["not_run"] == ["rms_norm s", "swiglu s"]
    kernel_bench.out.write_text(json.dumps({**found, "running": "rms_norm s"}))  # it died there
    found = kernel_bench.start(resume=True)[1]
    assert found["failed"] == {"rms_norm s": {"all": "the process ended in it"}}
    assert ({r["op"] for r in found["rows"]}, found["not_run"]) == ({"swiglu"}, [])


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(
    bench, kernel_bench, monkeypatch
) -> None:
    lost = []

    def fatal(x, w):
        lost.append("AcceleratorError: illegal memory access")
        raise RuntimeError("illegal memory access")

    def spoil(case) -> None:
        if case.op == "rms_norm":
            case.providers = {"fatal": fatal, **case.providers}

    kernel_bench.spoil.side_effect = spoil
    for module in (bench.bench_kernels, bench.kernel_measure):
        monkeypatch.setattr(module, "device_error", lambda device: lost[0] if lost else None)
    code, found = kernel_bench.start()
    assert code == bench.bench_kernels.DEVICE_LOST
    assert found["not_run"] == ["rms_norm s", "swiglu s"]
    assert found["failed"]["rms_norm s"]["device"] == lost[0]
    lost.clear()
    code, found = kernel_bench.start(resume=True)
    assert (code, found["not_run"], lost) == (0, [], [])
    assert found["failed"]["rms_norm s"]["fatal"] == "RuntimeError: illegal memory access"
    ours = [r["op"] for r in found["rows"] if (r["provider"], r["mode"]) == ("ours", "both")]
    assert ours == ["rms_norm", "swiglu"]


def test_quantiles() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert timing.median(values) == 3.0
    assert timing.quantile(values, 0.2) == pytest.approx(1.8)
    assert timing.quantile([7.0], 0.8) == 7.0


def test_a_killed_parity_run_leaves_a_summary(bench, tmp_path, monkeypatch) -> None:
    lines = tmp_path / "lines"
    assert bench.parity_report.summary(lines)["passed"] == 0
    monkeypatch.setenv("MYPT_PARITY_LINES", str(lines))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    report = bench.parity_report.pytest_runtest_logreport
    base = {"nodeid": "t", "duration": 1.0, "longrepr": None}
    for when, outcome, why in (
        ("setup", "passed", None), ("call", "passed", None), ("call", "failed", "boom"),
        ("setup", "skipped", ("file", 3, "Skipped: no card")),
    ):  # fmt: skip
        skipped = outcome == "skipped"
        more = {"when": when, "outcome": outcome, "longrepr": why, "skipped": skipped}
        report(SimpleNamespace(**{**base, **more}))
    lines.write_text(lines.read_text() + '3\n{"test": "half of a li')
    found = bench.parity_report.summary(lines)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"][0]["why"] == "boom"
    assert found["skips"] == {"Skipped: no card": 1}


def test_without_a_gpu_the_suite_says_so_in_one_line(tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCH / "gpu_suite.py"), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "no GPU" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_the_suite_finds_the_package_that_nobody_installed(tmp_path) -> None:
    """As after a clone: what makes an editable install importable is taken away."""
    script = """import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
sys.path = [sys.argv[1], *(p for p in sys.path[1:] if "site-packages" in p or "lib" in p)]
sys.argv = ["gpu_suite.py", "--out", sys.argv[2]]
runpy.run_path(sys.path[0] + "/gpu_suite.py", run_name="suite")
import mypt_fast
print(mypt_fast.__file__)"""
    command = [sys.executable, "-c", script, str(BENCH), str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env, check=True)
    assert ended.stdout.strip() == str(ROOT / "mypt_fast" / "__init__.py")


def test_all_sides_train_with_the_allocator_of_the_trainer(bench, monkeypatch) -> None:
    module, wanted = bench.gpu_suite, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setattr(module, "has_expandable_segments", lambda: True)
    assert module.training_env({"A": "1"}) == {"A": "1", **wanted}
    assert module.training_env({"PYTORCH_CUDA_ALLOC_CONF": ""}) == {"PYTORCH_CUDA_ALLOC_CONF": ""}
    monkeypatch.setattr(module, "has_expandable_segments", lambda: False)
    assert module.training_env({"A": "1"}) == {"A": "1"}


@pytest.fixture
def suite(bench, tmp_path, monkeypatch):
    """A suite on a card that is not there."""
    card = {"gpu": {"name": "fake", "memory_bytes": 0}}
    monkeypatch.setattr(bench.gpu_suite, "facts", lambda device: card)
    args = SimpleNamespace(
        out=tmp_path, minutes=2, only="parity,kernels,steps", variants="a,b", preset="tiny",
        sequences=1, cap_gib=1.0, device="cuda", dtype="bf16",
    )  # fmt: skip
    return bench.gpu_suite.Suite(args, tmp_path / "scratch")


def test_a_part_that_fails_spares_the_others(bench, suite, monkeypatch) -> None:
    broken = Mock(side_effect=OSError("no disk"))
    monkeypatch.setattr(bench.gpu_suite, "parity", broken)
    monkeypatch.setattr(bench.gpu_suite, "kernels", lambda s: s.note("kernels", complete=True))
    monkeypatch.setattr(bench.gpu_suite, "steps_one_by_one", broken)
    bench.gpu_suite.run(suite)
    error = {"error": "OSError: no disk"}
    found = json.loads((suite.out / "suite.json").read_text())["parts"]
    assert found == {"parity": error, "kernels": {"complete": True}, "steps": error}


def test_the_kernel_bench_is_started_again_after_a_lost_device(
    bench, suite, tmp_path, monkeypatch
) -> None:
    script = """import sys
resume = "--resume" in sys.argv
open(sys.argv[2], "w").write('{"not_run": %s}' % ("[]" if resume else '["a"]'))
sys.exit(0 if resume else 9)"""
    (tmp_path / "bench_kernels.py").write_text(script)
    monkeypatch.setattr(bench.gpu_suite, "BENCH", tmp_path)
    bench.gpu_suite.kernels(suite)
    found = suite.record["parts"]["kernels"]
    assert (found["exit_codes"], found["complete"], found["not_run"]) == ([9, 0], True, [])


def test_a_model_cut_short_keeps_its_samples(bench, suite, tmp_path, monkeypatch) -> None:
    script = """import sys, time
print("3"); print("[]"); print("noise")
print('{"tokens_per_step": %d}' % (8 * len(sys.argv[2])), flush=True)
input(); print('{"seconds": [2.0, 2.0], "alloc_retries": 5}', flush=True)
time.sleep(600)"""
    (tmp_path / "steps.py").write_text(script)
    monkeypatch.setattr(bench.gpu_suite, "BENCH", tmp_path)
    models = [bench.gpu_suite.Model(suite, variant) for variant in ("a", "b", "cc")]
    soon = time.monotonic() + 60
    for model in models:
        model.answer(soon)
    models[0].ask(2, soon)
    for model in models[:2]:
        model.answer(0.0)
    for model in models:
        model.close()
    bench.gpu_suite.write_steps(suite, models)
    a, b, c = json.loads((suite.out / "steps.json").read_text())["rows"]
    assert (a["samples"], a["tokens_per_s"], "failed" in a) == ([2.0, 2.0], 4.0, False)
    assert (a["alloc_retries"], "alloc_retries" in b) == ([5], False)  # a number a round
    assert a["cut_short"] == b["failed"] == "no answer in the time there was"
    assert (a["comparable_with"], c["comparable_with"]) == (["b"], [])


def test_a_lost_device_ends_the_worker_of_its_test(tmp_path, monkeypatch) -> None:
    from tests.gpu import conftest

    fail = Mock(side_effect=RuntimeError("illegal memory access"))
    ended, lines = [], tmp_path / "lines"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("MYPT_PARITY_LINES", str(lines))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match="lost in a_test: RuntimeError: illegal"):
        conftest.settle("a_test")
    assert (ended, json.loads(lines.read_text())["test"]) == ([], "a_test")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(pytest.exit.Exception):  # the real _exit does not come back
        conftest.settle("a_test")
    assert ended == [1]


def test_every_kernel_test_has_a_twin_on_the_gpu() -> None:
    """Every file that tests the operators in more than one way; the others need no card."""
    folder = ROOT / "tests/kernels"
    files = [p for p in folder.glob("test_*.py") if re.search(r"\bway\b", p.read_text())]
    twins = [p.name for p in (ROOT / "tests/gpu").glob("test_parity_*.py")]
    assert sorted(twins) == sorted(p.name.replace("test_", "test_parity_", 1) for p in files)


def test_the_calls_of_the_gpu_tests_are_right() -> None:
    """On the reference: every call runs, and gives what the plain expression gives."""
    from tests.gpu import operators as calls

    for name in calls.NAMES:
        found = calls.make(name, "cpu", torch.float32, "reference").run()
        wanted = calls.make(name, "cpu", torch.float32, "auto").run()
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
