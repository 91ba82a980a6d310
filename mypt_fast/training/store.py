"""What a run saves and how it comes back: bundle members, resume state, data position."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mypt_fast import accounting, console
from mypt_fast.checkpoint import bundle as bundles
from mypt_fast.checkpoint import legacy
from mypt_fast.checkpoint.converting import keep_aside
from mypt_fast.checkpoint.eras import misfit
from mypt_fast.config import GoldSelection
from mypt_fast.errors import CheckpointError, IntegrityError
from mypt_fast.model import GPT
from mypt_fast.training import device as devices
from mypt_fast.training.events import EventLog
from mypt_fast.training.first_start import FirstStart
from mypt_fast.training.gold import GoldState, from_selection_file, selection_file
from mypt_fast.training.guard import GuardState, first_line
from mypt_fast.training.run import Run
from mypt_fast.training.saturation import SaturationState, saved_fields
from mypt_fast.training.saver import Saver, Snapshot, saves_beside

SHAPE_FIELDS = (
    "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias",
    "pos_encoding", "mlp_type", "norm_type",
)  # fmt: skip
# of training_config, in MyPT's order; what it does not know comes behind
MYPT_FIRST = (
    "max_iters", "eval_interval", "eval_iters", "learning_rate", "start_step", "save_dtype",
    "warmup_iters", "grad_clip", "grad_accum_steps", "config_file", "dataset_dir",
    "gold_selection", "token_accuracy_saturation", "model_params",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run is, beyond weights and data position."""

    gold: GoldState = field(default_factory=GoldState)
    last_eval_step: int = -1
    losses_since_eval: list[float] = field(default_factory=list)
    guard: GuardState = field(default_factory=GuardState)
    saturation: dict[str, Any] = field(default_factory=dict)  # of SaturationState

    def recent_train_loss(self) -> float | None:
        """Mean training loss since the last evaluation; None before the first step."""
        recent = self.losses_since_eval
        return sum(recent) / len(recent) if recent else None


