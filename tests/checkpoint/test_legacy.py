"""Checkpoints of every era compute what plain PyTorch computes from the same files."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from mypt_fast import generate
from mypt_fast.accounting import count_parameters
from mypt_fast.checkpoint import bundle, eras, legacy
from mypt_fast.config import ModelConfig
from mypt_fast.errors import CheckpointError
from mypt_fast.model import GPT
from mypt_fast.training.optim import parameter_groups
from tests.checkpoint.old_files import (
    CHAR,
    FIFTEEN,
    GPT2,
    LLAMA,
    SIZES,
    OldGPT,
    batch,
    fifteen_state,
    fused_logits,
    fused_weights,
    old_bundle,
    old_groups,
    single_file,
    trained,
)

MYPT_FIELDS = [
    "batch_size", "block_size", "vocab_size", "n_embd", "n_head", "n_layer", "dropout", "bias",
    "use_checkpoint", "device", "use_loss_mask", "tie_weights", "save_dtype", "pos_encoding",
    "mlp_type", "norm_type", "rope_theta", "rope_scale", "segment_position_reset", "neftune_alpha",
    "batch_sampling_mode", "pad_token_id", "episode_min_tokens", "epoch_seed", "epoch_shuffle",
    "epoch_drop_last",
]  # fmt: skip
ERAS = {
    "L0": {"tril": True, "bundle": None},
    "L1 raw": {"tril": True, "bundle": {"wrapped": False}},
    "L1 wrapped": {"tril": True, "bundle": {"wrapped": True}},
    "L2 file": {"tril": False, "bundle": None},
    "L2 bundle": {"tril": False, "bundle": {"wrapped": True}},
}


def put(folder: Path, era: str, cfg: dict, model: OldGPT, **options: object) -> Path:
    """Write a checkpoint of an era; returns what a reader is given."""
    kind = ERAS[era]["bundle"]
    if kind is None:
        return single_file(folder / "latest.pt", model, cfg, **options)  # type: ignore[arg-type]
    return old_bundle(folder, model, cfg, **kind, **options)  # type: ignore[arg-type]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ["char", "gpt2"])
@pytest.mark.parametrize("era", ERAS)
@torch.no_grad()
def test_every_era_computes_what_its_own_code_did(tmp_path, era: str, kind: str, bias: bool):
    cfg = {**(SIZES if kind == "char" else GPT2), "bias": bias}
    model = OldGPT(cfg, ERAS[era]["tril"])
    tokenizer = CHAR if kind == "char" else {"token_kind": "gpt2"}
    place = put(tmp_path / "old", era, cfg, model, tokenizer=tokenizer)
    idx, _ = batch(cfg, 0)
    loaded = generate.load(place)
    same(loaded.model(idx), model(idx))
    assert loaded.model.config.per_head_era
    assert loaded.tokenizer.kind == kind
    assert loaded.step == 3
    n_params = sum(p.numel() for p in model.parameters())
    assert count_parameters(loaded.model.config).total == n_params
    assert sum(p.numel() for p in loaded.model.parameters()) == n_params
    plain = {"temperature": 0, "use_default_stops": False, "repeat_window": 0}
    start = [1, 2, 3]
    cached = generate.generate(loaded.model, loaded.tokenizer, start, max_new_tokens=6, **plain)
    ids = list(start)
    while len(ids) < 9:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert [*start, *cached] == ids


@torch.no_grad()
def test_the_activation_and_the_bias_matter(tmp_path: Path) -> None:
    """What renaming keys alone would give is another model."""
    model = OldGPT(SIZES)
    saved = legacy.read(single_file(tmp_path / "latest.pt", model, SIZES))
    weights = {k: v for k, v in saved.state_dict.items() if not k.endswith("sa.proj.bias")}
    today = GPT(ModelConfig(**{**saved.config, "per_head_era": False}), seed=None)
    today.load_state_dict(weights)
    idx, _ = batch(SIZES, 0)
    assert (today.eval()(idx) - model(idx)).abs().max() > 0.1


def test_the_key_is_there_for_old_weights_only(tmp_path: Path) -> None:
    assert list(ModelConfig().to_dict()) == MYPT_FIELDS
    saved = legacy.read(single_file(tmp_path / "latest.pt", OldGPT(SIZES), SIZES))
    assert list(saved.config) == [*MYPT_FIELDS, "per_head_era"]
    assert saved.config["per_head_era"] is True
    assert {k: saved.config[k] for k in SIZES} == SIZES


@pytest.mark.parametrize("place", ["raw bundle", "wrapped bundle", "file"])
@pytest.mark.parametrize("cfg", [SIZES, {**SIZES, "bias": True}, LLAMA], ids=["", "bias", "llama"])
@torch.no_grad()
def test_todays_layout_is_read_raw_wrapped_and_from_a_file(tmp_path, cfg, place: str) -> None:
    weights, path = fused_weights(cfg), tmp_path / "m"
    if place == "file":
        path = single_file(path / "final.pt", weights, cfg)
    else:
        old_bundle(path, weights, cfg, wrapped=place == "wrapped bundle")
    loaded = generate.load(path)
    idx, _ = batch(cfg, 0)
    same(loaded.model(idx), fused_logits(weights, cfg, idx))
    assert not loaded.model.config.per_head_era
    assert (loaded.tokenizer.kind, loaded.step) == ("char", 3)
    if place == "file":
        assert legacy.convert(tmp_path / "m", "final.pt").difference == 0
        same(generate.load(tmp_path / "m").model(idx), fused_logits(weights, cfg, idx))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("era", ["L0", "L1 raw", "L2 bundle"])
def test_moments_are_taken_over(tmp_path: Path, era: str, bias: bool, groups: int) -> None:
    """The next step of AdamW, with the file's own settings, is the one its own code would make."""
    cfg = {**SIZES, "bias": bias}
    model, old = trained(cfg, ERAS[era]["tril"], groups=groups)
    place = put(tmp_path / "old", era, cfg, model, optimizer=old)
    saved = legacy.read(place)
    assert not [n for n in saved.notices if "start from zero" in n]
    ours = GPT(ModelConfig(**saved.config), seed=None)
    ours.load_state_dict(saved.state_dict)
    optimizer = torch.optim.AdamW(parameter_groups(ours, 0.1), lr=99.0)
    optimizer.load_state_dict(saved.optimizer)
    assert {s["step"].item() for s in saved.optimizer["state"].values()} == {3}
    idx, targets = batch(cfg, 7)
    for stepper, loss in (
        (old, model.loss(idx, targets)),
        (optimizer, ours(idx, targets) / targets.numel()),
    ):
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    with torch.no_grad():
        same(ours.eval()(idx), model(idx))
        start = GPT(ModelConfig(**saved.config), seed=None)
        start.load_state_dict(saved.state_dict)
        assert (start(idx) - model(idx)).abs().max() > 1e-3  # the step did move it


