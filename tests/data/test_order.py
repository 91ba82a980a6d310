import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.mixture import MixtureOrder
from mypt_fast.data.order import ALGORITHMS, ORDERS, SampleOrder
from mypt_fast.data.permutation import ALGORITHM, Permutation

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


# SHA-256 of the first 1000 starts as little-endian int64, of a small corpus and of a large one.
STARTS = {
    "epoch": ("f7e7d9285a4b62c1", "73538271eb324d5d"),
    "sequential": ("245de309f6c05ffd", "599b627d32e89064"),
    "replacement": ("c7c8c9053fdc4a03", "ec1379a6694f9b86"),
    "block": ("2afdee8c17e5cecd", "e597dc97666cc199"),
}


def fingerprint(starts):
    return hashlib.sha256(starts.astype("<i8").tobytes()).hexdigest()[:16]


def golden_orders(kind):
    small = SampleOrder(5000, 16, 42, kind, block_tokens=160, pool_blocks=3)
    return small, SampleOrder(10**12, 1024, 2**64 - 1, kind)


@pytest.mark.parametrize("kind", ORDERS)
def test_the_starts_of_every_kind_are_what_they_always_were(native, kind):
    for order, expected in zip(golden_orders(kind), STARTS[kind], strict=True):
        assert fingerprint(order.starts(0, 1000)) == expected
        assert fingerprint(order.to_native(native).starts(0, 1000)) == expected


def test_both_twins_name_the_same_versions(native):
    assert native.ORDER_ALGORITHMS == {**ALGORITHMS, "mixture": "mixture/v1"}
    assert ALGORITHMS == {
        "epoch": "feistel6/v1",
        "sequential": "feistel6/v1",
        "replacement": "draw/v1",
        "block": "feistel6-block/v1",
    }


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
    twin, ours = native.Permutation(n, seed, epoch), Permutation(n, seed, epoch)
    images = ours.at(np.array(indices, dtype=np.int64))
    assert [twin.at(i) for i in indices] == images.tolist()
    assert ours.inverse(images).tolist() == indices
    assert [twin.inverse(i) for i in images.tolist()] == indices


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


