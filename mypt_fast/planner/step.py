"""One training step as a tape of allocations: its peak, by part."""

from dataclasses import dataclass

from mypt_fast import accounting
from mypt_fast.planner import table
from mypt_fast.planner.operators import BYTES, Operators, Setup


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


class Step(Operators):
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
        self.join(L, "ln_f", adds=True)
        t.drop("branch")
        self._head()
        if self.policy.blocks:  # what autocast had cached goes with the forward
            for layer in played:
                t.drop(f"{layer}.copy.qkv", f"{layer}.copy.proj")
                t.drop(f"{layer}.copy.up", f"{layer}.copy.down")
            t.gain("weight_copies", -counted * kept.pop("weight_copies", 0.0))
        t.now = "backward"
        self._head_backward()
        self.join_backward(L, "ln_f", adds=True, later=False)
        for layer in reversed(played):
            if layer == 1 and counted:
                self._count(kept, -counted)
                if not self.accumulates:
                    t.gain("gradients", counted * self._block_gradients())
            self._block_backward(layer)
        self._embed_backward()
        t.now = "optimizer step"
        t.touch(0.0)

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
            self.tape.touch(2 * self.r * self.n)
        if self.policy.blocks:
            self._residual(0, "x1")
        else:
            self.tape.hold("0.ln1.h", "activations", self.r * self.n)

    def _embed_backward(self) -> None:
        t, weight = self.tape, 4 if self.weight == 4 else 2
        if not self.rope:
            self._gradient("position", self.cfg.block_size * self.cfg.n_embd)
        t.hold("dembedding", "head", weight * self.vocab)
        t.drop("dh", "dbranch")
        if self.cfg.tie_weights:
            t.touch(weight * self.vocab)
            t.drop("dhead")
        t.drop("dembedding")
        self._gradient("vocab", self.vocab)

    def _head(self) -> None:
        t, V = self.tape, self.cfg.vocab_size
        t.now = "head"
        if self.amp and self.weight == 4:
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
        t = self.tape
        if self.weight == 2:
            t.touch(2 * self.vocab)
            t.drop("dhead")
            t.hold("dhead", "head", 2 * self.vocab)
        if not self.cfg.tie_weights:
            t.drop("dhead")
            self._gradient("vocab", self.vocab)
        self._gradient("vocab", self.cfg.vocab_size)

    # blocks

    def _block(self, layer: int) -> None:
        t = self.tape
        if self.policy.blocks:
            self._block_remade(layer)
        else:
            self.join(layer, "ln1", adds=layer > 0)
            self.attention(layer)
            self._forget_norm(layer, "ln1")
            self.join(layer, "ln2", adds=True)
            t.drop("attended")
            self.mlp(layer)
            self._forget_norm(layer, "ln2")
        t.drop("branch", "branch.new")
        t.hold("branch", "activations", self.a * self.n)

    def _forget_norm(self, layer: int, site: str) -> None:
        if self.policy.norms:
            self.tape.drop(f"{layer}.{site}.y")

    def _remake_norm(self, layer: int, site: str) -> None:
        if self.policy.norms:
            self.tape.hold(f"{layer}.{site}.y", "activations", self.a * self.n)

    def _block_backward(self, layer: int) -> None:
        if self.policy.blocks:
            self._block_remade_backward(layer)
            return
        self._remake_norm(layer, "ln2")
        self.mlp_backward(layer)
        self.join_backward(layer, "ln2", adds=True, later=True)
        self._remake_norm(layer, "ln1")
        self.attention_backward(layer)
        self.join_backward(layer, "ln1", adds=layer > 0, later=True)

    # blocks that are made again

    def _residual(self, layer: int, site: str) -> None:
        """Keep a residual stream: here, in host memory, or not at all where one a block is."""
        kept = not (self.policy.offload or (site == "x2" and self.build.block_residuals == 1))
        size = self.r * self.n if kept else 0
        self.tape.hold(f"{layer}.{site}", "activations", size)

    def _block_remade(self, layer: int) -> None:
        t = self.tape
        if layer:
            self.mask(f"{layer}.x1")
            self._residual(layer, "x1")
        self.join(layer, "ln1", adds=False)
        self.attention(layer)
        self._forget(layer, "sa", "ln1")
        self.mask(f"{layer}.x2")
        self._residual(layer, "x2")
        self.join(layer, "ln2", adds=False)
        self.mlp(layer)
        self._forget(layer, "mlp", "ln2")
        t.drop("attended")

    def _forget(self, layer: int, *sites: str) -> None:
        """Free what a part of a block made; autocast's copies of the weights stay cached."""
        for site in sites:
            names = ("y", "unit", "stats", "qkv", "q", "k", "out", "lse", "qk", "probabilities")
            self.tape.drop(*(f"{layer}.{site}.{name}" for name in names))
            self.tape.drop(*(f"{layer}.{site}.{x}" for x in ("noise", "dropped", "v")))
            self.tape.drop(*(f"{layer}.{site}.{x}" for x in ("pre", "gate", "silu", "h")))
        if "mlp" in sites and self.operator_mlp:
            self.tape.drop(f"{layer}.copy.up", f"{layer}.copy.down")

    def _block_remade_backward(self, layer: int) -> None:
        t, n = self.tape, self.n
        self.join(layer, "ln2", adds=False)
        self.mlp(layer)
        t.drop("branch.new")
        self.mlp_backward(layer)
        self.join_backward(layer, "ln2", adds=False, later=True)
        t.drop(f"{layer}.x2")
        self._branch_gradient(layer, "x2")
        self.join(layer, "ln1", adds=False)
        self.attention(layer)
        t.drop("attended")
        self.attention_backward(layer)
        self.join_backward(layer, "ln1", adds=False, later=True)
        t.drop(f"{layer}.x1")
        if layer:
            self._branch_gradient(layer, "x1")
        t.touch(2 * self.r * n if self.policy.offload else 0)

    def _branch_gradient(self, layer: int, site: str) -> None:
        if self.amp or self.dropout:
            self.tape.hold("dbranch", "activations", self.a * self.n)
        self.tape.drop(f"{layer}.{site}.mask")
