"""Native shards: what is read, and that no changed byte goes unseen."""

import errno
import os
import struct

import numpy as np
import pytest
import xxhash

from mypt_fast.data.format import (
    dataset_fingerprint,
    files,
    native,
    native_file,
    open_file,
    open_split,
)
from mypt_fast.data.format.source import open_source, read_blocks
from mypt_fast.data.format.verify import verify_dataset, verify_source
from mypt_fast.data.loader import TokenCorpus, TokenLoader
from mypt_fast.errors import (
    ChecksumError,
    DataChangedError,
    DataError,
    FormatError,
    IntegrityError,
    TruncatedShardError,
)
from tests.data.shard_files import describe, native_bytes, write_file

TOKENS = np.arange(1000, 1101)  # odd, so that there is padding
ENDS = [10, 11, 60, 101]
MASK = np.arange(101) % 2
SEGMENTS = np.arange(101) % 5


@pytest.fixture
def data():
    return native_bytes(
        TOKENS, ENDS, mask=MASK, segments=SEGMENTS, vocab_size=5000, eot_id=4999, max_token=1100
    )


@pytest.fixture
def shard(tmp_path, data):
    """The path of a small shard with everything that a shard can have."""
    return write_file(tmp_path / "train/shard_00000.bin", data)


def test_everything_of_a_shard_is_known(shard, tmp_path):
    (found,) = open_split(tmp_path, "train")
    assert (found.format, found.name) == ("native", "train/shard_00000.bin")
    assert (found.width, found.n_tokens, found.offset) == (2, 101, 4096)
    assert (found.vocab_size, found.eot_id, found.max_token) == (5000, 4999, 1100)
    assert found.documents.count == 4
    assert found.document_ends().dtype == np.uint64
    assert found.document_ends().tolist() == ENDS
    assert found.read_plane("mask").tolist() == MASK.tolist()
    assert found.read_plane("segments").tolist() == SEGMENTS.tolist()
    assert found.plane("weights") is None
    with pytest.raises(DataError, match="has no weights"):
        found.read_plane("weights")


def test_a_header_says_what_pack_header_was_told(data):
    header = native.unpack_header(data[:4096])
    assert native.pack_header(header) == data[:4096]
    assert native.layout(header).file_size == len(data)


def test_the_loader_reads_native_shards(tmp_path, backend):
    for i in range(3):
        tokens = np.arange(100 * i, 100 * i + 100)
        write_file(tmp_path / f"train/shard_{i:05d}.bin", native_bytes(tokens))
    corpus = TokenCorpus.from_dataset(tmp_path, "train", backend)
    x, y = TokenLoader(corpus, 20, seed=1, global_batch=14).next(14)
    assert np.array_equal(x + 1, y)
    assert x.min() < 20


def test_a_shard_without_documents_says_so(tmp_path):
    path = write_file(tmp_path / "a.bin", native_bytes(TOKENS))
    with pytest.raises(DataError, match="records no documents"):
        open_file(path).document_ends()


def test_an_empty_shard_is_read(tmp_path):
    write_file(tmp_path / "train/a.bin", native_bytes([]))
    write_file(tmp_path / "train/b.bin", native_bytes([1, 2], width=4))
    assert [s.n_tokens for s in open_split(tmp_path, "train")] == [0, 2]
    assert verify_dataset(tmp_path).tokens == 2


def test_every_flipped_byte_of_header_tables_and_footer_is_found_at_open(shard, data, tmp_path):
    layout = native.layout(native.unpack_header(data[:4096]))
    places = [*range(4096), *range(layout.documents, len(data))]
    assert len(places) > 4096 + 8 * 5 + 24 - 1
    with shard.open("r+b", buffering=0) as file:
        for place in places:
            os.pwrite(file.fileno(), bytes([data[place] ^ (1 + place % 255)]), place)
            with pytest.raises(IntegrityError):
                open_split(tmp_path, "train")
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert open_split(tmp_path, "train")[0].n_tokens == 101


