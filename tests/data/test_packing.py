"""Documents in batches: boundaries, packing, masks, and a position that is one integer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.annotations import StoredWeights, joined_ends
from mypt_fast.data.document_loader import DocumentLoader, checked_ends, document_ends
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.order import SampleOrder
from mypt_fast.data.packing import BestFitLayout, LossRule, WindowLayout, best_fit
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DataChangedError, DataError, FormatError, TokenRangeError

RULES = [LossRule(c, o) for c in (False, True) for o in (False, True)]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def ends_of(lengths):
    return np.cumsum(np.array(lengths, dtype=np.int64))


def lognormal_ends(count=20_000, mean=6.0, sigma=1.1, seed=0):
    lengths = np.random.default_rng(seed).lognormal(mean, sigma, count).astype(np.int64)
    return ends_of(np.maximum(lengths, 1))


def loader_of(ends, seq_len=8, documents="bestfit", **options):
    """A loader over the corpus 0, 1, 2, ..., so that a token says where it is from."""
    corpus = TokenCorpus.from_tokens(np.arange(ends[-1]) + 1)
    return DocumentLoader(corpus, seq_len, ends, documents, **{"seed": 5, **options})


def coverage(pieces):
    seen = np.zeros(pieces.n_tokens, dtype=int)
    for start, length in zip(pieces.start, pieces.length, strict=True):
        seen[start : start + length] += 1
    return seen


@given(LENGTHS, st.integers(1, 17), st.integers(0, 2**64 - 1), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_best_fit_reads_every_token_once_an_epoch(lengths, seq_len, seed, epoch):
    ends = ends_of(lengths)
    layout = BestFitLayout(ends, seq_len, seed)
    pieces = layout.pieces(epoch * layout.n_samples, layout.n_samples)
    assert layout.n_samples == -(-ends[-1] // seq_len)  # padding is less than one row
    assert (coverage(pieces) == 1).all()
    assert np.bincount(pieces.row, pieces.length).max() <= seq_len
    document = np.searchsorted(ends, pieces.start, "right")
    assert (pieces.start + pieces.length <= ends[document]).all()  # none reaches into another
    assert (pieces.closes == (pieces.start + pieces.length == ends[document])).all()


@given(LENGTHS, st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_packing_fills_the_bins_and_splits_only_what_fits_nowhere(lengths, capacity, spare):
    lengths = np.minimum(np.array(lengths), capacity)
    n_bins = -(-int(lengths.sum()) // capacity) + spare - 1
    piece, offset, size, bin_of = best_fit(lengths, n_bins, capacity)
    assert (size > 0).all()
    assert np.bincount(bin_of, size, n_bins).max() <= capacity
    for i, length in enumerate(lengths):  # the pieces of a fragment are the fragment
        mine = np.argsort(offset[piece == i])
        begins, sizes = offset[piece == i][mine], size[piece == i][mine]
        assert begins.tolist() == [0, *np.cumsum(sizes)[:-1]]
        assert sizes.sum() == length
    if n_bins >= len(lengths):
        assert len(piece) == len(lengths)


def test_a_bin_is_chosen_that_is_filled_best():
    piece, _, _, bin_of = best_fit(np.array([7, 6, 3, 4]), 2, 10)
    chosen = dict(zip(piece.tolist(), bin_of.tolist(), strict=True))
    assert chosen[0] == chosen[2]
    assert chosen[1] == chosen[3]


def test_lognormal_documents_leave_no_padding_and_stay_whole():
    ends = lognormal_ends()
    T = 1024
    layout = BestFitLayout(ends, T, 7)
    pieces = layout.pieces(0, layout.n_samples)
    documents = pieces.documents(T, LossRule())
    assert (documents.segment_ids == 0).mean() < 0.0005
    lengths = np.diff(ends, prepend=0)
    began = np.bincount(np.searchsorted(ends, pieces.start, "right"), minlength=len(ends))
    short = lengths <= T
    assert (began[short] == 1).mean() > 0.98
    windows = WindowLayout(ends, T, SampleOrder(int(ends[-1]), T, 7))
    cut = windows.pieces(0, windows.n_samples)
    parts = np.bincount(np.searchsorted(ends, cut.start, "right"), minlength=len(ends))
    assert (parts[short] <= 1).mean() < 0.8  # what the windows of a plain loader do to them
    assert 2048 < len(layout.plan(0, 0).start) < 8192


def test_a_plan_mixes_documents_from_all_over_the_corpus():
    ends = lognormal_ends()
    layout = BestFitLayout(ends, 256, 1)
    assert layout.n_windows > 3
    for window in range(2):
        tenths = np.bincount(layout.plan(0, window).start * 10 // ends[-1], minlength=10)
        assert (tenths > 0).sum() >= 8
    first = layout.pieces(0, 16)
    assert np.ptp(first.start) > ends[-1] // 2  # rows too


def window_layout(ends, seq_len, seed):
    return WindowLayout(ends, seq_len, SampleOrder(int(ends[-1]), seq_len, seed))


@pytest.mark.parametrize("make", [BestFitLayout, window_layout])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_samples_do_not_depend_on_how_they_are_asked_for(make, data):
    ends = ends_of([*data.draw(LENGTHS), 40])
    seq_len = data.draw(st.integers(2, 17))
    whole = make(ends, seq_len, 3)
    n = 2 * whole.n_samples + 3
    expected = whole.pieces(0, n)
    first = data.draw(st.integers(0, n - 1))
    count = data.draw(st.integers(1, n - first))
    part = make(ends, seq_len, 3).pieces(first, count)  # a new one: nothing is cached
    rows = (expected.row >= first) & (expected.row < first + count)
    assert part.row.tolist() == (expected.row[rows] - first).tolist()
    assert part.start.tolist() == expected.start[rows].tolist()
    assert part.length.tolist() == expected.length[rows].tolist()


def test_epochs_and_seeds_differ_and_the_order_is_fixed():
    ends = lognormal_ends(500, 3.0)
    layout = BestFitLayout(ends, 32, 11)
    n = layout.n_samples

    def starts(pieces):
        return pieces.start[:50].tolist()

    first = starts(layout.pieces(0, n))
    assert starts(layout.pieces(n, n)) != first
    assert starts(BestFitLayout(ends, 32, 12).pieces(0, n)) != first
    # a saved position means these samples: another order needs another ALGORITHM
    few = BestFitLayout(ends_of([5, 9, 3, 30, 1, 12, 4]), 8, 1).pieces(0, 8)
    assert few.row.tolist() == GOLDEN[0]
    assert few.start.tolist() == GOLDEN[1]
    assert few.length.tolist() == GOLDEN[2]


GOLDEN = (
    [0, 1, 2, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7],
    [33, 5, 1, 56, 17, 41, 47, 0, 13, 14, 60, 48, 25],
    [8, 8, 4, 4, 8, 6, 1, 1, 1, 3, 4, 8, 8],
)


@pytest.mark.parametrize("documents", ["mask", "bestfit"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@given(lengths=LENGTHS, seq_len=st.integers(2, 17), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_batch_is_what_its_boundaries_say(documents, rule, lengths, seq_len, seed):
    """Against a loop over tokens: token i of the corpus is i + 1, padding is 0."""
    ends = ends_of([*lengths, 20])
    loader = loader_of(ends, seq_len, documents, seed=seed, rule=rule)
    rows = min(5, loader.n_windows)
    x, y, found = loader.read(0, rows)
    boundaries, n, longest, starts = set(ends.tolist()), int(ends[-1]), 0, []
    for r in range(rows):
        position = 0
        for t in range(seq_len):
            token = int(x[r, t])
            follows = t and token == x[r, t - 1] + 1 and (token - 1) not in boundaries
            if not (follows or (t and token == 0 == x[r, t - 1])):
                position = 0
                starts.append(r * seq_len + t)
            # best fit may lay two pieces of one long document side by side
            neighbours = documents == "bestfit" and follows and found.position_ids[r, t] == 0
            position = 0 if neighbours else position
            assert found.position_ids[r, t] == position
            position += 1
            if token == 0:
                assert (found.segment_ids[r, t], found.loss_mask[r, t]) == (0, 0)
                continue
            asked = token < n and (rule.crossing or token not in boundaries)
            if not rule.opening and found.position_ids[r, t] == 0:
                asked = False
            assert found.loss_mask[r, t] == asked
            if token < n:
                assert y[r, t] == token + 1
        longest = max(longest, int(found.position_ids[r].max()) + 1)
    assert found.max_seqlen == longest
    changes = np.flatnonzero(found.position_ids.ravel() == 0).tolist()
    assert found.cu_seqlens.tolist() == [*changes, rows * seq_len]
    assert set(starts) <= set(changes)
    ids = found.segment_ids
    for row in ids:
        assert row.max() == len(set(row[row > 0]))
    assert loader.weight(0, rows) == found.loss_mask.sum()


def test_mask_batches_hold_the_tokens_of_the_plain_loader():
    ends = lognormal_ends(200, 3.0)
    corpus = TokenCorpus.from_tokens(np.arange(ends[-1]))
    plain = TokenLoader(corpus, 16, seed=5)
    masked = DocumentLoader(corpus, 16, ends, "mask", seed=5)
    assert masked.n_windows == plain.n_windows
    for a, b in zip(plain.read(7, 40), masked.read(7, 40)[:2], strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("documents", ["mask", "bestfit"])
def test_ranks_read_the_same_stream_at_any_world_size(documents):
    ends = lognormal_ends(300, 3.0)
    alone = loader_of(ends, 16, documents, global_batch=24)
    steps = [alone.next(24) for _ in range(3)]
    for world in (2, 3, 4, 8):
        ranks = [
            loader_of(ends, 16, documents, global_batch=24, rank=r, world_size=world)
            for r in range(world)
        ]
        for expected in steps:
            assert len({r.step_weight() for r in ranks}) == 1
            assert ranks[0].step_weight() == expected.documents.loss_mask.sum()
            parts = [r.next(24 // world) for r in ranks]
            assert (np.concatenate([p.x for p in parts]) == expected.x).all()
            for name in ("position_ids", "segment_ids", "loss_mask"):
                together = np.concatenate([getattr(p.documents, name) for p in parts])
                assert (together == getattr(expected.documents, name)).all()


@pytest.mark.parametrize("documents", ["mask", "bestfit"])
def test_a_position_continues_anywhere_and_is_small(documents):
    ends = lognormal_ends(100, 3.0)
    one = loader_of(ends, 16, documents, global_batch=4)
    for _ in range(2 * one.n_windows // 4):  # through the end of an epoch
        state = json.loads(json.dumps(one.state_dict()))
        two = loader_of(ends, 16, documents, global_batch=4)
        two.load_state_dict(state)
        batch, again = one.next(4), two.next(4)
        assert (batch.x == again.x).all()
        assert (batch.documents.loss_mask == again.documents.loss_mask).all()
    assert len(json.dumps(state)) < 1024


def test_another_stream_is_refused_with_its_differences():
    ends = lognormal_ends(100, 3.0)
    state = loader_of(ends).state_dict()
    moved = ends.copy()
    moved[3] += 1
    for other, name in (
        (loader_of(moved), "boundaries"),
        (loader_of(ends, documents="mask"), "documents"),
        (loader_of(ends, seed=6), "seed"),
    ):
        with pytest.raises(DataError, match=f"{name} is .*, the state has"):
            other.load_state_dict(state)
    plain = TokenLoader(TokenCorpus.from_tokens(np.arange(ends[-1]) + 1), 8, seed=5)
    with pytest.raises(DataError, match="algo is"):
        plain.load_state_dict(state)
    with pytest.raises(DataError, match="global_sample is -1"):
        loader_of(ends).load_state_dict({**state, "global_sample": -1})


def test_a_step_under_way_is_not_a_position():
    loader = loader_of(lognormal_ends(100, 3.0), global_batch=4)
    loader.next(3)
    with pytest.raises(RuntimeError, match="3 of 4 rows"):
        loader.state_dict()
    with pytest.raises(ValueError, match="1 of this rank's 4"):
        loader.next(2)
    loader.rewind_step()
    assert loader.state_dict()["global_sample"] == 0
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        loader.next(1)


def test_stored_weights_multiply_the_mask_of_the_token_they_are_of():
    class Plane:
        def read_weights(self, start, count):
            return np.arange(start, start + count) % 3 / 2

    ends = lognormal_ends(60, 3.0)
    for documents in ("mask", "bestfit"):
        plain = loader_of(ends, 16, documents).read(0, 9)
        loader = loader_of(ends, 16, documents, weights=Plane())
        weighted = loader.read(0, 9)
        wanted = plain.documents.loss_mask * ((plain.y - 1) % 3 / 2)  # token i is i + 1
        assert (weighted.documents.loss_mask == wanted).all()
        assert loader.weight(0, 9) == wanted.sum()
        assert loader.weight(0, loader.n_windows) > 0


class FakeShard:
    """As much of a shard as annotations read."""

    def __init__(self, n_tokens, ends=None, **planes):
        self.n_tokens, self.documents, self._ends = n_tokens, ends, ends
        self.planes = [SimpleNamespace(kind=kind) for kind in planes]
        self._planes = planes

    def document_ends(self):
        return np.array(self._ends, dtype=np.uint64)

    def read_plane(self, kind):
        return np.array(self._planes[kind])


def test_the_index_of_a_corpus_joins_those_of_its_shards():
    shards = [FakeShard(5, [2, 5]), FakeShard(0), FakeShard(3, [3]), FakeShard(4, [1, 4])]
    ends = joined_ends(shards)
    assert ends.tolist() == [2, 5, 8, 9, 12]
    assert ends.dtype == np.uint64
    assert joined_ends([*shards, FakeShard(3)]) is None  # one without: nothing is known
    assert joined_ends([]) is None


def test_the_weights_of_a_corpus_join_those_of_its_shards():
    shards = [
        FakeShard(3, mask=[0, 1, 0]),
        FakeShard(0),
        FakeShard(2),
        FakeShard(3, mask=[1, 1, 1], segments=[1, 1, 2], weights=[0.5, 2, 0]),
    ]
    stored = StoredWeights(shards)
    whole = [0, 1, 0, 1, 1, 0.5, 2, 0]
    for start in range(9):
        for count in range(9 - start):
            assert stored.read_weights(start, count).tolist() == whole[start : start + count]
    assert stored.any
    assert not StoredWeights(shards[1:3]).any


def test_an_index_that_is_not_of_the_corpus_is_refused():
    for ends, words in (
        ([], "ends at nothing"),
        ([3, 9], "it ends at 9, the tokens at 10"),
        ([3, 2, 10], "document 1 ends at 2, the one before it at 3"),
        (np.array([1 << 63, 10], dtype=np.uint64), "document|ends"),
    ):
        with pytest.raises(FormatError, match=words):
            checked_ends(np.array(ends, dtype=np.uint64), 10, "a corpus")
    empty = checked_ends(np.array([0, 3, 3, 10], dtype=np.uint64), 10, "a corpus")
    assert empty.tolist() == [3, 10]
    stored = np.array([3, 10], dtype=np.uint64)
    assert np.shares_memory(checked_ends(stored, 10, "a corpus"), stored)  # no copy of an index


def test_without_an_index_documents_end_at_their_last_token_and_a_note_says_so():
    corpus = TokenCorpus.from_tokens([5, 6, 0, 7, 0, 8])
    ends, note = document_ends(corpus, 0)
    assert ends.tolist() == [3, 5, 6]
    assert "no document index" in note
    ends, _ = document_ends(TokenCorpus.from_tokens([5, 0]), 0)
    assert ends.tolist() == [2]
    with pytest.raises(DataError, match="no document index, and its tokenizer"):
        document_ends(corpus, None)


def test_scanning_finds_boundaries_past_its_block(monkeypatch):
    from mypt_fast.data import document_loader

    monkeypatch.setattr(document_loader, "_SCAN_TOKENS", 7)
    tokens = np.ones(50, dtype=np.int64)
    tokens[[0, 6, 7, 30]] = 0
    ends, _ = document_ends(TokenCorpus.from_tokens(tokens), 0)
    assert ends.tolist() == [1, 7, 8, 31, 50]


def test_a_token_outside_the_vocabulary_is_named(dataset, backend):
    folder = dataset([10, 30])
    corpus = TokenCorpus.from_dataset(folder, "train", backend)
    loader = DocumentLoader(corpus, 8, np.array([40]), "bestfit", seed=1, vocab_size=25)
    with pytest.raises(TokenRangeError, match=r"token 15 of train/shard_00001.bin .*id 25"):
        loader.read(0, loader.n_windows)


@pytest.mark.parametrize("io", ["mmap", "pread", "ram"])
def test_spans_are_read_across_shards(dataset, backend, io):
    io = "auto" if (backend, io) == ("numpy", "pread") else io  # which NumPy does not have
    corpus = TokenCorpus.from_dataset(dataset([10, 0, 3, 30, 0]), "train", backend, io)
    assert corpus.read_span(8, 7).tolist() == list(range(8, 15))
    assert corpus.read_span(0, 43).tolist() == list(range(43))
    assert corpus.read_span(43, 0).tolist() == []
    for start, count in ((40, 4), (-1, 2), (44, 0)):
        with pytest.raises(ValueError, match="of 43 tokens"):
            corpus.read_span(start, count)
    corpus.close()
    with pytest.raises(ValueError, match="closed"):
        corpus.read_span(0, 1)


def test_a_shard_cut_short_under_a_loader_that_reads_is_an_error(dataset, native):
    folder = dataset([10, 30])
    corpus = TokenCorpus.from_dataset(folder, "train", "native", "pread")
    loader = DocumentLoader(corpus, 8, np.array([40]), "bestfit", seed=1)
    loader.read(0, loader.n_windows)
    shard = folder / "train" / "shard_00001.bin"
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(DataChangedError, match=r"shard_00001\.bin; ends at byte 40"):
        loader.read(0, loader.n_windows)


@pytest.mark.parametrize(("options", "words"), [
    ({"documents": "concat"}, "mask, bestfit"),
    ({"rank": 2, "world_size": 2}, "rank 2"),
    ({"global_batch": 3, "world_size": 2}, "multiple of 2"),
])  # fmt: skip
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        loader_of(ends_of([20, 30]), **options)


def test_a_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="8 tokens, where one window needs 9"):
        loader_of(ends_of([3, 5]))
