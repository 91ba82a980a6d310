"""Open everything a run needs: device, tokenizer, data, micro-batch. Training starts after."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mypt_fast import accounting, console
from mypt_fast.config import CurriculumPhase
from mypt_fast.data.loader import TokenCorpus, TokenLoader
from mypt_fast.errors import ConfigError, DataError
from mypt_fast.presets import read_json
from mypt_fast.settings import Settings
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.training import device as devices

MEMORY_SHARE = 0.9  # of what is free: the estimate is not exact, and others use the machine


@dataclass
class Phase:
    """A stretch of steps on one dataset."""

    name: str
    until: int | None
    train: TokenLoader
    val: TokenLoader
    source: str


@dataclass
class Run:
    """An opened run."""

    settings: Settings
    device: torch.device
    precision: devices.Precision
    tokenizer: Tokenizer
    phases: list[Phase]
    eval_sets: dict[str, TokenLoader]
    micro_batch: int
    loader_note: str
    train_tokens: int
    val_tokens: int
    free_bytes: int
    notices: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Let go of the data files."""
        loaders = [*self.eval_sets.values(), *(x for p in self.phases for x in (p.train, p.val))]
        for loader in loaders:
            loader.close()

    def phase_at(self, step: int) -> int:
        """Index of the phase that supplies the data of `step`."""
        for i, phase in enumerate(self.phases):
            if phase.until is None or step < phase.until:
                return i
        return len(self.phases) - 1


def open_run(settings: Settings, progress: Callable[..., Any] | None = None) -> Run:
    """Open device, tokenizer and data, and choose the micro-batch.

    `settings.model` is completed on the way: vocabulary from the tokenizer, device.

    Raises:
        DeviceError, DataError, ConfigError: one line each, before any weight is made.
    """
    cfg, typed = settings.model, settings.typed
    device, note = devices.pick(cfg.device, explicit="device" in typed)
    precision, amp_note = devices.precision(
        device, settings.train.use_amp, settings.train.amp_dtype, explicit="amp_dtype" in typed
    )
    notices = [n for n in (note, amp_note) if n]
    cfg.device = device.type
    opener = _DataOpener(settings, notices, progress)
    tokenizer, phases, train_tokens, val_tokens = opener.open()
    eval_sets = opener.eval_sets(tokenizer)
    if cfg.use_loss_mask:
        notices.append("use_loss_mask is off for this run: token datasets carry no masks")
    free = devices.free_bytes(device)
    return Run(
        settings, device, precision, tokenizer, phases, eval_sets,
        micro_batch=_micro_batch(settings, device, precision, free, notices),
        loader_note=opener.loader_note, train_tokens=train_tokens, val_tokens=val_tokens,
        free_bytes=free, notices=notices,
    )  # fmt: skip


