"""The events of a run as they happen: JSONL fields and the lines people read, in one place."""

from __future__ import annotations

import datetime
import time
from typing import Any

from mypt_fast import accounting, console
from mypt_fast.config import GoldSelection
from mypt_fast.training.events import SCHEMA, EventLog, loss6
from mypt_fast.training.gold import Decision, GoldState
from mypt_fast.training.guard import Spike
from mypt_fast.training.run import Run
from mypt_fast.training.schedule import warmup_steps

Samples = tuple[int, int]

# Fields MyPT logs for masked data, where accuracy is not measured.
NO_MASKS = {
    "train_masked_token_acc": None, "val_masked_token_acc": None,
    "train_masked_token_count": 0, "val_masked_token_count": 0, "masked_acc_gap": None,
    "saturation_detected": False, "saturation_reason": None, "saturation_step": None,
}  # fmt: skip


class Journal:
    """Writes one run's events and console lines; times count from its construction."""

    def __init__(self, run: Run, log: EventLog, start_step: int, sources: dict[str, Any]) -> None:
        self.run, self.log, self.start_step, self.sources = run, log, start_step, sources
        self.train, self.cfg = run.settings.train, run.settings.model
        self.tokens_per_step = run.settings.global_batch * run.settings.model.block_size
        self.started, self._clock = datetime.datetime.now(), time.perf_counter()
        self.strategy = (self.train.gold_selection or GoldSelection()).strategy

    def _so_far(self, step: int) -> dict[str, Any]:
        elapsed = round(time.perf_counter() - self._clock, 1)
        tokens = (step - self.start_step) * self.tokens_per_step
        return {"elapsed_s": elapsed, "tokens_processed": tokens}

    def start(self) -> None:
        """Log the settings of this start or resume."""
        tc, cfg, precision = self.train, self.cfg, self.run.precision.name
        self.log.write(
            "training_start",
            schema=SCHEMA,
            config={
                "model_name": self.run.settings.model_name,
                "max_iters": tc.max_iters,
                "start_step": self.start_step,
                "learning_rate": tc.learning_rate,
                "warmup_iters": warmup_steps(tc.warmup_iters, tc.max_iters),
                "grad_clip": tc.grad_clip,
                "grad_accum_steps": tc.grad_accum_steps,
                "batch_size": cfg.batch_size,
                "block_size": cfg.block_size,
                "tokens_per_step": self.tokens_per_step,
                "eval_interval": tc.eval_interval,
                "eval_iters": tc.eval_iters,
                "use_amp": precision != "fp32",
                "amp_dtype": precision,
                **self.sources,
                "gold_selection": tc.to_dict()["gold_selection"],
                "micro_batch_size": self.run.plan.micro_batch,
                "plan": {
                    **self.run.plan.fields(),
                    "predicted": self.run.plan.predicted and self.run.plan.predicted.parts,
                },
                "seed": tc.seed,
                "documents": tc.documents,
            },
            model={
                "total_params": accounting.count_parameters(cfg).total,
                "n_layer": cfg.n_layer,
                "n_head": cfg.n_head,
                "n_embd": cfg.n_embd,
                "pos_encoding": cfg.pos_encoding,
                "mlp_type": cfg.mlp_type,
                "norm_type": cfg.norm_type,
            },
            **self.run.ceilings.fields(),
        )

    def step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> None:
        """Log one optimizer step."""
        speed = self.tokens_per_step / seconds
        mfu = self.run.ceilings.mfu(speed)
        self.log.write(
            "train",
            iter=step,
            loss=loss6(loss),
            lr=lr,
            grad_norm=loss6(norm),
            tokens_per_sec=round(speed),
            **({} if mfu is None else {"mfu": round(mfu, 4)}),
        )

    def plan_checked(self, step: int, predicted: int, measured: int) -> None:
        """Log the peak of a step beside the one that was planned, both of tensors, in bytes."""
        self.log.write(
            "plan_check", iter=step, predicted_bytes=predicted, measured_bytes=measured,
            ratio=round(measured / predicted, 4),
        )  # fmt: skip
        size = console.bytes_text
        console.say(
            f"memory  peak {size(measured)}, predicted {size(predicted)} "
            f"({100 * (measured / predicted - 1):+.1f} %)"
        )

    # what went wrong; `samples` are the global samples [first, end) of the step

    def skipped(self, step: int, reason: str, loss: float, norm: float, samples: Samples) -> None:
        """Log a step that was not taken; the same step goes on with the next data."""
        self.log.write(
            "skipped_step", iter=step, reason=reason, loss=loss6(loss), grad_norm=loss6(norm),
            samples=list(samples),
        )  # fmt: skip
        self.problem(f"step {step} is skipped: {reason} on samples {_range(samples)}")

    def spike(self, step: int, loss: float, norm: float, spike: Spike, samples: Samples) -> None:
        """Log a loss far above the ones before it."""
        self.log.write(
            "loss_spike", iter=step, loss=loss6(loss), grad_norm=loss6(norm),
            median=loss6(spike.median), sigmas=round(spike.sigmas, 2),
            action=self.train.spike_action, samples=list(samples),
        )  # fmt: skip

    def rollback(self, step: int, back_to: int, reason: str, samples: Samples) -> None:
        """Log that the run went back to a checkpoint, and which samples it leaves out."""
        self.log.write("rollback", iter=step, back_to=back_to, reason=reason, samples=list(samples))
        self.problem(
            f"step {step}: {reason}; back to step {back_to} and past samples {_range(samples)}"
        )

    def out_of_memory(
        self, step: int, where: str, was: int, rows: int, found: str, samples: Samples | None
    ) -> None:
        """Log that memory ran out, and that forwards have `rows` sequences from here on."""
        self.log.write(
            "oom", iter=step, where=where, micro_batch_size=rows, was=was, found=found,
            samples=list(samples) if samples else None,
        )  # fmt: skip
        self.problem(f"step {step}: out of memory; {rows} sequences per forward instead of {was}")

    def loss_scale(self, step: int, scale: float) -> None:
        """Log that gradients were too large for fp16, and at which scale the step is made again."""
        self.log.write("loss_scale", iter=step, scale=scale)

    def problem(self, text: str) -> None:
        """Print one line of what went wrong."""
        console.notice(f"note: {text}")

    def phase(self, step: int, name: str) -> None:
        """Log that the data changed."""
        self.log.write("phase_switch", iter=step, **self._so_far(step), new_phase=name)
        console.say(f"  phase: {name}")

    def evaluation(
        self,
        step: int,
        phase: str,
        lr: float,
        val: float,
        others: dict[str, float],
        train: float | None,
        seconds: float,
        masks: dict[str, Any],
        extra: dict[str, Any],
    ) -> None:
        """Log an evaluation and print MyPT's two lines; `seconds` it took do not count."""
        so_far = self._so_far(step)
        so_far["elapsed_s"] = round(so_far["elapsed_s"] - seconds, 1)
        done, span = step - self.start_step, max(1, self.train.max_iters - self.start_step)
        if not done:
            console.say()
        for line in console.eval_lines(
            step=step, start_step=self.start_step, max_iters=self.train.max_iters,
            elapsed_s=so_far["elapsed_s"], tokens=so_far["tokens_processed"], val_loss=val,
            lr=lr, phase=phase, eval_sets=others,
        ):  # fmt: skip
            console.say(line)
        self.log.write(
            "eval",
            iter=step,
            **so_far,
            progress_pct=round(100 * done / span, 2),
            lr=lr,
            phase=phase,
            val_loss=loss6(val),
            train_loss=loss6(train),
            **(masks or NO_MASKS),
            **{f"eval_{name}": loss6(loss) for name, loss in others.items()},
            **extra,
            eval_duration_s=round(seconds, 1),
        )

    def gold(
        self,
        step: int,
        val: float,
        decision: Decision,
        state: GoldState,
        final: bool,
        extra: dict[str, Any],
    ) -> None:
        """Log a gold save, or a new minimum that a guard blocked; nothing otherwise."""
        prev = decision.prev_best
        common: dict[str, Any] = {
            "iter": step,
            "strategy": self.strategy,
            "val_loss": loss6(val),
            "best_gold_val_loss": loss6(state.best_gold_val_loss),
            "best_gate_metric": state.best_gate_metric,
        }
        if self.run.mypt_words and state.evaluations == 1 and state.baselines:
            console.say(console.mypt_baseline_line(state.baselines))
        if decision.save:
            event = "gold_checkpoint_final_eval" if final else "gold_checkpoint"
            self.log.write(event, **common, **extra, prev_best=loss6(prev))
            line = console.gold_saved_line(val, step)
            if self.run.mypt_words:
                line = console.mypt_gold_line(self.strategy, val, step, extra, final)
            console.say(line)
        elif decision.reason is not None:
            fields = {**common, "reason": decision.reason, **extra}
            self.log.write("gold_blocked", **fields, best_val_loss=loss6(prev))
            line = console.gold_blocked_line(val, prev, decision.reason)
            console.say(f"  GOLD blocked: {decision.reason}" if self.run.mypt_words else line)

    def gate(self, step: int, fields: dict[str, Any]) -> None:
        """Log the gate of the final evaluation, which has no event of its own."""
        self.log.write("gold_gate", iter=step, **fields)

    def complete(self, step: int, train: float, val: float, gold: GoldState) -> None:
        """Log the end of the run and print the totals."""
        elapsed, steps = time.perf_counter() - self._clock, step - self.start_step
        tokens = steps * self.tokens_per_step
        self.log.write(
            "training_complete",
            started_at=self.started.isoformat(),
            total_elapsed_s=round(elapsed, 1),
            total_elapsed_h=round(elapsed / 3600, 2),
            total_steps=steps,
            total_tokens=tokens,
            steps_per_sec=round(steps / elapsed, 3),
            tokens_per_sec=round(tokens / elapsed, 0),
            **self.run.ceilings.shares(tokens / elapsed),
            final_train_loss=loss6(train),
            final_val_loss=loss6(val),
            best_val_loss=loss6(gold.best_val_loss),
            best_gold_val_loss=loss6(gold.best_gold_val_loss),
            best_gate_metric=gold.best_gate_metric,
            gold_strategy=self.strategy,
            gold_step=gold.gold_step,
            **self.sources,
        )
        if self.run.mypt_words:
            best = None
            if gold.best_gold_val_loss is not None and gold.gold_step is not None:
                best = (gold.best_gold_val_loss, gold.gold_step)
            for line in console.mypt_complete_lines(train, val, elapsed, steps, tokens, best):
                console.say(line)
            return
        console.say(
            f"final: train {train:.4f} | val {val:.4f} | {console.count(tokens)} tokens in "
            f"{console.span(elapsed)} | {tokens / elapsed:,.0f} tokens/s"
            f"{self.run.ceilings.words(tokens / elapsed)}"
        )


def _range(samples: Samples) -> str:
    return f"{samples[0]} to {samples[1] - 1}"
