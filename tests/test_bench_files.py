"""Every file of bench/ imports, and runs one tiny round of what it measures. Nothing is timed."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mypt_fast import presets

BENCH = Path(__file__).parent.parent / "bench"
# each has a test: here, or (kernels, step) in test_bench_smoke.py and test_bench_step.py
FILES = {
    "attention", "core", "guard", "kernels", "loader", "prefetch", "prepare", "saves", "start",
    "states", "step",
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a file of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def tokens(tmp_path):
    """A dataset of 20,000 tokens, 2 bytes each."""
    (tmp_path / "train").mkdir()
    ids = np.random.default_rng(0).integers(0, 50_304, 20_000, dtype=np.uint16)
    ids.tofile(tmp_path / "train/shard_00000.bin")
    (tmp_path / "dataset_metadata.json").write_text(json.dumps({"dtype": "uint16"}))
    return tmp_path


class Benchmark(SimpleNamespace):
    """Stands in for pytest-benchmark's fixture: runs each work once."""

    def __init__(self) -> None:
        super().__init__(stats=None, extra_info={}, group="", runs=0)

    def pedantic(self, work, setup=None, **kwargs):
        if setup is not None:
            setup()
        self.runs += 1
        return work()

    def __call__(self, work):
        return self.pedantic(work)


def test_every_file_of_bench_has_its_round() -> None:
    assert {p.stem.removeprefix("bench_") for p in BENCH.glob("bench_*.py")} == FILES


def test_loader(bench, tokens) -> None:
    module, mark = bench("bench_loader"), Benchmark()
    for way in module.WAYS:
        module.test_batch(mark, (tokens, "uint16"), 2, 64, way)
        assert mark.extra_info["way"] == way if "way" in mark.extra_info else mark.stats is None
    assert mark.runs == len(module.WAYS) >= 5


def test_prefetch(bench, tokens) -> None:
    module, mark = bench("bench_prefetch"), Benchmark()
    for way in module.WAYS:
        module.test_next(mark, tokens, "quiet", way)
    assert mark.runs == len(module.WAYS) == 3


def test_guard(bench, monkeypatch) -> None:
    module = bench("bench_guard")
    monkeypatch.setattr(module, "ROUNDS", 20)
    for name in module.CASES:
        row = module.measure(name)
        assert row["what"] == name
        assert len(row["samples_s"]) == 20
        assert 0 < row["median_s"] <= row["p99_s"]


def test_prepare(bench, tmp_path) -> None:
    module = bench("bench_prepare")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("what was written is read " * 50)
    for way, made in ((module.BASELINE, "train.bin"), ("mypt-fast, tiktoken, 1 worker", "data")):
        out = tmp_path / way.replace(",", "")
        out.mkdir()
        module.WAYS[way](folder, out)
        assert (out / made).exists()


def little(name, **changes):
    """A preset of this name at sizes that take no time."""
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16, "batch_size": 2}
    found = presets.load(name)
    return dataclasses.replace(found, model=dataclasses.replace(found.model, **sizes, **changes))


def test_saves(bench, monkeypatch, tmp_path) -> None:
    module, mark = bench("bench_saves"), Benchmark()
    made = little("small")
    monkeypatch.setattr(module.presets, "load", lambda name: made)
    torch.manual_seed(0)
    small = module.Small()
    module.test_copy(mark, small)
    assert mark.extra_info == {"what": "copy", "bytes": module.state_bytes(small)}
    module.test_write(mark, small, tmp_path)
    module.test_verify(mark, small, tmp_path)
    module.test_micro_step(mark, small, tmp_path, "beside")
    assert mark.extra_info["save_seconds"] is not None
    rows = [
        {"what": "alone", "seconds": [1.0]}, {"what": "copy", "seconds": [0.4]},
        {"what": "beside", "seconds": [2.0], "save_seconds": 4.0},
    ]  # fmt: skip
    # the copy, and half of the four seconds of a save, over 50 steps of 8 micro-steps of a second
    assert module.overhead(rows) == pytest.approx((0.4 + 2.0) / 400)


@pytest.fixture
def states(bench, monkeypatch):
    """bench_states, of a small model, without torchao."""
    module = bench("bench_states")
    monkeypatch.setattr(module, "torchao", lambda part="optim": None)
    monkeypatch.setattr(module, "BYTES", 20_000)
    monkeypatch.setattr(module, "SHAPE", {**module.SHAPE, "n_layer": 1, "n_embd": 32})
    monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(module, "SAVED_AT", 2)
    return module


