"""Start a run from another model's weights: read once, checked, and fitted to its context."""

from __future__ import annotations

from pathlib import Path

import torch

from mypt_fast import console
from mypt_fast.checkpoint import bundle as bundles
from mypt_fast.checkpoint import legacy
from mypt_fast.checkpoint.eras import misfit
from mypt_fast.errors import CheckpointError
from mypt_fast.model import GPT

POSITIONS = "position_embedding_table.weight"
LOWERED = ("bf16", "bfloat16", "fp16", "float16")


def read_source(path: Path) -> bundles.Bundle:
    """Read and verify what to start from: a bundle, or an old single file.

    Of a bundle its exact weights, where model.pt is rounded.

    Raises:
        CheckpointError, IntegrityError: as `bundle.read`.
    """
    if path.is_file():
        return legacy.read(path, optimizer=False)
    saved = bundles.read(path, optimizer=False)
    rounded = saved.training_state.get("checkpoint_dtype") in LOWERED
    if rounded and (path / "optimizer.pt").is_file():
        return bundles.read(path)
    return saved


def fill(model: GPT, path: Path, seed: int) -> None:
    """Copy the weights of the bundle at `path` into a model of its architecture.

    Learned positions beyond the source's are drawn as those of a new model are, N(0, 0.02);
    of a longer table the first rows are taken. Rotary tables are not stored, so a context of
    another length is the config's alone.

    Raises:
        CheckpointError: if the weights do not fit.
        IntegrityError: if they are not what was saved.
    """
    source = read_source(path)
    console.notice(f"weights of {path}, step {source.training_state.get('step')}")
    for notice in source.notices:
        console.notice(notice)
    weights = dict(source.state_dict)
    if model.config.pos_encoding == "learned" and POSITIONS in weights:
        shape = model.position_embedding_table.weight.shape
        weights[POSITIONS] = fitted_positions(weights[POSITIONS], shape[0], seed)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise CheckpointError(
            f"weights in {source.path} do not fit its config.json",
            misfit(weights, model.config),
            "start from another checkpoint",
        ) from e


def fitted_positions(table: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """The first `length` rows of a position table, (length, C); what it lacks is drawn."""
    if table.dim() != 2 or len(table) >= length:
        return table[:length]
    generator = torch.Generator().manual_seed(seed)
    more = torch.empty(length - len(table), table.shape[1])
    return torch.cat([table.float(), more.normal_(0.0, 0.02, generator=generator)])
