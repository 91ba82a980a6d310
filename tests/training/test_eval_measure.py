"""What evaluations measure, and that training never notices them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LETTERS, SMALL, events, write_dataset
from test_resume import assert_same_run, interrupt_at, projected

from mypt_fast.checkpoint import bundle
from mypt_fast.checkpoint.manifest import SEAL, seal
from mypt_fast.cli import main
from mypt_fast.config import ModelConfig, Saturation
from mypt_fast.data.document_loader import DocumentLoader
from mypt_fast.data.loader import TokenLoader
from mypt_fast.data.tokens import TokenCorpus
from mypt_fast.generate import generate
from mypt_fast.model import GPT
from mypt_fast.tokenizer import Tokenizer
from mypt_fast.training.eval_prompts import write_samples
from mypt_fast.training.evaluate import mean_loss, measure
from mypt_fast.training.journal import Journal
from mypt_fast.training.saturation import SaturationState, check, is_on

CPU = torch.device("cpu")
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}


def tiny(**more: object) -> GPT:
    cfg = {"vocab_size": 31, "block_size": 12, "n_embd": 16, "n_head": 2, "n_layer": 1, **more}
    return GPT(ModelConfig(**cfg), 1)


class Stored:
    """Loss weights beside tokens: every third is masked, some count twice."""

    def __init__(self, n: int) -> None:
        self.weights = np.resize(np.array([0, 1, 2, 0, 1, 1], np.float32), n)

    def read_weights(self, start: int, count: int) -> np.ndarray:
        return self.weights[start : start + count]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_accuracies_of_windows_are_those_by_hand(rows: int, masked: bool) -> None:
    tokens = np.random.default_rng(0).integers(31, size=200)
    corpus, model = TokenCorpus.from_tokens(tokens), tiny().train()
    stored = Stored(200)
    loader = (
        DocumentLoader(corpus, 12, np.array([200]), "mask", seed=2, weights=stored)
        if masked
        else TokenLoader(corpus, 12, seed=2)
    )
    found = measure(model, loader, 8, rows, CPU, per_window=True, accuracy=True)
    assert model.training
    losses, weights, hits, counted = [], [], 0.0, 0
    model.eval()
    for row in range(8):
        x, y, *more = loader.read(row, 1)
        weight = torch.from_numpy(more[0].loss_mask if more else np.ones((1, 12)))
        logits = model(torch.from_numpy(x))[0].detach()
        loss = F.cross_entropy(logits, torch.from_numpy(y)[0], reduction="none")
        losses.append(float((loss * weight[0]).sum()))
        weights.append(float(weight.sum()))
        on = (weight[0] != 0).numpy()
        hits += ((logits.argmax(-1).numpy() == y[0]) & on).sum()
        counted += int(on.sum())
    assert found.windows == pytest.approx(np.divide(losses, weights), rel=1e-5)
    assert found.loss == pytest.approx(sum(losses) / sum(weights), rel=1e-5)
    assert (found.accuracy, found.count) == (hits / counted, counted)
    assert counted == (8 * 12 if not masked else counted < 8 * 12 and counted)
    assert found.loss == pytest.approx(mean_loss(model, loader, 8, rows, CPU), rel=1e-5)


def test_windows_none_of_whose_tokens_count_have_no_loss_and_no_accuracy() -> None:
    stored = Stored(100)
    stored.weights[:] = 0
    corpus = TokenCorpus.from_tokens(np.arange(100) % 31)
    loader = DocumentLoader(corpus, 12, np.array([100]), "mask", seed=2, weights=stored)
    found = measure(tiny(), loader, 4, 2, CPU, per_window=True, accuracy=True)
    assert (found.loss, found.accuracy, found.count) == (0.0, None, 0)
    assert np.isnan(found.windows).all()


# saturation


def played(train: list[float], val: list[float], **rules: object) -> list[str | None]:
    """The kind of each evaluation's reason; evaluations are 100 steps apart."""
    state, settings = SaturationState(), Saturation(**rules)
    pairs = zip(train, val, strict=True)
    reasons = [check(state, 100 * i, a, b, settings) for i, (a, b) in enumerate(pairs)]
    return [r.split(":")[0] if r else None for r in reasons]


@pytest.mark.parametrize(("train", "val", "want"), [
    ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5], [None] * 5),
    ([0.5] * 5, [0.4] * 5, [None, None, None, "plateau", "plateau"]),
    ([0.5, 0.506, 0.512, 0.518], [0.4] * 4, [None] * 3 + ["memorization shift"]),
    ([0.5, 0.52, 0.54, 0.56], [0.4, 0.405, 0.41, 0.415], [None] * 3 + ["gap widening"]),
    ([0.5, 0.5, 0.5, 0.5, 0.6], [0.4, 0.4, 0.4, 0.4, 0.5], [None] * 3 + ["plateau", None]),
])  # fmt: skip
def test_when_accuracy_is_saturated(train, val, want) -> None:
    assert played(train, val) == want


