"""`mypt-fast params`: numbers that are those of the model itself."""

import io
import json
import sys

import pytest

from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.model import GPT

SMALL = {"n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 8, "vocab_size": 32}
OPTIONS = [
    {},
    {"bias": True},
    {"tie_weights": True, "pos_encoding": "rope"},
    {"mlp_type": "swiglu", "norm_type": "rmsnorm"},
]


def words_of(settings) -> list[str]:
    return [word for k, v in settings.items() for word in (f"--{k}", str(v))]


def report(capsys, *words: str):
    assert main(["params", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_part_is_the_models_own_count(capsys, options) -> None:
    found = report(capsys, *words_of({**SMALL, **options}))["parameters"]
    model = GPT(ModelConfig(**SMALL, **options), seed=None)

    def count(*names: str) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if any(w in n for w in names))

    assert found["total"] == sum(p.numel() for p in model.parameters())
    assert found["token_embedding"] == count("token_embedding")
    assert found["position_embedding"] == count("position_embedding")
    assert found["attention"] == count(".sa.")
    assert found["mlp"] == count(".fwd.")
    assert found["norms"] == count("ln")
    assert found["lm_head"] == count("lm_head")


def test_bytes_and_flops_follow(capsys) -> None:
    found = report(capsys, *words_of(SMALL))
    n, state, disk = (found[k] for k in ("parameters", "training_bytes", "checkpoint_bytes"))
    total = n["total"]
    assert list(state.values()) == [4 * total, 4 * total, 8 * total, 16 * total]
    assert disk["total"] == 12 * total
    matmuls = n["attention"] + n["mlp"] + 32 * 16
    assert found["flops_per_token"] == 6 * matmuls + 6 * 2 * 16 * 8


def test_a_preset_and_the_text(capsys) -> None:
    assert main(["params", "--config_file", "configs/500M_1024.json"]) == 0
    out = capsys.readouterr().out
    assert "602,277,504" in out
    assert "GPT-500M-1024" in out
    assert "16 heads of 80" in out
    assert "9.0 GiB" in out


def test_a_flag_changes_a_presets_number_and_says_so(capsys) -> None:
    words = ["--config", "tiny", "--n_layer", "8", "--tie_weights"]
    assert main(["params", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["config"]["n_layer"] == 8
    assert "--n_layer 8 instead of 4" in err
    assert "--tie_weights True instead of False" in err


def test_interactive_takes_answers_and_keeps_what_is_left_empty(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n16\n2\n\n32\n"))
    assert main(["params", "--interactive", "--json"]) == 0
    out, err = capsys.readouterr()
    config = json.loads(out)["config"]
    assert (config["n_layer"], config["n_embd"], config["block_size"]) == (2, 16, 256)
    assert "block_size [256]: " in err


def test_the_formula_stands_alone_or_before_numbers(capsys) -> None:
    assert main(["params", "--show_formula"]) == 0
    alone = capsys.readouterr().out
    assert "L (8 C^2 + 5 C)" in alone
    assert main(["params", "--show_formula", "--config", "tiny"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(alone)
    assert "21,168,384" in both


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to count"),
        (["--n_embd", "10", "--n_head", "3"], "divisible"),
        (["--n_layer", "0"], "out of range"),
        (["--config", "tinny"], "the nearest preset is 'tiny'"),
        (["--n_layers", "3"], "--n_layer"),
    ],
)
def test_mistakes_are_one_line(capsys, words, said) -> None:
    assert main(["params", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


BAD_ANSWERS = [
    ("", "no answer"), ("six\n", "'six'"), ("-1\n", "out of range"), ("--5\n", "'--5'"),
    ("\u00b2\n", "'\u00b2'"), ("9" * 5000 + "\n", "whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), BAD_ANSWERS)
def test_bad_answers_are_named(capsys, monkeypatch, typed, said) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed + "\n" * 4 if typed else ""))
    assert main(["params", "--interactive"]) == 2
    assert said in capsys.readouterr().err


def test_questions_without_anyone_to_answer_are_one_line(capsys, monkeypatch) -> None:
    for stdin in (None, io.StringIO("")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["params", "--interactive"]) == 2
        assert "--interactive: no answer; input ended at n_layer" in capsys.readouterr().err
