"""The card table, and what a user's own measurement adds to it."""

import json

import pytest

from mypt_fast.errors import ConfigError
from mypt_fast.planner import cards, ceiling


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("RTX 5060 Ti", "RTX 5060 Ti"),
        ("NVIDIA GeForce RTX 5060 Ti", "RTX 5060 Ti"),
        ("5060ti", "RTX 5060 Ti"),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
    ],
)
def test_a_card_is_found_by_what_drivers_and_people_call_it(said, name):
    assert cards.find(said).name == name


@pytest.mark.parametrize(
    ("said", "near"),
    [("RTX 5060 Tii", "RTX 5060 Ti"), ("RTX 4060 Ti 8GB", "RTX 4060 Ti"), ("4090 laptop", "4090")],
)
def test_another_card_is_refused_with_the_nearest(said, near):
    with pytest.raises(ConfigError, match=near):
        cards.find(said)


def test_every_card_has_sourced_ceilings_and_a_name_of_its_own():
    assert len({cards.plain(card.name) for card in cards.CARDS}) == len(cards.CARDS)
    for card in cards.CARDS:
        assert card.source.startswith(cards.DATA)
        assert "#" in card.source or "database.md" in card.source
        assert card.tflops["fp16"] > 0
        assert card.tflops.get("fp32", 0) < card.tflops["fp16"]
        assert cards.find(card.name) is card


def test_old_cards_train_in_fp16_and_new_ones_in_bf16():
    fp16 = {card.name for card in cards.CARDS if card.dtype == "fp16"}
    assert fp16 == {"T4", "V100", "V100S", "RTX 2080"}


def test_a_measurement_is_kept_for_its_device_alone(cache):
    assert ceiling.measured_ceiling("RTX 4090") is None
    path = ceiling.keep("NVIDIA GeForce RTX 4090", {"tflops": {"bf16": 160.0, "fp32": 50.0}})
    assert path.parent == cache / "mypt_fast"
    ceiling.keep("x86_64 CPU, 2 of 2 threads", {"tflops": {"fp32": 0.1}})
    assert ceiling.measured_ceiling("RTX 4090") == 160
    assert ceiling.measured_ceiling("NVIDIA GeForce RTX 4090", "fp32") == 50
    assert ceiling.measured_ceiling("RTX 4090", "fp16") is None
    assert ceiling.measured_ceiling("x86_64 CPU, 2 of 2 threads") == 0.1
    assert ceiling.measured_ceiling("x86_64 CPU, 1 of 2 threads") is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_ceiling_of_one_dtype_is_added_to_what_is_known():
    ceiling.keep("RTX 4090", {"tflops": {"bf16": 160.0}, "gb_per_s": 900.0})
    ceiling.add("RTX 4090", "fp16", 161.0, measured="2026-11-20")
    found = ceiling.measured("NVIDIA GeForce RTX 4090")
    assert found["tflops"] == {"bf16": 160.0, "fp16": 161.0}
    assert (found["gb_per_s"], found["measured"]) == (900.0, "2026-11-20")


def test_a_name_of_no_card_is_none_or_an_error_with_the_nearest():
    assert cards.known("NVIDIA GeForce RTX 4090") is cards.find("RTX 4090")
    assert cards.known("x86_64 CPU, 2 of 2 threads") is None
    assert cards.known("NVIDIA GeForce RTX 4090 Laptop GPU") is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"4090": 3}', '{"4090": {"tflops": [1]}}', "[" * 100_000,
     '{"4090": {"tflops": {"bf16": "x"}}}', '{"4090": {"tflops": {"bf16": -1}}}',
     '{"4090": {"tflops": {"bf16": NaN, "fp16": Infinity, "fp32": 1e-300}}}'],
)  # fmt: skip
def test_a_file_that_is_no_good_counts_as_no_measurement(text):
    path = ceiling.ceiling_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert ceiling.measured_ceiling("RTX 4090") is None
    ceiling.add("RTX 4090", "bf16", 1.0)
    assert ceiling.measured_ceiling("RTX 4090", "bf16") == 1
    assert json.loads(path.read_text())["4090"]["name"] == "RTX 4090"
