"""nanoGPT's, llm.c's and Megatron's files: read as they are, refused where they contradict."""

import os
import struct

import numpy as np
import pytest

from mypt_fast.data.format import dataset_fingerprint, has_split, open_file, open_split
from mypt_fast.data.format.verify import verify_dataset
from mypt_fast.data.loader import TokenCorpus, TokenLoader
from mypt_fast.data.reader import map_shard
from mypt_fast.errors import (
    DataError,
    FormatError,
    IntegrityError,
    TokenRangeError,
    TruncatedShardError,
)
from tests.data.shard_files import describe, llmc_bytes, megatron_bytes, native_bytes, write_file

TOKENS = np.arange(500)


def batch(folder, backend, split="train"):
    """Rows of consecutive ids, as the files hold them."""
    corpus = TokenCorpus.from_dataset(folder, split, backend)
    return TokenLoader(corpus, 8, seed=0, order="sequential", global_batch=4).next(4)[0]


# nanoGPT


def nanogpt(folder, dtype="<u2", n=500):
    for name in ("train.bin", "val.bin"):
        write_file(folder / name, np.arange(n, dtype=dtype).tobytes())
    return folder


def test_a_folder_with_train_bin_and_val_bin_is_nanogpts(tmp_path, backend):
    (shard,) = open_split(nanogpt(tmp_path), "train")
    assert (shard.format, shard.name, shard.width, shard.n_tokens) == (
        "nanogpt", "train.bin", 2, 500,
    )  # fmt: skip
    assert has_split(tmp_path, "val")
    assert batch(tmp_path, backend).ravel().tolist() == list(range(32))


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_the_pickle_beside_them_is_never_read(tmp_path):
    import pickle

    write_file(nanogpt(tmp_path) / "meta.pkl", pickle.dumps(_Bomb(tmp_path / "executed")))
    (tmp_path / "meta.pkl").chmod(0)
    assert open_split(tmp_path, "val")[0].n_tokens == 500
    verify_dataset(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_name_in_the_fingerprint_is_not_the_folders(tmp_path):
    prints = {
        dataset_fingerprint(open_split(nanogpt(tmp_path / name), "train")) for name in ("a", "b")
    }
    assert len(prints) == 1


def test_one_file_alone_is_not_nanogpts_layout(tmp_path):
    (nanogpt(tmp_path) / "val.bin").unlink()
    with pytest.raises(FormatError, match=r"train\.bin has no format's magic number"):
        open_split(tmp_path, "train")
    describe(tmp_path, format="nanogpt")
    assert open_split(tmp_path, "train")[0].width == 2


def test_metadata_beside_them_has_to_name_the_format(tmp_path):
    describe(nanogpt(tmp_path), vocab_size=500)
    with pytest.raises(FormatError, match="no format's magic number"):
        open_split(tmp_path, "train")
    describe(tmp_path, format="nanogpt", vocab_size=500)
    assert open_split(tmp_path, "train")[0].vocab_size == 500


def test_uint32_in_nanogpts_layout_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match=r"declared uint16, .* look like uint32"):
        open_split(nanogpt(tmp_path, "<u4"), "train")


def test_an_odd_number_of_bytes_is_refused(tmp_path):
    write_file(nanogpt(tmp_path) / "train.bin", bytes(7))
    with pytest.raises(TruncatedShardError, match=r"train\.bin; 7 bytes is not a multiple of 2"):
        open_split(tmp_path, "train")


def test_a_file_without_magic_needs_a_dtype(tmp_path):
    path = write_file(tmp_path / "tokens.bin", TOKENS.astype("<u2").tobytes())
    with pytest.raises(FormatError, match=r"begins with 0000010002000300; name its --input_dty"):
        open_file(path)
    assert open_file(path, "uint16").n_tokens == 500
    write_file(path, np.arange(20, 2000, dtype="<u2").tobytes())
    with pytest.raises(IntegrityError, match="look like uint16"):
        open_file(path, "uint32")


# llm.c