def test_the_check_waits_for_its_window_and_its_steps_and_keeps_the_first_step() -> None:
    assert played([0.5] * 6, [0.4] * 6, min_steps_before_check=450) == [None] * 5 + ["plateau"]
    assert played([0.5] * 3, [0.4] * 3, window=2, min_steps_before_check=0)[1] == "plateau"
    state = SaturationState()
    for i in range(8):
        check(state, 100 * i, 0.5, 0.4, Saturation())
    assert (state.detected, state.step, len(state.val)) == (True, 300, 4)
    assert check(state, 900, None, 0.4, Saturation()) is None
    assert len(state.val) == 4


def test_accuracy_is_measured_where_it_is_asked_for() -> None:
    assert [is_on(None, mask) for mask in (False, True)] == [False, True]
    assert is_on(Saturation(), True)
    assert not is_on(Saturation(enabled=False), True)
    assert is_on(Saturation(enabled=True), False)


# in a run


def write_config(**more: object) -> list[str]:
    Path("c.json").write_text(json.dumps({**SHAPE, **more}))
    return ["--config", "c.json"]


def everything() -> list[str]:
    """Flags that turn every kind of evaluation on."""
    write_dataset(Path("data/other"), seed=5)
    write_dataset(Path("data/third"), seed=6)
    Path("p.json").write_text('{"prompts": {"one": "abc", "two": ""}, "comment": 1}')
    check = {"enabled": True, "window": 2, "min_steps_before_check": 0, "min_delta": 9}
    return [
        *write_config(eval_sets={"third": "data/third"}, token_accuracy_saturation=check),
        "--eval_dataset_dir", "data/other", "--eval_prompts_file", "p.json",
        "--eval_max_new_tokens", "5", "--gold_ci",
    ]  # fmt: skip


def test_nothing_an_evaluation_does_reaches_the_training(train) -> None:
    """Not the batches, not dropout, not NEFTune's noise, not the numbers drawn later."""
    noisy = ["--neftune_alpha", "5"]
    assert train("plain", *noisy, "--eval_interval", "100") == 0
    assert train("all", *noisy, *everything(), "--eval_interval", "1") == 0
    plain, full = (bundle.read(Path("checkpoints") / n) for n in ("plain", "all"))
    assert [e["loss"] for e in events("plain", "train")] == [
        e["loss"] for e in events("all", "train")
    ]
    for key, weight in plain.state_dict.items():
        assert torch.equal(weight, full.state_dict[key])
    assert plain.manifest["rng"] == full.manifest["rng"]
    assert plain.manifest["data"] == full.manifest["data"]
    assert len(events("all", "eval")) == 12


def test_all_that_is_measured_is_logged_and_resumes_exactly(train, monkeypatch) -> None:
    flags = everything()
    assert train("whole", *flags) == 0
    for e in events("whole", "eval"):
        assert {"eval_third", "eval_general"} <= set(e)
        assert list(e["gen"]) == ["one", "two"]
        assert all(len(text) == 5 for text in e["gen"].values())
        assert e["gen"] == e["gen_nocache"]
        assert e["cache_mismatches"] == []
        assert 0 <= e["val_masked_token_acc"] <= 1
        assert e["val_masked_token_count"] == 2 * 4 * 12
        assert e["masked_acc_gap"] == pytest.approx(
            e["train_masked_token_acc"] - e["val_masked_token_acc"], abs=2e-6
        )
    assert [e["saturation_step"] for e in events("whole", "eval")] == [None, 5, 5]
    saved = bundle.read_info(Path("checkpoints/whole"))["training_state"]["training_config"]
    found = saved["token_accuracy_saturation"]
    assert (found["saturation_detected"], found["saturation_step"], found["window"]) == (True, 5, 2)
    assert "plateau" in found["last_saturation_reason"]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2, Journal, "evaluation")
        assert train("parts", *flags) == 130
    assert train("parts", resume=True) == 0
    assert_same_run("whole", "parts")


