"""What a step's numbers say about it: taken, skipped, or the run goes back. Pure decisions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mypt_fast.errors import DivergedError

WINDOW, WARM_UP = 64, 24  # steps a loss is compared with, and how many there must be
SPIKE_SIGMAS = 8.0
NOISE_FLOOR = 0.01  # of the median: on data without noise every wiggle would be a spike
MOST_ROLL_BACKS = 3  # to one checkpoint; what it does not cure, it will not
KEPT_WINDOWS = 100


@dataclass
class GuardState:
    """What the guard remembers; saved with the run and restored on resume."""

    in_a_row: int = 0  # steps skipped since the last one that was taken
    losses: list[float] = field(default_factory=list)  # of the last WINDOW steps taken
    windows: list[dict[str, Any]] = field(default_factory=list)  # data left out, the newest last
    rolled_back_to: int | None = None  # step of the checkpoint
    roll_backs: int = 0  # to it
    eval_rows: int | None = None  # sequences per forward of an evaluation, if memory was short

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    def leave_out(self, step: int, samples: tuple[int, int], reason: str) -> None:
        """Remember that the global samples [first, end) were not trained on at `step`."""
        entry = {"step": step, "samples": list(samples), "reason": reason}
        self.windows = [*self.windows, entry][-KEPT_WINDOWS:]


@dataclass(frozen=True)
class Spike:
    """How far a loss is above the ones before it."""

    median: float
    sigmas: float  # robust ones: 1.4826 times the median absolute deviation


@dataclass(frozen=True)
class Verdict:
    """What to do with a step whose gradients are there and whose weights have not moved."""

    action: str  # take, skip, rollback or stop
    reason: str = ""
    spike: Spike | None = None


def fault(loss: float, grad_norm: float) -> str | None:
    """What is wrong with the numbers of one rank, None for nothing."""
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return None if math.isfinite(grad_norm) else f"gradient norm is {grad_norm}"


def agreed(faults: Sequence[str | None]) -> str | None:
    """What keeps all ranks from a step: the first fault of any of them, by rank.

    Every rank asks with the faults of all (an all-gather), before its optimizer moves, and gets the
    same answer: weights stay equal across ranks.
    """
    for rank, what in enumerate(faults):
        if what is not None:
            return what if len(faults) == 1 else f"{what} on rank {rank}"
    return None


def spike(losses: Sequence[float], loss: float) -> Spike | None:
    """Compare a loss with those before it; None for too few of them, or one that is no spike."""
    if len(losses) < WARM_UP:
        return None
    median = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in losses)
    sigmas = (loss - median) / max(deviation, NOISE_FLOOR * abs(median), 1e-12)
    return Spike(median, sigmas) if sigmas > SPIKE_SIGMAS else None


def judge(
    state: GuardState,
    loss: float,
    faults: Sequence[str | None],
    *,
    limit: int,
    spike_action: str,
) -> Verdict:
    """Decide about a step, and count it in `state`.

    Args:
        state: updated in place; what is not finite never enters its losses.
        loss: of the global batch, the same on all ranks.
        faults: of every rank, see `fault`.
        limit: faulty steps in a row that make the run roll back; 0 stops at the first.
        spike_action: log, skip or rollback.
    """
    reason = agreed(faults)
    if reason is not None:
        state.in_a_row += 1
        if not limit:
            return Verdict("stop", reason)
        return Verdict("rollback" if state.in_a_row >= limit else "skip", reason)
    high = spike(state.losses, loss)
    # spikes are remembered too: a level that stays becomes the normal one, a median bears the rest
    state.losses = [*state.losses, loss][-WINDOW:]
    if high is not None and spike_action != "log":
        return Verdict(spike_action, f"loss is {high.sigmas:.1f} sigmas above the median", high)
    state.in_a_row = 0
    return Verdict("take", spike=high)


def after_roll_back(
    before: GuardState, saved: GuardState, step: int, samples: tuple[int, int], reason: str
) -> GuardState:
    """The guard's state on a run that went back to the checkpoint of `step`.

    Args:
        before: of the run that failed.
        saved: of the checkpoint.
        step: of the checkpoint.
        samples: global samples [first, end) that are left out.
        reason: why.

    Raises:
        DivergedError: if going back to this checkpoint has not helped so far.
    """
    again = before.roll_backs + 1 if before.rolled_back_to == step else 1
    if again > MOST_ROLL_BACKS:
        raise DivergedError(
            f"the run fails again and again after step {step}",
            f"{reason}, after {MOST_ROLL_BACKS} roll backs",
            "lower --learning_rate, check the data with `mypt-fast data verify`, or continue from "
            "an older checkpoint",
        )
    state = GuardState(
        losses=list(saved.losses), windows=list(before.windows), rolled_back_to=step,
        roll_backs=again, eval_rows=before.eval_rows,
    )  # fmt: skip
    state.leave_out(step, samples, reason)
    return state


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a GPU or of the CPU, gave up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in str(
        error
    )


def first_line(error: BaseException) -> str:
    """The start of an error's words, for an event."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
