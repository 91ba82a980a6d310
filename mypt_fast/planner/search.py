"""The search: state layout x recompute x chunk rows x micro-batch, tokens per step unchanged.

The order of preference: a layout whose steps are exact before one whose are not, then tokens per
second, then memory. That spends bytes before FLOPs: recomputing costs time, smaller states do not.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import speed, table
from mypt_fast.planner.cards import Card
from mypt_fast.planner.operators import Setup
from mypt_fast.planner.step import Peak, peak

# GB/s a TFLOP/s, for a device of which nobody says: the cards of the table have 4 to 13.
TYPICAL_BANDWIDTH = 7.0


@dataclass(frozen=True)
class Device:
    """What a plan is made for.

    Attributes:
        memory: bytes that programs may take, the context among them.
        dtype: to train in.
        tflops: matmul ceiling in that dtype, 0 where unknown: then speeds only rank.
        measured: whether the ceiling was measured on this very device.
        rates: ceilings by dtype.
    """

    memory: int
    dtype: str = "bf16"
    name: str = ""
    tflops: float = 0.0
    gb_per_s: float = 0.0
    share: float = 0.8
    measured: bool = False
    source: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)

    def computing_in(self, dtype: str) -> "Device":
        """The same device, and its ceiling, in another dtype."""
        if dtype == self.dtype:
            return self
        return dataclasses.replace(self, dtype=dtype, tflops=self.rates.get(dtype, 0.0))

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


@dataclass(frozen=True)
class Able:
    """What may be chosen; by default everything.

    Attributes:
        chunks: rows of a chunk of logits; None: as the head chooses.
        rows: sequences of a forward where they are not to be chosen.
    """

    layouts: tuple[str, ...] = table.SEARCHED_LAYOUTS
    policies: tuple[str, ...] = tuple(table.POLICIES)
    chunks: tuple[int | None, ...] = (None, *table.CHUNK_ROWS[1:])
    rows: int | None = None


def device_for(card: Card | None, vram: int | None, measured: dict[str, float] | None) -> Device:
    """What a card, an amount of memory, or both, come to.

    Args:
        card: None: speeds only rank.
        vram: nominal bytes; None: the card's.
        measured: its ceilings where this machine measured them, "gb_per_s" among them.
    """
    assert card is not None or vram is not None
    nominal = vram if vram is not None else int((card.memory if card else 0) * table.GIB)
    memory = int(nominal * (1 - table.DRIVER_SHARE))
    if card is None:
        return Device(memory)
    if card.visible and nominal >= card.memory * table.GIB:
        memory = int(card.visible * table.GIB)
    own = (measured or {}).get(card.dtype, 0.0)
    bandwidth = (measured or {}).get("gb_per_s", 0.0) if own else 0.0
    return Device(
        memory, card.dtype, card.name, own or card.tflops[card.dtype],
        bandwidth or card.gb_per_s, card.share, bool(own), card.source,
        {**card.tflops, **{k: v for k, v in (measured or {}).items() if k in card.tflops}},
    )  # fmt: skip


def able(cfg: ModelConfig, train: TrainConfig, dtype: str) -> Able:
    """What a run's settings leave to be chosen.

    Args:
        cfg: the model; `use_checkpoint` is the policy "block".
        train: settings; "auto" and 0 are what is left open.
        dtype: of the matmuls.

    Raises:
        ConfigError: for a state layout that this dtype does not have.
    """
    everything = Able()
    # the other layouts compute with bf16 weights
    layouts = everything.layouts if dtype == "bf16" else ("exact",)
    if train.state not in ("auto", *layouts):
        raise ConfigError(
            f"--state {train.state} computes with bf16 weights", f"found {dtype}",
            "use --state exact",
        )  # fmt: skip
    policies = everything.policies
    if train.kernels == "inductor" or cfg.per_head_era:  # what makes norms again is neither's
        policies = tuple(name for name in policies if not table.POLICIES[name].norms)
    policy = train.recompute
    if policy == "auto" and cfg.use_checkpoint:
        policy = "block"
    return Able(
        layouts if train.state == "auto" else (train.state,),
        policies if policy == "auto" else (policy,),
        (train.chunk_rows,) if train.chunk_rows else everything.chunks,
        train.micro_batch_size or None,
    )


def left_open(train: TrainConfig) -> TrainConfig:
    """The settings with nothing said about memory."""
    return dataclasses.replace(
        train, state="auto", recompute="auto", micro_batch_size=0, chunk_rows=0
    )


def micro_batches(cfg: ModelConfig, sequences: int) -> list[int]:
    """Sequences per forward that divide a step's evenly, ascending, at most the batch size."""
    most = min(cfg.batch_size, sequences)
    return [rows for rows in range(1, most + 1) if sequences % rows == 0]


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
    choices: Able,
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
    plans = []
    for layout in choices.layouts:
        for policy in choices.policies:
            setup = dataclasses.replace(
                base, layout=table.LAYOUTS[layout], policy=table.POLICIES[policy]
            )
            plans.append(max(_chunked(setup, device, choices), key=_rank))
    return sorted(plans, key=_rank, reverse=True)


def _rank(plan: Plan) -> tuple[bool, bool, float, int]:
    if not plan.fits:  # the one that needs least is the closest
        return (False, False, -float(plan.peak.total), 0)
    return (True, plan.exact, round(plan.tokens_per_s, 9), -plan.peak.total)


def _chunked(setup: Setup, device: Device, choices: Able) -> Iterator[Plan]:
    """The largest micro-batch that fits, for every height of the chunks of logits."""
    for chunk in choices.chunks:
        with_chunk = dataclasses.replace(setup, chunk=chunk)
        splits = [choices.rows] if choices.rows else micro_batches(setup.cfg, setup.sequences)
        best = evaluate(dataclasses.replace(with_chunk, rows=splits[0]), device)
        low, high = 0, len(splits) - 1
        while best.fits and low < high:
            middle = (low + high + 1) // 2
            plan = evaluate(dataclasses.replace(with_chunk, rows=splits[middle]), device)
            low, high = (middle, high) if plan.fits else (low, middle - 1)
            if plan.fits and plan.tokens_per_s > best.tokens_per_s:
                best = plan
        yield best


def smaller_model(
    cfg: ModelConfig,
    sequences: int,
    device: Device,
    choices: Able,
    build: table.Build = table.TODAY,
    residual: int | None = None,
) -> str:
    """The smallest change of a model that does not fit, in words; "" where none would help."""

    def fits(changed: ModelConfig) -> bool:
        return search(changed, sequences, device, choices, build, residual)[0].fits

    for layers in _some(range(cfg.n_layer - 1, 0, -1)):
        if fits(dataclasses.replace(cfg, n_layer=layers)):
            return f"n_layer {layers} instead of {cfg.n_layer} would fit"
    for block in (cfg.block_size >> k for k in range(1, 8) if cfg.block_size >> k >= 64):
        if fits(dataclasses.replace(cfg, block_size=block)):
            return f"block_size {block} instead of {cfg.block_size} would fit"
    return ""


def _some(values: Sequence[int]) -> Sequence[int]:
    """At most 48 of them: a thousand layers are not all tried."""
    step = max(1, len(values) // 48)
    return values[::step]