@pytest.mark.parametrize("width", [2, 4])
def test_both_kinds_of_llmc_are_read(tmp_path, backend, width):
    write_file(tmp_path / "tiny_train.bin", llmc_bytes(TOKENS, width))
    write_file(tmp_path / "tiny_val.bin", llmc_bytes(TOKENS[:50], width))
    (shard,) = open_split(tmp_path, "train")
    assert (shard.format, shard.name, shard.width, shard.n_tokens, shard.offset) == (
        "llmc", "tiny_train.bin", width, 500, 1024,
    )  # fmt: skip
    assert open_split(tmp_path, "val")[0].n_tokens == 50
    assert batch(tmp_path, backend).ravel().tolist() == list(range(32))


def test_llmc_files_are_also_found_in_split_folders_and_in_order(tmp_path):
    for i in (1, 0, 2):
        path = tmp_path / f"train/fineweb_train_{i:06d}.bin"
        write_file(path, llmc_bytes(TOKENS[: 100 + i]))
    assert [s.n_tokens for s in open_split(tmp_path, "train")] == [100, 101, 102]


def test_every_flipped_byte_of_llmcs_header_is_found(tmp_path):
    data = llmc_bytes(TOKENS)
    path = write_file(tmp_path / "train/a.bin", data)
    write_file(tmp_path / "val/a.bin", data)
    with path.open("r+b", buffering=0) as file:
        for place in range(1024):
            os.pwrite(file.fileno(), bytes([data[place] ^ 0x55]), place)
            with pytest.raises(IntegrityError):
                open_split(tmp_path, "train")
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert open_split(tmp_path, "train")[0].format == "llmc"


def test_every_length_but_the_right_one_is_found(tmp_path):
    data = llmc_bytes(TOKENS[:40])
    path = write_file(tmp_path / "train/a.bin", data)
    describe(tmp_path, format="llmc")
    write_file(path, data + b"\0\0")
    for size in reversed([*range(len(data)), len(data) + 1, len(data) + 2]):
        os.truncate(path, size)
        with pytest.raises(TruncatedShardError, match=f"{size} bytes"):
            open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ((20240520, 2, 3), "magic 20240520 .* version 2; llm.c has 20240520 version 1"),
        ((20240801, 1, 3), "version 1"),
        ((20240521, 1, 3), r"magic 20240521 \(89d83401\)"),
        ((20240520, 1, -1), "-1 tokens"),
        ((20240520, 1, 3, 7), "not zero after the third number"),
    ],
)
def test_other_headers_are_refused(tmp_path, fields, match):
    data = np.array(fields, "<i4").tobytes().ljust(1024, b"\0") + bytes(6)
    write_file(tmp_path / "train/a.bin", data)
    describe(tmp_path, format="llmc")
    with pytest.raises(FormatError, match=match):
        open_split(tmp_path, "train")


def test_offsets_beyond_2_gib_are_64_bit(tmp_path, native):
    n = (1 << 30) + 9  # 2 GiB and a few tokens, of which the disk holds almost nothing
    path = write_file(tmp_path / "train/a.bin", llmc_bytes([])[:8] + struct.pack("<i", n))
    os.truncate(path, 1024 + 2 * n)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), np.arange(1, 5, dtype="<u2").tobytes(), 1024 + 2 * (n - 8))
    (shard,) = open_split(tmp_path, "train")
    assert shard.n_tokens == n
    assert map_shard(shard)[n - 8 : n - 4].tolist() == [1, 2, 3, 4]
    corpus = native.Corpus.open(
        [(str(path), shard.width, n, shard.offset, shard.file_size, (0, 0, 0))]
    )
    x, y = np.empty((1, 4), np.int64), np.empty((1, 4), np.int64)
    native.gather(corpus, [n - 9], x, y)
    assert y.tolist() == [[1, 2, 3, 4]]


# Megatron

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


def megatron(folder, documents=DOCUMENTS, dtype="<u2", name="train"):
    tokens, index = megatron_bytes(documents, dtype)
    write_file(folder / f"{name}.bin", tokens)
    write_file(folder / f"{name}.idx", index)
    return folder


