"""MyPT's episode datasets: both layouts and the one in between, and what is refused."""

import struct

import numpy as np
import pytest

from mypt_fast.data.format import dataset_fingerprint, has_split, open_split
from mypt_fast.data.format.verify import verify_dataset
from mypt_fast.errors import DataError, FormatError, IntegrityError, TruncatedShardError
from tests.data.shard_files import describe, write_episodes, write_file

TOKENS = np.arange(100)
SPANS = [(0, 30), (30, 1), (31, 69)]


def test_one_folder_a_split_is_read_with_all_that_lies_beside_the_tokens(tmp_path):
    mask, segments = TOKENS % 2, TOKENS % 7
    weights = TOKENS / 8
    write_episodes(tmp_path / "train", TOKENS, SPANS, mask=mask, weights=weights, segments=segments)
    (shard,) = open_split(tmp_path, "train")
    assert (shard.format, shard.name, shard.width, shard.n_tokens) == (
        "episodes", "train/tokens.bin", 4, 100,
    )  # fmt: skip
    assert shard.documents.count == 3
    assert shard.document_ends().tolist() == [30, 31, 100]
    assert shard.read_plane("mask").tolist() == mask.tolist()
    assert shard.read_plane("weights").tolist() == weights.tolist()
    assert shard.read_plane("segments").tolist() == segments.tolist()
    assert shard.notice == ""
    assert verify_dataset(tmp_path).tokens == 100


def test_planes_are_optional(tmp_path):
    write_episodes(tmp_path / "val", TOKENS, SPANS)
    assert open_split(tmp_path, "val")[0].planes == ()
    assert not has_split(tmp_path, "train")


def test_folders_of_shards_are_read_in_order(tmp_path):
    for i in (1, 0, 2):
        write_episodes(tmp_path / f"train/shard_{i:05d}", TOKENS[: 50 + i], [(0, 50)])
    shards = open_split(tmp_path, "train")
    assert [s.n_tokens for s in shards] == [50, 51, 52]
    assert shards[2].name == "train/shard_00002/tokens.bin"
    assert shards[2].document_ends().tolist() == [50, 52]  # what is left over ends by itself


def test_a_first_shard_beside_the_folders_is_read_first_and_said(tmp_path):
    write_episodes(tmp_path / "train", TOKENS[:20], [(0, 20)])
    write_episodes(tmp_path / "train/shard_00001", TOKENS, SPANS)
    shards = open_split(tmp_path, "train")
    assert [s.n_tokens for s in shards] == [20, 100]
    assert [s.name for s in shards] == ["train/tokens.bin", "train/shard_00001/tokens.bin"]
    assert "the first shard lies beside the shard_* folders" in shards[0].notice
    assert shards[1].notice == ""


def test_files_beside_the_folders_that_are_no_shard_are_not_read_and_said(tmp_path):
    write_episodes(tmp_path / "train", TOKENS[:20], [(0, 20)], mask=TOKENS[:20])
    (tmp_path / "train/episodes.idx").unlink()
    write_episodes(tmp_path / "train/shard_00000", TOKENS, SPANS)
    (shard,) = open_split(tmp_path, "train")
    assert shard.n_tokens == 100
    assert "mask.bin, tokens.bin beside" in shard.notice
    assert "not read, as in MyPT" in shard.notice


def test_a_damaged_shard_beside_the_folders_is_an_error_not_a_notice(tmp_path):
    write_episodes(tmp_path / "train", TOKENS[:20], [(0, 21)])
    write_episodes(tmp_path / "train/shard_00001", TOKENS, SPANS)
    with pytest.raises(FormatError, match="not within 20 tokens"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("missing", ["tokens.bin", "episodes.idx"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path, missing):
    write_episodes(tmp_path / "train/shard_00000", TOKENS, SPANS)
    write_episodes(tmp_path / "train/shard_00001", TOKENS, SPANS)
    (tmp_path / "train/shard_00001" / missing).unlink()
    with pytest.raises(DataError, match=rf"shard_00001/{missing}; cannot be read: No such file"):
        open_split(tmp_path, "train")


def test_tokens_with_masks_and_no_index_are_not_read_as_a_stream(tmp_path):
    write_episodes(tmp_path / "train", TOKENS, SPANS, mask=TOKENS % 2)
    (tmp_path / "train/episodes.idx").unlink()
    with pytest.raises(FormatError, match=r"tokens\.bin and mask\.bin without episodes\.idx"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("mask.bin", 99, r"mask .*mask\.bin; 99 bytes, where 100 tokens with 1 bytes each are 100"),
        ("mask.bin", 400, "400 bytes"),
        ("mask_weighted.bin", 100, r"weights .* 100 bytes, .* 4 bytes each are 400"),
        ("segment_ids.bin", 101, "segments .* 101 bytes"),
    ],
)
def test_a_plane_of_another_length_is_refused(tmp_path, name, size, match):
    write_episodes(tmp_path / "train", TOKENS, SPANS)
    write_file(tmp_path / "train" / name, bytes(size))
    with pytest.raises(FormatError, match=match):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        ([(0, 101)], "episode 0 has 101 tokens from token 0 on; not within 100 tokens"),
        ([(0, 10), (101, 0)], "episode 1 .* not within"),
        ([(0, 10), (9, 5)], "episode 1 has 5 tokens from token 9 on; the one before it ends at 10"),
        ([(50, 10), (0, 10)], "episode 1 .* ends at 60"),
        ([(1, (1 << 64) - 1)], "not within"),
        ([((1 << 64) - 1, 2)], "not within"),
    ],
)
def test_episodes_out_of_range_or_order_are_refused(tmp_path, spans, match):
    write_episodes(tmp_path / "train", TOKENS, spans)
    with pytest.raises(FormatError, match=match):
        open_split(tmp_path, "train")


