"""The files of an episode dataset as they are written: streaming, each byte once."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from mypt_fast.data.chat import Episode
from mypt_fast.data.format.episodes import INDEX, TOKENS

MAX_SEGMENTS = 255  # of a packed row: segment_ids are bytes, 0 is padding


class EpisodeWriter:
    """Writes one split.

    Args:
        folder: of the split; made here.
        pack: tokens of a packed row; None: an episode is as long as its row.
        pad_id: what fills a packed row.

    Attributes:
        conversations: rows written.
        cut: those that lost their beginning to the packing.
        episodes: entries of the index.
        tokens: of tokens.bin.
        learned: of them, how many have mask 1.
    """

    def __init__(self, folder: Path, pack: int | None, pad_id: int) -> None:
        folder.mkdir(parents=True)
        names = [TOKENS, INDEX, "mask.bin", "mask_weighted.bin"]
        names += ["segment_ids.bin"] if pack else []
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {
            name: self._stack.enter_context((folder / name).open("wb")) for name in names
        }
        self._hash = xxhash.xxh3_128()
        self._pack, self._pad_id = pack, pad_id
        self._row, self._segments = Episode([], [], []), list[int]()
        self.conversations = self.cut = self.episodes = self.tokens = self.learned = 0

    def add(self, episode: Episode) -> None:
        """Write an episode, or lay it into the packed row: the next one where it does not fit."""
        self.conversations += 1
        if not self._pack:
            self._write(episode, [])
            return
        if len(episode.tokens) > self._pack:
            self.cut += 1
            episode = episode.last(self._pack)
        row = self._row
        is_full = len(row.tokens) + len(episode.tokens) > self._pack
        if is_full or (self._segments and self._segments[-1] == MAX_SEGMENTS):
            self._flush()
            row = self._row
        number = self._segments[-1] + 1 if self._segments else 1
        row.tokens += episode.tokens
        row.mask += episode.mask
        row.weights += episode.weights
        self._segments += [number] * len(episode.tokens)

    def close(self) -> str:
        """Write what is left, down to the disk; returns the XXH3-128 of tokens.bin."""
        self._flush()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._stack.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the files, whatever they hold."""
        self._stack.close()

    def _flush(self) -> None:
        if not self._row.tokens:
            return
        missing = (self._pack or 0) - len(self._row.tokens)
        self._row.tokens += [self._pad_id] * missing
        self._row.mask += [0] * missing
        self._row.weights += [0.0] * missing
        self._write(self._row, self._segments + [0] * missing)
        self._row, self._segments = Episode([], [], []), []

    def _write(self, episode: Episode, segments: list[int]) -> None:
        raw = np.array(episode.tokens, "<u4").tobytes()
        self._hash.update(raw)
        count = len(episode.tokens)
        self._files[TOKENS].write(raw)
        self._files[INDEX].write(np.array([self.tokens, count], "<u8").tobytes())
        self._files["mask.bin"].write(np.array(episode.mask, "u1").tobytes())
        self._files["mask_weighted.bin"].write(np.array(episode.weights, "<f4").tobytes())
        if self._pack:
            self._files["segment_ids.bin"].write(np.array(segments, "u1").tobytes())
        self.episodes += 1
        self.tokens += count
        self.learned += sum(episode.mask)
