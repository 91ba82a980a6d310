"""Evaluations on a caller's loaders: MyPT's windows, without MyPT's side effects."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mypt_fast.attention import Segments
from mypt_fast.training.borrowed import Borrowed, Source, seed_all, valid_targets
from mypt_fast.training.evaluate import Measured, evaluating, token_losses
from mypt_fast.training.run import Phase, Run
from mypt_fast.training.selection import Found, Selection
from mypt_fast.training.store import Store


class BorrowedSelection(Selection):
    """Measures `eval_iters` batches of a split, the mean of their losses, as `estimate_loss` does.

    Each measurement starts from `seed`, where there is one, and leaves generators and loaders as
    it found them, so that a loader with a position of its own shows every evaluation the same
    batches. Under strict_compat it does what MyPT does instead: it reseeds for good, moves on in
    the loaders, and draws batches for masked accuracies whether there are masks or not.

    Args:
        run: the opened run.
        store: its model, progress and gold state.
        between: called between batches, tokens and looks at the gate; may raise to stop.
        seed: `eval_seed` of fit; None: from where the global generators are.
    """

    def __init__(
        self, run: Run, store: Store, between: Callable[[], None], seed: int | None = None
    ) -> None:
        super().__init__(run, store, between)
        self.seed = seed

    def _losses(self, phase: Phase, accuracy: bool, final: bool) -> Found:
        if self.settings.strict_compat:
            return self._as_mypt_does(phase, accuracy, final)
        train = None
        if final:  # before the other, as MyPT draws them
            train = self._pass(phase.train, "train")
        val = self._pass(phase.val, "val", accuracy)
        others = {name: self._pass(s, "val").loss for name, s in self.run.eval_sets.items()}
        if accuracy:
            train = self._pass(phase.train, "train", accuracy)
        return Found(phase, val, others, train)

    def _as_mypt_does(self, phase: Phase, accuracy: bool, final: bool) -> Found:
        if final:
            train = self._pass(phase.train, "train")
            return Found(phase, self._pass(phase.val, "val"), {}, train)
        self._reseed()
        val = self._pass(phase.val, "val")
        found = [self._draws(phase.train, split) for split in ("train", "val")]
        val.accuracy, val.count = found[1].accuracy, found[1].count
        others = {}
        for name, source in self.run.eval_sets.items():
            self._reseed()
            others[name] = self._pass(source, "val").loss
        return Found(phase, val, others, found[0] if accuracy else None)

    def _wide(self, final: bool) -> bool:
        return self.settings.strict_compat and not final  # MyPT reports none at the end

    def _reseed(self) -> None:
        if self.seed is not None:
            seed_all(self.seed)

    @property
    def rows(self) -> int:
        """Sequences a forward: whole batches, until memory did not suffice."""
        rows = self.settings.model.batch_size
        return min(rows, self.store.progress.guard.eval_rows or rows)

    def _pass(self, source: Source, split: str, accuracy: bool = False) -> Measured:
        assert isinstance(source, Borrowed)
        strict = self.settings.strict_compat
        keep: AbstractContextManager[None] = nullcontext() if strict else source.untouched()
        with keep, self.run.precision.autocast(), evaluating(self.store.model), torch.no_grad():
            if not strict:
                self._reseed()
            return self._measure_batches(source, split, accuracy)

    def _draws(self, source: Source, split: str) -> Measured:
        """MyPT's pass for an accuracy alone: where there are no masks, batches for nothing."""
        assert isinstance(source, Borrowed)
        hits = count = 0
        with self.run.precision.autocast(), evaluating(self.store.model), torch.no_grad():
            for _ in range(self.train_cfg.eval_iters):
                self.between()
                inputs = source.draw(split)
                if "loss_mask" in inputs:
                    _, hit, valid = self._tokens(inputs)
                    hits, count = hits + hit, count + valid
        return Measured(0.0, accuracy=hits / count if count else None, count=count)

    def _measure_batches(self, source: Borrowed, split: str, accuracy: bool) -> Measured:
        iters = self.train_cfg.eval_iters
        total = torch.zeros((), dtype=torch.float64)
        hits = count = 0
        for _ in range(iters):
            self.between()
            inputs = source.draw(split)
            loss = torch.zeros((), device=inputs["idx"].device)
            for first in range(0, len(inputs["idx"]), self.rows):
                part = {k: v[first : first + self.rows] for k, v in inputs.items()}
                if not (accuracy and "loss_mask" in part):
                    loss += self.store.model.summed_loss(**part)
                    continue
                losses, hit, valid = self._tokens(part)
                loss += losses.sum()
                hits, count = hits + hit, count + valid
            total += (loss / valid_targets(inputs).clamp(min=1.0)).double().cpu()
        return Measured(float(total / iters), accuracy=hits / count if count else None, count=count)

    def _tokens(self, inputs: dict[str, Tensor]) -> tuple[Tensor, int, int]:
        ids = inputs.get("segment_ids")
        model: Any = self.store.model
        read = getattr(model, "documents", Segments.from_ids)  # a subclass may know more of them
        documents = None if ids is None else read(ids)
        given = {"idx": inputs["idx"], "targets": inputs["targets"], "documents": documents}
        return token_losses(model, given, inputs["loss_mask"], accuracy=True)
