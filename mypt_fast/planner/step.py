"""One training step as a tape of allocations: its peak, by part."""

from dataclasses import dataclass

from mypt_fast import accounting
from mypt_fast.planner import table
from mypt_fast.planner.operators import BYTES, Setup
from mypt_fast.planner.remade import Remade


@dataclass(frozen=True)
class Peak:
    """Bytes that live when most do.

    Attributes:
        parts: by part, see `tape.PARTS`.
        when: the phase of the step.
        device: on a "cuda" device context and slack come on top.
    """

    parts: dict[str, int]
    when: str
    device: str

    @property
    def live(self) -> int:
        """Bytes of tensors."""
        return sum(self.parts.values())

    @property
    def context(self) -> int:
        """Bytes of the device's context and libraries."""
        return table.CONTEXT_BYTES if self.device == "cuda" else 0

    @property
    def slack(self) -> int:
        """Bytes the allocator cannot use."""
        return int(table.SLACK_SHARE * self.live) if self.device == "cuda" else 0

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.live + self.context + self.slack


def peak(setup: Setup) -> Peak:
    """The peak of a step that is not the first one: the moments exist."""
    step = Step(setup)
    step.run()
    parts = {part: round(size) for part, size in step.tape.at_peak.items()}
    return Peak(parts, step.tape.when, setup.device)