class _DataOpener:
    """Resolves the data source of a run: a dataset, a text file, phases, or the demo corpus."""

    def __init__(self, settings: Settings, notices: list[str], progress: Callable[..., Any] | None) -> None:  # fmt: skip
        self.settings, self.notices, self.progress = settings, notices, progress
        self.loader_note = ""
        path = settings.run_dir / "tokenizer.json"
        has_saved = settings.resume and path.is_file()
        self.saved_tokenizer = read_json(path, "tokenizer", 64 << 20) if has_saved else None

    def open(self) -> tuple[Tokenizer, list[Phase], int, int]:
        """Open the training data; returns tokenizer, phases and token counts."""
        data, curriculum = self.settings.data, self.settings.train.curriculum
        if data.input_file:
            tokenizer, corpora = self._text(Path(data.input_file))
            self._fit_vocabulary(tokenizer, data.input_file)
            phases = [self._phase("train", None, corpora, data.input_file)]
            return tokenizer, phases, corpora[0].n_tokens, corpora[1].n_tokens
        parts = list(curriculum.phases) if curriculum else []
        if not parts:
            parts = [CurriculumPhase(name="train", dataset_dir=data.dataset_dir or self._demo())]
        elif data.dataset_dir:
            parts[0] = CurriculumPhase(**{**vars(parts[0]), "dataset_dir": data.dataset_dir})
        tokenizer = self._dataset_tokenizer(parts[0].dataset_dir)
        self._fit_vocabulary(tokenizer, parts[0].dataset_dir)
        opened = []
        for part in parts:
            self._same_tokenizer(tokenizer, part.dataset_dir)
            corpora = self._dataset(part.dataset_dir)
            opened.append((part, corpora))
        phases = [self._phase(p.name or f"phase {i + 1}", p.until_iter, c, p.dataset_dir) for i, (p, c) in enumerate(opened)]  # fmt: skip
        data.dataset_dir = parts[0].dataset_dir
        return tokenizer, phases, opened[0][1][0].n_tokens, opened[0][1][1].n_tokens

    def eval_sets(self, tokenizer: Tokenizer) -> dict[str, TokenLoader]:
        """Open the further validation sets, by name."""
        named = dict(self.settings.train.eval_sets or {})
        if self.settings.data.eval_dataset_dir:
            named["general"] = self.settings.data.eval_dataset_dir
        loaders = {}
        for name, folder in named.items():
            self._same_tokenizer(tokenizer, folder)
            loaders[name] = self._eval_loader(TokenCorpus.from_dataset(folder, "val"))
        return loaders

    def _phase(
        self, name: str, until: int | None, corpora: tuple[TokenCorpus, TokenCorpus], source: str
    ) -> Phase:
        cfg, s = self.settings.model, self.settings
        train = TokenLoader(
            corpora[0], cfg.block_size, seed=s.train.seed, global_batch=s.global_batch,
            vocab_size=cfg.vocab_size,
        )  # fmt: skip
        self.loader_note = corpora[0].backend_note
        return Phase(name, until, train, self._eval_loader(corpora[1]), source)

    def _eval_loader(self, corpus: TokenCorpus) -> TokenLoader:
        cfg = self.settings.model
        seed = self.settings.train.eval_seed
        return TokenLoader(corpus, cfg.block_size, seed=seed, vocab_size=cfg.vocab_size)

    def _dataset(self, folder: str) -> tuple[TokenCorpus, TokenCorpus]:
        path = Path(folder)
        return TokenCorpus.from_dataset(path, "train"), TokenCorpus.from_dataset(path, "val")

    def _demo(self) -> str:
        from mypt_fast.data.prepare import ensure_demo_dataset

        if self.settings.resume:
            raise DataError(
                f"{self.settings.run_dir} does not say what data it was trained on",
                cure="name it with --dataset_dir or --input_file",
            )
        kind = self._tokenization()
        folder = Path("data") / f"demo_{kind}"
        self.notices.append(f"no data named: training on Python's standard library sources ({kind} tokens, {folder})")  # fmt: skip
        return str(ensure_demo_dataset(folder, kind, self.progress))

    def _tokenization(self) -> str:
        """Char for a vocabulary that cannot hold GPT-2's, unless the user says."""
        small = self.settings.model.vocab_size < 50257
        return self.settings.data.tokenization or ("char" if small else "gpt2")

    def _text(self, path: Path) -> tuple[Tokenizer, tuple[TokenCorpus, TokenCorpus]]:
        import numpy as np

        text = _read_text(path)
        if self.saved_tokenizer is not None:
            tokenizer = Tokenizer.from_state(self.saved_tokenizer)
        elif self._tokenization() == "char":
            tokenizer = Tokenizer.from_text(text)
        else:
            tokenizer = Tokenizer.gpt2()
        tokens = np.asarray(tokenizer.encode_to_numpy(text))
        cut = int(0.9 * len(tokens))
        return tokenizer, (TokenCorpus.from_tokens(tokens[:cut]), TokenCorpus.from_tokens(tokens[cut:]))  # fmt: skip

    def _dataset_tokenizer(self, folder: str) -> Tokenizer:
        path = Path(folder) / "tokenizer_state.json"
        if not Path(folder).is_dir():
            raise DataError(f"no dataset {folder}", "no such folder", "make it with `mypt-fast prepare`")  # fmt: skip
        if not path.is_file():
            raise DataError(f"{path} is missing", cure=f"prepare {folder} again, or copy its tokenizer state there")  # fmt: skip
        return Tokenizer.from_state(read_json(path, "tokenizer", 64 << 20))

    def _same_tokenizer(self, tokenizer: Tokenizer, folder: str) -> None:
        other = self._dataset_tokenizer(folder)
        expected = self.saved_tokenizer and Tokenizer.from_state(self.saved_tokenizer)
        for known, whose in ((tokenizer, "this run's data"), (expected, "the saved run")):
            if known and not _interchangeable(known, other):
                raise DataError(
                    f"{folder} has another vocabulary than {whose}",
                    f"{other.kind} with {other.n_tokens} tokens, not {known.kind} with {known.n_tokens}",
                    "prepare it with the same tokenizer",
                )  # fmt: skip

    def _fit_vocabulary(self, tokenizer: Tokenizer, source: str) -> None:
        cfg = self.settings.model
        needed = tokenizer.model_vocab_size
        if self.settings.resume:
            if tokenizer.n_tokens > cfg.vocab_size:
                raise DataError(
                    f"vocabulary of {source} does not fit the model",
                    f"{tokenizer.n_tokens} tokens, model {cfg.vocab_size}",
                    "use the data the model was trained on, or start another run",
                )
        elif tokenizer.kind == "gpt2":
            if cfg.vocab_size < tokenizer.n_tokens:
                raise DataError(
                    f"vocabulary of {source} (gpt2, {tokenizer.n_tokens} tokens) does not fit the model",
                    f"vocab_size {cfg.vocab_size}",
                    "prepare the data with --tokenization char, or use a preset with vocab_size 50304",
                )  # fmt: skip
        else:
            cfg.vocab_size = needed


