"""The training loop, top to bottom: restore, evaluate, step, log, save, finish."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mypt_fast import console
from mypt_fast.checkpoint.bundle import check_writable
from mypt_fast.config import TrainConfig
from mypt_fast.data.document_loader import Loader
from mypt_fast.errors import ConfigError
from mypt_fast.model import GPT
from mypt_fast.settings import Settings
from mypt_fast.training import device as devices
from mypt_fast.training import init_from
from mypt_fast.training.events import EventLog
from mypt_fast.training.feed import next_inputs, step_weight
from mypt_fast.training.gold import Decision
from mypt_fast.training.journal import Journal
from mypt_fast.training.optim import adamw
from mypt_fast.training.run import Run
from mypt_fast.training.schedule import learning_rate
from mypt_fast.training.selection import Found, Selection
from mypt_fast.training.signals import StopRequested, StopSignal
from mypt_fast.training.store import Store


class Trainer:
    """One run from its start or its last checkpoint to `max_iters`.

    Args:
        run: opened data, device and settings; the state of its run directory is restored.
        live: the progress line.

    Raises:
        CheckpointError, IntegrityError: if the run directory cannot be read or written.
    """

    def __init__(self, run: Run, live: console.Live) -> None:
        self.run, self.live = run, live
        self.settings, self.cfg, self.train_cfg = (
            run.settings,
            run.settings.model,
            run.settings.train,
        )
        self.device, self.precision = run.device, run.precision
        self.tokens_per_step = run.settings.global_batch * run.settings.model.block_size
        check_writable(self.settings.run_dir)
        self.log = EventLog(log_path(self.settings))
        self.store = Store(run, self.log)
        saved = self.store.read()
        seed = None if saved or self.settings.init_dir else self.train_cfg.seed
        self.model = GPT(self.cfg, seed, kernels=self.train_cfg.kernels)
        self.store.model = self.model
        if saved is not None:
            self.store.restore_weights(saved)
        elif self.settings.init_dir:
            init_from.fill(self.model, self.settings.init_dir, self.train_cfg.seed)
        self.model.to(self.device).train()
        freeze(self.model, self.train_cfg)
        self.optimizer = self.store.optimizer = adamw(self.model, self.train_cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaler)
        self.store.scaler = self.scaler
        torch.manual_seed(self.train_cfg.seed)  # dropout; weights and data have their own
        if saved is not None:
            self.store.restore(saved)
        if use_compile(self.train_cfg, self.device):
            self.model.hidden = torch.compile(self.model.hidden)  # type: ignore[method-assign]
        self.step = self.store.start_step
        self.rng_at_step: dict[str, Tensor] | None = None  # set while a step is under way

    def train(self) -> int:
        """Run to the end or to a signal; returns the exit code."""
        start, end, progress = self.step, self.train_cfg.max_iters, self.store.progress
        if start >= end and progress.last_eval_step >= start:
            console.say(
                f"{self.settings.model_name} is at step {start} of {end}: nothing to train; "
                "raise --max_iters to continue"
            )
            return 0
        self.journal = Journal(self.run, self.log, start, self.store.sources())
        self.journal.start()
        with StopSignal() as stop:
            self.stop = stop
            self.selection = Selection(self.run, self.store, stop.raise_if_set)
            try:
                while self.step < end:
                    self.stop.raise_if_set()
                    if self._evaluation_is_due():
                        self._evaluate()
                    self._train_step()
                    self.step += 1
                    interval = self.train_cfg.save_interval
                    if interval and self.step % interval == 0:
                        self.store.save(self.step)
                self._finish()
                return 0
            except StopRequested:
                self._stop_early()
            finally:
                self.live.close()
                self.log.close()
        return stop.exit_code

    # a step

    def _train_step(self) -> None:
        began = time.perf_counter()
        self.rng_at_step = devices.rng_state(self.device)
        lr = learning_rate(self.step, self.train_cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = float(self._accumulate(self.run.phase_at(self.step).train))
        self.scaler.unscale_(self.optimizer)
        clip = self.train_cfg.grad_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        if math.isfinite(norm) or self.precision.scaler:  # the scaler skips by itself
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.rng_at_step = None
        seconds = time.perf_counter() - began
        self._note_phase()
        self.journal.step(self.step, loss, lr, norm, seconds)
        if math.isfinite(loss):
            self.store.progress.losses_since_eval.append(loss)
        speed, peak = self.tokens_per_step / seconds, devices.peak_bytes(self.device)
        self.live.step(self.step + 1, loss, speed, peak)

    def _accumulate(self, loader: Loader) -> Tensor:
        """Add up the gradients of the global batch; returns its mean loss per valid token."""
        total = torch.zeros((), device=self.device)
        left = self.settings.global_batch
        # of the whole step, known before its first token: accumulation never changes the objective
        weight = step_weight(loader, self.tokens_per_step)
        while left:
            self.stop.raise_if_set()
            inputs = next_inputs(loader, min(self.run.micro_batch, left), self.device)
            left -= len(inputs["idx"])
            with self.precision.autocast():
                loss = self.model(**inputs) / weight
            self.scaler.scale(loss).backward()
            total += loss.detach()
            if left:
                self.live.within(self.step + 1, self.settings.global_batch - left, left)
        return total

    def _note_phase(self) -> None:
        now = self.run.phase_at(self.step)
        if self.step and now is not self.run.phase_at(self.step - 1):
            self.journal.phase(self.step, now.name)

    # evaluation and gold

    def _evaluation_is_due(self) -> bool:
        # a resumed run does not repeat the evaluation it was saved at
        due = self.step % self.train_cfg.eval_interval == 0
        return due and self.step != self.store.progress.last_eval_step

    def _evaluate(self) -> None:
        """Measure, report, decide about gold, save."""
        began = time.perf_counter()
        found = self.selection.measure(self.step)
        found.gate = self.selection.ask_gate(self.step, self.store.save)
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
        self.store.save(self.step)

    def _decide(self, found: Found, final: bool) -> Decision:
        decision, fields = self.selection.decide(self.step, found)
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
        found = self.selection.measure(self.step, final=True)
        assert found.train is not None
        found.gate = self.selection.ask_gate(self.step, self.store.save, final=True)
        self.live.clear()
        decision = self._decide(found, final=True)
        progress = self.store.progress
        progress.last_eval_step = self.step
        progress.losses_since_eval.clear()
        self.journal.complete(self.step, found.train.loss, found.val.loss, progress.gold)
        # the run last: what dies before it is repeated, and made again
        if decision.save:
            self.store.save_gold(self.step)
        fp16 = self.store.save_fp16(self.step)
        self.store.save(self.step)
        gold = None
        if progress.gold.gold_step is not None and progress.gold.best_gold_val_loss is not None:
            gold = (
                str(self.store.gold_dir),
                progress.gold.gold_step,
                progress.gold.best_gold_val_loss,
            )
        for line in console.finished_lines(str(self.settings.run_dir), str(fp16), gold):
            console.say(line)

    def _stop_early(self) -> None:
        """Undo the unfinished step and save: the resumed run repeats it exactly."""
        self.optimizer.zero_grad(set_to_none=True)
        for phase in self.run.phases:
            phase.train.rewind_step()
        if self.rng_at_step is not None:
            devices.set_rng_state(self.rng_at_step, self.device)
        self.live.clear()
        self.store.save(self.step)
        console.say(
            f"stopped at step {self.step} of {self.train_cfg.max_iters}; continue with "
            f"`mypt-fast train --model_name {self.settings.model_name}`"
        )


def log_path(settings: Settings) -> Path:
    """The JSONL log of a run: as set, else logs/train/<model_name>_eval.jsonl."""
    default = Path("logs") / "train" / f"{settings.model_name}_eval.jsonl"
    return Path(settings.train.log_file) if settings.train.log_file else default


def use_compile(cfg: TrainConfig, device: torch.device) -> bool:
    """`auto` compiles on a GPU; on a CPU a cold compile costs more than it gains."""
    asked = "--compile on" if cfg.compile == "on" else ""
    if cfg.kernels == "inductor":
        asked = "--kernels inductor"
        if cfg.compile == "off":
            raise ConfigError(
                "--kernels inductor is torch.compile's own code",
                "found --compile off",
                "drop one of the two",
            )
    if asked and device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ConfigError(
                f"{asked} needs a C++ compiler on a CPU",
                f"found no {compiler}",
                "install one, or drop the flag",
            )
    c_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))  # Triton's launchers need it
    if asked and device.type == "cuda" and not c_compiler:
        raise ConfigError(
            f"{asked} needs a C compiler", "found no cc, gcc or clang", "install one, or drop it"
        )
    return bool(asked) or (cfg.compile == "auto" and device.type == "cuda" and c_compiler)


def freeze(model: GPT, cfg: TrainConfig) -> None:
    """Exclude embeddings and the lowest blocks from training, if asked; raises ConfigError."""
    if cfg.freeze_layers > len(model.blocks):
        raise ConfigError(
            "freeze_layers is larger than n_layer",
            f"found {cfg.freeze_layers} > {len(model.blocks)}",
        )
    frozen: list[nn.Module] = list(model.blocks[: cfg.freeze_layers])
    if cfg.freeze_embeddings:
        frozen.append(model.token_embedding_table)
        if model.config.pos_encoding == "learned":
            frozen.append(model.position_embedding_table)
    for module in frozen:
        module.requires_grad_(False)
