"""The numbers that the prediction stands on: layouts of the state, recompute policies, constants.

Whoever changes what an operator keeps for its backward, or how the state lies in memory, changes
this file and `tape.py`'s scripts; tests hold both against tracked steps.
"""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Layout:
    """How weights, gradients and moments lie in memory, bytes a parameter.

    Attributes:
        weight: what the matmuls read, and the master where it is the same.
        remainder: of the exact fp32 master, beside a 16-bit weight.
        gradient: as accumulated over micro-batches.
        moments: both together.
        exact: whether a step equals the one with fp32 master, gradients and moments bit for bit.
    """

    name: str
    weight: int
    remainder: int
    gradient: int
    moments: float
    exact: bool
    says: str

    @property
    def step_traffic(self) -> float:
        """Bytes a parameter that the optimizer moves: gradients are read, the rest also written."""
        return self.gradient + 2 * (self.weight + self.remainder + self.moments)


# 8-bit moments: a byte each and an fp32 scale a block of 256 values, twice
EIGHT_BIT_MOMENTS = 2 * (1 + 4 / 256)
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("exact", 4, 0, 4, 8.0, True, "fp32 weights, gradients and moments"),
        Layout("exact16", 2, 2, 4, 8.0, True, "bf16 weights + 16-bit remainder, fp32 otherwise"),
        Layout("fast", 2, 2, 2, EIGHT_BIT_MOMENTS, False, "bf16 gradients, 8-bit moments"),
        Layout("fast_bf16", 2, 2, 2, 4.0, False, "bf16 gradients and moments"),
    )
}
# "fast_bf16" is for predictions only: `--state fast` decides between its two kinds of moments
SEARCHED_LAYOUTS = ("exact", "exact16", "fast")


@dataclass(frozen=True)
class Policy:
    """What the backward makes again.

    Attributes:
        mlp_save: what a feed-forward keeps: "all", "gate_up" (its first product) or "input".
        norms: whether norms, activations, 16-bit copies of weights and residual dropout's masks
            are made again.
        blocks: whether each block runs again from the residual stream before it.
        offload: whether that stream waits in host memory.
    """

    name: str
    says: str
    mlp_save: str = "all"
    norms: bool = False
    blocks: bool = False
    offload: bool = False


# In the order of what they cost; `speed.py` knows how much.
POLICIES = {
    policy.name: policy
    for policy in (
        Policy("none", "everything is kept"),
        Policy("norms", "norms and activations are made again", "gate_up", norms=True),
        Policy("mlp", "the feed-forward's first matmul, too", "input", norms=True),
        Policy("block", "every block runs again", blocks=True),
        Policy("offload", "as block, residuals in host memory", blocks=True, offload=True),
    )
}


@dataclass(frozen=True)
class Build:
    """What a GPU keeps where nothing is made again.

    Attributes:
        weight_copies: whether 16-bit copies of fp32 weights live from the forward to the backward.
        packs_swiglu: whether the feed-forward copies its gate and up weights into one matrix.
        rope_keeps_qkv: whether v stays a view of the packed projection, which then stays whole
            beside the rotated q and k.
        dropout_masks: whether residual dropout keeps its mask, a byte an element.
    """

    weight_copies: bool = True
    packs_swiglu: bool = True
    rope_keeps_qkv: bool = True
    dropout_masks: bool = True


TODAY = Build()
# what the table of simulated peaks assumed (docs/decisions.md)
LEAN = Build(False, False, False, False)

# What the optimizer's step of one tensor needs beside it, bytes an element, where it goes through
# an fp32 form: (of a matrix of a block, of another parameter). Triton's kernel needs nothing.
STEP_BYTES = {"exact16": (25, 4), "fast": (38, 30), "fast_bf16": (38, 30)}

# Attention with dropout on a CPU, as kernels/dropped_attention.py works it
STRIP, LEAST_STRIP_LENGTH = 128, 128

# On a GPU, besides what the allocator hands out: context, cuBLAS workspaces, Triton modules.
CONTEXT_BYTES = GIB // 2
# Of what is live: blocks that are free but in pieces too small, with expandable segments.
SLACK_SHARE = 0.03
# Of a card's nominal memory: what the driver keeps (a 16 GB card shows 15.9 and less).
DRIVER_SHARE = 1 / 64
# Of what is left: room for the prediction's error (docs/decisions.md).
MARGIN_SHARE = 0.02

# The head's chunk of logits, as kernels/chunked_head.py chooses it
CHUNK_ROWS = (2048, 1024, 512)  # the first is the default on a GPU
CPU_CHUNK_BYTES = 56 << 20
GPU_CHUNK_BYTES = 512 << 20
MIN_CHUNK_ROWS = 64
TILE_ROWS = 64
ALIGNMENT = 64
