"""Numbers that are not finite, spikes and memory that runs out: what the run does, bit for bit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, events
from test_resume import Killed, assert_same_run, interrupt_at, position

from mypt_fast.checkpoint import bundle
from mypt_fast.config import TrainConfig
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DivergedError
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.guard import (
    MOST_ROLL_BACKS,
    WARM_UP,
    WINDOW,
    GuardState,
    after_roll_back,
    agreed,
    fault,
    is_out_of_memory,
    judge,
    spike,
)
from mypt_fast.training.journal import Journal
from mypt_fast.training.trainer import Trainer

LONG = ["--max_iters", "40", "--eval_interval", "20", "--learning_rate", "1e-3"]
G = 8  # sequences a step, in micro-steps of 2
NOISE = [2.0 + 0.02 * math.sin(7 * i) for i in range(WINDOW)]


def poison(monkeypatch, samples: set[int], what: str, factor: float = math.nan) -> None:
    """Spoil whatever is computed from the global samples: the loss, or one gradient element."""
    reading: list[int] = []
    read, forward = TokenLoader.next, GPT.forward

    def next_(self: TokenLoader, rows: int, *args):
        first = self.position + self._taken
        reading[:] = range(first, first + rows)
        return read(self, rows, *args)

    def forward_(self: GPT, *args, **inputs):
        out = forward(self, *args, **inputs)
        if not self.training or not samples.intersection(reading):
            return out
        if what == "loss":
            return out * factor
        weight = self.blocks[1].ln1.weight
        out.register_hook(lambda g: g)  # the loss itself stays as it is
        return out + SpoiledGradient.apply(weight)

    monkeypatch.setattr(TokenLoader, "next", next_)
    monkeypatch.setattr(GPT, "forward", forward_)


class SpoiledGradient(torch.autograd.Function):
    """Adds zero to the loss and an infinity to the first element of a gradient."""

    @staticmethod
    def forward(ctx, weight):
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        spoiled = gradient.new_zeros(16)
        spoiled[0] = math.inf
        return spoiled


def passed_over(monkeypatch, steps: dict[int, int]) -> None:
    """A run without guard that never sees a window: its data position jumps before a step."""
    original = Trainer._train_step

    def jump(self: Trainer) -> bool:
        loader = self.run.phase_at(self.step).train
        loader.position += steps.pop(self.step, 0)
        return original(self)

    monkeypatch.setattr(Trainer, "_train_step", jump)


def assert_same_weights(a: str, b: str) -> None:
    """Weights, moments, step counters, schedule, RNG and data position are equal."""
    one, two = (bundle.read(Path("checkpoints") / n) for n in (a, b))
    for key, weight in one.state_dict.items():
        assert torch.equal(weight, two.state_dict[key]), key
    for i, moments in one.optimizer["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, two.optimizer["state"][i][key]), key
    assert [g["lr"] for g in one.optimizer["param_groups"]] == [
        g["lr"] for g in two.optimizer["param_groups"]
    ]
    for key in ("rng", "data"):
        assert one.manifest[key] == two.manifest[key]


def steps_of(name: str) -> list[tuple]:
    return [(e["iter"], e["loss"], e["lr"], e["grad_norm"]) for e in events(name, "train")]


# decisions


def test_one_bad_rank_is_enough_for_all() -> None:
    nan, good = fault(math.nan, 1.0), fault(2.0, 1.0)
    assert (good, fault(2.0, math.inf)) == (None, "gradient norm is inf")
    assert agreed([None, None]) is None
    assert agreed([nan]) == "loss is nan"
    assert agreed([None, nan, None]) == "loss is nan on rank 1"
    states = [GuardState(), GuardState()]  # both ranks decide alike, whoever is at fault
    verdicts = [judge(s, 2.0, [good, nan], limit=3, spike_action="log") for s in states]
    assert [v.action for v in verdicts] == ["skip", "skip"]
    assert states[0] == states[1] == GuardState(in_a_row=1)


def test_only_faults_in_a_row_roll_back_and_none_of_them_is_averaged() -> None:
    state, seen = GuardState(), []
    for loss in (2.0, math.nan, math.inf, 2.1, math.nan, math.nan, math.nan, 2.2):
        verdict = judge(state, loss, [fault(loss, 1.0)], limit=3, spike_action="log")
        seen.append(verdict.action)
    assert seen == ["take", "skip", "skip", "take", "skip", "skip", "rollback", "take"]
    assert state.losses == [2.0, 2.1, 2.2]
    stop = judge(state, math.nan, ["loss is nan"], limit=0, spike_action="log")
    assert stop.action == "stop"


@pytest.mark.parametrize(("losses", "loss", "is_spike"), [
    (NOISE, 2.02, False), (NOISE, 2.5, True), (NOISE, 9.0, True), (NOISE, 0.1, False),
    (NOISE[: WARM_UP - 1], 9.0, False), (NOISE[:WARM_UP], 9.0, True),
    ([2.0] * WINDOW, 2.1, False), ([2.0] * WINDOW, 2.2, True),  # no noise: a floor
    ([4 - i / 50 for i in range(WINDOW)], 3.9, False),  # a falling loss is no outlier of itself
    ([*NOISE[:-9], *[50.0] * 9], 2.5, True),  # earlier spikes do not hide one
])  # fmt: skip
def test_a_spike_is_far_above_the_median(losses, loss, is_spike) -> None:
    assert (spike(losses, loss) is not None) is is_spike


def test_a_level_that_stays_stops_being_a_spike() -> None:
    state = GuardState(losses=list(NOISE))
    found = [judge(state, 4.0, [None], limit=3, spike_action="skip").action for _ in range(60)]
    assert found[0] == "skip"
    assert found[-1] == "take"
    assert len(state.losses) == WINDOW


def test_going_back_to_one_checkpoint_has_an_end() -> None:
    state = GuardState()
    for _ in range(MOST_ROLL_BACKS):
        state = after_roll_back(state, GuardState(), 5, (40, 64), "loss is nan")
    assert after_roll_back(state, GuardState(), 9, (80, 99), "x").roll_backs == 1
    with pytest.raises(DivergedError, match="again and again after step 5"):
        after_roll_back(state, GuardState(), 5, (40, 64), "loss is nan")


def test_state_round_trips_through_json() -> None:
    state = GuardState(losses=[0.1, 1 / 3], in_a_row=1)
    state.leave_out(3, (24, 32), "loss is nan")
    assert GuardState(**json.loads(json.dumps(state.to_dict()))) == state


# steps that are not taken


def test_a_run_with_bad_batches_ends_where_one_without_them_does(train, monkeypatch) -> None:
    assert train("clean", *LONG) == 0
    poison(monkeypatch, {9 * G, *range(25 * G, 28 * G)}, "gradient")
    assert train("bad", *LONG) == 0
    assert len(events("bad", "skipped_step")) == 4
    assert len(events("bad", "rollback")) == 1
    ends = [events(n, "training_complete")[0]["final_val_loss"] for n in ("clean", "bad")]
    assert ends[0] == pytest.approx(ends[1], rel=0.005)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_no_trace_but_its_event(train, monkeypatch, what) -> None:
    with monkeypatch.context() as patched:
        poison(patched, {3 * G + 5, 6 * G + 1}, what)
        assert train("bad") == 0
    with monkeypatch.context() as patched:
        passed_over(patched, {3: G, 5: G})  # the sixth window falls to the fifth step
        assert train("clean") == 0
    assert_same_weights("bad", "clean")
    assert steps_of("bad") == steps_of("clean")
    skipped = events("bad", "skipped_step")
    assert [(e["iter"], e["samples"]) for e in skipped] == [(3, [24, 32]), (5, [48, 56])]
    word = {"loss": "loss is nan", "gradient": "gradient norm is"}[what]
    assert all(e["reason"].startswith(word) for e in skipped)
    assert (skipped[0]["loss"] is None) == (what == "loss")
    guard = bundle.read_info(Path("checkpoints/bad"))["manifest"]["progress"]["guard"]
    assert guard["in_a_row"] == 0  # alive, and nothing poisoned
    assert len(guard["losses"]) == 12
    assert all(map(math.isfinite, guard["losses"]))
    assert [w["samples"] for w in guard["windows"]] == [[24, 32], [48, 56]]


def scaled(monkeypatch) -> None:
    half = devices.Precision(torch.float32, True, "cpu")  # scaled, at a dtype a CPU can compute
    monkeypatch.setattr(devices, "precision", lambda *_, **__: (half, None))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_the_loss_scale_alone(train, monkeypatch, what) -> None:
    scaled(monkeypatch)
    with monkeypatch.context() as patched:
        poison(patched, {3 * G + 5}, what)
        assert train("bad") == 0
    with monkeypatch.context() as patched:
        passed_over(patched, {3: G})
        assert train("clean") == 0
    assert_same_weights("bad", "clean")
    scalers = [bundle.read(Path(f"checkpoints/{n}")).manifest["scaler"] for n in ("bad", "clean")]
    assert scalers[0] == scalers[1]
    assert len(events("bad", "skipped_step")) == 1


def test_an_fp16_overflow_halves_the_scale_and_repeats_the_step(train, monkeypatch) -> None:
    scaled(monkeypatch)
    assert train("clean") == 0
    original = torch.amp.GradScaler.unscale_

    def overflow(self, optimizer) -> None:
        if self.get_scale() > 2.0**14:
            next(p for g in optimizer.param_groups for p in g["params"]).grad[0] = math.inf
        original(self, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(torch.amp.GradScaler, "unscale_", overflow)
        assert train("large") == 0
    # powers of two: the smaller scale changes no bit here
    assert_same_weights("large", "clean")
    assert steps_of("large") == steps_of("clean")
    assert [e["scale"] for e in events("large", "loss_scale")] == [2.0**15, 2.0**14]
    assert events("large", "skipped_step") == []


THREE = {4 * G + 1, 5 * G + 1, 6 * G + 7}


def test_three_in_a_row_go_back_to_the_checkpoint_and_past_the_data(train, monkeypatch) -> None:
    flags = ["--save_interval", "2", "--eval_interval", "100"]
    steps = {5 * G + 1, 6 * G + 1, 7 * G + 7}
    with monkeypatch.context() as patched:
        poison(patched, steps, "loss")
        assert train("bad", *flags) == 0
    with monkeypatch.context() as patched:
        passed_over(patched, {4: 4 * G})  # saved at 4: its window, and the three behind it
        assert train("clean", *flags) == 0
    assert_same_weights("bad", "clean")
    (back,) = events("bad", "rollback")
    assert (back["iter"], back["back_to"], back["samples"]) == (5, 4, [4 * G, 8 * G])
    assert [e["iter"] for e in events("bad", "train")] == [0, 1, 2, 3, 4, *range(4, 12)]
    assert position("bad") == (12 + 4) * G


def kill_at(monkeypatch, call: int, target: type, method: str) -> None:
    """End the process, saving nothing, after the n-th call of a method."""
    original, count = getattr(target, method), [0]

    def counted(*args):
        original(*args)
        count[0] += 1
        if count[0] == call:
            raise Killed

    monkeypatch.setattr(target, method, counted)


@pytest.mark.parametrize(("method", "call"), [
    ("skipped", 2),
    ("rollback", 1),  # before the roll back is saved
    ("step", 6),  # after it
])  # fmt: skip
def test_a_killed_run_skips_and_rolls_back_alike(train, monkeypatch, method, call) -> None:
    with monkeypatch.context() as patched:
        poison(patched, THREE, "loss")
        assert train("whole") == 0
        kill_at(patched, call, Journal, method)
        with pytest.raises(Killed):
            train("parts")
    with monkeypatch.context() as patched:
        poison(patched, THREE, "loss")
        assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


def test_steps_skipped_before_a_stop_count_after_it(train, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        poison(patched, THREE, "loss")
        interrupt_at(patched, 2, Journal, "skipped")
        assert train("a") == 130
        assert train("a", resume=True) == 0
    assert [e["samples"] for e in events("a", "skipped_step")] == [[32, 40], [40, 48], [48, 56]]
    (back,) = events("a", "rollback")
    assert (back["back_to"], back["samples"]) == (4, [48, 56])  # the stop was saved


def test_a_limit_of_zero_stops_with_the_state_before_the_step(train, monkeypatch, capsys) -> None:
    poison(monkeypatch, {3 * G}, "loss")
    assert train("a", "--nonfinite_limit", "0") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step 3: loss is nan; samples 24 to 31")
    assert bundle.read_info(Path("checkpoints/a"))["training_state"]["step"] == 3
    assert train("a", resume=True) == 0  # past the data
    assert [e["iter"] for e in events("a", "train")] == list(range(12))


def test_a_run_that_nothing_brings_back_ends_in_one_line(train, monkeypatch, capsys) -> None:
    poison(monkeypatch, set(range(3 * G, 9999)), "loss")
    assert train("a") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the run fails again and again after step 0")
    assert len(events("a", "rollback")) == MOST_ROLL_BACKS
    for weight in bundle.read(Path("checkpoints/a")).state_dict.values():
        assert torch.isfinite(weight).all()


# spikes


def test_a_poisoned_batch_is_logged_with_its_samples_and_changes_nothing_else(
    train, monkeypatch
) -> None:
    poison(monkeypatch, {35 * G + 2}, "loss", factor=1e3)
    assert train("a", *LONG) == 0
    (event,) = events("a", "loss_spike")
    assert (event["iter"], event["samples"]) == (35, [35 * G, 36 * G])
    assert (event["action"], event["sigmas"] > 8) == ("log", True)
    assert [e["iter"] for e in events("a", "train")] == list(range(40))


@pytest.mark.parametrize(("action", "expected"), [("skip", {35: G}), ("rollback", {20: 16 * G})])
def test_a_spike_can_be_left_out(train, monkeypatch, action, expected) -> None:
    with monkeypatch.context() as patched:
        poison(patched, {35 * G + 2}, "loss", factor=1e3)
        assert train("bad", *LONG, "--spike_action", action) == 0
    with monkeypatch.context() as patched:
        passed_over(patched, expected)
        assert train("clean", *LONG) == 0
    assert_same_weights("bad", "clean")
    assert len(events("bad", "loss_spike")) == 1
    assert len(events("bad", "rollback")) == (action == "rollback")


# memory


def short_of_memory(monkeypatch, rows: int) -> None:
    """Forward passes in training fit `rows` sequences; the second micro-step finds out."""
    forward, count = GPT.forward, [0]

    def forward_(self: GPT, *args, **inputs):
        count[0] += self.training
        if self.training and count[0] > 13 and len(inputs["idx"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, *args, **inputs)

    monkeypatch.setattr(GPT, "forward", forward_)


def recorded(monkeypatch) -> list[tuple[int, list]]:
    """Every micro-batch that training reads: first global sample and tokens."""
    seen, read = [], TokenLoader.next

    def next_(self: TokenLoader, rows: int, *args):
        first = self.position + self._taken
        x, y = read(self, rows, *args)
        seen.append((first, x.copy()))
        return x, y

    monkeypatch.setattr(TokenLoader, "next", next_)
    return seen


@pytest.mark.parametrize(("error", "is_it"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
    (RuntimeError("shapes do not match"), False),
])  # fmt: skip
def test_what_is_taken_for_a_lack_of_memory(error, is_it) -> None:
    assert is_out_of_memory(error) is is_it


def test_memory_that_runs_out_halves_the_micro_batch_and_repeats_the_step(
    train, monkeypatch
) -> None:
    flags = ["--dropout", "0", "--micro_batch_size", "4"]
    assert train("whole", *flags) == 0
    with monkeypatch.context() as patched:
        short_of_memory(patched, 1)
        seen = recorded(patched)
        assert train("short", *flags) == 0
    # step 6 fails at its second micro-batch, twice: 4 sequences, then 2
    firsts = [first for first, _ in seen]
    begun = [*range(0, 6 * G, 4), 48, 52, 48, *range(48, 12 * G)]
    assert firsts == begun
    oom = events("short", "oom")
    assert [(e["iter"], e["was"], e["micro_batch_size"]) for e in oom] == [(6, 4, 2), (6, 2, 1)]
    assert oom[0]["samples"] == [48, 56]
    losses = [[e["loss"] for e in events(n, "train")] for n in ("whole", "short")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    starts = [e["config"]["tokens_per_step"] for e in events("short", "training_start")]
    assert starts == [96]
    assert position("short") == position("whole") == 12 * G
    state = bundle.read_info(Path("checkpoints/short"))["training_state"]
    assert state["plan"]["micro_batch_size"] == 1
    with monkeypatch.context() as patched:  # typed at the start, and smaller on resume all the same
        seen = recorded(patched)
        assert train("short", "--max_iters", "13", resume=True) == 0
    assert [first for first, _ in seen][:8] == list(range(12 * G, 13 * G))


def test_a_step_repeated_for_memory_equals_one_with_that_split(train, monkeypatch) -> None:
    """Dropout included: the step begins at its first random number."""
    assert train("small", "--micro_batch_size", "2") == 0
    count, forward = [0], GPT.forward

    def forward_(self: GPT, *args, **inputs):
        count[0] += self.training
        if self.training and count[0] == 2:  # the last micro-step: all data of the step is read
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, *args, **inputs)

    with monkeypatch.context() as patched:
        patched.setattr(GPT, "forward", forward_)
        assert train("large", "--micro_batch_size", "4") == 0
    assert_same_weights("small", "large")


def test_less_than_one_sequence_says_what_would_help(train, monkeypatch, capsys) -> None:
    short_of_memory(monkeypatch, 0)
    assert train("a") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "with one sequence per forward" in error
    assert "--recompute block" in error
    assert bundle.read_info(Path("checkpoints/a"))["training_state"]["step"] == 3


def test_an_evaluation_short_of_memory_reads_fewer_rows(train, monkeypatch) -> None:
    assert train("whole") == 0
    forward = GPT.forward

    def forward_(self: GPT, *args, **inputs):
        if not self.training and len(inputs["idx"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **inputs)

    with monkeypatch.context() as patched:
        patched.setattr(GPT, "forward", forward_)
        assert train("short") == 0
    oom = events("short", "oom")
    assert [(e["where"], e["micro_batch_size"]) for e in oom] == [("eval", 2), ("eval", 1)]
    assert_same_weights("whole", "short")
    losses = [[e["val_loss"] for e in events(n, "eval")] for n in ("whole", "short")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_an_error_that_is_not_about_memory_is_not_taken_for_it(train, monkeypatch, capsys) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(GPT, "forward", broken)
    assert train("a", "--eval_interval", "100") == 1
    assert "a defect" in capsys.readouterr().err


# the order of samples


def test_ranks_and_micro_batches_come_and_go_and_the_order_stays() -> None:
    """World size 1, 2, 1 with micro-batches of 8, 4, 3: every step holds the same samples."""
    tokens = np.random.default_rng(0).integers(0, 900, 5000)
    corpus = TokenCorpus.from_tokens(tokens)
    whole = TokenLoader(corpus, 16, seed=3, global_batch=8)
    wanted = [whole.next(8)[0] for _ in range(9)]
    state, found = TokenLoader(corpus, 16, seed=3, global_batch=8).state_dict(), []
    for world, rows in ((1, 8), (2, 4), (1, 3)):
        loaders = [
            TokenLoader(corpus, 16, seed=3, global_batch=8, rank=r, world_size=world)
            for r in range(world)
        ]
        for loader in loaders:
            loader.load_state_dict(state)
        for _ in range(3):
            parts = []
            for loader in loaders:
                left = 8 // world
                while left:
                    parts.append(loader.next(min(rows, left))[0].copy())
                    left -= len(parts[-1])
            found.append(np.concatenate(parts))
        states = [loader.state_dict() for loader in loaders]
        assert states == states[:1] * world
        state = states[0]
    assert np.array_equal(np.stack(found), np.stack(wanted))


def test_the_settings_of_the_guards_are_checked() -> None:
    assert (TrainConfig().nonfinite_limit, TrainConfig().spike_action) == (3, "log")
    assert "--block_size" in SMALL  # the shape that G and the micro-steps above come from
