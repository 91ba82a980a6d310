"""Token batches by position: any sample of the stream in O(1), the same at any world size.

`TokenCorpus` is the tokens, `TokenLoader` the stream of batches over them. Both run on the C++
module `mypt_fast._native` or on NumPy; the batches are equal, so NumPy is oracle and fallback.
Arrays only, no torch: a tensor takes part through its `.numpy()` view.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mypt_fast.data.annotations import joined_ends
from mypt_fast.data.format import Shard, Split, dataset_fingerprint, open_split
from mypt_fast.data.order import ALGORITHM, SampleOrder
from mypt_fast.data.reader import (
    BatchReader,
    Int64,
    NumpyReader,
    Tokens,
    map_shard,
    narrow,
    native_module,
)
from mypt_fast.errors import DataError

BACKENDS = ("auto", "native", "numpy")
STATE_VERSION = 1
_MAX_SAMPLES = 1 << 62  # far enough below 2^63 that no sum of positions overflows


class TokenCorpus:
    """A sequence of tokens in shards; windows may cross shard edges, so no token is lost.

    Attributes:
        n_tokens: tokens in all shards.
        backend: "native" or "numpy".
        backend_note: one line for people: which loader runs, and why if it is the slower one.
        fingerprint: 16 hex digits; two corpora with the same one hold the same tokens.
    """

    def __init__(self, source: str, names: list[str], sizes: list[int], fingerprint: str) -> None:
        """Only describe a corpus; use `from_dataset` or `from_tokens`."""
        self.source, self.fingerprint = source, fingerprint
        self.n_tokens = sum(sizes)
        self.backend = self.backend_note = ""
        self._names = names
        self._ends = np.cumsum(np.array(sizes, dtype=np.int64))
        self._native: Any = None
        self._arrays: list[Tokens] = []
        self._shards: list[Shard] = []
        self._closed = False

    @classmethod
    def from_dataset(
        cls, dataset_dir: Path | str, split: Split, backend: str = "auto"
    ) -> TokenCorpus:
        """Open one split of a dataset directory; its shards are checked first."""
        shards = open_split(Path(dataset_dir), split)
        corpus = cls(
            f"{split} split of {dataset_dir}",
            [shard.name for shard in shards],
            [shard.n_tokens for shard in shards],
            dataset_fingerprint(shards),
        )
        corpus._shards = shards
        if module := corpus._choose(backend):
            specs = [(str(s.path), s.width, s.n_tokens, s.offset) for s in shards]
            corpus._native = module.Corpus.open(specs)
        else:
            corpus._arrays = [map_shard(shard) for shard in shards]
        return corpus

    @classmethod
    def from_tokens(
        cls, tokens: Sequence[int] | NDArray[np.integer[Any]], backend: str = "auto"
    ) -> TokenCorpus:
        """Hold a 1-D sequence of token ids in memory, narrowed to 2 bytes each where they fit."""
        import xxhash

        array = narrow(np.asarray(tokens))
        digest = xxhash.xxh3_64_hexdigest(array.astype("<u4").tobytes())
        corpus = cls("text in memory", ["the text"], [array.size], digest)
        if module := corpus._choose(backend):
            corpus._native = module.Corpus.wrap(array)
        corpus._arrays = [array]
        return corpus

    def reader(self, order: SampleOrder) -> BatchReader:
        """Return the reader of this corpus's backend for one sample order."""
        if self._closed:
            raise ValueError(f"{self.source} is closed")
        if self._native is None:
            return NumpyReader(self._arrays, order)
        module, _ = native_module()
        assert module is not None
        native_order = module.SampleOrder(order.n_tokens, order.seq_len, order.seed, order.kind)
        reader: BatchReader = module.BatchReader(self._native, native_order)
        return reader

    def locate(self, token: int) -> tuple[str, int]:
        """Return the shard name and the position within it of a token of the corpus."""
        shard = int(np.searchsorted(self._ends, token, side="right"))
        begin = int(self._ends[shard - 1]) if shard else 0
        return self._names[shard], token - begin

    def read_span(self, start: int, count: int) -> Tokens:
        """Return the tokens [start, start + count) of the corpus, from as many shards as it takes.

        Raises:
            ValueError: they are not in the corpus, or it is closed.
        """
        if self._closed or not 0 <= start <= start + count <= self.n_tokens:
            state = "closed" if self._closed else f"of {self.n_tokens} tokens"
            raise ValueError(f"tokens [{start}, +{count}) of {self.source}, which is {state}")
        if not self._arrays:  # the native reader reads windows only
            self._arrays = [map_shard(shard) for shard in self._shards]
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            begin = start - (int(self._ends[shard - 1]) if shard else 0)
            parts.append(self._arrays[shard][begin : begin + count])
            start, count = start + parts[-1].size, count - parts[-1].size
            shard += 1
        return parts[0] if len(parts) == 1 else np.concatenate([self._arrays[0][:0], *parts])

    def document_ends(self) -> NDArray[np.uint64] | None:
        """Where documents end, ascending; None where the dataset has no index of them."""
        return joined_ends(self._shards)

    def close(self) -> None:
        """Let go of the files; readers made before keep theirs until they are dropped."""
        self._native, self._arrays, self._closed = None, [], True

    def _choose(self, backend: str) -> ModuleType | None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is one of {', '.join(BACKENDS)}, not {backend!r}")
        module, problem = native_module() if backend != "numpy" else (None, "asked for")
        if backend == "native" and module is None:
            raise DataError(
                "data loader backend native",
                problem,
                "install again with a C++17 compiler, or use backend auto or numpy",
            )
        self.backend = "native" if module else "numpy"
        self.backend_note = (
            f"data loader: native ({module.best_kernel()})"
            if module
            else f"data loader: NumPy ({problem})"
        )
        return module


