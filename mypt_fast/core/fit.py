"""`GPT.fit` of MyPT's scripts: the trainer on a model, an optimizer and loaders of the caller's.

Nothing is trained here: arguments become settings (MyPT specification 4.5), and
`mypt_fast.training.trainer` does the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast import console
from mypt_fast.config import DTYPE_NAMES, GoldSelection, Saturation, TrainConfig
from mypt_fast.core.config import strict_compat
from mypt_fast.errors import ConfigError
from mypt_fast.schema import build, shown
from mypt_fast.settings import DataConfig, Settings

if TYPE_CHECKING:
    import torch

    from mypt_fast.model import GPT
    from mypt_fast.training.borrowed import Borrowed
    from mypt_fast.training.run import Run
    from mypt_fast.training.selection import Found
    from mypt_fast.training.signals import StopSignal
    from mypt_fast.training.sources import Phase
    from mypt_fast.training.trainer import Trainer

FilePath = str | os.PathLike[str]
SIGINT_CODE = 130
_ALSO = {"f32": "fp32", "f16": "fp16", "half": "fp16"}


class ArgumentError(ConfigError, ValueError):
    """An argument of fit that cannot be used."""


def fit(
    model: GPT,
    data_loader: Any,
    optimizer: torch.optim.Optimizer,
    max_iters: int = 1000,
    eval_interval: int = 20,
    eval_iters: int = 50,
    checkpoint_dir: FilePath | None = None,
    start_step: int = 0,
    learning_rate: float | None = None,
    save_dtype: str | None = "bf16",
    final_save_dtype: str | None = "fp16",
    warmup_iters: float = 0,
    grad_clip: float = 1.0,
    use_amp: bool = True,
    amp_dtype: str = "bf16",
    eval_data_loaders: Mapping[str, Any] | None = None,
    log_file: FilePath | None = None,
    eval_seed: int | None = None,
    config_file: FilePath | None = None,
    dataset_dir: FilePath | None = None,
    eval_prompts_file: FilePath | None = None,
    eval_max_new_tokens: int = 64,
    data_loader_schedule: Iterable[tuple[int, Any, str]] | None = None,
    grad_accum_steps: int = 1,
    initial_phase: str | None = None,
    model_name: str | None = None,
    gold_selection: Mapping[str, Any] | None = None,
    token_accuracy_saturation: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Train a model in place, as MyPT's `GPT.fit` does (specification 4.3 to 4.6, 5 to 7).

    Args:
        model: the engine's GPT, or a subclass; `model.config.batch_size` is that of the loaders.
            It is left in training mode, its weights in fp32.
        data_loader: `get_batch(split)` gives (x, y), (x, y, mask) or (x, y, mask, segment_ids).
        optimizer: of the model's parameters; the one that moves.
        max_iters: optimizer steps in all.
        eval_interval: evaluations are at its multiples, of absolute steps.
        eval_iters: batches per evaluation.
        checkpoint_dir: where bundles go; None: nothing is saved, and there is no gold.
        start_step: of this call. A checkpoint_dir that holds these weights at this step is
            continued exactly.
        learning_rate: at the peak; default: the optimizer's.
        save_dtype: of the weights in bundles; None: the config's. Exact ones lie in optimizer.pt.
        final_save_dtype: of `<checkpoint_dir>_<it>`, weights without optimizer; None: none.
        warmup_iters: steps, or a share of max_iters between 0 and 1.
        grad_clip: largest gradient norm; 0: none.
        use_amp: mixed precision on a GPU; a CPU trains in fp32.
        amp_dtype: "bf16" or "fp16".
        eval_data_loaders: further loaders, by name.
        log_file: JSONL; None: none.
        eval_seed: of the evaluations; whatever it is, training never notices them.
        config_file: kept with the bundles.
        dataset_dir: as logs and bundles name it.
        eval_prompts_file: prompts that the model continues at each evaluation.
        eval_max_new_tokens: tokens per such continuation.
        data_loader_schedule: (step, loader, phase) of each switch to other data.
        grad_accum_steps: batches per optimizer step.
        initial_phase: name of the first phase.
        model_name: of the run; default: the name of checkpoint_dir.
        gold_selection: how the best checkpoint is chosen; its external gate is run.
        token_accuracy_saturation: see the specification.

    Returns:
        {"train": loss, "val": loss} of the last evaluation, 0-dim fp32 tensors.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the run is saved.
        ArgumentError: (a ValueError) for an argument out of its range.
        DataError: for a loader that is none.
        CheckpointError: if nothing can be written where it should be.
    """
    import torch

    from mypt_fast.checkpoint.lock import RunLock
    from mypt_fast.training.adopt import adopt, go_on
    from mypt_fast.training.schedule import warmup_steps
    from mypt_fast.training.trainer import Trainer

    peak = optimizer.param_groups[0]["lr"] if learning_rate is None else learning_rate
    train = TrainConfig(
        max_iters=int(max_iters), eval_interval=int(eval_interval), eval_iters=int(eval_iters),
        learning_rate=float(peak), warmup_iters=warmup_steps(warmup_iters, int(max_iters)),
        grad_clip=max(0.0, float(grad_clip or 0)), use_amp=bool(use_amp),
        amp_dtype=_dtype("amp_dtype", amp_dtype or "bf16"),
        grad_accum_steps=int(grad_accum_steps or 1),
        eval_max_new_tokens=int(eval_max_new_tokens), eval_prompts_file=_text(eval_prompts_file),
        log_file=_text(log_file), gold_selection=_gold(gold_selection), keep_last=0,
        token_accuracy_saturation=_section(Saturation, token_accuracy_saturation),
    )  # fmt: skip
    if eval_seed is not None:
        train.eval_seed = int(eval_seed)
    _check(train)
    settings = _settings(model, train, checkpoint_dir, model_name, config_file, dataset_dir)
    run = _run(model, settings)
    loaders = _Loaders(run, int(start_step))
    run.phases = loaders.phases(data_loader, data_loader_schedule or (), initial_phase or "train")
    run.eval_sets = {k: loaders.borrow(v) for k, v in (eval_data_loaders or {}).items()}
    final = None if final_save_dtype is None else _dtype("final_save_dtype", final_save_dtype)
    saved = model.config.save_dtype if save_dtype is None else save_dtype
    with RunLock(_directories(settings.run_dir, final)) as lock:
        if checkpoint_dir is not None:
            lock.acquire()
            for notice in lock.notices:
                console.notice(f"note: {notice}")
        parts = adopt(
            model, optimizer, run, keeps=checkpoint_dir is not None, final_dtype=final,
            save_dtype=None if saved is None else _dtype("save_dtype", saved), eval_seed=eval_seed,
        )  # fmt: skip
        try:
            go_on(run, parts, int(start_step), peak_given=learning_rate is not None)
            found = _train(Trainer(run, console.Live(train.max_iters, int(start_step)), parts))
        finally:
            model.plain_blocks()
            model.train()
            parts.log.close()
    assert found.train is not None
    return {"train": torch.tensor(found.train.loss), "val": torch.tensor(found.val.loss)}


