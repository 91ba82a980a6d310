"""MFU: where its ceilings come from, and that log and console say the same."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import events

from mypt_fast import accounting, console, presets
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.planner import cards, ceiling, search, speed
from mypt_fast.training import device as devices
from mypt_fast.training import memory, plan, utilisation
from mypt_fast.training.memory import MemoryPlan
from mypt_fast.training.utilisation import Ceilings

CPU = torch.device("cpu")
FP32 = devices.Precision(torch.float32, False, "cpu")
CARD = "NVIDIA GeForce RTX 5060 Ti"
CFG = ModelConfig(n_layer=1, n_embd=32, n_head=2, block_size=16, vocab_size=300)


@pytest.fixture(autouse=True)
def rate(tmp_path, monkeypatch):
    """A cache of this test's own, and matmuls that reach 0.25 TFLOP/s; the list of measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []

    def matmul_tflops(device, dtype, seconds):
        made.append(dtype)
        return 0.25

    monkeypatch.setattr(utilisation.measuring, "matmul_tflops", matmul_tflops)
    return made


def test_a_device_is_measured_once_and_says_so(rate) -> None:
    found, note = utilisation.find(CPU, FP32, CFG)
    assert (found.measured, found.card, found.published) == (0.25, None, None)
    assert note.startswith("measured 0.25 TFLOP/s of fp32 matmuls, kept in ")
    assert utilisation.find(CPU, FP32, CFG) == (found, None)
    assert rate == [torch.float32]
    utilisation.find(CPU, devices.Precision(torch.bfloat16, False, "cpu"), CFG)
    assert rate == [torch.float32, torch.bfloat16]
    kept = ceiling.measured(devices.describe(CPU))
    assert kept["tflops"] == {"fp32": 0.25, "bf16": 0.25}
    assert kept["torch"] == torch.__version__


def test_what_the_command_kept_counts(rate) -> None:
    ceiling.keep(devices.describe(CPU), {"tflops": {"fp32": 0.5}})
    assert utilisation.find(CPU, FP32, CFG)[0].measured == 0.5
    assert rate == []


def test_what_cannot_be_kept_is_used_all_the_same(tmp_path) -> None:
    (tmp_path / "cache").write_text("a file")
    found, note = utilisation.find(CPU, FP32, CFG)
    assert found.measured == 0.25
    assert note == "measured 0.25 TFLOP/s of fp32 matmuls, not kept: Not a directory"


