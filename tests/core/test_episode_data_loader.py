"""`core.episode_data_loader` against specification 8.2 and 8.3, written out again here."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from mypt_fast.core.episode_data_loader import GPTEpisodeDataLoader, is_episode_indexed_dataset
from mypt_fast.data.chat_prepare import ChatOptions, prepare_chat
from mypt_fast.tokenizer import Tokenizer
from tests.data.shard_files import describe, write_episodes

LENGTHS = [5, 1, 12, 7, 30, 9, 3, 17, 4, 11]
VALID = [i for i, n in enumerate(LENGTHS) if n >= 2]
PAD = 99


def config(block=8, batch=4, **more):
    return SimpleNamespace(block_size=block, batch_size=batch, device="cpu", **more)


def spans(lengths=LENGTHS):
    ends = np.cumsum(lengths)
    return np.stack([ends - lengths, lengths], axis=1)


def planes(n):
    return {"mask": np.arange(n) % 3 != 0, "segments": np.arange(n) // 4 % 3 + 1}


def dataset(folder, splits=("train", "val"), **more):
    n = sum(LENGTHS)
    for k, split in enumerate(splits):
        write_episodes(folder / split, np.arange(n) + 1000 * k, spans(), **more)
    return folder


def loader_of(folder, cfg=None, **more):
    return GPTEpisodeDataLoader(cfg or config(), None, str(folder), **{"pad_token_id": PAD, **more})


def expected_row(episode, T=8, base=0, mask=None, segments=None):
    """Tokens, targets, mask and segments of one episode by the words of 8.3."""
    start, length = map(int, spans()[episode])
    tokens = list(range(base + start, base + start + length))
    m = list(mask[start : start + length]) if mask is not None else []
    g = list(segments[start : start + length]) if segments is not None else []
    L = T + 1
    tokens, m, g = tokens[-L:], m[-L:], g[-L:]
    missing = L - len(tokens)
    tokens += [PAD] * missing
    m += [0] * (L - len(m))
    g += [0] * (L - len(g))
    return tokens[:-1], tokens[1:], m[1:], g[:-1]


def epoch_ids(count, seed=1337):
    ids, epoch, n = [], 0, len(VALID)
    while len(ids) < count:
        ids += np.random.RandomState(seed + epoch).permutation(n).tolist()
        epoch += 1
    return ids[:count]


def test_epochs_follow_each_other_inside_a_batch(tmp_path):
    loader = loader_of(dataset(tmp_path))
    ids = epoch_ids(40)
    for batch in range(10):
        x, y = loader.get_batch("train")
        for row, number in enumerate(ids[4 * batch : 4 * batch + 4]):
            a, b, _, _ = expected_row(VALID[number])
            assert (x[row].tolist(), y[row].tolist()) == (a, b)
    assert x.dtype == y.dtype == torch.int64
    assert len(set(ids[8:12])) < 4 or ids[9:18] != ids[:9]  # the ninth episode is the last


@pytest.mark.parametrize("size", [9, 25])
def test_a_batch_may_hold_a_whole_epoch_and_more(tmp_path, size):
    loader = loader_of(dataset(tmp_path), config(batch=size))
    ids = epoch_ids(3 * size)
    for batch in range(3):
        firsts = [expected_row(VALID[i])[0][0] for i in ids[size * batch : size * (batch + 1)]]
        assert loader.get_batch()[0][:, 0].tolist() == firsts


def test_masks_belong_to_targets_and_segments_to_inputs(tmp_path):
    n = sum(LENGTHS)
    beside = planes(n)
    loader = loader_of(dataset(tmp_path, **beside), config(use_loss_mask=True))
    for start in range(0, 36, 4):
        x, y, mask, segments = loader.get_batch("train")
        for row, number in enumerate(epoch_ids(36)[start : start + 4]):
            wanted = expected_row(VALID[number], mask=beside["mask"], segments=beside["segments"])
            assert [t[row].tolist() for t in (x, y, mask, segments)] == [
                list(map(int, part)) for part in wanted
            ]
    assert (mask.dtype, segments.dtype) == (torch.float32, torch.int64)


def test_weights_are_preferred_to_masks(tmp_path):
    n = sum(LENGTHS)
    weights = np.arange(n) / 4
    folder = dataset(tmp_path, mask=np.ones(n), weights=weights)
    _, y, mask = loader_of(folder, use_loss_mask=True).get_batch()
    real = y != PAD
    assert torch.equal(mask[real], y[real] / 4)
    assert mask[~real].sum() == 0


def test_random_mode_is_randint_of_a_generator_of_its_own(tmp_path):
    loader = loader_of(dataset(tmp_path), batch_sampling_mode="random", epoch_seed=5)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    for split, base in (("train", 0), ("val", 1000)):  # each split from the beginning
        theirs = np.random.RandomState(5)
        for _ in range(6):
            x, _ = loader.get_batch(split)
            for row, number in enumerate(theirs.randint(0, len(VALID), size=4)):
                assert x[row].tolist() == expected_row(VALID[number], base=base)[0]
    assert np.array_equal(np.random.get_state()[1], before)


def test_settings_come_from_the_config_and_arguments_win(tmp_path):
    cfg = config(
        use_loss_mask=True, batch_sampling_mode="random", epoch_shuffle=False, epoch_seed=3,
        episode_min_tokens=9, pad_token_id=7, epoch_drop_last=False,
    )  # fmt: skip
    folder = dataset(tmp_path, **planes(sum(LENGTHS)))
    loader = GPTEpisodeDataLoader(cfg, Tokenizer.gpt2(), folder)
    assert loader.pad_token_id == 50275  # not the config's
    assert loader.get_epoch_info("train")["episodes_total"] == 5
    assert (loader.epoch_seed, loader.batch_sampling_mode) == (3, "random")
    loader = GPTEpisodeDataLoader(
        cfg, None, folder, use_loss_mask=False, batch_sampling_mode="epoch", epoch_shuffle=False,
        pad_token_id=4, episode_min_tokens=2,
    )  # fmt: skip
    batch = loader.get_batch()
    assert len(batch) == 2
    assert batch[0][:, 0].tolist() == [expected_row(VALID[i])[0][0] for i in range(4)]


def test_the_pad_is_the_argument_the_turns_end_or_gpt2s_end_of_text(tmp_path):
    folder = dataset(tmp_path)
    assert GPTEpisodeDataLoader(config(), Tokenizer.gpt2(), folder).pad_token_id == 50275
    bare = SimpleNamespace(token_kind="gpt2", special_tokens={})
    assert GPTEpisodeDataLoader(config(), bare, folder).pad_token_id == 50256
    char = SimpleNamespace(token_kind="char", special_tokens={})
    with pytest.raises(ValueError, match="give pad_token_id"):
        GPTEpisodeDataLoader(config(), char, folder)


def test_position_is_told_reset_saved_and_restored(tmp_path):
    loader = loader_of(dataset(tmp_path))
    assert loader.get_epoch_info("train") == {
        "epoch": 0, "position": 0, "episodes_total": 9, "batches_per_epoch": 2,
        "episodes_seen_this_epoch": 0,
    }  # fmt: skip
    first = loader.get_batch()[0]
    assert loader.get_epoch_info("train")["position"] == 4
    loader.reset_epoch("train")
    assert torch.equal(loader.get_batch()[0], first)
    loader.get_batch(), loader.get_batch(), loader.get_batch("val")
    assert loader.get_epoch_info("train") == {
        "epoch": 1, "position": 3, "episodes_total": 9, "batches_per_epoch": 2,
        "episodes_seen_this_epoch": 3,
    }  # fmt: skip
    other = loader_of(tmp_path, config(batch=4))
    other.load_state_dict(loader.state_dict())
    for split in ("train", "val", "train"):
        assert torch.equal(other.get_batch(split)[0], loader.get_batch(split)[0])
    bigger = loader_of(tmp_path, config(batch=5))  # a position is not of a batch size
    bigger.load_state_dict(loader.state_dict())
    assert torch.equal(bigger.get_batch()[0][:4], loader.get_batch()[0])
    with pytest.raises(ValueError, match="state of a loader"):
        other.load_state_dict({"version": 1, "kind": "tokens"})


@pytest.mark.parametrize("mode", ["epoch", "random"])
def test_evaluation_batches_take_nothing_from_training(tmp_path, mode):
    loader = loader_of(dataset(tmp_path), batch_sampling_mode=mode)
    other = loader_of(tmp_path, batch_sampling_mode=mode)
    for _ in range(4):
        ahead = [b[0] for b in loader.eval_batches("train", 5)]
        assert len(ahead) == 5
        list(loader.eval_batches("val", 2))
        x = other.get_batch()[0]
        assert torch.equal(loader.get_batch()[0], x)
        assert torch.equal(ahead[0], x)
    assert loader.get_epoch_info("val")["position"] == 0
    first = next(iter(loader_of(tmp_path, batch_sampling_mode=mode).eval_batches("train", 1)))
    for _ in range(2):  # with a seed, the same ones each time
        assert torch.equal(next(iter(loader.eval_batches("train", 1, seed=3)))[0], first[0])


def test_both_layouts_and_the_first_shard_beside_the_folders(tmp_path):
    """MyPT's own writer leaves its first shard beside the others, and its loader misses it."""
    a, b = np.arange(20), np.arange(100, 130)
    write_episodes(tmp_path / "q9/train", a, [(0, 20)])
    write_episodes(tmp_path / "q9/train/shard_00001", b, [(0, 15), (15, 15)])
    with pytest.warns(UserWarning, match="first shard lies beside"):
        loader = loader_of(tmp_path / "q9")
    assert [s["tokens"][0] for s in loader._data["train"]["shards"]] == [0, 100]
    assert loader.get_epoch_info("train")["episodes_total"] == 3
    write_episodes(tmp_path / "all/train/shard_00000", a, [(0, 20)])
    write_episodes(tmp_path / "all/train/shard_00001", b, [(0, 15), (15, 15)])
    assert loader_of(tmp_path / "all").get_epoch_info()["episodes_total"] == 3
    assert is_episode_indexed_dataset(tmp_path / "q9")
    assert is_episode_indexed_dataset(str(tmp_path / "all"))


