"""The tokens of a dataset or of a text, as one sequence; and how they are reached."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mypt_fast.data.annotations import StoredWeights, joined_ends
from mypt_fast.data.format import Shard, Split, dataset_fingerprint, open_split
from mypt_fast.data.order import SampleStream
from mypt_fast.data.reader import (
    BatchReader,
    Int64,
    NumpyReader,
    Tokens,
    load_shard,
    map_shard,
    narrow,
    native_module,
)
from mypt_fast.data.spans import Spans
from mypt_fast.errors import DataError

BACKENDS = ("auto", "native", "numpy")
IO = ("auto", "mmap", "pread", "ram")
_SHARE_OF_MEMORY = 0.6  # what the page cache may hold of a dataset without harm
_RESIDENT = 0.9  # the share of sampled pages from which data counts as cached
_SAMPLED_SHARDS = 8


class TokenCorpus:
    """A sequence of tokens in shards; windows may cross shard edges, so no token is lost.

    Attributes:
        n_tokens: tokens in all shards.
        backend: "native" or "numpy".
        backend_note: one line for people: which loader runs, and why if it is the slower one.
        fingerprint: 16 hex digits; two corpora with the same one hold the same tokens.
        io: how tokens are reached: "mmap", "pread" or "ram".
        source_sizes: tokens of each dataset.
        shards: the files; none of tokens in memory.
    """

    def __init__(self, source: str, names: list[str], sizes: list[int], fingerprint: str) -> None:
        """Only describe a corpus; use `from_dataset` or `from_tokens`."""
        self.source, self.fingerprint = source, fingerprint
        self.n_tokens = sum(sizes)
        self.source_sizes = [self.n_tokens]
        self.backend = self.backend_note = ""
        self.io = "ram"
        self._names = names
        self._ends = np.cumsum(np.array(sizes, dtype=np.int64))
        self._native: Any = None
        self._arrays: list[Tokens] = []
        self.shards: list[Shard] = []
        self._spans: Spans | None = None
        self._closed = False

    @classmethod
    def from_dataset(
        cls, dataset_dir: Path | str, split: Split, backend: str = "auto", io: str = "auto"
    ) -> TokenCorpus:
        """Open one split of a dataset directory; see `from_datasets`."""
        return cls.from_datasets([dataset_dir], split, backend, io)

    @classmethod
    def from_datasets(
        cls,
        dataset_dirs: Sequence[Path | str],
        split: Split,
        backend: str = "auto",
        io: str = "auto",
        without: Collection[Path] = (),
    ) -> TokenCorpus:
        """Open one split of datasets, one after another; their shards are checked first.

        Args:
            dataset_dirs: the datasets.
            split: "train" or "val".
            backend: "native", "numpy", or "auto": native where it was built.
            io: "mmap" is fastest for what is in the page cache; a file that is cut short under it
                kills the process. "pread" is for data larger than memory, for network file
                systems, and for files that are not in the page cache: it asks the disk for the
                next batches' windows and holds none of the file. "ram" copies it all. "auto"
                chooses one of the first two.
            without: shards to leave out; another corpus, with another fingerprint.

        Raises:
            DataError: nothing is there, or nothing is left.
            IntegrityError: a file is not what its size, its header or the metadata says.
        """
        if io not in IO:
            raise ValueError(f"io is one of {', '.join(IO)}, not {io!r}")
        with _uncollected():
            return cls._open(dataset_dirs, split, backend, io, without)

    @classmethod
    def _open(
        cls,
        dataset_dirs: Sequence[Path | str],
        split: Split,
        backend: str,
        io: str,
        without: Collection[Path],
    ) -> TokenCorpus:
        sources = [open_split(Path(folder), split) for folder in dataset_dirs]
        if without:
            sources = [[s for s in source if s.path not in without] for source in sources]
            if not all(sources):
                raise DataError(
                    f"{split} split of {', '.join(map(str, dataset_dirs))}",
                    "every shard is left out",
                    "copy the files again, or prepare the dataset again",
                )
        name = f"{split} split of {', '.join(map(str, dataset_dirs))}"
        return cls._of_sources(sources, name, backend, io)

    @classmethod
    def from_shards(
        cls, shards: Sequence[Shard], source: str, backend: str = "auto", io: str = "auto"
    ) -> TokenCorpus:
        """Hold shards that were opened, and so checked, elsewhere, in the order given.

        Args:
            shards: one or more.
            source: what messages call them.
            backend: as `from_datasets`.
            io: likewise.
        """
        with _uncollected():
            return cls._of_sources([list(shards)], source, backend, io)

    @classmethod
    def _of_sources(
        cls, sources: list[list[Shard]], name: str, backend: str, io: str
    ) -> TokenCorpus:
        shards = [shard for source in sources for shard in source]
        corpus = cls(
            name,
            [shard.name for shard in shards],
            [shard.n_tokens for shard in shards],
            dataset_fingerprint(shards),
        )
        corpus.source_sizes = [sum(s.n_tokens for s in source) for source in sources]
        corpus.shards = shards
        if module := corpus._choose(backend):
            firsts = [source[0] for source in sources if source]
            corpus.io = _fitting_io(shards, firsts, module) if io == "auto" else io
            corpus._native = module.Corpus.open(list(map(_spec, shards)), corpus.io)
        elif io == "pread":
            raise DataError(
                f"{corpus.source} with io pread", corpus.backend_note, "use io auto, mmap or ram"
            )
        else:
            corpus.io = "ram" if io == "ram" else "mmap"
            corpus._arrays = [(load_shard if io == "ram" else map_shard)(s) for s in shards]
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
        corpus._spans = Spans.of_array(array)
        if module := corpus._choose(backend):
            corpus._native = module.Corpus.wrap(array)
        else:
            corpus._arrays = [array]
        return corpus

    def reader(self, order: SampleStream) -> BatchReader:
        """Return the reader of this corpus's backend for one sample order."""
        if self._closed:
            raise ValueError(f"{self.source} is closed")
        if self._native is None:
            return NumpyReader(self._arrays, order)
        module, _ = native_module()
        assert module is not None
        twin = order.to_native(module)
        if twin is None:
            return StartsReader(self, order)
        reader: BatchReader = module.BatchReader(self._native, twin)
        return reader

    def gather(self, starts: NDArray[np.int64], x: Int64, y: Int64) -> int:
        """Fill x and y, each (rows, T) int64, with the windows that begin at `starts`.

        Args:
            starts: (rows,) first tokens; T + 1 tokens from each are in the corpus.
            x: tokens of the windows but the last.
            y: likewise but the first.

        Returns:
            The largest token id read.
        """
        if self._native is not None:
            module, _ = native_module()
            assert module is not None
            return int(module.gather(self._native, starts.tolist(), x, y))
        for row, start in enumerate(starts.tolist()):
            window = self.read_span(start, x.shape[1] + 1)
            x[row], y[row] = window[:-1], window[1:]
        return max(int(x.max()), int(y.max())) if x.size else 0

    def locate(self, token: int) -> tuple[str, int]:
        """Return the shard name and the position within it of a token of the corpus."""
        shard = int(np.searchsorted(self._ends, token, side="right"))
        begin = int(self._ends[shard - 1]) if shard else 0
        return self._names[shard], token - begin

    def read_span(self, start: int, count: int) -> Tokens:
        """Return the tokens [start, start + count) of the corpus, from as many shards as it takes.

        Raises:
            ValueError: they are not in the corpus, or it is closed.
            DataError, DataChangedError: a shard can no longer be read as it was.
        """
        if self._closed or not 0 <= start <= start + count <= self.n_tokens:
            state = "closed" if self._closed else f"of {self.n_tokens} tokens"
            raise ValueError(f"tokens [{start}, +{count}) of {self.source}, which is {state}")
        if self._native is not None:
            tokens: Tokens = self._native.span(start, count)
            return tokens
        if self._spans is None:
            self._spans = Spans.of_shards(self.shards, self.io)
        return self._spans.read(start, count)

    def document_ends(self) -> NDArray[np.uint64] | None:
        """Where documents end, ascending; None where the dataset has no index of them."""
        return joined_ends(self.shards)

    def stored_weights(self) -> StoredWeights:
        """The loss weights that the shards store beside their tokens."""
        return StoredWeights(self.shards)

    def close(self) -> None:
        """Let go of the files; readers made before keep theirs until they are dropped."""
        self._native, self._arrays, self._closed = None, [], True
        self._spans = None

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


