"""What bench_step.py compares is the same model: weights, losses, gradients, decayed parameters."""

import dataclasses
import importlib
import json
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mypt_fast import presets
from mypt_fast.config import TrainConfig
from mypt_fast.model import GPT

BENCH = Path(__file__).parent.parent / "bench"
SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 16, "vocab_size": 300}


@pytest.fixture
def bench(monkeypatch) -> SimpleNamespace:
    """The modules of bench/ that train, on a CPU."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("bench_step", "gpu_suite", "hf_gpt", "mypt_gpt", "plain_gpt", "steps")
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(modules.bench_step, "DEVICE", "cpu")
    return modules


def small(preset="base/750M_unified_v1", **changes):
    return dataclasses.replace(presets.load(preset).model, **{**SIZES, "dropout": 0.0, **changes})


def learnt(bench, name, cfg):
    """The loss before and after twenty steps."""
    step = stepper(bench, name, 32, 32, "fp32", cfg)
    for group in step.optimizer.param_groups:
        group["lr"] = 3e-3
    first = step.final_loss()
    step.model.train()
    assert all(step() > 0 for _ in range(20))
    return first, step.final_loss()


@pytest.mark.parametrize("preset", ["base/750M_unified_v1", "150M_1024", "150M_1024_llama"])
def test_every_reference_learns_what_ours_learns(bench, preset) -> None:
    """Twenty steps from the same weights on the same batches end at the same loss: the same model,
    tokens, groups, learning rate and clipping. A wrong decay, order or batch shows here."""
    first, last = learnt(bench, "auto-eager", small(preset))
    assert last < first - 0.3
    for name in ("plain-eager", "mypt-eager"):
        assert learnt(bench, name, small(preset)) == pytest.approx((first, last), abs=1e-4), name


def test_transformers_learns_what_ours_learns(bench) -> None:
    pytest.importorskip("transformers", reason="the baseline of Hugging Face is not installed")
    cfg = small("150M_1024_llama")
    assert bench.hf_gpt.why_not(cfg, "cpu") is None
    first, last = learnt(bench, "auto-eager", cfg)
    theirs = learnt(bench, "hf-eager", cfg)
    assert theirs[0] == pytest.approx(first, abs=1e-5)
    assert theirs[1] == pytest.approx(last, abs=0.1)  # its head has no bias to learn
    assert decayed(bench, "hf-eager", cfg) == decayed(bench, "auto-eager", cfg)


def decayed(bench, name, cfg):
    """How many parameters the first group, the decayed one, has."""
    groups = stepper(bench, name, 1, 1, "fp32", cfg).optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [TrainConfig().weight_decay, 0.0]
    return sum(p.numel() for p in groups[0]["params"])


def test_every_optimizer_decays_the_same_parameters(bench) -> None:
    cfg = small("150M_1024_llama")
    assert cfg.tie_weights
    sizes = {decayed(bench, name, cfg) for name in ("auto-eager", "plain-eager", "mypt-eager")}
    assert len(sizes) == 1


def test_mypt_keeps_its_logits_and_others_do_not(bench) -> None:
    cfg = small("150M_1024", dropout=0.1)
    x, y = bench.steps.batch(cfg, 2, 0, "cpu")
    logits, loss, cache = bench.mypt_gpt.MyptGPT(cfg)(x, y)
    assert (logits.shape, loss.dim(), cache) == ((2, 16, 300), 0, None)
    assert bench.plain_gpt.PlainGPT(cfg)(x, y).dim() == GPT(cfg)(x, y).dim() == 0
    assert bench.mypt_gpt.mypt_adamw(GPT(cfg), TrainConfig()).defaults["fused"] is None


def test_batches_are_the_same_for_all_and_another_each_step(bench) -> None:
    cfg = small()
    x, y = bench.steps.batch(cfg, 2, 5, "cpu")
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, bench.steps.batch(cfg, 2, 5, "cpu")[0])
    assert not torch.equal(x, bench.steps.batch(cfg, 2, 6, "cpu")[0])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("auto", ("auto", "none", "exact", True, False, None, True)),
        ("auto-eager", ("auto", "none", "exact", False, False, None, True)),
        ("auto-whole", ("auto", "none", "exact", True, True, None, True)),
        ("mypt", ("mypt", "none", "exact", False, False, None, False)),
        ("triton/mlp", ("triton", "mlp", "exact", True, False, None, True)),
        ("reference/norms+fast-eager", ("reference", "norms", "fast", False, False, None, True)),
        ("auto/norms+fast@6", ("auto", "norms", "fast", True, False, 6, True)),
        ("plain@2-eager", ("plain", "none", "exact", False, False, 2, False)),
        ("mypt-eager~kept", ("mypt", "none", "exact", False, False, None, True)),
        ("auto/plan", ("auto", "plan", "exact", True, False, None, True)),
    ],
)  # fmt: skip
def test_names_of_variants(bench, name, found) -> None:
    assert dataclasses.astuple(bench.steps.Variant.named(name)) == found


@pytest.mark.parametrize(
    "name",
    [
        "plain-quick",
        "auto/gate_up",
        "auto/norms+fp8",
        "auto@",
        "auto@0",
        "auto@many",
        "plain~",
        "plain~thp",
    ],
)
def test_a_variant_that_means_nothing_is_refused(bench, name) -> None:
    with pytest.raises(ValueError, match="expected KIND"):
        bench.steps.Variant.named(name)


def stepper(bench, name, rows=2, sequences=2, dtype="bf16", cfg=None):
    case = bench.steps.Case(cfg or small(), sequences, "cpu", dtype, 16.0)
    return bench.steps.Stepper(bench.steps.Variant.named(name), case, rows)


@pytest.mark.parametrize(
    "name", ["reference/mlp+fast-eager", "auto/norms+exact16-eager", "auto-eager"]
)
def test_bf16_steps_run(bench, name) -> None:
    assert stepper(bench, name)() > 0


@pytest.mark.parametrize("name", ["plain-eager", "auto-eager"])
def test_a_step_in_several_micro_batches_is_the_same_step(bench, name) -> None:
    whole, parts = (stepper(bench, name, rows, 4, "fp32") for rows in (4, 1))
    for step in (whole, parts):
        step()
        step()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert whole.final_loss() == pytest.approx(parts.final_loss(), abs=1e-4)  # of the same batch


def test_the_planner_chooses_under_the_cap(bench, monkeypatch) -> None:
    monkeypatch.setattr(bench.steps.devices, "describe", lambda device: "RTX 5060 Ti")
    cfg = bench.steps.presets.load("500M_1024").model
    case = bench.steps.Case(cfg, 8, "cuda", "bf16", 15.7)
    setup = case.setup(bench.steps.Variant.named("auto/plan"), 8)
    assert (setup.rows, setup.policy.name, setup.layout.name) == (8, "norms", "exact16")
    assert bench.steps.planned(setup)["predicted_bytes"] < 12.6 * 2**30
    with pytest.raises(ValueError, match="no plan fits"):
        dataclasses.replace(case, cap_gib=3.0).setup(bench.steps.Variant.named("auto/plan"), 8)


@pytest.fixture
def card(bench, monkeypatch):
    """A GPU on which steppers of more than `eager` or `compiled` sequences do not fit; those of
    `retrying` do by retries in each step. `built` lists who was built: (rows, compiled)."""
    found = SimpleNamespace(eager=4, compiled=6, retrying={}, built=[], retries=0)

    class Fake:
        def __init__(self, variant, case, rows) -> None:
            self.case, self.rows, self.setup, self.compiled = case, rows, None, variant.compiled
            found.built.append((rows, variant.compiled))

        def begin(self) -> None:
            self.case = None

        def __call__(self) -> float:
            if self.rows > (found.compiled if self.compiled else found.eager):
                raise torch.OutOfMemoryError("full")
            assert self.case.sequences % self.rows == 0
            found.retries += self.rows in found.retrying
            return found.retrying.get(self.rows, 1.0)

    monkeypatch.setattr(bench.steps, "Stepper", Fake)
    monkeypatch.setattr(bench.steps, "planned", lambda setup: {})
    monkeypatch.setattr(bench.steps, "retries", lambda device: found.retries)
    return found


def ready(bench, name, sequences=96, device="cuda"):
    case = bench.steps.Case(small(), sequences, device, "bf16", 16.0)
    return bench.steps.ready(name, case)[1]


def test_what_fits_is_found_with_few_compilations(bench, card) -> None:
    """Eagerly 4 of 96 fit, so 8, 6 are compiled and no other; an uncompiled one is built at 4."""
    about = ready(bench, "plain")
    assert (about["micro_batch"], about["fits_eagerly"], about["did_not_fit"]) == (6, 4, [8])
    assert card.built == [(1, False), (8, True), (6, True)]
    card.built.clear()
    assert ready(bench, "mypt")["micro_batch"] == 4
    assert card.built == [(1, False), (4, False)]


def test_nothing_is_searched_on_a_cpu_or_where_the_rows_are_named(bench, card) -> None:
    card.compiled = 96
    about = ready(bench, "plain", device="cpu")
    assert (about["micro_batch"], "fits_eagerly" in about, "warm_up_retries" in about) == (
        96, False, False,
    )  # fmt: skip
    assert ready(bench, "auto/norms+fast@6")["micro_batch"] == 6
    assert card.built == [(96, True), (6, True)]
    with pytest.raises(ValueError, match="micro-batches of 5 do not make 96"):
        ready(bench, "auto@5")
    card.compiled = 3
    with pytest.raises(torch.OutOfMemoryError, match="6"):
        ready(bench, "auto@6")


@pytest.mark.parametrize(("step_s", "kept"), [(3.0, 4), (0.5, 6)])
def test_of_one_that_lives_on_retries_and_the_next_smaller_the_faster_stays(
    bench, card, step_s, kept
) -> None:
    card.retrying = {6: step_s}
    about = ready(bench, "plain")
    assert about["micro_batch"] == kept
    assert about["short_of_memory"] == [{"micro_batch": 6, "step_s": step_s, "retries": 2}]
    assert card.built[2:] == [(6, True), (4, True)] + ([(6, True)] if kept == 6 else [])


def test_a_retrying_one_above_the_smallest_is_compared_with_the_smallest(bench, card) -> None:
    card.compiled, card.retrying = 2, {2: 0.5}
    assert ready(bench, "plain", sequences=2)["micro_batch"] == 2
    assert card.built[-3:] == [(2, True), (1, True), (2, True)]


def answer(variant, seconds, tokens=256, **more):
    return {
        "variant": variant, "samples": seconds, "tokens_per_step": tokens,
        "tokens_per_s": 256 / bench_median(seconds), **more,
    }  # fmt: skip


def bench_median(values):
    return sorted(values)[len(values) // 2]


def test_ratios_are_taken_round_by_round(bench) -> None:
    """The machine slows down threefold in the last round: no ratio moves, a ratio of medians of
    other rounds would."""
    case = bench.bench_step.Case("tiny", "fp32", 2, rounds=3)
    rows = [
        answer("plain", [2.0, 4.0, 12.0]), answer("mypt-eager", [3.0, 6.0, 18.0]),
        answer("auto", [1.0, 2.0, 6.0]), answer("auto-eager", [4.0, 4.0]),
    ]  # fmt: skip
    found = {r["variant"]: r for r in bench.bench_step.finish(case, rows, True, 1e12)}
    times = found["auto"]["times"]
    assert times["plain"] == {"median": 2.0, "min": 2.0, "max": 2.0, "rounds": 3}
    assert times["mypt-eager"]["median"] == 3.0
    assert set(times) == {"plain", "mypt-eager"}  # the eager one was cut short
    assert "times" not in found["auto-eager"]
    # by hand, C = 192: 12 C^2 a block and V C in matmuls, and L C T for causal attention
    flops = 6 * (4 * 12 * 192**2 + 50304 * 192) + 6 * 4 * 192 * 128
    assert found["plain"]["mfu"] == pytest.approx(256 / 4.0 * flops / 1e12, rel=1e-3)


def test_models_of_other_steps_are_not_compared(bench) -> None:
    case = bench.bench_step.Case("tiny", "bf16", 2, rounds=1)
    rows = [answer("plain", [2.0], tokens=128), answer("auto", [1.0])]
    rows = bench.bench_step.finish(case, rows, False, 1e12)
    assert rows[1]["times"] == {}


@pytest.fixture
def little(bench, monkeypatch, tmp_path):
    """A case on a preset file of our own, of variants that compile nothing."""
    preset = tmp_path / "little.json"
    preset.write_text(json.dumps({**SIZES, "dropout": 0.0, "batch_size": 2}))
    names = ("plain-eager", "mypt-eager", "hf", "auto-eager")
    monkeypatch.setattr(bench.bench_step, "OURS", "auto-eager")
    return bench.bench_step.Case(str(preset), "fp32", 2, rounds=2, variants=names)


@pytest.mark.slow
def test_the_script_runs_processes_in_turn_and_saves_their_rows(
    bench, little, monkeypatch, tmp_path, capsys
) -> None:
    monkeypatch.setattr(bench.bench_step, "CASES", {"cpu": (little,)})
    monkeypatch.setattr(bench.bench_step, "matmul_rate", lambda clock, dtype: 1e12)
    monkeypatch.setattr(sys, "argv", ["bench_step.py"])
    monkeypatch.setattr(importlib.import_module("record"), "RESULTS", tmp_path)
    assert bench.bench_step.main() == 0
    *rows, absent = json.loads((tmp_path / "cpu/step.json").read_text())["rows"]
    assert absent["absent"]
    assert not [r["failed"] for r in rows if "failed" in r]
    assert [len(r["samples"]) for r in rows] == [2, 2, 2]
    assert {r["steps"] for r in rows} == {bench.steps.WARM_UP + 2}
    assert all(r["peak_resident_bytes"] > 1 << 20 for r in rows)
    assert max(r["loss"] for r in rows) - min(r["loss"] for r in rows) < 1e-4
    assert rows[2]["times"]["mypt-eager"]["rounds"] == 2
    assert "x mypt-eager" in capsys.readouterr().out
    report = importlib.import_module("report_tables")
    assert len(report.step([*rows, absent])) == 2 + 4


@pytest.mark.slow
def test_the_row_of_pytest_times_our_process_and_ends_all(bench, little, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(
        bench.bench_step,
        "Model",
        lambda *a: started.append(bench.gpu_suite.Model(*a)) or started[-1],
    )

    def pedantic(work, setup, rounds):
        for _ in range(rounds):
            setup()
            work()

    mark = SimpleNamespace(group="", extra_info={}, pedantic=pedantic)
    bench.bench_step.test_step(mark, little)
    assert [len(r["samples"]) for r in mark.extra_info["rows"]] == [2, 2, 2]
    assert [m.process.poll() is not None for m in started] == [True] * 3


@pytest.fixture
def script(bench, little, monkeypatch, tmp_path):
    """A function that runs the script on a card too small for two; processes stand in."""
    record, module = importlib.import_module("record"), bench.bench_step
    gpu = {"name": "fake", "clocks.sm": "1 MHz"}

    class Fake:
        def __init__(self, run, variant) -> None:
            self.variant = variant

        def answer(self, until) -> None:
            gpu["clocks.sm"] += "!"  # another one each time
            if self.variant == "mypt-eager" and died:
                raise KeyboardInterrupt

        def ask(self, steps, until) -> None:
            pass

        def close(self) -> None:
            pass

        def row(self):
            seconds = 2.0 if self.variant == "plain-eager" else 1.0
            return answer(self.variant, [seconds] * little.rounds)

    died = []
    facts = {"date": "2020-02-03", "torch": "9", "gpu": gpu}
    monkeypatch.setattr(module, "CASES", {"cpu": (dataclasses.replace(little, more="x"),)})
    monkeypatch.setattr(module, "matmul_rate", lambda clock, dtype: 1e12)
    monkeypatch.setattr(module, "roomy", lambda: False)
    monkeypatch.setattr(module, "Model", Fake)
    monkeypatch.setattr(bench.gpu_suite, "facts", lambda device: facts)
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bench_step.py", *flags])
        try:
            module.main()
        finally:
            found = json.loads((tmp_path / "fake/step.json").read_text())["rows"]
            found = {r["variant"]: r for r in found}
        return found

    return SimpleNamespace(run=run, died=died, facts=facts, path=tmp_path / "fake/step.json")


def test_a_part_is_added_to_what_the_file_holds(script, capsys) -> None:
    first = script.run("--variants", "plain-eager,auto-eager")
    assert list(first) == ["plain-eager", "auto-eager"]
    assert first["auto-eager"]["times"] == {"plain-eager": {"median": 2.0, "of": "medians"}}
    both = script.run("--variants", "mypt-eager,auto-eager", "--keep", "--minutes", "2")
    assert list(both) == ["plain-eager", "mypt-eager", "auto-eager"]
    assert list(both["auto-eager"]["times"]) == ["mypt-eager"]  # those of its own call
    assert list(script.run("--variants", "mypt-eager")) == ["mypt-eager"]
    script.facts["torch"] = "10"
    with pytest.raises(SystemExit):
        script.run("--keep")
    assert "the file's torch is 9, not 10" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.run("--variants", "auto-quick")
    assert "variant auto-quick: expected" in capsys.readouterr().err


def test_a_call_that_is_killed_leaves_what_it_measured(script) -> None:
    script.died.append(True)
    with pytest.raises(KeyboardInterrupt):
        script.run("--variants", "plain-eager,mypt-eager")
    assert [r["variant"] for r in json.loads(script.path.read_text())["rows"]] == ["plain-eager"]


@pytest.mark.parametrize(
    ("text", "gib"), [("16G", 16.0), ("16", 16.0), ("12.5GiB", 12.5), ("512M", 0.5)]
)
def test_sizes(bench, text, gib) -> None:
    assert bench.bench_step.gib(text) == gib


@pytest.mark.parametrize("text", ["", "16 pounds", "-1", "0", "nan"])
def test_sizes_that_are_none(bench, text) -> None:
    with pytest.raises(ArgumentTypeError, match="expected a size as 16G"):
        bench.bench_step.gib(text)


def test_an_unknown_case_is_one_line(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--cases", "huge-fp8"])
    with pytest.raises(SystemExit) as stopped:
        bench.bench_step.main()
    assert stopped.value.code == 2
    assert "found huge-fp8" in capsys.readouterr().err


def test_a_step_that_did_not_fit_leaves_nothing_behind(bench, monkeypatch) -> None:
    """The search goes on with the same model: no gradients, no half of a step of the scaler."""
    case, seen = bench.steps.Case(small(), 8, "cpu", "fp32", 16.0), []
    step = stepper(bench, "plain-eager", 1, 8, "fp32")
    forward = step.forward

    def full(loss_of, x, y):
        seen.append(len(x))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("full")
        return forward(loss_of, x, y)

    monkeypatch.setattr(step, "forward", full)
    assert not bench.steps.fits(step, case, 4)
    assert all(p.grad is None for p in step.model.parameters())
    assert bench.steps.fits(step, case, 2)
    assert seen == [4, 4] + [2] * 4  # two steps of two micro-batches, and no more of eight