def test_a_new_gold_says_how_sure_it_is_of_the_same_windows(train) -> None:
    assert train("a", "--gold_ci", "--eval_iters", "8") == 0
    first, *others = [e for e in events("a") if e["event"].startswith("gold_checkpoint")]
    assert "val_loss_change" not in first  # nothing to compare with
    assert others
    for e in others:
        change = e["val_loss_change"]
        assert change["windows"] == 32
        assert change["mean"] == pytest.approx(e["val_loss"] - e["prev_best"], abs=3e-6)
        assert change["ci95"][0] < change["mean"] < change["ci95"][1]
    assert train("plain", "--eval_iters", "8") == 0
    assert all("val_loss_change" not in e for e in events("plain"))
    losses = [[e["val_loss"] for e in events(n, "eval")] for n in ("a", "plain")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_other_windows_are_not_compared(train) -> None:
    assert train("a", "--gold_ci") == 0
    flags = ["--max_iters", "20", "--eval_iters", "3"]
    assert train("a", *flags, resume=True) == 0
    golds = [e for e in events("a") if e["event"].startswith("gold") and e["iter"] > 12]
    assert golds
    assert "val_loss_change" not in golds[0]


@pytest.mark.parametrize("bad", [{"saturation": {"x": 1}}, {"saturation": 3}, {"gold": {"y": 1}}])
def test_progress_that_is_none_is_refused_at_the_start(train, capsys, bad) -> None:
    assert train("a") == 0
    path = Path("checkpoints/a/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["progress"] |= bad
    path.write_text(json.dumps(seal({k: v for k, v in manifest.items() if k != SEAL})))
    assert train("a", "--max_iters", "14", resume=True) == 3
    assert "manifest.json cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("losses", [None, 3, "?", "AAA", "AAAA"])
def test_stored_windows_that_are_none_give_no_interval(train, losses) -> None:
    assert train("a", "--gold_ci") == 0
    path = Path("checkpoints/a/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["progress"]["gold"]["windows"]["losses"] = losses
    path.write_text(json.dumps(seal({k: v for k, v in manifest.items() if k != SEAL})))
    assert train("a", "--max_iters", "20", resume=True) == 0
    golds = [e for e in events("a") if e["event"].startswith("gold") and e["iter"] > 12]
    assert "val_loss_change" not in golds[0]


def test_a_set_whose_name_has_no_letters_is_one_line(train, capsys) -> None:
    write_dataset(Path("data/other"), seed=5)
    assert train("a", *write_config(eval_sets={"\ud800": "data/other"})) == 2
    assert "eval_sets maps a name" in capsys.readouterr().err


def test_eval_sets_guard_gold_in_a_run(train) -> None:
    """A set that cannot learn what the training data teaches: its loss rises, gold is blocked."""
    folder = write_dataset(Path("data/other"))
    for split in ("train", "val"):  # the same letters backwards
        path = folder / split / "shard_00000.bin"
        np.fromfile(path, "<u4")[::-1].copy().tofile(path)
    guard = {"guards": {"eval_regression": 0.001}}
    flags = write_config(eval_sets={"back": "data/other"}, gold_selection=guard)
    assert train("a", *flags, "--max_iters", "60", "--dropout", "0", "--warmup_iters", "0") == 0
    blocked = [e for e in events("a", "gold_blocked") if e["reason"].startswith("eval regression")]
    assert blocked
    assert blocked[0]["reason"].startswith("eval regression: back ")
    assert blocked[0]["val_loss"] < blocked[0]["best_val_loss"]
    # the last evaluation's minimum was blocked too, so gold is an older one
    assert events("a", "gold_checkpoint_final_eval") == []
    step = bundle.read_info(Path("checkpoints/a_gold"))["training_state"]["step"]
    assert step < blocked[0]["iter"]


def test_the_overfit_guard_lives_on_the_measured_training_loss(train) -> None:
    guard = {"gold_selection": {"guards": {"overfit_ratio": 0.5}}}
    assert train("a", *write_config(**guard)) == 0
    assert [e["iter"] for e in events("a", "gold_checkpoint")] == [0]  # no training loss yet
    assert {e["reason"].split(":")[0] for e in events("a", "gold_blocked")} == {"overfit"}
    assert events("a", "gold_checkpoint_final_eval") == []


def test_mypts_wider_reports_come_from_its_environment_variable(train, monkeypatch) -> None:
    flags = [
        *write_config(gold_selection={"guards": {"overfit_ratio": 0.01}}),
        "--learning_rate",
        "9",
    ]
    assert train("a", *flags) == 0
    assert events("a", "gold_blocked") == []  # ever worse: no minimum was blocked
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "1")
    assert train("b", *flags) == 0
    assert [e["iter"] for e in events("b", "gold_blocked")] == [5, 10, 12]
    assert projected("a") == [e for e in projected("b") if e["event"] != "gold_blocked"]


# prompts


def test_samples_are_what_generate_writes_and_need_no_global_randomness() -> None:
    model, tokenizer = tiny(vocab_size=16).train(), Tokenizer.char(LETTERS)
    before = torch.get_rng_state()
    found = write_samples(model, tokenizer, {"a": [1, 2], "long": [3] * 10}, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model.eval()
    ids = list(generate(model, tokenizer, [1, 2], max_new_tokens=5, temperature=0))
    assert found.gen["a"] == found.gen_nocache["a"] == tokenizer.decode(ids)
    assert len(found.gen["long"] or "") == 5
    assert "long" not in found.gen_nocache  # it leaves the window
    assert found.cache_mismatches == []


def test_samples_are_written_by_the_model_that_is_not_compiled() -> None:
    """A compiled one would be compiled anew for every length."""
    model = tiny(vocab_size=16)

    def compiled(*_: object, **__: object) -> None:
        raise AssertionError

    model.run_block = compiled
    assert write_samples(model, Tokenizer.char(LETTERS), {"a": [1]}, 3).gen["a"]
    assert model.run_block is compiled


def test_weights_that_are_not_finite_give_no_sample_and_no_error() -> None:
    model = tiny(vocab_size=16)
    model.lm_head.bias.data[3] = float("nan")
    found = write_samples(model, Tokenizer.char(LETTERS), {"a": [1]}, 5)
    assert (found.gen, found.gen_nocache) == ({"a": None}, {})


@pytest.mark.parametrize(("content", "words"), [
    (None, "no such file"), ("{", "not valid JSON"), ("[]", "expected an object with prompts"),
    ('{"prompts": {}}', "expected an object with prompts"),
    ('{"prompts": {"a": 3}}', "prompts.a: expected text"),
    ('{"prompts": {"a": "XYZ"}}', "X"),
    ('{"prompts": {"\\ud800": "a"}}', "printable"),
    (json.dumps({"prompts": dict.fromkeys(map(str, range(65)), "a")}), "at most 64"),
])  # fmt: skip
def test_unusable_prompts_are_one_line_before_training(train, capsys, content, words) -> None:
    if content is not None:
        Path("p.json").write_text(content)
    assert train("a", "--eval_prompts_file", "p.json") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert words.lower() in lines[-1].lower()
    assert not Path("checkpoints").exists()


# loss masks


def masked_dataset(folder: Path) -> Path:
    """Tokens a to h count, tokens i to p do not; MyPT's episode layout."""
    write_dataset(folder)
    for split in ("train", "val"):
        stream = folder / split / "shard_00000.bin"
        tokens = np.fromfile(stream, "<u4")
        stream.unlink()
        tokens.tofile(folder / split / "tokens.bin")
        (tokens < 8).astype("u1").tofile(folder / split / "mask.bin")
        np.array([[0, len(tokens)]], "<u8").tofile(folder / split / "episodes.idx")
    return folder


def test_a_datasets_masks_weigh_the_loss_and_the_accuracy(dataset, monkeypatch, capsys) -> None:
    masked_dataset(Path("data/masked"))
    data = ["--dataset_dir", "data/masked", "--documents", "concat"]
    start = ["train", *SMALL, *data, "--use_loss_mask"]
    assert main([*start, "--model_name", "whole"]) == 0
    assert "use_loss_mask is off" not in capsys.readouterr().err
    e = events("whole", "eval")[-1]
    assert 0 < e["val_masked_token_count"] < 2 * 4 * 12
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 6 + 2, DocumentLoader, "next")
        assert main([*start, "--model_name", "parts"]) == 130
    assert main(["train", "--model_name", "parts"]) == 0
    assert_same_run("whole", "parts")
    # what does not count is not learned: no gradient ever asked for it
    assert main(["train", *SMALL, *data, "--model_name", "all"]) == 0
    bias = [
        bundle.read(Path("checkpoints") / n).state_dict["lm_head.bias"] for n in ("whole", "all")
    ]
    assert (bias[0][8:] < 0).all()  # never the answer
    assert (bias[1][8:] > 0).any()


def test_masks_count_in_every_order(dataset, capsys) -> None:
    masked_dataset(Path("data/masked"))
    start = ["train", *SMALL, "--dataset_dir", "data/masked", "--use_loss_mask"]
    for order in ("epoch", "block"):
        assert main([*start, "--order", order, "--model_name", order]) == 0
        assert "use_loss_mask" not in capsys.readouterr().err
    losses = [[e["loss"] for e in events(name, "train")] for name in ("epoch", "block")]
    assert losses[0] != losses[1]
