import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.loader import TokenCorpus
from mypt_fast.data.mixture import BLOCK, MixtureOrder, Phase, quotas
from mypt_fast.data.order import ORDERS, SampleOrder

U64 = st.integers(0, 2**64 - 1)
SIZES = [3000, 900, 0, 20_000, 40]
WEIGHTS = [0.2, 0.3, 0, 0.45, 0.05]


def constant(weights=WEIGHTS, sizes=SIZES, seq_len=16, seed=7, **kwargs):
    return MixtureOrder(sizes, seq_len, seed, [(None, weights)], **kwargs)


def three_phases(**kwargs):
    """Phases that end within a block, twice in the first one, and change what is used."""
    phases = [Phase(1000, [1, 1, 0, 1, 0]), (70_001, [0, 2, 0, 1, 1]), (None, WEIGHTS)]
    return MixtureOrder(SIZES, 16, 7, phases, **kwargs)


# A change here changes the data order of every saved run: it needs a new version.
GOLDEN = {
    "epoch": "c945202510ea9fdc",
    "sequential": "a5cfb982e52a6b28",
    "replacement": "ec4d8e70c97a8b4f",
    "block": "154df17131bf7b62",
}


@pytest.mark.parametrize("kind", ORDERS)
def test_the_starts_are_what_they_always_were(native, kind):
    order = three_phases(kind=kind, block_tokens=200, pool_blocks=3)
    assert order.identity()["algo"].startswith("mixture/v1 ")
    for stream in (order, order.to_native(native)):
        starts = np.concatenate([stream.starts(500, 1000), stream.starts(69_900, 200)])
        assert hashlib.sha256(starts.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN[kind]


def test_the_sources_are_what_they_always_were(native):
    expected = [1, 3, 0, 1, 3, 0, 0, 3, 1, 3, 0, 3, 1, 1, 3, 4, 0, 3, 1, 3]
    assert constant().sources(65_530, 20).tolist() == expected
    assert constant().to_native(native).sources(65_530, 20).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.floats(0.1, 100)), min_size=1, max_size=20).filter(any))
