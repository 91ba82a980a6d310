import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.order import SampleOrder
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.errors import DataError


def follows(x, y, modulus=1 << 32):
    """Whether each row counts up by one, across its targets too."""
    row = np.concatenate([x, y[:, -1:]], axis=1)
    return np.array_equal(y, row[:, 1:]) and bool(np.all((row[:, :-1] + 1) % modulus == row[:, 1:]))


def make(dataset_dir, backend="auto", seq_len=16, **kwargs):
    corpus = TokenCorpus.from_dataset(dataset_dir, "train", backend)
    return TokenLoader(corpus, seq_len, **{"seed": 3, **kwargs})


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("sizes", [[1777], [1000, 777], [5, 0, 900, 1, 1, 870, 0]])
def test_windows_hold_the_right_tokens_across_shard_edges(dataset, backend, width, sizes):
    loader = make(dataset(sizes, width=width), backend)
    assert loader.n_windows == (1777 - 16) // 16
    x, y = loader.read(0, 5 * loader.n_windows)
    assert follows(x, y)
    starts = SampleOrder(1777, 16, 3).starts(0, 5 * loader.n_windows)
    assert np.array_equal(x[:, 0], starts)


def test_every_epoch_holds_every_window_once(dataset, backend):
    loader = make(dataset([300, 700]), backend)
    n = loader.n_windows
    for epoch in range(4):
        x, _ = loader.read(epoch * n, n)
        assert np.all(np.diff(np.sort(x[:, 0])) == 16)


def test_a_corpus_of_one_window_works(dataset, backend):
    loader = make(dataset([9, 8]), backend)
    x, y = loader.next(1)
    assert x.tolist() == [list(range(16))]
    assert y.tolist() == [list(range(1, 17))]
    assert loader.n_windows == 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    width=st.sampled_from([2, 4]),
    seq_len=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    first=st.one_of(st.integers(0, 200), st.integers(0, 2**60)),
    rows=st.integers(1, 20),
    kind=st.sampled_from(["epoch", "sequential"]),
)
def test_native_and_numpy_batches_are_equal(
    native, write_dataset, tmp_path_factory, sizes, width, seq_len, seed, first, rows, kind
):
    sizes = [*sizes, max(0, seq_len + 1 - sum(sizes))]
    folder = write_dataset(tmp_path_factory.mktemp("d"), sizes, width)
    batches = [
        make(folder, backend, seq_len, seed=seed, order=kind).read(first, rows)
        for backend in ("native", "numpy")
    ]
    for ours, theirs in zip(*batches, strict=True):
        assert np.array_equal(ours, theirs)
    assert follows(*batches[0])


def test_batches_are_written_into_the_callers_arrays(dataset, backend):
    loader = make(dataset([1000]), backend, global_batch=4)
    x, y = np.empty((4, 16), np.int64), np.empty((4, 16), np.int64)
    got_x, got_y = loader.next(4, x, y)
    assert got_x is x
    assert got_y is y
    assert follows(x, y)


def bad_arrays():
    good = np.zeros((2, 16), np.int64)
    frozen = good.copy()
    frozen.flags.writeable = False
    return {
        "dtype": np.zeros((2, 16), np.int32),
        "stride": np.zeros((2, 32), np.int64)[:, ::2],
        "order": np.asfortranarray(good),
        "rows": np.zeros((3, 16), np.int64),
        "columns": np.zeros((2, 17), np.int64),
        "dimensions": np.zeros(32, np.int64),
        "read-only": frozen,
    }


@pytest.mark.parametrize("fault", bad_arrays())
@pytest.mark.parametrize("name", ["x", "y"])
def test_arrays_that_cannot_take_a_batch_are_refused(dataset, backend, fault, name):
    loader = make(dataset([1000]), backend)
    with pytest.raises(ValueError, match=r"must be|differ"):
        loader.read(0, 2, **{name: bad_arrays()[fault]})