def test_every_flipped_byte_between_them_is_found_by_a_full_verification(shard, data, tmp_path):
    layout = native.layout(native.unpack_header(data[:4096]))
    with shard.open("r+b", buffering=0) as file:
        for place in range(4096, layout.documents):
            os.pwrite(file.fileno(), bytes([data[place] ^ 0x80]), place)
            with pytest.raises(IntegrityError):
                verify_dataset(tmp_path, workers=1)
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert verify_dataset(tmp_path).bytes_read == 101 * 4


def test_every_truncation_and_extension_is_found_at_open(shard, data, tmp_path):
    for size in range(len(data) - 1, 0, -1):
        os.truncate(shard, size)
        with pytest.raises(IntegrityError):
            open_split(tmp_path, "train")
    for extra in (b"\0", bytes(8), bytes(4096), data):
        shard.write_bytes(data + extra)
        with pytest.raises(TruncatedShardError, match=f"{len(data + extra)} bytes, where its hea"):
            open_split(tmp_path, "train")


def test_a_dataset_that_says_it_is_native_knows_a_truncation_of_any_length(shard, data, tmp_path):
    describe(tmp_path, format="native")
    for size in (0, 1, 7, 8, 4095, 4096, 4119, 4120, len(data) - 1):
        shard.write_bytes(data[:size])
        with pytest.raises(TruncatedShardError, match=f"shard_00000.bin; {size} bytes"):
            open_split(tmp_path, "train")


def test_the_magic_that_was_found_is_shown_in_hex(shard, data, tmp_path):
    shard.write_bytes(b"NYPTSHD1" + data[8:])
    with pytest.raises(FormatError, match=r"magic 4e59505453484431, not 4d59505453484431"):
        open_split(tmp_path, "train")


def resealed(data, offset, field):
    """A header with other bytes at `offset`, and a hash that fits them."""
    body = data[:offset] + field + data[offset + len(field) : 4088]
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + data[4096:]


@pytest.mark.parametrize(
    ("offset", "field", "error", "match"),
    [
        (8, struct.pack("<I", 2), FormatError, "version 2; this program reads version 1"),
        (12, bytes([1, 2, 3, 4]), FormatError, "endian tag 0x4030201"),
        (16, struct.pack("<I", 3), FormatError, "width 3"),
        (20, struct.pack("<I", 4), FormatError, "flags 0x4"),
        (24, struct.pack("<Q", 1 << 63), FormatError, "counts out of range"),
        (24, struct.pack("<Q", 1 << 60), TruncatedShardError, "its header says"),
        (32, struct.pack("<Q", 1 << 60), TruncatedShardError, "its header says"),
        (24, struct.pack("<Q", 100), TruncatedShardError, r"\(100 tokens of 2 bytes"),
        (40, struct.pack("<Q", 1100), FormatError, "1100, not below its vocab_size 1100"),
        (48, struct.pack("<q", -2), FormatError, "eot_id -2"),
        (56, struct.pack("<Q", 1 << 16), FormatError, "65536"),
    ],
)
def test_a_header_with_a_right_hash_and_a_wrong_claim_is_refused(
    shard, data, tmp_path, offset, field, error, match
):
    shard.write_bytes(resealed(data, offset, field))
    with pytest.raises(error, match=match):
        open_split(tmp_path, "train")


def test_a_largest_token_that_two_bytes_cannot_hold_is_refused(tmp_path):
    write_file(tmp_path / "train/a.bin", native_bytes(TOKENS, max_token=1 << 16))
    with pytest.raises(FormatError, match="largest token 65536 in 2 bytes a token"):
        open_split(tmp_path, "train")


def test_blocks_that_are_right_do_not_excuse_a_wrong_hash_of_all(shard, data, tmp_path):
    shard.write_bytes(resealed(data, 96, bytes(16)))
    open_split(tmp_path, "train")
    with pytest.raises(ChecksumError, match=r"the header records 0{32}, though every block is"):
        verify_dataset(tmp_path)