def test_an_optimizer_before_its_first_step_has_no_moments(tmp_path: Path) -> None:
    model, optimizer = trained(SIZES, steps=0)
    saved = legacy.read(single_file(tmp_path / "a.pt", model, SIZES, optimizer=optimizer, step=0))
    assert saved.optimizer["state"] == {}
    assert [len(g["params"]) for g in saved.optimizer["param_groups"]] == [9, 19]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: s["param_groups"][0]["params"].pop(), "expected 38 parameters, found 37"),
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(2, 2)), "expected (12, 16), found (2"),
        (lambda s: s["state"].pop(4), "has none"),
        (lambda s: s["state"][4].update(step=torch.tensor(9.0)), "different steps"),
        (lambda s: s["state"][4].update(step=torch.tensor(float("nan"))), "has no step"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "AMSGrad"),
        (lambda s: s["param_groups"].append({"params": []}), "expected 19 decayed"),
        (lambda s: s.pop("state"), "no state and param_groups"),
    ],
)
def test_moments_that_do_not_fit_start_from_zero_with_one_notice(tmp_path, spoil, said) -> None:
    model, optimizer = trained(SIZES)
    state = optimizer.state_dict()
    spoil(state)
    path = single_file(tmp_path / "a.pt", model, SIZES, optimizer_state_dict=state)
    saved = legacy.read(path)
    assert saved.optimizer is None
    (notice,) = [n for n in saved.notices if "moments start from zero" in n]
    assert said in notice
    assert "\n" not in notice


