"""Documents that occur more than once, found by a 128-bit hash of their text.

16 bytes a different document: sorted arrays of which each is at least twice as long as the next,
merged as they fill, plus as much again for the moment of a merge.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mypt_fast.data.documents import Piece

_DIGEST = np.dtype("S16")
_NOTHING = {"pieces": 0, "documents": 0, "duplicates": 0, "unique": 0, "dropping": False}
Digests = npt.NDArray[np.bytes_]


class DigestSet:
    """A growing set of 16-byte digests; it is asked and added to by the batch."""

    def __init__(self) -> None:
        self._levels: list[Digests] = []

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def add(self, digests: Sequence[bytes]) -> list[bool]:
        """Add digests and return for each whether it was there, or earlier in the batch."""
        if not digests:
            return []
        # "S" drops zeros at the end and pads again: digests of one length stay different.
        batch = np.frombuffer(b"".join(digests), _DIGEST)
        unique, first = np.unique(batch, return_index=True)
        is_known = self._holds(unique)
        is_new = np.zeros(len(batch), dtype=bool)
        is_new[first[~is_known]] = True
        if not is_known.all():
            self._levels.append(unique[~is_known])
            self._merge()
        known: list[bool] = (~is_new).tolist()
        return known

    def _holds(self, digests: Digests) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(digests), dtype=bool)
        for level in self._levels:
            at = np.minimum(np.searchsorted(level, digests), len(level) - 1)
            found |= level[at] == digests
        return found

    def _merge(self) -> None:
        levels = self._levels
        while len(levels) > 1 and len(levels[-2]) < 2 * len(levels[-1]):
            merged = np.concatenate([levels[-2], levels[-1]])
            merged.sort(kind="stable")  # two runs: merged in one pass
            levels[-2:] = [merged]


class Duplicates:
    """Count the documents that were there before, and leave them out if asked to.

    Args:
        path: where digests of different documents are kept for a run that continues.
        drop: whether a repeated document is left out. Its digest must then be known at its first
            piece, see `Reader.digest_first`.
        counts: to go on from: what `counts()` returned.
    """

    def __init__(self, path: Path, drop: bool, counts: dict[str, Any] | None = None) -> None:
        counts = counts or dict(_NOTHING)
        self.pieces: int = counts["pieces"]
        self.documents: int = counts["documents"]
        self.duplicates: int = counts["duplicates"]
        self._drop = drop
        self._is_dropping: bool = counts["dropping"]
        self._seen = DigestSet()
        unique: int = counts["unique"]
        self._file = path.open("r+b" if unique else "w+b")
        try:
            self._load(unique)
        except EOFError:
            self.close()
            raise

    def _load(self, count: int) -> None:
        for begin in range(0, count, 1 << 16):
            data = self._file.read(16 * min(1 << 16, count - begin))
            if len(data) % 16 or not data:
                raise EOFError("the digests are fewer than the journal says")
            self._seen.add([data[n : n + 16] for n in range(0, len(data), 16)])
        if len(self._seen) != count:
            raise EOFError("the digests are not what the journal says")
        self._file.truncate(16 * count)
        self._file.seek(16 * count)

    def filter(self, unit: Iterable[Piece]) -> Iterator[Piece]:
        """Count a unit's documents; yield the pieces to encode."""
        pieces = list(unit)
        digests = [piece.digest for piece in pieces if piece.digest is not None]
        known = self._seen.add(digests)
        new = [digest for digest, is_known in zip(digests, known, strict=True) if not is_known]
        self._file.write(b"".join(new))
        self.documents += len(known)
        self.duplicates += sum(known)
        answers = iter(known)
        for piece in pieces:
            is_known = next(answers) if piece.digest is not None else False
            if self._drop and piece.starts:
                self._is_dropping = is_known
            if not self._is_dropping:
                self.pieces += 1
                yield piece
            if piece.ends:
                self._is_dropping = False

    def counts(self) -> dict[str, Any]:
        """Return what a run needs to go on from here."""
        return {
            "pieces": self.pieces,
            "documents": self.documents,
            "duplicates": self.duplicates,
            "unique": len(self._seen),
            "dropping": self._is_dropping,
        }

    def sync(self) -> None:
        """Bring what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file without caring whether it could be written."""
        with contextlib.suppress(OSError):
            self._file.close()
