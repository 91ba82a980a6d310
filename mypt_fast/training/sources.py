"""Resolve a run's data source: a dataset, a text file, curriculum phases, or the demo corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mypt_fast.config import CurriculumPhase
from mypt_fast.data.annotations import StoredWeights
from mypt_fast.data.document_loader import DocumentLoader, Loader, document_ends
from mypt_fast.data.episode_loader import EpisodeLoader
from mypt_fast.data.format import Split, has_split
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.mixture import MixtureOrder
from mypt_fast.data.mypt_order import MyptShardOrder, MyptTextOrder
from mypt_fast.data.mypt_stream import MyptStream
from mypt_fast.data.order import SampleStream
from mypt_fast.data.prefetch import aligned
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import ConfigError, DataError
from mypt_fast.presets import read_json
from mypt_fast.settings import Settings
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.training.borrowed import Source
from mypt_fast.training.feed import pinned

PREFETCH = 32  # batches
MAX_TOKENIZER_BYTES = 64 << 20
Corpora = tuple[TokenCorpus, TokenCorpus]  # train, val


@dataclass
class Phase:
    """A stretch of steps on one dataset."""

    name: str
    until: int | None
    train: Source
    val: Source
    source: str


class DataOpener:
    """Opens the data of one run; raises DataError with one line where it does not fit.

    Args:
        settings: of the run; `settings.model.vocab_size` is set from the tokenizer.
        notices: lines for the user are appended here.
        progress: called with (phase, done, total) while the demo corpus is made.
        device: that trains; batches for a GPU wait in page-locked memory.
    """

    def __init__(
        self,
        settings: Settings,
        notices: list[str],
        progress: Callable[..., Any] | None,
        device: torch.device,
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self._damaged: set[Path] = set()  # shards to leave out
        self.settings, self.notices, self.progress = settings, notices, progress
        self.loader_note = ""
        self.eot_id: int | None = None  # of the run's tokenizer
        self.pad_id = 0  # of episodes
        self._boundaries_noted = False
        self._has_weights = settings.resume or settings.init_dir is not None
        path = (settings.init_dir or settings.run_dir) / "tokenizer.json"
        has_saved = self._has_weights and path.is_file()
        self.saved_tokenizer = settings.tokenizer  # of an old checkpoint
        if self.saved_tokenizer is None and has_saved:
            self.saved_tokenizer = read_json(path, "tokenizer", MAX_TOKENIZER_BYTES)

    def open(self) -> tuple[Tokenizer, list[Phase], int, int]:
        """Open the training data; returns tokenizer, phases and token counts."""
        data, curriculum = self.settings.data, self.settings.train.curriculum
        if data.input_file and curriculum:
            raise ConfigError(
                "--input_file and a curriculum are two sources of data",
                f"found {data.input_file} and {len(curriculum.phases)} phase(s)",
                "prepare the text and name it in a phase, or use a config without a curriculum",
            )
        if data.dataset_dir and "tokenization" in self.settings.typed:
            self.notices.append("--tokenization is ignored: the dataset has its own tokenizer")
        if data.input_file:
            tokenizer, corpora = self._text(Path(data.input_file))
            self._fit_vocabulary(tokenizer, data.input_file)
            phases = [self._phase("train", None, corpora, data.input_file)]
            return tokenizer, phases, corpora[0].n_tokens, corpora[1].n_tokens
        if self.settings.train.mixture:
            return self._open_mixture(self.settings.train.mixture)
        parts = list(curriculum.phases) if curriculum else []
        if not parts:
            parts = [CurriculumPhase(name="train", dataset_dir=data.dataset_dir or self._demo())]
        elif curriculum and data.dataset_dir and "dataset_dir" in self.settings.typed:
            parts[0] = replace(parts[0], dataset_dir=data.dataset_dir)
            self.settings.train.curriculum = replace(curriculum, phases=tuple(parts))
        tokenizer = self._dataset_tokenizer(parts[0].dataset_dir)
        self._fit_vocabulary(tokenizer, parts[0].dataset_dir)
        opened = []
        for part in parts:
            self._same_tokenizer(tokenizer, part.dataset_dir)
            corpora = self._dataset(part.dataset_dir)
            opened.append((part, corpora))
        phases = [
            self._phase(p.name or f"phase {i + 1}", p.until_iter, c, p.dataset_dir)
            for i, (p, c) in enumerate(opened)
        ]
        data.dataset_dir = parts[0].dataset_dir
        return tokenizer, phases, opened[0][1][0].n_tokens, opened[0][1][1].n_tokens

    def _open_mixture(self, shares: dict[str, float]) -> tuple[Tokenizer, list[Phase], int, int]:
        data, train = self.settings.data, self.settings.train
        if train.curriculum or train.documents == "bestfit" or "dataset_dir" in self.settings.typed:
            raise ConfigError(
                "mixture names the datasets of the whole run",
                "found it beside a curriculum, --documents bestfit or --dataset_dir",
                "give one of them",
            )
        folders = list(shares)
        tokenizer = self._dataset_tokenizer(folders[0])
        self._fit_vocabulary(tokenizer, folders[0])
        for folder in folders:
            self._same_tokenizer(tokenizer, folder)
        corpora = self._corpus(folders, "train"), self._corpus(folders, "val")
        data.dataset_dir = folders[0]
        source = ", ".join(f"{folder} ({share:g})" for folder, share in shares.items())
        phases = [self._phase("train", None, corpora, source)]
        return tokenizer, phases, corpora[0].n_tokens, corpora[1].n_tokens

    def eval_sets(self, tokenizer: Tokenizer) -> dict[str, Loader]:
        """Open the further validation sets, by name."""
        named = dict(self.settings.train.eval_sets or {})
        if self.settings.data.eval_dataset_dir:
            named["general"] = self.settings.data.eval_dataset_dir
        loaders: dict[str, Loader] = {}
        for name, folder in named.items():
            self._same_tokenizer(tokenizer, folder)
            loaders[name] = self._eval_loader(self._corpus([folder], "val"))
        return loaders

    def _phase(self, name: str, until: int | None, corpora: Corpora, source: str) -> Phase:
        s = self.settings
        train = self._loader(corpora[0], s.train.seed, s.global_batch, is_training=True)
        self.loader_note = corpora[0].backend_note
        if corpora[0].io == "pread":
            self.loader_note += ", read ahead from disk"
        if s.train.documents not in ("auto", "concat"):
            self.loader_note += f"; documents: {s.train.documents}"
        return Phase(name, until, train, self._eval_loader(corpora[1]), source)

    def _eval_loader(self, corpus: TokenCorpus) -> Loader:
        return self._loader(corpus, self.settings.train.eval_seed, 1)

    def _loader(
        self, corpus: TokenCorpus, seed: int, global_batch: int, is_training: bool = False
    ) -> Loader:
        cfg, mode = self.settings.model, self.settings.train.documents
        if self._has_episode_rows(corpus):
            return self._episodes(corpus, seed, global_batch, is_training)
        mode = "concat" if mode == "auto" else mode
        weights = self._weights(corpus, is_training)
        common: dict[str, Any] = {
            "seed": seed, "global_batch": global_batch, "vocab_size": cfg.vocab_size,
        }  # fmt: skip
        order = self._order(corpus, seed, self.settings.train.order if is_training else "epoch")
        is_plain = isinstance(order, str) or self.settings.train.mixture
        if mode == "bestfit" and order != "epoch":
            raise ConfigError(
                "--documents bestfit has an order of its own",
                f"found --order {self.settings.train.order}",
                "drop one, or use --documents mask",
            )
        if mode == "concat" and weights is None:
            if is_training and is_plain and (self._on_gpu or corpus.io == "pread"):
                # what is mapped costs a CPU nothing; a disk or a GPU is worth a thread
                common["prefetch"] = PREFETCH
                common["allocate"] = pinned if self._on_gpu else aligned
            self._note_planes(corpus)
            return TokenLoader(corpus, cfg.block_size, order=order, **common)
        if self.settings.data.input_file or mode == "concat":  # a text file is one document
            ends, note = np.array([corpus.n_tokens]), ""
            mode = "mask" if mode == "concat" else mode  # of one document: windows are not cut
        else:
            ends, note = document_ends(corpus, self.eot_id)
        if note and not self._boundaries_noted:
            self.notices.append(note)
            self._boundaries_noted = True
        pad = 0 if self.eot_id is None else self.eot_id
        return DocumentLoader(
            corpus, cfg.block_size, ends, mode, pad_id=pad, order=order, weights=weights, **common
        )

    def _has_episode_rows(self, corpus: TokenCorpus) -> bool:
        """Whether a dataset is read episode by episode, as MyPT does, not as a stream of tokens."""
        train = self.settings.train
        of_episodes = bool(corpus.shards) and all(s.format == "episodes" for s in corpus.shards)
        is_asked = train.documents == "auto" and train.order in ("epoch", "mypt")
        return of_episodes and is_asked and not train.mixture

    def _episodes(
        self, corpus: TokenCorpus, seed: int, global_batch: int, is_training: bool
    ) -> EpisodeLoader:
        cfg = self.settings.model
        pad = self.pad_id if cfg.pad_token_id is None else cfg.pad_token_id
        if pad >= cfg.vocab_size:
            raise ConfigError(
                f"pad_token_id {pad}", f"vocab_size is {cfg.vocab_size}", "name a token below it"
            )
        loader = EpisodeLoader(
            corpus.shards, corpus.source, cfg.block_size,
            seed=cfg.epoch_seed if is_training else seed % (1 << 31),
            mode=cfg.batch_sampling_mode if is_training else "epoch",
            shuffle=cfg.epoch_shuffle or not is_training, global_batch=global_batch,
            vocab_size=cfg.vocab_size, pad_id=pad, min_tokens=cfg.episode_min_tokens,
            use_loss_mask=cfg.use_loss_mask,
        )  # fmt: skip
        if not is_training:
            return loader
        if not cfg.use_loss_mask:
            self._note_planes(corpus, without=("segments",))
        elif not loader.has_masks:
            self.notices.append(f"use_loss_mask is off: {corpus.source} stores no masks")
        if loader.n_long:
            self.notices.append(
                f"{loader.n_long:,} of {loader.n_windows:,} episodes of {corpus.source} are longer "
                f"than {cfg.block_size + 1} tokens: their last ones are read, as in MyPT; "
                "--documents concat reads all as a stream"
            )
        return loader

    def _note_planes(self, corpus: TokenCorpus, without: tuple[str, ...] = ()) -> None:
        stored = {plane.kind for shard in corpus.shards for plane in shard.planes}
        kinds = sorted(stored.difference(without))
        note = f"{' and '.join(kinds)} stored with the data are not used; use_loss_mask uses them"
        if kinds and note not in self.notices:
            self.notices.append(note)

    def _weights(self, corpus: TokenCorpus, is_training: bool) -> StoredWeights | None:
        """The loss masks stored with a corpus, if they are to be used."""
        if not self.settings.model.use_loss_mask:
            return None
        weights = corpus.stored_weights()
        if weights.any:
            return weights
        if is_training:
            self.notices.append(f"use_loss_mask is off: {corpus.source} stores no masks")
        return None

    def _order(self, corpus: TokenCorpus, seed: int, kind: str) -> SampleStream | str:
        shares = self.settings.train.mixture
        if kind == "mypt":
            return self._mypt_order(corpus, seed)
        if not shares or len(corpus.source_sizes) < len(shares):
            return kind
        T = self.settings.model.block_size
        for (folder, share), size in zip(shares.items(), corpus.source_sizes, strict=True):
            if share > 0 and size <= T:
                raise DataError(
                    f"{folder} of the mixture for a context of {T}",
                    f"{size} tokens in a split, where one window needs {T + 1}",
                    "add data, lower block_size, or leave it out",
                )
        try:
            return MixtureOrder(corpus.source_sizes, T, seed, [(None, [*shares.values()])], kind)
        except ValueError as e:
            raise ConfigError(f"mixture of {corpus.source}", str(e), "change its shares") from e

    def _mypt_order(self, corpus: TokenCorpus, seed: int) -> MyptStream:
        cfg, train = self.settings.model, self.settings.train
        if train.mixture or seed >= 1 << 32:
            raise ConfigError(
                "--order mypt is MyPT's own, of one dataset and a seed of 32 bits",
                "found a mixture" if train.mixture else f"found seed {seed}",
                "drop one of the two" if train.mixture else "use a smaller --seed",
            )
        sizes = [shard.n_tokens for shard in corpus.shards]
        order: MyptShardOrder | MyptTextOrder
        if sizes:
            order = MyptShardOrder(sizes, cfg.block_size, cfg.batch_size, seed)
        else:
            order = MyptTextOrder(corpus.n_tokens, cfg.block_size, cfg.batch_size, seed)
        return MyptStream(order)

    def _verify(self, folder: str) -> None:
        """Read every byte of a dataset that is about to be trained on, if that was asked."""
        if self.settings.data.verify_data == "open":
            return
        from mypt_fast.data.format import verify
        from mypt_fast.data.format.source import open_source

        source = open_source(Path(folder))
        if self.settings.data.verify_data == "skip":
            for shard, error in verify.damaged_shards(source):
                self._damaged.add(shard.path)
                self.notices.append(f"left out, {shard.n_tokens:,} tokens: {error}")
            return
        report = verify.verify_source(source)
        without = f"; no hash is recorded for {len(report.unhashed)} shard(s)"
        self.notices.append(
            f"{folder}: {report.bytes_read / 1e9:.2f} GB compared with their hashes in "
            f"{report.seconds:.1f} s{without * bool(report.unhashed)}"
        )

    def _corpus(self, folders: list[str], split: Split) -> TokenCorpus:
        """Open a split of datasets whose shards were written with the tokenizer beside them."""
        from mypt_fast.data.format.tokenizer_file import check_tokenizer, read_tokenizer

        corpus = TokenCorpus.from_datasets(folders, split, without=self._damaged)
        for folder in map(Path, folders):
            shards = [shard for shard in corpus.shards if folder in shard.path.parents]
            check_tokenizer(shards, read_tokenizer(folder), folder)
        return corpus

    def _dataset(self, folder: str) -> Corpora:
        train = self._corpus([folder], "train")
        if self._has_episode_rows(train) and not has_split(Path(folder), "val"):
            self.notices.append(f"{folder} has no val split: validating on its train split")
            return train, train
        return train, self._corpus([folder], "val")

    def _demo(self) -> str:
        from mypt_fast.data.prepare import ensure_demo_dataset

        if self.settings.resume:
            raise DataError(
                f"{self.settings.run_dir} does not say what data it was trained on",
                cure="name it with --dataset_dir or --input_file",
            )
        kind = self._tokenization()
        folder = Path("data") / f"demo_{kind}"
        self.notices.append(
            f"no data named: training on Python's own library sources ({kind}, {folder})"
        )
        return str(ensure_demo_dataset(folder, kind, self.progress))

    def _tokenization(self) -> str:
        """Char for a vocabulary that cannot hold GPT-2's, unless the user says."""
        small = self.settings.model.vocab_size < 50257
        return self.settings.data.tokenization or ("char" if small else "gpt2")

    def _text(self, path: Path) -> tuple[Tokenizer, Corpora]:
        text = _read_text(path)
        if self.saved_tokenizer is not None:
            tokenizer = Tokenizer.from_state(self.saved_tokenizer)
        elif self._tokenization() == "char":
            tokenizer = Tokenizer.from_text(text)
        else:
            tokenizer = Tokenizer.gpt2()
        tokens = np.asarray(tokenizer.encode_to_numpy(text))
        cut = int(0.9 * len(tokens))
        return tokenizer, (
            TokenCorpus.from_tokens(tokens[:cut]),
            TokenCorpus.from_tokens(tokens[cut:]),
        )

    def _dataset_tokenizer(self, folder: str) -> Tokenizer:
        path = Path(folder) / "tokenizer_state.json"
        if not Path(folder).is_dir():
            raise DataError(
                f"no dataset {folder}", "no such folder", "make it with `mypt-fast prepare`"
            )
        if not path.is_file():
            raise DataError(
                f"{path} is missing",
                cure=f"prepare {folder} again, copy its tokenizer state there, or, if its tokens "
                f"are GPT-2's, `mypt-fast data convert {folder} OUT --tokenization gpt2`",
            )
        return Tokenizer.from_state(read_json(path, "tokenizer", MAX_TOKENIZER_BYTES))

    def _same_tokenizer(self, tokenizer: Tokenizer, folder: str) -> None:
        """Refuse a dataset of other tokens than the run's, or with bytes that are not its own."""
        self._verify(folder)
        other = self._dataset_tokenizer(folder)
        expected = self.saved_tokenizer and Tokenizer.from_state(self.saved_tokenizer)
        start = str(self.settings.init_dir) if self.settings.init_dir else "the saved run"
        for known, whose in ((tokenizer, "this run's data"), (expected, start)):
            if known and not _interchangeable(known, other):
                raise DataError(
                    f"{folder} has another vocabulary than {whose}",
                    f"{other.kind} of {other.n_tokens}, not {known.kind} of {known.n_tokens}",
                    "prepare it with the same tokenizer",
                )

    def _fit_vocabulary(self, tokenizer: Tokenizer, source: str) -> None:
        cfg, self.eot_id = self.settings.model, tokenizer.eot_id
        turn_end = tokenizer.special_id("myPT_eot")
        self.pad_id = (self.eot_id or 0) if turn_end is None else turn_end
        needed = tokenizer.model_vocab_size
        if self._has_weights:
            if tokenizer.n_tokens > cfg.vocab_size:
                raise DataError(
                    f"vocabulary of {source} does not fit the model",
                    f"{tokenizer.n_tokens} tokens, model {cfg.vocab_size}",
                    "use the data the model was trained on, or start another run",
                )
        elif tokenizer.kind == "gpt2":
            if cfg.vocab_size < tokenizer.n_tokens:
                raise DataError(
                    f"vocabulary of {source} does not fit the model",
                    f"gpt2 has {tokenizer.n_tokens}, the model's vocab_size is {cfg.vocab_size}",
                    "prepare it with --tokenization char, or use a preset with vocab_size 50304",
                )
        else:
            cfg.vocab_size = needed


def _interchangeable(a: Tokenizer, b: Tokenizer) -> bool:
    """Same ids for the same text; the padded model size may differ."""
    states = [{k: v for k, v in t.get_state().items() if k != "model_vocab_size"} for t in (a, b)]
    return states[0] == states[1]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}", e.strerror or str(e), "check --input_file") from e
    if not data.strip():
        raise DataError(f"{path} is empty", cure="name a text file with something in it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path} is not UTF-8 text", f"byte {e.start}", "convert it, or name a text file"
        ) from e
    if "\0" in text:
        raise DataError(f"{path} is not text", f"NUL at character {text.index(chr(0))}")
    return text