@pytest.mark.parametrize(
    ("ends", "match"),
    [
        ([10, 10, 101], "document 1 ends at token 10, the one before it at 10"),
        ([10, 5, 101], "document 1 ends at token 5, the one before it at 10"),
        ([0, 101], "document 0 is empty"),
        ([10, 100], "the last document ends at token 100 of 101"),
        ([10, 1 << 63], "the last document ends"),
    ],
)
def test_ends_that_do_not_ascend_to_the_last_token_are_refused(tmp_path, ends, match):
    write_file(tmp_path / "train/a.bin", native_bytes(TOKENS, ends))
    (shard,) = open_split(tmp_path, "train")
    with pytest.raises(FormatError, match=match):
        shard.document_ends()
    with pytest.raises(FormatError, match=match):
        verify_dataset(tmp_path, full=False)


def test_tables_beyond_the_budget_are_checked_when_they_are_used(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_file(tmp_path / f"train/{name}.bin", native_bytes(TOKENS, ENDS))
    monkeypatch.setattr(native_file, "TABLES_AT_OPEN", 8 * 5)  # the first shard's
    path = tmp_path / "train/b.bin"
    data = bytearray(path.read_bytes())
    data[-32] ^= 1  # the block table
    path.write_bytes(data)
    _, late = open_split(tmp_path, "train")
    with pytest.raises(ChecksumError, match=r"b\.bin; document index and block table hash to 0x"):
        late.document_ends()


def test_a_table_that_is_longer_than_memory_is_not_read_at_open(tmp_path):
    """A sparse file of 40 GiB whose header is right: 8 GiB of tokens, 32 GiB of document ends."""
    header = native.Header(2, 1 << 32, n_docs=1 << 32)
    layout = native.layout(header)
    path = write_file(tmp_path / "train/a.bin", native.pack_header(header))
    try:
        os.truncate(path, layout.file_size)
    except OSError as error:
        pytest.skip(f"the file system holds no sparse file of 40 GiB: {error}")
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), native.pack_footer(layout.file_size, b""), layout.footer)
    assert open_split(tmp_path, "train")[0].documents.count == 1 << 32


def test_a_damaged_block_is_named_with_its_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50000, 1_200_000)
    path = write_file(tmp_path / "train/a.bin", native_bytes(tokens))
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff", 4096 + (1 << 20) + 5)
    open_split(tmp_path, "train")
    with pytest.raises(
        ChecksumError, match=r"a\.bin; block 1 \(1 MiB; tokens 524288 to 1048575\) hashes to 0x"
    ):
        verify_dataset(tmp_path)


def test_the_first_damage_in_reading_order_is_reported_whoever_finds_it(tmp_path):
    for i in range(6):
        path = write_file(tmp_path / f"train/{i}.bin", native_bytes(TOKENS))
        if i >= 2:
            os.truncate(path, path.stat().st_size)
            with path.open("r+b") as file:
                os.pwrite(file.fileno(), b"\xff", 4100)
    for workers in (1, 2, 5):
        with pytest.raises(ChecksumError, match=r"/2\.bin; block 0"):
            verify_dataset(tmp_path, workers=workers)


def test_hashes_that_fit_a_token_above_the_headers_largest_are_not_enough(tmp_path):
    write_file(tmp_path / "train/a.bin", native_bytes(TOKENS, max_token=1099))
    with pytest.raises(FormatError, match="block 0 holds token 1100, where the header says 1099"):
        verify_dataset(tmp_path)


def test_a_native_shard_among_raw_ones_is_refused(tmp_path, data):
    np.arange(100, dtype="<u4").tofile(write_file(tmp_path / "train/a.bin", b""))
    write_file(tmp_path / "train/b.bin", data)
    with pytest.raises(FormatError, match=r"b\.bin; begins with 4d59505453484431"):
        open_split(tmp_path, "train")
    (tmp_path / "train/a.bin").rename(tmp_path / "train/c.bin")
    with pytest.raises(IntegrityError, match=r"c\.bin; 400 bytes"):
        open_split(tmp_path, "train")


