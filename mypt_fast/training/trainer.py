"""The training loop, top to bottom: restore, evaluate, step, log, save, finish."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mypt_fast import console
from mypt_fast.errors import DeviceError, DivergedError
from mypt_fast.training import device as devices
from mypt_fast.training.board import Board
from mypt_fast.training.borrowed import Source
from mypt_fast.training.compiling import choose
from mypt_fast.training.feed import micro_batches
from mypt_fast.training.gold import Decision
from mypt_fast.training.guard import (
    Verdict,
    after_roll_back,
    fault,
    first_line,
    is_out_of_memory,
    judge,
)
from mypt_fast.training.journal import Journal
from mypt_fast.training.optim import clip
from mypt_fast.training.parts import Parts, make
from mypt_fast.training.run import Run
from mypt_fast.training.schedule import learning_rate
from mypt_fast.training.selection import Found
from mypt_fast.training.signals import StopRequested, StopSignal


@dataclass(frozen=True)
class Mark:
    """Where a step began, to undo it: nothing else moves before the optimizer does."""

    loader: Source
    position: int
    rng: dict[str, Tensor]
    scaler: dict[str, Any] | None = None  # before the scale was lowered, if it was


class Trainer:
    """One run from its start or its last checkpoint to `max_iters`.

    Args:
        run: opened data, device and settings; the state of its run directory is restored.
        live: the progress line.
        parts: a caller's model and optimizer, moved in place; made or restored where None.

    Attributes:
        final: what the evaluation at the end found.

    Raises:
        CheckpointError, IntegrityError: if the run directory cannot be read or written.
    """

    def __init__(self, run: Run, live: console.Live, parts: Parts | None = None) -> None:
        self.run, self.live = run, live
        self.settings, self.cfg, self.train_cfg = (
            run.settings,
            run.settings.model,
            run.settings.train,
        )
        self.device, self.precision = run.device, run.precision
        self.tokens_per_step = run.settings.global_batch * run.settings.model.block_size
        parts = parts or make(run)
        self.log, self.store, self.scaler = parts.log, parts.store, parts.scaler
        self.model, self.optimizer = parts.model, parts.optimizer
        self._selection = parts.selection
        if choose(run, self.store.start_step).compiled:
            self.model.compile_blocks()
        self.step, self.taken = self.store.start_step, 0
        self.mark: Mark | None = None  # set while a step is under way
        self.saved_step: int | None = None  # while the run directory holds what is here
        self.final: Found | None = None
        self.board = None
        if self.train_cfg.tensorboard:
            self.board = Board(self.train_cfg.tensorboard, self.log, self.step)

    def train(self, stop: StopSignal | None = None) -> int:
        """Run to the end or to a signal; returns the exit code.

        Args:
            stop: entered already, if signals are to be heard before the training.
        """
        if stop is None:
            with StopSignal() as stop:
                return self.train(stop)
        self._begin(stop)
        start, end, progress = self.step, self.train_cfg.max_iters, self.store.progress
        if start >= end and progress.last_eval_step >= start:
            console.say(
                f"{self.settings.model_name} is at step {start} of {end}: nothing to train; "
                "raise --max_iters to continue"
            )
            return 0
        try:
            self.journal.start()
            while self.step < end:
                self.stop.raise_if_set()
                self.store.report()
                if self.stop.save_requested() and self._saved() == "saved":
                    console.say(f"saved at step {self.step}, as SIGUSR2 asked")
                if self._evaluation_is_due():
                    self._evaluate()
                if not self._train_step():
                    continue
                self.step += 1
                interval = self.train_cfg.save_interval
                if interval and self.step % interval == 0:
                    self._save()
            self._finish()
            return 0
        except StopRequested:
            self._stop_early()
        finally:
            self.live.close()
            self.store.close()
            self.log.close()
            if self.board is not None:
                self.board.close()
        return stop.exit_code

    def evaluate(self) -> Found:
        """Measure as at the end of a run; nothing is trained, logged or saved."""
        self._begin(StopSignal())
        return self._measured(final=True)

    def _begin(self, stop: StopSignal) -> None:
        self.stop = stop
        self.journal = Journal(self.run, self.log, self.step, self.store.sources())
        self.selection = self._selection(self.run, self.store, stop.raise_if_set)

    # a step

    def _train_step(self) -> bool:
        """Train on the next global batch; False where the weights did not move."""
        began = time.perf_counter()
        loader = self.run.phase_at(self.step).train
        self.mark = mark = Mark(loader, loader.position, devices.rng_state(self.device))
        loss, norm = self._gradients(loader)
        state = self.store.progress.guard
        if self._phase_is_new():
            state.losses.clear()  # those of other data say nothing
        verdict = judge(
            state, loss, [fault(loss, norm)],
            limit=self.train_cfg.nonfinite_limit, spike_action=self.train_cfg.spike_action,
        )  # fmt: skip
        samples = (mark.position, mark.position + self.settings.global_batch)
        if verdict.spike is not None:
            self.journal.spike(self.step, loss, norm, verdict.spike, samples)
        if verdict.action != "take":
            self._leave_out(verdict, loss, norm, samples)
            return False
        lr = learning_rate(self.step, self.train_cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.mark = self.saved_step = None  # from here on the step is not undone
        self.store.before_move()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        self._note_phase()
        self.journal.step(self.step, loss, lr, norm, seconds)
        self.store.progress.losses_since_eval.append(loss)
        speed, peak = self.tokens_per_step / seconds, devices.peak_bytes(self.device)
        self.live.step(self.step + 1, loss, speed, peak, self.run.ceilings.mfu(speed))
        self.taken += 1
        planned = self.run.plan.predicted
        if self.taken == 2 and planned is not None:  # the moments exist, and nothing is new
            self.live.clear()
            self.journal.plan_checked(self.step, planned.live, peak)
        return True

    def _gradients(self, loader: Source) -> tuple[float, float]:
        """Loss and gradient norm of the step, the gradients clipped.

        Where memory does not suffice or fp16 gradients overflow, the step is made again, from its
        first sample and random number, with smaller micro-batches or a smaller loss scale.
        """
        while True:
            try:
                total = self._accumulate(loader)
                self.scaler.unscale_(self.optimizer)
                norm = clip(self.optimizer, self.model, self.train_cfg.grad_clip or math.inf)
                # the one time that the host waits for the device in a step
                loss, norm = torch.stack((total, norm.to(total))).tolist()
            except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
                self.stop.raise_if_set()  # what interrupted a compiler may come out as its error
                if not is_out_of_memory(e):
                    raise
                found = first_line(e)
            else:
                overflows = math.isfinite(loss) and not math.isfinite(norm)
                if not overflows or self.scaler.get_scale() <= 1:  # 1 also without a scaler
                    return loss, norm
                found = ""
            # here, not in `except`: there the error still holds the memory of what failed
            scale = self.scaler.get_scale()
            self._undo()
            self.saved_step = None
            if found:
                self._shrink(found)
            else:
                before = self.scaler.state_dict()
                assert self.mark is not None
                self.mark = replace(self.mark, scaler=before)
                self._set_scale({**before, "scale": scale / 2, "_growth_tracker": 0})
                self.journal.loss_scale(self.step, scale / 2)

    def _shrink(self, found: str) -> None:
        """Halve the micro-batch; the resumed run keeps it, typed or not."""
        was = self.run.plan.micro_batch
        if was == 1:
            raise DeviceError(
                f"out of memory at step {self.step} with one sequence per forward",
                found,
                f"{self._leaner()}free memory, or train a smaller model; "
                f"the run is {self._saved()}",
            )
        self.run.plan.micro_batch = rows = was // 2
        self.run.plan.predicted = None  # it was for the other split
        if self.train_cfg.micro_batch_size:
            self.train_cfg.micro_batch_size = rows
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        assert self.mark is not None
        first = self.mark.position
        samples = (first, first + self.settings.global_batch)
        self.live.clear()
        self.journal.out_of_memory(self.step, "train", was, rows, found, samples)

    def _leaner(self) -> str:
        """What to type for less memory, if there is something."""
        again = self.run.plan.recompute in ("block", "offload")
        return "" if again else "pass --recompute block, "

    def _undo(self) -> None:
        """Go back to where the step began; weights, moments and step counts never left it."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.mark is None:
            return
        self.mark.loader.rewind_step()
        self.mark.loader.position = self.mark.position
        devices.set_rng_state(self.mark.rng, self.device)
        self._set_scale(self.mark.scaler or self.scaler.state_dict())

    def _set_scale(self, state: dict[str, Any]) -> None:
        """Give the scaler a state, and let it forget the gradients that it unscaled."""
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)
            if self.scaler._scale is not None:  # nothing was scaled yet
                self.scaler.update(state["scale"])

    def _leave_out(
        self, verdict: Verdict, loss: float, norm: float, samples: tuple[int, int]
    ) -> None:
        """Do not take the step, and go on with the data after it."""
        self._undo()
        loader = self.run.phase_at(self.step).train
        loader.position = samples[1]
        self.mark = self.saved_step = None
        self.live.clear()
        self.journal.skipped(self.step, verdict.reason, loss, norm, samples)
        self.store.progress.guard.leave_out(self.step, samples, verdict.reason)
        if verdict.action == "rollback":
            self._roll_back(loader, verdict.reason)
        elif verdict.action == "stop":
            raise DivergedError(
                f"step {self.step}: {verdict.reason}",
                f"samples {samples[0]} to {samples[1] - 1} of the training data",
                f"the run is {self._saved()} before it and continues after them; "
                "see --nonfinite_limit",
            )

    def _roll_back(self, loader: Source, reason: str) -> None:
        """Go back to the last checkpoint, and past the data that led here."""
        failed, end, before = self.step, loader.position, self.store.progress.guard
        self.step = self.store.roll_back()
        samples = (loader.position, end)
        loader.position = end
        self.store.progress.guard = after_roll_back(
            before, self.store.progress.guard, self.step, samples, reason
        )
        self.journal.rollback(failed, self.step, reason, samples)
        self._save()  # a resume must not meet that data again

    def _accumulate(self, loader: Source) -> Tensor:
        """Add up the gradients of the global batch; returns its mean loss per valid token."""
        total = torch.zeros((), device=self.device)
        batches = micro_batches(
            loader, self.run.plan.micro_batch, self.settings.global_batch, self.tokens_per_step,
            self.device,
        )  # fmt: skip
        while True:
            with self.stop.interruptible():
                batch = next(batches, None)
                if batch is None:
                    return total
                with self.precision.autocast():
                    loss = self.model.summed_loss(**batch.inputs) / batch.weight
                self.scaler.scale(loss).backward()
            total += loss.detach()
            if batch.left:
                self.live.within(self.step + 1, self.settings.global_batch - batch.left, batch.left)

    def _note_phase(self) -> None:
        if self._phase_is_new():
            self.journal.phase(self.step, self.run.phase_at(self.step).name)

    def _phase_is_new(self) -> bool:
        now = self.run.phase_at(self.step)
        return self.step > 0 and now is not self.run.phase_at(self.step - 1)

    # evaluation and gold

    def _evaluation_is_due(self) -> bool:
        # a resumed run does not repeat the evaluation it was saved at
        due = self.step % self.train_cfg.eval_interval == 0
        return due and self.step != self.store.progress.last_eval_step

    def _measured(self, final: bool = False) -> Found:
        """Evaluate; where memory does not suffice, again with fewer rows a forward."""
        while True:
            rows = self.selection.rows
            try:
                with self.stop.interruptible():
                    return self.selection.measure(self.step, final)
            except (MemoryError, RuntimeError) as e:
                self.stop.raise_if_set()
                if not is_out_of_memory(e) or rows == 1:
                    raise
                found = first_line(e)
            self.saved_step, self.store.progress.guard.eval_rows = None, rows // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.live.clear()
            self.journal.out_of_memory(self.step, "eval", rows, rows // 2, found, None)

    def _evaluate(self) -> None:
        """Measure, report, decide about gold, save."""
        began = time.perf_counter()
        found = self._measured()
        found.gate = self.selection.ask_gate(self.step, lambda step: self._save())
        progress, lr = self.store.progress, learning_rate(self.step, self.train_cfg)
        self.live.clear()
        self.journal.evaluation(
            self.step, found.phase.name, lr, found.val.loss, found.others,
            progress.recent_train_loss(), time.perf_counter() - began, found.masks, found.extra,
        )  # fmt: skip
        decision = self._decide(found, final=False)
        progress.last_eval_step = self.step
        progress.losses_since_eval.clear()
        if decision.save:  # before the run: what dies in between is repeated, gold included
            self.store.save_gold(self.step)
        self._save()

    def _save(self) -> None:
        self.store.save(self.step)
        self.saved_step = self.step

    def _saved(self) -> str:
        """Save and wait; returns what a message says of it."""
        self._save()
        if not self.store.keeps:
            return "not kept"
        return "saved" if self.store.saved() else "NOT saved: the disk refused"

    def _decide(self, found: Found, final: bool) -> Decision:
        if not self.store.keeps:
            return Decision(save=False)
        decision, fields = self.selection.decide(self.step, found, final)
        if found.gate:
            console.say(found.gate.line)
        if found.gate and final:
            self.journal.gate(self.step, found.gate.fields())
        gold = self.store.progress.gold
        self.journal.gold(self.step, found.val.loss, decision, gold, final, fields)
        return decision

    # the end

    def _finish(self) -> None:
        """Evaluate once more, promote gold under the same guards, save, write the fp16 copy."""
        found = self.final = self._measured(final=True)
        assert found.train is not None
        found.gate = self.selection.ask_gate(self.step, lambda step: self._save(), final=True)
        self.live.clear()
        decision = self._decide(found, final=True)
        progress = self.store.progress
        progress.last_eval_step = self.step
        progress.losses_since_eval.clear()
        self.journal.complete(self.step, found.train.loss, found.val.loss, progress.gold)
        # the run last: what dies before it is repeated, and made again
        if decision.save:
            self.store.save_gold(self.step)
        copy = self.store.save_final(self.step)
        self._save()
        gold = None
        if progress.gold.gold_step is not None and progress.gold.best_gold_val_loss is not None:
            gold = (
                str(self.store.gold_dir),
                progress.gold.gold_step,
                progress.gold.best_gold_val_loss,
            )
        self.store.raise_if_unsaved()
        if self.store.keeps:
            run_dir = str(self.settings.run_dir)
            for line in console.finished_lines(run_dir, str(copy) if copy else None, gold):
                console.say(line)

    def _stop_early(self) -> None:
        """Undo the unfinished step and save: the resumed run repeats it exactly."""
        self._undo()
        self.live.clear()
        self.store.wait()
        if self.saved_step != self.step or self.settings.run_dir in self.store.unsaved:
            self._save()
        self.store.raise_if_unsaved()
        console.say(
            f"stopped at step {self.step} of {self.train_cfg.max_iters}; {self.run.how_to_continue}"
        )
