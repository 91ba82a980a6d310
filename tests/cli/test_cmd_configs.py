"""`mypt-fast configs`: the table with true counts, one preset in full, validation."""

import json

import pytest

from mypt_fast.cli import main

# MyPT specification 3.4, column "true parameter count"
TRUE_COUNTS = {
    "tiny.json": 21_168_384,
    "tiny_char.json": 1_899_904,
    "small.json": 49_420_416,
    "small_char.json": 10_933_504,
    "150M.json": 190_872_192,
    "200M.json": 244_695_936,
    "250M.json": 304_811_136,
    "150M_1024.json": 191_462_016,
    "200M_1024.json": 245_384_064,
    "250M_1024.json": 305_597_568,
    "350M_1024.json": 406_334_592,
    "500M_1024.json": 602_277_504,
    "750M_1024.json": 835_969_152,
    "base/750M_unified_v1.json": 698_911_104,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run where there is no ./configs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, name: str, **changes) -> None:
    folder.mkdir(exist_ok=True)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "block_size": 8}
    (folder / name).write_text(json.dumps({"name": "Mine", **sizes, **changes}))


def test_counts_are_true(capsys) -> None:
    assert main(["configs", "--json"]) == 0
    rows = {r["file"]: r["total_params"] for r in json.loads(capsys.readouterr().out)}
    assert {k: rows.get(k) for k in TRUE_COUNTS} == TRUE_COUNTS


def test_the_table_has_the_promised_columns(capsys) -> None:
    assert main(["configs"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["Available Model Configurations", "=" * 70, ""]
    assert out[3].split() == ["File", "Name", "Params", "Layers", "Heads", "Embed"]
    assert set(out[4]) == {"-", " "}
    row = next(line.split() for line in out if line.startswith("150M.json"))
    assert row == ["150M.json", "GPT-150M", "190.87M", "16", "12", "768"]


def test_own_presets_are_listed_with_the_shipped_ones_and_win(elsewhere, capsys) -> None:
    write(elsewhere / "configs", "mine.json")
    write(elsewhere / "configs", "tiny.json")
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert "mine.json" in out
    assert "150M.json" in out
    assert "GPT-Tiny " not in out


def test_a_folder_lists_what_is_valid_and_names_the_rest(elsewhere, capsys) -> None:
    write(elsewhere / "c", "good.json")
    write(elsewhere / "c", "bad.json", n_layers=3)
    assert main(["configs", "--configs_dir", "c"]) == 0
    out, err = capsys.readouterr()
    assert "good.json" in out
    assert "150M.json" not in out
    assert "unknown key 'n_layers'" in err


def test_one_preset_has_the_promised_layout(capsys) -> None:
    assert main(["configs", "--config_file", "configs/150M.json"]) == 0
    out = capsys.readouterr().out
    rule = "=" * 70
    assert out.startswith(f"{rule}\nConfig: GPT-150M\nFile: configs/150M.json\n{rule}\n")
    assert "Architecture:\n  Layers      : 16\n  Heads       : 12\n  Embedding   : 768\n" in out
    assert "  Block size  : 256\n  Vocab size  : 50304\n  Dropout     : 0.2\n" in out
    assert "  Bias        : False\n" in out
    assert "Parameters:\n  Total       : 190,872,192 (190.87M)\n  Batch size  : 32\n" in out
    assert "Usage:\n  mypt-fast train --config_file configs/150M.json" in out
    assert out.endswith(f"{rule}\n")


def test_validate_every_shipped_preset(capsys) -> None:
    assert main(["configs", "--validate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= len(TRUE_COUNTS)
    assert all(line.startswith("ok   ") for line in lines)


def test_validate_gives_each_file_one_line_and_exits_2_for_a_bad_one(elsewhere, capsys) -> None:
    write(elsewhere / "c", "good.json")
    write(elsewhere / "c", "heads.json", n_head=3)
    (elsewhere / "c" / "cut.json").write_text('{"n_layer": 2,')
    files = ["c/good.json", "c/heads.json", "c/cut.json", "c/none.json"]
    assert main(["configs", "--validate", *files]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line[:3] for line in lines] == ["ok ", "bad", "bad", "bad"]
    assert "n_embd must be divisible by n_head" in lines[1]
    assert "not valid JSON" in lines[2]
    assert "3 of 4" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["--config_file", "150"], ["--configs_dir", "nowhere"], ["--configs_dir", "."]]
)
def test_mistakes_are_one_line(words, capsys) -> None:
    assert main(["configs", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
