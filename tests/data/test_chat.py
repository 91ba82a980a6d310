"""Conversations to tokens: vectors written out by hand, files, packing and what is refused."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mypt_fast.cli import main
from mypt_fast.data.chat import BadRowError, ChatSerializer
from mypt_fast.data.chat_files import EpisodeWriter
from mypt_fast.data.chat_prepare import ChatOptions, prepare_chat
from mypt_fast.data.format.verify import verify_dataset
from mypt_fast.tokenizer import Tokenizer

GPT2 = Tokenizer.gpt2()
SYS, SYS_, USER, USER_, ASSIST, ASSIST_ = range(50257, 50263)
CALL, CALL_ = 50267, 50268
THINK, THINK_, CITE, CITE_, EOT = 50271, 50272, 50273, 50274, 50275
MYPT = [1639, 389, 2011, 11571, 13]  # "You are MyPT."


def words(text):
    return GPT2.encode_ordinary(text)


def say(*pairs, **more):
    return {"messages": [{"role": r, "content": c} for r, c in pairs], **more}


def serialized(row, **more):
    episode = ChatSerializer(GPT2, **more).episode(row)
    assert len(episode.tokens) == len(episode.mask) == len(episode.weights)
    return episode


def test_a_conversation_by_hand():
    row = say(("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you"))
    episode = serialized(row)
    assert episode.tokens == [
        SYS, *MYPT, SYS_, USER, 17250, USER_, ASSIST, 15496, 0, ASSIST_,
        USER, 3886, 68, USER_, ASSIST, 6214, 345, ASSIST_, EOT,
    ]  # fmt: skip
    assert episode.mask == [0] * 11 + [1] * 3 + [0] * 5 + [1] * 4
    assert episode.weights == [0] * 11 + [1, 1, 2] + [0] * 5 + [1, 1, 2, 2]


def test_tags_inside_an_answer_weigh_more_and_in_a_question_nothing():
    answer = "<myPT_think>x</myPT_think><myPT_toolcall>f</myPT_toolcall><myPT_cite>1</myPT_cite>!"
    episode = serialized(say(("user", "<myPT_cite>a</myPT_cite>"), ("assistant", answer)))
    begin = episode.tokens.index(ASSIST) + 1
    assert episode.tokens[begin:] == [
        THINK, *words("x"), THINK_, CALL, *words("f"), CALL_, CITE, *words("1"), CITE_,
        *words("!"), ASSIST_, EOT,
    ]  # fmt: skip
    assert episode.weights[begin:] == [1.5, 1, 1.5, 2, 1, 2, 1.5, 1, 1.5, 1, 2, 2]
    assert sum(episode.weights[:begin]) == sum(episode.mask[:begin]) == 0


@pytest.mark.parametrize(("row", "prompt"), [
    (say(("user", "a"), ("assistant", "b"), system="Be brief."), "Be brief."),
    (say(("system", "Be brief."), ("user", "a"), ("assistant", "b")), "Be brief."),
    (say(("user", "a"), ("assistant", "b")), "You are MyPT."),
])  # fmt: skip
def test_where_the_system_prompt_comes_from(row, prompt):
    tokens = serialized(row).tokens
    assert tokens[: tokens.index(SYS_) + 1] == [SYS, *words(prompt), SYS_]
    assert tokens.count(SYS) == 1


def test_no_system_prompt_where_none_is_wanted():
    assert serialized(say(("user", "a"), ("assistant", "b")), system="").tokens[0] == USER


def test_a_replay_row_is_raw_text_and_learned_whole():
    episode = serialized({"_replay": True, "text": "plain text", "messages": "ignored"})
    assert episode.tokens == words("plain text")
    assert set(episode.mask) == {1}
    assert set(episode.weights) == {1.0}


@pytest.mark.parametrize(("row", "said"), [
    ([], "a JSON list"),
    ({"text": "no replay"}, "no list of messages"),
    ({"messages": []}, "no list of messages"),
    ({"messages": ["hi"]}, r"messages\[0\] is a JSON str"),
    (say(("user", "only")), "no message of the assistant"),
    (say(("robot", "x"), ("assistant", "y")), "role is 'robot'"),
    (say(("user", "x"), ("system", "y"), ("assistant", "z")), "which comes first"),
    (say(("system", "x"), ("assistant", "y"), system="z"), "another as the first"),
    (say(("user", ""), ("assistant", "y")), r"messages\[0\].content is empty"),
    (say(("user", None), ("assistant", "y")), "content is None"),
    (say(("user", "x</myPT_user>y"), ("assistant", "z")), "holds </myPT_user>"),
    (say(("user", "x"), ("assistant", "<myPT_eot>")), "holds <myPT_eot>"),
    ({"_replay": True, "text": 3}, "text of a _replay row is 3"),
])  # fmt: skip
def test_what_is_no_conversation(row, said):
    with pytest.raises(BadRowError, match=said):
        serialized(row)


def rows(n):
    return [say(("user", f"question {i}"), ("assistant", "word " * (i % 7 + 1))) for i in range(n)]


def write(path, content):
    text = "".join(json.dumps(row) + "\n" for row in content)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def prepare(*flags):
    return main(["prepare", "--out_dir", "out", "--chat", *map(str, flags)])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(split):
    folder = Path("out") / split
    files = {
        "tokens": ("tokens.bin", "<u4"), "mask": ("mask.bin", "u1"),
        "weights": ("mask_weighted.bin", "<f4"), "segments": ("segment_ids.bin", "u1"),
    }  # fmt: skip
    found = {
        key: np.fromfile(folder / name, dtype)
        for key, (name, dtype) in files.items()
        if (folder / name).exists()
    }
    found["spans"] = np.fromfile(folder / "episodes.idx", "<u8").reshape(-1, 2)
    return found


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.jsonl.gz"])
def test_files_hold_each_row_once_and_each_split_its_share(name, capsys):
    given = rows(40)
    assert prepare(write(Path(name), given), "--val_fraction", "0.2") == 0
    assert "train       32 conversations in 32 rows" in capsys.readouterr().out
    expected = {tuple(serialized(row).tokens): serialized(row) for row in given}
    counts = {}
    for split in ("train", "val"):
        data = read(split)
        counts[split] = len(data["spans"])
        for start, length in data["spans"].tolist():
            cut = slice(start, start + length)
            episode = expected.pop(tuple(data["tokens"][cut].tolist()))
            assert data["mask"][cut].tolist() == episode.mask
            assert data["weights"][cut].tolist() == episode.weights
        assert data["spans"].sum(axis=1)[-1] == len(data["tokens"])
    assert expected == {}
    assert counts == {"train": 32, "val": 8}
    metadata = json.loads(Path("out/dataset_metadata.json").read_text())
    assert metadata["schema"] == "episode_indexed_sft_v1"
    assert (metadata["num_train_episodes"], metadata["num_val_episodes"]) == (32, 8)
    assert metadata["num_train_tokens"] == len(read("train")["tokens"])
    assert json.loads(Path("out/tokenizer_state.json").read_text())["token_kind"] == "gpt2"
    lineage = json.loads(Path("out/dataset_lineage.json").read_text())["lineage"]
    assert lineage["flattened_contributions"] == [
        {"origin_path": name, "effective_rows": 40, "effective_percent": 100.0}
    ]
    assert lineage["direct_inputs"][0]["sampled_rows"] == 40
    verify_dataset(Path("out"))


def test_equal_rows_are_on_one_side():
    assert prepare(write(Path("a.jsonl"), rows(12) * 3), "--val_fraction", "0.3") == 0
    splits = []
    for split in ("train", "val"):
        data = read(split)
        splits.append({
            tuple(data["tokens"][a : a + n].tolist()) for a, n in data["spans"].tolist()
        })  # fmt: skip
    assert splits[0]
    assert splits[1]
    assert not splits[0] & splits[1]


def test_one_row_many_times_still_makes_two_splits_and_a_single_row_one():
    assert prepare(write(Path("a.jsonl"), rows(1) * 10)) == 0
    assert (len(read("train")["spans"]), len(read("val")["spans"])) == (9, 1)
    assert prepare(write(Path("b.jsonl"), rows(1)), "--overwrite") == 0
    assert len(read("train")["spans"]) == 1
    assert not Path("out/val").exists()


def test_packing_is_greedy_next_fit_and_never_splits():
    given = rows(30)
    assert prepare(write(Path("a.jsonl"), given), "--pack_block_size", 64, "--val_fraction", 0) == 0
    data = read("train")
    expected, row = [], []
    for episode in (serialized(r) for r in given):
        if sum(len(e.tokens) for e in row) + len(episode.tokens) > 64:
            expected.append(row)
            row = []
        row.append(episode)
    expected.append(row)
    assert len(expected) > 5
    assert data["spans"].tolist() == [[64 * i, 64] for i in range(len(expected))]
    for i, episodes in enumerate(expected):
        cut = slice(64 * i, 64 * (i + 1))
        missing = 64 - sum(len(e.tokens) for e in episodes)
        assert data["tokens"][cut].tolist() == [t for e in episodes for t in e.tokens] + (
            [EOT] * missing
        )
        assert data["mask"][cut].tolist() == [m for e in episodes for m in e.mask] + [0] * missing
        ids = [k for k, e in enumerate(episodes, 1) for _ in e.tokens] + [0] * missing
        assert data["segments"][cut].tolist() == ids
        assert (data["weights"][cut] > 0).tolist() == (data["mask"][cut] == 1).tolist()


def test_what_is_longer_than_a_packed_row_keeps_its_end(capsys):
    given = [say(("user", "q " * 50), ("assistant", "the end"))]
    assert prepare(write(Path("a.jsonl"), given), "--pack_block_size", 20) == 0
    assert read("train")["tokens"].tolist() == serialized(given[0]).tokens[-20:]
    assert "1 conversations longer than a packed row" in capsys.readouterr().out


def test_a_packed_row_has_no_more_segments_than_a_byte_tells_apart(tmp_path):
    writer, serializer = EpisodeWriter(tmp_path / "t", 4096, EOT), ChatSerializer(GPT2)
    for _ in range(300):
        writer.add(serializer.episode({"_replay": True, "text": "a"}))
    writer.close()
    segments = np.fromfile(tmp_path / "t/segment_ids.bin", "u1").reshape(-1, 4096)
    assert segments.max(axis=1).tolist() == [255, 45]


def test_a_bad_row_is_named_by_its_line_and_nothing_is_written(capsys):
    good = json.dumps(rows(1)[0])
    Path("a.jsonl").write_text(f"{good}\n\n{good}\n{{broken\n{good}\n")
    assert prepare("a.jsonl") == 2
    assert "a.jsonl line 4; not JSON" in capsys.readouterr().err
    assert os.listdir() == ["a.jsonl"]
    assert prepare("a.jsonl", "--skip_bad_rows", "--val_fraction", 0) == 0
    found = capsys.readouterr()
    assert "left out: a.jsonl line 4: not JSON" in found.err
    assert "1 bad rows left out" in found.out
    assert len(read("train")["spans"]) == 3


@pytest.mark.parametrize(("flags", "said"), [
    (["missing.jsonl"], "no such file"),
    (["empty.jsonl"], "no row"),
    (["a.jsonl", "--val_fraction", "1"], "a share from 0 to 1"),
    (["a.jsonl", "--pack_block_size", "1"], "2 tokens or more"),
    (["a.jsonl", "--tokenization", "char"], "another tokenization"),
    (["cut.jsonl.gz"], "copy the file again"),
    (["bytes.jsonl"], "bytes.jsonl line 1; not JSON"),
    (["deep.jsonl"], "deep.jsonl line 1; not JSON"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(flags, said, capsys):
    write(Path("a.jsonl"), rows(3))
    Path("empty.jsonl").write_text("\n\n")
    Path("bytes.jsonl").write_bytes(b"\xff\xfe{}\n")
    Path("deep.jsonl").write_text("[" * 200_000)
    Path("cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(4000))[:3000])
    before = sorted(os.listdir())
    assert prepare(*flags) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert sorted(os.listdir()) == before


def test_nothing_but_an_episode_dataset_is_replaced_and_that_only_when_asked(capsys):
    write(Path("a.jsonl"), rows(3))
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    assert prepare("a.jsonl", "--overwrite") == 2
    assert "no episode dataset" in capsys.readouterr().err
    assert os.listdir("out") == ["thesis.txt"]
    Path("out/thesis.txt").unlink()
    assert prepare("a.jsonl") == 0
    before = read("train")["tokens"].tolist()
    write(Path("a.jsonl"), rows(9))
    assert prepare("a.jsonl") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert read("train")["tokens"].tolist() == before
    assert prepare("a.jsonl", "--overwrite") == 0
    assert len(read("train")["tokens"]) > len(before)


def test_rows_that_are_left_out_are_of_neither_split(tmp_path, monkeypatch):
    """Whatever their hashes: the good rows are parted among themselves."""
    monkeypatch.chdir(tmp_path)
    good = [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant",
            "content": "b"}]} for n in range(2)]  # fmt: skip
    for bad in range(20):
        rows = [*map(json.dumps, good), *(f"no JSON {bad} {n}" for n in range(3))]
        Path("mixed.jsonl").write_text("\n".join(rows))
        options = ChatOptions("out", ("mixed.jsonl",), skip_bad_rows=True, overwrite=True)
        made = prepare_chat(options)
        assert (made["num_train_episodes"], made["num_val_episodes"]) == (1, 1)
        assert made["num_bad_rows"] == 3