def test_overlapping_arrays_are_refused(dataset, backend):
    block = np.zeros((3, 16), np.int64)
    with pytest.raises(ValueError, match="overlap"):
        make(dataset([1000]), backend).read(0, 2, block[:2], block[1:])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_read_exactly_the_global_stream(dataset, backend, world_size):
    folder, G, micro = dataset([501, 499]), 16, 2
    whole, _ = make(folder, backend).read(0, 6 * G)
    ranks = [
        make(folder, backend, global_batch=G, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in range(6):
        parts = [loader.next(micro)[0] for loader in ranks for _ in range(G // world_size // micro)]
        assert np.array_equal(np.concatenate(parts), whole[step * G : (step + 1) * G])
    assert {loader.position for loader in ranks} == {6 * G}


def test_resuming_at_any_step_equals_not_stopping(dataset, backend):
    folder, G, steps = dataset([400]), 6, 12  # 24 windows: the stream wraps into a third epoch
    straight = make(folder, backend, global_batch=G)
    states, batches = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(straight.state_dict())))
        batches.append(straight.next(G))
    for stop in range(steps):
        resumed = make(folder, backend, global_batch=G)
        resumed.load_state_dict(states[stop])
        for expected in batches[stop:]:
            assert np.array_equal(resumed.next(G), expected)


def test_another_world_size_and_backend_continue_the_same_stream(dataset, native):
    folder, G = dataset([4000]), 8
    one = make(folder, "native", global_batch=G)
    one.next(G)
    two = [make(folder, "numpy", global_batch=G, rank=r, world_size=2) for r in (0, 1)]
    for loader in two:
        loader.load_state_dict(one.state_dict())
    halves = [loader.next(4)[0] for loader in two]
    assert np.array_equal(np.concatenate(halves), one.next(G)[0])
    assert one.state_dict() == two[0].state_dict() == two[1].state_dict()


def test_the_state_is_small_and_plain(dataset):
    state = make(dataset([1000])).state_dict()
    assert len(json.dumps(state)) < 1024
    assert state["algo"] == "feistel6/v1"
    assert state["global_sample"] == 0


def test_a_step_under_way_has_no_state_and_can_be_rewound(dataset, backend):
    loader = make(dataset([1000]), backend, global_batch=4)
    first, _ = loader.next(3)
    with pytest.raises(RuntimeError, match="3 of 4 rows"):
        loader.state_dict()
    loader.rewind_step()
    assert loader.state_dict()["global_sample"] == 0
    again, _ = loader.next(4)
    assert np.array_equal(again[:3], first)


def test_reading_does_not_move_the_position(dataset, backend):
    folder = dataset([1000])
    loader, twin = (make(folder, backend) for _ in range(2))
    for sample in (5, 0, 10**15):
        loader.read(sample, 3)
    assert loader.position == 0
    assert np.array_equal(loader.next(1), twin.next(1))


def test_the_stream_touches_no_global_random_state(dataset, backend):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    make(dataset([1000]), backend).next(1)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("rows", [0, -1, 3])
def test_rows_beyond_the_share_are_refused(dataset, rows):
    loader = make(dataset([1000]), global_batch=4, world_size=2)
    with pytest.raises(ValueError, match="2 of this rank's 2 are left"):
        loader.next(rows)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"global_batch": 3, "world_size": 2},
        {"global_batch": 0},
        {"rank": 2, "world_size": 2, "global_batch": 2},
        {"rank": -1},
        {"world_size": 0},
        {"seed": -1},
        {"order": "random"},
    ],
)
def test_impossible_settings_are_refused(dataset, kwargs):
    with pytest.raises(ValueError, match=r"."):
        make(dataset([1000]), **kwargs)


def test_a_sample_beyond_the_stream_is_refused(dataset, backend):
    for first in (-1, 2**62 - 1, 2**64):
        with pytest.raises(ValueError, match=r"samples"):
            make(dataset([1000]), backend).read(first, 2)


def test_a_corpus_shorter_than_the_context_is_refused(dataset):
    with pytest.raises(DataError, match="16 tokens, where one window needs 17"):
        make(dataset([9, 7]))


def test_a_state_of_another_stream_is_refused_field_by_field(dataset, tmp_path):
    state = make(dataset([1000])).state_dict()
    with pytest.raises(DataError, match=r"seed is 4, .* has 3; seq_len is 8, .* has 16"):
        make(tmp_path, seq_len=8, seed=4).load_state_dict(state)
    other = make(dataset([500, 500]))
    with pytest.raises(DataError, match="fingerprint") as caught:
        other.load_state_dict(state)
    assert "seed" not in str(caught.value)
    assert other.position == 0


