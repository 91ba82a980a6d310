"""Damaged and hostile files: every parser answers with an error of ours or a sound shard.

Some hundred inputs here, 105,000 by `pytest -m slow`. A failing input is named by its number: the
generator is seeded, so that it comes again.
"""

import json
import os
import random
import struct
import tracemalloc

import numpy as np
import pytest
import xxhash

from mypt_fast.data.format import files as format_files
from mypt_fast.data.format import open_split
from mypt_fast.data.format.verify import verify_shard
from mypt_fast.errors import MyptError
from tests.data.shard_files import describe, llmc_bytes, megatron_bytes, native_bytes

TOKENS = [int(x) for x in np.random.default_rng(0).integers(0, 500, 120)]
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 62,
            (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip


def mutate(rng, data):
    """Return the bytes after one to three changes of kinds that break parsers."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(64), max(0, len(out) - 1))  # where the counts are
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(EXTREMES) + rng.randint(-2, 2)
            out[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out += rng.randbytes(rng.choice((1, 4, 8, 24, 100)))
        elif kind == 4:
            del out[at : at + rng.choice((1, 4, 8, 16))]
        else:
            source = rng.randrange(len(out) + 1)
            out[at : at + 8] = out[source : source + 8]
    return bytes(out)


def reseal(data):
    """Make the hashes of a native shard fit again, so that what is behind them is reached."""
    if len(data) < 4120:
        return data
    body = data[:4088]
    out = bytearray(body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + data[4096:])
    tables = bytes(out[TABLES:-24])
    out[-24:] = struct.pack("<8sQQ", b"MYPTEND1", len(out), xxhash.xxh3_64_intdigest(tables))
    return bytes(out)


NATIVE = native_bytes(TOKENS, [3, 50, 120], mask=[1] * 120, vocab_size=500, eot_id=0)
TABLES = len(NATIVE) - 24 - 8 * 4
MEGATRON = megatron_bytes([TOKENS[:5], TOKENS[5:50], TOKENS[50:]])
SPANS = np.array([(0, 10), (10, 30), (40, 80)], "<u8").tobytes()
METADATA = {
    "format": "mypt",
    "dtype": "uint32",
    "vocab_size": 500,
    "shards": [{"name": "train/a.bin", "tokens": 120, "xxh3_128": "ab" * 16}],
}


def native_input(rng):
    data = mutate(rng, NATIVE)
    return {"train/a.bin": reseal(data) if rng.random() < 0.6 else data}


def raw_input(rng):
    base = rng.choice((NATIVE, llmc_bytes(TOKENS), MEGATRON[1], bytes(480)))
    return {"train/a.bin": mutate(rng, base)}


def llmc_input(rng):
    return {"train/a.bin": mutate(rng, llmc_bytes(TOKENS, rng.choice((2, 4))))}


def megatron_input(rng):
    tokens, index = MEGATRON
    if rng.random() < 0.1:
        tokens = mutate(rng, tokens)
    return {"train/a.bin": tokens, "train/a.idx": mutate(rng, index)}


def episodes_input(rng):
    tokens = np.array(TOKENS, "<u4").tobytes()
    mask = bytes(120) if rng.random() < 0.9 else bytes(rng.randrange(300))
    return {
        "train/tokens.bin": tokens if rng.random() < 0.9 else mutate(rng, tokens),
        "train/episodes.idx": mutate(rng, SPANS),
        "train/mask.bin": mask,
    }


def metadata_input(rng):
    text = json.dumps(METADATA).encode()
    if rng.random() < 0.5:
        text = mutate(rng, text)
    else:
        value = json.loads(text)
        places = [(value, key) for key in (*value, "added")]
        places += [(value["shards"][0], key) for key in ("name", "tokens", "xxh3_128")]
        where, key = rng.choice(places)
        where[key] = rng.choice(
            (None, True, -1, 1.5, 1e400, 1 << 70, "", "native", "../../etc/passwd", "\0", "\ud800",
             [], {}, [[]], [None], {"a": []}, "uint16")
        )  # fmt: skip
        text = json.dumps(value).encode()
    if rng.random() < 0.01:
        text = b"[" * rng.choice((10, 100_000))
    return {
        "train/a.bin": np.array(TOKENS, "<u4").tobytes(),
        "dataset_metadata.json": text,
    }


INPUTS = {
    "native": native_input,
    "raw": raw_input,
    "llmc": llmc_input,
    "megatron": megatron_input,
    "episodes": episodes_input,
    "metadata": metadata_input,
}


class Folder:
    """A dataset folder whose files are overwritten in place: faster than making new ones."""

    def __init__(self, root):
        (root / "train").mkdir()
        self.root, self.handles = root, {}

    def fill(self, content):
        for name, data in content.items():
            if name not in self.handles:
                flags = os.O_RDWR | os.O_CREAT
                self.handles[name] = os.open(self.root / name, flags, 0o644)
            os.ftruncate(self.handles[name], len(data))
            os.pwrite(self.handles[name], data, 0)

    def close(self):
        for handle in self.handles.values():
            os.close(handle)


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_read_is_larger_than_its_file(monkeypatch):
    """A count is compared with the file before memory is taken for it."""
    pread = os.pread

    def checked(descriptor, size, offset):
        assert 0 <= size <= os.fstat(descriptor).st_size
        assert 0 <= offset < 1 << 62
        return pread(descriptor, size, offset)

    monkeypatch.setattr(format_files.os, "pread", checked)


def examine(folder, content):
    """Open and read everything; return the error, or None. Anything but our errors is raised."""
    folder.fill(content)
    try:
        shards = open_split(folder.root, "train")
        for shard in shards:
            size = shard.path.stat().st_size
            assert shard.offset + shard.n_tokens * shard.width <= size
            if shard.documents is not None:
                ends = shard.document_ends()
                assert (np.diff(ends.astype(object)) > 0).all()
                assert not len(ends) or (ends[0] > 0 and ends[-1] == shard.n_tokens)
            for plane in shard.planes:
                assert len(shard.read_plane(plane.kind)) == shard.n_tokens
            verify_shard(shard)
    except MyptError as error:
        return error
    return None


COUNTS = [pytest.param(60), pytest.param(17_500, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", INPUTS)
def test_only_our_errors_come_out(kind, count, folder):
    rng = random.Random(f"{kind} {count}")
    refused = 0
    for i in range(count):
        content = INPUTS[kind](rng)
        try:
            error = examine(folder, content)
            assert error is None or (error.what and len(str(error)) < 2000)
            refused += error is not None
        except Exception as error:
            raise AssertionError(f"{kind} input {i} of {count}: {content}") from error
    assert refused > count // 5  # and the inputs are worth something


@pytest.mark.parametrize("count", [pytest.param(100), pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_native_shard_that_was_changed_in_any_way_is_refused(count, folder):
    rng = random.Random(count)
    describe(folder.root, format="native")  # where nobody says so, three lucky hits make it raw
    for i in range(count):
        data = mutate(rng, NATIVE)
        error = examine(folder, {"train/a.bin": data})
        assert (error is None) == (data == NATIVE), i


@pytest.mark.parametrize("kind", INPUTS)
def test_memory_stays_bounded(kind, folder):
    rng = random.Random(kind)
    examine(folder, INPUTS[kind](rng))
    tracemalloc.start()
    for _ in range(40):
        examine(folder, INPUTS[kind](rng))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