@pytest.mark.parametrize(("dtype", "width"), [("<u2", 2), ("<i4", 4)])
def test_both_megatron_dtypes_are_read_with_their_documents(tmp_path, backend, dtype, width):
    documents = [range(20), range(20, 21), range(21, 70)]
    (shard,) = open_split(megatron(tmp_path, documents, dtype), "train")
    assert (shard.format, shard.name, shard.width, shard.n_tokens) == (
        "megatron", "train.bin", width, 70,
    )  # fmt: skip
    assert shard.document_ends().tolist() == [20, 21, 70]
    assert batch(tmp_path, backend).ravel().tolist() == list(range(32))


def test_int64_has_to_be_converted_and_the_error_says_how(tmp_path):
    megatron(tmp_path, dtype="<i8")
    with pytest.raises(FormatError, match="8 bytes each; write it with 2 or 4: mypt-fast data con"):
        open_split(tmp_path, "train")
    assert open_split(tmp_path, "train", int64=True)[0].width == 8


@pytest.mark.parametrize(("dtype", "bad"), [("<i4", -7), ("<i8", -7), ("<i8", 1 << 32)])
def test_ids_that_are_no_ids_are_found_by_a_full_verification(tmp_path, dtype, bad):
    megatron(tmp_path, [[1, 2, 3], [4, bad]], dtype)
    with pytest.raises(TokenRangeError, match=f"token {bad} at position 4 is not in"):
        verify_dataset(tmp_path)


def test_documents_of_several_sequences_and_of_none_are_understood(tmp_path):
    megatron(tmp_path, [[1, 2], [3], [], [4, 5]])
    index = bytearray((tmp_path / "train.idx").read_bytes())
    index[-40:] = np.array([0, 2, 3, 4, 4], "<i8").tobytes()
    (tmp_path / "train.idx").write_bytes(index)
    assert open_split(tmp_path, "train")[0].document_ends().tolist() == [3, 5]


def test_a_missing_half_is_named(tmp_path):
    (megatron(tmp_path / "train", name="a") / "a.idx").unlink()
    describe(tmp_path, format="megatron")
    with pytest.raises(DataError, match=r"index .*a\.idx; cannot be read: No such file"):
        open_split(tmp_path, "train")


HEAD = 34
N = len(DOCUMENTS)


