"""Rows of whole episodes, as MyPT makes them: one episode a row, its last tokens, padded.

Shapes: B rows, T tokens of a row (block_size). What a shard of a split holds is a plain dict, the
one that MyPT's loader shows to scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from mypt_fast.data.format import Shard
from mypt_fast.data.format.episodes import EpisodeReader, MismatchedPlaneError
from mypt_fast.data.packing import Documents, Int64
from mypt_fast.data.reader import map_shard
from mypt_fast.errors import DataError


class EpisodeShard(TypedDict):
    """One folder of episodes.

    Keys: tokens (n,) uint16 or uint32; mask (n,) uint8 or float32, or None; segment_ids (n,) uint8
    or None; episodes (N, 2) int64, first token and tokens; valid_ids, numbers of the episodes that
    are long enough; path of the folder.
    """

    tokens: NDArray[Any]
    mask: NDArray[Any] | None
    segment_ids: NDArray[Any] | None
    episodes: Int64
    valid_ids: Int64
    path: str


class Rows(NamedTuple):
    """A batch of episodes.

    Attributes:
        x: (B, T) int64.
        y: (B, T) int64, x shifted by one.
        mask: (B, T) float32, weight of each target, as stored; 1 where nothing is stored.
        segments: (B, T) int64, of each input: as stored, 1 where nothing is, 0 on padding.
        target_segments: (B, T) int64, of each target.
    """

    x: Int64
    y: Int64
    mask: NDArray[np.float32]
    segments: Int64
    target_segments: Int64


def episode_shards(shards: Sequence[Shard], min_tokens: int) -> list[EpisodeShard]:
    """Map the shards of a split, the finer of two masks taken.

    Raises:
        DataError: the shards hold no episodes.
        IntegrityError: a file is no longer what was checked.
    """
    found: list[EpisodeShard] = []
    for shard in shards:
        if shard.documents is None or not isinstance(shard.documents.read, EpisodeReader):
            raise DataError(f"shard {shard.path}", "holds no episodes", "use the token loader")
        episodes = np.stack(shard.documents.read.spans(), axis=1).astype(np.int64)
        kind = next((k for k in ("weights", "mask") if shard.plane(k) is not None), None)
        found.append({
            "tokens": map_shard(shard),
            "mask": None if kind is None else shard.read_plane(kind),  # type: ignore[arg-type]
            "segment_ids": shard.read_plane("segments") if shard.plane("segments") else None,
            "episodes": episodes,
            "valid_ids": np.flatnonzero(episodes[:, 1] >= max(1, min_tokens)),
            "path": str(shard.path.parent),
        })  # fmt: skip
    return found


def read_rows(shards: Sequence[EpisodeShard], ids: Int64, seq_len: int, pad_id: int) -> Rows:
    """Read episodes by their number among the valid ones, in (shard, index) order.

    An episode longer than seq_len + 1 tokens keeps its last ones. Padding shows `pad_id` and has
    mask and segment 0.

    Args:
        shards: of the split.
        ids: (B,).
        seq_len: T.
        pad_id: what padding shows.

    Raises:
        AssertionError: an episode has another number of masks or segments than of tokens.
    """
    width, ends = seq_len + 1, np.cumsum([len(s["valid_ids"]) for s in shards])
    tokens = np.full((len(ids), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.float32)
    segments = np.zeros((len(ids), width), dtype=np.int64)
    of = np.searchsorted(ends, ids, side="right").tolist()
    for row, (number, which) in enumerate(zip(ids.tolist(), of, strict=True)):
        shard = shards[which]
        valid = shard["valid_ids"]
        start, length = map(int, shard["episodes"][valid[number - int(ends[which]) + len(valid)]])
        count = min(length, width)
        cut = slice(start + length - count, start + length)
        tokens[row, :count] = shard["tokens"][cut]
        mask[row, :count] = _beside(shard, "mask", cut)
        segments[row, :count] = _beside(shard, "segment_ids", cut)
    return Rows(
        tokens[:, :-1].copy(), tokens[:, 1:].copy(), mask[:, 1:].copy(),
        segments[:, :-1].copy(), segments[:, 1:].copy(),
    )  # fmt: skip


def _beside(shard: EpisodeShard, key: str, cut: slice) -> NDArray[Any] | int:
    """What lies beside the tokens of one episode; 1 where nothing does."""
    plane: NDArray[Any] | None = shard[key]  # type: ignore[literal-required]
    if plane is None:
        return 1
    values = plane[cut]
    if len(values) != cut.stop - cut.start:
        raise MismatchedPlaneError(
            f"{key} of {shard['path']}",
            f"{len(plane)} values, {len(shard['tokens'])} tokens",
            "copy the files again: they are not of one dataset",
        )
    return values


def row_documents(rows: Rows, *, use_mask: bool, isolated: bool) -> Documents:
    """What the model and the loss need to know of a batch.

    Padding weighs nothing, and neither does a target in another segment than its input: no token
    of a segment says how the next one begins.

    Args:
        rows: the batch.
        use_mask: weigh the targets as stored; else each counts 1.
        isolated: segments do not see each other. Otherwise `cu_seqlens` is empty: rows are whole,
            and what pads them, at their end, is seen by nothing that counts.
    """
    B, T = rows.x.shape
    counts = (rows.target_segments != 0) & (rows.target_segments == rows.segments)
    weights = (rows.mask * counts) if use_mask else counts.astype(np.float32)
    if not isolated:
        positions = np.broadcast_to(np.arange(T), (B, T)).copy()
        empty = np.empty(0, np.int32)
        return Documents(positions, rows.segments.astype(np.int32), empty, T, weights)
    begins = np.ones((B, T), dtype=bool)
    begins[:, 1:] = rows.segments[:, 1:] != rows.segments[:, :-1]
    starts = np.flatnonzero(begins)
    edges = np.append(starts, B * T)
    lengths = np.diff(edges)
    positions = (np.arange(B * T) - np.repeat(starts, lengths)).reshape(B, T)
    return Documents(
        positions, rows.segments.astype(np.int32), edges.astype(np.int32), int(lengths.max()),
        weights,
    )  # fmt: skip
