"""Batches made ahead of time are the batches made when asked for, whoever waits for whom."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.document_loader import DocumentLoader
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DataChangedError, DataError, TokenRangeError

pytestmark = pytest.mark.usefixtures("native")
N = 5000


def corpus(io="ram", folder=None, sizes=(N,), width=2, write=None):
    if io == "ram":
        return TokenCorpus.from_tokens(np.arange(N), "native")
    return TokenCorpus.from_dataset(write(folder, sizes, width), "train", "native", io)


def loaders(tokens, **kwargs):
    """The same stream without and with a worker."""
    return (
        TokenLoader(tokens, 16, seed=5, **kwargs),
        TokenLoader(tokens, 16, seed=5, prefetch=4, **kwargs),
    )


@settings(max_examples=50, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 9),
    rows=st.integers(1, 9),
    slots=st.integers(2, 6),
    narrow=st.booleans(),
    data=st.data(),
)
def test_the_worker_makes_the_same_batches(world_size, share, rows, slots, narrow, data):
    tokens = TokenCorpus.from_tokens(np.arange(N), "native")
    rank = data.draw(st.integers(0, world_size - 1))
    kwargs = {"rank": rank, "world_size": world_size, "global_batch": share * world_size}
    plain = TokenLoader(tokens, 16, seed=5, **kwargs)
    with TokenLoader(tokens, 16, seed=5, prefetch=slots, **kwargs) as ahead:
        for _ in range(data.draw(st.integers(1, 4))):
            left = share
            while left:
                n = min(rows, left)
                if narrow:
                    assert np.array_equal(ahead.next_windows(n), plain.next_windows(n))
                else:
                    for ours, theirs in zip(ahead.next(n), plain.next(n), strict=True):
                        assert np.array_equal(ours, theirs)
                left -= n
            assert ahead.state_dict() == plain.state_dict()


def test_batches_that_wait_in_the_ring_are_not_lost_by_a_checkpoint():
    tokens = corpus()
    plain, ahead = loaders(tokens, global_batch=4)
    for _ in range(3):
        ahead.next(4)
    state = ahead.state_dict()
    ahead.close()
    assert state["global_sample"] == 12
    again = TokenLoader(tokens, 16, seed=5, global_batch=4, prefetch=4)
    again.load_state_dict(state)
    plain.load_state_dict(state)
    for _ in range(6):
        assert np.array_equal(again.next(4)[0], plain.next(4)[0])


def test_other_rows_a_rewind_and_a_read_elsewhere_change_nothing():
    plain, ahead = loaders(corpus(), global_batch=8)
    asked = [8, 2, 2, 4, 3, 5, 8, 1, 7, 4, 4, 8]
    for rows in asked:
        assert np.array_equal(ahead.next(rows)[1], plain.next(rows)[1]), rows
        ahead.read(100, 3)
    for loader in (plain, ahead):
        loader.next(2)
        loader.rewind_step()
    own = np.empty((8, 16), np.int64), np.empty((8, 16), np.int64)
    assert np.array_equal(ahead.next(8, *own)[0], plain.next(8)[0])
    assert np.array_equal(ahead.next(8)[0], plain.next(8)[0])
    assert np.array_equal(ahead.next_windows(8)[:, :-1], plain.next(8)[0])


def until_it_fails(read):
    for _ in range(1000):
        read(4)


class Device:
    """Reads a batch some time after it was handed over, as an asynchronous copy does."""

    def __init__(self, batch):
        self.batch, self.copy, self.waited = batch, None, False

    def query(self):
        return self.copy is not None

    def synchronize(self):
        self.waited = True
        self.run()

    def run(self):
        if self.copy is None:
            self.copy = [a.copy() for a in self.batch]


@pytest.mark.parametrize("lag", [1, 2, 5, 50])
def test_a_slot_is_not_written_while_a_device_reads_it(lag):
    plain, ahead = loaders(corpus(), global_batch=4)
    pending, wanted = [], []
    for _ in range(40):
        batch = ahead.next(4)
        pending.append(Device(batch))
        ahead.hold(pending[-1])
        wanted.append([a.copy() for a in plain.next(4)])
        if len(pending) > lag:
            pending[-lag - 1].run()
    assert any(device.waited for device in pending) == (lag >= 4)
    ahead.close()
    for device, batch in zip(pending, wanted, strict=True):
        device.run()
        for ours, theirs in zip(device.copy, batch, strict=True):
            assert np.array_equal(ours, theirs)


def test_buffers_are_the_callers_and_stay_where_they_are():
    made = []

    def allocate(shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    loader = TokenLoader(corpus(), 16, seed=0, global_batch=2, prefetch=3, allocate=allocate)
    seen = {loader.next(2)[0].ctypes.data for _ in range(30)}
    assert seen == {a.ctypes.data for a in made[::2]}
    assert len(made) == 6


def test_by_default_buffers_begin_at_a_cache_line():
    loader = TokenLoader(corpus(), 15, seed=0, global_batch=3, prefetch=4)
    for _ in range(8):
        assert all(a.ctypes.data % 64 == 0 for a in loader.next(3))


@pytest.mark.parametrize("narrow", [False, True])
def test_a_token_out_of_range_is_named_and_the_position_stays(narrow):
    plain, ahead = loaders(corpus(), global_batch=4, vocab_size=N - 900)
    errors = []
    for loader in (plain, ahead):
        read = loader.next_windows if narrow else loader.next
        with pytest.raises(TokenRangeError, match=r"token \d+ of the text .* id \d+") as caught:
            until_it_fails(read)
        errors.append((str(caught.value), loader.position))
        with pytest.raises(TokenRangeError):  # again, from where it stood
            loader.next(4)
    assert errors[0] == errors[1]
    assert errors[0][1] < N


def test_a_file_cut_short_under_the_worker_is_an_error_after_the_good_batches(
    write_dataset, tmp_path
):
    tokens = corpus("pread", tmp_path, write=write_dataset)
    plain, ahead = loaders(tokens, global_batch=4)
    wanted = [[a.copy() for a in plain.next(4)] for _ in range(3)]
    assert np.array_equal(ahead.next(4)[0], wanted[0][0])
    os.truncate(tmp_path / "train/shard_00000.bin", 64)
    seen = []
    with pytest.raises(DataChangedError, match=r"shard_00000\.bin; ends at byte") as caught:
        until_it_fails(lambda rows: seen.append(ahead.next(rows)[0].copy()))
    for x, (want, _) in zip(seen, wanted[1:], strict=False):
        assert np.array_equal(x, want)
    assert caught.value.exit_code == 3
    with pytest.raises(DataChangedError):
        ahead.next(4)


def test_a_mapped_file_that_changed_is_found_before_long(write_dataset, tmp_path):
    tokens = corpus("mmap", tmp_path, write=write_dataset)
    loader = TokenLoader(tokens, 16, seed=5, global_batch=4)
    for _ in range(200):
        loader.next(4)
    path = tmp_path / "train/shard_00000.bin"
    with path.open("ab") as file:  # longer: cut short, its last page could be read first
        file.write(bytes(2))
    with pytest.raises(DataChangedError, match="changed since it was mapped") as caught:
        until_it_fails(loader.next)
    assert caught.value.exit_code == 3


def test_a_mapped_file_that_was_replaced_is_still_there(write_dataset, tmp_path):
    tokens = corpus("mmap", tmp_path, write=write_dataset)
    plain, mapped = (TokenLoader(t, 16, seed=5, global_batch=4) for t in (corpus(), tokens))
    assert np.array_equal(mapped.next(4)[0], plain.next(4)[0])  # opened now, not before
    path = tmp_path / "train/shard_00000.bin"
    (tmp_path / "new").write_bytes(bytes(100))
    os.replace(tmp_path / "new", path)
    for _ in range(200):
        assert np.array_equal(mapped.next(4)[0], plain.next(4)[0])


@pytest.mark.parametrize("io", ["mmap", "pread", "ram"])
@pytest.mark.parametrize("width", [2, 4])
def test_every_way_to_reach_a_file_gives_the_same(write_dataset, tmp_path, io, width):
    folder = write_dataset(tmp_path, [1000, 0, 3, 1997, 2000], width)
    tokens = TokenCorpus.from_dataset(folder, "train", "native", io)
    assert tokens.io == io
    oracle = TokenLoader(TokenCorpus.from_dataset(folder, "train", "numpy"), 64, seed=1)
    x, y = TokenLoader(tokens, 64, seed=1).read(0, 300)
    want_x, want_y = oracle.read(0, 300)
    assert np.array_equal(x, want_x)
    assert np.array_equal(y, want_y)
    with TokenLoader(tokens, 64, seed=1, global_batch=10, prefetch=4) as ahead:
        rows = np.concatenate([ahead.next_windows(10).copy() for _ in range(30)])
    assert rows.dtype == f"uint{8 * width}"
    assert np.array_equal(rows[:, 1:], want_y)


def test_thousands_of_shards_do_not_need_as_many_open_files(write_dataset, tmp_path):
    folder = write_dataset(tmp_path, [20] * 700, 2)
    tokens = TokenCorpus.from_dataset(folder, "train", "native", "pread")
    before = len(os.listdir("/proc/self/fd"))
    loader = TokenLoader(tokens, 30, seed=2)
    x, _ = loader.read(0, 1400)
    assert len(os.listdir("/proc/self/fd")) - before <= 65
    oracle = TokenLoader(TokenCorpus.from_dataset(folder, "train", "numpy"), 30, seed=2)
    assert np.array_equal(x, oracle.read(0, 1400)[0])


def test_another_file_under_the_same_name_is_found_when_it_is_opened_again(write_dataset, tmp_path):
    folder = write_dataset(tmp_path, [20] * 400, 2)
    tokens = TokenCorpus.from_dataset(folder, "train", "native", "pread")
    loader = TokenLoader(tokens, 15, seed=2)
    loader.read(0, 2000)  # every shard was open once, and most were closed again
    for path in (folder / "train").iterdir():
        os.replace(path, path.with_suffix(".old"))
        path.write_bytes(bytes(40))
    with pytest.raises(DataChangedError, match="another file"):
        loader.read(0, 2000)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_dataset_that_is_replaced_before_a_shard_was_read_is_not_mixed_in(
    write_dataset, tmp_path, io, documents
):
    folder = write_dataset(tmp_path, [500] * 4, 2)
    tokens = TokenCorpus.from_dataset(folder, "train", "native", io)
    if documents:
        loader = DocumentLoader(tokens, 16, np.array([2000]), "mask", seed=0, order="sequential")
    else:
        loader = TokenLoader(tokens, 16, seed=0, order="sequential")
    loader.next(1)
    for path in (folder / "train").iterdir():  # of the same size, as all full shards are
        path.with_suffix(".new").write_bytes(np.full(500, 60_000, "<u2").tobytes())
        os.replace(path.with_suffix(".new"), path)
    seen = []
    with pytest.raises(DataChangedError, match="another file") as caught:
        until_it_fails(lambda rows: seen.append(loader.next(1)[0].max()))
    assert max(seen, default=0) < 2000
    assert "a run goes on if its data is the same" in str(caught.value)


@pytest.mark.parametrize("documents", [False, True])
def test_a_mapped_shard_of_many_that_is_rewritten_is_found(write_dataset, tmp_path, documents):
    folder = write_dataset(tmp_path, [500] * 100, 2)
    tokens = TokenCorpus.from_dataset(folder, "train", "native", "mmap")
    if documents:
        loader = DocumentLoader(tokens, 16, np.array([50_000]), "mask", seed=0, global_batch=4)
    else:
        loader = TokenLoader(tokens, 16, seed=0, global_batch=4)
    for _ in range(2000):  # by now all of them are mapped
        loader.next(4)
    foreign = []

    def read(rows):
        foreign.extend(int((loader.next(rows)[0] == 60_000).any()) for _ in range(20))

    with (folder / "train/shard_00050.bin").open("r+b") as file:
        file.write(np.full(500, 60_000, "<u2").tobytes())
    with pytest.raises(DataChangedError, match="changed since it was mapped"):
        until_it_fails(read)
    assert sum(foreign) < 100


def test_documents_of_a_large_mapped_file_hold_little_of_it(tmp_path):
    folder, n = tmp_path / "train", 700_000_000 // 2
    folder.mkdir()
    with (folder / "a.bin").open("wb") as file:
        file.truncate(2 * n)  # holes: pages of zeros that the disk does not hold
    (tmp_path / "dataset_metadata.json").write_text('{"dtype": "uint16"}')
    script = f"""