class TokenLoader:
    """The stream of batches over a corpus, cut into steps of `global_batch` samples.

    Step s covers samples [s*G, (s+1)*G) of one global stream; rank r of W takes its r-th part of
    G/W. So the stream does not depend on W, and the position is one integer.

    Args:
        corpus: where the tokens are.
        seq_len: tokens per row, T.
        seed: of the order; it touches no global random state.
        order: "epoch" (each window once per epoch, shuffled) or "sequential".
        global_batch: samples per step over all ranks, G; a multiple of world_size.
        rank: whose share `next` reads.
        world_size: number of ranks, W.
        vocab_size: when given, a token id not below it raises DataError.

    Attributes:
        n_windows: samples per epoch.
        position: global samples in finished steps.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        seq_len: int,
        *,
        seed: int,
        order: str = "epoch",
        global_batch: int = 1,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, world_size {world_size})")
        if global_batch < 1 or global_batch % world_size:
            raise ValueError(f"global_batch {global_batch} is not a multiple of {world_size} ranks")
        if corpus.n_tokens < seq_len + 1:
            raise DataError(
                f"{corpus.source} for a context of {seq_len}",
                f"{corpus.n_tokens} tokens, where one window needs {seq_len + 1}",
                "add data or lower block_size",
            )
        self._corpus = corpus
        self._order = SampleOrder(corpus.n_tokens, seq_len, seed, order)
        self._reader: BatchReader | None = corpus.reader(self._order)
        self._global_batch = global_batch
        self._share = global_batch // world_size
        self._offset = rank * self._share
        self._vocab_size = vocab_size
        self.n_windows = self._order.n_windows
        self.position = 0
        self._taken = 0  # rows of this rank's share of the current step already read

    @property
    def fingerprint(self) -> str:
        """Of the corpus: equal where the tokens are."""
        return self._corpus.fingerprint

    def read(
        self, first_sample: int, rows: int, x: Int64 | None = None, y: Int64 | None = None
    ) -> tuple[Int64, Int64]:
        """Read samples [first_sample, first_sample + rows) without moving the position.

        Args:
            first_sample: in [0, 2^62).
            rows: how many.
            x: where to write the tokens, (rows, T) int64, or None for a new array.
            y: likewise for the targets, the tokens shifted by one.

        Raises:
            DataError: a token id is not below vocab_size.
        """
        if first_sample < 0 or first_sample + rows > _MAX_SAMPLES:
            raise ValueError(f"samples [{first_sample}, +{rows}) are not in [0, 2^62)")
        return self._fill(first_sample, rows, x, y, first_sample + rows)

    def next(
        self, rows: int, x: Int64 | None = None, y: Int64 | None = None
    ) -> tuple[Int64, Int64]:
        """Read the next rows of this rank's share; the position moves when the share is used up."""
        taken = self._taken + rows
        if rows < 1 or taken > self._share:
            left = self._share - self._taken
            raise ValueError(f"{rows} rows asked; {left} of this rank's {self._share} are left")
        first = self.position + self._offset + self._taken
        is_last = taken == self._share
        following = first + rows + (self._global_batch - self._share if is_last else 0)
        batch = self._fill(first, rows, x, y, following)
        if is_last:
            self.position, self._taken = self.position + self._global_batch, 0
        else:
            self._taken = taken
        return batch

    def rewind_step(self) -> None:
        """Go back to the start of the current, unfinished step."""
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
        expected = self._identity()
        differing = [
            f"{key} is {value!r}, the state has {state.get(key)!r}"
            for key, value in expected.items()
            if state.get(key) != value
        ]
        if differing:
            raise DataError(
                f"resuming the data position on {self._corpus.source}",
                "; ".join(differing),
                "use the data and settings of the saved run, or start another run (--model_name)",
            )
        sample = state.get("global_sample")
        if (
            not isinstance(sample, int)
            or isinstance(sample, bool)
            or not 0 <= sample < _MAX_SAMPLES
        ):
            raise DataError("resuming the data position", f"global_sample is {sample!r}")
        self.position, self._taken = sample, 0

    def close(self) -> None:
        """Drop the reader; the corpus stays open for others."""
        self._reader = None

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position to mean the same samples."""
        return {
            "version": STATE_VERSION,
            "algo": ALGORITHM,
            "order": self._order.kind,
            "seed": self._order.seed,
            "seq_len": self._order.seq_len,
            "n_windows": self.n_windows,
            "fingerprint": self._corpus.fingerprint,
        }

    def _fill(
        self, first: int, rows: int, x: Int64 | None, y: Int64 | None, following: int
    ) -> tuple[Int64, Int64]:
        if self._reader is None:
            raise ValueError("the loader is closed")
        shape = (rows, self._order.seq_len)
        x = np.empty(shape, dtype=np.int64) if x is None else x
        y = np.empty(shape, dtype=np.int64) if y is None else y
        if x.shape != shape:
            raise ValueError(f"x must be {shape}, not {x.shape}")
        largest = self._reader.read(first, x, y, following)
        if self._vocab_size is not None and largest >= self._vocab_size:
            self._refuse_token(first, x, y)
        return x, y

    def _refuse_token(self, first: int, x: Int64, y: Int64) -> None:
        span = np.concatenate([x, y[:, -1:]], axis=1)
        row, column = (int(v) for v in np.argwhere(span >= self._vocab_size)[0])
        start = int(self._order.starts(first + row, 1)[0])
        name, position = self._corpus.locate(start + column)
        raise DataError(
            f"token {position} of {name} ({self._corpus.source})",
            f"id {span[row, column]}, where vocab_size is {self._vocab_size}",
            "the data was written with another tokenizer than the model's: prepare it again, or "
            "use a model whose vocab_size covers it",
        )
