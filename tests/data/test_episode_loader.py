"""Episodes as the engine reads them: MyPT's order in closed form, masks, segments, positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.episode_loader import EpisodeLoader, EpisodeStream
from mypt_fast.data.format import open_file, open_split
from mypt_fast.data.mypt_order import MyptShardOrder, MyptTextOrder
from mypt_fast.data.mypt_stream import MyptStream
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DataError, TokenRangeError
from tests.data.shard_files import write_episodes

LENGTHS = [6, 14, 3, 9, 1, 20, 8]
VALID = [0, 1, 2, 3, 5, 6]
N = sum(LENGTHS)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 50), seed=st.integers(0, 2000), first=st.integers(0, 400),
       count=st.integers(1, 120), shuffle=st.booleans())  # fmt: skip
def test_epochs_in_closed_form(n, seed, first, count, shuffle):
    whole, epoch = [], 0
    while len(whole) < first + count:
        random = np.random.RandomState(seed + epoch)
        whole += (random.permutation(n) if shuffle else np.arange(n)).tolist()
        epoch += 1
    stream = EpisodeStream(n, seed, "epoch", shuffle)
    assert stream.ids(first, count).tolist() == whole[first : first + count]


def test_random_draws_at_any_place_are_those_of_one_long_sequence():
    whole = np.random.RandomState(9).randint(0, 37, size=30_000)
    stream = EpisodeStream(37, 9, "random")
    for first in (0, 25_000, 4090, 29_000, 12, 8190):
        assert np.array_equal(stream.ids(first, 30), whole[first : first + 30])


def shards_of(folder, **beside):
    ends = np.cumsum(LENGTHS)
    spans = np.stack([ends - LENGTHS, LENGTHS], axis=1)
    write_episodes(folder / "train", np.arange(N), spans, **beside)
    return open_split(folder, "train")


def loader_of(shards, **more):
    more = {"seed": 4, "pad_id": 99, "global_batch": 4, **more}
    return EpisodeLoader(shards, "here", 8, **more)


def test_rows_are_whole_episodes_or_their_ends(tmp_path):
    loader = loader_of(shards_of(tmp_path), shuffle=False)
    assert (loader.n_windows, loader.n_long, loader.has_masks) == (6, 2, False)
    x, y, documents = loader.read(0, 6)
    begins = np.cumsum(LENGTHS) - LENGTHS
    for row, episode in enumerate(VALID):
        tokens = list(range(begins[episode], begins[episode] + LENGTHS[episode]))[-9:]
        padded = tokens + [99] * (9 - len(tokens))
        assert (x[row].tolist(), y[row].tolist()) == (padded[:-1], padded[1:])
        # without masks every real target counts, and no padding does
        assert documents.loss_mask[row].tolist() == [1.0] * (len(tokens) - 1) + [0.0] * (
            9 - len(tokens)
        )
    assert documents.cu_seqlens.size == 0  # rows are whole


@pytest.mark.parametrize("use", [True, False])
def test_masks_weigh_where_they_are_used(tmp_path, use):
    loader = loader_of(shards_of(tmp_path, weights=np.arange(N) / 8), use_loss_mask=use)
    _, y, documents = loader.read(0, 6)
    real = y != 99
    assert np.array_equal(documents.loss_mask[real], y[real] / 8 if use else np.ones(real.sum()))
    assert not documents.loss_mask[~real].any()
    assert loader.weight(0, 6) == documents.loss_mask.sum(dtype=float)


def test_segments_end_where_their_number_changes_and_foretell_nothing(tmp_path):
    ids = np.concatenate([[1] * 3 + [2] * 2 + [0], *(np.ones(n) for n in LENGTHS[1:])])
    loader = loader_of(
        shards_of(tmp_path, segments=ids, mask=np.ones(N)), shuffle=False, use_loss_mask=True
    )
    _, _, documents = loader.read(0, 1)
    assert documents.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert documents.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert documents.max_seqlen == 3
    # the last token of a segment is not asked for the first of the next, nor for padding
    assert documents.loss_mask.tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("mode", ["epoch", "random"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_position_brings_the_same_rows_whatever_the_world_size(tmp_path, mode, world):
    shards = shards_of(tmp_path)
    whole = loader_of(shards, mode=mode).read(0, 40)[0]
    ranks = [loader_of(shards, mode=mode, rank=r, world_size=world) for r in range(world)]
    for step in range(5):
        rows = np.concatenate([rank.next(4 // world)[0] for rank in ranks])
        assert np.array_equal(rows, whole[4 * step : 4 * step + 4])
    state = ranks[0].state_dict()
    assert state["global_sample"] == ranks[0].position == 20
    again = loader_of(shards, mode=mode)
    again.load_state_dict(state)
    again.next(3)
    again.rewind_step()
    assert np.array_equal(again.next(4)[0], whole[20:24])


def test_another_streams_position_is_refused(tmp_path):
    shards = shards_of(tmp_path)
    state = loader_of(shards).state_dict()
    with pytest.raises(DataError, match="min_tokens is 7, the state has 2"):
        loader_of(shards, min_tokens=7).load_state_dict(state)
    with pytest.raises(DataError, match="seed is 5"):
        loader_of(shards, seed=5).load_state_dict(state)


def test_what_cannot_be_read_says_so(tmp_path):
    shards = shards_of(tmp_path)
    with pytest.raises(DataError, match="lower episode_min_tokens"):
        loader_of(shards, min_tokens=21)
    with pytest.raises(TokenRangeError, match="episode 4 of here; id 50, where vocab_size is 50"):
        loader_of(shards, shuffle=False, vocab_size=50, pad_id=0).read(0, 6)
    closed = loader_of(shards)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.next(1)
    np.zeros(100, "<u4").tofile(tmp_path / "plain.bin")
    plain = open_file(tmp_path / "plain.bin", "uint32")
    with pytest.raises(DataError, match="holds no episodes"):
        loader_of([plain])


# MyPT's order of windows as a stream


@pytest.mark.parametrize("make", [
    lambda: MyptShardOrder([500, 30, 90, 17], 16, 6, 42),
    lambda: MyptTextOrder(700, 16, 6, 42),
])  # fmt: skip
def test_a_stream_is_mypts_batches_at_any_place(make):
    order = make()
    whole = np.concatenate([order.next_starts() for _ in range(300)])
    stream = MyptStream(make())
    for first, count in [(0, 10), (10, 3), (1700, 20), (3, 40), (1200, 1), (1201, 7), (390, 50)]:
        assert np.array_equal(stream.starts(first, count), whole[first : first + count])


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_windows_of_that_stream_are_the_corpus_from_there(backend):
    from mypt_fast.data.loader import TokenLoader

    tokens = np.random.default_rng(0).integers(60_000, size=700)
    corpus = TokenCorpus.from_tokens(tokens, backend)
    stream = MyptStream(MyptTextOrder(700, 16, 6, 42))
    loader = TokenLoader(corpus, 16, seed=0, order=stream, global_batch=12)
    starts = MyptStream(MyptTextOrder(700, 16, 6, 42)).starts(0, 24)
    x, y = loader.next(12)
    windows = loader.next_windows(12)
    for row in range(12):
        assert x[row].tolist() == tokens[starts[row] :][:16].tolist()
        assert y[row].tolist() == tokens[starts[row] + 1 :][:16].tolist()
        assert windows[row].tolist() == tokens[starts[12 + row] :][:17].tolist()
