"""The extension on its own: kernels, bounds, errors. test_loader.py compares it with NumPy."""

import itertools

import numpy as np
import pytest

from mypt_fast.errors import DataChangedError, DataError, IntegrityError

WHICHEVER = (0, 0, 0)  # device, inode and time of change of a file that is not compared


def test_shards_of_both_widths_and_headers_can_be_mixed(native, tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(bytes(1024) + np.arange(100, 300, dtype="<u4").tobytes())
    corpus = native.Corpus.open(
        [
            (str(tmp_path / "a.bin"), 2, 100, 0, 200, WHICHEVER),
            (str(tmp_path / "b.bin"), 4, 200, 1024, 1824, WHICHEVER),
        ]
    )
    x, y = np.empty((2, 64), np.int64), np.empty((2, 64), np.int64)
    assert native.gather(corpus, [60, 235], x, y) == 299
    assert np.array_equal(x + 1, y)
    assert np.all(np.diff(x) == 1)
    assert x[:, 0].tolist() == [60, 235]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_all_kernels_are_equal_for_any_length_and_alignment(native, dtype):
    tokens = np.random.default_rng(0).integers(0, 65536, 1000).astype(dtype)
    corpus = native.Corpus.wrap(tokens)
    assert native.available_kernels()[0] == "scalar"
    for T, kernel in itertools.product(range(1, 131), native.available_kernels()):
        starts = [0, 1, 2, 3, 500 - T, 999 - T]
        x, y = np.full((6, T), -1), np.full((6, T), -1)
        largest = native.gather(corpus, starts, x, y, kernel=kernel)
        windows = np.stack([tokens[s : s + T + 1] for s in starts]).astype(np.int64)
        assert np.array_equal(x, windows[:, :-1]), (T, kernel)
        assert np.array_equal(y, windows[:, 1:]), (T, kernel)
        assert largest == windows.max(), (T, kernel)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("at", [0, 1, 7, 8, 63, 64, 70])
def test_the_largest_id_is_found_wherever_it_is(native, dtype, at):
    tokens = np.ones(71, dtype=dtype)
    tokens[at] = np.iinfo(dtype).max
    x, y = np.empty((1, 70), np.int64), np.empty((1, 70), np.int64)
    for kernel in native.available_kernels():
        assert native.gather(native.Corpus.wrap(tokens), [0], x, y, kernel) == tokens[at]
    assert max(x.max(), y.max()) == tokens[at]  # and it did not turn negative


@pytest.mark.parametrize("width", [2, 4])
def test_a_window_that_ends_with_its_page_reads_no_further(native, write_dataset, tmp_path, width):
    n = 4096 // width
    folder = write_dataset(tmp_path, [n], width)
    corpus = native.Corpus.open(
        [(str(folder / "train/shard_00000.bin"), width, n, 0, 4096, WHICHEVER)]
    )
    for T, kernel in itertools.product((1, 7, 8, 9, 64), native.available_kernels()):
        x, y = np.empty((1, T), np.int64), np.empty((1, T), np.int64)
        native.gather(corpus, [n - T - 1], x, y, kernel)
        assert y[0, -1] == n - 1


def test_native_errors_are_ours(native, tmp_path):
    arrays = np.empty((1, 2), np.int64), np.empty((1, 2), np.int64)

    def read(path, size=16, io="mmap"):
        native.gather(native.Corpus.open([(str(path), 4, 4, 0, size, WHICHEVER)], io), [0], *arrays)

    with pytest.raises(DataError, match=r"gone\.bin; cannot be opened: No such file") as caught:
        read(tmp_path / "gone.bin")
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path)
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(16))
    for io in ("mmap", "pread", "ram"):
        with pytest.raises(DataChangedError, match="16 bytes, where 20 were validated"):
            read(path, 20, io)
        read(path, 16, io)
    with pytest.raises(ValueError, match="io is one of"):
        read(path, 16, "floppy")
    for spec in ((4, 5, 0), (4, 4, 4), (4, 0, 20), (2, 2**63, 0)):
        with pytest.raises(IntegrityError, match="16 bytes, too few"):
            native.Corpus.open([(str(path), *spec, 16, WHICHEVER)])
    for width, n, offset in ((3, 1, 0), (4, 1, 2)):
        with pytest.raises(ValueError, match=r"bytes wide|multiple of the width"):
            native.Corpus.open([(str(path), width, n, offset, 16, WHICHEVER)])


def test_native_bounds_are_checked_before_anything_is_written(native):
    corpus = native.Corpus.wrap(np.arange(100, dtype=np.uint16))
    x, y = np.full((2, 16), -7), np.full((2, 16), -7)
    for start in (84, 100, 2**64 - 1, 2**64 - 17):
        with pytest.raises(ValueError, match="leaves the corpus of 100"):
            native.gather(corpus, [0, start], x, y)
    assert (x == -7).all()
    with pytest.raises(ValueError, match="one start per row"):
        native.gather(corpus, [0], x, y)
    with pytest.raises(ValueError, match="kernel 'mmx' is not available"):
        native.gather(corpus, [0, 1], x, y, "mmx")


def test_native_wrapping_takes_only_tokens(native):
    for array in (np.arange(4), np.zeros((2, 2), np.uint16), np.arange(8, dtype=np.uint16)[::2]):
        with pytest.raises(ValueError, match="contiguous 1-D uint16 or uint32"):
            native.Corpus.wrap(array)


def test_a_native_reader_refuses_an_order_of_another_corpus(native):
    corpus = native.Corpus.wrap(np.arange(100, dtype=np.uint16))
    with pytest.raises(ValueError, match="order is for 99 tokens, the corpus has 100"):
        native.BatchReader(corpus, native.SampleOrder(99, 16, 0))


def test_a_native_reader_keeps_its_tokens_alive(native):
    order = native.SampleOrder(100_000, 16, 0)
    reader = native.BatchReader(native.Corpus.wrap(np.full(100_000, 7, np.uint16)), order)
    junk = [np.zeros(100_000, np.uint16) for _ in range(4)]
    x, y = np.empty((64, 16), np.int64), np.empty((64, 16), np.int64)
    assert reader.read(0, x, y, 64) == 7
    assert (x == 7).all()
    del junk