import re, numpy as np
from pathlib import Path
from mypt_fast.data.tokens import TokenCorpus
def held():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
corpus = TokenCorpus.from_dataset({str(tmp_path)!r}, "train", "native", "mmap")
before = held()
for start in range(0, {n} - 4096, 30_000):
    corpus.read_span(start, 4096)
print(held() - before)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) < 600  # MiB, of 667 that were touched


def test_data_that_was_opened_before_a_fork_is_refused_in_the_child():
    script = f"""
import os, numpy as np
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DataError
corpus = TokenCorpus.from_tokens(np.arange({N}))
if os.fork() == 0:
    try:
        TokenLoader(corpus, 16, seed=0).next(1)
    except DataError as error:
        assert "open it after the fork" in str(error)
        TokenLoader(TokenCorpus.from_tokens(np.arange({N})), 16, seed=0, prefetch=2).next(1)
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


def test_a_forked_child_is_told_and_does_not_hang():
    script = f"""
import os, numpy as np
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DataError
loader = TokenLoader(TokenCorpus.from_tokens(np.arange({N})), 16, seed=0, prefetch=4)
loader.next(1)
child = os.fork()
if child == 0:
    try:
        loader.next(1)
    except DataError as error:
        assert "forked" in str(error)
        loader.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
loader.next(1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


def test_a_loader_says_that_it_cannot_be_pickled():
    with pytest.raises(TypeError, match="holds files and a thread"):
        pickle.dumps(TokenLoader(corpus(), 16, seed=0))


def test_a_loader_that_is_dropped_or_closed_twice_leaves_no_thread():
    before = len(os.listdir("/proc/self/task"))
    for k in range(20):
        loader = TokenLoader(corpus(), 16, seed=k, prefetch=4)
        loader.next(1)
        if k % 2:
            loader.close()
            loader.close()
            with pytest.raises(ValueError, match="closed"):
                loader.next(1)
        del loader
    assert len(os.listdir("/proc/self/task")) == before


def test_control_c_reaches_a_consumer_that_waits(native):
    """The worker has nowhere to write: all slots are lent, and nobody gives one back."""
    reader = native.BatchReader(
        native.Corpus.wrap(np.arange(N, dtype=np.uint16)), native.SampleOrder(N, 16, 0)
    )
    slots = [(np.empty((1, 16), np.int64), np.empty((1, 16), np.int64)) for _ in range(2)]
    ring = native.Ring(reader, 0, 1, 1, 1, slots, 1)
    ring.take()
    ring.take()
    main = threading.get_ident()
    waiting = threading.Event()

    def interrupt():
        waiting.wait()
        while ring.waits == 0:
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    # a shell's background job starts with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        waiting.set()
        with pytest.raises(KeyboardInterrupt):
            ring.take()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ValueError, match="more slots are given back"):
        ring.take(3)


