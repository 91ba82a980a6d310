"""Splits of so many native shards that their headers are read ahead of the checks."""

import contextlib
import dataclasses
import os
import re
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mypt_fast.data.format import files, native_file, open_split
from mypt_fast.data.format.metadata import is_numbered, natural_order
from mypt_fast.errors import MyptError
from tests.data.shard_files import native_bytes, write_file

DOCUMENTS = [3, 7, 100]


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Seven shards, more than are sampled; the tables of one do not fit in what is read ahead."""
    monkeypatch.setattr(native_file, "SAMPLED_SHARDS", 3)
    monkeypatch.setattr(files, "_FILES_AT_ONCE", 2)
    for i in range(7):
        ends = range(1, 1001) if i == 4 else DOCUMENTS
        tokens = np.arange(1000 if i == 4 else 100) + i
        write_file(tmp_path / f"train/shard_{i:05d}.bin", native_bytes(tokens, ends))
    return tmp_path


def one_by_one(monkeypatch):
    """Take the extension away from what reads ahead."""

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(files.importlib, "import_module", missing)


def described(shards):
    """Everything about shards that can be compared."""
    rows = [{f.name: getattr(s, f.name) for f in dataclasses.fields(s)} for s in shards]
    for row in rows:
        documents = row.pop("documents")
        row["ends"] = documents.read().tolist()
    return rows


def test_shards_read_ahead_are_the_same_as_read_one_by_one(split, monkeypatch):
    ahead = described(open_split(split, "train"))
    one_by_one(monkeypatch)
    assert ahead == described(open_split(split, "train"))
    assert [len(row["ends"]) for row in ahead] == [3, 3, 3, 3, 1000, 3, 3]


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(at):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)

    return damage


def empty(path):
    path.write_bytes(b"")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("index", [3, 4])
@pytest.mark.parametrize(
    "damage",
    [cut, flip(100), flip(4090), flip(-30), flip(-10), flip(-20), empty, pipe, folder],
)
def test_damage_is_found_in_the_same_words(split, monkeypatch, damage, index):
    damage(split / f"train/shard_{index:05d}.bin")
    with pytest.raises(MyptError) as ahead:
        open_split(split, "train")
    one_by_one(monkeypatch)
    with pytest.raises(MyptError) as alone:
        open_split(split, "train")
    assert type(ahead.value) is type(alone.value)
    assert str(ahead.value) == str(alone.value)
    assert f"shard_{index:05d}.bin" in str(ahead.value)


def test_no_thread_reads_ahead_once_a_damaged_shard_is_refused(split):
    """The collector would end it later, perhaps under a lock that its last breath needs."""
    cut(split / "train/shard_00004.bin")
    before = threading.active_count()
    with pytest.raises(MyptError) as refused:  # it holds the frames of what was refused
        open_split(split, "train")
    assert threading.active_count() == before, refused


def test_a_file_replaced_between_its_ends_and_its_tables_is_refused(split, monkeypatch):
    path = split / "train/shard_00004.bin"
    whole = files.read_ends

    @contextlib.contextmanager
    def replacing(*args):
        with whole(*args) as ends:
            found = list(ends)
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
        yield iter(found)

    monkeypatch.setattr("mypt_fast.data.format.dataset.read_ends", replacing)
    with pytest.raises(MyptError, match="is another file than a moment ago"):
        open_split(split, "train")


def test_a_name_that_is_no_text_is_read_by_itself(split):
    name = os.fsencode(split) + b"/train/shard_\xff.bin"
    with open(name, "wb") as f:
        f.write(native_bytes(np.arange(50), [50]))
    assert sorted(s.n_tokens for s in open_split(split, "train")) == [50] + [100] * 6 + [1000]


NAMES = st.from_regex(re.compile(r"[ab_0-9]{0,3}[0-9]{1,3}[b0-9]?\.bin", re.ASCII), fullmatch=True)


@given(st.lists(NAMES, max_size=6, unique=True))
def test_names_taken_for_numbered_are_in_their_natural_order(names):
    names.sort()
    if is_numbered(names):
        assert names == sorted(names, key=natural_order)


def test_the_names_that_are_written_are_numbered():
    assert is_numbered([f"shard_{i:05d}.bin" for i in range(12)])
    assert not is_numbered(["shard_10.bin", "shard_9.bin"])
    assert not is_numbered(["a11_2.bin", "a1_22.bin"])


def test_many_files_are_read_by_several_threads_and_none_is_left_open(tmp_path):
    """What cannot be read is None, whatever stands beside it."""
    native = pytest.importorskip("mypt_fast._native", reason="the extension is not built")
    sizes = [0, 1, 7, 8, 9, 40]
    paths, expected = [], []
    for i in range(400):
        path, data = tmp_path / f"{i}.bin", bytes(j % 251 for j in range(i, i + sizes[i % 6]))
        path.write_bytes(data)
        paths.append(str(path))
        expected.append((len(data), data[:8], data[-4:]))
    os.mkfifo(tmp_path / "pipe")
    for at, odd in ((399, "pipe"), (200, ""), (100, "missing"), (3, "4.bin\0.bin")):
        paths[at], expected[at] = f"{tmp_path}/{odd}", None
    before = len(os.listdir("/proc/self/fd"))
    found = native.read_ends(paths, 8, 4)
    assert len(os.listdir("/proc/self/fd")) == before
    assert [f and (f[0], f[2], f[3]) for f in found] == expected
    stat = os.stat(paths[0])
    assert found[0][1] == (stat.st_dev, stat.st_ino, stat.st_ctime_ns)
    assert native.read_ends([], 8, 4) == []
