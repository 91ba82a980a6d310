import json
import os
from pathlib import Path

import pytest

from mypt_fast import presets
from mypt_fast.config import ModelConfig
from mypt_fast.errors import ConfigError

# Seed 002's own blocks: layers, heads, width, context, batch, vocabulary.
SEED_002 = {
    "tiny": ("GPT-Tiny", 4, 4, 192, 128, 16, 50304),
    "tiny_char": ("GPT-Tiny-Char", 4, 4, 192, 128, 16, 256),
    "small": ("GPT-Small", 6, 6, 384, 256, 32, 50304),
    "small_char": ("GPT-Small-Char", 6, 6, 384, 256, 32, 256),
    "150M": ("GPT-150M", 16, 12, 768, 256, 32, 50304),
    "200M": ("GPT-200M", 16, 14, 896, 256, 32, 50304),
    "250M": ("GPT-250M", 16, 16, 1024, 256, 32, 50304),
    "150M_1024": ("GPT-150M-1024", 16, 12, 768, 1024, 24, 50304),
    "200M_1024": ("GPT-200M-1024", 16, 14, 896, 1024, 20, 50304),
    "250M_1024": ("GPT-250M-1024", 16, 16, 1024, 1024, 16, 50304),
    "350M_1024": ("GPT-350M-1024", 24, 16, 1024, 1024, 12, 50304),
    "500M_1024": ("GPT-500M-1024", 24, 16, 1280, 1024, 8, 50304),
}
LARGER = ("400M_1024", "750M_1024", "1B_1024", "1.3B_1024")
TWINNED = sorted({n for n in (*SEED_002, *LARGER) if n.endswith("_1024")})
LLAMA = {"pos_encoding": "rope", "mlp_type": "swiglu", "norm_type": "rmsnorm", "tie_weights": True}
SHIPPED = [p.relative_to(presets.shipped_dir()).as_posix() for p in presets.shipped()]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory without a configs folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SEED_002)
def test_a_preset_of_seed_002_has_exactly_its_numbers(name, elsewhere):
    preset, model = presets.load(name), presets.load(name).model
    found = (model.n_layer, model.n_head, model.n_embd, model.block_size, model.batch_size)
    assert (preset.name, *found, model.vocab_size) == SEED_002[name]
    # without an option the seed never heard of, and without training settings
    display_and_seed = {"name", "description", "dropout", "bias", "vocab_size"}
    assert preset.given == display_and_seed | {
        "n_layer", "n_head", "n_embd", "block_size", "batch_size",
    }  # fmt: skip
    assert model.bias is False


def test_the_seeds_printed_dropout_of_150m_is_kept(elsewhere):
    assert presets.load("150M").model.dropout == 0.2


def test_the_shipped_presets_are_those_the_design_names():
    wanted = {*SEED_002, *LARGER, *(f"{n}_llama" for n in TWINNED), "base/750M_unified_v1"}
    assert {f"{n}.json" for n in wanted} == set(SHIPPED)


@pytest.mark.parametrize("file", [f for f in SHIPPED if f.endswith("_llama.json")])
def test_a_llama_twin_differs_from_its_sibling_in_the_four_options_only(file, elsewhere):
    twin = presets.load(file).model
    plain = presets.load(file.replace("_llama", "")).model
    assert twin.to_dict() == {**plain.to_dict(), **LLAMA, "rope_theta": 10000.0}


@pytest.mark.parametrize("file", SHIPPED)
def test_a_shipped_preset_passes_its_own_checks_and_is_a_page(file, elsewhere):
    preset = presets.load(file)
    assert preset.name.startswith("GPT-")
    assert preset.description
    assert len(preset.path.read_text().splitlines()) <= 60


def test_no_two_presets_share_a_name():
    names = [presets.load(path).name for path in presets.shipped()]
    assert len(names) == len(set(names))


