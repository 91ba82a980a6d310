"""What each operator of a block holds and frees, forward and backward, as scripts on a tape.

Two kinds of devices. On a CPU the plain expressions run, whose residuals autograd keeps; on a GPU
the operators of `kernels/`. What each keeps was read off the operators and is held to tracked
steps by tests/planner/test_tracked.py.

Shapes: B sequences of a micro-batch, T time, C width, F feed-forward width, H heads, V vocabulary.
"""

from dataclasses import dataclass

from mypt_fast import accounting
from mypt_fast.config import ModelConfig
from mypt_fast.planner import table
from mypt_fast.planner.tape import Tape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        rows: sequences of a forward.
        sequences: of an optimizer step; the gradients of several forwards add up.
        chunk: rows of logits at a time; None: as `kernels/chunked_head.py` chooses.
        dtype: of the matmuls: "fp32", "bf16" or "fp16".
        device: "cuda" or "cpu".
        residual: bytes an element of the residual stream; None: as the trainer's `auto`.
    """

    cfg: ModelConfig
    rows: int
    sequences: int
    policy: table.Policy = table.POLICIES["none"]
    layout: table.Layout = table.LAYOUTS["exact"]
    chunk: int | None = None
    dtype: str = "bf16"
    device: str = "cuda"
    build: table.Build = table.TODAY
    residual: int | None = None


class Operators:
    """The scripts of the operators of a block, forward and backward."""

    def __init__(self, setup: Setup) -> None:
        cfg = setup.cfg
        self.setup, self.cfg, self.tape = setup, cfg, Tape()
        self.policy, self.layout, self.build = setup.policy, setup.layout, setup.build
        self.cpu = setup.device == "cpu"
        B, T, C = setup.rows, cfg.block_size, cfg.n_embd
        self.n = B * T * C  # elements of the residual stream
        self.tokens = B * T
        self.swiglu, self.rms = cfg.mlp_type == "swiglu", cfg.norm_type == "rmsnorm"
        self.rope = cfg.pos_encoding == "rope"
        F = accounting.swiglu_hidden(C) if self.swiglu else 4 * C
        self.f = B * T * F
        self.a = BYTES[setup.dtype]  # bytes of an activation
        self.amp = self.a < 4
        self.weight = self.layout.weight
        self.r = setup.residual or (2 if setup.dtype == "bf16" and not self.cpu else 4)
        self.square = B * cfg.n_head * T * T  # elements of the attention matrix
        self.dropout = cfg.dropout > 0
        # PyTorch's flash attention for the CPU has no dropout: the matrix is made as a whole, or,
        # of long rows, what is below its diagonal
        self.strips = self.cpu and self.dropout and T >= table.LEAST_STRIP_LENGTH
        self.matrix = self.cpu and self.dropout and not self.strips
        self.wide_heads = 4 * self.n if self.amp or B > 1 else 0  # copies of a projection's heads
        self.saves = True  # what the forward makes is kept for the backward
        # of one sequence it reads v where it lies; of several it makes a copy
        self.keeps_v = self.matrix and B == 1 and not self.amp
        self.accumulates = setup.rows < setup.sequences
        norm = C if self.rms else 2 * C
        qkv, proj = 3 * C * C, C * C
        self.sizes = {"norm": norm, "qkv": qkv, "proj": proj, "up": F * C, "down": F * C}
        self.biases = {
            "qkv": 3 * C if cfg.bias else 0, "proj": C if cfg.bias else 0,
            "up": 0 if self.swiglu else F, "down": 0 if self.swiglu else C, "norm": 0,
        }  # fmt: skip
        self.vocab = cfg.vocab_size * C
        # what the operators of a feed-forward see packed
        self.packed = self.swiglu and setup.build.packs_swiglu

    # small words

    def _made(self, name: str, count: int | None = None) -> None:
        """The gradient of a weight comes, in the dtype of the matmul."""
        elements = (self.sizes[name] if count is None else count) + self.biases.get(name, 0)
        made = 4 if name in ("norm", "vocab", "position") else self.a
        self.tape.hold(f"dweight.{name}", "gradients", made * elements)

    def _settle(self, name: str, count: int | None = None) -> None:
        """It takes its own dtype, and is added to those of earlier micro-steps."""
        elements = (self.sizes[name] if count is None else count) + self.biases.get(name, 0)
        made = 4 if name in ("norm", "vocab", "position") else self.a
        own = self.layout.gradient * elements
        if made != self.layout.gradient:
            self.tape.touch(own)
        self.tape.drop(f"dweight.{name}")
        if not self.accumulates:
            self.tape.gain("gradients", own)

    def _gradient(self, name: str, count: int | None = None) -> None:
        self._made(name, count)
        self._settle(name, count)

    def _copy(self, layer: int, name: str, elements: int) -> None:
        """Hold the 16-bit copy of a fp32 weight that the matmul of the backward reads, too."""
        if self.amp and self.weight == 4 and self.build.weight_copies:
            self.tape.hold(f"{layer}.copy.{name}", "weight_copies", self.a * elements)

    # a norm, behind the residual add or alone

    def join(self, layer: int, site: str, *, adds: bool) -> None:
        """Forward of h = x + dropout(branch) and its norm."""
        t, key, n = self.tape, f"{layer}.{site}", self.n
        if adds:
            self.mask(key)
            if self.dropout and self.cpu:
                t.hold("dropped", "activations", self.a * n)
            t.hold(key + ".h", "activations", self.r * n)
        t.hold(key + ".stats", "activations", (4 if self.rms else 8) * self.tokens)
        if self.cpu and self.rms:
            t.touch(4 * n)
            t.hold(key + ".unit", "activations", 4 * n)
        if self.cpu and self.amp:
            t.hold("wide", "activations", 4 * n)
        t.hold(key + ".y", "activations", self.a * n)
        t.drop("wide", "dropped")
        if not self.saves:
            t.drop(key + ".unit", key + ".stats")

    def mask(self, key: str) -> None:
        """Hold what the backward of a residual dropout reads; a seed instead takes no memory."""
        if self.dropout and (self.cpu or self.build.dropout_masks):
            size = self.a if self.cpu else 1
            self.tape.hold(key + ".mask", "activations", size * self.n)
            self.tape.touch(self.a * self.n)

    def join_backward(self, layer: int, site: str, *, adds: bool, later: bool) -> None:
        """From "dy" and (`later`) "dh", the gradient of h that came from above, to "dh"."""
        t, key, n = self.tape, f"{layer}.{site}", self.n
        t.drop(key + ".y")
        if self.cpu and self.amp:
            t.hold("dwide", "activations", 4 * n)
            t.drop("dy")
        if self.cpu and self.rms:
            t.touch(8 * n)
            t.drop(key + ".unit")
            t.hold("dx", "activations", 4 * n)
            t.drop("dwide", "dy")
            if later:
                t.touch(4 * n)
                t.drop("dh")
            t.touch(16 * n)
        else:
            t.hold("dx", "activations", self.r * n)
            t.drop("dwide", "dy")
        self._gradient("norm")
        t.drop(key + ".h", key + ".stats")
        if not (self.cpu and self.rms) and later:
            if self.cpu:
                t.touch(4 * n)
            t.drop("dh")
        t.drop("dx")
        t.hold("dh", "activations", self.r * n)
        if adds:
            # the branch's own: rounded, or through the dropout
            if self.amp or self.dropout:
                t.hold("dbranch", "activations", self.a * n)
                if self.cpu and self.amp and self.dropout:
                    t.touch(self.a * n)
            t.drop(key + ".mask")

    # attention

    def attention(self, layer: int) -> None:
        """Forward from the norm's output to "branch"."""
        t, key, n, a = self.tape, f"{layer}.sa", self.n, self.a
        self._copy(layer, "qkv", self.sizes["qkv"])
        t.hold(key + ".qkv", "activations", 3 * a * n)
        if self.rope:
            t.hold(key + ".q", "activations", a * n)
            t.touch((12 if self.amp else 8) * n if self.cpu else a * n)
            t.hold(key + ".k", "activations", a * n)
        self.mix(key)
        if self.rope and not self.cpu and not self.build.rope_keeps_qkv:
            t.drop(key + ".q", key + ".k")  # written over the packed projection
        self._copy(layer, "proj", self.sizes["proj"])
        t.hold("attended", "activations", a * n)
        if self.matrix:
            t.drop(key + ".q", key + ".k", "" if self.keeps_v else key + ".qkv")

    def mix(self, key: str) -> None:
        """From queries, keys and values to what the heads attend to."""
        if self.matrix:
            self._matrix_attention(key)
            return
        if self.strips:
            self._strip_attention(key)
            return
        self.tape.hold(key + ".out", "activations", self.a * self.n)
        self.tape.hold(key + ".lse", "activations", 4 * self.tokens * self.cfg.n_head)

    def _strip_sizes(self) -> list[int]:
        """Elements of every strip of queries and the keys up to it."""
        T, heads = self.cfg.block_size, self.setup.rows * self.cfg.n_head
        ends = [min(first + table.STRIP, T) for first in range(0, T, table.STRIP)]
        return [heads * (last - i * table.STRIP) * last for i, last in enumerate(ends)]

    def _strip_attention(self, key: str) -> None:
        """Weights of the strips and their dropout are kept, squares are not."""
        t, elements = self.tape, sum(self._strip_sizes())
        t.hold("heads", "activations", 3 * self.wide_heads)
        t.hold(key + ".probabilities", "activations", 4 * elements)
        t.hold(key + ".noise", "activations", elements)
        t.hold("wide", "activations", 4 * self.n if self.amp else 0)
        sizes = self._strip_sizes()
        t.touch(6 * max(sizes) + (2 if len(sizes) == 1 else 4) * self.n)
        t.hold(key + ".out", "activations", self.a * self.n)
        t.drop("heads", "wide")

    def _strip_backward(self) -> None:
        t = self.tape
        t.hold("heads", "activations", 4 * self.wide_heads)
        t.touch(self.wide_heads + 4 * self.n)
        t.hold("wide", "activations", 12 * self.n)
        sizes = self._strip_sizes()
        if len(sizes) == 1:
            t.touch(4 * max(sizes) + 5 * self.n)
        else:  # a strip's part of keys and values is copied for its products
            t.touch(6 * max(sizes))
        t.touch(3 * self.a * self.n if self.amp else 0)
        t.drop("heads", "wide")

    def _matrix_attention(self, key: str) -> None:
        """PyTorch's plain attention, in fp32, as a CPU runs it beside dropout."""
        t, n, square = self.tape, self.n, 4 * self.square
        if self.amp:
            t.hold("wide", "activations", 12 * n)
        t.hold("scaled", "activations", 4 * n)
        t.touch(4 * n)
        t.hold(key + ".qk", "activations", 8 * n)
        t.touch(4 * n + square)
        t.touch(2 * square)
        t.hold(key + ".probabilities", "activations", square)
        t.touch(square)
        t.hold(key + ".noise", "activations", square)
        t.hold(key + ".dropped", "activations", square)
        if not self.saves:
            t.drop(key + ".qk", key + ".probabilities", key + ".noise")
        if self.amp:
            t.hold("rounded", "activations", self.a * self.square)
        t.hold(key + ".v", "activations", 0 if self.keeps_v else 4 * n)
        t.touch((4 + self.a * self.amp) * n)
        t.drop("wide", "scaled", "rounded")
        t.hold(key + ".out", "activations", self.a * n)

    def attention_backward(self, layer: int) -> None:
        """From "dh", or "dbranch" where it differs, to "dy" of the norm before."""
        t, key, n, a = self.tape, f"{layer}.sa", self.n, self.a
        self._made("proj")
        t.hold("dout", "activations", a * n)
        t.drop("dbranch", f"{layer}.copy.proj", key + ".out" if self.matrix else "")
        self._settle("proj")
        self.mix_backward(key)
        self._made("qkv")
        t.hold("dy", "activations", a * n)
        t.drop("dqkv", f"{layer}.copy.qkv", f"{layer}.ln1.y")
        self._settle("qkv")

    def mix_backward(self, key: str) -> None:
        """From "dout" to "dqkv", packed."""
        t, n, a = self.tape, self.n, self.a
        if self.matrix:
            square = 4 * self.square
            if self.amp:
                t.drop("dout")
                t.hold("dout", "activations", 4 * n)
            t.hold("dv", "activations", 4 * n)
            t.hold("dprobabilities", "activations", square)
            t.drop(key + ".v", key + ".dropped", "dout")
            t.touch(square)
            t.drop(key + ".noise")
            t.touch(square)
            t.drop(key + ".probabilities")
            t.hold("dqk", "activations", 8 * n)
            t.drop("dprobabilities", key + ".qk", key + ".qkv")
            t.touch((8 + 3 * a) * n)
            t.drop("dv", "dqk")
            t.hold("dqkv", "activations", 3 * a * n)
        else:
            if self.strips:
                self._strip_backward()
            t.hold("dq, dk, dv", "activations", 3 * a * n)
            t.drop(key + ".probabilities", key + ".noise")
            t.drop("dout", key + ".qkv", key + ".q", key + ".k", key + ".out", key + ".lse")
            if self.rope and self.cpu:
                t.touch((12 if self.amp else 8) * n)
            t.hold("dqkv", "activations", 3 * a * n)
            t.drop("dq, dk, dv")

    # feed-forward

    def mlp(self, layer: int) -> None:
        """Forward from the norm's output to "branch.new"."""
        t, key, f, a = self.tape, f"{layer}.mlp", self.f, self.a
        up = self.sizes["up"] * (2 if self.swiglu else 1)
        pre = a * f * (2 if self.swiglu else 1)
        if not self.cpu:
            self._operator_copies(layer, up)
            t.hold(key + ".pre", "activations", pre)
            t.hold(key + ".h", "activations", a * f)
            t.hold("branch.new", "activations", a * self.n)
            return
        self._copy(layer, "up", up)
        t.hold(key + ".pre", "activations", a * f)
        if self.swiglu:
            t.hold(key + ".gate", "activations", a * f)
            t.hold(key + ".silu", "activations", a * f)
        t.hold(key + ".h", "activations", a * f)
        if not self.saves:
            t.drop(key + ".pre", key + ".gate", key + ".silu")
        self._copy(layer, "down", self.sizes["down"])
        t.hold("branch.new", "activations", a * self.n)

    def _operator_copies(self, layer: int, up: int) -> None:
        copies = self.amp and self.weight == 4 and self.build.weight_copies
        if self.packed:  # a copy in any dtype
            if copies:
                self.tape.touch(self.a * up)
            size = self.a if self.amp else 4
            self.tape.hold(f"{layer}.copy.up", "weight_copies", size * up)
        elif copies:
            self.tape.hold(f"{layer}.copy.up", "weight_copies", self.a * up)
        if copies:
            down = self.a * self.sizes["down"]
            self.tape.hold(f"{layer}.copy.down", "weight_copies", down)

    def mlp_backward(self, layer: int) -> None:
        """From "dh", or "dbranch" where it differs, to "dy" of the norm before."""
        if not self.cpu:
            self._operator_mlp_backward(layer)
            return
        t, key, af = self.tape, f"{layer}.mlp", self.a * self.f
        t.hold("dhidden", "activations", af)
        self._made("down")
        t.drop("dbranch", f"{layer}.copy.down", key + ".h")
        self._settle("down")
        if self.swiglu:
            t.hold("dsilu", "activations", af)
            t.hold("dpre", "activations", af)
            t.drop("dhidden", key + ".silu", key + ".pre")
            t.hold("dgate", "activations", af)
            t.drop("dsilu", key + ".gate")
            self._gradient("up")
            t.hold("dy2", "activations", self.a * self.n)
        else:
            t.hold("dpre", "activations", af)
            t.drop("dhidden", key + ".pre")
        self._made("up")
        t.hold("dy", "activations", self.a * self.n)
        t.drop("dpre", "dgate", f"{layer}.copy.up", f"{layer}.ln2.y")
        self._settle("up")
        if self.swiglu:
            t.touch(self.a * self.n)
            t.drop("dy2")

    def _operator_mlp_backward(self, layer: int) -> None:
        t, key, f, a = self.tape, f"{layer}.mlp", self.f, self.a
        up = self.sizes["up"] * (2 if self.swiglu else 1)
        pre = a * f * (2 if self.swiglu else 1)
        self._gradient("down")
        t.hold("dhidden", "activations", a * f)
        t.hold("dpre", "activations", pre)
        t.drop("dhidden", key + ".h", key + ".pre")
        t.hold("dweights", "activations", a * up)
        t.hold("dy", "activations", a * self.n)
        t.drop("dpre", "dbranch", f"{layer}.copy.up", f"{layer}.copy.down", f"{layer}.ln2.y")
        t.drop("dweights")
        for name in ("up", "up") if self.swiglu else ("up",):
            self._gradient(name)