def _train(trainer: Trainer) -> Found:
    """Train to the end; a signal saves first, and then is the caller's."""
    end, run_dir = trainer.train_cfg.max_iters, trainer.settings.run_dir
    if trainer.step >= end:
        console.say(f"at step {trainer.step} of {end}: nothing to train; raise max_iters to go on")
        return trainer.evaluate()
    with _signals() as stop:
        code = trainer.train(stop)
    if code:
        where = f"; the run is saved in {run_dir}" if trainer.store.keeps else ""
        text = f"stopped at step {trainer.step} of {end}{where}"
        raise KeyboardInterrupt(text) if code == SIGINT_CODE else SystemExit(code)
    assert trainer.final is not None
    return trainer.final


@contextlib.contextmanager
def _signals() -> Iterator[StopSignal]:
    """Hear signals, where that is possible: Python tells its main thread alone."""
    from mypt_fast.training.signals import StopSignal

    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    with stop:
        yield stop


def _settings(
    model: GPT,
    train: TrainConfig,
    checkpoint_dir: FilePath | None,
    model_name: str | None,
    config_file: FilePath | None,
    dataset_dir: FilePath | None,
) -> Settings:
    run_dir = Path(checkpoint_dir if checkpoint_dir is not None else model_name or "model")
    run_dir = run_dir if run_dir.name else run_dir.absolute()
    return Settings(
        model_name or run_dir.name,
        run_dir,
        model.config,
        train,
        DataConfig(dataset_dir=_text(dataset_dir)),
        preset_path=Path(config_file) if config_file else None,
        allow_gate=checkpoint_dir is not None,  # who calls fit with a gate wants it to run
        strict_compat=strict_compat(),
    )


def _run(model: GPT, settings: Settings) -> Run:
    """A run without data; what `open_run` opens, the caller has."""
    from mypt_fast.training import device as devices
    from mypt_fast.training.eval_prompts import read_prompts
    from mypt_fast.training.memory import MemoryPlan
    from mypt_fast.training.run import Run
    from mypt_fast.training.utilisation import find

    device, train = model.lm_head.weight.device, settings.train
    on_gpu = device.type == "cuda"
    precision, note = devices.precision(device, train.use_amp and on_gpu, train.amp_dtype, False)
    if note:
        console.notice(f"note: {note}")
    tokenizer: Any = KeptTokenizer(getattr(model, "tokenizer", None))
    prompts = {}
    if train.eval_prompts_file:
        prompts = read_prompts(train.eval_prompts_file, tokenizer)
    console.say(
        f"fit: {settings.global_batch} sequences of {settings.model.block_size} tokens a step, "
        f"{precision.name} on {device}"
    )
    settings.train.state = "exact"  # the optimizer is the caller's
    plan = MemoryPlan(settings.model.batch_size, model.recompute)
    ceilings, measured = find(device, precision, settings.model)
    if measured:
        console.notice(f"note: {measured}")
    return Run(
        settings, device, precision, tokenizer, [], {}, plan, "", 0, 0, 0,
        prompts=prompts, how_to_continue="run the script again to continue", ceilings=ceilings,
        mypt_words=True,
    )  # fmt: skip


