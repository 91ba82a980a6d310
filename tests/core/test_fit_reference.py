"""fit against a plain PyTorch trainer: the same draws, the same losses."""

import numpy as np
import pytest
import torch
from core_models import char_model
from fit_help import (
    LETTERS,
    EpisodeLoader,
    PlainGPT,
    ShardLoader,
    TextLoader,
    config,
    events,
    model_of,
    plain_fit,
    run,
    seed_everything,
)

from mypt_fast import presets
from mypt_fast.kernels import dropped_attention


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def both(cfg, loader_of, steps, **options):
    """Train both from the same weights and seeds; returns losses, validation losses and draws."""
    ours, plain = model_of(cfg), PlainGPT(cfg)
    plain.load_state_dict(ours.state_dict())
    one, two = loader_of(cfg), loader_of(cfg)
    accum, every = options.get("accum", 1), options.get("eval_interval", 20)
    run(
        cfg, one, steps, model=ours, warmup_iters=3, grad_accum_steps=accum, eval_interval=every,
        eval_seed=options.get("eval_seed"),
    )  # fmt: skip
    seed_everything(11)
    losses, values = plain_fit(plain, two, steps, **options)
    found = [e["loss"] for e in events("fit.jsonl", "train")]
    validated = [e["val_loss"] for e in events("fit.jsonl", "eval")]
    return (found, validated, one.drawn), (losses, values, two.drawn)


def trained(drawn):
    return [entry for entry in drawn if entry[0] == "train"]


@pytest.mark.parametrize("loader", [TextLoader, ShardLoader])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_thirty_steps_of_a_plain_trainer(loader, dropout) -> None:
    ours, plain = both(config(dropout=dropout), loader, 30)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], plain[1], atol=1e-5)
    assert ours[0][-1] < ours[0][0] - 0.1  # it learns
    assert len(plain[2]) == 34  # 30 for training, 2 for each of 2 evaluations
    assert ours[2][: len(plain[2])] == plain[2]


@pytest.mark.parametrize("loader", [TextLoader, ShardLoader])
def test_accumulation_draws_between_the_dropouts_as_mypt_does(loader) -> None:
    ours, plain = both(config(dropout=0.2), loader, 8, accum=3)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-5)
    assert trained(ours[2])[:24] == trained(plain[2])


def test_evaluation_windows_are_mypts_for_the_seed_and_training_goes_on_untouched() -> None:
    """Q-1: with MyPT every interval after an evaluation trains on the same batches."""
    options = {"eval_interval": 4, "eval_seed": 1337}
    ours, plain = both(config(), TextLoader, 12, **options)
    assert ours[2][: len(plain[2])] == plain[2]
    rows = [tuple(starts) for _, starts in trained(ours[2])[:12]]
    assert len(set(rows)) == 12
    windows = [starts for split, starts in ours[2] if split == "val"]
    assert windows[:2] == windows[2:4] == windows[4:6]


def test_strict_compat_repeats_mypts_batches(monkeypatch) -> None:
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "1")
    cfg, loader = config(dropout=0.0), TextLoader(config())
    run(cfg, loader, 12, eval_seed=1337)
    order = [split for split, _ in loader.drawn[:10]]
    # val loss, then masked accuracies of train and val that are thrown away, then training
    assert order == ["val"] * 2 + ["train"] * 2 + ["val"] * 2 + ["train"] * 4
    intervals = [loader.drawn[n : n + 10] for n in (0, 10, 20)]
    assert intervals[0] == intervals[1] == intervals[2]


def test_strict_compat_without_a_seed_moves_the_generators_on(monkeypatch) -> None:
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "1")
    cfg, loader = config(dropout=0.0), TextLoader(config())
    run(cfg, loader, 8)
    again = TextLoader(cfg)
    seed_everything(11)
    for split, _ in loader.drawn[:20]:
        again.get_batch(split)
    assert again.drawn == loader.drawn[:20]


LONG = {"block_size": dropped_attention.LEAST_LENGTH, "dropout": 0.2}


@pytest.fixture
def no_strips(monkeypatch):
    def entered(*_):
        raise AssertionError("attention in strips")

    monkeypatch.setattr(dropped_attention, "dropped_attention", entered)


@pytest.mark.usefixtures("no_strips")
def test_long_rows_draw_the_dropout_of_a_plain_trainer() -> None:
    """PyTorch's in attention too: the batches drawn behind it are the same ones."""
    ours, plain = both(config(**LONG), TextLoader, 6)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-5)
    assert trained(ours[2])[:6] == trained(plain[2])


@pytest.mark.usefixtures("no_strips")
def test_the_model_of_core_draws_pytorchs_numbers_in_long_rows() -> None:
    """Loss and gradients, of weights so large that every mask shows in them."""
    model = char_model(**LONG, bias=True).train()
    plain = PlainGPT(model.config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    plain.load_state_dict(model.state_dict())
    x, y = torch.randint(13, (2, 3, LONG["block_size"]))

    def step(trained, loss):
        torch.manual_seed(5)
        trained.zero_grad()
        value = loss()
        value.backward()
        grads = {name: p.grad for name, p in trained.named_parameters()}
        return torch.get_rng_state(), value.detach(), grads

    state, value, grads = step(plain, lambda: plain(x, y))
    for loss in (lambda: model(x, y)[1], lambda: model.summed_loss(x, y) / y.numel()):
        found = step(model, loss)
        assert torch.equal(found[0], state)
        torch.testing.assert_close(found[1], value, atol=1e-5, rtol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(found[2][name], grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("loader", "dropout"), [(TextLoader, 0.1), (ShardLoader, 0.0)])
def test_two_hundred_steps_of_a_plain_trainer(loader, dropout) -> None:
    cfg = config(dropout=dropout, n_embd=64, n_head=4, n_layer=4, block_size=32, batch_size=8)
    ours, plain = both(cfg, loader, 200, accum=2)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-4)
    np.testing.assert_allclose(ours[1], plain[1], atol=1e-4)
    assert trained(ours[2])[:400] == trained(plain[2])


@pytest.mark.slow
def test_the_shapes_of_tiny_char() -> None:
    cfg = presets.load("tiny_char").model
    cfg.device, cfg.vocab_size, cfg.dropout = "cpu", len(LETTERS), 0.1
    ours, plain = both(cfg, TextLoader, 16, eval_interval=8)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-4)
    np.testing.assert_allclose(ours[1], plain[1], atol=1e-4)
    assert trained(ours[2])[:16] == trained(plain[2])


class Masked(EpisodeLoader):
    def __init__(self, cfg):
        super().__init__(cfg, packed=False)


def test_a_step_minimises_the_mean_of_its_batches_means() -> None:
    """Q-29, which is kept: the loop of specification 4.5 divides each loss by grad_accum_steps."""
    cfg = config(dropout=0.0)
    ours, plain = model_of(cfg), PlainGPT(cfg)
    plain.load_state_dict(ours.state_dict())
    loader = Masked(cfg)
    weights = [float(loader.get_batch("train")[2].sum()) for _ in range(3)]
    assert len(set(weights)) == 3  # else the mean over tokens would be the same
    run(cfg, Masked(cfg), 6, model=ours, warmup_iters=3, grad_accum_steps=3, eval_interval=100)
    losses, _ = plain_fit(plain, Masked(cfg), 6, accum=3, eval_interval=100, eval_iters=1)
    found = [e["loss"] for e in events("fit.jsonl", "train")]
    np.testing.assert_allclose(found, losses, atol=1e-5)