def test_an_index_of_more_episodes_than_one_read_is_checked_to_its_end(tmp_path):
    n = 70_000
    spans = np.stack([np.arange(n), np.ones(n)], 1).astype("<u8")
    write_episodes(tmp_path / "train", np.zeros(n), spans)
    assert open_split(tmp_path, "train")[0].documents.count == n
    data = (tmp_path / "train/episodes.idx").read_bytes()
    (tmp_path / "train/episodes.idx").write_bytes(data[:-16] + struct.pack("<QQ", n - 2, 1))
    with pytest.raises(FormatError, match=f"episode {n - 1} .* ends at {n - 1}"):
        open_split(tmp_path, "train")
    edge = 1 << 16  # the first episode of the second read
    spans[edge] = edge - 1, 2
    spans.tofile(tmp_path / "train/episodes.idx")
    with pytest.raises(FormatError, match=f"episode {edge} .* ends at {edge}"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(("name", "size"), [("episodes.idx", 47), ("tokens.bin", 399)])
def test_a_file_that_was_cut_is_refused(tmp_path, name, size):
    write_episodes(tmp_path / "train", TOKENS, SPANS)
    path = tmp_path / "train" / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TruncatedShardError, match=f"{size} bytes is not a multiple"):
        open_split(tmp_path, "train")


def test_gaps_and_empty_episodes_leave_ascending_ends(tmp_path):
    write_episodes(tmp_path / "train", TOKENS, [(5, 10), (15, 0), (20, 0), (40, 10)])
    (shard,) = open_split(tmp_path, "train")
    assert shard.document_ends().tolist() == [5, 15, 20, 40, 50, 100]


def test_the_fingerprint_changes_with_index_and_masks(tmp_path):
    prints = set()
    for i, (spans, mask) in enumerate(
        [(SPANS, None), (SPANS[:2], None), (SPANS, TOKENS % 2), (SPANS, TOKENS % 3)]
    ):
        write_episodes(tmp_path / f"{i}/train", TOKENS, spans, mask=mask)
        prints.add(dataset_fingerprint(open_split(tmp_path / str(i), "train")))
    assert len(prints) == 4


def test_uint16_is_read_where_it_is_declared(tmp_path):
    write_episodes(tmp_path / "train", TOKENS, SPANS)
    with pytest.raises(IntegrityError, match="look like uint32"):
        open_split(describe(tmp_path, dtype="uint16"), "train")
    TOKENS.astype("<u2").tofile(tmp_path / "train/tokens.bin")
    assert open_split(tmp_path, "train")[0].width == 2


@pytest.mark.parametrize(
    ("plane", "value", "match"),
    [
        ("mask", 2, r"mask .*mask\.bin; 2 at position 77"),
        ("weights", np.nan, "weights .* nan at position 77"),
        ("weights", np.inf, "inf at position 77"),
        ("weights", -0.5, "-0.5 at position 77; a mask is 0 or 1, a weight is finite"),
    ],
)
def test_values_that_are_no_masks_are_found_by_a_full_verification(tmp_path, plane, value, match):
    values = np.ones(100, "<f4")
    write_episodes(tmp_path / "train", TOKENS, SPANS, **{plane: values})
    size = values.nbytes if plane == "weights" else 100
    assert verify_dataset(tmp_path).bytes_read == 400 + size
    values[77] = value
    write_episodes(tmp_path / "train", TOKENS, SPANS, **{plane: values})
    with pytest.raises(FormatError, match=match):
        verify_dataset(tmp_path)


def test_folders_come_in_the_order_of_their_numbers(tmp_path):
    for number, n in ((100_000, 3), (99_999, 2)):
        write_episodes(tmp_path / f"train/shard_{number}", range(n), [(0, n)])
    assert [shard.n_tokens for shard in open_split(tmp_path, "train")] == [2, 3]
