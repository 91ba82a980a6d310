"""How a run is laid out in memory: planned for a GPU before anything is made, and kept."""

import json
from pathlib import Path

import pytest
import torch

from mypt_fast import kernels, settings
from mypt_fast.block import Block
from mypt_fast.cli import main
from mypt_fast.errors import ConfigError
from mypt_fast.planner import step, table
from mypt_fast.planner.operators import Setup
from mypt_fast.recompute import POLICIES
from mypt_fast.training import device as devices
from mypt_fast.training import memory
from mypt_fast.training.memory import MemoryPlan, choose_plan
from tests.training.conftest import events

GPU = torch.device("cuda")
PRECISIONS = {
    "bf16": devices.Precision(torch.bfloat16, False, "cuda"),
    "fp16": devices.Precision(torch.float16, True, "cuda"),
}


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU of which only the name and the free memory are asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "describe", lambda device: "NVIDIA GeForce RTX 5060 Ti")


def plan(preset, *, gib=15.3, dtype="bf16", saved=None, notices=None, **typed):
    resolved = settings.resolve(typed, config_file=preset)
    resolved.saved_state = {"plan": {"global_batch": resolved.global_batch, **(saved or {})}}
    resolved.saved_state = resolved.saved_state if saved else {}
    notes = [] if notices is None else notices
    return choose_plan(resolved, GPU, PRECISIONS[dtype], int(gib * table.GIB), notes)