class Store:
    """Saves and restores one run's state.

    Args:
        run: the opened run.
        log: its event log, whose position is saved with the state.
    """

    keeps = True  # whether anything is saved, gold included

    def __init__(self, run: Run, log: EventLog) -> None:
        self.run, self.log, self.settings = run, log, run.settings
        self.save_dtype: str | None = run.settings.model.save_dtype
        self.final_dtype: str | None = "fp16"  # of the copy without optimizer; None: no copy
        self.start_step = 0
        self.progress = Progress()
        self.unsaved: dict[Path, CheckpointError] = {}  # what could not be saved, by directory
        self.saver = Saver(saves_beside(run.settings, run.device))
        self._first = FirstStart(run.settings.run_dir, log, run.settings.model_name)
        self._snapshot = Snapshot(run.device)
        self._tensors: dict[str, Any] | None = None  # in the snapshot, while they are what is here
        self.model: GPT
        self.optimizer: torch.optim.Optimizer
        self.scaler: torch.amp.GradScaler

    @property
    def gold_dir(self) -> Path:
        """`<name>_gold` beside the run directory."""
        return self._beside("_gold")

    def _beside(self, suffix: str) -> Path:
        return self.settings.run_dir.with_name(self.settings.run_dir.name + suffix)

    # saving

    def save(self, step: int) -> None:
        """Save the run directory at `step`. A save that fails is logged, not raised."""
        keep = self.settings.train.keep_last
        self._start(self.settings.run_dir, step, self.save_dtype, keep_last=keep)

    def save_gold(self, step: int) -> None:
        """Save the gold directory, optimizer included: a run can continue from it."""
        self._start(self.gold_dir, step, self.save_dtype)

    def save_final(self, step: int) -> Path | None:
        """Save weights to deploy, without optimizer, as `<name>_fp16`; returns the directory."""
        if self.final_dtype is None:
            return None
        target = self._beside(f"_{self.final_dtype}")
        self._start(target, step, self.final_dtype, optimizer=False)
        return target

    def before_move(self) -> None:
        """Called before weights or moments change: their copy must be made, and is then old."""
        if self._tensors is not None:
            self._snapshot.hold_device()
            self._tensors = None

    def report(self) -> None:
        """Log the saves that have failed since, in the training's own thread."""
        for (target, step), error in self.saver.finished():
            if error is None:
                self.unsaved.pop(target, None)
            elif isinstance(error, CheckpointError):
                self.unsaved[target] = error
                console.notice(f"step {step}: {error.what}; {error.found}; training goes on")
                with contextlib.suppress(OSError):  # the log's disk may be the full one
                    self.log.write("save_failed", iter=step, target=str(target), error=error.found)
            else:
                raise error

    def wait(self) -> None:
        """Wait for the saves under way, and report them."""
        self.saver.wait()
        self.report()

    def saved(self) -> bool:
        """Wait likewise; returns whether the run directory's last save succeeded."""
        self.wait()
        return self.settings.run_dir not in self.unsaved

    def close(self) -> None:
        """Wait for the saves under way; whoever asks for more starts anew."""
        self.saver.close()

    def raise_if_unsaved(self) -> None:
        """At the end of a run: raise CheckpointError for a save that failed and was not made up."""
        self.wait()
        for failure in self.unsaved.values():
            raise failure

    def _start(self, target: Path, step: int, dtype: str | None, **options: Any) -> None:
        """Start a save; where the disk refuses, the old checkpoint stays and training goes on.

        The next save point tries again; `raise_if_unsaved` has the last word.
        """
        self.report()
        try:
            self.log.flush()
        except OSError as e:
            what = f"cannot save {target}: its log {self.log.path}"
            self.saver.fail((target, step), CheckpointError(what, e.strerror or str(e)))
        else:
            content = self._content(target, step, dtype, **options)
            self.saver.run((target, step), lambda: self._write(target, content))
        if not self.saver.beside:
            self.report()

    def _write(self, target: Path, content: dict[str, Any]) -> None:
        """Write a save; may run beside the training, so it touches nothing that moves."""
        self.log.sync()
        self._snapshot.wait()
        bundles.write(target, **content)
        if target == self.settings.run_dir:
            self._first.end()

    def _content(
        self,
        target: Path,
        step: int,
        dtype: str | None,
        optimizer: bool = True,
        keep_last: int = 0,
    ) -> dict[str, Any]:
        """What `bundle.write` takes, as it is now: tensors copied where training goes on."""
        tensors = self._tensors or self._here()
        preset = self.settings.preset_path
        return {
            "config": self.settings.model.to_dict(),
            "state_dict": tensors["model"],
            "tokenizer": self.run.tokenizer.get_state(),
            "training_state": self._training_state(step, dtype, optimizer),
            "optimizer": tensors["optimizer"] if optimizer else None,
            "gold_state": self._gold_file(step) if target == self.settings.run_dir else None,
            "original_config": preset.read_bytes() if preset and preset.is_file() else None,
            "save_dtype": dtype,
            "state": self._resume_state(step) if optimizer else {"step": step},
            "keep_last": keep_last,
        }

    def _here(self) -> dict[str, Any]:
        """Tensors as they are: copied for the thread, themselves where the training saves."""
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if not self.saver.beside:
            return tensors
        self.wait()  # for the snapshot before
        try:
            self._tensors = self._snapshot.take(tensors)
        except (MemoryError, RuntimeError) as e:
            console.notice(f"note: no memory to copy for a save ({first_line(e)}): saves wait")
            self.saver.beside, self._snapshot = False, Snapshot(self.run.device)
        return self._tensors or tensors

    def _training_state(self, step: int, dtype: str | None, optimizer: bool) -> dict[str, Any]:
        cfg = self.settings.model
        shape = {name: getattr(cfg, name) for name in SHAPE_FIELDS}
        config = {
            **self.settings.train.to_dict(),
            **vars(self.settings.data),
            **self.sources(),
            "model_name": self.settings.model_name,
            "start_step": self.start_step,
            "save_dtype": dtype,
            "model_params": {**shape, "total_params": accounting.count_parameters(cfg).total},
        }
        first = {name: config[name] for name in MYPT_FIRST}
        state: dict[str, Any] = {
            "step": step,
            "training_config": first | config,
            "model_dtype_at_save": "float32",
        }
        if self.progress.saturation:
            rules = self.settings.train.token_accuracy_saturation
            state["training_config"]["token_accuracy_saturation"] = saved_fields(
                self.progress.saturation, rules
            )
        if dtype:
            state["checkpoint_dtype"] = dtype
        if optimizer:
            state["optimizer_file"] = "optimizer.pt"
        state["plan"] = {
            **self.run.plan.fields(),
            "global_batch": self.settings.global_batch,
            "precision": self.run.precision.name,
            "attention": self.run.attention,
            "device": self.run.device.type,
            "compiled": self.run.choice is not None and self.run.choice.compiled,
        }
        return state

    def _gold_file(self, step: int) -> dict[str, Any]:
        rules = self.settings.train.gold_selection or GoldSelection()
        return selection_file(self.progress.gold, rules, step)

    def _resume_state(self, step: int) -> dict[str, Any]:
        rng = devices.rng_state(self.run.device)
        return {
            "step": step,
            "rng": {k: base64.b64encode(v.numpy().tobytes()).decode() for k, v in rng.items()},
            "data": [
                {"phase": p.name, "source": p.source, "state": p.train.state_dict()}
                for p in self.run.phases
            ],
            "progress": asdict(self.progress),
            "scaler": self.scaler.state_dict(),
            "log": {
                "run": self.settings.model_name,
                "path": str(self.log.path),
                "bytes": self.log.position,
            },
        }

    def sources(self) -> dict[str, Any]:
        """Preset file and dataset of the run, as the log and the bundle name them."""
        preset = self.settings.preset_path
        saved = self.settings.saved_state.get("training_config") or {}
        start = self.settings.train.init_from_model
        return {
            **({"init_from_model": start} if start else {}),
            "config_file": str(preset) if preset else saved.get("config_file"),
            "dataset_dir": self.settings.data.dataset_dir,
        }

    # restoring

    def read(self) -> bundles.Bundle | None:
        """Read and verify the run directory, None for a new run."""
        if not self.settings.resume:  # else these settings are its own, and of no other state
            return None
        if self.settings.old_layout:
            keep_aside(self.settings.run_dir)  # the next save writes today's
        return self._read(walk_back=False)

    def _read(self, walk_back: bool) -> bundles.Bundle:
        run_dir, old = self.settings.run_dir, self.settings.legacy_file
        if old is not None and not bundles.exists(run_dir):
            return legacy.read(old)
        return bundles.read(run_dir, walk_back=walk_back)

    def start_anew(self) -> None:
        """Begin the log of a new run where an earlier start of it, which saved nothing, began."""
        if dropped := self._first.begin():
            console.notice(
                f"{self.log.path}: {dropped} bytes of a start that saved nothing dropped"
            )

    def restore_weights(self, saved: bundles.Bundle) -> None:
        """Load the weights into the model; raises CheckpointError if they do not fit."""
        try:
            self.model.load_state_dict(saved.state_dict)
        except RuntimeError as e:
            raise CheckpointError(
                f"weights in {saved.path} do not fit its config.json",
                misfit(saved.state_dict, self.model.config),
                "undo the edit of config.json",
            ) from e

    def restore(self, saved: bundles.Bundle) -> None:
        """Restore step, moments, RNG, data position, gold and log position.

        A bundle without our manifest (written by MyPT, or rewritten since) gives its step, its
        moments and a data position counted from the step; one notice says so.
        """
        for notice in saved.notices:
            console.notice(notice)
        step = saved.training_state.get("step") or 0
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointError(f"{saved.path}/training_state.json: step", f"found {step!r}")
        self.start_step = step
        self._restore_optimizer(saved)
        state = saved.manifest
        if state is None or "data" not in state:
            if step:
                console.notice(f"{saved.path.name}: no data position; counting it from the step")
            for phase in self.run.phases:
                phase.train.position = step * self.settings.global_batch
            gold = bundles.read_info(saved.path).get("gold_selection_state")
            self.progress.gold = from_selection_file(gold)
            return
        try:
            self.restore_state(state)
        except (KeyError, TypeError, ValueError) as e:
            raise IntegrityError(
                f"{saved.path}/manifest.json cannot be used",
                f"{type(e).__name__}: {e}",
                "delete it to continue without RNG, data position and gold state",
            ) from e

    def roll_back(self) -> int:
        """Make the run the one that its last checkpoint holds; returns the checkpoint's step.

        The log keeps its lines: what happened in between did happen.

        Raises:
            CheckpointError, IntegrityError: if there is none that can be used.
        """
        self.wait()
        self._tensors = None
        saved, started = self._read(walk_back=True), self.start_step
        self.restore_weights(saved)
        if saved.manifest:
            saved.manifest.pop("log", None)
        self.restore(saved)
        step, self.start_step = self.start_step, started
        return step

    def _restore_optimizer(self, saved: bundles.Bundle) -> None:
        if saved.optimizer is None:
            is_bare = saved.path.is_dir() and not (saved.path / "optimizer.pt").is_file()
            if self.start_step and is_bare:  # of other reasons the reader's notice tells
                console.notice(f"{saved.path.name}: no optimizer.pt; its moments start from zero")
            return
        try:
            for ours, theirs in zip(
                self.optimizer.param_groups, saved.optimizer["param_groups"], strict=True
            ):
                # the moments are the saved run's, the settings are this start's
                theirs.update({k: v for k, v in ours.items() if k != "params"})
            self.optimizer.load_state_dict(saved.optimizer)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(
                f"{saved.path / 'optimizer.pt'} does not fit the trainable parameters",
                str(e)[:150],
                "freeze_layers and freeze_embeddings stay as they were; or delete the file to "
                "start the moments from zero",
            ) from e

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restore what a manifest holds beside hashes: RNG, progress, data and log position."""
        rng = {k: _tensor(v) for k, v in state["rng"].items()}
        devices.set_rng_state(rng, self.run.device)
        progress = dict(state["progress"])
        guard = GuardState(**progress.get("guard", {}))  # absent in older bundles
        gold = GoldState(**progress["gold"])
        self.progress = Progress(**{**progress, "gold": gold, "guard": guard})
        SaturationState(**self.progress.saturation)  # whether it is one, before it is needed
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for i, phase in enumerate(self.run.phases):
            saved: dict[str, Any] = state["data"][i] if i < len(state["data"]) else {}
            same_place = saved.get("source") == phase.source
            same_data = saved.get("state", {}).get("fingerprint") == phase.train.fingerprint
            if same_place or same_data:  # a dataset may move; at its place it may not change
                phase.train.load_state_dict(saved["state"])
            else:
                before = saved.get("source")
                console.notice(
                    f"data changed from {before} to {phase.source}: its order starts anew"
                )
        log = state.get("log") or {}
        if (log.get("run"), log.get("path")) == (self.settings.model_name, str(self.log.path)):
            dropped = self.log.rewind(int(log["bytes"]), self.settings.model_name)
            if dropped:
                console.notice(
                    f"{self.log.path}: {dropped} bytes from after step {self.start_step} dropped; "
                    "those steps run again"
                )


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
