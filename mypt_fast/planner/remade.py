"""The scripts of a block whose norms, activations, casts and masks the backward makes again.

What `kernels.norm_qkv`, `kernels.norm_mlp` and `kernels.linear` allocate, as Triton kernels on a
GPU and as formulas of plain PyTorch on a CPU, which hold in fp32 what the kernels hold in
registers.
"""

from mypt_fast.planner.operators import Operators

PHILOX_BYTES = 104  # a lane, of the masks that plain PyTorch draws from a seed


class Remade(Operators):
    """The scripts of the policies "norms" and "mlp"."""

    # the norm

    def _philox(self) -> None:
        """Need what plain PyTorch takes to draw a mask from a seed."""
        block, columns = 16, self.cfg.n_embd
        while block < min(256, columns) or -(-columns // block) > 8:  # as launch.tiles
            block *= 2
        groups = -(-columns // block // 4)
        self.tape.touch(PHILOX_BYTES * self.tokens * groups * block)

    def mask(self, key: str) -> None:
        """The last norm has its branch's dropout from a seed, too: a bool mask in plain PyTorch."""
        if not self.policy.norms:
            super().mask(key)
        elif self.dropout and self.cpu:
            self._philox()
            self.tape.hold(key + ".mask", "activations", self.n)
            self.tape.touch(8 * self.n)

    def _normed(self, key: str, *, adds: bool) -> None:
        """Forward of the norm to `key`.y; with the residual add to `key`.h, too."""
        t, n = self.tape, self.n
        if self.cpu and adds:
            t.hold("wide", "activations", 4 * n if self.amp else 0)
            if self.dropout:
                self._philox()
                t.touch(9 * n)
                t.drop("wide")
                t.hold("wide", "activations", 4 * n)
        if adds:
            t.hold(key + ".h", "activations", self.r * n)
        if self.cpu:
            t.drop("wide")
            t.hold("centred", "activations", 0 if self.rms else 4 * n)
            t.touch(8 * n)
            t.hold("wide", "activations", 4 * n if self.amp else 0)
            if not self.rms:
                t.touch((4 + self.a * (not self.amp)) * n)
        t.hold(key + ".y", "activations", self.a * n)
        t.drop("wide", "centred")

    def _norm_backward(self, key: str, *, adds: bool) -> None:
        """From "dy" and "dh" to a new "dh" and "dbranch"; the old ones are still held."""
        t, n = self.tape, self.n
        apart = self._apart(adds)
        if not self.cpu:
            t.hold("dh.new", "activations", self.r * n)
            t.hold("dbranch.new", "activations", self.a * n if apart else 0)
            return
        t.hold("wide", "activations", 4 * n if self.amp else 0)
        t.touch((4 if self.rms else 8) * n)
        t.hold("unit, g", "activations", 8 * n)
        t.touch(8 * n)
        t.hold("dh.new", "activations", 4 * n)
        t.touch(4 * n)
        if apart:
            if self.dropout:
                self._philox()
                t.touch(9 * n)
                t.touch((4 + self.a) * n)
            t.hold("dbranch.new", "activations", self.a * n)
        t.touch(4 * n)
        t.drop("wide", "unit, g")

    def _pass_on(self, *, adds: bool) -> None:
        """The new gradients take the place of those that came from above."""
        t = self.tape
        t.drop("dy", "dh", "dbranch", "dh.new", "dbranch.new")
        t.hold("dh", "activations", self.r * self.n)
        if self._apart(adds):
            t.hold("dbranch", "activations", self.a * self.n)

    def _apart(self, adds: bool) -> bool:
        """Whether a branch's gradient is not that of the stream itself."""
        return adds and (self.dropout or self.a != self.r)

    def _settle_together(self, *names: str) -> None:
        """Weights' gradients that arrived together take their own dtype, then their places."""
        t, a = self.tape, self.a
        counts = [self.sizes[name] + self.biases[name] for name in names]
        for i, count in enumerate(counts):
            t.drop(f"dw.{i}")
            t.hold(f"dw.{i}", "gradients", a * count)
        cast = a != self.layout.gradient
        for i, count in enumerate(counts):
            t.drop("" if cast else f"dw.{i}")
            t.hold(f"own.{i}", "gradients", self.layout.gradient * count)
            t.drop(f"dw.{i}")
        for i, count in enumerate(counts):
            t.drop(f"own.{i}")
            if not self.accumulates:
                t.gain("gradients", self.layout.gradient * count)

    # attention

    def remade_attention(self, layer: int) -> None:
        """Forward from the residual stream and "branch" to the next "branch"."""
        t, key, n, a = self.tape, f"{layer}.sa", self.n, self.a
        self._normed(key, adds=layer > 0)
        self._low("qkv", self.sizes["qkv"])
        t.hold(key + ".qkv", "activations", 3 * a * n)
        t.drop(key + ".y", "low.qkv")
        self._rotate()
        t.drop("branch")
        self.mix(key)
        self._low("proj", self.sizes["proj"])
        t.hold("branch", "activations", a * n)
        t.drop("low.proj")
        if self.matrix and not self.keeps_v:
            t.drop(key + ".qkv")

    def _low(self, name: str, elements: int) -> None:
        """The 16-bit copy of a fp32 weight, for as long as a matmul takes."""
        size = self.a * elements if self.amp and self.weight == 4 else 0
        self.tape.hold(f"low.{name}", "weight_copies", size)

    def _rotate(self) -> None:
        """Turn packed queries and keys, beside them, into new memory."""
        if not self.rope:
            return
        n, a = self.n, self.a
        if self.cpu:
            self.tape.touch((a + 8 + 4 * self.amp) * n)
        self.tape.touch((3 + 2 * self.cpu) * a * n)

    def remade_attention_backward(self, layer: int) -> None:
        """From "dh" and "dbranch" to those of the block before."""
        t, key, n, a = self.tape, f"{layer}.sa", self.n, self.a
        adds = layer > 0
        self._low("proj", self.sizes["proj"])
        t.hold("dout", "activations", a * n)
        t.drop("low.proj")
        self._made("proj")
        t.drop("dbranch", key + ".out" if self.matrix else "")
        self._settle("proj")
        self.mix_backward(key)
        self._rotate()
        t.hold("turned", "activations", 3 * a * n if self.rope else 0)
        self._normed(key, adds=False)
        t.hold("dw.0", "gradients", a * (self.sizes["qkv"] + self.biases["qkv"]))
        t.drop(key + ".y")
        self._low("qkv", self.sizes["qkv"])
        t.hold("dy", "activations", a * n)
        t.drop("low.qkv", "turned")
        self._norm_backward(key, adds=adds)
        self._settle_together("qkv")
        self._gradient("norm")
        t.drop("dqkv", key + ".h")
        if not adds:  # the stream's own gradient is added to the norm's
            t.touch(self.r * n)
        self._pass_on(adds=adds)

    # feed-forward

    def _lows(self) -> None:
        """The weights as the matmuls read them."""
        up, copied = self.sizes["up"], self.amp and self.weight == 4
        if self.swiglu:  # packed, whatever the dtype
            self.tape.touch((4 if copied else 2) * self.a * up)
            self.tape.hold("low.up", "weight_copies", 2 * self.a * up)
        else:
            self._low("up", up)
        self._low("down", self.sizes["down"])

    def remade_mlp(self, layer: int) -> None:
        """Forward from the residual stream and "branch" to the next "branch"."""
        t, key, f, a = self.tape, f"{layer}.mlp", self.f, self.a
        self._normed(key, adds=True)
        self._lows()
        t.hold(key + ".pre", "activations", (1 + self.swiglu) * a * f)
        if self.cpu and (self.amp or self.swiglu):
            t.touch((8 if self.amp else 4) * f)
        t.hold("hidden", "activations", a * f)
        if self.policy.mlp_save == "input":
            t.drop(key + ".pre")
        t.touch(a * self.n)
        t.drop("hidden", key + ".y", "low.up", "low.down", "branch")
        t.hold("branch", "activations", a * self.n)

    def remade_mlp_backward(self, layer: int) -> None:
        """From "dh" and "dbranch" to those of the attention."""
        t, key, f, a = self.tape, f"{layer}.mlp", self.f, self.a
        replay, gates = self.policy.mlp_save == "input", 1 + self.swiglu
        self._normed(key, adds=False)
        self._lows()
        t.hold("dhidden", "activations", a * f)
        if replay:
            t.hold(key + ".pre", "activations", gates * a * f)
        self._formula(replay)
        t.hold("dpre", "activations", 0 if replay else gates * a * f)
        weights = ("up", "up", "down") if self.swiglu else ("up", "down")
        t.hold("dw.0", "gradients", a * self.sizes["down"])
        t.drop("dhidden")
        t.hold("dw.1", "gradients", a * gates * self.sizes["up"])
        t.hold("dy", "activations", a * self.n)
        t.drop("dpre", "low.up", "low.down", key + ".y")
        if replay:
            t.drop(key + ".pre")
        self._norm_backward(key, adds=True)
        if self.swiglu:  # taken apart, as the weights are
            t.touch(a * gates * self.sizes["up"])
        self._settle_together(*weights)
        self._gradient("norm")
        t.drop(key + ".pre", key + ".h")
        self._pass_on(adds=True)

    def _formula(self, replay: bool) -> None:
        """What the backward of an activation needs in plain PyTorch."""
        if not self.cpu:
            return
        f = self.f
        wide = (20 if self.amp else 12) * f if self.swiglu else (12 if self.amp else 4) * f
        if self.swiglu and not self.amp and not replay:
            wide += 4 * f  # two gradients, and then the packed one
        self.tape.touch(wide + self.a * f)  # beside what is recreated
