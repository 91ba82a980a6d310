import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.order import ALGORITHM, Permutation, SampleOrder

U64 = st.integers(0, 2**64 - 1)
SIZES = st.one_of(st.integers(1, 300), st.integers(2**16 - 2, 2**17), st.integers(1, 2**62))


# A change here changes the data order of every saved run: it needs a new ALGORITHM.
GOLDEN = {
    (10, 42, 1): [9, 2, 1, 0, 7, 3, 5, 4, 8, 6],
    (1_000_003, 42, 1): [637821, 737555, 940463, 973414, 31476, 251383],
    (2**62, 2**64 - 1, 7): [
        4503486781425317567,
        2120615091364178849,
        264310184058812818,
        2529876156806481675,
    ],
}


@pytest.mark.parametrize("key", GOLDEN)
def test_the_order_is_what_it_always_was(key):
    assert ALGORITHM == "feistel6/v1"
    assert Permutation(*key).at(np.arange(len(GOLDEN[key]))).tolist() == GOLDEN[key]


@pytest.mark.parametrize("key", GOLDEN)
def test_the_native_order_is_what_it_always_was(native, key):
    permutation = native.Permutation(*key)
    assert [permutation.at(i) for i in range(len(GOLDEN[key]))] == GOLDEN[key]


def test_sample_starts_are_what_they_always_were():
    assert SampleOrder(1000, 16, 7).starts(58, 6).tolist() == [100, 260, 340, 852, 628, 884]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 65535, 65536, 65537, 200_000])
def test_every_index_appears_exactly_once(n):
    for seed, epoch in ((0, 0), (1337, 3)):
        images = Permutation(n, seed, epoch).at(np.arange(n))
        assert np.array_equal(np.sort(images), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=SIZES, seed=U64, epoch=U64, data=st.data())
def test_native_and_numpy_permutations_are_equal(native, n, seed, epoch, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    permutation = native.Permutation(n, seed, epoch)
    expected = Permutation(n, seed, epoch).at(np.array(indices, dtype=np.int64))
    assert [permutation.at(i) for i in indices] == expected.tolist()


@pytest.mark.parametrize("n", [60_000, 200_000])
def test_an_order_looks_random(n):
    first, second = (Permutation(n, 1, epoch).at(np.arange(n)) for epoch in (0, 1))
    # The correlation of random sequences has a standard deviation of n^-0.5 < 0.0041.
    for a, b in ((first[1:], first[:-1]), (first, np.arange(n)), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert np.count_nonzero(first == second) < 12


@settings(max_examples=100, deadline=None)
@given(seq_len=st.integers(1, 40), extra=st.integers(1, 2000), seed=U64, epoch=st.integers(0, 9))
def test_an_epoch_is_every_window_once_inside_the_corpus(seq_len, extra, seed, epoch):
    n_tokens = seq_len + extra
    order = SampleOrder(n_tokens, seq_len, seed)
    n = order.n_windows
    starts = np.sort(order.starts(epoch * n, n))
    assert starts[0] >= 0
    assert starts[-1] + seq_len + 1 <= n_tokens
    assert np.all(np.diff(starts) == seq_len)
    # No more than two windows' worth of tokens is left out in any one epoch.
    assert n_tokens - n * seq_len <= 2 * seq_len


@settings(max_examples=50, deadline=None)
@given(seq_len=st.integers(1, 9), extra=st.integers(1, 60), seed=st.integers(0, 99))
def test_over_the_epochs_every_token_is_read(seq_len, extra, seed):
    n_tokens = seq_len + extra
    order = SampleOrder(n_tokens, seq_len, seed)
    seen = np.zeros(n_tokens, dtype=bool)
    for start in order.starts(0, 200 * order.n_windows).tolist():
        seen[start : start + seq_len + 1] = True
    assert seen.all()


def test_a_corpus_of_one_window_has_only_phase_0():
    order = SampleOrder(17, 16, seed=5)
    assert order.n_windows == 1
    assert order.starts(0, 50).tolist() == [0] * 50


def test_windows_shift_between_epochs():
    order = SampleOrder(100_000, 1024, seed=5)
    assert len({order.phase(epoch) for epoch in range(20)}) > 15


def test_sequential_reads_windows_in_place_and_wraps():
    order = SampleOrder(100, 10, seed=5, kind="sequential")
    assert order.starts(7, 4).tolist() == [70, 80, 0, 10]


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.one_of(st.integers(41, 3000), st.integers(41, 2**62)),
    seq_len=st.integers(1, 40),
    seed=U64,
    first=st.integers(0, 2**62),
    count=st.integers(0, 30),
    kind=st.sampled_from(["epoch", "sequential"]),
)
def test_native_and_numpy_starts_are_equal(native, n_tokens, seq_len, seed, first, count, kind):
    order = SampleOrder(n_tokens, seq_len, seed, kind)
    twin = native.SampleOrder(n_tokens, seq_len, seed, kind)
    assert twin.n_windows == order.n_windows
    assert np.array_equal(twin.starts(first, count), order.starts(first, count))


def test_starts_do_not_depend_on_how_they_are_asked_for():
    order = SampleOrder(500, 16, seed=1)
    whole = order.starts(0, 200)
    for first, count in ((0, 1), (29, 2), (30, 61), (199, 1), (5, 0)):
        assert np.array_equal(order.starts(first, count), whole[first : first + count])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 16, 0), "16 tokens hold no window"),
        ((100, 0, 0), "no window of 0"),
        ((100, 16, 0, "random"), "order is one of epoch, sequential"),
        ((100, 16, -1), "seed is an unsigned"),
        ((100, 16, 2**64), "seed is an unsigned"),
    ],
)
def test_an_impossible_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(*arguments)


def test_samples_outside_the_stream_are_refused(native):
    order = SampleOrder(100, 16, 0)
    for first, count in ((-1, 1), (0, -1), (2**63 - 1, 1)):
        with pytest.raises(ValueError, match="2\\^63"):
            order.starts(first, count)
    with pytest.raises(ValueError, match="2\\^63"):
        native.SampleOrder(100, 16, 0).starts(2**63 - 1, 1)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_the_permutation_is_refused(index):
    with pytest.raises(ValueError, match="outside"):
        Permutation(10, 0, 0).at(np.array([index]))


def test_bad_native_arguments_are_refused(native):
    with pytest.raises(ValueError, match="outside"):
        native.Permutation(10, 0, 0).at(10)
    with pytest.raises(ValueError, match="1 <= n"):
        native.Permutation(0, 0, 0)
    with pytest.raises(ValueError, match="no window"):
        native.SampleOrder(16, 16, 0)
    with pytest.raises(ValueError, match="order is one of"):
        native.SampleOrder(100, 16, 0, "random")
