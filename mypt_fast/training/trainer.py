"""The training loop, top to bottom: restore, evaluate, step, log, save, finish."""

from __future__ import annotations

import base64
import datetime
import math
import time
from pathlib import Path
from typing import Any

import torch

from mypt_fast import accounting, console
from mypt_fast.checkpoint import bundle as bundles
from mypt_fast.config import GoldSelection, TrainConfig
from mypt_fast.errors import CheckpointError, ConfigError, IntegrityError
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.events import SCHEMA, EventLog, loss6
from mypt_fast.training.evaluate import mean_loss
from mypt_fast.training.gold import Decision, GoldState, decide
from mypt_fast.training.optim import adamw
from mypt_fast.training.run import Run
from mypt_fast.training.schedule import learning_rate, warmup_steps
from mypt_fast.training.signals import StopRequested, StopSignal


class Trainer:
    """One run from its start or its last checkpoint to `max_iters`.

    Args:
        run: opened data, device and settings. The trainer restores the run directory's state.
        live: the progress line.
    """

    def __init__(self, run: Run, live: console.Live) -> None:
        self.run, self.live = run, live
        self.settings, self.cfg, self.tc = run.settings, run.settings.model, run.settings.train
        self.device, self.tokens_per_step = run.device, run.settings.global_batch * run.settings.model.block_size  # fmt: skip
        self.gold, self.last_eval_step = GoldState(), -1
        self.start_step = self.step = 0
        self.losses_since_eval: list[float] = []
        self.rng_at_step: dict[str, torch.Tensor] | None = None  # set while a step is under way
        bundles.check_writable(self.settings.run_dir)
        self.model = GPT(self.cfg, seed=None if self.settings.resume else self.tc.seed)
        torch.manual_seed(self.tc.seed)  # dropout; weights and data have generators of their own
        saved = bundles.read(self.settings.run_dir) if self.settings.resume else None
        if saved is not None:
            self._load_weights(saved)
        self.model.to(self.device).train()
        freeze(self.model, self.tc)
        self.optimizer = adamw(self.model, self.tc)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision.scaler)
        self.log = EventLog(log_path(self.settings))
        if saved is not None:
            self._restore(saved)
        self.compiled = use_compile(self.tc, self.device)
        if self.compiled:
            self.model.hidden = torch.compile(self.model.hidden)  # type: ignore[method-assign]

    def train(self) -> int:
        """Run to the end or to a signal; returns the exit code."""
        if self.start_step >= self.tc.max_iters and self.last_eval_step >= self.start_step:
            console.say(
                f"{self.settings.model_name} is at step {self.start_step} of {self.tc.max_iters}: "
                "nothing to train; raise --max_iters to continue"
            )
            return 0
        self.started, self.clock = datetime.datetime.now(), time.perf_counter()
        self._log_start()
        with StopSignal() as stop:
            self.stop = stop
            try:
                for self.step in range(self.start_step, self.tc.max_iters):
                    self.stop.raise_if_set()
                    if self.step % self.tc.eval_interval == 0 and self.step != self.last_eval_step:
                        self._evaluate()
                    self._switch_phase()
                    self._train_step()
                    if self.tc.save_interval and (self.step + 1) % self.tc.save_interval == 0:
                        self._save(self.settings.run_dir, self.step + 1)
                self.step = self.tc.max_iters
                self._finish()
            except StopRequested:
                self._stop_early()
            finally:
                self.live.close()
                self.log.close()
        return self.stop.exit_code

    # one step

    def _train_step(self) -> None:
        started = time.perf_counter()
        self.rng_at_step = devices.rng_state(self.device)
        lr = learning_rate(self.step, self.tc)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=self.device)
        phase = self.run.phases[self.run.phase_at(self.step)]
        left, micro = self.settings.global_batch, 0
        while left:
            self.stop.raise_if_set()
            x, y = phase.train.next(min(self.run.micro_batch, left))
            left, micro = left - len(x), micro + 1
            loss += self._micro_step(torch.from_numpy(x), torch.from_numpy(y))
            if left:
                self.live.micro(self.step, micro, left)
        self.scaler.unscale_(self.optimizer)
        params = [p for p in self.model.parameters() if p.grad is not None]
        clip = self.tc.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(params, clip))
        if math.isfinite(norm) or self.run.precision.scaler:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.rng_at_step = None
        self._log_step(float(loss), lr, norm, time.perf_counter() - started)

    def _micro_step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        with self.run.precision.autocast():
            # divided by the tokens of the whole step, so accumulation never changes the objective
            loss = self.model(x, y) / self.tokens_per_step
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _log_step(self, loss: float, lr: float, norm: float, seconds: float) -> None:
        speed = self.tokens_per_step / seconds
        skipped = {} if math.isfinite(norm) else {"skipped": True}
        self.log.write(
            "train", iter=self.step, loss=loss6(loss), lr=lr, grad_norm=loss6(norm),
            tokens_per_sec=round(speed), **skipped,
        )  # fmt: skip
        if math.isfinite(loss):
            self.losses_since_eval.append(loss)
        self.live.step(self.step + 1, loss, speed, devices.peak_bytes(self.device))

    def _switch_phase(self) -> None:
        now = self.run.phase_at(self.step)
        if self.step and now != self.run.phase_at(self.step - 1):
            name = self.run.phases[now].name
            self.log.write("phase_switch", iter=self.step, **self._progress(), new_phase=name)
            console.say(f"  phase: {name}")

    # evaluation and gold

    def _val_loss(self, loader: Any) -> float:
        rows = min(self.run.micro_batch * 2, self.cfg.batch_size)
        windows = self.tc.eval_iters * self.cfg.batch_size
        with self.run.precision.autocast():
            return mean_loss(self.model, loader, windows, rows, self.device, self.stop.raise_if_set)

    def _evaluate(self) -> None:
        """Measure, report, save the run, then decide about gold: MyPT's order."""
        began = time.perf_counter()
        phase = self.run.phases[self.run.phase_at(max(self.step - 1, 0))]
        progress = self._progress()
        val = self._val_loss(phase.val)
        others = {name: self._val_loss(loader) for name, loader in self.run.eval_sets.items()}
        lr = learning_rate(self.step, self.tc)
        self.last_eval_step = self.step
        self.live.clear()
        if self.step == self.start_step:
            console.say()
        for line in console.eval_lines(
            step=self.step, start_step=self.start_step, max_iters=self.tc.max_iters,
            elapsed_s=progress["elapsed_s"], tokens=progress["tokens_processed"], val_loss=val,
            lr=lr, phase=phase.name, eval_sets=others,
        ):  # fmt: skip
            console.say(line)
        done, span = self.step - self.start_step, max(1, self.tc.max_iters - self.start_step)
        self.log.write(
            "eval", iter=self.step, **progress, progress_pct=round(100 * done / span, 2), lr=lr,
            phase=phase.name, val_loss=loss6(val), train_loss=loss6(self._recent_train_loss()),
            **NO_MASKS, **{f"eval_{k}": loss6(v) for k, v in others.items()},
            eval_duration_s=round(time.perf_counter() - began, 1),
        )  # fmt: skip
        decision = self._decide(val, others)
        self._save(self.settings.run_dir, self.step)
        if decision.save:
            self._save(gold_dir(self.settings.run_dir), self.step)
        self.losses_since_eval.clear()

    def _recent_train_loss(self) -> float | None:
        recent = self.losses_since_eval
        return sum(recent) / len(recent) if recent else None

    def _decide(self, val: float, others: dict[str, float], final: bool = False) -> Decision:
        rules = self.tc.gold_selection or GoldSelection()
        guards = rules.guards if rules.apply_loss_guards else None
        decision = decide(self.gold, self.step, val, self._recent_train_loss(), others, guards)
        prev, best = loss6(decision.prev_best), loss6(self.gold.best_gold_val_loss)
        common = {
            "iter": self.step, "strategy": rules.strategy, "val_loss": loss6(val),
            "best_gold_val_loss": best, "best_gate_metric": None,
            "gate_pass": None, "gate_metric": None,
        }  # fmt: skip
        if decision.save:
            event = "gold_checkpoint_final_eval" if final else "gold_checkpoint"
            self.log.write(event, **common, prev_best=prev)
            console.say(console.gold_saved_line(val, self.step))
        elif decision.reason and decision.prev_best is not None:
            self.log.write("gold_blocked", **common, best_val_loss=prev, reason=decision.reason)
            console.say(console.gold_blocked_line(val, decision.prev_best, decision.reason))
        return decision

    # the end of a run

    def _finish(self) -> None:
        """Final evaluation, gold under the same guards, final bundle, fp16 copy, summary."""
        phase = self.run.phases[self.run.phase_at(self.step - 1)]
        train, val = self._val_loss(phase.train), self._val_loss(phase.val)
        others = {name: self._val_loss(loader) for name, loader in self.run.eval_sets.items()}
        self.live.clear()
        decision = self._decide(val, others, final=True)
        elapsed, steps = time.perf_counter() - self.clock, self.step - self.start_step
        tokens = steps * self.tokens_per_step
        self.log.write(
            "training_complete", started_at=self.started.isoformat(),
            total_elapsed_s=round(elapsed, 1), total_elapsed_h=round(elapsed / 3600, 2),
            total_steps=steps, total_tokens=tokens, steps_per_sec=round(steps / elapsed, 3),
            tokens_per_sec=round(tokens / elapsed), final_train_loss=loss6(train),
            final_val_loss=loss6(val), best_val_loss=loss6(self.gold.best_val_loss),
            best_gold_val_loss=loss6(self.gold.best_gold_val_loss), best_gate_metric=None,
            gold_strategy=(self.tc.gold_selection or GoldSelection()).strategy,
            gold_step=self.gold.gold_step, **self._sources(),
        )  # fmt: skip
        run_dir = self.settings.run_dir
        self.last_eval_step = self.step
        if decision.save:
            self._save(gold_dir(run_dir), self.step)
        self._save(run_dir, self.step)
        fp16 = run_dir.with_name(run_dir.name + "_fp16")
        self._write(fp16, self.step, save_dtype="fp16", optimizer=False)
        gold = None
        if self.gold.gold_step is not None and self.gold.best_gold_val_loss is not None:
            gold = (str(gold_dir(run_dir)), self.gold.gold_step, self.gold.best_gold_val_loss)
        console.say(f"final train {train:.4f} | val {val:.4f} | {console.token_count(tokens)} tokens | {tokens / elapsed:,.0f} tokens/s")  # fmt: skip
        for line in console.finished_lines(str(run_dir), str(fp16), gold):
            console.say(line)

    def _stop_early(self) -> None:
        """Undo the unfinished step and save: the resumed run repeats it exactly."""
        self.optimizer.zero_grad(set_to_none=True)
        for phase in self.run.phases:
            phase.train.rewind_step()
        if self.rng_at_step is not None:
            devices.set_rng_state(self.rng_at_step, self.device)
        self.live.clear()
        self._save(self.settings.run_dir, self.step)
        console.say(
            f"stopped at step {self.step} of {self.tc.max_iters}; continue with "
            f"`mypt-fast train --model_name {self.settings.model_name}`"
        )

    # saving and restoring

    def _save(self, target: Path, step: int) -> None:
        self._write(target, step, save_dtype=self.cfg.save_dtype, optimizer=True)

    def _write(self, target: Path, step: int, save_dtype: str | None, optimizer: bool) -> None:
        self.log.sync()
        preset = self.settings.preset_path
        bundles.write(
            target,
            config=self.cfg.to_dict(),
            state_dict=self.model.state_dict(),
            tokenizer=self.run.tokenizer.get_state(),
            training_state=self._training_state(step, save_dtype, optimizer),
            optimizer=self.optimizer.state_dict() if optimizer else None,
            gold_state=self._gold_file(step) if target == self.settings.run_dir else None,
            original_config=preset.read_bytes() if preset and preset.is_file() else None,
            save_dtype=save_dtype,
            state=self._resume_state(step) if optimizer else {"step": step},
        )

    def _training_state(self, step: int, save_dtype: str | None, optimizer: bool) -> dict[str, Any]:
        cfg = self.cfg
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias", "pos_encoding", "mlp_type", "norm_type")  # fmt: skip
        params = {n: getattr(cfg, n) for n in names}
        training = {
            **self.tc.to_dict(), **vars(self.settings.data), **self._sources(),
            "start_step": self.start_step, "save_dtype": save_dtype,
            "model_params": {**params, "total_params": accounting.count_parameters(cfg).total},
        }  # fmt: skip
        state = {"step": step, "training_config": training, "model_dtype_at_save": "float32"}
        if save_dtype:
            state["checkpoint_dtype"] = save_dtype
        if optimizer:
            state["optimizer_file"] = "optimizer.pt"
        plan = {"micro_batch_size": self.run.micro_batch, "global_batch": self.settings.global_batch}  # fmt: skip
        return {**state, "plan": {**plan, "use_checkpoint": cfg.use_checkpoint}}

    def _gold_file(self, step: int) -> dict[str, Any]:
        rules = self.tc.gold_selection or GoldSelection()
        gate = rules.external_gate
        shown = ("enabled", "metric_path", "metric_goal", "pass_path", "require_pass")
        return {
            "strategy": rules.strategy, "iter": step, "best_val_loss": self.gold.best_val_loss,
            "best_gold_val_loss": self.gold.best_gold_val_loss, "best_gate_metric": None,
            "gold_step": self.gold.gold_step,
            "external_gate": {k: getattr(gate, k) for k in shown}, "last_gate": None,
        }  # fmt: skip

    def _resume_state(self, step: int) -> dict[str, Any]:
        rng = {k: base64.b64encode(v.numpy().tobytes()).decode() for k, v in devices.rng_state(self.device).items()}  # fmt: skip
        return {
            "step": step,
            "rng": rng,
            "data": [
                {"phase": p.name, "source": p.source, "state": p.train.state_dict()}
                for p in self.run.phases
            ],
            "gold": self.gold.to_dict(),
            "last_eval_step": self.last_eval_step,
            "losses_since_eval": self.losses_since_eval,
            "scaler": self.scaler.state_dict(),
            "log": {"path": str(self.log.path), "bytes": self.log.position},
        }

    def _load_weights(self, saved: bundles.Bundle) -> None:
        try:
            self.model.load_state_dict(saved.state_dict)
        except RuntimeError as e:
            problem = " ".join(str(e).split())[:200]
            raise CheckpointError(
                f"weights in {saved.path} do not fit its config.json", problem,
                "undo the edit of config.json",
            ) from e  # fmt: skip

    def _restore(self, saved: bundles.Bundle) -> None:
        for notice in saved.notices:
            console.notice(notice)
        self.start_step = self.step = int(saved.training_state.get("step") or 0)
        if saved.optimizer is not None:
            try:
                self.optimizer.load_state_dict(saved.optimizer)
            except (ValueError, KeyError) as e:
                raise IntegrityError(f"{saved.path / 'optimizer.pt'} does not fit the model", str(e)) from e  # fmt: skip
        elif self.start_step:
            console.notice(f"{saved.path.name}: no optimizer.pt; its moments start from zero")
        state = saved.manifest
        if state is None or "data" not in state:
            if self.start_step:
                console.notice(f"{saved.path.name}: no data position saved; counting it from the step")  # fmt: skip
            for phase in self.run.phases:
                phase.train.position = self.start_step * self.settings.global_batch
            return
        rng = {k: torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.uint8) for k, v in state["rng"].items()}  # fmt: skip
        devices.set_rng_state(rng, self.device)
        self.gold = GoldState(**state["gold"])
        self.last_eval_step = state["last_eval_step"]
        self.losses_since_eval = list(state["losses_since_eval"])
        self.scaler.load_state_dict(state["scaler"])
        self._restore_data(state["data"])
        same = state["log"]["path"] == str(self.log.path)
        dropped = self.log.rewind(state["log"]["bytes"], same)
        if dropped:
            console.notice(f"{self.log.path}: {dropped} bytes logged after step {self.start_step} dropped; those steps run again")  # fmt: skip

    def _restore_data(self, saved: list[dict[str, Any]]) -> None:
        states = {(d["phase"], d["source"]): d["state"] for d in saved}
        for phase in self.run.phases:
            state = states.get((phase.name, phase.source))
            if state is not None:
                phase.train.load_state_dict(state)
            else:
                known = ", ".join(d["source"] for d in saved)
                console.notice(f"data changed from {known} to {phase.source}: its order starts anew")  # fmt: skip

    # what the log says

    def _sources(self) -> dict[str, Any]:
        preset = self.settings.preset_path
        saved = self.settings.saved_state.get("training_config") or {}
        config_file = str(preset) if preset else saved.get("config_file")
        return {"config_file": config_file, "dataset_dir": self.settings.data.dataset_dir}

    def _progress(self) -> dict[str, Any]:
        elapsed = time.perf_counter() - self.clock
        tokens = (self.step - self.start_step) * self.tokens_per_step
        return {"elapsed_s": round(elapsed, 1), "tokens_processed": tokens}

    def _log_start(self) -> None:
        tc, cfg = self.tc, self.cfg
        gold = tc.to_dict()["gold_selection"]
        self.log.write(
            "training_start", schema=SCHEMA,
            config={
                "max_iters": tc.max_iters, "start_step": self.start_step,
                "learning_rate": tc.learning_rate,
                "warmup_iters": warmup_steps(tc.warmup_iters, tc.max_iters),
                "grad_clip": tc.grad_clip, "grad_accum_steps": tc.grad_accum_steps,
                "batch_size": cfg.batch_size, "block_size": cfg.block_size,
                "tokens_per_step": self.tokens_per_step, "eval_interval": tc.eval_interval,
                "eval_iters": tc.eval_iters, "use_amp": self.run.precision.name != "fp32",
                "amp_dtype": self.run.precision.name, **self._sources(), "gold_selection": gold,
                "micro_batch_size": self.run.micro_batch, "seed": tc.seed,
            },
            model={
                "total_params": accounting.count_parameters(cfg).total, "n_layer": cfg.n_layer,
                "n_head": cfg.n_head, "n_embd": cfg.n_embd, "pos_encoding": cfg.pos_encoding,
                "mlp_type": cfg.mlp_type, "norm_type": cfg.norm_type,
            },
        )  # fmt: skip