@pytest.fixture
def cleaned(monkeypatch):
    """A GPU by name alone; what is called to leave nothing of the measurement in its memory."""
    calls = []
    monkeypatch.setattr(devices, "describe", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    return calls


def test_measuring_leaves_nothing_in_a_gpus_memory_or_its_peak(cleaned) -> None:
    gpu = torch.device("cuda", 1)
    found, _ = utilisation.find(gpu, devices.Precision(torch.bfloat16, False, "cuda"), CFG)
    assert (found.measured, found.published) == (0.25, 46.1)
    assert cleaned == ["cache", gpu]


def test_without_memory_for_it_there_is_no_ceiling(cleaned, monkeypatch) -> None:
    def refuse(device, dtype, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(utilisation.measuring, "matmul_tflops", refuse)
    monkeypatch.setattr(devices, "describe", lambda device: "a card that nobody knows")
    found, note = utilisation.find(torch.device("cuda"), FP32, CFG)
    assert cleaned == ["cache", torch.device("cuda")]
    assert (found.measured, note) == (None, None)
    assert found.mfu(1e6) is None
    assert (found.fields(), found.shares(1e6), found.words(1e6)) == ({}, {}, "")
    assert not ceiling.ceiling_file().exists()


def test_both_ceilings_of_a_card_that_the_table_knows(monkeypatch) -> None:
    monkeypatch.setattr(devices, "describe", lambda device: CARD)
    ceiling.keep(CARD, {"tflops": {"bf16": 40.0}})
    bf16 = devices.Precision(torch.bfloat16, False, "cuda")
    found, _ = utilisation.find(CPU, bf16, CFG)
    flops = accounting.flops_per_token(CFG)
    assert found == Ceilings(flops, 40.0, cards.find("RTX 5060 Ti"), 46.1)
    assert found.fields() == {"ceiling_tflops": 40.0, "card_ceiling_tflops": 46.1}
    speed = 20e12 / flops
    assert found.shares(speed) == {"mfu": 0.5, "mfu_card": 0.4338}
    assert found.words(speed) == (
        " | MFU 50 % of this machine's measured 40 TFLOP/s and 43 % of the 46 TFLOP/s published "
        "for the RTX 5060 Ti"
    )


def test_more_than_the_ceiling_is_no_secret() -> None:
    assert Ceilings(1e12, 2.0).words(3.0) == (
        " | MFU 150 % of this machine's measured 2 TFLOP/s (too low: `mypt-fast ceiling` measures "
        "it anew)"
    )


def test_the_live_line_has_the_share_where_it_is_known(capsys) -> None:
    live = console.Live(10, 0, every_s=0.0)
    live.step(1, 2.5, 18_100.0, 1 << 30, 0.618)
    live.step(2, 2.5, 18_100.0, 1 << 30, None)
    one, two = capsys.readouterr().err.splitlines()
    assert one == "step 1/10 | loss 2.5000 | 18.1k tok/s | 62 % of ceiling | 1.0 GiB | ETA ..."
    assert two.startswith("step 2/10 | loss 2.5000 | 18.1k tok/s | 1.0 GiB | ETA ")


def test_the_log_and_the_last_line_agree(train, capsys, rate) -> None:
    assert train("a") == 0
    out = capsys.readouterr()
    assert out.err.count("note: measured 0.25 TFLOP/s of fp32 matmuls") == 1
    assert events("a", "training_start")[0]["ceiling_tflops"] == 0.25
    assert "card_ceiling_tflops" not in events("a", "training_start")[0]
    config = json.loads(Path("checkpoints/a/config.json").read_text())
    cfg = ModelConfig(**{k: config[k] for k in ("n_layer", "n_embd", "block_size", "vocab_size")})
    of_one = accounting.flops_per_token(cfg) / 0.25e12
    for step in events("a", "train"):
        assert step["mfu"] == pytest.approx(step["tokens_per_sec"] * of_one, abs=1e-4)
    last = events("a", "training_complete")[0]
    assert last["mfu"] == pytest.approx(last["tokens_per_sec"] * of_one, abs=1e-4)
    assert "mfu_card" not in last
    share = f"{last['tokens_per_sec']:,.0f} tokens/s | MFU {100 * last['mfu']:.0f} %"
    assert f"{share} of this machine's measured 0.25 TFLOP/s\n" in out.out
    assert main(["train", "--model_name", "a", "--max_iters", "13"]) == 0
    assert rate == [torch.float32]


def test_a_step_without_a_ceiling_has_no_share(train, capsys, monkeypatch) -> None:
    monkeypatch.setattr(utilisation, "_measure", lambda device, dtype: None)
    assert train("a") == 0
    assert not [e for e in events("a") if {"mfu", "ceiling_tflops"} & set(e)]
    out = capsys.readouterr().out
    assert re.search(r"\| [\d,]+ tokens/s\n", out)
    assert not re.search(r"^time ", out, re.M)


def starting(cfg: ModelConfig, device: str, dtype: torch.dtype) -> SimpleNamespace:
    """A run at its start: a step in one forward, where matmuls reach 1 TFLOP/s."""
    return SimpleNamespace(
        device=torch.device(device), precision=devices.Precision(dtype, False, device),
        ceilings=Ceilings(accounting.flops_per_token(cfg), 1.0), free_bytes=16 << 30,
        settings=SimpleNamespace(model=cfg, global_batch=8), plan=MemoryPlan(8),
    )  # fmt: skip


def guess(cfg: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """MFU that the start line counts on."""
    speed = plan.estimated_tokens_per_s(starting(cfg, device, dtype))
    return accounting.mfu(speed, accounting.flops_per_token(cfg), 1.0)


def test_the_guess_is_the_mfu_that_was_measured_on_a_cpu() -> None:
    measured = {  # docs/decisions.md; per cent in fp32 and bf16
        "tiny_char": (52, 33), "tiny": (68, 53), "small": (71, 52),
    }  # fmt: skip
    for name, shares in measured.items():
        cfg = presets.load(presets.shipped_dir() / f"{name}.json").model
        for dtype, share in zip((torch.float32, torch.bfloat16), shares, strict=True):
            assert guess(cfg, "cpu", dtype) == pytest.approx(share / 100, rel=0.05)


@pytest.mark.parametrize("name", ["RTX 5060 Ti", "T4", "a card that nobody knows"])
def test_the_guess_on_a_gpu_is_that_of_plan(monkeypatch, tmp_path, name) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "describe", lambda device: name)
    cfg, dtype = ModelConfig(block_size=1024), torch.float16 if name == "T4" else torch.bfloat16
    run = starting(cfg, "cuda", dtype)
    card = memory.card_of(run.device, run.precision, run.free_bytes)
    of_one = dataclasses.replace(card, own={run.precision.name: 1.0})
    found = search.evaluate(run.plan.setup(cfg, 8, run.precision), of_one)
    known = cards.known(name) is not None
    bandwidth = of_one.gb_per_s if known else search.TYPICAL_BANDWIDTH
    expected = speed.tokens_per_s(found.setup, 1.0, 0.6 if name == "T4" else 0.8, bandwidth)
    assert found.tokens_per_s == expected
    assert plan.estimated_tokens_per_s(run) == expected


def test_the_start_line_has_the_guess(train, capsys) -> None:
    assert train("a", "--dry_run") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("time"))
    cfg = ModelConfig(n_layer=2, n_embd=16, block_size=12, vocab_size=16)
    tokens = 0.25e12 * guess(cfg, "cpu", torch.float32) / accounting.flops_per_token(cfg)
    assert f"at {console.count(tokens)} tokens/s with evaluations" in line