class StartsReader:
    """Reads an order that only Python knows: a `BatchReader`."""

    def __init__(self, corpus: TokenCorpus, order: SampleStream) -> None:
        self._corpus, self._order = corpus, order
        self.width = max((shard.width for shard in corpus.shards), default=4)

    def read(self, first_sample: int, x: Int64, y: Int64, next_sample: int) -> int:
        """See BatchReader; the hint is of no use here."""
        del next_sample
        return self._corpus.gather(self._order.starts(first_sample, len(x)), x, y)

    def read_windows(self, first_sample: int, windows: Tokens, next_sample: int) -> int:
        """See BatchReader."""
        shape = (len(windows), self._order.seq_len)
        x, y = np.empty(shape, np.int64), np.empty(shape, np.int64)
        largest = self.read(first_sample, x, y, next_sample)
        windows[:, :-1], windows[:, -1] = x, y[:, -1]
        return largest


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector: of ten thousand shards everything is kept."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _spec(s: Shard) -> tuple[Any, ...]:
    """What the extension is told of a shard: also which file it is, as it is opened later."""
    identity = s.identity
    if identity is None:
        try:
            info = os.stat(s.path)
        except OSError as error:
            raise DataError(f"shard {s.path}", f"cannot be examined: {error.strerror}") from error
        identity = (info.st_dev, info.st_ino, info.st_mtime_ns)
    return str(s.path), s.width, s.n_tokens, s.offset, s.file_size, identity


def _fitting_io(shards: list[Shard], firsts: list[Shard], module: ModuleType) -> str:
    """Map what is on a local disk, fits into memory and is already there; read the rest."""
    if any(module.is_remote(str(shard.path)) for shard in firsts):
        return "pread"
    if sum(shard.file_size for shard in shards) > _SHARE_OF_MEMORY * _available_bytes():
        return "pread"
    step = -(-len(shards) // _SAMPLED_SHARDS)
    filled = [shard for shard in shards[::step] if shard.n_tokens]
    shares = [module.resident_share(str(shard.path)) for shard in filled]
    return "mmap" if sum(shares) >= _RESIDENT * len(shares) else "pread"


def _available_bytes() -> int:
    """Memory that files and programs may still take; all of it where that cannot be told."""
    try:
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 62