# Fields MyPT logs for masked data; token datasets have no masks.
NO_MASKS = {
    "train_masked_token_acc": None, "val_masked_token_acc": None,
    "train_masked_token_count": 0, "val_masked_token_count": 0, "masked_acc_gap": None,
    "saturation_detected": False, "saturation_reason": None, "saturation_step": None,
}  # fmt: skip


def gold_dir(run_dir: Path) -> Path:
    """`<name>_gold` beside the run directory."""
    return run_dir.with_name(run_dir.name + "_gold")


def log_path(settings: Any) -> Path:
    """The JSONL log of a run: as set, else logs/train/<model_name>_eval.jsonl."""
    default = Path("logs") / "train" / f"{settings.model_name}_eval.jsonl"
    return Path(settings.train.log_file) if settings.train.log_file else default


def use_compile(tc: TrainConfig, device: torch.device) -> bool:
    """`auto` compiles on a GPU; on a CPU a cold compile costs 20 s and gains a few percent."""
    if tc.compile == "auto":
        return device.type == "cuda"
    return tc.compile == "on"


def freeze(model: GPT, tc: TrainConfig) -> None:
    """Exclude embeddings and the lowest blocks from training, if asked."""
    if tc.freeze_layers > len(model.blocks):
        raise ConfigError("freeze_layers is larger than n_layer", f"found {tc.freeze_layers} > {len(model.blocks)}")  # fmt: skip
    frozen: list[torch.nn.Module] = list(model.blocks[: tc.freeze_layers])
    if tc.freeze_embeddings:
        frozen.append(model.token_embedding_table)
        if model.config.pos_encoding == "learned":
            frozen.append(model.position_embedding_table)
    for module in frozen:
        module.requires_grad_(False)