@pytest.mark.usefixtures("card")
class TestPlanned:
    def test_the_flagship_keeps_its_matmuls_on_16_gb(self):
        found = plan("500M_1024")
        assert (found.state, found.recompute, found.micro_batch) == ("exact16", "norms", 8)
        assert found.predicted is not None
        assert found.predicted.total < 15.3 * table.GIB

    def test_what_is_typed_is_kept(self):
        found = plan(
            "500M_1024", state="exact", recompute="mlp", micro_batch_size=3, chunk_rows=700
        )
        assert (found.state, found.recompute, found.micro_batch, found.chunk_rows) == (
            "exact", "mlp", 3, 700,
        )  # fmt: skip

    def test_use_checkpoint_asks_for_blocks(self):
        assert plan("500M_1024", use_checkpoint=True).recompute == "block"

    def test_what_runs_the_operators_limits_the_policies(self):
        assert plan("500M_1024", kernels="inductor").recompute in ("none", "block", "offload")

    def test_fp16_has_fp32_weights(self):
        assert plan("500M_1024", dtype="fp16", gib=24).state == "exact"

    def test_a_saved_run_keeps_its_plan_whatever_is_free(self):
        saved = {"micro_batch_size": 2, "state": "exact", "recompute": "none", "chunk_rows": 0}
        found = plan("500M_1024", saved=saved, gib=2)
        assert (found.micro_batch, found.state, found.recompute) == (2, "exact", "none")
        setup = Setup(settings.resolve({}, config_file="500M_1024").model, 2, 8, residual=4)
        assert found.predicted == step.peak(setup)

    def test_a_flag_goes_before_the_saved_plan(self):
        saved = {"micro_batch_size": 2, "state": "exact", "recompute": "none", "chunk_rows": 0}
        found = plan("500M_1024", saved=saved, recompute="block")
        assert (found.micro_batch, found.recompute) == (2, "block")

    def test_a_saved_plan_that_may_not_fit_says_so(self):
        saved = {"micro_batch_size": 8, "state": "exact", "recompute": "none", "chunk_rows": 0}
        notices = []
        assert plan("500M_1024", saved=saved, gib=7, notices=notices).micro_batch == 8
        assert "the saved plan may not fit" in notices[0]

    def test_only_the_layout_goes_with_a_run_to_a_gpu(self):
        saved = {"micro_batch_size": 1, "state": "exact", "recompute": "none", "device": "cpu"}
        found = plan("500M_1024", saved=saved)
        assert (found.micro_batch, found.state, found.recompute) == (8, "exact", "norms")

    @pytest.mark.parametrize(("on", "was", "now"), [
        (False, "block", "none"), (True, "none", "block"), (True, "offload", "offload"),
    ])  # fmt: skip
    def test_a_typed_use_checkpoint_goes_before_the_saved_policy(self, on, was, now):
        saved = {"micro_batch_size": 1, "state": "exact", "recompute": was, "chunk_rows": 0}
        assert plan("150M_1024", saved=saved, use_checkpoint=on).recompute == now

    def test_the_stream_of_a_saved_run_stays_what_it_was(self):
        saved = {"micro_batch_size": 8, "state": "exact16", "recompute": "norms", "chunk_rows": 0}
        assert plan("500M_1024", saved=saved).residual == "fp32"  # before there was a choice
        assert plan("500M_1024", saved={**saved, "residual_dtype": "bf16"}).residual == "bf16"
        assert plan("500M_1024", saved=saved, residual_dtype="bf16").residual == "bf16"
        assert plan("500M_1024").residual == "bf16"

    def test_an_older_run_that_recomputed_goes_on_so(self):
        found = plan("500M_1024", saved={"micro_batch_size": 8, "use_checkpoint": True})
        assert (found.recompute, found.state, found.micro_batch) == ("block", "exact", 8)

    def test_a_plan_for_another_batch_is_made_anew(self):
        saved = {"global_batch": 4, "micro_batch_size": 2, "recompute": "block"}
        assert plan("500M_1024", saved=saved).recompute == "norms"

    def test_where_nothing_exact_fits_a_notice_says_so(self):
        notices = []
        assert plan("1.3B_1024", notices=notices).state == "fast"
        assert "not exact" in notices[0]

    def test_a_model_that_cannot_fit_names_the_smallest_change(self):
        with pytest.raises(ConfigError, match=r"does not fit .*--state fast .* would fit"):
            plan("1.3B_1024", state="exact")
        with pytest.raises(ConfigError, match=r"n_layer \d+ instead of \d+ would fit"):
            plan("1.3B_1024", gib=6)

    @pytest.mark.parametrize(
        ("typed", "dtype", "never"),
        [
            ({}, "fp16", "fast"), ({"recompute": "none"}, "fp16", "exact16"),
            ({"kernels": "inductor", "state": "exact"}, "bf16", "norms"),
        ],
    )  # fmt: skip
    def test_what_it_advises_can_be_typed(self, typed, dtype, never):
        with pytest.raises(ConfigError) as refused:
            plan("1.3B_1024", dtype=dtype, gib=14, **typed)
        assert never not in str(refused.value)

    def test_without_a_plan_nothing_is_chosen(self):
        assert plan("500M_1024", plan="off", gib=1) == MemoryPlan(8, residual="bf16")

    def test_a_card_that_nobody_knows_is_planned_for_all_the_same(self, monkeypatch):
        monkeypatch.setattr(devices, "describe", lambda device: "Some Card 9000")
        assert plan("500M_1024").recompute == "norms"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--recompute", "offload"], "found a CPU, which computes there already; use --recompute"),
        (["--recompute", "norms", "--kernels", "inductor"], "found --kernels inductor"),
        (["--recompute", "mlp", "--use_checkpoint"], "found --recompute mlp beside it"),
        (["--recompute", "blok"], "did you mean 'block'?"),
        (["--residual_dtype", "bf16"], "is for bf16 mixed precision; found fp32"),
        (["--chunk_rows", "-1"], "chunk_rows is out of range; found -1"),
        (["--plan", "on"], "expected one of auto, off"),
    ],
)
def test_what_cannot_run_is_one_line(train, capsys, flags, line):
    assert train("r", *flags) == 2
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