def test_two_groups_in_the_order_of_that_time_are_recognised(tmp_path: Path) -> None:
    """Moments of equal shapes in another order would pass every check of shapes."""
    model, old = trained(SIZES, groups=2)
    saved = legacy.read(single_file(tmp_path / "a.pt", model, SIZES, optimizer=old))
    named = {id(p): n for n, p in model.named_parameters()}
    names = [named[id(p)] for group in old_groups(model) for p in group["params"]]
    assert names[0] == "blocks.0.sa.heads.0.key.weight"
    head = model.blocks[0].sa.heads
    qkv = torch.cat([
        old.state[getattr(head[h], m).weight]["exp_avg"]
        for m in ("query", "key", "value") for h in (0, 1)
    ])  # fmt: skip
    assert torch.equal(saved.optimizer["state"][0]["exp_avg"], qkv)


# tokenizers


def test_fifteen_special_tokens_keep_the_ids_the_weights_know(tmp_path: Path) -> None:
    model = OldGPT(GPT2)
    path = single_file(tmp_path / "m/latest.pt", model, GPT2, tokenizer=fifteen_state())
    loaded = generate.load(path)
    assert loaded.tokenizer.special_tokens == FIFTEEN
    assert loaded.tokenizer.encode("<myPT_assistant>hi<myPT_eot>")[::2] == [50263, 50271]
    assert set(loaded.tokenizer.stop_ids()) == {50256, 50264, 50271}
    (notice,) = [n for n in loaded.notices if "special tokens" in n]
    assert "11 special tokens keep" in notice
    assert "(myPT_toolcall_open 50261, today 50267)" in notice
    done = legacy.convert(tmp_path / "m")
    again = bundle.read(done.target)
    assert again.tokenizer == fifteen_state()
    assert generate.load(done.target).tokenizer.special_tokens == FIFTEEN


@pytest.mark.parametrize("kind", ["file", "bundle"])
def test_a_model_without_rows_for_special_tokens_has_none(tmp_path: Path, kind: str) -> None:
    cfg, state = {**GPT2, "vocab_size": 50257}, {"token_kind": "gpt2"}
    path = tmp_path / "m"
    if kind == "file":
        path = single_file(path / "latest.pt", OldGPT(cfg), cfg, tokenizer=state)
    else:
        old_bundle(path, OldGPT(cfg), cfg, tokenizer=state)
    tokenizer = generate.load(path).tokenizer
    assert (tokenizer.special_tokens, tokenizer.n_tokens) == ({}, 50257)
    assert all(i < 50257 for i in tokenizer.encode("<myPT_user> hi"))
    legacy.convert(tmp_path / "m")
    assert generate.load(tmp_path / "m").tokenizer.n_tokens == 50257


def test_without_a_tokenizer_gpt2s_size_is_gpt2(tmp_path: Path) -> None:
    gpt2 = single_file(tmp_path / "a.pt", OldGPT(GPT2), GPT2, tokenizer=None)
    assert generate.load(gpt2).tokenizer.kind == "gpt2"
    char = single_file(tmp_path / "b.pt", OldGPT(SIZES), SIZES, tokenizer=None)
    assert "no tokenizer" in legacy.read(char).notices[-1]
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        generate.load(char)


# where they are found


def test_a_bundle_comes_first_and_says_what_it_hides(tmp_path: Path) -> None:
    run = tmp_path / "m"
    single_file(run / "latest.pt", OldGPT(SIZES), SIZES)
    single_file(run / "final.pt", OldGPT(SIZES), SIZES)
    single_file(run / "best.pt", OldGPT(SIZES), SIZES)
    assert legacy.choose("m", legacy.INFERENCE, root=tmp_path) == (run / "latest.pt", [])
    assert legacy.choose("m", legacy.INSPECT, root=tmp_path) == (run / "final.pt", [])
    assert legacy.choose("m", legacy.INSPECT, "best.pt", tmp_path) == (run / "best.pt", [])
    with pytest.raises(CheckpointError, match=r"gone\.pt.*best\.pt, final\.pt, latest\.pt"):
        legacy.choose("m", legacy.INFERENCE, "gone.pt", tmp_path)
    legacy.convert(run)
    path, (said,) = legacy.choose("m", legacy.INFERENCE, "final.pt", tmp_path)
    assert path == run
    assert "final.pt is not read" in said
    assert legacy.choose("m", legacy.INFERENCE, root=tmp_path) == (run, [])
    assert legacy.find(run, legacy.RESUME) == run / "latest.pt"
    assert legacy.find(tmp_path, legacy.RESUME) is None