def padded_vocab(vocab: int) -> int:
    """Columns of the head's buffer."""
    return -(-vocab // table.ALIGNMENT) * table.ALIGNMENT


def chunk_rows(setup: Setup) -> int:
    """Rows of logits at a time, as `kernels/chunked_head.py` chooses them."""
    cpu, rows = setup.device == "cpu", setup.chunk
    if rows is None:
        limit = table.CPU_CHUNK_BYTES if cpu else table.GPU_CHUNK_BYTES
        fitting = limit // (BYTES[setup.dtype] * padded_vocab(setup.cfg.vocab_size))
        rows = max(table.MIN_CHUNK_ROWS, fitting)
        rows = rows if cpu else min(rows, table.CHUNK_ROWS[0])
    tokens = setup.rows * setup.cfg.block_size
    return -(-tokens // -(-tokens // rows))


class Step(Remade):
    """Plays the scripts in the order of a step.

    Blocks in the middle are alike: one is played, the others are counted. What lives grows or
    falls evenly from one to the next, so the ends of the row hold the peak.
    """

    def run(self) -> None:
        """Play a whole step."""
        t, L = self.tape, self.cfg.n_layer
        parameters = accounting.count_parameters(self.cfg).total
        t.now = "forward"
        t.gain("weights", (self.layout.weight + self.layout.remainder) * parameters)
        t.gain("states", self.layout.moments * parameters)
        if self.accumulates:
            t.gain("gradients", self.layout.gradient * parameters)
        if self.rope:
            t.gain("weights", 4 * self.cfg.block_size * (self.cfg.n_embd // self.cfg.n_head))
        self._embed()
        played = sorted({0, min(1, L - 1), L - 1})
        counted = L - len(played)
        kept: dict[str, float] = {}
        for layer in played:
            before = t.snapshot()
            self._block(layer)
            if layer == 1 and counted:
                kept = {part: now - before[part] for part, now in t.snapshot().items()}
                self._count(kept, counted)
        self.saves = True
        joins = not self.policy.blocks
        self.join(L, "ln_f", adds=joins)
        t.drop("branch")
        self._head()
        t.now = "backward"
        self._head_backward()
        self.join_backward(L, "ln_f", adds=joins, later=False)
        t.drop("stream")
        for layer in reversed(played):
            if layer == 1 and counted:
                self._count(kept, -counted)
                if not self.accumulates:
                    t.gain("gradients", counted * self._block_gradients())
            self._block_backward(layer)
        self._embed_backward()
        t.now = "optimizer step"
        t.touch(self._step_bytes())

    def _step_bytes(self) -> float:
        """What the optimizer needs for the tensor that needs most."""
        by_triton = not self.cpu and self.layout.name != "exact16"
        if self.layout.name not in table.STEP_BYTES or by_triton:
            return 0.0
        split, whole = table.STEP_BYTES[self.layout.name]
        matrix = max(self.sizes["qkv"], self.sizes["up"])
        return float(max(split * matrix, whole * self.vocab))

    def _count(self, kept: dict[str, float], blocks: int) -> None:
        for part, size in kept.items():
            self.tape.gain(part, blocks * size)

    def _block_gradients(self) -> int:
        n = accounting.count_parameters(self.cfg)
        norms = 2 * self.sizes["norm"]
        return self.layout.gradient * ((n.attention + n.mlp) // self.cfg.n_layer + norms)

    # embedding and head

    def _embed(self) -> None:
        if not self.rope:
            self.tape.touch(2 * 4 * self.n)
        self.tape.touch((4 + self.r) * self.n)
        if self.policy.blocks:
            self.tape.hold("stream", "activations", self.r * self.n)
        else:
            name = "0.sa.h" if self.policy.norms else "0.ln1.h"
            self.tape.hold(name, "activations", self.r * self.n)

    def _embed_backward(self) -> None:
        t = self.tape
        if self.r != 4:
            t.hold("dwide", "activations", 4 * self.n)
            t.drop("dh", "dbranch")
        if not self.rope:
            self._gradient("position", self.cfg.block_size * self.cfg.n_embd)
        t.hold("dembedding", "head", 4 * self.vocab)
        t.drop("dh", "dbranch", "dwide")
        if self.cfg.tie_weights:
            t.touch(4 * self.vocab)
            t.drop("dhead")
        t.drop("dembedding")
        self._gradient("vocab", self.vocab)

    def _head(self) -> None:
        t, V = self.tape, self.cfg.vocab_size
        t.now = "head"
        if self.amp:
            t.hold("head.copy", "head", self.a * self.vocab)
        t.hold("dy", "head", self.a * self.n)
        t.hold("dhead", "head", 4 * (self.vocab + V))
        rows = chunk_rows(self.setup)
        buffer = self.a * rows * padded_vocab(self.cfg.vocab_size)
        if self.cpu and self.amp:
            buffer += 4 * min(rows, table.TILE_ROWS) * V
            buffer += 2 * self.vocab if self.setup.dtype == "bf16" else 0
        t.hold("logits", "head", buffer + 4 * V)
        t.drop("logits", "head.copy", f"{self.cfg.n_layer}.ln_f.y")

    def _head_backward(self) -> None:
        if not self.cfg.tie_weights:
            self.tape.drop("dhead")
            self._gradient("vocab", self.vocab)
        self._gradient("vocab", self.cfg.vocab_size)

    # blocks

    def _block(self, layer: int) -> None:
        t = self.tape
        if self.policy.blocks:
            self._block_again(layer)
        elif self.policy.norms:
            self.remade_attention(layer)
            self.remade_mlp(layer)
        else:
            self._plain(layer, adds=layer > 0)
            t.drop("branch", "branch.new")
            t.hold("branch", "activations", self.a * self.n)

    def _plain(self, layer: int, *, adds: bool) -> None:
        """Forward of a block that keeps everything."""
        self.join(layer, "ln1", adds=adds)
        self.attention(layer)
        self.join(layer, "ln2", adds=True)
        self.tape.drop("attended")
        self.mlp(layer)

    def _plain_backward(self, layer: int, *, adds: bool) -> None:
        self.mlp_backward(layer)
        self.join_backward(layer, "ln2", adds=True, later=True)
        self.attention_backward(layer)
        self.join_backward(layer, "ln1", adds=adds, later=True)

    def _block_backward(self, layer: int) -> None:
        if self.policy.blocks:
            self._block_again_backward(layer)
        elif self.policy.norms:
            self.remade_mlp_backward(layer)
            self.remade_attention_backward(layer)
        else:
            self._plain_backward(layer, adds=layer > 0)

    # blocks that run again

    def _block_again(self, layer: int) -> None:
        t = self.tape
        self.saves = False
        self._plain(layer, adds=False)
        self._residual_mask(layer)
        t.drop("branch.new", *[name for name in t.held() if name.startswith(f"{layer}.")])
        t.drop("stream")
        t.hold("stream", "activations", self.r * self.n)
        if self.cpu or not self.policy.offload:  # else it waits in host memory
            t.hold(f"{layer}.x", "activations", self.r * self.n)

    def _residual_mask(self, layer: int) -> None:
        """The last branch joins the stream: h + dropout(branch)."""
        self.mask(f"{layer}.out")
        self.tape.touch((self.a * self.dropout + self.r) * self.n)

    def _block_again_backward(self, layer: int) -> None:
        t = self.tape
        if self.policy.offload:  # it came back, and the one before it is coming
            t.hold("coming", "activations", 2 * self.r * self.n)
        self.saves = True
        self._plain(layer, adds=False)
        if self.dropout:
            self._residual_mask(layer)
        t.drop("branch.new")
        if self.amp or self.dropout:  # the branch's own gradient: rounded, or through the dropout
            t.hold("dbranch", "activations", self.a * self.n)
            if self.cpu and self.amp and self.dropout:
                t.touch(self.a * self.n)
        t.drop(f"{layer}.out.mask")
        self._plain_backward(layer, adds=False)
        t.drop(f"{layer}.x", "coming")
