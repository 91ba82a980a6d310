"""Several sources in fixed proportions, and proportions that change: still one integer of state.

The NumPy twin of `csrc/mixture.cpp` and its specification. The sources lie one after another in one
corpus. Weights become whole numbers q_k, the quotas: of every block of 65,536 samples exactly q_k
are of source k. Which samples these are is a tree of splits over the sources. A node sees the
samples of the sources below it, c of them in a block, of which a belong to its left half; of its
first t the left half gets (t * a + o) // c, with o < c drawn per block and node. So a source's
samples are spread evenly (after any number of samples a count is off its share by less than one per
level of the tree), they come in its own order, and "how many of source k are among the first t" is
as cheap as "whose is sample t": O(log K), with nothing stored and nothing carried along.

Shuffled slots would keep the shares as well, but take each source's windows out of its own order:
the epochs of a small source would mix, "sequential" and "block" within a source would lose their
meaning, and counting would need a table.

The counts are what makes phases exact: where the weights change, in the middle of a block or not,
each source goes on with its next window.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mypt_fast.data.order import (
    ALGORITHMS,
    BLOCK_TOKENS,
    POOL_BLOCKS,
    SampleOrder,
    check_samples,
)
from mypt_fast.data.permutation import (
    MASK,
    MAX_WINDOWS,
    SLOT_KEY,
    SOURCE_KEY,
    Int64,
    UInt64,
    base_key,
    base_keys,
    derived_key,
    derived_keys,
)

ALGORITHM = "mixture/v1"
BLOCK = 1 << 16  # samples in which the quotas are exact
_MAX_SOURCES = 1 << 16
_MAX_SAMPLES = (1 << 63) - 1


class Phase(NamedTuple):
    """Weights for the samples before `until`; None where they stay for good."""

    until: int | None
    weights: Sequence[float]


def quotas(weights: Sequence[float]) -> list[int]:
    """Return the samples of each source in a block of 65,536: largest remainders, exact sum.

    Shares differ from the weights by less than 1/65,536. Equal remainders favour the lower number.

    Raises:
        ValueError: no weights, one negative or not finite, all zero, or a positive one so small
            that its source would never come.
    """
    for k, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight {k} is {weight!r}; weights are finite and not negative")
    exact = [Fraction(float(weight)) for weight in weights]
    total = sum(exact, Fraction(0))
    if not total:
        raise ValueError(f"the weights {list(weights)} have no positive one")
    shares = [weight * BLOCK / total for weight in exact]
    whole = [int(share) for share in shares]
    by_remainder = sorted(range(len(whole)), key=lambda k: (whole[k] - shares[k], k))
    for k in by_remainder[: BLOCK - sum(whole)]:
        whole[k] += 1
    for k, quota in enumerate(whole):
        if exact[k] and not quota:
            raise ValueError(
                f"weight {k} is {weights[k]!r}, less than one sample in {BLOCK} of all; "
                f"use 0, or {_rounded_up((total - exact[k]) / (BLOCK - 1)):g} or more"
            )
    return whole


def _rounded_up(value: Fraction) -> float:
    """The next float of four digits, so that what a message names is enough."""
    return float(f"{float(value) * 1.0005:.4g}")


@dataclass(frozen=True)
class _Stage:
    """A phase, ready for use."""

    begin: int
    end: int
    key: int
    quotas: Int64
    bounds: Int64  # source k has slots [bounds[k], bounds[k + 1]); padded to a power of two
    already: Int64  # samples of each source before `begin`


class MixtureOrder:
    """Map a global sample number to a window of one of several sources.

    Each source has a SampleOrder of its own, whose seed is derived from (seed, its number); no
    window crosses from one source into the next. A source without weight is never read and may be
    of any length. With kind "block" a run of samples reads one pool of each source.

    Args:
        sizes: tokens of each source; they lie one after another in the corpus.
        seq_len: tokens per row, T.
        seed: unsigned 64-bit.
        phases: (until, weights) one after another; the last `until` is None. `until` is a sample
            number: a step's times the global batch.
        kind: order within each source, see SampleOrder.
        block_tokens: see SampleOrder.
        pool_blocks: see SampleOrder.

    Attributes:
        n_windows: windows in all sources that any phase uses.

    Raises:
        ValueError: weights or phases that cannot be used, or a source that has weight and fewer
            than T + 1 tokens.
    """

    kind = "mixture"

    def __init__(
        self,
        sizes: Sequence[int],
        seq_len: int,
        seed: int,
        phases: Iterable[Phase | tuple[int | None, Sequence[float]]],
        kind: str = "epoch",
        *,
        block_tokens: int = BLOCK_TOKENS,
        pool_blocks: int = POOL_BLOCKS,
    ) -> None:
        K = len(sizes)
        if not 1 <= K <= _MAX_SOURCES:
            raise ValueError(f"a mixture has 1 to {_MAX_SOURCES} sources, not {K}")
        if min(sizes) < 0 or sum(sizes) > MAX_WINDOWS:
            raise ValueError(f"a mixture has at most 2^62 tokens, not {sum(sizes)}")
        if not 0 <= seed <= MASK:
            raise ValueError(f"seed is an unsigned 64-bit integer, not {seed}")
        self.n_tokens, self.seq_len, self.seed, self.within = sum(sizes), seq_len, seed, kind
        self.block_tokens, self.pool_blocks = block_tokens, pool_blocks
        self._sizes = [int(size) for size in sizes]
        self._bases = np.cumsum([0, *self._sizes])[:-1]
        self._leaves = 1 << (K - 1).bit_length()
        # Weights first: what is wrong with them is wrong with any data.
        plan = _checked([Phase(*phase) for phase in phases], K)
        self._orders: list[SampleOrder | None] = [None] * K
        for k in sorted({k for _, q in plan for k in range(K) if q[k]}):
            self._orders[k] = self._order_of(k)
        self.n_windows = sum(order.n_windows for order in self._orders if order)
        self._stages: list[_Stage] = []
        self._fold(plan)
        self._begins = [stage.begin for stage in self._stages]

    def starts(self, first_sample: int, count: int) -> Int64:
        """Return the first token, in the corpus, of samples [first_sample, + count)."""
        sources, local = self._places(first_sample, count)
        out = self._bases[sources]
        for k in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == k)
            # The samples of one source within a run are consecutive ones of its own order.
            order = self._orders[k]
            assert order is not None
            out[rows] += order.starts(int(local[rows[0]]), rows.size)
        return out

    def sources(self, first_sample: int, count: int) -> Int64:
        """Return the number of the source of each of samples [first_sample, + count)."""
        return self._places(first_sample, count)[0]

    def counts(self, sample: int) -> Int64:
        """Return how many of the first `sample` samples are of each source."""
        check_samples(sample, 0)
        return self._counts(self._stages[self.phase_of(sample)], sample)

    def phase_of(self, sample: int) -> int:
        """Return the number of the phase that a sample is in."""
        check_samples(sample, 0)
        return bisect_right(self._begins, sample) - 1

    def identity(self) -> dict[str, Any]:
        """Return what must agree for a sample number to mean the same window; plain values."""
        own = next(order for order in self._orders if order).identity()
        return {
            **own,
            "algo": f"{ALGORITHM} {ALGORITHMS[self.within]}",
            "order": f"mixture of {self.within}",
            "seed": self.seed,
            "n_windows": self.n_windows,
            "sources": _digest(self._sizes),
            "weights": _digest([stage.quotas.tolist() for stage in self._stages]),
            "phases": _digest([stage.end for stage in self._stages]),
        }

    def to_native(self, module: ModuleType) -> Any:
        """Return the C++ twin, a SampleStream of `mypt_fast._native`."""
        return module.MixtureOrder(
            self._sizes,
            self.seq_len,
            self.seed,
            self.within,
            self.block_tokens,
            self.pool_blocks,
            [(stage.end, stage.quotas.tolist()) for stage in self._stages],
        )

    def _order_of(self, k: int) -> SampleOrder:
        if self._sizes[k] < self.seq_len + 1:
            raise ValueError(
                f"source {k} has weight and {self._sizes[k]} tokens, "
                f"where one needs {self.seq_len + 1}"
            )
        return SampleOrder(
            self._sizes[k],
            self.seq_len,
            derived_key(base_key(self.seed, k), SOURCE_KEY),
            self.within,
            block_tokens=self.block_tokens,
            pool_blocks=self.pool_blocks,
        )

    def _fold(self, plan: list[tuple[int, list[int]]]) -> None:
        """Count once what each source has given when a phase begins."""
        begin, already = 0, np.zeros(len(self._sizes), dtype=np.int64)
        for end, whole in plan:
            bounds = np.full(self._leaves + 1, BLOCK, dtype=np.int64)
            bounds[: len(whole) + 1] = np.cumsum([0, *whole])
            key = derived_key(base_key(self.seed, len(self._stages)), SLOT_KEY)
            stage = _Stage(begin, end, key, np.array(whole, dtype=np.int64), bounds, already)
            self._stages.append(stage)
            begin, already = end, self._counts(stage, end)

    def _counts(self, stage: _Stage, sample: int) -> Int64:
        blocks, visits = divmod(sample - stage.begin, BLOCK)
        key = base_keys(stage.key, np.array([blocks], dtype=np.uint64))
        at = np.array([visits], dtype=np.int64)
        leaves = self._leaves
        while leaves > 1:  # from the root down, all nodes of a level at once
            nodes = np.arange(at.size, dtype=np.int64)
            left = _Split(stage, key, nodes + at.size, nodes * leaves, leaves).before(at)
            at = np.stack([left, at - left], axis=1).ravel()
            leaves //= 2
        return stage.already + blocks * stage.quotas + at[: len(self._sizes)]

    def _places(self, first_sample: int, count: int) -> tuple[Int64, Int64]:
        """Return the source of each sample and its number within that source."""
        check_samples(first_sample, count)
        parts: list[tuple[Int64, Int64]] = []
        done = 0
        while done < count or not parts:
            stage = self._stages[self.phase_of(first_sample + done)]
            size = min(count - done, stage.end - first_sample - done)
            parts.append(self._descend(stage, first_sample + done - stage.begin, size))
            done += size
        return (
            np.concatenate([sources for sources, _ in parts]),
            np.concatenate([local for _, local in parts]),
        )

    def _descend(self, stage: _Stage, first: int, count: int) -> tuple[Int64, Int64]:
        samples: Int64 = np.arange(first, first + count, dtype=np.int64)
        blocks, visit = samples // BLOCK, samples % BLOCK
        key = base_keys(stage.key, blocks.astype(np.uint64))
        low = np.zeros(count, dtype=np.int64)
        node = np.ones(count, dtype=np.int64)
        leaves = self._leaves
        while leaves > 1:
            split = _Split(stage, key, node, low, leaves)
            before = split.before(visit)
            right = split.before(visit + 1) == before
            visit = np.where(right, visit - before, before)
            leaves //= 2
            low += right * leaves
            node = 2 * node + right
        local: Int64 = stage.already[low] + blocks * stage.quotas[low] + visit
        return low, local


class _Split:
    """How nodes of the tree divide what comes to them; arrays, one entry per node."""

    def __init__(self, stage: _Stage, key: UInt64, node: Int64, low: Int64, leaves: int) -> None:
        self._left = stage.bounds[low + leaves // 2] - stage.bounds[low]
        total = stage.bounds[low + leaves] - stage.bounds[low]
        draw = derived_keys(key, node.astype(np.uint64)) >> np.uint64(32)
        self._offset = ((draw * total.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
        self._total = np.maximum(total, 1)  # nothing ever comes to a node of no weight

    def before(self, visits: Int64) -> Int64:
        """Of the first `visits`, how many went left: of `total`, exactly `left`."""
        out: Int64 = (visits * self._left + self._offset) // self._total
        return out


def _checked(phases: list[Phase], K: int) -> list[tuple[int, list[int]]]:
    """Return (end, quotas) of each phase."""
    if not phases or phases[-1].until is not None:
        raise ValueError("the last phase of a mixture must have no end (until: None)")
    plan, begin = [], 0
    for number, (until, weights) in enumerate(phases):
        if len(weights) != K:
            raise ValueError(f"phase {number} has {len(weights)} weights for {K} sources")
        end = _MAX_SAMPLES if until is None else until
        if not begin < end <= _MAX_SAMPLES or (until is None and number < len(phases) - 1):
            raise ValueError(
                f"phase {number} ends at {until}, after one that ends at {begin}; "
                "phases end one after another, and only the last has no end"
            )
        plan.append((end, quotas(weights)))
        begin = end
    return plan


def _digest(values: list[Any]) -> str:
    """16 hex digits of a list of integers."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