@pytest.mark.parametrize("sample", [None, -1, 1.5, True, "7", 2**62])
def test_a_state_without_a_position_is_refused(dataset, sample):
    loader = make(dataset([1000]))
    with pytest.raises(DataError, match="global_sample"):
        loader.load_state_dict({**loader.state_dict(), "global_sample": sample})


def test_a_token_outside_the_vocabulary_is_named(dataset, backend):
    folder = dataset([500, 500])
    many = 100 * (1000 // 16)  # the last token is read only in epochs of the last phase
    assert make(folder, backend, vocab_size=1000).read(0, many)
    with pytest.raises(DataError, match=r"token 499 of train/shard_00001\.bin .* id 999") as caught:
        make(folder, backend, vocab_size=999).read(0, many)
    assert "vocab_size is 999" in str(caught.value)


def test_after_a_refused_token_the_position_is_unchanged(dataset, backend):
    loader = make(dataset([500]), backend, vocab_size=1)
    with pytest.raises(DataError):
        loader.next(1)
    assert loader.position == 0


@pytest.mark.parametrize("high", [300, 70_000])
def test_tokens_in_memory_are_a_corpus(backend, high):
    tokens = list(range(high - 300, high))
    corpus = TokenCorpus.from_tokens(tokens, backend)
    del tokens
    loader = TokenLoader(corpus, 16, seed=0)
    corpus.close()  # the loader keeps what it needs
    x, y = loader.read(0, 100)
    assert follows(x, y)
    assert x.min() >= high - 300
    assert corpus.n_tokens == 300


def test_the_fingerprint_of_tokens_in_memory_is_their_content(native):
    same = {
        TokenCorpus.from_tokens(tokens, backend).fingerprint
        for tokens in ([1, 2, 3], np.array([1, 2, 3], np.int32))
        for backend in ("native", "numpy")
    }
    assert len(same) == 1
    assert same != {TokenCorpus.from_tokens([1, 2, 4]).fingerprint}


@pytest.mark.parametrize("tokens", [[-1, 2], [1 << 32], [0.5], [[1, 2]]])
def test_values_that_are_no_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="token"):
        TokenCorpus.from_tokens(tokens)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is one of auto, native, numpy"):
        TokenCorpus.from_tokens([1, 2, 3], "rust")


def without_native(monkeypatch):
    """Make importing the extension fail, as in an installation without it."""
    import sys

    import mypt_fast

    monkeypatch.setitem(sys.modules, "mypt_fast._native", None)
    monkeypatch.delattr(mypt_fast, "_native", raising=False)


def test_auto_falls_back_and_says_so(monkeypatch):
    without_native(monkeypatch)
    corpus = TokenCorpus.from_tokens(range(100))
    assert corpus.backend == "numpy"
    assert "cannot be imported" in corpus.backend_note
    assert follows(*TokenLoader(corpus, 16, seed=0).next(1))


def test_native_on_request_does_not_fall_back(monkeypatch):
    without_native(monkeypatch)
    with pytest.raises(DataError, match=r"backend native; .*install again"):
        TokenCorpus.from_tokens(range(100), "native")


def test_an_extension_of_another_algorithm_is_not_used(native, monkeypatch):
    monkeypatch.setattr(native, "ORDER_ALGORITHMS", {"epoch": "feistel6/v0"})
    assert "built from other sources" in TokenCorpus.from_tokens([1, 2, 3]).backend_note


def test_auto_names_the_native_kernel(native):
    corpus = TokenCorpus.from_tokens([1, 2, 3])
    assert corpus.backend == "native"
    assert corpus.backend_note == f"data loader: native ({native.best_kernel()})"


def test_closed_things_say_so(dataset, backend):
    with make(dataset([1000]), backend) as loader:
        loader.next(1)
    with pytest.raises(ValueError, match="loader is closed"):
        loader.next(1)
    corpus = TokenCorpus.from_dataset(dataset([1000]), "train", backend)
    corpus.close()
    with pytest.raises(ValueError, match="is closed"):
        TokenLoader(corpus, 16, seed=0)


def test_torch_tensors_are_filled_through_their_numpy_views(dataset, backend):
    torch = pytest.importorskip("torch")
    x, y = (torch.zeros(2, 16, dtype=torch.int64) for _ in range(2))
    make(dataset([1000]), backend).read(0, 2, x.numpy(), y.numpy())
    assert torch.equal(x + 1, y)