def _interchangeable(a: Tokenizer, b: Tokenizer) -> bool:
    """Same ids for the same text; the padded model size may differ."""
    states = [{k: v for k, v in t.get_state().items() if k != "model_vocab_size"} for t in (a, b)]
    return states[0] == states[1]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}", e.strerror or str(e), "check --input_file") from e
    if not data.strip():
        raise DataError(f"{path} is empty", cure="name a text file with something in it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text", f"byte {e.start}", "convert it, or name a text file") from e  # fmt: skip
    if "\0" in text:
        raise DataError(f"{path} is not text", f"NUL at character {text.index(chr(0))}")
    return text


def _micro_batch(
    settings: Settings,
    device: torch.device,
    precision: devices.Precision,
    free: int,
    notices: list[str],
) -> int:
    """Sequences per forward: as typed, as the saved run chose, or the largest that fits."""
    cfg, wanted = settings.model, settings.train.micro_batch_size
    if wanted > settings.global_batch:
        raise ConfigError("micro_batch_size is larger than the global batch", f"found {wanted} > {settings.global_batch}")  # fmt: skip
    if wanted:
        return wanted
    plan = settings.saved_state.get("plan")
    if isinstance(plan, dict) and plan.get("global_batch") == settings.global_batch:
        saved = plan.get("micro_batch_size")
        if isinstance(saved, int) and 0 < saved <= settings.global_batch:
            return saved  # another split would draw dropout in another order
    element = 4 if precision.dtype is torch.float32 else 2
    usable = int(free * MEMORY_SHARE)
    matrix = device.type == "cpu"
    rows = accounting.micro_batch_that_fits(
        cfg, usable, element_bytes=element, attention_matrix=matrix
    )
    if rows is None and not cfg.use_checkpoint:
        cfg.use_checkpoint = True
        rows = accounting.micro_batch_that_fits(
            cfg, usable, element_bytes=element, attention_matrix=matrix
        )
        if rows:
            notices.append("use_checkpoint is on: keeping every activation would not fit memory")
    if rows is None:
        need = accounting.state_bytes(cfg).total
        notices.append(
            f"this model may not fit: weights, gradients and moments take {console.bytes_text(need)}"
            f" of {console.bytes_text(free)} free"
        )
    return rows or 1


def estimated_tokens_per_s(run: Run) -> float:
    """A rough speed from a short matmul on this device; model FLOPs at 60 % of it."""
    n, dtype = 1024, run.precision.dtype
    a = torch.ones(n, n, device=run.device, dtype=dtype)
    deadline, done = time.perf_counter() + 0.15, 0
    a @ a
    _settle(run.device)
    start = time.perf_counter()
    while time.perf_counter() < deadline:
        a @ a
        _settle(run.device)
        done += 1
    rate = 2 * n**3 * max(done, 1) / (time.perf_counter() - start)
    return 0.6 * rate / accounting.flops_per_token(run.settings.model)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plan_lines(run: Run, start_step: int, compiled: bool) -> list[str]:
    """The plan of a run as people read it, before it starts."""
    s, cfg, tc = run.settings, run.settings.model, run.settings.train
    tokens_per_step = s.global_batch * cfg.block_size
    steps = max(0, tc.max_iters - start_step)
    n = accounting.count_parameters(cfg).total
    needed = accounting.state_bytes(cfg).total + accounting.HEAD_CHUNK_BYTES
    matrix, element = run.device.type == "cpu", 4 if run.precision.dtype is torch.float32 else 2
    needed += run.micro_batch * accounting.activation_bytes(cfg, element_bytes=element, attention_matrix=matrix)  # fmt: skip
    speed = estimated_tokens_per_s(run)
    eta = steps * tokens_per_step / speed
    passes = tc.max_iters * tokens_per_step / run.train_tokens
    micro_steps = math.ceil(s.global_batch / run.micro_batch)
    span = f"{start_step} to {tc.max_iters}"
    ways = [run.precision.name, "compiled" if compiled else "eager"]
    ways += ["activations recomputed"] if cfg.use_checkpoint else []
    return [
        f"run     {s.model_name}: steps {span} in {s.run_dir}" + (" (resumed)" if s.resume else ""),
        f"model   {console.count(n)} parameters: {cfg.n_layer} layers x {cfg.n_embd}, context "
        f"{cfg.block_size}, {run.tokenizer.kind} vocabulary of {cfg.vocab_size}",
        f"data    {run.phases[0].source}: {console.count(run.train_tokens)} train and "
        f"{console.count(run.val_tokens)} val tokens; {passes:.2g} passes over it",
        f"batch   {s.global_batch} sequences = {tokens_per_step:,} tokens a step, in {micro_steps} "
        f"micro-step(s) of {run.micro_batch}",
        f"device  {devices.describe(run.device)}: {', '.join(ways)}; {run.loader_note}",
        f"memory  about {console.bytes_text(needed)} of {console.bytes_text(run.free_bytes)} free",
        f"time    about {_time_text(eta)} at {console.count(speed)} tokens/s (estimated from a matmul)",
    ]


def _time_text(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 120 else console.duration(seconds)