def test_the_fingerprint_tells_shards_apart_by_everything_they_hold(tmp_path):
    variants = [
        native_bytes(TOKENS, ENDS, mask=MASK),
        native_bytes(TOKENS + 1, ENDS, mask=MASK),
        native_bytes(TOKENS, ENDS[1:], mask=MASK),
        native_bytes(TOKENS, ENDS, mask=1 - MASK),
        native_bytes(TOKENS, ENDS, mask=MASK, eot_id=5),
        native_bytes(TOKENS, ENDS),
    ]
    prints = set()
    for data in variants:
        write_file(tmp_path / "train/a.bin", data)
        prints.add(dataset_fingerprint(open_split(tmp_path, "train")))
    assert len(prints) == len(variants)


def test_metadata_that_counts_other_tokens_is_refused(shard, tmp_path):
    entry = {"name": "train/shard_00000.bin", "tokens": 100}
    describe(tmp_path, format="native", shards=[entry])
    with pytest.raises(TruncatedShardError, match=r"101 tokens, where .* says 100"):
        open_split(tmp_path, "train")


def test_a_sound_shard_of_another_dataset_is_refused(shard, data, tmp_path):
    entry = {"name": "train/shard_00000.bin", "tokens": 101}
    right = xxhash.xxh3_128_hexdigest(TOKENS.astype("<u2").tobytes())
    describe(tmp_path, format="native", shards=[entry | {"xxh3_128": right}])
    assert open_split(tmp_path, "train")[0].n_tokens == 101
    shard.write_bytes(native_bytes(TOKENS + 1))
    with pytest.raises(ChecksumError, match=f"the metadata {right}; it is another dataset's"):
        open_split(tmp_path, "train")


def test_a_shard_that_is_cut_after_it_was_opened_is_an_error_not_a_crash(shard, tmp_path):
    source = open_source(tmp_path)
    os.truncate(shard, 4150)
    with pytest.raises(TruncatedShardError, match="4150 bytes"):
        list(read_blocks(source.shards[0]))
    with pytest.raises(TruncatedShardError, match="4150 bytes, where its header says"):
        source.shards[0].document_ends()
    with pytest.raises(TruncatedShardError, match="4150 bytes"):
        verify_source(source)
    with pytest.raises(IntegrityError):
        source.shards[0].read_plane("mask")


def test_a_raw_shard_that_changes_after_it_was_opened_is_an_error(tmp_path):
    path = write_file(tmp_path / "train/a.bin", np.arange(100, dtype="<u4").tobytes())
    source = open_source(tmp_path)
    os.truncate(path, 200)
    with pytest.raises(DataChangedError, match=r"ends at byte 200, 200 bytes before it did"):
        list(read_blocks(source.shards[0]))
    with pytest.raises(DataChangedError, match=r"a\.bin; 200 bytes; it was opened with"):
        verify_source(source)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        verify_source(source)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_named(shard, tmp_path, monkeypatch, code):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    source = open_source(tmp_path)
    monkeypatch.setattr(files.os, "pread", fail)
    monkeypatch.setattr(files.os, "preadv", fail)
    match = f"shard_00000.bin; cannot be read: {os.strerror(code)}"
    for use in (lambda: open_split(tmp_path, "train"), lambda: verify_source(source),
                lambda: list(read_blocks(source.shards[0]))):  # fmt: skip
        with pytest.raises(DataError, match=match):
            use()


def test_a_read_that_is_cut_short_by_the_system_goes_on(shard, tmp_path, monkeypatch):
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(files.os, "pread", lambda fd, size, at: pread(fd, min(size, 100), at))
    monkeypatch.setattr(
        files.os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:7]], at)
    )
    assert open_split(tmp_path, "train")[0].document_ends().tolist() == ENDS
    assert verify_dataset(tmp_path).bytes_read == 404


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / "train/a.bin")
    with pytest.raises(DataError, match="not a regular file"):
        open_split(tmp_path, "train")
