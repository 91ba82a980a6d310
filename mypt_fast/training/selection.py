"""An evaluation from its windows to the gold decision; training never notices it."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mypt_fast.config import GoldSelection, Saturation
from mypt_fast.training import saturation
from mypt_fast.training.borrowed import Borrowed, Source
from mypt_fast.training.eval_prompts import Samples, write_samples
from mypt_fast.training.evaluate import Measured, measure
from mypt_fast.training.gate import GateResult, is_due, run_gate
from mypt_fast.training.gold import Decision, Evaluation, GoldState, decide, paired_interval
from mypt_fast.training.run import Phase, Run
from mypt_fast.training.store import Store


@dataclass
class Found:
    """What one evaluation found."""

    phase: Phase
    val: Measured
    others: dict[str, float]
    train: Measured | None = None
    samples: Samples | None = None
    masks: dict[str, Any] = field(default_factory=dict)
    gate: GateResult | None = None

    @property
    def extra(self) -> dict[str, Any]:
        """Fields of the eval event that only some runs have."""
        fields = self.samples.fields() if self.samples else {}
        return fields | ({"gold_gate": self.gate.fields()} if self.gate else {})


class Selection:
    """Evaluates a run and selects its gold.

    Args:
        run: the opened run.
        store: its model, progress and gold state.
        between: called between batches, tokens and looks at the gate; may raise to stop.
    """

    def __init__(self, run: Run, store: Store, between: Callable[[], None]) -> None:
        self.run, self.store, self.between = run, store, between
        self.settings, self.train_cfg = run.settings, run.settings.train
        self.rules = self.train_cfg.gold_selection or GoldSelection()
        self.saturation = self.train_cfg.token_accuracy_saturation or Saturation()

    def measure(self, step: int, final: bool = False) -> Found:
        """Measure what an evaluation at `step` is about: losses, accuracies, samples."""
        # at a switch the evaluation still belongs to the phase that was trained on
        phase = self.run.phase_at(max(step - 1, 0))
        tc = self.train_cfg
        accuracy = not final and saturation.is_on(
            tc.token_accuracy_saturation, self.settings.model.use_loss_mask
        )
        found = self._losses(phase, accuracy, final)
        if self.run.prompts and not final:
            # fp32 weights write in fp32; bf16 ones meet fp32 activations only under autocast
            exact = tc.state == "exact"
            with contextlib.nullcontext() if exact else self.run.precision.autocast():
                found.samples = write_samples(
                    self.store.model, self.run.tokenizer, self.run.prompts, tc.eval_max_new_tokens,
                    self.between,
                )  # fmt: skip
        if accuracy:
            found.masks = self._saturation(step, found)
        return found

    def _losses(self, phase: Phase, accuracy: bool, final: bool) -> Found:
        val = self._measure(phase.val, per_window=self.train_cfg.gold_ci, accuracy=accuracy)
        others = {name: self._measure(loader).loss for name, loader in self.run.eval_sets.items()}
        found = Found(phase, val, others)
        if accuracy or final:
            found.train = self._measure(phase.train, accuracy=accuracy)
        return found

    @property
    def rows(self) -> int:
        """Sequences a forward: without gradients twice a micro-batch fits, until it did not."""
        rows = min(2 * self.run.plan.micro_batch, self.settings.model.batch_size)
        return min(rows, self.store.progress.guard.eval_rows or rows)

    def _measure(self, loader: Source, **wanted: bool) -> Measured:
        assert not isinstance(loader, Borrowed)
        windows, rows = self.train_cfg.eval_iters * self.settings.model.batch_size, self.rows
        with self.run.precision.autocast():
            return measure(
                self.store.model, loader, windows, rows, self.run.device, self.between, **wanted
            )

    def _saturation(self, step: int, found: Found) -> dict[str, Any]:
        state = saturation.SaturationState(**self.store.progress.saturation)
        train, val = found.train or Measured(0.0), found.val
        saturation.check(state, step, train.accuracy, val.accuracy, self.saturation)
        self.store.progress.saturation = state.to_dict()
        return saturation.log_fields(
            state, (train.accuracy, train.count), (val.accuracy, val.count)
        )

    def ask_gate(
        self, step: int, save: Callable[[int], None], final: bool = False
    ) -> GateResult | None:
        """Save the run and let the external gate judge what was saved; None where it is not asked.

        What dies in between is repeated, the evaluation included: the saved progress is that
        from before it.
        """
        ext, gold = self.rules.external_gate, self.store.progress.gold
        if not self.settings.allow_gate or not is_due(ext, gold.evaluations, final):
            return None
        save(step)
        if not self.store.saved():
            return GateResult(False, error="the checkpoint could not be saved")
        return run_gate(ext, self.settings.run_dir, self.settings.model_name, step, self.between)

    def decide(
        self, step: int, found: Found, final: bool = False
    ) -> tuple[Decision, dict[str, Any]]:
        """Decide about gold.

        Returns:
            The decision, and the fields of its event beside those of the losses.
        """
        gold, recent = self.store.progress.gold, self.store.progress.recent_train_loss()
        # the final evaluation measures the training loss anyhow, without dropout
        train = recent if found.train is None or found.masks else found.train.loss
        interval = self._interval(gold, found) if self.train_cfg.gold_ci else None
        if found.gate:
            gold.last_gate = found.gate.fields()
        decision = decide(
            gold, Evaluation(step, found.val.loss, train, found.others), self.rules,
            found.gate.verdict if found.gate else None, wide=self._wide(final),
        )  # fmt: skip
        if decision.save and self.train_cfg.gold_ci:
            gold.windows = {"key": self._windows_key(found), "losses": _packed(found.val.windows)}
        fields: dict[str, Any] = {
            "gate_pass": found.gate.gate_pass if found.gate else None,
            "gate_metric": found.gate.metric_value if found.gate else None,
        }
        return decision, fields | ({"val_loss_change": interval} if interval else {})

    def _wide(self, final: bool) -> bool:
        """Whether a block is reported that hit no new minimum."""
        return self.settings.strict_compat

    def _interval(self, gold: GoldState, found: Found) -> dict[str, Any] | None:
        """How much the validation loss changed since gold: the 95 % interval over its windows."""
        if gold.windows.get("key") != self._windows_key(found):
            return None
        interval = paired_interval(found.val.windows, _unpacked(gold.windows.get("losses", "")))
        if interval is None:
            return None
        return {
            "windows": interval.windows,
            "mean": round(interval.mean, 6),
            "ci95": [round(interval.low, 6), round(interval.high, 6)],
        }

    def _windows_key(self, found: Found) -> str:
        """Equal where two evaluations read the same windows."""
        cfg, seed = self.settings.model, self.train_cfg.eval_seed
        data, documents = found.phase.val.fingerprint, self.train_cfg.documents
        return f"{data}/{documents}/{cfg.block_size}/{seed}/{len(found.val.windows)}"


def _packed(losses: list[float]) -> str:
    """Losses in 4 bytes each: thousands of them go into every manifest."""
    return base64.b64encode(np.asarray(losses, "<f4").tobytes()).decode()


def _unpacked(text: str) -> list[float]:
    try:
        found: list[float] = np.frombuffer(base64.b64decode(text), "<f4").tolist()
    except (ValueError, TypeError):  # a manifest edited by hand
        return []
    return found
