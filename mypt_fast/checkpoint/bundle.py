"""MyPT's checkpoint bundle: five files and a manifest of their hashes, read and written whole.

Format: MyPT specification 5. `manifest.json` is ours; MyPT ignores it.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from mypt_fast import __version__
from mypt_fast.checkpoint import eras
from mypt_fast.checkpoint.manifest import (
    JSON_FILES,
    MANIFEST_SCHEMA,
    OWNED,
    TENSOR_FILES,
    EditError,
    content_hash,
    exists,
    is_whole_archive,
    matches,
    read_info,
    seal,
    verified,
)
from mypt_fast.checkpoint.snapshots import parent_of, prune, retirement, snapshots
from mypt_fast.checkpoint.tensors import load, tensor_entries
from mypt_fast.errors import CheckpointError, IntegrityError
from mypt_fast.publish import staged
from mypt_fast.tokenizer import SPECIAL_STRINGS
from mypt_fast.tokenizer_state import state_for

__all__ = [
    "JSON_FILES",
    "TENSOR_FILES",
    "Bundle",
    "check_writable",
    "exists",
    "read",
    "read_info",
    "write",
]

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


@dataclass
class Bundle:
    """What a bundle directory holds."""

    path: Path
    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    tokenizer: dict[str, Any] | None = None
    training_state: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    notices: list[str] = field(default_factory=list)


class _HashingFile:
    """A binary file that hashes what is written; torch.save's target, so bytes are hashed once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.size = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.size += memoryview(data).nbytes
        self._file.write(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "xxh3_128": self._hash.hexdigest()}


@contextlib.contextmanager
def _durable(path: Path, files: dict[str, Any]) -> Iterator[_HashingFile]:
    with open(path, "wb") as f:
        hashing = _HashingFile(f)
        yield hashing
        f.flush()
        os.fsync(f.fileno())
    files[path.name] = hashing.entry()


def write(
    target: Path,
    *,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    gold_state: Mapping[str, Any] | None = None,
    original_config: bytes | None = None,
    save_dtype: str | None = None,
    state: Mapping[str, Any] | None = None,
    keep_last: int = 0,
) -> None:
    """Write a bundle and publish it at `target` in one step.

    Args:
        target: `checkpoints/<name>`; its parent is made if missing.
        config: MyPT's GPTConfig fields.
        state_dict: fp32 weights by MyPT's keys.
        training_state: `step`, `training_config` and what else a resume needs.
        tokenizer: tokenizer state.
        optimizer: `optimizer.state_dict()`, or None for a bundle to deploy.
        gold_state: content of gold_selection_state.json.
        original_config: bytes of the preset file the run was started with.
        save_dtype: dtype of the weights in model.pt. Below fp32 the exact master weights go into
            optimizer.pt under `master_weights`, where MyPT does not look.
        state: what goes into the manifest beside the hashes: RNG, data position, log position.
        keep_last: how many of the states before this one stay as hidden snapshots. The oldest is
            removed only after the new bundle was read back.

    Raises:
        CheckpointError: if the disk refuses; the bundle that was there is intact.
    """
    dtype = DTYPES[save_dtype or "fp32"]
    cast = _cast(state_dict, dtype)
    members: dict[str, Any] = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "gold_selection_state.json": gold_state,
        "training_state.json": training_state,
    }
    model = {"state_dict": cast, "checkpoint_dtype": save_dtype, "model_dtype": "float32"}
    if optimizer is not None and dtype is not torch.float32:
        master = {k: v.detach().cpu() for k, v in state_dict.items()}
        optimizer = {**optimizer, "master_weights": master}
    files: dict[str, Any] = {}
    contents: dict[str, str] = {}
    step = training_state.get("step")
    retire = retirement(target, keep_last, step) if type(step) is int else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(target, OWNED, retire=retire) as aside:
            for name, content in (("model.pt", model), ("optimizer.pt", optimizer)):
                if content is not None:
                    with _durable(aside / name, files) as f:
                        torch.save(content, f)  # type: ignore[arg-type]  # it only writes
            for name, content in members.items():
                if content is not None:
                    with _durable(aside / name, files) as f:
                        f.write(_json_bytes(content))
                    contents[name] = content_hash(_plain(content))
            if original_config is not None:
                with _durable(aside / "original_config.json", files) as f:
                    f.write(original_config)
            tensors = {"model.pt": tensor_entries(model), "optimizer.pt": tensor_entries(optimizer)}
            manifest = {
                "format": "mypt_fast bundle",
                "schema": MANIFEST_SCHEMA,
                "mypt_fast": __version__,
                "torch": torch.__version__,
                "parent": parent_of(target),
                "config_hash": content_hash(_plain(config)),
                "files": dict(files),
                "contents": contents,
                "tensors": {name: entries for name, entries in tensors.items() if entries},
                "members": {
                    "config.json": config,
                    "training_state.json": training_state,
                },
                **(state or {}),
            }
            if "rng" in manifest:
                manifest["rng_hash"] = content_hash(_plain(manifest["rng"]))
            with _durable(aside / "manifest.json", {}) as f:
                f.write(_json_bytes(seal(_plain(manifest))))
            _read_back(aside, files)
            if not target.exists():
                prune(target, 0)  # snapshots of a run that is gone are not this one's past
    except (OSError, RuntimeError, MemoryError) as e:  # torch.save raises RuntimeError
        found = getattr(e, "strerror", None) or _first_line(e)
        raise CheckpointError(
            f"cannot save {target}", found, "the previous checkpoint is intact; fix this and rerun"
        ) from e


