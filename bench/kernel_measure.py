"""The samples of one case: who is timed, what is left out and why, the rows of the results."""

import math
import re
import time
from typing import Any

import torch
from kernel_cases import Case
from torch import Tensor

from mypt_fast.benchmark.timing import Clock, device_error, median, peak_extra_bytes, quantile
from mypt_fast.kernels.chunked_head import ALIGNMENT, chunk_rows

ROUNDS = {"cuda": 50, "cpu": 9}
SLOW_S = 10.0  # on a CPU, a provider that took this long is sampled no more
WRONG = 0.1  # relative error from which a provider is not timed
NO_TIME = "not run: the time was over"


class DeviceLostError(Exception):
    """Nothing more can run on the device in this process."""


class Measurement:
    """Samples of one case."""

    def __init__(self, case: Case, clock: Clock, deadline: float = math.inf) -> None:
        self.case, self.clock, self.deadline = case, clock, deadline
        self.leaves = [t.detach().requires_grad_() for t in case.inputs]
        changing = set(case.providers) & case.writes_over
        touched = (*self.leaves, *case.upstream) if changing else ()
        self.kept = [t.detach().clone() for t in touched]
        self.failed: dict[str, str] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.host: dict[str, list[float]] = {}
        self.about: dict[str, dict[str, Any]] = {}
        clock.longest_launch = 0.0

    def forward(self, name: str) -> list[Tensor]:
        """Outputs of a provider."""
        outputs = self.case.providers[name](*self.leaves)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def backward(self, outputs: list[Tensor]) -> list[Tensor | None]:
        """Gradients of all inputs."""
        return list(
            torch.autograd.grad(outputs, self.leaves, self.case.upstream, allow_unused=True)
        )

    def both(self, name: str) -> list[Tensor | None]:
        """Outputs, then gradients."""
        outputs = self.forward(name)
        grads = self.backward(outputs)
        return [*(t.detach() for t in outputs), *grads]

    def restore(self, name: str) -> None:
        """Undo what a provider wrote into its inputs."""
        if name in self.case.writes_over:
            with torch.no_grad():
                for t, kept in zip((*self.leaves, *self.case.upstream), self.kept, strict=True):
                    t.copy_(kept)

    def warm_up(self) -> None:
        """Run everything twice; leave out what fails, is wrong or comes late; measure memory.

        Raises:
            DeviceLostError: after a failure that took the device with it; `failed` ends with whose.
        """
        truth = self._truth() if time.monotonic() <= self.deadline else None
        for name in list(self.case.providers):
            if time.monotonic() > self.deadline:
                self._leave_out(name, NO_TIME)
                continue
            why = None
            try:
                self._try(name, truth)
            except Exception as e:  # a peer's failure is a result, not the end of the run
                why = f"{type(e).__name__}: {e}"[:300]
            if why is not None:  # outside the handler: the tensors of what failed are free now
                self._leave_out(name, why)
        self._keep_best_native()

    def _try(self, name: str, truth: list[Tensor] | None) -> None:
        number, buffer = self.case.grad_into.get(name, (None, None))
        if buffer is not None:
            buffer.zero_()
        began = time.perf_counter()
        found = self.both(name)
        if buffer is not None:
            found[len(self.case.upstream) + number] = buffer
        self.about[name] = {"error": _error(found, truth), "first_s": time.perf_counter() - began}
        del found
        error = self.about[name]["error"]
        if error is not None and not error < WRONG:
            raise ArithmeticError(f"relative error {error}")
        self.restore(name)
        if self.clock.device == "cuda":
            extra, made = peak_extra_bytes(lambda: self.both(name))
            grads = made[len(self.case.upstream) :]
            self.about[name]["peak_extra_bytes"] = extra
            self.about[name]["gradient_bytes"] = sum(g.nbytes for g in grads if g is not None)
            del made, grads
            self.restore(name)
            self.clock.learn_launch(lambda: self.both(name))
            self.restore(name)
        self.samples[name] = {"forward": [], "backward": [], "both": []}
        self.host[name] = []

    def _truth(self) -> list[Tensor] | None:
        """Plain PyTorch in fp32, or None where that does not fit."""
        if "eager" not in self.case.providers:
            return None
        wide = [t.detach().float().requires_grad_() for t in self.case.inputs]
        upstream = [t.float() for t in self.case.upstream]
        try:
            outputs = self.case.providers["eager"](*wide)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, wide, upstream)]
        except torch.OutOfMemoryError:
            return None

    def _leave_out(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.case.providers.pop(name)
        self.samples.pop(name, None)
        lost = device_error(self.clock.device)
        if lost is not None:
            raise DeviceLostError(lost)
        self.restore(name)

    def _keep_best_native(self) -> None:
        """Of PyTorch's head at several fixed numbers of rows only the fastest goes on."""
        tried = [name for name in self.samples if re.fullmatch(r"native \d+ rows", name)]
        if len(tried) < 2:
            return
        times = {name: self.clock.sample(lambda n=name: self.both(n))[0] for name in tried}
        best = min(times, key=lambda name: times[name])
        listed = ", ".join(f"{name.split()[1]}: {times[name]:.2f} s" for name in tried)
        self.case.notes[best] = f"fastest of one trial each ({listed})"
        for name in set(tried) - {best}:
            self.case.providers.pop(name)
            self.samples.pop(name)

    def sample(self, name: str) -> None:
        """One more sample of each mode."""
        found = self.samples[name]
        seconds, outputs = self.clock.sample(lambda: self.forward(name))
        found["forward"].append(seconds)
        again = self.clock.sample(lambda made=outputs: self.backward(made))[0]
        found["backward"].append(again)
        del outputs
        self.restore(name)
        if self.clock.device == "cpu":
            found["both"].append(seconds + again)
            return
        found["both"].append(self.clock.sample(lambda: self.both(name))[0])
        self.host[name].append(self.clock.host_s)
        self.restore(name)

    def wants_more(self, name: str) -> bool:
        """Whether a provider has had fewer rounds than it gets."""
        both = self.samples[name]["both"]
        slow = self.clock.device == "cpu" and sum(both) > SLOW_S
        return len(both) < ROUNDS[self.clock.device] and not slow

    def run(self) -> None:
        """All rounds, or as many as the deadline allows."""
        for _ in range(ROUNDS[self.clock.device]):
            for name in self.samples:
                if time.monotonic() > self.deadline:
                    return
                if self.wants_more(name):
                    self.sample(name)

    def rows(self, copy: float | None = None, matmul: float | None = None) -> list[dict[str, Any]]:
        """What was measured: a row per provider and mode."""
        return [
            self._row(name, mode, copy, matmul)
            for name, modes in self.samples.items()
            for mode, values in modes.items()
            if values
        ]

    def _row(self, name: str, mode: str, copy: float | None, matmul: float | None) -> dict:
        case, values = self.case, self.samples[name][mode]
        middle = median(values)
        made: dict[str, Any] = {
            "op": case.op,
            "shape": case.shape.name,
            "tokens": case.shape.tokens,
            "dtype": str(case.dtype).split(".")[1],
            "provider": name,
            "mode": mode,
            "median_ms": digits(1e3 * middle),
            "p20_ms": digits(1e3 * quantile(values, 0.2)),
            "p80_ms": digits(1e3 * quantile(values, 0.8)),
            "count": len(values),
        }
        moved = case.bytes_moved.get(mode)
        if moved:
            made["gb_per_s"] = digits(moved / middle / 1e9)
            if copy:
                made["of_copy"] = digits(moved / middle / copy)
        if mode in case.flops:
            made["tflops"] = digits(case.flops[mode] / middle / 1e12)
            if matmul:
                made["of_matmul"] = digits(case.flops[mode] / middle / matmul)
        if mode == "both":
            made |= {k: v for k, v in self.about[name].items() if v is not None}
            made |= {"host_ms": digits(1e3 * median(self.host[name]))} if self.host[name] else {}
            logits = logits_bytes(case, name)
            made |= {"logits_bytes": logits} if logits else {}
        if name in case.notes:
            made["note"] = case.notes[name]
        made["samples_ms"] = [digits(1e3 * v) for v in values]
        return made


def digits(value: float) -> float:
    """Four significant ones."""
    return float(f"{value:.4g}")


def _error(found: list[Tensor | None], truth: list[Tensor] | None) -> float | None:
    """The largest relative error of outputs and gradients; None where nobody knows the truth."""
    if truth is None:
        return None
    pairs = [(a, t) for a, t in zip(found, truth, strict=True) if a is not None]
    errors = [((a.float() - t).norm() / (t.norm() + 1e-30)).item() for a, t in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def logits_bytes(case: Case, provider: str) -> int | None:
    """Size of the buffer of logits a head makes, computed; None where we do not know."""
    if case.op != "linear_cross_entropy":
        return None
    N, V = case.shape.tokens, case.shape.vocab
    if provider.startswith("ours"):
        cpu = case.inputs[0].device.type == "cpu"
        rows = chunk_rows(N, V, case.dtype, cpu, None)
        return rows * -(-V // ALIGNMENT) * ALIGNMENT * case.dtype.itemsize
    fixed = re.fullmatch(r"native (\d+) rows", provider)
    if fixed:
        return int(fixed[1]) * V * case.dtype.itemsize
    return N * V * case.dtype.itemsize if provider in ("eager", "compile") else None