def test_states(states) -> None:
    """Each layout steps, and learns from the same start what the others do."""
    mark = Benchmark()
    for state in states.LAYOUTS:
        states.test_step(mark, state)
    assert mark.runs == 3
    losses = {v: states.trained(v, 1, 4)[0]["val_loss"] for v in (*states.LAYOUTS, states.STREAM16)}
    assert max(losses.values()) - min(losses.values()) < 0.05
    assert losses["exact"] < 5.5  # ln 256 is 5.55
    assert losses[states.STREAM16] != losses["exact"]  # the stream did change


def test_bytes_of_states_are_those_that_are_promised(states) -> None:
    shape = {**states.SHAPE, "n_embd": 64}  # no matrix is too small for codes
    tensors = len(list(states.GPT(states.ModelConfig(**shape)).parameters()))
    for row in states.steps_in_turn(list(states.LAYOUTS), shape):
        promised = states.accounting.state_bytes(states.ModelConfig(**shape), row["step"])
        assert row["weight_bytes"] == promised.weights
        assert row["gradient_bytes"] == promised.gradients
        assert row["moment_bytes"] == promised.moments + 4 * tensors  # which count their steps
        assert len(row["seconds"]) == 2


def test_round_trips_of_states(states) -> None:
    """Ours: small errors, no second moment lost, nothing changes by another trip."""
    _, model, optimizer = states.trained("exact", 1, 4)
    (row,) = states.round_trips(model, optimizer)
    assert row["round_trip"] == "ours"
    assert 0 < row["first"] < 0.02
    assert 0 < row["second"] < 0.02
    assert 0 < row["update"] < 0.1
    assert row["second_zeroed"] == 0
    assert row["first_changed_again"] == row["second_changed_again"] == [0, 0]


def test_a_saved_state_resumes(states, tmp_path) -> None:
    row = states.persistence("fast", tmp_path)
    assert row["resumes_bit_for_bit"] is True
    assert {row[k] for k in ("weights_only", "weights_only_elsewhere", "our_reader")} == {"read"}
    missing = tmp_path / "none.pt"
    refusal = states.outcome(lambda: states.tensors.load(missing), missing)
    assert refusal == "refused: none.pt is missing"


def test_start(bench, monkeypatch) -> None:
    """A row per way; processes that answer as steps.py does stand in for them."""
    module, closed = bench("bench_start"), []

    class Fake:
        def __init__(self, run, way) -> None:
            self.way, self.seconds = way, []

        def answer(self, until: float) -> dict:
            return {"first_step_at": until, "first_step_cpu_s": 2.0}

        def ask(self, steps: int, until: float) -> None:
            self.seconds.append(1.0 if self.way == module.EAGER else 0.5)

        def row(self) -> dict:
            return {
                "variant": self.way, "graphs": 2, "median_s": self.seconds[0],
                "samples": self.seconds,
            }  # fmt: skip

        def close(self) -> None:
            closed.append(self.way)

    monkeypatch.setattr(module, "Model", Fake)
    eager, blocks, _ = rows = module.compare(module.Case("tiny", "fp32", 16, 3), cold=2)
    assert [row["variant"] for row in rows] == [module.EAGER, module.BLOCKS, module.WHOLE]
    assert len(closed) == 2 * 2 * 3  # twice cold and warm
    assert len(eager["cold_s"]) == len(blocks["warm_cpu_s"]) == 2
    assert blocks["times_eager"]["median"] == 2.0
    assert "times_eager" not in eager
    module.show(rows)


def test_core(bench, monkeypatch) -> None:
    """Both sides, with their logs, on a preset made small."""
    module, made = bench("bench_core"), little("tiny_char", vocab_size=256)
    monkeypatch.setattr(module.presets, "load", lambda name: made)  # the command line's, too
    monkeypatch.setitem(module.CASES, "tiny_char", 2)
    monkeypatch.setattr(module, "N_TOKENS", 5000)
    monkeypatch.setattr(module, "STEPS", 4)
    row = module.compare("tiny_char", 2)
    assert (row["tokens_per_step"], len(row["ratios"])) == (32, 2)
    assert len(row["trainer_s"]) == len(row["fit_s"]) == 2 * (4 - module.WARM_UP)
    assert min(row["ratios"]) <= row["ratio_median"] <= max(row["ratios"])