@pytest.mark.parametrize(
    ("offset", "value", "error", "match"),
    [
        (0, b"N", FormatError, "magic 4e4d49444944580000, not 4d4d49444944580000"),
        (9, b"\x02", FormatError, "version 2"),
        (17, b"\x07", FormatError, "dtype code 7"),
        (
            18,
            struct.pack("<Q", 1 << 62),
            TruncatedShardError,
            "header says 4611686018427387904",
        ),
        (26, struct.pack("<Q", 1 << 62), TruncatedShardError, "its header says"),
        (HEAD, struct.pack("<i", -3), FormatError, "sequence 0 has -3 tokens"),
        (HEAD + 4, struct.pack("<i", 2), FormatError, "sequence 2 begins at byte 8, .* end at 10"),
        (HEAD + 4 * N, struct.pack("<q", 2), FormatError, "sequence 0 begins at byte 2"),
        (HEAD + 4 * N - 4, struct.pack("<i", 3), TruncatedShardError, "22 bytes, where train.idx"),
        (HEAD + 12 * N, struct.pack("<q", 1), FormatError, "document 0 begins with sequence 1"),
        (HEAD + 12 * N + 8, struct.pack("<q", 3), FormatError, "do not ascend from 0 to 4"),
        (HEAD + 12 * N + 8, struct.pack("<q", -1), FormatError, "do not ascend"),
        (HEAD + 12 * N + 8, struct.pack("<q", 1 << 62), FormatError, "do not ascend"),
        # each step upwards, modulo 2^64
        (
            HEAD + 12 * N,
            struct.pack("<5q", 0, (1 << 63) - 1, -(1 << 63), -1, 4),
            FormatError,
            "do not ascend",
        ),
        (HEAD + 12 * N + 32, struct.pack("<q", 5), FormatError, "do not ascend"),
        (HEAD + 12 * N + 32, struct.pack("<q", 3), FormatError, "the last 3, for 4 sequences"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, offset, value, error, match):
    megatron(tmp_path)
    index = (tmp_path / "train.idx").read_bytes()
    (tmp_path / "train.idx").write_bytes(index[:offset] + value + index[offset + len(value) :])
    with pytest.raises(error, match=match):
        open_split(tmp_path, "train")


def test_every_length_of_both_files_but_the_right_one_is_found(tmp_path):
    megatron(tmp_path)
    for name in ("train.bin", "train.idx"):
        data = (tmp_path / name).read_bytes()
        for size in [*range(len(data)), len(data) + 1]:
            (tmp_path / name).write_bytes((data + b"\0")[:size])
            with pytest.raises(TruncatedShardError):
                open_split(tmp_path, "train")
        (tmp_path / name).write_bytes(data)
    assert open_split(tmp_path, "train")[0].n_tokens == 11


def test_an_index_of_more_sequences_than_one_read_is_checked_to_its_end(tmp_path):
    documents = [[i % 100] for i in range(70_000)]
    megatron(tmp_path, documents)
    assert len(open_split(tmp_path, "train")[0].document_ends()) == 70_000
    index = bytearray((tmp_path / "train.idx").read_bytes())
    index[HEAD + 4 * 70_000 + 8 * 69_999] ^= 1
    (tmp_path / "train.idx").write_bytes(index)
    with pytest.raises(FormatError, match="sequence 69999 begins at byte"):
        open_split(tmp_path, "train")


# Which is which


def test_a_format_that_nobody_knows_is_refused(tmp_path):
    describe(nanogpt(tmp_path), format="parquet")
    with pytest.raises(IntegrityError, match="'parquet'; use mypt, episodes, native"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("declared", ["native", "llmc", "megatron"])
def test_a_named_format_is_the_only_one_that_is_tried(tmp_path, declared):
    write_file(tmp_path / "train/a.bin", TOKENS.astype("<u4").tobytes())
    describe(tmp_path, format=declared)
    with pytest.raises((IntegrityError, DataError), match=r"a\.(bin|idx)"):
        open_split(tmp_path, "train")


def test_flat_native_files_are_found_by_their_names(tmp_path):
    for name in ("web_train_0.bin", "web_train_1.bin", "web_valid.bin", "test.bin"):
        write_file(tmp_path / name, native_bytes(TOKENS))
    assert [s.name for s in open_split(tmp_path, "train")] == ["web_train_0.bin", "web_train_1.bin"]
    assert [s.name for s in open_split(tmp_path, "val")] == ["web_valid.bin"]


def test_llmc_files_among_raw_ones_are_refused(tmp_path):
    write_file(tmp_path / "train/a.bin", TOKENS.astype("<u4").tobytes())
    write_file(tmp_path / "train/b.bin", llmc_bytes(TOKENS))
    with pytest.raises(FormatError, match=r"b\.bin; begins with a header of llm\.c"):
        open_split(tmp_path, "train")


def test_a_token_above_the_recorded_vocabulary_is_found_with_its_position(tmp_path):
    tokens = np.zeros(600_000, "<u4")
    tokens[555_555] = 70_000
    write_file(tmp_path / "train/a.bin", tokens.tobytes())
    describe(tmp_path, vocab_size=70_000)
    with pytest.raises(TokenRangeError, match=r"token 70000 at position 555555 .* \[0, 70000\)"):
        verify_dataset(tmp_path)
    describe(tmp_path, vocab_size=70_001)
    assert verify_dataset(tmp_path).unhashed == ["train/a.bin"]


@pytest.mark.parametrize("kind", ["llmc", "megatron"])
def test_the_metadatas_vocabulary_holds_for_formats_that_record_none(tmp_path, kind):
    if kind == "llmc":
        write_file(tmp_path / "train/a.bin", llmc_bytes([1, 2, 50]))
    else:
        megatron(tmp_path / "train", [[1, 2], [50]], name="a")
    describe(tmp_path, format=kind, vocab_size=50)
    with pytest.raises(TokenRangeError, match=r"token 50 at position 2 is not in \[0, 50\)"):
        verify_dataset(tmp_path)
    describe(tmp_path, format=kind, vocab_size=51)
    assert open_split(tmp_path, "train")[0].vocab_size == 51
