"""The search: state layout x recompute x chunk rows x micro-batch, tokens per step unchanged.

The order of preference: a layout whose steps are exact before one whose are not, then tokens per
second, then memory. That spends bytes before FLOPs: recomputing costs time, smaller states do not.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mypt_fast.config import ModelConfig
from mypt_fast.planner import ceiling, speed, table
from mypt_fast.planner.cards import Card
from mypt_fast.planner.operators import Setup
from mypt_fast.planner.options import Options
from mypt_fast.planner.step import Peak, peak

# GB/s a TFLOP/s, for a device of which nobody says: the cards of the table have 4 to 12.
TYPICAL_BANDWIDTH = 6.3
BANDWIDTH_SHARE = 0.9  # of a data sheet's bandwidth, that streaming reaches


@dataclass(frozen=True)
class Device:
    """What a plan is made for.

    Attributes:
        memory: bytes that programs may take, the context among them.
        dtype: to train in.
        published: matmul ceilings by dtype, TFLOP/s, of such a card.
        own: the same, measured on this very device.
        gb_per_s: that streaming reaches; 0: unknown.
        share: of its ceiling that a training step reaches, as estimated.
        source: of the published ceilings.
    """

    memory: int
    dtype: str = "bf16"
    name: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)
    gb_per_s: float = 0.0
    share: float = 0.8
    source: str = ""

    @property
    def tflops(self) -> float:
        """Matmul ceiling in the dtype, 0 where unknown: then speeds only rank."""
        return self.own.get(self.dtype) or self.published.get(self.dtype, 0.0)

    @property
    def measured(self) -> bool:
        """Whether that ceiling was measured on this very device."""
        return self.dtype in self.own

    @property
    def room(self) -> int:
        """Bytes that a plan may fill: the prediction may be a little low."""
        return int(self.memory * (1 - table.MARGIN_SHARE))


@dataclass(frozen=True)
class Plan:
    """A way to train: what it needs, and about how fast it is.

    Attributes:
        fits: whether the device has the memory.
        tokens_per_s: estimated; of a device of 1 TFLOP/s where the ceiling is unknown.
    """

    setup: Setup
    peak: Peak
    fits: bool
    tokens_per_s: float

    @property
    def exact(self) -> bool:
        """Whether its steps equal those of the fp32 layout on equal gradients."""
        return self.setup.layout.exact


def nominal(card: Card | None, vram: int | None) -> int:
    """Bytes that programs may take of a card, of an amount of memory, or of the smaller of both."""
    assert card is not None or vram is not None
    size = vram if vram is not None else int((card.memory if card else 0) * table.GIB)
    if card is not None and card.visible and size >= card.memory * table.GIB:
        return int(card.visible * table.GIB)
    return int(size * (1 - table.DRIVER_SHARE))


def device_for(
    memory: int, dtype: str | None, card: Card | None, names: Sequence[str] = ()
) -> Device:
    """A device with what is known of its speed.

    Args:
        memory: bytes that programs may take.
        dtype: to train in; None: the card's own.
        card: of the table; None where it has none.
        names: that its own measurements may be kept under, the likeliest first.
    """
    own, bandwidth = ceiling.best_known(names)
    if card is None:
        return Device(memory, dtype or "bf16", names[0] if names else "", {}, own, bandwidth)
    return Device(
        memory, dtype or card.dtype, card.name, card.tflops, own,
        bandwidth or BANDWIDTH_SHARE * card.gb_per_s, card.share, card.source,
    )  # fmt: skip


def micro_batches(cfg: ModelConfig, sequences: int) -> list[int]:
    """Sequences per forward that divide a step's evenly, ascending, at most the batch size."""
    small = [rows for rows in range(1, math.isqrt(sequences) + 1) if sequences % rows == 0]
    every = sorted({*small, *(sequences // rows for rows in small)})
    return [rows for rows in every if rows <= cfg.batch_size]


def evaluate(setup: Setup, device: Device) -> Plan:
    """What one setup needs, and about how fast it is, on a device."""
    found = peak(setup)
    ceiling = device.tflops or 1.0
    bandwidth = device.gb_per_s or TYPICAL_BANDWIDTH * ceiling
    rate = speed.tokens_per_s(setup, ceiling, device.share, bandwidth)
    return Plan(setup, found, found.total <= device.room, rate)


def search(
    cfg: ModelConfig,
    sequences: int,
    device: Device,
    choices: Options,
    build: table.Build = table.TODAY,
    residual: int | None = None,
) -> list[Plan]:
    """The best plan of every layout and policy, best first; those that do not fit last.

    Args:
        cfg: the model; its `batch_size` is the largest micro-batch.
        sequences: of a step; never changed.
        device: what it is for.
        choices: what to choose from.
        build: what the operators keep.
        residual: bytes an element of the residual stream, as `Setup` takes it.
    """
    base = Setup(cfg, 1, sequences, dtype=device.dtype, build=build, residual=residual)
    splits = [choices.rows] if choices.rows else micro_batches(cfg, sequences)
    plans = []
    for layout in choices.layouts:
        for policy in choices.policies:
            setup = dataclasses.replace(
                base, layout=table.LAYOUTS[layout], policy=table.POLICIES[policy]
            )
            plans += [max(_tried(setup, device, choices.chunks, splits), key=_rank)]
    return sorted(plans, key=_rank, reverse=True)


def _rank(plan: Plan) -> tuple[bool, bool, float, int]:
    if not plan.fits:  # the one that needs least is the closest
        return (False, False, -float(plan.peak.total), 0)
    return (True, plan.exact, round(plan.tokens_per_s, 9), -plan.peak.total)


def _tried(
    setup: Setup, device: Device, chunks: Sequence[int | None], splits: Sequence[int]
) -> Iterator[Plan]:
    """Plans of a layout and policy, the best among them, for every height of a chunk of logits.

    Memory grows with the micro-batch but for the last step: a batch in one forward has no sum of
    gradients to keep beside it, and may need less than any of its parts.
    """
    for chunk in chunks:
        of_rows = [dataclasses.replace(setup, chunk=chunk, rows=rows) for rows in splits]
        last = evaluate(of_rows.pop(), device)
        yield last
        low, high = 0, len(of_rows) - 1
        while not last.fits and low <= high:
            middle = (low + high) // 2
            plan = evaluate(of_rows[middle], device)
            yield plan
            low, high = (middle + 1, high) if plan.fits else (low, middle - 1)


def smaller_model(
    cfg: ModelConfig,
    sequences: int,
    device: Device,
    choices: Options,
    build: table.Build = table.TODAY,
    residual: int | None = None,
) -> str:
    """The smallest change of a model that does not fit, in words; "" where none would help."""

    def fits(model: ModelConfig) -> bool:
        return search(model, sequences, device, choices, build, residual)[0].fits

    low, high = 0, cfg.n_layer  # layers that fit, and that do not
    while high - low > 1:
        middle = (low + high) // 2
        less = dataclasses.replace(cfg, n_layer=middle)
        low, high = (middle, high) if fits(less) else (low, middle)
    if low:
        return f"n_layer {low} instead of {cfg.n_layer} would fit"
    for block in (cfg.block_size >> k for k in range(1, 8) if cfg.block_size >> k >= 64):
        if fits(dataclasses.replace(cfg, block_size=block)):
            return f"block_size {block} instead of {cfg.block_size} would fit"
    return ""
