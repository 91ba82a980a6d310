"""`mypt-fast ceiling` on a CPU."""

import json

import pytest
import torch

from mypt_fast.cli import cmd_ceiling, main
from mypt_fast.kernels import ceiling as measuring
from mypt_fast.planner import ceiling
from mypt_fast.training import device as devices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cmd_ceiling, "SECONDS", 0.05)
    monkeypatch.setattr(measuring, "SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(measuring, "COPY_BYTES", {"cpu": 1 << 20})


def test_what_is_measured_is_kept_for_the_trainer_to_find(capsys):
    assert main(["ceiling", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    name = devices.describe(CPU)
    assert report["device"] == name
    assert report["tflops"]["fp32"] > 0
    assert report["gb_per_s"] > 0
    assert ("bf16" in report["tflops"]) == devices.cpu_has_bf16()
    assert ceiling.measured_ceiling(name, "fp32") == report["tflops"]["fp32"]
    assert ceiling.measured_ceiling(name) == max(report["tflops"].values())


def test_nothing_is_kept_when_asked_not_to(capsys):
    assert main(["ceiling", "--device", "cpu", "--no-save"]) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    assert not ceiling.ceiling_file().exists()


def test_what_was_published_for_the_card_stands_beside_it(capsys, monkeypatch):
    words = ["ceiling", "--device", "cpu", "--no_save"]
    assert main([*words, "--json"]) == 0
    assert "published" not in json.loads(capsys.readouterr().out)
    monkeypatch.setattr(devices, "describe", lambda device: "NVIDIA GeForce RTX 5060 Ti")
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["published"]
    assert (found["card"], found["tflops"]["bf16"]) == ("RTX 5060 Ti", 46.1)
    assert found["source"].startswith("zzc0721/torch-performance-test-data #129")
    assert main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last == f"others  fp16 45.9, bf16 46.1, fp32 15.9 TFLOP/s: RTX 5060 Ti, {found['source']}"
    )


def test_sizes_that_would_take_too_long_are_left_out(monkeypatch):
    asked = []

    def slow(run, device, budget):
        asked.append(budget)
        return 2 * 64**3 / 1e6  # of the first size: a million FLOPs a second

    monkeypatch.setattr(measuring, "best_seconds", slow)
    assert measuring.matmul_tflops(CPU, torch.float32, 0.2) == pytest.approx(1e-6)
    assert asked == [0.1]


def test_measuring_draws_none_of_the_trainings_numbers():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    measuring.matmul_tflops(CPU, torch.float32, 0.01)
    assert torch.equal(torch.rand(3), want)


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert main(["ceiling", "--device", "tpu"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown device 'tpu'")


def test_a_rate_is_work_over_the_shortest_time(monkeypatch):
    monkeypatch.setattr(measuring, "best_seconds", lambda run, device, budget: 1e-3)
    assert measuring.matmul_tflops(CPU, torch.float32, 1.0) == pytest.approx(
        2 * 128**3 / 1e-3 / 1e12
    )
    assert measuring.copy_gb_per_s(CPU, 1.0) == pytest.approx(2 * (1 << 20) / 1e-3 / 1e9)


def test_the_shortest_call_counts_and_the_first_does_not(monkeypatch):
    calls, clock = [], iter([1.0, 1.5, 2.0, 2.25])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    assert measuring.best_seconds(lambda: calls.append(1), CPU, 0.0) == pytest.approx(0.25)
    assert len(calls) == 3