def test_what_is_an_episode_dataset(tmp_path):
    assert not is_episode_indexed_dataset(tmp_path / "nothing")
    assert not is_episode_indexed_dataset(tmp_path)
    write_episodes(tmp_path / "val", np.arange(20), [(0, 20)])
    assert is_episode_indexed_dataset(tmp_path)
    (tmp_path / "train").mkdir()  # train decides where it is there
    assert not is_episode_indexed_dataset(tmp_path)


def test_the_data_that_scripts_look_at(tmp_path):
    n = sum(LENGTHS)
    loader = loader_of(dataset(tmp_path, ("train",), **planes(n)), use_loss_mask=True)
    assert {split: data["loaded"] for split, data in loader._data.items()} == {
        "train": True, "val": False,
    }  # fmt: skip
    (shard,) = loader._data["train"]["shards"]
    assert set(shard) == {"tokens", "mask", "segment_ids", "episodes", "valid_ids", "path"}
    assert shard["episodes"].tolist() == spans().tolist()
    assert list(shard["valid_ids"]) == VALID
    assert len(shard["tokens"]) == len(shard["mask"]) == len(shard["segment_ids"]) == n
    assert shard["path"] == str(tmp_path / "train")
    for a, b in zip(loader.get_batch("val"), loader_of(tmp_path, use_loss_mask=True).get_batch(),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)  # no val split: train
    shard["mask"] = shard["mask"][:20]
    with pytest.raises(AssertionError, match=f"20 values, {n} tokens"):
        [loader.get_batch() for _ in range(3)]


