"""`mypt-fast bench`: its record has a schema, names nobody, and replaces only its own kind."""

import getpass
import json
import platform
import re
from pathlib import Path

import pytest
import torch

from mypt_fast import __version__, accounting
from mypt_fast.benchmark import quick
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.errors import DeviceError
from mypt_fast.training.memory import MemoryPlan

SMALL = {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16, "vocab_size": 300}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The command at sizes that take no time, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quick, "TOKENS", 20_000)
    monkeypatch.setattr(quick, "HEAD_QUICK", (16, 32, 300))
    monkeypatch.setattr(quick, "matmul_tflops", lambda device, dtype, seconds: 1.0)
    chosen = ("tiny", ModelConfig(**SMALL), MemoryPlan(2))
    monkeypatch.setattr(quick, "choose", lambda device, precision, short: chosen)
    monkeypatch.setattr(quick, "QUICK", {"cpu": (("tiny", 4),)})
    return tmp_path


def strings(value):
    """Every string of a record, keys too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def test_the_record_has_its_schema_and_its_numbers_agree(small, capsys) -> None:
    assert main(["bench", "--quick", "--device", "cpu"]) == 0
    record = json.loads((small / "mypt-fast-bench.json").read_text())
    head = {"schema", "mypt_fast", "quick", "device", "dtype", "machine", "matmul_flops_per_s"}
    assert set(record) == head | {"rows"}
    assert (record["schema"], record["mypt_fast"], record["quick"]) == (1, __version__, True)
    loader, top, step = record["rows"]
    assert [r["part"] for r in record["rows"]] == ["loader", "head", "step"]
    for row in record["rows"]:
        assert len(row["samples_s"]) >= 3
        assert min(row["samples_s"]) <= row["median_s"] <= max(row["samples_s"])
    assert loader["tokens_per_s"] == pytest.approx(8 * 1024 / loader["median_s"])
    assert top["flops"] == 6 * 16 * 32 * 300
    assert step["tokens_per_step"] == 4 * 16
    assert step["tokens_per_s"] == pytest.approx(64 / step["median_s"])
    per_token = accounting.flops_per_token(ModelConfig(**SMALL))
    assert step["mfu"] == pytest.approx(step["tokens_per_s"] * per_token / 1e12)
    out = capsys.readouterr()
    share = f"MFU {100 * step['mfu']:.0f} % of this machine's measured 1 TFLOP/s"
    assert f"{step['tokens_per_s']:,.0f} tokens/s, {share}" in out.out
    assert "saved to mypt-fast-bench.json" in out.out


def test_the_record_names_neither_machine_nor_user_nor_path(small) -> None:
    assert main(["bench", "--quick", "--device", "cpu", "--json", "mine.json"]) == 0
    found = list(strings(json.loads((small / "mine.json").read_text())))
    assert "tiny" in found
    told = {platform.node(), getpass.getuser(), str(Path.home()), str(small)} - {""}
    assert not [s for s in found if any(re.search(rf"\b{re.escape(t)}\b", s) for t in told)]
    assert not [s for s in found if "/" in s or "\\" in s]


def test_a_record_is_replaced_and_anything_else_is_not(small, capsys) -> None:
    assert main(["bench", "--quick", "--device", "cpu"]) == 0
    assert main(["bench", "--quick", "--device", "cpu"]) == 0
    capsys.readouterr()
    for content in ('{"mine": 1}', "[" * 100_000, "\x00\xff", "[]", '{"rows": []'):
        (small / "other.json").write_text(content, "latin-1")
        assert main(["bench", "--json", "other.json"]) == 2
        assert (small / "other.json").read_text("latin-1") == content
        error = capsys.readouterr().err
        assert error.startswith("error: --json other.json; it holds something other")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "no/such/x.json"], "there is no folder no/such"),
        (["--json", "."], "that is a directory"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--quik"], "did you mean --quick?"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(small, capsys, words, said) -> None:
    assert main(["bench", *words]) == 2
    out = capsys.readouterr()
    assert (out.out, out.err.count("\n")) == ("", 1)
    assert said in out.err
    assert list(small.iterdir()) == []


FP32 = quick.devices.Precision(torch.float32, False, "cpu")


def test_the_step_is_the_largest_that_fits(monkeypatch) -> None:
    cpu = torch.device("cpu")
    for free, found in ((64 << 30, ("small", 8)), (1500 << 20, ("tiny", 16))):
        monkeypatch.setattr(quick.devices, "free_bytes", lambda device, free=free: free)
        name, _, plan = quick.choose(cpu, FP32, False)
        assert (name, plan) == (found[0], MemoryPlan(found[1]))
    monkeypatch.setattr(quick.devices, "free_bytes", lambda device: 16 << 20)
    with pytest.raises(DeviceError, match="16 MiB are free"):
        quick.choose(cpu, FP32, False)


def test_on_a_gpu_it_trains_as_it_would_be_planned(monkeypatch) -> None:
    gpu, bf16 = torch.device("cuda"), quick.devices.Precision(torch.bfloat16, False, "cuda")
    monkeypatch.setattr(quick.devices, "free_bytes", lambda device: 19 << 30)
    monkeypatch.setattr(quick.devices, "describe", lambda device: "NVIDIA GeForce RTX 5060 Ti")
    name, _, plan = quick.choose(gpu, bf16, False)
    assert (name, plan.state, plan.recompute, plan.residual) == (
        "750M_1024", "exact16", "norms", "bf16",
    )  # fmt: skip


def test_a_slow_machine_takes_three_samples_and_no_more() -> None:
    found = quick.sampled(lambda: 2.0, 7, seconds=0.0)
    assert found == {"median_s": 2.0, "samples_s": [2.0, 2.0, 2.0]}