def test_what_a_file_says_is_read_without_its_weights(tmp_path: Path) -> None:
    path = single_file(tmp_path / "a.pt", OldGPT(SIZES), SIZES, step=41)
    state = {"step": 41}
    assert legacy.info(path) == {"config": SIZES, "tokenizer": CHAR, "training_state": state}
    assert legacy.read(path, values=False).state_dict["lm_head.weight"].is_meta


def test_reading_a_directory_takes_its_bundle_or_the_named_file(tmp_path: Path) -> None:
    run = tmp_path / "m"
    single_file(run / "latest.pt", OldGPT(SIZES), SIZES, step=5)
    single_file(run / "final.pt", OldGPT(SIZES), SIZES, step=9)
    steps = [legacy.read(run, name).training_state["step"] for name in (None, "final.pt")]
    assert steps == [5, 9]
    legacy.convert(run)
    assert legacy.read(run).path == run
    assert legacy.read(run, "final.pt").training_state["step"] == 9
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        legacy.read(tmp_path, "latest.pt")


def test_a_config_object_in_an_old_pickle_is_read_as_its_fields(tmp_path: Path) -> None:
    plain = single_file(tmp_path / "a.pt", OldGPT(SIZES), SIZES)
    other = single_file(tmp_path / "b.pt", OldGPT(SIZES), GPTConfig(SIZES))
    assert b"GPTConfig" in other.read_bytes()
    assert legacy.read(other).config == legacy.read(plain).config
    ordered = single_file(tmp_path / "c.pt", OldGPT(SIZES), OrderedDict(SIZES))
    assert legacy.read(ordered).config == legacy.read(plain).config


class GPTConfig:
    """Stands for MyPT's class, whose objects some of its users pickled."""

    def __init__(self, fields: dict) -> None:
        self.__dict__.update(fields)


def test_unknown_config_keys_are_left_out(tmp_path: Path) -> None:
    path = single_file(tmp_path / "a.pt", OldGPT(SIZES), {**SIZES, "future": 1})
    assert "future" not in legacy.read(path).config


def test_the_plain_forward_of_a_conversion_is_that_of_the_era() -> None:
    model = OldGPT({**SIZES, "bias": True})
    idx, _ = batch(SIZES, 0)
    with torch.no_grad():
        same(eras.per_head_logits(model.state_dict(), 2, idx), model(idx))


def test_a_converted_bundle_holds_everything(tmp_path: Path) -> None:
    run = tmp_path / "m"
    model, optimizer = trained(SIZES)
    file = single_file(run / "latest.pt", model, SIZES, optimizer=optimizer)
    before = file.read_bytes()
    done = legacy.convert(run)
    assert done.difference < 1e-5
    assert (done.step, done.has_moments, done.kept) == (3, True, [file])
    assert file.read_bytes() == before
    assert json.loads((run / "training_state.json").read_text()) == {
        "step": 3, "model_dtype_at_save": "float32", "optimizer_file": "optimizer.pt"
    }  # fmt: skip
    saved, direct = bundle.read(run), legacy.read(file)
    assert saved.notices == []
    assert all(torch.equal(v, saved.state_dict[k]) for k, v in direct.state_dict.items())
    for i, entry in direct.optimizer["state"].items():
        assert all(torch.equal(v, saved.optimizer["state"][i][k]) for k, v in entry.items())


def test_a_per_head_bundle_is_rewritten_and_its_files_kept(tmp_path: Path) -> None:
    model, optimizer = trained(SIZES)
    run = old_bundle(tmp_path / "m", model, SIZES, optimizer=optimizer)
    (run / "notes.txt").write_text("mine")
    before = {n: (run / n).read_bytes() for n in ("model.pt", "optimizer.pt")}
    done = legacy.convert(run)
    assert done.difference < 1e-5
    assert {p.name for p in done.kept} == {"model.pt.legacy", "optimizer.pt.legacy"}
    for name, content in before.items():
        assert (run / f"{name}.legacy").read_bytes() == content
        assert (run / name).read_bytes() != content
    assert (run / "notes.txt").read_text() == "mine"
    assert bundle.read(run).notices == []
    with pytest.raises(CheckpointError, match="nothing to convert"):
        legacy.convert(run)
