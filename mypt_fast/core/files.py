"""Models to files and back: the engine's bundles behind MyPT's save and load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mypt_fast import console, publish
from mypt_fast import model as engine
from mypt_fast.checkpoint import bundle, legacy
from mypt_fast.checkpoint.bundle import Bundle, _cast
from mypt_fast.config import ModelConfig
from mypt_fast.core.config import GPTConfig, strict_compat
from mypt_fast.core.errors import NoCheckpointError, SettingError, UnfitWeightsError
from mypt_fast.core.tokenizer import GPT2_SMALLEST, Tokenizer
from mypt_fast.errors import CheckpointError, DataError, IntegrityError
from mypt_fast.schema import build, shown

if TYPE_CHECKING:
    from mypt_fast.core.model import GPT

M = TypeVar("M", bound="GPT")
Path_ = str | os.PathLike[str]
Revived = tuple[M, dict[str, Any] | None, int | None, dict[str, Any] | None]
# every name MyPT accepts -> the one a bundle is written with
DTYPE_NAMES = {
    "fp32": "fp32", "float32": "float32", "f32": "fp32",
    "fp16": "fp16", "float16": "float16", "f16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bfloat16",
}  # fmt: skip
SIZES = ("block_size", "vocab_size", "n_embd", "n_head", "n_layer")
EMBEDDING, HEAD = "token_embedding_table.weight", "lm_head.weight"
CONFIG, WEIGHTS = "config.json", "model.pt"


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of a name, None for None; raises SettingError (a ValueError) for another."""
    known = dtype_name(name)
    return None if known is None else bundle.DTYPES[known]