@pytest.mark.parametrize("name", ["mask.bin", "mask_weighted.bin", "segment_ids.bin"])
def test_files_of_another_length_are_an_assertion_that_names_file_and_counts(tmp_path, name):
    dataset(tmp_path)
    (tmp_path / "train" / name).write_bytes(bytes(4 * 31))
    with pytest.raises(AssertionError, match=rf"train/{name}; 124 bytes, where 99 tokens"):
        loader_of(tmp_path, use_loss_mask=True)


def test_what_is_missing_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        loader_of(tmp_path / "nothing")
    dataset(tmp_path / "val_only", ("val",))
    with pytest.raises(FileNotFoundError, match=r"train split.*episodes\.idx"):
        loader_of(tmp_path / "val_only")
    assert loader_of(tmp_path / "val_only", eval_only=True).get_batch("val")[0][0, 0] >= 0
    with pytest.raises(ValueError, match="none has 31 tokens"):
        loader_of(dataset(tmp_path / "short"), episode_min_tokens=31)
    with pytest.raises(ValueError, match="epoch or random"):
        loader_of(tmp_path / "short", batch_sampling_mode="all")


def test_masks_that_are_not_there_are_switched_off_with_a_warning(tmp_path):
    folder = dataset(tmp_path, segments=np.ones(sum(LENGTHS)))
    with pytest.warns(UserWarning, match="use_loss_mask is off"):
        loader = loader_of(folder, use_loss_mask=True)
    assert not loader.use_loss_mask
    assert len(loader.get_batch()) == 2  # the segments go with them, as in MyPT