def test_arguments_that_cannot_be(write_dataset, tmp_path):
    tokens = corpus()
    for prefetch in (-1, 1):
        with pytest.raises(ValueError, match="prefetch is 0, or 2"):
            TokenLoader(tokens, 16, seed=0, prefetch=prefetch)
    loader = TokenLoader(tokens, 16, seed=0, global_batch=4, prefetch=2)
    for rows in (0, 5):
        with pytest.raises(ValueError, match="rows asked; 4 of this rank's 4 are left"):
            loader.next(rows)
    folder = write_dataset(tmp_path, [100], 2)
    with pytest.raises(ValueError, match="io is one of auto, mmap, pread, ram"):
        TokenCorpus.from_dataset(folder, "train", io="tape")
    with pytest.raises(DataError, match="io pread"):
        TokenCorpus.from_dataset(folder, "train", "numpy", "pread")


def test_auto_maps_what_is_cached_and_reads_what_is_larger_than_memory(
    write_dataset, tmp_path, monkeypatch
):
    from mypt_fast.data import tokens

    folder = write_dataset(tmp_path, [3000, 3000], 2)
    assert TokenCorpus.from_dataset(folder, "train").io == "mmap"
    monkeypatch.setattr(tokens, "_available_bytes", lambda: 12_000)
    assert TokenCorpus.from_dataset(folder, "train").io == "pread"
