"""Tokens a second from a matmul ceiling: an estimate, to rank plans and to name a date."""

from mypt_fast import accounting
from mypt_fast.config import ModelConfig
from mypt_fast.planner.operators import Setup
from mypt_fast.planner.step import chunk_rows
from mypt_fast.planner.table import Policy

# What a square matmul of this many rows reaches of the best one: RTX 5060 Ti, bf16, issue #134 of
# the data behind `cards.py`. Read as the rows of a micro-batch.
SATURATION = ((256, 0.6), (1024, 0.83), (2048, 0.87), (4096, 0.97), (8192, 0.99), (16384, 1.0))
# Norms and activations made again: time of memory traffic, as a share of a step's matmuls.
POINTWISE_AGAIN = 0.01
# Residuals to the host and back, where the copies do not hide behind matmuls; a guess.
OFFLOAD_COST = 0.05


def recomputed_share(cfg: ModelConfig, policy: Policy) -> float:
    """Extra work of a policy as a share of the model's FLOPs, 0.01 for one per cent."""
    n, total = accounting.count_parameters(cfg), accounting.flops_per_token(cfg)
    if policy.blocks:
        attention = 2.0 * cfg.n_layer * cfg.n_embd * cfg.block_size
        again = (2.0 * (n.attention + n.mlp) + attention) / total
        return again + (OFFLOAD_COST if policy.offload else 0.0)
    share = POINTWISE_AGAIN if policy.norms or policy.mlp_save != "all" else 0.0
    if policy.mlp_save == "input":
        up = 2 / 3 if cfg.mlp_type == "swiglu" else 1 / 2
        share += 2.0 * up * n.mlp / total
    return share


def saturation(rows: int) -> float:
    """Share of the ceiling that matmuls of this many rows reach."""
    below = (0, 0.0)
    for size, share in SATURATION:
        if rows <= size:
            return below[1] + (share - below[1]) * (rows - below[0]) / (size - below[0])
        below = (size, share)
    return 1.0


def tokens_per_s(setup: Setup, tflops: float, share: float, gb_per_s: float = 0.0) -> float:
    """Estimated training speed.

    Args:
        setup: the plan.
        tflops: matmul ceiling of the device in the plan's dtype.
        share: of the ceiling that a step of large micro-batches reaches.
        gb_per_s: that streaming reaches; 0: `traffic` is left out.
    """
    cfg, tokens = setup.cfg, setup.sequences * setup.cfg.block_size
    work = accounting.flops_per_token(cfg) * (1 + recomputed_share(cfg, setup.policy)) * tokens
    rows = setup.rows * cfg.block_size
    seconds = work / (1e12 * tflops * share * saturation(rows))
    if gb_per_s:
        seconds += traffic(setup) / (1e9 * gb_per_s)
    return tokens / seconds


def traffic(setup: Setup) -> float:
    """Bytes that a step moves besides its matmuls: what weighs where micro-batches are small."""
    cfg, layout = setup.cfg, setup.layout
    n = accounting.count_parameters(cfg)
    micro_steps = setup.sequences / setup.rows
    moved = layout.step_traffic * n.total
    if micro_steps > 1:  # each one's gradient is written, read, and added to the sum
        moved += micro_steps * n.total * (2 * 2 + 2 * layout.gradient)
    if layout.weight == 4 and setup.dtype != "fp32":  # cast for every forward, and again behind it
        casts = 2 if setup.policy.norms or setup.policy.blocks else 1
        moved += micro_steps * casts * (4 + 2) * (n.attention + n.mlp)
    # every chunk of logits reads and writes the gradient of the output matrix, in fp32
    chunks = -(-setup.rows * cfg.block_size // chunk_rows(setup)) * micro_steps
    return moved + 8.0 * cfg.vocab_size * cfg.n_embd * chunks
