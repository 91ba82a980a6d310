"""estimate_loss and estimate_masked_token_accuracy with loaders of any origin (1.3)."""

import inspect

import pytest
import torch
from core_models import char_model
from test_core_model import batch, random_model

from mypt_fast.core.model import GPT


class Loader:
    """Yields the same few batches in turn, with as many tensors as asked."""

    def __init__(self, parts, n=3):
        self.batches = [batch(seed=s)[:parts] for s in range(n)]
        self.asked = []

    def get_batch(self, split="train"):
        self.asked.append(split)
        return self.batches[(len(self.asked) - 1) % len(self.batches)]


def forward_loss(model, x, y, mask=None, segments=None):
    return model(x, y, loss_mask=mask, segment_ids=segments)[1].detach()


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_mean_loss_of_batches_of_any_kind(parts):
    model, loader = random_model(dropout=0.5), Loader(parts)
    model.eval()
    found = model.estimate_loss(loader, 3)
    assert loader.asked == ["train"] * 3 + ["val"] * 3
    assert model.training  # always, whatever it was
    model.eval()
    expected = torch.stack([forward_loss(model, *b) for b in loader.batches]).mean()
    for split in ("train", "val"):
        assert found[split].dtype is torch.float32
        assert found[split].shape == ()
        assert not found[split].requires_grad
        torch.testing.assert_close(found[split], expected)
    assert list(model.estimate_loss(loader, 1, splits=["val"])) == ["val"]


def test_a_loader_that_fails_leaves_the_model_in_training_mode():
    class Broken:
        def get_batch(self, split):
            raise FileNotFoundError(split)

    model = char_model()
    with pytest.raises(FileNotFoundError):
        model.estimate_loss(Broken(), 2)
    assert model.training


def test_measuring_draws_no_random_number_and_takes_no_gradient():
    model = random_model(dropout=0.5)
    before = torch.get_rng_state()
    model.estimate_loss(Loader(4), 2)
    model.estimate_masked_token_accuracy(Loader(4), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("parts", [3, 4])
def test_masked_accuracy_counts_every_target_whose_mask_is_not_zero(parts):
    model, loader = random_model(), Loader(parts)
    for b in loader.batches:
        b[2][b[2] < 0.5] = 0  # fractional weights above: each counts as one
    found = model.estimate_masked_token_accuracy(loader, 3, splits=["val"])
    hits = count = 0
    for x, y, mask, *segments in loader.batches:
        logits = model(x, segment_ids=segments[0] if segments else None)[0]
        hits += int(((logits.argmax(-1) == y) & (mask != 0)).sum())
        count += int((mask != 0).sum())
    assert found == {"val": {"acc": hits / count, "count": count}}
    assert 0 < count < 72


def test_without_masks_there_is_no_accuracy_and_no_batch_is_wasted():
    """Q-8: MyPT draws and discards all of them, out of the training data."""
    model, loader = random_model(), Loader(2)
    found = model.estimate_masked_token_accuracy(loader, 50)
    assert found == {s: {"acc": None, "count": 0} for s in ("train", "val")}
    assert loader.asked == ["train", "val"]


def test_masks_of_nothing_give_no_accuracy():
    loader = Loader(3)
    for b in loader.batches:
        b[2].zero_()
    found = char_model().estimate_masked_token_accuracy(loader, 2, ["val"])
    assert found == {"val": {"acc": None, "count": 0}}


@pytest.mark.parametrize("content", [(1,), torch.zeros(2), [1] * 5])
def test_a_batch_of_another_kind(content):
    class Odd:
        def get_batch(self, split):
            return content

    with pytest.raises(ValueError, match="get_batch returns"):
        char_model().estimate_loss(Odd(), 1)


def test_fit_has_the_signature_of_4_5_and_hands_everything_on(monkeypatch):
    found = {n: p.default for n, p in inspect.signature(GPT.fit).parameters.items()}
    empty = inspect.Parameter.empty
    assert found == {
        "self": empty, "data_loader": empty, "optimizer": empty, "max_iters": 1000,
        "eval_interval": 20, "eval_iters": 50, "checkpoint_dir": None, "start_step": 0,
        "learning_rate": None, "save_dtype": "bf16", "final_save_dtype": "fp16",
        "warmup_iters": 0, "grad_clip": 1.0, "use_amp": True, "amp_dtype": "bf16",
        "eval_data_loaders": None, "log_file": None, "eval_seed": None, "config_file": None,
        "dataset_dir": None, "eval_prompts_file": None, "eval_max_new_tokens": 64,
        "data_loader_schedule": None, "grad_accum_steps": 1, "initial_phase": None,
        "model_name": None, "gold_selection": None, "token_accuracy_saturation": None,
    }  # fmt: skip
    handed = {}

    class Body:
        @staticmethod
        def fit(*args, **kwargs):
            handed.update(args=args, kwargs=kwargs)
            return {"train": 1}

    monkeypatch.setattr("mypt_fast.core.fit.fit", Body.fit)
    model = char_model()
    assert model.fit("loader", "optimizer", 5, model_name="m") == {"train": 1}
    assert handed["args"] == (model, "loader", "optimizer")
    given = {**dict(list(found.items())[3:]), "max_iters": 5, "model_name": "m"}
    assert handed["kwargs"] == given
