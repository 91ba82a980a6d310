"""What shards hold beside their tokens, joined over the shards of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shards = Sequence[Any]  # of mypt_fast.data.format.Shard
KINDS = ("weights", "mask")  # planes that weigh a loss, the finer one first


def joined_ends(shards: Shards) -> NDArray[np.uint64] | None:
    """Where the documents of a corpus end, ascending.

    A shard ends one too, unless the next one says that it goes on there. Where that next shard was
    left out, the document ends where its tokens do.

    Returns:
        None unless every shard with tokens has an index.

    Raises:
        DataError, IntegrityError: as `Shard.document_ends`.
    """
    filled = [shard for shard in shards if shard.n_tokens]
    if not filled or any(getattr(shard, "documents", None) is None for shard in filled):
        return None
    continued = {getattr(shard, "continues", None) for shard in filled} - {None}
    parts, begin = [], 0
    for shard in filled:
        ends = np.asarray(shard.document_ends(), dtype=np.uint64)
        if continued and shard.path in continued:
            ends = ends[:-1]
        parts.append(ends + np.uint64(begin))
        begin += shard.n_tokens
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class StoredWeights:
    """The loss weights of a corpus, from the planes of its shards: a `LossPlane`.

    A shard without one counts in full, as text beside conversations does.
    """

    def __init__(self, shards: Shards) -> None:
        self._planes = [_plane(shard) for shard in shards]
        self._ends = np.cumsum(np.array([shard.n_tokens for shard in shards], dtype=np.int64))

    @property
    def any(self) -> bool:
        """Whether there is a plane at all."""
        return any(plane is not None for plane in self._planes)

    def read_weights(self, start: int, count: int) -> NDArray[np.float32]:
        """The weights of the tokens [start, start + count), float32."""
        out = np.ones(count, dtype=np.float32)
        shard, done = int(np.searchsorted(self._ends, start, side="right")), 0
        while done < count:
            begin = int(self._ends[shard - 1]) if shard else 0
            size = min(count - done, int(self._ends[shard]) - start - done)
            plane = self._planes[shard]
            if plane is not None:
                out[done : done + size] = plane[start + done - begin :][:size]
            shard, done = shard + 1, done + size
        return out


def _plane(shard: Any) -> NDArray[Any] | None:
    """Map the plane of a shard that weighs its loss, None where there is none."""
    kinds = {plane.kind for plane in getattr(shard, "planes", ())}
    kind = next((kind for kind in KINDS if kind in kinds), None)
    plane: NDArray[Any] | None = shard.read_plane(kind) if kind else None
    return plane