def _plain(content: Any) -> Any:
    """Return content as JSON gives it back: lists for tuples, strings for keys."""
    return json.loads(json.dumps(content))


def _read_back(folder: Path, files: Mapping[str, Any]) -> None:
    for name, entry in files.items():
        if not matches(folder / name, entry):
            raise OSError(errno.EIO, f"{name} reads back differently", str(folder / name))


def _cast(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy to the CPU in `dtype`; tensors that share memory still do, and are stored once."""
    seen: dict[int, Tensor] = {}
    out = {}
    for name, value in state_dict.items():
        if value.is_floating_point():
            key = value.data_ptr()
            if key not in seen:
                seen[key] = value.detach().to("cpu", dtype)
            value = seen[key]
        out[name] = value.cpu()
    return out


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:150] if lines else type(error).__name__


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def check_writable(target: Path) -> None:
    """Refuse a run whose first save would fail: raises CheckpointError."""
    real = Path(os.path.realpath(target))
    probe = real.parent / f".{real.name}.tmp-{os.getpid()}"
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as e:
        raise CheckpointError(
            f"cannot write to {target.parent}", e.strerror or str(e), "run in a writable folder"
        ) from e


def read(path: Path, *, optimizer: bool = True, walk_back: bool = True) -> Bundle:
    """Read and verify a bundle.

    Every file is checked against the manifest before it is used. A JSON member edited by hand
    and a bundle that another program rewrote are accepted with a notice.

    Args:
        path: the bundle.
        optimizer: read optimizer.pt too, and the exact weights it may hold.
        walk_back: where the bundle is damaged, read its newest good snapshot and say so.

    Raises:
        CheckpointError: if there is no bundle.
        IntegrityError: if weights or optimizer state are not the bytes that were saved, or not
            readable.
    """
    try:
        return _read_one(path, optimizer)
    except EditError:
        raise
    except IntegrityError as damage:
        for older in snapshots(path) if walk_back else ():
            try:
                found = _read_one(older, optimizer)
            except (CheckpointError, IntegrityError):
                continue
            step = found.training_state.get("step")
            found.notices.insert(
                0, f"{damage.what}; {damage.found}; reading its state of step {step}"
            )
            return found
        raise


def _read_one(path: Path, optimizer: bool) -> Bundle:
    if not exists(path):
        if (path / "manifest.json").is_file():
            absent = "model.pt" if (path / "config.json").is_file() else "config.json"
            raise IntegrityError(f"{path / absent} is missing", "manifest.json lists it")
        raise CheckpointError(
            f"no checkpoint in {path}",
            "config.json and model.pt are not both there",
            "check --model_name, or train it first",
        )
    info = read_info(path)
    checked = verified(path, info, optimizer)
    bundle = Bundle(path, info.get("config", {}), {}, info.get("tokenizer"))
    bundle.training_state = info.get("training_state", {})
    bundle.manifest, bundle.notices = checked.manifest, checked.notices
    if optimizer and "training_state" not in info:
        bundle.notices.append(f"{path.name}: no training_state.json; its steps count from 0")
    if checked.manifest is None:
        _check_archives(path, optimizer)
    bundle.state_dict, model_file = _weights(path)
    if optimizer and (path / "optimizer.pt").is_file():
        state = load(path / "optimizer.pt")
        if not isinstance(state, dict) or "param_groups" not in state:
            raise IntegrityError(f"{path / 'optimizer.pt'}: not an optimizer state")
        master = state.pop("master_weights", None)
        if master is not None and bundle.manifest is not None:
            bundle.state_dict = master  # the exact weights behind a bf16 or fp16 model.pt
        bundle.optimizer = state
    elif optimizer and model_file.get("checkpoint_dtype") in (
        "bf16",
        "bfloat16",
        "fp16",
        "float16",
    ):
        bundle.notices.append(
            f"{path.name}: weights were saved in {model_file['checkpoint_dtype']}"
        )
    if eras.is_per_head(bundle.state_dict):
        _modernise(bundle)
    return bundle


def _modernise(bundle: Bundle) -> None:
    """Bring weights and moments of the per-head era into today's layout."""
    where = str(bundle.path / "model.pt")
    new = eras.modernise(bundle.config, bundle.state_dict, bundle.optimizer, where)
    bundle.config, bundle.state_dict = new.config.to_dict(), new.weights
    bundle.optimizer = new.optimizer
    if bundle.tokenizer is not None:
        size, n_special = new.config.vocab_size, len(SPECIAL_STRINGS)
        bundle.tokenizer = state_for(bundle.tokenizer, size, n_special)
    bundle.notices += [f"{where} is of the per-head era: read as one qkv, with ReLU", *new.notices]


def _check_archives(path: Path, optimizer: bool) -> None:
    """Without our hashes, the archives' own CRC-32 finds a flipped bit."""
    for name in TENSOR_FILES if optimizer else ("model.pt",):
        if (path / name).is_file() and not is_whole_archive(path / name):
            raise IntegrityError(
                f"cannot read {path / name}", "it is no archive of torch.save, or was damaged",
                f"restore it, or resume from {path.name}_gold if it exists",
            )  # fmt: skip


def _weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = load(path / "model.pt")
    if not isinstance(content, dict):
        raise IntegrityError(
            f"{path / 'model.pt'}: expected a dict", f"found {type(content).__name__}"
        )
    wrapped = content if "state_dict" in content else {"state_dict": content}
    weights = wrapped["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise IntegrityError(f"{path / 'model.pt'}: not a dict of tensors")
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, wrapped