def test_mask_debug_says_how_many_targets_count(tmp_path, capsys):
    loader = loader_of(dataset(tmp_path, mask=np.ones(sum(LENGTHS))), use_loss_mask=True)
    loader.get_batch()
    assert capsys.readouterr().out == ""
    loader.enable_mask_debug(True)
    mask = loader.get_batch()[2]
    assert f"{int(mask.sum())} of {mask.numel()} targets" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["<u4", "<u2"])
@pytest.mark.parametrize("metadata", [{}, {"num_train_tokens": 3, "schema": "x"}])
def test_the_row_of_12_4_from_32_and_16_bits(tmp_path, dtype, metadata):
    """System prompt, one question, one answer, written as MyPT's own test does."""
    tokenizer = Tokenizer.gpt2()
    question, answer = tokenizer.encode("What is 2+2?"), tokenizer.encode("It is 4.")
    tokens = [50257, 1639, 389, 2011, 11571, 13, 50258, 50259, *question, 50260, 50261]
    mask = [0] * len(tokens) + [1] * (len(answer) + 2)
    tokens += [*answer, 50262, 50275]
    for split in ("train", "val"):
        folder = write_episodes(tmp_path / split, tokens, [(0, len(tokens))], mask=mask)
        np.array(tokens, dtype).tofile(folder / "tokens.bin")
    describe(tmp_path, **metadata)
    loader = GPTEpisodeDataLoader(config(64, 1, use_loss_mask=True), tokenizer, tmp_path)
    x, y, m = loader.get_batch("train")
    padded = tokens + [50275] * (65 - len(tokens))
    assert x[0, :8].tolist() == [50257, 1639, 389, 2011, 11571, 13, 50258, 50259]
    assert (x[0].tolist(), y[0].tolist()) == (padded[:-1], padded[1:])
    assert m[0].tolist() == mask[1:] + [0] * (65 - len(mask))
    assert (x.dtype, y.dtype, m.dtype) == (torch.int64, torch.int64, torch.float32)
    assert int(m.sum()) == len(answer) + 2


def test_prepared_conversations_open_packed_and_not(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = tmp_path / "talks.jsonl"
    rows.write_text("".join(json.dumps({"messages": talk, "n": n}) + "\n" for n in range(20)))
    whole = [50257, 1639, 389, 2011, 11571, 13, 50258, 50259, 17250, 50260, 50261, 15496, 0, 50262,
             50275]  # fmt: skip
    for name, pack in (("rows", None), ("packed", 32)):
        prepare_chat(ChatOptions(tmp_path / name, (str(rows),), pack_block_size=pack))
        loader = GPTEpisodeDataLoader(
            config(32, 2, use_loss_mask=True), Tokenizer.gpt2(), tmp_path / name
        )
        x, _, mask, *segments = loader.get_batch("val")
        assert x[0, :15].tolist() == whole
        assert mask[0, :15].tolist() == [0] * 10 + [1, 1, 2, 2, 0]
        assert is_episode_indexed_dataset(tmp_path / name)
        if pack:
            assert x[0, 15:30].tolist() == whole
            assert segments[0][0].tolist() == [1] * 15 + [2] * 15 + [0] * 2
        else:
            assert segments == []
            assert set(x[0, 15:].tolist()) == {50275}


def no_end(name):
    raise KeyError(name)


@pytest.mark.parametrize(
    ("tokenizer", "pad"),
    [
        (SimpleNamespace(get_special_token_id={"myPT_eot": 77}.__getitem__), 77),
        (SimpleNamespace(special_token_encoder={"<myPT_eot>": 77}), 77),
        (SimpleNamespace(special_tokens={"myPT_eot": np.int64(77)}), 77),
        (SimpleNamespace(get_special_token_id=no_end, special_tokens={}), 50256),
        (MagicMock(special_tokens={"myPT_eot": 77}), 77),
        (MagicMock(**{"get_special_token_id.return_value": 77}), 77),
    ],
)
def test_a_script_s_own_tokenizer_tells_its_end_in_any_of_mypt_s_ways(tmp_path, tokenizer, pad):
    loader = GPTEpisodeDataLoader(config(), tokenizer, dataset(tmp_path))
    assert loader.pad_token_id == pad
    assert type(loader.pad_token_id) is int