def test_750m_unified_is_mypts(elsewhere):
    """MyPT specification 3.4 and the training sections below it."""
    preset = presets.load("base/750M_unified_v1")
    assert preset.model == ModelConfig(
        batch_size=12, block_size=1024, vocab_size=50304, n_embd=1280, n_head=20, n_layer=32,
        dropout=0.1, rope_theta=10000.0, **LLAMA,
    )  # fmt: skip
    train = preset.train
    assert (train.learning_rate, train.max_iters, train.warmup_iters) == (1.5e-4, 75000, 3750)
    assert (train.eval_interval, train.eval_iters, train.grad_accum_steps) == (350, 200, 8)
    assert (train.eval_seed, train.grad_clip, train.amp_dtype) == (1337, 1.0, "bf16")
    assert list(train.eval_sets) == ["general", "domain", "code", "retrieval"]
    phases = [(p.name, p.until_iter) for p in train.curriculum.phases]
    assert phases == [("circuit_formation", 9125), ("balanced", None)]


@pytest.mark.parametrize(
    ("typed", "file"),
    [
        ("500M_1024", "500M_1024.json"),
        ("500M_1024.json", "500M_1024.json"),
        ("configs/500M_1024.json", "500M_1024.json"),
        ("configs/500M_1024", "500M_1024.json"),
        ("./configs/500M_1024.json", "500M_1024.json"),
        ("1.3B_1024", "1.3B_1024.json"),
        ("configs/1.3B_1024_llama", "1.3B_1024_llama.json"),
        ("base/750M_unified_v1", "base/750M_unified_v1.json"),
        ("configs/base/750M_unified_v1.json", "base/750M_unified_v1.json"),
    ],
)
def test_a_shipped_preset_is_found_from_anywhere(typed, file, elsewhere):
    assert presets.find(typed) == presets.shipped_dir() / file


def test_a_file_of_the_users_wins_over_a_shipped_one(elsewhere):
    mine = elsewhere / "configs/tiny.json"
    mine.parent.mkdir()
    mine.write_text('{"n_layer": 2}')
    assert presets.load("configs/tiny.json").model.n_layer == 2
    assert presets.load(str(mine)).model.n_layer == 2
    assert presets.load("tiny").model.n_layer == 4


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("tinny", "tiny"),
        ("Tiny", "tiny"),
        ("tiny.jsn", "tiny"),
        ("500M", "500M_1024"),
        ("configs/500M_1O24.json", "500M_1024"),
        ("1.3B", "1.3B_1024"),
        ("1.3B_1025", "1.3B_1024"),
        ("750M_unified_v1", "base/750M_unified_v1"),
        ("750M_unified_v2", "base/750M_unified_v1"),
    ],
)
def test_a_misspelt_preset_is_answered_with_the_nearest(typed, nearest, elsewhere):
    with pytest.raises(ConfigError, match=f"nearest preset is '{nearest}'$"):
        presets.find(typed)


@pytest.mark.parametrize(
    "typed",
    ["../configs/tiny", "configs/../tiny", "../../etc/passwd", "/tiny", "/nonexistent/tiny.json",
     "base", "configs", "configs/base", ".", "..", "/", "configs/", "x" * 300],
)  # fmt: skip
def test_no_path_leads_out_of_the_shipped_folder_and_a_folder_is_no_preset(typed, elsewhere):
    with pytest.raises(ConfigError) as error:
        presets.find(typed)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_folder_is_called_a_folder(elsewhere):
    with pytest.raises(ConfigError, match="it is a folder"):
        presets.find(str(elsewhere))


def test_a_preset_can_come_through_a_pipe():
    read, write = os.pipe()
    with os.fdopen(write, "w") as f:
        json.dump({"n_layer": 3}, f)
    try:
        assert presets.load(f"/dev/fd/{read}").model.n_layer == 3
    finally:
        os.close(read)


def test_an_unreadable_preset_is_reported_with_the_systems_reason(elsewhere):
    loop = elsewhere / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match=r"loop\.json"):
        presets.load(loop)
    with pytest.raises(ConfigError, match="No such file"):
        presets.read_json(Path("absent.json"))
