"""`core.data_loader` against the calls of specification 8.3, on the global generators."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mypt_fast.core.data_loader import GPTDataLoader
from mypt_fast.errors import IntegrityError
from tests.data.shard_files import describe, native_bytes, write_file

SIZES = [400, 30, 90]


def config(block=16, batch=6):
    return SimpleNamespace(block_size=block, batch_size=batch, device="cpu", vocab_size=50304)


class Letters:
    """A tokenizer: one id per character."""

    def encode(self, text):
        return [ord(c) % 97 for c in text]


@pytest.fixture(autouse=True)
def same_generators():
    """Leave the global generators as they were."""
    before = np.random.get_state(), torch.get_rng_state(), random.getstate()
    yield
    np.random.set_state(before[0])
    torch.set_rng_state(before[1])
    random.setstate(before[2])


def tokens_of(number, size):
    return np.random.RandomState(number).randint(0, 50000, size=size)


def stream_dataset(folder, sizes=SIZES, dtype="<u4", splits=("train", "val")):
    for split in splits:
        (folder / split).mkdir(parents=True)
        for k, size in enumerate(sizes):
            tokens_of(k, size).astype(dtype).tofile(folder / split / f"shard_{k:05d}.bin")
    return folder


def upstream_batch(shards, block, B):
    """Specification 8.3, word by word."""
    np.random.randint(0, len(shards))
    while True:
        data = shards[np.random.randint(0, len(shards))]
        max_start = len(data) - block - 1
        if max_start > 0:
            break
    starts = np.random.randint(0, max_start, size=B)
    x = np.stack([data[i : i + block] for i in starts])
    y = np.stack([data[i + 1 : i + 1 + block] for i in starts])
    return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))


def equal(batch, other):
    assert len(batch) == len(other)
    for a, b in zip(batch, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_sharded_batches_are_those_of_the_global_numpy_generator(tmp_path):
    loader = GPTDataLoader(config(), None, str(stream_dataset(tmp_path)))
    shards = [tokens_of(k, size) for k, size in enumerate(SIZES)]
    np.random.seed(77)
    theirs = [upstream_batch(shards, 16, 6) for _ in range(40)] + [np.random.randint(0, 1 << 30)]
    np.random.seed(77)
    for k in range(40):  # both splits draw from one generator
        equal(loader.get_batch("train" if k % 3 else "val"), theirs[k])
    assert np.random.randint(0, 1 << 30) == theirs[-1]  # not a word more was used
    x, _ = theirs[0]
    assert x.shape == (6, 16)
    assert x.dtype == torch.int64


def test_batches_of_a_text_are_those_of_the_global_torch_generator():
    loader = GPTDataLoader(config(8, 5), Letters())
    text = "the quick brown fox jumps over the lazy dog " * 9
    loader.prepare_data(text)
    data = torch.tensor(Letters().encode(text))
    n = int(0.9 * len(data))
    assert torch.equal(loader.train_data, data[:n])
    assert torch.equal(loader.val_data, data[n:])
    assert loader.train_data.dtype == torch.int64
    for split, part in (("train", data[:n]), ("val", data[n:])):
        torch.manual_seed(3)
        starts = torch.randint(len(part) - 8, (5,))
        torch.manual_seed(3)
        x, y = loader.get_batch(split)
        assert torch.equal(x, torch.stack([part[i : i + 8] for i in starts]))
        assert torch.equal(y, torch.stack([part[i + 1 : i + 9] for i in starts]))


def test_attributes_and_defaults(tmp_path):
    loader = GPTDataLoader(config(), "tok")
    assert (loader.tokenizer, loader.dataset_dir, loader.use_shards) == ("tok", None, False)
    assert (loader.use_loss_mask, loader.eval_only, loader.shard_cache) == (False, False, {})
    for name in ("train_data", "val_data", "train_mask", "val_mask"):
        assert getattr(loader, name) is None
    for name in ("train_shards", "val_shards", "train_mask_shards", "val_mask_shards"):
        assert getattr(loader, name) == []
    loader = GPTDataLoader(config(), None, stream_dataset(tmp_path))
    assert loader.use_shards
    assert loader.train_shards == sorted(str(p) for p in (tmp_path / "train").iterdir())
    assert len(loader.val_shards) == 3
    (tmp_path / "text.txt").write_text("Grüße", "utf-8")
    assert GPTDataLoader.read_text(tmp_path / "text.txt") == "Grüße"


def test_what_is_missing_has_the_names_that_mypt_gives_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        GPTDataLoader(config(), None, tmp_path / "nothing")
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="train split"):
        GPTDataLoader(config(), None, tmp_path)
    stream_dataset(tmp_path / "no_val", splits=("train",))
    GPTDataLoader(config(), None, tmp_path / "no_val").get_batch("train")
    with pytest.raises(ValueError, match="no such split"):
        GPTDataLoader(config(), None, tmp_path / "no_val").get_batch("val")
    with pytest.raises(FileNotFoundError, match="val split"):
        GPTDataLoader(config(), None, tmp_path / "no_val", eval_only=True)
    with pytest.raises(ValueError, match="call prepare_data"):
        GPTDataLoader(config(), Letters()).get_batch()
    with pytest.raises(ValueError, match="0 of 0 tokens"):
        GPTDataLoader(config(), Letters()).prepare_data("")
    loader = GPTDataLoader(config(), Letters())
    loader.prepare_data("x" * 30)
    with pytest.raises(ValueError, match="3 tokens, where one window needs 17"):
        loader.get_batch("val")


def test_eval_only_opens_val_or_the_files_of_the_folder_itself(tmp_path):
    loader = GPTDataLoader(config(), None, stream_dataset(tmp_path / "a"), eval_only=True)
    assert loader.train_shards == []
    loader.get_batch("val")
    (tmp_path / "b").mkdir()
    tokens_of(0, 100).astype("<u4").tofile(tmp_path / "b/part.bin")
    loader = GPTDataLoader(config(), None, tmp_path / "b", eval_only=True)
    assert loader.val_shards == [str(tmp_path / "b/part.bin")]
    np.random.seed(1)
    expected = upstream_batch([tokens_of(0, 100)], 16, 6)
    np.random.seed(1)
    equal(loader.get_batch("val"), expected)


def test_a_short_shard_is_drawn_and_only_strict_compat_gives_short_batches(tmp_path, monkeypatch):
    loader = GPTDataLoader(config(16, 8), None, stream_dataset(tmp_path, [20]))
    np.random.seed(5)
    np.random.randint(0, 1), np.random.randint(0, 1)
    starts = np.random.randint(0, 3, size=8)
    np.random.seed(5)
    x, _ = loader.get_batch()
    assert x[:, 0].tolist() == tokens_of(0, 20)[starts].tolist()
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "true")  # anything but 0, as everywhere
    for _ in range(2):
        x, y = loader.get_batch()
        assert x[:, 0].tolist() == tokens_of(0, 20)[:3].tolist()
        assert y.shape == (3, 16)


@pytest.mark.parametrize("strict", ["0", "1"])
def test_where_mypt_would_never_come_back_an_error_says_so(tmp_path, monkeypatch, strict):
    monkeypatch.setenv("MYPT_STRICT_COMPAT", strict)
    loader = GPTDataLoader(config(16, 8), None, stream_dataset(tmp_path, [17, 5]))
    with pytest.raises(ValueError, match="the longest has 17 tokens, where one needs 18"):
        loader.get_batch()


@pytest.mark.parametrize("said", [True, False])
def test_files_of_16_bits_give_the_same_batches(tmp_path, said):
    wide = GPTDataLoader(config(), None, stream_dataset(tmp_path / "wide"))
    folder = stream_dataset(tmp_path / "narrow", dtype="<u2")
    if said:
        describe(folder, dtype="uint16")
    narrow = GPTDataLoader(config(), None, folder)
    for _ in range(5):
        state = np.random.get_state()
        expected = wide.get_batch()
        np.random.set_state(state)
        equal(narrow.get_batch(), expected)


def test_native_shards_and_their_masks(tmp_path):
    tokens, mask = tokens_of(1, 300), np.arange(300) % 3 == 0
    for split in ("train", "val"):
        data = native_bytes(tokens, [300], mask=mask.astype(int))
        write_file(tmp_path / split / "shard_00000.bin", data)
    np.random.seed(9)
    expected = upstream_batch([tokens], 16, 6)
    np.random.seed(9)
    x, y, m = GPTDataLoader(config(), None, tmp_path, use_loss_mask=True).get_batch()
    equal((x, y), expected)
    where = {tuple(tokens[i : i + 16]): i for i in range(284)}
    for row in range(6):
        start = where[tuple(x[row].tolist())]
        assert m[row].tolist() == mask[start + 1 : start + 17].tolist()


@pytest.mark.parametrize("width", ["<u4", "u1"])
def test_mask_files_beside_the_shards_are_aligned_to_the_targets(tmp_path, width):
    folder = stream_dataset(tmp_path)
    for split in ("train", "val"):
        for k, size in enumerate(SIZES):
            mask = (tokens_of(k, size) % 2).astype(width)
            mask.tofile(folder / split / f"shard_{k:05d}_mask.bin")
    plain = GPTDataLoader(config(), None, folder)
    assert len(plain.train_shards) == len(plain.train_mask_shards) == 3
    assert len(plain.get_batch()) == 2
    _, y, mask = GPTDataLoader(config(), None, folder, use_loss_mask=True).get_batch()
    assert mask.dtype == torch.int64
    assert torch.equal(mask, y % 2)
    np.zeros(7, width).tofile(folder / "train/shard_00000_mask.bin")
    loader = GPTDataLoader(config(380), None, folder, use_loss_mask=True)
    with pytest.raises(IntegrityError, match=r"shard_00000_mask.bin.*has 400 tokens"):
        loader.get_batch()


def test_evaluation_batches_leave_the_generators_and_the_count_alone(tmp_path):
    loader = GPTDataLoader(config(), None, stream_dataset(tmp_path))
    np.random.seed(4)
    plain = [loader.get_batch("val") for _ in range(3)]
    np.random.seed(11)
    train = [loader.get_batch() for _ in range(4)]
    np.random.seed(11)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    state = loader.state_dict()
    for k in range(4):
        found = []
        for batch in loader.eval_batches("val", 3, seed=4):
            np.random.rand(3), torch.rand(2)  # what a script does meanwhile
            found.append(batch)
            np.random.seed(11)
            for _ in range(k):
                loader.get_batch()
        for a, b in zip(found, plain, strict=True):
            equal(a, b)
        equal(loader.get_batch(), train[k])
    torch.manual_seed(8)
    assert torch.equal(torch.get_rng_state(), before)
    assert state["batches"] == {"train": 4, "val": 3}


def test_evaluation_without_a_seed_begins_where_the_generators_are(tmp_path):
    loader = GPTDataLoader(config(), None, stream_dataset(tmp_path))
    np.random.seed(4)
    ahead = list(loader.eval_batches("train", 3))
    for batch in ahead:
        equal(loader.get_batch("train"), batch)
    assert loader.state_dict()["batches"] == {"train": 3, "val": 0}


def test_state_goes_round_and_another_loaders_is_refused(tmp_path):
    loader = GPTDataLoader(config(), None, stream_dataset(tmp_path))
    loader.get_batch()
    other = GPTDataLoader(config(), None, tmp_path)
    other.load_state_dict(loader.state_dict())
    assert other.state_dict() == loader.state_dict()
    with pytest.raises(ValueError, match="state of a loader"):
        other.load_state_dict({"version": 1, "kind": "episodes"})


def test_metadata_that_only_reports_is_not_believed(tmp_path):
    folder = describe(stream_dataset(tmp_path), total_tokens=5, train_shards=99, num_train_tokens=1)
    GPTDataLoader(config(), None, folder).get_batch()
    GPTDataLoader(config(), None, describe(folder, format="stream", shards=3)).get_batch()
    describe(folder, shards=[{"name": "train/shard_00000.bin", "tokens": 399}])
    with pytest.raises(IntegrityError, match="does not list"):  # a list of files is believed
        GPTDataLoader(config(), None, folder)
    (folder / "dataset_metadata.json").write_text('{"total_tokens": 5')
    with pytest.raises(IntegrityError, match="not JSON"):
        GPTDataLoader(config(), None, folder)
