"""Checkpoints of 2025 through core: single files and bundles with a matrix per head (2.6, 5.2)."""

import json
from pathlib import Path

import pytest
import reference
import torch
from core_models import IDX, LETTERS

from mypt_fast.core.checkpoint import CheckpointManager, get_model_info, load_model
from mypt_fast.core.config import GPTConfig
from mypt_fast.core.model import GPT

CONFIG = {
    "batch_size": 4, "block_size": 8, "vocab_size": 13, "n_embd": 8, "n_head": 2, "n_layer": 2,
    "dropout": 0.0, "bias": False, "device": "cpu",
}  # fmt: skip
TOKENIZER = {"token_kind": "char", "chars": list(LETTERS)}
NORMS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")


def per_head_weights():
    """A state_dict of era L0: heads apart, their masks as buffers, a bias after attention."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=g)

    state = {
        "token_embedding_table.weight": draw(13, 8),
        "position_embedding_table.weight": draw(8, 8),
    }
    for block in ("blocks.0.", "blocks.1."):
        for head in ("0", "1"):
            prefix = f"{block}sa.heads.{head}."
            state |= {f"{prefix}{n}.weight": draw(4, 8) for n in ("key", "query", "value")}
            state[f"{prefix}tril"] = torch.ones(8, 8).tril()
        state |= {f"{block}sa.proj.weight": draw(8, 8), f"{block}sa.proj.bias": draw(8)}
        state |= {f"{block}fwd.net.0.weight": draw(32, 8), f"{block}fwd.net.0.bias": draw(32)}
        state |= {f"{block}fwd.net.2.weight": draw(8, 32), f"{block}fwd.net.2.bias": draw(8)}
        state |= {block + name: draw(8) for name in NORMS}
    state |= {"ln_f.weight": draw(8), "ln_f.bias": draw(8)}
    return state | {"lm_head.weight": draw(13, 8), "lm_head.bias": draw(13)}


@pytest.fixture(params=["latest.pt", "bundle"])
def old(request, tmp_path, monkeypatch):
    """The name of a model of that era, in `checkpoints/`; its weights."""
    monkeypatch.chdir(tmp_path)
    folder, weights = Path("checkpoints/old"), per_head_weights()
    folder.mkdir(parents=True)
    if request.param == "bundle":
        torch.save(weights, folder / "model.pt")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (folder / "training_state.json").write_text('{"step": 5}')
    else:
        content = {
            "model_state_dict": weights, "config": CONFIG, "tokenizer": TOKENIZER, "step": 5,
            "optimizer_state_dict": None,
        }  # fmt: skip
        torch.save(content, folder / request.param)
    return weights


def expected(weights, idx=IDX):
    return reference.logits(weights, reference.default_config(), idx)


def close(model, weights, idx=IDX):
    torch.testing.assert_close(model.eval()(idx)[0], expected(weights, idx), atol=1e-5, rtol=0)


def test_old_models_load_resume_and_are_converted_by_the_next_save(old):
    close(load_model("old"), old)
    assert load_model("old").generate("abc", 3, 0).startswith("abc")
    info = get_model_info("old")
    assert info["config"] == CONFIG
    assert info["training_state"]["step"] == 5
    before = {p.name for p in Path("checkpoints/old").iterdir()}
    manager = CheckpointManager("old")
    model, optimizer, step = manager.initialize_for_training(
        GPTConfig(device="cpu"), "char", None, 1e-3
    )
    assert step == 5
    close(model, old)
    model.save_checkpoint_bundle(manager.checkpoint_dir, 6, optimizer.state_dict())
    assert before <= {p.name for p in Path("checkpoints/old").iterdir()}
    assert get_model_info("old")["format"] == "json"
    again, tokenizer, step, _ = GPT.load(manager.checkpoint_dir)
    assert step == 6
    assert tokenizer["chars"] == list(LETTERS)
    close(again, old)


def test_load_legacy_gives_the_four_things(old):
    path = Path("checkpoints/old/latest.pt")
    if not path.exists():  # a bundle is `load`'s
        close(GPT.load("checkpoints/old")[0], old)
        return
    model, tokenizer, step, moments = GPT.load_legacy(path, map_location="cpu")
    close(model, old)
    assert not model.training
    assert (tokenizer["chars"], step, moments) == (list(LETTERS), 5, None)


def test_new_models_start_from_old_weights(old):
    old_file = Path("checkpoints/old/latest.pt")
    if old_file.exists():
        old_file.rename("checkpoints/old/final.pt")  # what fine-tuning takes
    made = CheckpointManager("new").initialize_for_training(
        GPTConfig(device="cpu", block_size=4), "char", None, 1e-3, init_from_model="old"
    )
    close(made[0], old, IDX[:, :4])
    assert made[0].config.dropout == 0.2
    made[0].save_checkpoint_bundle("checkpoints/new", 0)
    close(load_model("new"), old, IDX[:, :4])
