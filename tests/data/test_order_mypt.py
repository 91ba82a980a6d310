"""MyPT's sampling against what it calls: NumPy's legacy generator and torch's CPU generator."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.mypt_order import (
    MersenneWords,
    MyptEpisodeOrder,
    MyptShardOrder,
    MyptTextOrder,
)
from mypt_fast.errors import DataError

SEEDS = st.one_of(st.integers(0, 2000), st.integers(0, 2**32 - 1))
BELOW = st.one_of(st.integers(1, 3000), st.integers(1, 2**32), st.sampled_from([1, 2**31, 2**32]))


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, calls=st.lists(st.tuples(BELOW, st.integers(1, 700)), max_size=6))
def test_numpy_below_is_randint_of_the_seeded_global_generator(seed, calls):
    words, numpy = MersenneWords(seed), np.random.RandomState(seed)
    for n, count in calls:
        assert np.array_equal(words.numpy_below(n, count), numpy.randint(0, n, size=count))
    following = numpy.randint(0, 2**32, size=3, dtype=np.int64)  # and the next word is the same one
    assert np.array_equal(words.take(3), following)
    assert np.array_equal(MersenneWords(seed, words.taken - 3).take(3), following)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.one_of(SEEDS, st.integers(0, 2**64 - 1)),
    calls=st.lists(
        st.tuples(
            st.one_of(
                BELOW,
                st.integers(2**28 - 2, 2**28 + 2),
                st.integers(2**32 - 2, 2**32 + 2),
                st.integers(1, 2**62),
            ),
            st.integers(1, 700),
        ),
        max_size=6,
    ),
)
def test_torch_below_is_torch_randint_of_the_seeded_cpu_generator(seed, calls):
    words = MersenneWords(seed % 2**32)
    generator = torch.Generator().manual_seed(seed)
    for n, count in calls:
        theirs = torch.randint(n, (count,), generator=generator).numpy()
        assert np.array_equal(words.torch_below(n, count), theirs)


def test_text_batches_are_those_of_torch_randint_on_the_global_generator():
    order = MyptTextOrder(1000, 16, 12, seed=1337)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        theirs = [torch.randint(1000 - 16, (12,)).numpy() for _ in range(50)]
    ours = [order.next_starts() for _ in range(50)]
    assert np.array_equal(ours, theirs)
    assert ours[0][:4].tolist() == [391, 589, 476, 448]
    assert np.max(ours) + 17 <= 1000


def upstream_shard_batch(random, sizes, block, B):
    """The calls of spec 8.3, one by one, on any generator with `randint`."""
    random.randint(0, len(sizes))
    while True:
        shard = random.randint(0, len(sizes))
        max_start = sizes[shard] - block - 1
        if max_start > 0:
            break
    starts = np.arange(max_start) if max_start < B else random.randint(0, max_start, size=B)
    return starts + sum(sizes[:shard])


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=9),
    block=st.integers(1, 40),
    B=st.integers(1, 70),
)
def test_shard_batches_are_those_of_the_numbered_calls(seed, sizes, block, B):
    sizes = [*sizes, block + 2]
    order = MyptShardOrder(sizes, block, B, seed, strict_compat=True)
    random = np.random.RandomState(seed)
    ends = np.cumsum(sizes)
    for _ in range(12):
        starts = order.next_starts()
        assert np.array_equal(starts, upstream_shard_batch(random, sizes, block, B))
        shard = np.searchsorted(ends, starts, "right")
        assert len(set(shard.tolist())) == 1
        assert np.all(starts + block + 1 < ends[shard])  # the last two windows are out of reach


def test_shard_batches_are_those_of_the_global_generator():
    sizes, before = [500, 30, 90], np.random.get_state()
    try:
        np.random.seed(42)
        theirs = [upstream_shard_batch(np.random, sizes, 16, 8).tolist() for _ in range(40)]
    finally:
        np.random.set_state(before)
    order = MyptShardOrder(sizes, 16, 8, 42)
    assert [order.next_starts().tolist() for _ in range(40)] == theirs
    assert theirs[0] == [270, 106, 71, 188, 20, 102, 121, 466]


def test_orders_leave_the_global_generators_alone():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    for order in (MyptShardOrder([500], 16, 8, 42), MyptTextOrder(500, 16, 8, 42)):
        order.next_starts()
    MyptEpisodeOrder(20, 8, 42).next_ids()
    assert np.array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_a_shard_with_fewer_starts_than_a_batch_has_rows_is_drawn_like_any_other():
    # max_start is 3: upstream returns the same three rows whenever it draws this shard.
    order, random = MyptShardOrder([20], 16, 64, 5), np.random.RandomState(5)
    for _ in range(3):
        random.randint(0, 1), random.randint(0, 1)
        starts = order.next_starts()
        assert np.array_equal(starts, random.randint(0, 3, size=64))
        assert set(starts.tolist()) == {0, 1, 2}
    strict = MyptShardOrder([20], 16, 64, 5, strict_compat=True)
    assert [strict.next_starts().tolist() for _ in range(3)] == [[0, 1, 2]] * 3
    # A shard that is never drawn does no harm: 17 tokens have max_start 0.
    assert MyptShardOrder([500, 17, 0], 16, 4, 0).next_starts().size == 4


@pytest.mark.parametrize("sizes", [[], [17], [5, 0, 17, 16]])
@pytest.mark.parametrize("strict", [False, True])
def test_where_upstream_would_loop_for_ever_an_error_says_so(sizes, strict):
    with pytest.raises(DataError, match=r"where one needs 18; add data or lower"):
        MyptShardOrder(sizes, 16, 4, 0, strict_compat=strict)


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="16 tokens, where one window needs 17"):
        MyptTextOrder(16, 16, 4, 0)
    assert MyptTextOrder(17, 16, 4, 0).next_starts().tolist() == [0] * 4


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    B=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
)
def test_episodes_come_epoch_by_epoch_across_batches(n, B, seed, shuffle):
    order = MyptEpisodeOrder(n, B, seed, shuffle=shuffle)
    ids = np.concatenate([order.next_ids() for _ in range(5)])
    epochs = [
        np.random.RandomState(seed + e).permutation(n) if shuffle else np.arange(n)
        for e in range(5 * B // n + 1)
    ]
    assert np.array_equal(ids, np.concatenate(epochs)[: 5 * B])
    assert order.epoch * n + order.position == 5 * B


def test_random_episodes_are_draws_of_one_generator():
    order, random = MyptEpisodeOrder(37, 8, 1729, "random"), np.random.RandomState(1729)
    for _ in range(20):
        assert np.array_equal(order.next_ids(), random.randint(0, 37, size=8))


def test_splits_have_counters_of_their_own():
    train, val = MyptEpisodeOrder(10, 4, 1337), MyptEpisodeOrder(10, 4, 1337)
    first = train.next_ids()
    val.next_ids()
    assert np.array_equal(val.next_ids(), train.next_ids())
    train.reset_epoch()
    assert np.array_equal(train.next_ids(), first)


MAKERS = {
    "shards": lambda: MyptShardOrder([500, 80, 31], 16, 8, 3),
    "text": lambda: MyptTextOrder(500, 16, 8, 2**40 + 3),
    "epoch": lambda: MyptEpisodeOrder(21, 8, 3),
    "in place": lambda: MyptEpisodeOrder(21, 8, 3, shuffle=False),
    "random": lambda: MyptEpisodeOrder(21, 8, 3, "random"),
}


def draw(order):
    return (order.next_ids if isinstance(order, MyptEpisodeOrder) else order.next_starts)()


@pytest.mark.parametrize("name", MAKERS)
def test_resuming_at_any_batch_equals_not_stopping(name):
    straight, states, batches = MAKERS[name](), [], []
    for _ in range(40):
        states.append(json.dumps(straight.state_dict()))
        batches.append(draw(straight))
    assert max(map(len, states)) < 400
    for stop in range(40):
        resumed = MAKERS[name]()
        draw(resumed)  # whatever it did before
        resumed.load_state_dict(json.loads(states[stop]))
        assert json.dumps(resumed.state_dict()) == states[stop]
        for expected in batches[stop : stop + 8]:
            assert np.array_equal(draw(resumed), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_of_another_stream_is_refused_and_changes_nothing(name):
    order = MAKERS[name]()
    draw(order)
    state = order.state_dict()
    field = "position" if isinstance(order, MyptEpisodeOrder) else "batches"
    for bad in (
        {"seed": 4},
        {"batch_size": 9},
        {"algo": "mypt/v0"},
        {"words": -1},
        {"words": 2**36},
        {"words": 1.0},
        {"words": True},
        {field: None},
        {field: 2**60},
    ):
        with pytest.raises(DataError, match=next(iter(bad))):
            order.load_state_dict({**state, **bad})
        assert order.state_dict() == state
    with pytest.raises(DataError, match="the state has None"):
        order.load_state_dict({})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses_is_refused(seed):
    with pytest.raises(ValueError, match="32 bits"):
        MyptShardOrder([500], 16, 8, seed)


def test_impossible_arguments_are_refused():
    for make in (
        lambda: MyptShardOrder([500], 0, 8, 0),
        lambda: MyptTextOrder(500, 16, 0, 0),
        lambda: MyptEpisodeOrder(5, 0, 0),
        lambda: MyptEpisodeOrder(5, 1, 0, "shuffled"),
        lambda: MersenneWords(0).numpy_below(0, 1),
        lambda: MersenneWords(0).torch_below(0, 1),
    ):
        with pytest.raises(ValueError, match=r"a batch|batch_sampling_mode|draws below"):
            make()
    with pytest.raises(DataError, match="none is valid"):
        MyptEpisodeOrder(0, 4, 0)
    order = MyptEpisodeOrder(2, 3, 2**32 - 1)
    with pytest.raises(DataError, match="past 32 bits"):
        order.next_ids()