def losses(name):
    return [e["loss"] for e in events(name, "train")]


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "offload"])
def test_a_run_goes_on_with_its_policy_bit_for_bit(train, policy):
    flags = ["--recompute", policy, "--chunk_rows", "7", "--schedule", "constant"]
    assert train("whole", *flags) == 0
    assert train("parts", *flags, "--max_iters", "5") == 0
    assert train("parts", "--max_iters", "12", "--recompute", "auto", resume=True) == 0
    state = json.loads(Path("checkpoints/parts/training_state.json").read_text())
    assert state["plan"]["recompute"] == policy
    assert state["plan"]["chunk_rows"] == 7
    assert losses("parts")[-7:] == losses("whole")[-7:]
    start = events("parts", "training_start")[-1]["config"]
    assert (start["plan"]["recompute"], start["plan"]["chunk_rows"]) == (policy, 7)


def test_policies_do_not_change_the_run(train):
    assert train("none", "--dropout", "0") == 0
    for policy in ("norms", "mlp", "block"):
        assert train(policy, "--dropout", "0", "--recompute", policy) == 0
        assert losses(policy) == pytest.approx(losses("none"), rel=1e-4)


def test_the_model_is_made_as_planned(train, dataset, monkeypatch):
    """Stream, policy, chunk: what the run says is what the blocks and the head get."""
    streams, chunks = set(), set()
    block, head = Block.forward, kernels.linear_cross_entropy

    def watched_block(self, x, *rest):
        if self.training:
            streams.add((x.dtype, self.recompute))
        return block(self, x, *rest)

    def watched_head(*args, **options):
        chunks.add(options["chunk"])
        return head(*args, **options)

    monkeypatch.setattr(Block, "forward", watched_block)
    monkeypatch.setattr(kernels, "linear_cross_entropy", watched_head)
    # prompts are continued outside autocast, where the stream is that of the weights
    Path("prompts.json").write_text(json.dumps({"prompts": {"a": "abc"}}))
    flags = ["--use_amp", "--residual_dtype", "bf16", "--state", "exact16", "--chunk_rows", "9"]
    flags += ["--recompute", "mlp", "--eval_prompts_file", "prompts.json"]
    assert train("r", *flags) == 0
    assert streams == {(torch.bfloat16, "mlp")}
    assert chunks == {9}
    streams.clear()
    assert train("s", "--use_amp", "--state", "exact16") == 0
    assert streams == {(torch.float32, "none")}


def test_the_vocabulary_is_known_when_memory_is_planned(train, monkeypatch):
    seen = []
    fitting = memory._fitting

    def watched(plan, policy, cfg, *rest):
        seen.append(cfg.vocab_size)
        return fitting(plan, policy, cfg, *rest)

    monkeypatch.setattr(memory, "_fitting", watched)
    assert train("r", "--micro_batch_size", "0", "--max_iters", "1") == 0
    assert set(seen) == {16}


def test_a_layout_that_was_saved_goes_on_without_its_precision_or_not_at_all(train, capsys):
    flags = ["--use_amp", "--state", "exact16", "--max_iters", "2"]
    assert train("r", *flags) == 0
    capsys.readouterr()
    again = ["--state", "auto", "--no_use_amp", "--max_iters", "3"]
    assert train("r", *again, resume=True) == 2
    assert "computes with bf16 weights; found use_amp off" in capsys.readouterr().err


def test_the_peak_is_logged_beside_the_planned_one(train, monkeypatch, capsys):
    plain, peak = memory._plain, 100 << 20
    predicted = step.Peak({"weights": 2 * peak}, "head", "cuda")

    def with_a_plan(*args):
        found = plain(*args)
        found.predicted = predicted
        return found

    monkeypatch.setattr(memory, "_plain", with_a_plan)
    monkeypatch.setattr(devices, "peak_bytes", lambda device: peak)
    assert train("r") == 0
    (check,) = events("r", "plan_check")
    assert (check["iter"], check["predicted_bytes"], check["measured_bytes"]) == (1, 2 * peak, peak)
    assert check["ratio"] == 0.5
    assert "memory  peak 100.0 MiB, predicted 200.0 MiB (-50.0 %)" in capsys.readouterr().out


def test_a_run_that_was_not_planned_checks_nothing(train):
    assert train("r") == 0
    assert events("r", "plan_check") == []
    assert main(["inspect", "r"]) == 0