@st.composite
def orders(draw, kinds=ORDERS, largest=2**62):
    """Any order; blocks are small against the corpus more often than chance would have it."""
    seq_len = draw(st.integers(1, 40))
    n_tokens = draw(st.one_of(st.integers(41, 3000), st.integers(41, largest)))
    few = min(max(1, n_tokens // 64), 2**40)  # tokens a block for few blocks
    tokens = draw(st.one_of(st.integers(1, 400), st.integers(few, 2**40)))
    return SampleOrder(
        n_tokens,
        seq_len,
        draw(U64),
        draw(st.sampled_from(kinds)),
        block_tokens=tokens,
        pool_blocks=draw(st.one_of(st.integers(1, 5), st.integers(1, 2000))),
    )


@settings(max_examples=150, deadline=None)
@given(order=orders(), first=st.integers(0, 2**62), count=st.integers(0, 30))
def test_native_and_numpy_starts_are_equal(native, order, first, count):
    twin = order.to_native(native)
    assert (twin.n_windows, twin.n_tokens) == (order.n_windows, order.n_tokens)
    wrap = min(order.n_windows, 2**60)  # the end of an epoch, where it is within the stream
    for sample in (first, 0, wrap - 1, max(0, wrap * 3 - count)):
        starts = order.starts(sample, count)
        assert np.array_equal(twin.starts(sample, count), starts)
        assert np.all((starts >= 0) & (starts + order.seq_len < order.n_tokens))


@settings(max_examples=100, deadline=None)
@given(order=orders(("block",), 20_000), epoch=st.integers(0, 3))
def test_blocks_hold_every_window_once_per_epoch_and_pools_keep_to_their_blocks(order, epoch):
    n = order.n_windows
    windows, shift = np.divmod(order.starts(epoch * n, n), order.seq_len)
    assert np.array_equal(np.sort(windows), np.arange(n) + windows.min())
    assert len(set(shift.tolist())) == 1
    # The windows of a block lie no further apart than a pool is long, and pools do not overlap.
    per_block = max(1, order.block_tokens // order.seq_len)
    blocks = (windows - windows.min()) // per_block
    last_seen = {block: i for i, block in enumerate(blocks.tolist())}
    pool, ends = set(), -1
    for i, block in enumerate(blocks.tolist()):
        if i > ends and len(pool) == order.pool_blocks:
            pool = set()
        pool.add(block)
        ends = max(ends, last_seen[block])
        assert len(pool) <= order.pool_blocks


def test_blocks_look_random_within_pools_and_between_them():
    order = SampleOrder(400 * 64 * 10, 10, 5, "block", block_tokens=640, pool_blocks=40)
    n = order.n_windows
    first, second = (order.starts(epoch * n, n) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    pool = first[: 40 * 64] - order.phase(0)
    assert len(set((pool // 640).tolist())) == 40
    assert abs(np.corrcoef(pool[1:], pool[:-1])[0, 1]) < 0.1
    blocks = first[:: 40 * 64] // 640
    assert len(set(np.diff(blocks).tolist())) > 5  # and pools do not come in order


def test_one_pool_is_a_shuffle_of_the_whole_corpus():
    order = SampleOrder(5000, 10, 5, "block")
    starts = order.starts(0, order.n_windows)
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.15


def test_replacement_draws_every_start_equally_often_and_anew_for_each_sample():
    order = SampleOrder(116, 16, 3, "replacement")
    starts = order.starts(0, 100_000)
    counts = np.bincount(starts, minlength=100)
    assert counts.size == 100  # starts 0 to 99: the last window ends with the corpus
    # 99 degrees of freedom: mean 99, standard deviation 14.
    assert 40 < ((counts - 1000) ** 2 / 1000).sum() < 170
    pairs = np.bincount(starts[:-1] // 10 * 10 + starts[1:] // 10, minlength=100)
    assert 40 < ((pairs - 1000) ** 2 / 1000).sum() < 170
    assert not np.array_equal(starts[:100], SampleOrder(116, 16, 4, "replacement").starts(0, 100))


def test_replacement_has_no_bias_where_a_remainder_would(native):
    # 2^64 / n = 5.33: a plain remainder gives the lowest third 37.5 % of the draws.
    n = 3 << 60
    order = SampleOrder(n + 1, 1, 9, "replacement")
    starts = order.starts(0, 20_000)
    assert abs(np.mean(starts < n // 3) - 1 / 3) < 0.012
    assert np.array_equal(order.to_native(native).starts(0, 20_000), starts)


@settings(max_examples=60, deadline=None)
@given(
    order=orders(largest=20_000),
    share=st.integers(1, 4),
    W=st.sampled_from([1, 2, 3, 4, 8]),
    steps=st.integers(1, 6),
    stop=st.integers(0, 6),
)
def test_ranks_together_are_the_stream_and_a_resume_goes_on_with_it(order, share, W, steps, stop):
    G = share * W
    whole = order.starts(0, steps * G)
    for step in range(min(stop, steps), steps):  # from any step on: nothing is carried along
        parts = [order.starts(step * G + rank * share, share) for rank in range(W)]
        assert np.array_equal(np.concatenate(parts), whole[step * G : (step + 1) * G])


def test_an_identity_is_small_and_differs_wherever_the_stream_does():
    base = {"n_tokens": 5000, "seq_len": 16, "seed": 1, "kind": "block", "pool_blocks": 3}
    changes = ({}, {"seq_len": 17}, {"seed": 2}, {"kind": "epoch"}, {"pool_blocks": 4},
               {"block_tokens": 99}, {"kind": "replacement"}, {"kind": "sequential"})  # fmt: skip
    texts = [json.dumps(SampleOrder(**{**base, **change}).identity()) for change in changes]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) < 300
    assert json.loads(texts[0])["algo"] == "feistel6-block/v1"
    # The fields of runs saved before there were other kinds.
    assert SampleOrder(5000, 16, 1).identity() == {
        "algo": "feistel6/v1",
        "order": "epoch",
        "seed": 1,
        "seq_len": 16,
        "n_windows": 311,
    }


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
        ((2**62 + 1, 16, 0), "at most 2\\^62 tokens"),
    ],
)
def test_an_impossible_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(*arguments)


@pytest.mark.parametrize("blocks", [(0, 1), (2**40 + 1, 1), (1, 0), (1, 2**16 + 1)])
def test_impossible_blocks_are_refused(native, blocks):
    with pytest.raises(ValueError, match=r"1 to 2\^40 tokens"):
        SampleOrder(100, 16, 0, "block", block_tokens=blocks[0], pool_blocks=blocks[1])
    with pytest.raises(ValueError, match=r"1 to 2\^40 tokens"):
        native.SampleOrder(100, 16, 0, "block", *blocks)


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
    with pytest.raises(ValueError, match="outside"):
        Permutation(10, 0, 0).inverse(np.array([index]))


def test_bad_native_arguments_are_refused(native):
    with pytest.raises(ValueError, match="outside"):
        native.Permutation(10, 0, 0).at(10)
    with pytest.raises(ValueError, match="outside"):
        native.Permutation(10, 0, 0).inverse(10)
    with pytest.raises(ValueError, match="1 <= n"):
        native.Permutation(0, 0, 0)
    with pytest.raises(ValueError, match="no window"):
        native.SampleOrder(16, 16, 0)
    with pytest.raises(ValueError, match="order is one of"):
        native.SampleOrder(100, 16, 0, "random")


@pytest.mark.parametrize("kind", ["epoch", "block", "mixture"])
def test_threads_may_share_one_native_order(native, kind):
    blocks = {"block_tokens": 700, "pool_blocks": 3}
    if kind == "mixture":
        phases = [(900, [1, 0]), (None, [1, 2])]
        order = MixtureOrder([30_000, 40_000], 7, 3, phases, "block", **blocks)
    else:
        order = SampleOrder(70_000, 7, 3, kind, **blocks)
    reader = native.BatchReader(
        native.Corpus.wrap(np.arange(70_000, dtype=np.uint32)), order.to_native(native)
    )

    def read(first):
        x, y = np.empty((8, 7), np.int64), np.empty((8, 7), np.int64)
        reader.read(first, x, y, first + 8)
        return x[:, 0]

    firsts = [i * 7919 % 50_000 for i in range(400)]  # epochs and pools in no order
    with ThreadPoolExecutor(4) as pool:
        starts = list(pool.map(read, firsts))
    assert np.array_equal(starts, [order.starts(first, 8) for first in firsts])
