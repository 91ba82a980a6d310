"""The C++ data loader; `mypt_fast.data.reader` and `.order` say what it computes."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np  # noqa: TID253 - a stub imports nothing
from numpy.typing import NDArray  # noqa: TID253

ALGORITHM: str
ORDER_ALGORITHMS: dict[str, str]

def is_remote(path: str) -> bool: ...
def resident_share(path: str) -> float: ...
def read_ends(
    paths: Sequence[str], head: int, tail: int
) -> list[tuple[int, tuple[int, int, int], bytes, bytes] | None]: ...
def best_kernel() -> str: ...
def available_kernels() -> list[str]: ...
def gather(
    corpus: Corpus,
    starts: Sequence[int] | NDArray[np.int64],
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    kernel: str = "auto",
) -> int: ...

@final
class Corpus:
    @staticmethod
    def open(
        shards: Sequence[tuple[str, int, int, int, int, tuple[int, int, int]]], io: str = "mmap"
    ) -> Corpus: ...
    @staticmethod
    def wrap(tokens: NDArray[np.unsignedinteger[Any]]) -> Corpus: ...
    def span(self, start: int, count: int) -> NDArray[np.unsignedinteger[Any]]: ...
    @property
    def n_tokens(self) -> int: ...

@final
class Permutation:
    def __init__(self, n: int, seed: int, epoch: int) -> None: ...
    @property
    def n(self) -> int: ...
    def at(self, index: int) -> int: ...
    def inverse(self, value: int) -> int: ...

class SampleStream:
    @property
    def n_tokens(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    def starts(self, first_sample: int, count: int) -> NDArray[np.int64]: ...

@final
class SampleOrder(SampleStream):
    def __init__(
        self,
        n_tokens: int,
        seq_len: int,
        seed: int,
        kind: str = "epoch",
        block_tokens: int = ...,
        pool_blocks: int = ...,
    ) -> None: ...
    @property
    def n_windows(self) -> int: ...

@final
class MixtureOrder(SampleStream):
    def __init__(
        self,
        sizes: Sequence[int],
        seq_len: int,
        seed: int,
        kind: str,
        block_tokens: int,
        pool_blocks: int,
        phases: Sequence[tuple[int, Sequence[int]]],
    ) -> None: ...
    @property
    def n_windows(self) -> int: ...
    def sources(self, first_sample: int, count: int) -> NDArray[np.int64]: ...

@final
class BatchReader:
    def __init__(self, corpus: Corpus, order: SampleStream, kernel: str = "auto") -> None: ...
    def read(
        self, first_sample: int, x: NDArray[np.int64], y: NDArray[np.int64], next_sample: int
    ) -> int: ...
    def read_windows(
        self, first_sample: int, windows: NDArray[np.unsignedinteger[Any]], next_sample: int
    ) -> int: ...
    @property
    def width(self) -> int: ...

@final
class Ring:
    def __init__(
        self,
        reader: BatchReader,
        first: int,
        global_batch: int,
        share: int,
        rows: int,
        slots: Sequence[tuple[NDArray[Any], ...]],
        low_water: int,
    ) -> None: ...
    def take(self, back: int = 0) -> tuple[int, int]: ...
    @property
    def batches(self) -> int: ...
    @property
    def waits(self) -> int: ...