def dtype_name(name: str | None) -> str | None:
    """The name a bundle is written with; raises SettingError (a ValueError) for an unknown one."""
    if name is None:
        return None
    if name not in DTYPE_NAMES:
        raise SettingError(f"unknown dtype {shown(name)}", cure=f"use {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def save_weights(model: GPT, directory: Path_, save_dtype: str | None) -> None:
    """As `GPT.save`; a manifest of other weights is removed with them."""
    name, path = dtype_name(save_dtype), Path(directory)
    state, native = model.state_dict(), model.lm_head.weight.dtype
    content: dict[str, Any] = dict(_cast(state, native if name is None else bundle.DTYPES[name]))
    if name is not None:
        content = {"state_dict": content, "checkpoint_dtype": name, "model_dtype": _plain(native)}
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".{WEIGHTS}.tmp"
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        (path / "manifest.json").unlink(missing_ok=True)
        os.replace(aside, path / WEIGHTS)
        publish.sync_directory(path)
    except (OSError, RuntimeError) as e:  # torch.save reports a failed write as RuntimeError
        aside.unlink(missing_ok=True)
        found = getattr(e, "strerror", None) or " ".join(str(e).split())[:150]
        raise CheckpointError(f"cannot save {path / WEIGHTS}", found) from e


def save_bundle(
    model: GPT,
    directory: Path_,
    step: int | None,
    optimizer_state: dict[str, Any] | None,
    training_config: dict[str, Any] | None,
    save_dtype: str | None,
) -> None:
    """As `GPT.save_checkpoint_bundle`; what other writers keep in the directory stays."""
    name = dtype_name(save_dtype or model.config.save_dtype)
    state: dict[str, Any] = {} if step is None else {"step": step}
    if training_config is not None:
        state["training_config"] = json.loads(json.dumps(training_config, default=_in_json))
    state["model_dtype_at_save"] = _plain(model.lm_head.weight.dtype)
    if name is not None:
        state["checkpoint_dtype"] = name
    if optimizer_state is not None:
        state["optimizer_file"] = "optimizer.pt"
    path = Path(directory)
    gold = path / "gold_selection_state.json"
    bundle.write(
        path,
        config=model.config.to_dict(),
        state_dict=model.state_dict(),
        training_state=state,
        tokenizer=state_of(model.tokenizer),
        optimizer=None if optimizer_state is None else _on_cpu(optimizer_state),
        gold_state=_json(gold) if gold.is_file() else None,
        original_config=_original(path, training_config),
        save_dtype=name,
    )


def state_of(tokenizer: Any) -> dict[str, Any] | None:
    """What tokenizer.json holds; None for no tokenizer, and for a script's own without a state."""
    get_state = getattr(tokenizer, "get_state", None)
    state: dict[str, Any] | None = None if get_state is None else get_state()
    return state


def _original(path: Path, training_config: dict[str, Any] | None) -> bytes | None:
    """Bytes of the preset the run was started with, or of the copy an earlier save made."""
    named = (training_config or {}).get("config_file")
    for file in ((Path(named),) if named else ()) + (path / "original_config.json",):
        if file.is_file():
            return file.read_bytes()
    return None


def _in_json(value: Any) -> Any:
    """What JSON has no word for: NumPy's numbers as numbers, the rest, such as paths, as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    return [_on_cpu(v) for v in value] if isinstance(value, list) else value


def read_bundle(directory: Path_, optimizer: bool) -> Bundle:
    """Read and verify a bundle; raises NoCheckpointError (a FileNotFoundError) if there is none."""
    path = Path(directory)
    try:
        return bundle.read(path, optimizer=optimizer)
    except (CheckpointError, IntegrityError) as e:
        absent = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if not absent:
            raise
        cure = "check the name, or train it first"
        raise NoCheckpointError(f"{path / absent[0]} is missing", e.found, cure) from e


def read_legacy(path: Path_, optimizer: bool = True) -> Bundle:
    """Read a single-file checkpoint of any era, its weights in today's layout.

    Raises:
        NoCheckpointError: (a FileNotFoundError) if it is not there.
        CheckpointError, IntegrityError: if it is none.
    """
    file = Path(path)
    if not file.is_file():
        raise NoCheckpointError(f"{file} is missing", cure="check the name")
    return legacy.read(file, optimizer=optimizer)


def revived(
    cls: type[M], saved: Bundle, map_location: Any, load_dtype: str | None, to_train: bool
) -> Revived[M]:
    """Make the model of what was read; returns and raises as `GPT.load`."""
    wanted = dtype_named(load_dtype)
    for notice in saved.notices:
        console.notice(notice)
    where = str(saved.path)
    config = _checked_config(saved, where)
    if isinstance(map_location, (str, torch.device)):
        config.device = str(map_location)
    device = _device(config)
    tokenizer = _tokenizer(config, saved.tokenizer, where)
    model = blank(cls, config, tokenizer)
    load_weights(model, saved.state_dict, where)
    model.to(device, wanted or resting_dtype(saved, device, to_train))
    return model.eval(), saved.tokenizer, saved.training_state.get("step"), saved.optimizer


def _checked_config(saved: Bundle, where: str) -> GPTConfig:
    """The config of a bundle; its sizes are checked before memory is taken for them."""
    sizes = {k: saved.config[k] for k in SIZES if k in saved.config}
    build(ModelConfig, sizes, f"{where}: config.json")
    config = GPTConfig.from_dict(saved.config)
    expected, found = (config.vocab_size, config.n_embd), saved.state_dict.get(EMBEDDING)
    if found is not None and tuple(found.shape) != expected:
        raise _unfit(where, EMBEDDING, expected, tuple(found.shape))
    return config


def _device(config: GPTConfig) -> torch.device:
    """The config's device; the CPU, and a word of it, where a GPU was saved and none is here."""
    try:
        device = torch.device(config.device or "cpu")
    except RuntimeError as e:
        cure = "edit config.json, or give map_location"
        raise SettingError(f"unknown device {shown(config.device)}", cure=cure) from e
    if device.type == "cuda" and not torch.cuda.is_available():
        console.notice(f"device {device} is stored with the model; no GPU here, using the CPU")
        device, config.device = torch.device("cpu"), "cpu"
    return device


def _tokenizer(config: GPTConfig, state: dict[str, Any] | None, where: str) -> Tokenizer:
    """The bundle's tokenizer; where it cannot be used, a word of it and the default kind."""
    problem = f"{where}: no tokenizer.json"
    if state is not None:
        try:
            return Tokenizer.from_state(config, state)
        except DataError as e:
            problem = f"{where}: {e}"
    kind = "gpt2" if config.vocab_size >= GPT2_SMALLEST else "char"
    console.notice(f"{problem}; using a new {kind} tokenizer")
    return Tokenizer(config, kind)


def blank(cls: type[M], config: ModelConfig, tokenizer: Tokenizer | None) -> M:
    """A model whose weights are yet to be loaded: none drawn, the global generator untouched."""
    model = cls.__new__(cls)
    engine.GPT.__init__(model, config, seed=None)
    model.tokenizer = tokenizer  # type: ignore[assignment]
    return model


def load_weights(model: GPT, state: dict[str, Tensor], where: str) -> None:
    """Copy weights into a model; in a tied one the embedding wins.

    Raises:
        UnfitWeightsError: (a RuntimeError) naming the first key that does not fit.
    """
    weights = dict(state)
    if model.config.tie_weights and EMBEDDING in weights:
        weights[HEAD] = weights[EMBEDDING]
    wanted = model.state_dict()
    for key, value in wanted.items():
        if key not in weights:
            raise _unfit(where, key, tuple(value.shape), "no such key")
        if weights[key].shape != value.shape:
            raise _unfit(where, key, tuple(value.shape), tuple(weights[key].shape))
    for key in weights:
        if key not in wanted:
            raise _unfit(where, key, "no such key", tuple(weights[key].shape))
    model.load_state_dict(weights)


def _unfit(where: str, key: str, expected: object, found: object) -> UnfitWeightsError:
    return UnfitWeightsError(
        f"{where}: the weights do not fit config.json",
        f"{shown(key)[1:-1]}: expected {expected}, found {found}",
        "restore the files that were saved together",
    )


def resting_dtype(saved: Bundle, device: torch.device, to_train: bool) -> torch.dtype:
    """What weights are kept in: those to train on exact, a bf16 checkpoint's small on a GPU."""
    rounded = saved.training_state.get("checkpoint_dtype") in ("bf16", "bfloat16")
    if device.type != "cuda" or not rounded or (to_train and not strict_compat()):
        return torch.float32
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Refuse moments of other shapes than their parameters', which torch does not notice.

    Raises:
        ValueError: naming both shapes.
    """
    for p, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != p.shape:
                raise ValueError(
                    f"{name} is {tuple(state[name].shape)} for a parameter {tuple(p.shape)}"
                )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
