"""What a loader knows of one file of tokens, and of what lies beside its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mypt_fast.errors import DataError, IntegrityError

Split = Literal["train", "val"]
PlaneKind = Literal["mask", "weights", "segments"]
Ends = NDArray[np.uint64]

WIDTHS = {"uint16": 2, "uint32": 4}
_PLANE_DTYPES = {"mask": "u1", "weights": "<f4", "segments": "u1"}


@dataclass(frozen=True, slots=True)
class Plane:
    """One value a token, stored apart from the tokens.

    Attributes:
        kind: "mask" (uint8, 1 where a token counts in the loss), "weights" (float32, how much it
            counts) or "segments" (uint8, 0 padding, 1 to 255 a document of a packed row).
        path: the file.
        offset: bytes before the first value.
    """

    kind: PlaneKind
    path: Path
    offset: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a value."""
        return np.dtype(_PLANE_DTYPES[self.kind])


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents end, read when somebody asks.

    Attributes:
        path: the file that lists them.
        offset: bytes before the list.
        count: how many it lists.
        read: reads and checks the list: ascending positions in the shard, the last n_tokens.
    """

    path: Path
    offset: int
    count: int
    read: Callable[[], Ends]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of tokens.

    Attributes:
        path: the file.
        width: bytes per token, 2 or 4; 8 only where a caller of `open_split` asked for it.
        n_tokens: how many tokens it holds.
        offset: bytes before the first token.
        digest: of what was recorded when the file was written; where nothing was, a hash of
            samples of the file, so that another file of the same name and size is told apart.
        format: "mypt", "episodes", "native", "nanogpt", "llmc" or "megatron".
        label: the name within the dataset, where it is not the folder's and the file's.
        vocab_size: ids are below it; 0 where unknown.
        eot_id: the token that ends a document; -1 where unknown.
        max_token: no id is above it; None where unknown.
        documents: where documents end; None where unknown.
        planes: what lies beside the tokens.
        notice: one line for people about how the file was understood.
        tokenizer: SHA-256 of the tokenizer's state; zeros where unknown.
        trailing: bytes of the file after the last token.
        identity: device, inode and time of change, in ns, of the file that was checked; None where
            whoever opens it again asks for them.
        continues: the shard before it whose last document goes on in this one; None where a
            document begins here, or nobody says.
    """

    path: Path
    width: int
    n_tokens: int
    offset: int = 0
    digest: str = ""
    format: str = "mypt"
    label: str = ""
    vocab_size: int = 0
    eot_id: int = -1
    max_token: int | None = None
    documents: Documents | None = None
    planes: tuple[Plane, ...] = ()
    notice: str = ""
    tokenizer: bytes = bytes(32)
    trailing: int = 0
    identity: tuple[int, int, int] | None = None
    continues: Path | None = None

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return self.offset + self.n_tokens * self.width + self.trailing

    @property
    def name(self) -> str:
        """The name within the dataset, such as train/shard_00000.bin."""
        return self.label or f"{self.path.parent.name}/{self.path.name}"

    def document_ends(self) -> Ends:
        """Read where documents end: strictly ascending uint64, the last is n_tokens.

        Raises:
            DataError: the format records no documents, or the list cannot be read.
            IntegrityError: the list is not what was written.
        """
        if self.documents is None:
            raise DataError(f"shard {self.path}", f"{self.format} records no documents")
        return self.documents.read()

    def plane(self, kind: PlaneKind) -> Plane | None:
        """The plane of one kind, None where there is none."""
        return next((plane for plane in self.planes if plane.kind == kind), None)

    def read_plane(self, kind: PlaneKind) -> NDArray[Any]:
        """Map a plane, n_tokens values.

        Raises:
            DataError: there is none, or it cannot be mapped.
            IntegrityError: the file is shorter than when it was checked.
        """
        plane = self.plane(kind)
        if plane is None:
            raise DataError(f"shard {self.path}", f"has no {kind}")
        if self.n_tokens == 0:
            return np.empty(0, plane.dtype)
        try:
            shape = (self.n_tokens,)
            mapped = np.memmap(plane.path, plane.dtype, "r", offset=plane.offset, shape=shape)
        except OSError as error:
            raise DataError(f"{kind} {plane.path}", f"cannot be mapped: {error}") from error
        except ValueError as error:
            raise IntegrityError(f"{kind} {plane.path}", str(error)) from error
        return np.asarray(mapped)


def count_documents(shards: list[Shard]) -> int | None:
    """How many documents a split holds, each once over however many shards; None if unknown."""
    filled = [shard for shard in shards if shard.n_tokens]
    known = [shard.documents.count for shard in filled if shard.documents is not None]
    if not shards or len(known) != len(filled):
        return None
    return sum(known) - sum(shard.continues is not None for shard in filled)


def dataset_fingerprint(shards: list[Shard]) -> str:
    """Return 16 hex digits that change when a name, size, width, digest, plane or document does."""
    text = "".join(map(_line, shards)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _line(s: Shard) -> str:
    planes = "".join(f" {plane.kind}" for plane in s.planes)
    planes += " continues" if s.continues else ""
    return f"{s.name} {s.width} {s.offset} {s.n_tokens} {s.digest}{planes}\n"