class _Loaders:
    """A caller's loaders as phases: one object is one source, however often it is named."""

    def __init__(self, run: Run, start_step: int) -> None:
        self._run, self._start = run, start_step
        self._known: dict[int, Borrowed] = {}

    def borrow(self, loader: Any) -> Borrowed:
        """The loader as a source of batches; raises DataError for one without `get_batch`."""
        from mypt_fast.training.borrowed import Borrowed

        if id(loader) not in self._known:
            settings = self._run.settings
            folder = getattr(loader, "dataset_dir", None) or settings.data.dataset_dir
            self._known[id(loader)] = Borrowed(
                loader, batch_size=settings.model.batch_size, accum=settings.train.grad_accum_steps,
                device=self._run.device,
                name=str(folder or type(loader).__name__),
                position=self._start * settings.global_batch,
            )  # fmt: skip
        return self._known[id(loader)]

    def phases(
        self, first: Any, schedule: Iterable[tuple[int, Any, str]], name: str
    ) -> list[Phase]:
        """The phases from `start_step` on: switches before it are the caller's own.

        Raises:
            ArgumentError: for a schedule that is no list of (step, loader, name).
        """
        from mypt_fast.training.sources import Phase

        coming = []
        for entry in schedule:
            if not isinstance(entry, (tuple, list)) or len(entry) != 3:
                found = f"found {shown(entry)}"
                raise ArgumentError("data_loader_schedule: (step, loader, name) each", found)
            if int(entry[0]) >= self._start:
                coming.append((int(entry[0]), entry[1], str(entry[2])))
        coming.sort(key=lambda entry: entry[0])  # of equal steps the last counts, as in MyPT
        loaders = [(name, first), *((n, loader) for _, loader, n in coming)]
        ends = [*(step for step, _, _ in coming), None]
        phases = []
        for (phase, loader), until in zip(loaders, ends, strict=True):
            source = self.borrow(loader)
            phases.append(Phase(phase, until, source, source, source.fingerprint))
        return phases


class KeptTokenizer:
    """A caller's tokenizer: bundles keep its own state, prompts are for the engine's.

    Args:
        theirs: with `get_state()`, or None.
    """

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs
        self._engine: Any = None

    def get_state(self) -> dict[str, Any] | None:
        """Its state as it gives it; None without one."""
        state = getattr(self._theirs, "get_state", None)
        return state() if callable(state) else None

    def __getattr__(self, name: str) -> Any:
        """What the engine's tokenizer of that state has."""
        from mypt_fast.tokenizer import Tokenizer

        if name.startswith("__"):
            raise AttributeError(name)
        if self._engine is None:
            state = self.get_state()
            if state is None:
                raise ArgumentError("eval_prompts_file needs a tokenizer", "the model has none")
            self._engine = Tokenizer.from_state(state)
        return getattr(self._engine, name)


def _directories(run_dir: Path, final: str | None) -> list[Path]:
    ends = ("", "_gold", *([f"_{final}"] if final else []))
    return [run_dir.with_name(run_dir.name + end) for end in ends]


def _check(train: TrainConfig) -> None:
    for name in ("eval_interval", "eval_iters", "grad_accum_steps"):
        if getattr(train, name) < 1:
            raise ArgumentError(f"fit: {name} is at least 1", f"found {getattr(train, name)}")


def _dtype(argument: str, name: Any) -> str:
    word = _ALSO.get(str(name), str(name))
    known = ("bf16", "fp16") if argument == "amp_dtype" else DTYPE_NAMES
    if word == "bfloat16" and argument == "amp_dtype":
        word = "bf16"
    if word not in known:
        raise ArgumentError(f"fit: {argument}={shown(name)}", "", f"use one of {', '.join(known)}")
    return word


def _text(path: FilePath | None) -> str | None:
    return None if path is None else os.fspath(path)


def _gold(raw: Any) -> GoldSelection:
    """Gold settings as MyPT takes them: what it does not know is its default."""
    values = dict(raw) if isinstance(raw, Mapping) else {}
    if values.get("strategy") not in ("val_loss", "hybrid", "external_gate"):
        values.pop("strategy", None)
    return _section(GoldSelection, values) or GoldSelection()


def _section(cls: Any, raw: Any) -> Any:
    """Build a section of known keys; None for what is no object."""
    if not isinstance(raw, Mapping):
        return None
    try:
        return build(cls, _known(cls, raw), "fit")
    except ConfigError as e:
        raise ArgumentError(e.what, e.found, e.cure) from e


def _known(cls: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name not in raw:
            continue
        value = raw[f.name]
        if not dataclasses.is_dataclass(hints[f.name]):
            kept[f.name] = list(map(str, value or ())) if f.name == "args" else value
        elif isinstance(value, Mapping):
            kept[f.name] = _known(hints[f.name], value)
    return kept
