"""A rank's share of a stream of samples, and the one integer that says how far it was read."""

from __future__ import annotations

from typing import Any, Protocol

from mypt_fast.errors import DataError

MAX_SAMPLES = 1 << 62  # far enough below 2^63 that no sum of positions overflows


class Tokens(Protocol):
    """What a share needs to know of a corpus."""

    source: str
    fingerprint: str
    n_tokens: int


class Share:
    """Step s covers samples [s*G, (s+1)*G) of one global stream; rank r of W has its r-th part.

    So the stream does not depend on W, and the position is one integer.

    Args:
        corpus: where the tokens are.
        seq_len: tokens per row, T.
        global_batch: samples per step over all ranks, G; a multiple of world_size.
        rank: whose share it is.
        world_size: number of ranks, W.

    Attributes:
        position: global samples in finished steps.
    """

    def __init__(
        self, corpus: Tokens, seq_len: int, global_batch: int, rank: int, world_size: int
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, world_size {world_size})")
        if global_batch < 1 or global_batch % world_size:
            raise ValueError(f"global_batch {global_batch} is not a multiple of {world_size} ranks")
        self._check_size(corpus, seq_len)
        self._source, self._fingerprint = corpus.source, corpus.fingerprint
        self._global_batch = global_batch
        self._share = global_batch // world_size
        self._offset = rank * self._share
        self.position = 0
        self._taken = 0  # rows of this rank's share of the current step already read

    def _check_size(self, corpus: Tokens, seq_len: int) -> None:
        """Refuse a corpus that has no sample."""
        if corpus.n_tokens < seq_len + 1:
            raise DataError(
                f"{corpus.source} for a context of {seq_len}",
                f"{corpus.n_tokens} tokens, where one window needs {seq_len + 1}",
                "add data or lower block_size",
            )

    @property
    def fingerprint(self) -> str:
        """Of the corpus: equal where the tokens are."""
        return self._fingerprint

    def rewind_step(self) -> None:
        """Go back to the start of the current, unfinished step."""
        if self._taken:
            self._jump()
        self._taken = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position: small, plain values, the same on every rank.

        Raises:
            RuntimeError: a step is under way; finish it or call `rewind_step` first.
        """
        if self._taken:
            raise RuntimeError(f"{self._taken} of {self._share} rows of a step were read")
        return {**self._identity(), "global_sample": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the global batch and the world size may differ.

        Raises:
            DataError: the state belongs to another stream; every differing field is named.
        """
        differing = [
            f"{key} is {value!r}, the state has {state.get(key)!r}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if differing:
            raise DataError(
                f"resuming the data position on {self._source}",
                "; ".join(differing),
                "use the data and settings of the saved run, or start another run (--model_name)",
            )
        sample = state.get("global_sample")
        if type(sample) is not int or not 0 <= sample < MAX_SAMPLES:
            raise DataError("resuming the data position", f"global_sample is {sample!r}")
        self._jump()
        self.position, self._taken = sample, 0

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position to mean the same samples."""
        raise NotImplementedError

    def _jump(self) -> None:
        """Called before the position moves otherwise than by reading."""

    def _ask(self, rows: int) -> tuple[int, int]:
        """The first sample of the next rows, and of what is read after them."""
        taken = self._taken + rows
        if rows < 1 or taken > self._share:
            left = self._share - self._taken
            raise ValueError(f"{rows} rows asked; {left} of this rank's {self._share} are left")
        first = self.position + self._offset + self._taken
        others = self._global_batch - self._share if taken == self._share else 0
        return first, first + rows + others

    def _move(self, rows: int) -> None:
        """Count rows that were handed out."""
        self._taken += rows
        if self._taken == self._share:
            self.position, self._taken = self.position + self._global_batch, 0