def test_quotas_are_the_weights_to_one_slot_and_sum_exactly(weights):
    whole, total = quotas(weights), math.fsum(weights)
    assert sum(whole) == BLOCK == 65_536
    for weight, quota in zip(weights, whole, strict=True):
        assert abs(quota - weight / total * BLOCK) < 1 + 1e-9
        assert (quota == 0) == (weight == 0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1], [65_536]),
        ([0, 3, 0], [0, 65_536, 0]),
        ([1, 1, 1], [21_846, 21_845, 21_845]),
        ([1e-300, 1e-300], [32_768, 32_768]),
        ([1e300, 1e300, 0], [32_768, 32_768, 0]),
        ([1, 65_535], [1, 65_535]),
        (np.float32([0.5, 0.5]), [32_768, 32_768]),
    ],
)
def test_quotas_of_awkward_weights(weights, expected):
    assert quotas(weights) == expected


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -0.5], "weight 1 is -0.5; weights are finite"),
        ([math.nan, 1], "weight 0 is nan"),
        ([1, math.inf], "weight 1 is inf"),
        ([0, 0.0], "no positive one"),
        ([], "no positive one"),
        ([1, 1e-6], r"weight 1 is 1e-06, less than one sample in 65536 of all; use 0, or 1\.52"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        quotas(weights)


@settings(max_examples=60, deadline=None)
@given(rest=st.floats(1e-6, 1e9), tiny=st.floats(1e-12, 1e-7))
def test_the_smallest_weight_that_an_error_names_is_usable_and_no_larger_than_need_be(rest, tiny):
    with pytest.raises(ValueError, match="less than one") as caught:
        quotas([rest, rest * tiny])
    named = float(str(caught.value).split("or ")[1].split()[0])
    assert quotas([rest, named])[1] == 1
    assert named < rest / 65_000


@st.composite
def mixtures(draw, kinds=ORDERS):
    """Any mixture of short sources, its phases ending anywhere in the first few blocks."""
    seq_len = draw(st.integers(1, 30))
    K = draw(st.integers(1, 9))
    weight = st.one_of(st.just(0), st.sampled_from([1, 2.5]), st.floats(0.05, 100))
    weights = st.lists(weight, min_size=K, max_size=K).filter(any)
    end = st.one_of(st.integers(1, 300), st.integers(1, 4 * BLOCK))
    ends = sorted(draw(st.sets(end, max_size=5)))
    phases = [(end, draw(weights)) for end in [*ends, None]]
    sizes = [
        draw(st.integers(0 if all(w[k] == 0 for _, w in phases) else seq_len + 1, 900))
        for k in range(K)
    ]
    return MixtureOrder(
        sizes, seq_len, draw(U64), phases, draw(st.sampled_from(kinds)),
        block_tokens=draw(st.integers(1, 300)), pool_blocks=draw(st.integers(1, 5)),
    )  # fmt: skip


def interesting_samples(order):
    """Around 0, the end of each phase, and a block's end."""
    ends = [stage.begin for stage in order._stages]
    return sorted({max(0, at - 20) for at in (0, BLOCK, *ends)})


@settings(max_examples=80, deadline=None)
@given(order=mixtures(), first=st.integers(0, 2**62), count=st.integers(0, 60))
def test_native_and_numpy_mixtures_are_equal(native, order, first, count):
    twin = order.to_native(native)
    assert (twin.n_tokens, twin.n_windows) == (order.n_tokens, order.n_windows)
    for sample in (first, *interesting_samples(order)):
        assert np.array_equal(twin.starts(sample, count), order.starts(sample, count))
        assert np.array_equal(twin.sources(sample, count), order.sources(sample, count))


def own_order(order, k):
    """Source k's order, from public parts alone."""
    from mypt_fast.data.permutation import base_key, derived_key

    return SampleOrder(
        order._sizes[k], order.seq_len, derived_key(base_key(order.seed, k), 10), order.within,
        block_tokens=order.block_tokens, pool_blocks=order.pool_blocks,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(order=mixtures())
def test_each_source_goes_through_its_own_order_without_a_gap_or_a_repeat(native, order):
    total = order._stages[-1].begin + 1500
    twin = order.to_native(native)  # the faster one on short sources
    starts, sources = twin.starts(0, total), twin.sources(0, total)
    base = 0
    for k, size in enumerate(order._sizes):
        own = starts[sources == k] - base
        if own.size:
            assert np.array_equal(own, own_order(order, k).to_native(native).starts(0, own.size))
            assert own.min() >= 0
            assert own.max() + order.seq_len + 1 <= size  # no window leaves its source
        base += size


@settings(max_examples=40, deadline=None)
@given(order=mixtures())
def test_counts_are_those_of_the_samples_before(order):
    total = order._stages[-1].begin + 700
    sources = order.sources(0, total)
    for sample in {0, 1, total, *(at for at in interesting_samples(order) if at <= total)}:
        expected = np.bincount(sources[:sample], minlength=len(order._sizes))
        assert np.array_equal(order.counts(sample), expected)


@settings(max_examples=15, deadline=None)
@given(order=mixtures(), number=st.integers(0, 2))
def test_quotas_are_exact_in_every_block_and_even_within(order, number):
    stage = order._stages[-1]
    first = stage.begin + number * BLOCK
    sources = order.sources(first, BLOCK)
    K = len(order._sizes)
    assert np.array_equal(np.bincount(sources, minlength=K), stage.quotas)
    levels = (K - 1).bit_length()
    for k in range(K):
        so_far = np.cumsum(sources == k)
        share = np.arange(1, BLOCK + 1) * stage.quotas[k] / BLOCK
        assert np.abs(so_far - share).max() <= levels


def test_a_source_without_weight_never_comes():
    assert set(three_phases().sources(0, 200_000).tolist()) == {0, 1, 3, 4}
    assert set(three_phases().sources(1000, 69_001).tolist()) == {1, 3, 4}


def test_where_a_source_comes_differs_between_seeds_and_blocks():
    first = constant().sources(0, 2 * BLOCK)
    assert not np.array_equal(first[:BLOCK], first[BLOCK:])
    assert not np.array_equal(first, constant(seed=8).sources(0, 2 * BLOCK))


def test_equal_sources_are_read_in_different_orders():
    order = constant([1, 1], [5000, 5000])
    starts, sources = order.starts(0, 400), order.sources(0, 400)
    assert not np.array_equal(starts[sources == 0], starts[sources == 1] - 5000)


def test_every_window_of_a_source_comes_once_in_each_of_its_epochs():
    order = three_phases()
    # In pieces, so that each phase is entered anew.
    starts = np.concatenate([order.starts(first, 500) for first in range(0, 150_000, 500)])
    sources = order.sources(0, 150_000)
    own = starts[sources == 3] - 3900
    n = (20_000 - 16) // 16
    assert own.size > 10 * n
    for epoch in range(10):
        assert np.all(np.diff(np.sort(own[epoch * n : (epoch + 1) * n])) == 16)


@settings(max_examples=25, deadline=None)
@given(
    order=mixtures(), share=st.integers(1, 4), W=st.sampled_from([1, 2, 3, 4, 8]), data=st.data()
)
def test_ranks_together_are_the_stream_and_a_resume_goes_on_with_it(order, share, W, data):
    G, steps = share * W, 4
    at = data.draw(st.sampled_from(interesting_samples(order))) // G
    whole = order.starts(at * G, steps * G)
    for stop in range(steps):  # nothing is carried along: every step is a resume
        parts = [order.starts((at + stop) * G + rank * share, share) for rank in range(W)]
        assert np.array_equal(np.concatenate(parts), whole[stop * G : (stop + 1) * G])


def test_phases_are_found_by_sample():
    order = three_phases()
    samples = (0, 999, 1000, 70_000, 70_001, 2**62)
    assert [order.phase_of(sample) for sample in samples] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="2\\^63"):
        order.phase_of(-1)


def test_phases_of_equal_weights_change_nothing_about_which_windows_are_read():
    split = MixtureOrder(SIZES, 16, 7, [(12_345, WEIGHTS), (None, WEIGHTS)])
    for k, count in enumerate(constant().counts(100_000).tolist()):
        assert abs(count - split.counts(100_000)[k]) <= 6


def test_many_sources_and_one(native):
    order = constant([1] * 1000, [50] * 1000, 16)
    sources = order.sources(0, BLOCK)
    assert set(np.bincount(sources).tolist()) == {65, 66}
    assert np.array_equal(order.to_native(native).starts(0, 3000), order.starts(0, 3000))
    alone = constant([2.5], [5000])
    assert np.array_equal(alone.starts(0, 2000), own_order(alone, 0).starts(0, 2000))


def test_sequential_sources_are_read_in_place():
    order = constant([1, 1], [1000, 1000], 10, kind="sequential")
    starts, sources = order.starts(0, 40), order.sources(0, 40)
    assert starts[sources == 0].tolist() == list(range(0, 200, 10))
    assert starts[sources == 1].tolist() == list(range(1000, 1200, 10))


def test_batches_of_a_mixture_are_equal_and_know_their_source(dataset, backend):
    corpus = TokenCorpus.from_dataset(dataset([3000, 2000]), "train", backend)
    order = constant([1, 3, 0], [2000, 2500, 500])
    reader = corpus.reader(order)
    x, y = np.empty((64, 16), np.int64), np.empty((64, 16), np.int64)
    reader.read(1000, x, y, 1064)
    assert np.array_equal(x[:, 0], order.starts(1000, 64))
    assert np.array_equal(x + 1, y)
    assert np.array_equal(np.searchsorted([2000, 4500], x[:, 0], "right"), order.sources(1000, 64))


def test_an_order_for_another_corpus_is_refused(native, dataset):
    corpus = TokenCorpus.from_dataset(dataset([3000]), "train", "native")
    with pytest.raises(ValueError, match=r"for 5000 tokens, the corpus has 3000"):
        corpus.reader(constant([1, 1], [2000, 3000]))


def test_an_identity_is_small_and_differs_wherever_the_stream_does():
    phases = [(100, [1, 2]), (None, [1, 1])]
    base = {"sizes": [500, 600], "seq_len": 16, "seed": 1, "phases": phases}
    changes = ({}, {"sizes": [600, 500]}, {"seq_len": 17}, {"seed": 2}, {"kind": "block"},
               {"phases": [(101, [1, 2]), (None, [1, 1])]}, {"phases": [(None, [1, 1])]},
               {"phases": [(100, [1, 2.001]), (None, [1, 1])]})  # fmt: skip
    texts = [json.dumps(MixtureOrder(**{**base, **change}).identity()) for change in changes]
    assert len(set(texts)) == len(texts)
    many = constant([1] * 5000, [50] * 5000)
    assert max(map(len, [*texts, json.dumps(many.identity())])) < 400
    # Weights are compared by what they do: these are equal.
    scaled = MixtureOrder([500, 600], 16, 1, [(100, [2, 4]), (None, [0.5, 0.5])])
    assert json.dumps(scaled.identity()) == texts[0]


@pytest.mark.parametrize(
    ("sizes", "phases", "message"),
    [
        (
            [16, 99],
            [(None, [1, 1])],
            "source 0 has weight and 16 tokens, where one needs 17",
        ),
        ([99, 99], [(None, [1, 0]), (9, [1, 1])], "the last phase of a mixture must have no end"),
        ([99, 99], [(None, [1, 0]), (None, [1, 1])], "phase 0 ends at None"),
        ([99, 99], [(9, [1, 0]), (9, [1, 1]), (None, [1, 1])], "phase 1 ends at 9, after one"),
        ([99, 99], [(0, [1, 0]), (None, [1, 1])], "phase 0 ends at 0"),
        ([99, 99], [], "the last phase"),
        ([99, 99], [(None, [1])], "phase 0 has 1 weights for 2 sources"),
        ([99, 99], [(5, [1, 1]), (None, [0, 0])], "no positive one"),
        ([16, 99], [(None, [1, -1])], "weight 1 is -1"),  # weights before sizes
        ([], [(None, [])], "1 to 65536 sources"),
        ([99, -1], [(None, [1, 0])], "tokens"),
        ([2**62, 1], [(None, [1, 0])], "at most 2\\^62 tokens"),
    ],
)
def test_an_impossible_mixture_is_refused(sizes, phases, message):
    with pytest.raises(ValueError, match=message):
        MixtureOrder(sizes, 16, 0, phases)


@pytest.mark.parametrize("arguments", [(100, 0, "none"), (100, 2**64, "epoch"), (100, -1, "epoch")])
def test_what_makes_no_order_makes_no_mixture(arguments):
    size, seed, kind = arguments
    with pytest.raises(ValueError, match=r"order is one of|seed is an unsigned"):
        MixtureOrder([size], 16, seed, [(None, [1])], kind)


LAST = 2**63 - 1


@pytest.mark.parametrize(
    ("sizes", "phases"),
    [
        ([99], []),
        ([99], [(LAST - 1, [65_536])]),
        ([99], [(0, [65_536]), (LAST, [65_536])]),
        ([99], [(LAST, [65_535])]),
        ([99], [(LAST, [65_536, 0])]),
        ([16], [(LAST, [65_536])]),
        ([], [(LAST, [])]),
        ([2**62, 1], [(LAST, [0, 65_536])]),
    ],
)
def test_the_native_mixture_checks_for_itself(native, sizes, phases):
    with pytest.raises(ValueError, match=r"mixture|phases|quotas|tokens"):
        native.MixtureOrder(sizes, 16, 0, "epoch", 100, 4, phases)


def test_samples_outside_the_stream_are_refused(native):
    order = constant()
    for first, count in ((-1, 1), (0, -1), (2**63 - 1, 1)):
        for ask in (order.starts, order.sources):
            with pytest.raises(ValueError, match="2\\^63"):
                ask(first, count)
    for ask in (order.to_native(native).starts, order.to_native(native).sources):
        with pytest.raises(ValueError, match="2\\^63"):
            ask(2**63 - 1, 1)
    assert order.starts(2**63 - 2, 1).size == 1
    assert order.starts(5, 0).size == 0
