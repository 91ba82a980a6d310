"""Repeated documents: the set of their digests, and what is counted and left out."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mypt_fast.data.documents import Piece
from mypt_fast.data.duplicates import DigestSet, Duplicates


def test_the_set_agrees_with_pythons_own() -> None:
    draw = random.Random(0)
    # Zeros at either end of a digest are where a fixed-width string comparison could go wrong.
    pool = [bytes(draw.choices((0, 1, 255), k=16)) for _ in range(400)]
    pool += [bytes(16), bytes(15) + b"\1", b"\1" + bytes(15)]
    digests, expected = DigestSet(), set()
    for _ in range(300):
        batch = draw.choices(pool, k=draw.randrange(6))
        known = []
        for digest in batch:
            known.append(digest in expected)
            expected.add(digest)
        assert digests.add(batch) == known
        assert len(digests) == len(expected)


def test_a_member_takes_16_bytes() -> None:
    random_bytes = np.random.default_rng(0).bytes(16 * 200_000)
    digests = DigestSet()
    tracemalloc.start()
    for begin in range(0, len(random_bytes), 16_000):
        batch = random_bytes[begin : begin + 16_000]
        digests.add([batch[n : n + 16] for n in range(0, 16_000, 16)])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(digests) == 200_000
    assert held < 16 * 200_000 * 1.1
    assert peak < 16 * 200_000 * 2.5


def piece(text: str, digest: bytes | None, starts: bool = True, ends: bool = True) -> Piece:
    return Piece(text, "train", starts, ends, digest)


ONE, TWO = b"1" * 16, b"2" * 16


@pytest.mark.parametrize("cut", range(6))
def test_a_long_document_is_dropped_whole_across_units_and_runs(tmp_path: Path, cut: int) -> None:
    pieces = [
        piece("a", ONE, ends=False),
        piece("b", None, starts=False),
        piece("a", ONE, ends=False),
        piece("b", None, starts=False),
        piece("c", TWO),
        piece("c", TWO),
    ]
    first = Duplicates(tmp_path / "digests", drop=True)
    kept = [p.text for p in first.filter(pieces[:cut])]
    counts = first.counts()
    list(first.filter([piece("lost", b"3" * 16)]))  # after the checkpoint: to be forgotten
    first.close()
    second = Duplicates(tmp_path / "digests", drop=True, counts=counts)
    kept += [p.text for p in second.filter(pieces[cut:])]
    assert kept == ["a", "b", "c"]
    assert (second.documents, second.duplicates, second.pieces) == (4, 2, 3)
    assert [p.text for p in second.filter([piece("lost", b"3" * 16)])] == ["lost"]
    second.close()


def test_what_is_not_to_be_dropped_is_only_counted(tmp_path: Path) -> None:
    duplicates = Duplicates(tmp_path / "digests", drop=False)
    pieces = [piece("a", None, ends=False), piece("b", ONE, starts=False), piece("ab", ONE)]
    assert list(duplicates.filter(pieces)) == pieces
    assert (duplicates.documents, duplicates.duplicates) == (2, 1)
    duplicates.close()
