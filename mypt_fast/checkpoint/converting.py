"""Rewrite an old checkpoint as a bundle in today's layout, and compare what both compute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast.accounting import count_parameters
from mypt_fast.checkpoint import legacy
from mypt_fast.checkpoint.legacy import FINAL, INFERENCE, LATEST, find, is_per_head_bundle
from mypt_fast.checkpoint.manifest import TENSOR_FILES, exists, read_info
from mypt_fast.config import ModelConfig
from mypt_fast.errors import CheckpointError, IntegrityError, MyptError
from mypt_fast.schema import build, field_names

if TYPE_CHECKING:
    from torch import Tensor

    from mypt_fast.checkpoint.bundle import Bundle
    from mypt_fast.model import GPT

KEPT = ".legacy"  # behind the names of tensor files whose layout a save replaced
TOLERANCE = 1e-4  # of the largest logit; the mapping itself costs 1e-6


@dataclass
class Converted:
    """What a conversion did, or would do."""

    source: Path
    target: Path
    step: int | None
    n_params: int
    difference: float  # largest |logit of the file - logit of the bundle|
    has_moments: bool
    kept: list[Path] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def source_of(directory: Path, filename: str | None = None) -> Path:
    """What `convert` would read: a single file, or the directory of a per-head bundle.

    Raises:
        CheckpointError: if there is nothing to convert.
    """
    if filename is not None:
        file = directory / filename
        if file.is_file():
            return file
        here = [p.name for p in sorted(directory.glob("*.pt"))] if directory.is_dir() else []
        raise CheckpointError(
            f"no file {file}", f"found {', '.join(here[:5])}" if here else "found no checkpoint",
            "check --model_name and --checkpoint",
        )  # fmt: skip
    if exists(directory):
        if is_per_head_bundle(directory):
            return directory
        raise CheckpointError(
            f"{directory} is a bundle in today's layout", "nothing to convert",
            f"--checkpoint {LATEST} converts that file over it",
        )  # fmt: skip
    if found := find(directory, INFERENCE):
        return found
    raise CheckpointError(
        f"no checkpoint to convert in {directory}", f"neither {LATEST} nor {FINAL} is there",
        "check --model_name, or name the file with --checkpoint",
    )  # fmt: skip


def convert(directory: Path, filename: str | None = None, *, write: bool = True) -> Converted:
    """Write a single file's bundle beside it, or a per-head bundle in today's layout.

    The file stays; the tensor files of a bundle that is replaced stay under `<name>.legacy`.
    Before anything is written, the mapped weights have to compute what the file's own do;
    afterwards the bundle is read back and compared again. Whoever calls holds the run's lock.

    Args:
        directory: of the run; a bundle that is there is replaced.
        filename: single file to convert; default: a per-head bundle, else latest.pt, else final.pt.
        write: without it everything but the writing happens.

    Raises:
        CheckpointError: if there is nothing to convert, or the disk refuses.
        IntegrityError: for a damaged file.
    """
    from mypt_fast.checkpoint import bundle

    source = source_of(directory, filename)
    raw, new = _both(source)
    expected = _logits_of_file(raw, new)
    out = Converted(
        source, directory, new.training_state.get("step"),
        count_parameters(_config(new)).total, _difference(expected, new),
        new.optimizer is not None, notices=list(new.notices),
    )  # fmt: skip
    if new.config.get("per_head_era") and new.config["bias"]:
        out.notices.append(
            "MyPT itself would load this bundle and compute with GELU, where these weights need "
            "ReLU: run it with mypt-fast"
        )
    if not write:
        return out
    aside = keep_aside(directory) if exists(directory) else []
    try:
        _write(directory, new, read_info(directory) if source == directory else {})
    except MyptError:
        for path in aside:
            path.unlink()  # a second name of a file that is still there
        raise
    out.kept = aside if source == directory else [source, *aside]
    again = bundle.read(directory, walk_back=False)
    out.difference = _difference(expected, again)
    return out


def _write(directory: Path, new: Bundle, before: dict[str, Any]) -> None:
    """Publish the bundle; of one in the old layout it keeps the small members, `before`."""
    from mypt_fast.checkpoint import bundle
    from mypt_fast.checkpoint.snapshots import snapshots

    state = {**new.training_state, "model_dtype_at_save": "float32"}
    for key in ("checkpoint_dtype", "optimizer_file"):
        state.pop(key, None)
    if new.optimizer is not None:
        state["optimizer_file"] = "optimizer.pt"
    preset = directory / "original_config.json"
    bundle.write(
        directory,
        config=new.config,
        state_dict=new.state_dict,
        training_state=state,
        tokenizer=new.tokenizer,
        optimizer=new.optimizer,
        gold_state=before.get("gold_selection_state"),
        original_config=preset.read_bytes() if before and preset.is_file() else None,
        state={"step": new.training_state.get("step")},
        keep_last=len(snapshots(directory)) + 1,  # none of them is this command's to remove
    )


def keep_aside(directory: Path) -> list[Path]:
    """Link the tensor files of a bundle to `<name>.legacy`, which no save replaces."""
    kept = []
    for name in TENSOR_FILES:
        path, aside = directory / name, directory / (name + KEPT)
        if not path.is_file():
            continue
        number = 1
        while aside.exists() and not aside.samefile(path):
            number += 1
            aside = directory / f"{name}{KEPT}{number}"
        if not aside.exists():
            try:
                os.link(path, aside)
            except OSError:  # a file system without hard links
                shutil.copy2(path, aside)
        kept.append(aside)
    return kept


def scan(root: Path = Path("checkpoints")) -> Iterator[tuple[Path, str | None]]:
    """Every run under `root` that can be converted: its directory, and the file to name.

    Beside latest.pt and final.pt any `.pt` counts that holds a config and weights.
    """
    folders = sorted(root.iterdir()) if root.is_dir() else []
    for folder in (p for p in folders if p.is_dir() and not p.name.startswith(".")):
        if exists(folder):
            if is_per_head_bundle(folder):
                yield folder, None
            continue
        files = [p for p in (folder / LATEST, folder / FINAL) if p.is_file()]
        others = [p for p in sorted(folder.glob("*.pt")) if p.is_file() and p not in files]
        files += [p for p in others if p.name not in TENSOR_FILES and _is_single(p)]
        if files:
            yield folder, files[0].name


def _is_single(path: Path) -> bool:
    try:
        legacy.content(path, values=False)
    except MyptError:
        return False
    return True


def _both(source: Path) -> tuple[dict[str, Tensor], Bundle]:
    """A checkpoint's weights as they are stored, and the checkpoint in today's layout."""
    from mypt_fast.checkpoint import bundle, tensors

    if source.is_dir():
        stored = tensors.load(source / "model.pt")
        return stored.get("state_dict", stored), bundle.read(source)
    stored = legacy.content(source, values=True)
    return stored["model_state_dict"], legacy.modern(source, stored, optimizer=True)


def _logits_of_file(raw: dict[str, Tensor], new: Bundle) -> Tensor:
    import torch

    from mypt_fast.checkpoint import eras

    with torch.no_grad():
        if eras.is_per_head(raw):
            return eras.per_head_logits(raw, int(new.config["n_head"]), _probe(new.config))
        return _model(new)(_probe(new.config))


def _difference(expected: Tensor, new: Bundle) -> float:
    """Compare a bundle's logits with the file's; raises IntegrityError where they differ."""
    import torch

    with torch.no_grad():
        found = _model(new)(_probe(new.config))
    if not bool(torch.isfinite(expected).all()):
        raise IntegrityError(
            f"{new.path}: its weights do not compute numbers",
            "found logits that are not finite",
            "convert another checkpoint of the run",
        )
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise IntegrityError(
            f"{new.path}: today's layout computes other logits than the file",
            f"they differ by {difference:.1e}",
            "nothing is lost: the old file is as it was",
        )
    return difference


def _probe(config: dict[str, Any]) -> Tensor:
    """A fixed input, (1, T): token ids spread over the vocabulary."""
    import torch

    length = min(int(config["block_size"]), 64)
    return (torch.arange(length) * 7919 % int(config["vocab_size"])).view(1, length)


def _config(saved: Bundle) -> ModelConfig:
    known = {k: v for k, v in saved.config.items() if k in set(field_names(ModelConfig))}
    return build(ModelConfig, known, str(saved.path))


def _model(saved: Bundle) -> GPT:
    from mypt_fast.model import GPT

    cfg = _config(saved)
    model = GPT(cfg, seed=None)
    model.load_state_dict(saved.state_dict, assign=not cfg.tie_weights)  # no copy of the weights
    return model.eval()
