"""Bundles of core.GPT (specification 5) and the four cases of CheckpointManager (1.5)."""

import json
import shutil

import numpy as np
import pytest
import torch
from core_models import LETTERS, LLAMA, OPTIONS, SIZES, char_model
from test_core_model import random_model

from mypt_fast.checkpoint import bundle
from mypt_fast.core import checkpoint as core
from mypt_fast.core import files
from mypt_fast.core.checkpoint import CheckpointManager, get_model_info, load_model
from mypt_fast.core.config import GPTConfig
from mypt_fast.core.model import GPT
from mypt_fast.errors import CheckpointError, ConfigError, IntegrityError

CHARS = {"token_kind": "char", "chars": list(LETTERS)}
IDX = torch.tensor([[1, 5, 9, 2]])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


def config(**options):
    return GPTConfig(**{**SIZES, **options})


def stepped(model):
    """An optimizer that has taken a step."""
    optimizer = model.configure_optimizer(1e-2)
    model(IDX, IDX)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def saved(name="m", step=7, save_dtype=None, **options):
    model = random_model(**options)
    optimizer = stepped(model)
    model.save_checkpoint_bundle(
        f"checkpoints/{name}", step, optimizer.state_dict(), {"max_iters": 9}, save_dtype
    )
    return model, optimizer


def start(name="m", cfg=None, text=LETTERS, **more):
    made = cfg or config()
    return CheckpointManager(name).initialize_for_training(made, "char", text, 1e-3, **more)


# the files


@pytest.mark.parametrize("save_dtype", [None, "bf16", "fp16", "float32"])
def test_a_bundle_is_the_one_of_specification_5(here, save_dtype):
    (here / "preset.json").write_text('{"name": "x"}')
    model = random_model(**OPTIONS["C"])
    optimizer = stepped(model)
    model.save_checkpoint_bundle(
        "checkpoints/m", step=3, optimizer_state=optimizer.state_dict(),
        training_config={"max_iters": 5, "config_file": "preset.json"}, save_dtype=save_dtype,
    )  # fmt: skip
    folder = here / "checkpoints/m"
    assert {p.name for p in folder.iterdir()} == {
        "model.pt", "config.json", "tokenizer.json", "training_state.json", "optimizer.pt",
        "original_config.json", "manifest.json",
    }  # fmt: skip
    stored = torch.load(folder / "model.pt", weights_only=True)
    assert list(stored) == ["state_dict", "checkpoint_dtype", "model_dtype"]
    assert stored["checkpoint_dtype"] == save_dtype
    assert stored["model_dtype"] == "float32"
    dtype = files.dtype_named(save_dtype) or torch.float32
    assert list(stored["state_dict"]) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(stored["state_dict"][name], value.to(dtype)), name
    state = json.loads((folder / "training_state.json").read_text())
    dtypes = ["checkpoint_dtype"] if save_dtype else []
    keys = ["step", "training_config", "model_dtype_at_save", *dtypes, "optimizer_file"]
    assert list(state) == keys
    assert (state["step"], state["model_dtype_at_save"]) == (3, "float32")
    assert state["optimizer_file"] == "optimizer.pt"
    assert json.loads((folder / "config.json").read_text()) == model.config.to_dict()
    assert json.loads((folder / "tokenizer.json").read_text()) == model.tokenizer.get_state()
    assert (folder / "original_config.json").read_text() == '{"name": "x"}'
    moments = torch.load(folder / "optimizer.pt", weights_only=True)
    assert [g["weight_decay"] for g in moments["param_groups"]] == [0.1, 0.0]
    again = char_model(**OPTIONS["C"])
    again.load_state_dict(stored["state_dict"])  # as MyPT reads it
    again.configure_optimizer().load_state_dict(moments)


def test_the_least_that_a_bundle_says(here):
    char_model().save_checkpoint_bundle(here / "deep/m")
    state = json.loads((here / "deep/m/training_state.json").read_text())
    assert state == {"model_dtype_at_save": "float32"}
    assert not (here / "deep/m/optimizer.pt").exists()
    assert GPT.load(here / "deep/m")[2:] == (None, None)


def test_the_configs_save_dtype_is_the_default(here):
    random_model(save_dtype="bf16").save_checkpoint_bundle("m")
    assert torch.load(here / "m/model.pt")["checkpoint_dtype"] == "bf16"


def test_a_training_config_of_any_values_is_written(here):
    training = {"log": here, "lr": np.float64(0.5), "ids": (1, 2)}
    char_model().save_checkpoint_bundle("m", 1, training_config=training)
    state = json.loads((here / "m/training_state.json").read_text())
    assert state["training_config"] == {"log": str(here), "lr": 0.5, "ids": [1, 2]}


def test_what_others_keep_in_the_directory_stays(here):
    folder = here / "checkpoints/m"
    folder.mkdir(parents=True)
    (folder / "latest.pt").write_bytes(b"old")
    (folder / "gold_selection_state.json").write_text('{"gold_step": 3}')
    (folder / "original_config.json").write_text("{}")
    saved()
    assert (folder / "latest.pt").read_bytes() == b"old"
    assert json.loads((folder / "gold_selection_state.json").read_text()) == {"gold_step": 3}
    assert (folder / "original_config.json").read_text() == "{}"


def test_a_tied_matrix_is_stored_once(here):
    """Q-24: MyPT stores the embedding twice when it casts."""
    model = random_model(**OPTIONS["C"], vocab_size=4096)
    model.tokenizer = None
    model.save_checkpoint_bundle("tied", save_dtype="bf16")
    model.save("raw")
    one = 2 * 4096 * 12
    assert one < (here / "tied/model.pt").stat().st_size < 2 * one
    assert 2 * one < (here / "raw/model.pt").stat().st_size < 4 * one


def test_save_writes_the_weights_alone(here):
    model = random_model()
    assert model.save("w") is None
    assert [p.name for p in (here / "w").iterdir()] == ["model.pt"]
    raw = torch.load(here / "w/model.pt", weights_only=True)
    assert list(raw) == list(model.state_dict())
    assert torch.equal(raw["lm_head.weight"], model.lm_head.weight)
    model.save("w", "half")
    wrapped = torch.load(here / "w/model.pt", weights_only=True)
    assert wrapped["checkpoint_dtype"] == "fp16"
    assert wrapped["state_dict"]["lm_head.weight"].dtype is torch.float16


def test_save_over_a_bundle_leaves_one_that_loads(here):
    model, _ = saved(save_dtype="bf16")
    with torch.no_grad():
        model.lm_head.bias.fill_(3.0)
    model.save("checkpoints/m")
    again = GPT.load("checkpoints/m")[0]
    assert (again.lm_head.bias == 3.0).all()


def test_a_failed_save_leaves_the_weights_that_were_there(here, monkeypatch):
    model, _ = saved()
    before = (here / "checkpoints/m/model.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for save in (model.save, model.save_checkpoint_bundle):
        with pytest.raises(CheckpointError, match="No space left on device"):
            save("checkpoints/m")
    assert (here / "checkpoints/m/model.pt").read_bytes() == before
    assert not list(here.glob("checkpoints/**/*.tmp*"))


# GPT.load


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("save_dtype", [None, "bf16"])
def test_load_returns_what_was_saved(case, save_dtype):
    model, optimizer = saved(save_dtype=save_dtype, **OPTIONS[case])
    before = torch.get_rng_state()
    found, tokenizer, step, moments = GPT.load("checkpoints/m")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(found) is GPT
    assert not found.training
    assert step == 7
    assert tokenizer == model.tokenizer.get_state()
    assert found.decode([1, 2]) == "bc"
    for name, value in model.state_dict().items():  # exact: Q-3
        assert torch.equal(found.state_dict()[name], value), name
    for n, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(moments["state"][n]["exp_avg"], entry["exp_avg"])
    assert found.config.to_dict() == model.config.to_dict()
    if model.config.tie_weights:
        assert found.lm_head.weight is found.token_embedding_table.weight


def test_load_without_the_optimizer():
    model, _ = saved(save_dtype="bf16")
    found, _, step, moments = GPT.load("checkpoints/m", load_optimizer=False)
    assert (step, moments) == (7, None)
    assert found.lm_head.weight.dtype is torch.float32  # a CPU: rounded values in fp32
    assert torch.equal(found.lm_head.weight, model.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize("name", ["fp32", "float32", "f32", "fp16", "float16", "f16", "half",
                                  "bf16", "bfloat16"])  # fmt: skip
@pytest.mark.parametrize("save_dtype", [None, "bf16"])
def test_load_dtype_is_what_it_says(name, save_dtype):
    """Q-14: MyPT fails here on every bf16 bundle."""
    saved(save_dtype=save_dtype, **LLAMA)
    model = GPT.load("checkpoints/m", load_dtype=name)[0]
    expected = {"f": torch.float32, "h": torch.float16, "b": torch.bfloat16}[name[0]]
    if "16" in name and name[0] == "f":
        expected = torch.float16
    assert model.lm_head.weight.dtype is expected
    assert model.rope_cos.dtype is torch.float32
    assert model(IDX)[0].isfinite().all()
    assert load_model("m", load_dtype=name).lm_head.weight.dtype is expected


@pytest.mark.parametrize(
    ("stored", "capability", "to_train", "expected"),
    [
        ("bf16", (8, 0), False, torch.bfloat16),
        ("bf16", (7, 5), False, torch.float16),
        ("bf16", (9, 0), True, torch.float32),  # bf16 weights do not move
        ("fp16", (9, 0), False, torch.float32),
        (None, (9, 0), False, torch.float32),
    ],
)
def test_what_weights_are_kept_in_on_a_gpu(monkeypatch, stored, capability, to_train, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    saved = bundle.Bundle("m", {}, {}, training_state={"checkpoint_dtype": stored})
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert files.resting_dtype(saved, gpu, to_train) is expected
    assert files.resting_dtype(saved, cpu, to_train) is torch.float32
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "1")
    strict = expected if stored != "bf16" or not to_train else torch.bfloat16
    assert files.resting_dtype(saved, gpu, to_train) is strict


def test_a_device_that_is_none(here):
    saved()
    path = here / "checkpoints/m/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "gpu"}))
    with pytest.raises(ValueError, match=r"unknown device 'gpu'; edit config\.json"):
        GPT.load("checkpoints/m")
    assert GPT.load("checkpoints/m", map_location="cpu")[0].config.device == "cpu"


def test_a_dataset_whose_special_tokens_moved_is_told(here, capsys):
    new = core.Tokenizer(GPTConfig(device="cpu")).get_state()
    ids = {"myPT_user_open": 50257, "myPT_system_open": 50258}
    old = {**new, "special_tokens_by_name": ids}
    core.check_tokenizers(old, new, "m")
    line = capsys.readouterr().err
    assert "m: 2 special tokens have other ids in the dataset, myPT_user_open 50259 for" in line
    core.check_tokenizers(new, new, "m")
    core.check_tokenizers(new, {"token_kind": "gpt2"}, "m")
    assert capsys.readouterr().err == ""


def test_an_unknown_dtype_is_a_value_error():
    model, _ = saved()
    with pytest.raises(ValueError, match="unknown dtype 'int8'; use fp32"):
        GPT.load("checkpoints/m", load_dtype="int8")
    for save in (model.save, model.save_checkpoint_bundle):
        with pytest.raises(ValueError, match="unknown dtype 'int8'"):
            save("other", save_dtype="int8")


def test_bundles_of_other_writers(here):
    """MyPT's own: a raw or a wrapped state_dict, JSON without manifest, a minimal tokenizer."""
    model = random_model(**OPTIONS["C"])
    folder = here / "checkpoints/theirs"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "future": 1}))
    (folder / "tokenizer.json").write_text(json.dumps(CHARS))
    (folder / "training_state.json").write_text('{"step": 4, "optimizer_file": "optimizer.pt"}')
    torch.save(stepped(model).state_dict(), folder / "optimizer.pt")
    weights = model.state_dict()
    for content in (weights, {"state_dict": weights, "checkpoint_dtype": "bf16"}):
        torch.save(content, folder / "model.pt")
        found, _, step, moments = GPT.load(folder)
        assert step == 4
        assert moments is not None
        torch.testing.assert_close(found(IDX)[0], model.eval()(IDX)[0])
    # a tied bundle whose two matrices differ: the embedding wins
    torch.save({**weights, "lm_head.weight": torch.zeros(13, 12)}, folder / "model.pt")
    torch.testing.assert_close(GPT.load(folder)[0](IDX)[0], model(IDX)[0])


def test_a_model_saved_on_a_gpu_loads_without_one(here, capsys):
    saved(device="cpu")
    path = here / "checkpoints/m"
    shutil.rmtree(path)
    model = random_model()
    model.config.device = "cuda"
    model.save_checkpoint_bundle(path)
    found = GPT.load(path)[0]
    assert found.config.device == "cpu"
    assert "no GPU here, using the CPU" in capsys.readouterr().err
    model.config.device = "cpu"
    assert GPT.load(path, map_location=torch.device("cpu"))[0].config.device == "cpu"


@pytest.mark.parametrize("absent", ["config.json", "model.pt"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_missing_file_is_named(here, absent, with_manifest):
    saved()
    (here / "checkpoints/m" / absent).unlink()
    if not with_manifest:
        (here / "checkpoints/m/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"m/{absent} is missing"):
        GPT.load("checkpoints/m")


def test_nothing_there(here):
    with pytest.raises(FileNotFoundError, match=r"none/config\.json is missing"):
        GPT.load("none")
    with pytest.raises(FileNotFoundError, match=r"none/latest\.pt is missing"):
        GPT.load_legacy("none/latest.pt")
    assert list(here.iterdir()) == []


def foreign(here, cfg=None, weights=None, **members):
    """A bundle without manifest whose parts may not fit."""
    model = random_model()
    folder = here / "checkpoints/f"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), **(cfg or {})}))
    state = {**model.state_dict(), **(weights or {})}
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "model.pt")
    for name, content in members.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("cfg", "weights", "text"),
    [
        ({}, {"ln_f.bias": None}, r"ln_f\.bias: expected \(12,\), found no such key"),
        ({}, {"extra": torch.zeros(2)}, r"extra: expected no such key, found \(2,\)"),
        ({}, {"ln_f.bias": torch.zeros(5)}, r"ln_f\.bias: expected \(12,\), found \(5,\)"),
        ({"block_size": 9}, {}, r"position_embedding.*expected \(9, 12\), found \(8, 12\)"),
        ({"vocab_size": 1 << 23}, {}, r"token_embedding.*expected \(8388608, 12\), found \(13,"),
        ({"bias": True}, {}, r"blocks\.0\.sa\.qkv\.bias: expected \(36,\), found no such key"),
    ],
)
def test_weights_that_do_not_fit_are_one_line_with_key_expected_found(here, cfg, weights, text):
    folder = foreign(here, cfg, weights)
    with pytest.raises(RuntimeError, match=text) as e:
        GPT.load(folder)
    assert isinstance(e.value, CheckpointError)
    assert "\n" not in str(e.value)


def test_a_config_that_is_none(here):
    with pytest.raises(ConfigError, match="n_layer: expected a whole number; found 'two'"):
        GPT.load(foreign(here, {"n_layer": "two"}))


def test_a_bundle_of_a_newer_format(here):
    saved()
    path = here / "checkpoints/m/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(IntegrityError, match="unknown schema; found 99; this version reads"):
        GPT.load("checkpoints/m")


def test_damaged_weights_are_found(here):
    saved()
    path = here / "checkpoints/m/model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="is not the file that was saved"):
        GPT.load("checkpoints/m")


@pytest.mark.parametrize("state", [None, {"token_kind": "word"}, {"token_kind": "char"}])
def test_a_tokenizer_that_cannot_be_used_is_only_a_warning(here, capsys, state):
    members = {} if state is None else {"tokenizer": state}
    model, found, _, _ = GPT.load(foreign(here, **members))
    assert found == state
    assert model(IDX)[0].shape == (1, 4, 13)
    if state is None or state["token_kind"] != "char":
        assert "using a new char tokenizer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no vocabulary yet"):
        model.generate("a", 1)


# configure_optimizer


def test_the_two_groups_of_1_4(capsys):
    for options in ({}, OPTIONS["C"]):
        model = char_model(**options)
        optimizer = model.configure_optimizer(2e-3, 0.3)
        assert type(optimizer) is torch.optim.AdamW
        names = {id(p): n for n, p in model.named_parameters()}
        found = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
        plain = [n for n, p in model.named_parameters()
                 if p.dim() == 1 or "embedding" in n or "ln" in n]  # fmt: skip
        assert found == [[n for n in names.values() if n not in plain], plain]
        assert ("lm_head.weight" in found[0]) is not model.config.tie_weights
        for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
            assert group["weight_decay"] == decay
            assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.9, 0.95), 1e-8)
    total = sum(p.numel() for p in char_model().parameters())
    first = capsys.readouterr().out.splitlines()[0]
    assert sum(int(w.replace(",", "")) for w in first.split() if w[0].isdigit()) == total


def test_frozen_parameters_are_left_out():
    model = char_model()
    model.blocks.requires_grad_(False)
    optimizer = model.configure_optimizer()
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 6


@pytest.mark.parametrize(
    "break_it",
    [
        lambda s: s["param_groups"].pop(),
        lambda s: s["param_groups"][0]["params"].pop(),
        lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
        lambda s: s.pop("state"),
        lambda s: s["state"][0].pop("exp_avg_sq"),
    ],
)
def test_a_state_that_does_not_fit_is_reported_and_left(capsys, break_it):
    model = random_model()
    state = stepped(model).state_dict()
    assert model.configure_optimizer(optimizer_state=state).state
    state = {"state": {k: dict(v) for k, v in state["state"].items()},
             "param_groups": [dict(g) for g in state["param_groups"]]}  # fmt: skip
    break_it(state)
    optimizer = model.configure_optimizer(1e-4, optimizer_state=state)
    assert "Optimizer state was not loaded" in capsys.readouterr().out
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-4
    model(IDX, IDX)[1].backward()
    optimizer.step()


# CheckpointManager


def test_looking_for_a_model_makes_no_directory(here, monkeypatch):
    """Q-21."""
    manager = CheckpointManager("none")
    assert manager.model_name == "none"
    assert manager.checkpoint_dir == "checkpoints/none"
    assert manager.get_path() == "checkpoints/none/model.pt"
    assert manager.get_path("latest.pt") == "checkpoints/none/latest.pt"
    assert not manager.exists()
    assert get_model_info("none") == {}
    with pytest.raises(FileNotFoundError, match="no checkpoint in checkpoints/none"):
        load_model("none")
    assert list(here.iterdir()) == []
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "1")
    CheckpointManager("none")
    assert (here / "checkpoints/none").is_dir()


def test_what_exists(here):
    saved()
    manager = CheckpointManager("m")
    assert manager.exists()
    assert manager.exists_new_format()
    assert not manager.exists_legacy_format()
    (here / "other").mkdir()
    (here / "other/final.pt").write_bytes(b"")
    alone = CheckpointManager("other", here)
    assert not alone.exists()  # a lone final.pt does not count
    assert alone.exists_legacy_format("final.pt")
    (here / "other/latest.pt").write_bytes(b"")
    assert alone.exists()
    assert not alone.exists_new_format()


def test_a_fresh_char_model():
    torch.manual_seed(0)
    cfg = config(vocab_size=256)
    model, optimizer, step = start(cfg=cfg, text="banana")
    assert step == 0
    assert cfg.vocab_size == model.config.vocab_size == 3  # the passed config is changed
    assert model.config is cfg
    assert model.tokenizer.chars == ["a", "b", "n"]
    assert model.training
    assert not optimizer.state
    model = start(cfg=config(), text=None, dataset_tokenizer_state=CHARS)[0]
    assert model.tokenizer.chars == list(LETTERS)
    assert model.config.vocab_size == 13
    with pytest.raises(ValueError, match="a char model needs its characters"):
        start(text=None)


def test_a_fresh_gpt2_model():
    cfg = config(n_embd=4, n_layer=1, vocab_size=50300)
    made = CheckpointManager("m").initialize_for_training(cfg, "gpt2", None, 1e-3)
    assert made[0].config.vocab_size == cfg.vocab_size == 50304
    state = {"token_kind": "gpt2"}
    made = CheckpointManager("m").initialize_for_training(
        config(n_embd=4, n_layer=1), "char", None, 1e-3, dataset_tokenizer_state=state
    )
    assert made[0].tokenizer.token_kind == "gpt2"


def test_resuming_takes_everything_from_the_checkpoint():
    model, optimizer = saved(dropout=0.25)
    cfg = config(dropout=0.9, n_layer=5, batch_size=99)
    found, resumed, step = start(cfg=cfg, init_from_model="not looked at")
    assert step == 7
    assert (found.config.n_layer, found.config.dropout, found.config.batch_size) == (2, 0.25, 32)
    assert found.training
    assert cfg.n_layer == 5
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    for group, (p, q) in zip(
        resumed.param_groups, zip(found.parameters(), model.parameters(), strict=True), strict=False
    ):
        assert torch.equal(resumed.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
        assert group["betas"] == (0.9, 0.95)


def test_training_that_is_interrupted_and_resumed_is_the_training_that_was_not():
    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(IDX, IDX)[1].backward()
            optimizer.step()

    straight, optimizer, _ = start("a", config(dropout=0.0))
    torch.manual_seed(4)
    straight.init_weights(4)
    run(straight, optimizer, 4)
    first, optimizer, _ = start("b", config(dropout=0.0))
    first.init_weights(4)
    run(first, optimizer, 2)
    first.save_checkpoint_bundle("checkpoints/b", 2, optimizer.state_dict(), save_dtype="bf16")
    again, optimizer, step = start("b")
    run(again, optimizer, 2)
    assert step == 2
    for p, q in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_dataset_of_another_tokenizer_cannot_continue():
    saved()
    for state in ({"token_kind": "gpt2"}, {"token_kind": "char", "chars": ["x"]}):
        with pytest.raises(ValueError, match=r"prepared with another tokenizer; .*expected"):
            start(text=None, dataset_tokenizer_state=state)
    assert start(text=None, dataset_tokenizer_state=CHARS)[2] == 7


NEW = {
    "batch_size": 3, "dropout": 0.5, "use_loss_mask": True, "use_checkpoint": True,
    "neftune_alpha": 4.0, "segment_position_reset": False, "batch_sampling_mode": "random",
    "epoch_seed": 5, "episode_min_tokens": 9, "pad_token_id": 1, "save_dtype": "bf16",
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_fine_tuning_takes_all_of_the_new_config_but_the_architecture(options):
    """Q-15: MyPT drops most of it."""
    base, _ = saved("base", **options)
    cfg = config(**NEW, n_layer=9, n_embd=99, mlp_type="gelu", bias=True)
    model, optimizer, step = start("new", cfg, init_from_model="base")
    assert step == 0
    assert not optimizer.state
    assert model.training
    for key, value in NEW.items():
        assert getattr(model.config, key) == value, key
    for key in ("n_layer", "n_embd", "mlp_type", "pos_encoding", "bias", "vocab_size"):
        assert getattr(model.config, key) == getattr(base.config, key), key
    assert [b.dropout for b in model.blocks] == [b.sa.dropout_p for b in model.blocks] == [0.5] * 2
    assert all(b.use_checkpoint for b in model.blocks)
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.tokenizer.config is model.config


def test_fine_tuning_to_another_context():
    base, _ = saved("base")
    longer = start("x", config(block_size=500), init_from_model="base")[0]
    table = longer.position_embedding_table.weight
    assert table.shape == (500, 12)
    assert torch.equal(table[:8], base.position_embedding_table.weight)
    assert table[8:].std().item() == pytest.approx(0.02, rel=0.1)  # MyPT draws N(0, 1)
    shorter = start("x", config(block_size=4), init_from_model="base")[0]
    assert torch.equal(
        shorter.position_embedding_table.weight, base.position_embedding_table.weight[:4]
    )
    saved("rope", **LLAMA)
    cfg = config(block_size=16, rope_scale=4.0, rope_theta=500.0)
    rope = start("x", cfg, init_from_model="rope")[0]
    fresh = char_model(**LLAMA, block_size=16, rope_scale=4.0, rope_theta=500.0)
    assert torch.equal(rope.rope_cos, fresh.rope_cos)


def test_fine_tuning_ties_by_the_mean():
    base, _ = saved("base")
    model = start("x", config(tie_weights=True), init_from_model="base")[0]
    assert model.lm_head.weight is model.token_embedding_table.weight
    mean = (base.lm_head.weight + base.token_embedding_table.weight) / 2
    torch.testing.assert_close(model.lm_head.weight, mean)
    assert model.config.tie_weights
    saved("tied", **OPTIONS["C"])
    assert start("x", config(), init_from_model="tied")[0].config.tie_weights  # stays


def test_fine_tuning_needs_the_same_tokens(here):
    saved("base")
    with pytest.raises(FileNotFoundError, match="no model to start from in checkpoints/none"):
        start("x", init_from_model="none")
    assert not (here / "checkpoints/none").exists()
    manager = CheckpointManager("x")
    with pytest.raises(ValueError, match="token_kind: expected 'gpt2', found 'char'"):
        manager.initialize_for_training(config(), "gpt2", None, 1e-3, init_from_model="base")
    other = {"token_kind": "char", "chars": ["x", "y"]}
    with pytest.raises(ValueError, match="another tokenizer"):
        start("x", text=None, init_from_model="base", dataset_tokenizer_state=other)
    for state in (None, {"token_kind": "word"}, {"token_kind": "char", "chars": None}):
        folder = foreign(here, **({} if state is None else {"tokenizer": state}))
        with pytest.raises(ValueError, match=r"tokenizer state is not usable|has no chars"):
            start("x", init_from_model="f")
        shutil.rmtree(folder)


def test_fine_tuning_from_another_root_and_from_a_path(here):
    saved("base")
    shutil.move(here / "checkpoints", here / "elsewhere")
    args = (config(), "char", LETTERS, 1e-3)
    assert CheckpointManager("x", "elsewhere").initialize_for_training(*args, "base")[2] == 0
    assert CheckpointManager("x").initialize_for_training(*args, "elsewhere/base/")[2] == 0


@pytest.mark.parametrize("case", ["fresh", "resume", "fine-tune"])
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_freezing_applies_to_every_start(case, options):
    """Q-16: MyPT ignores it for fresh models, and crashes with rope."""
    name, source = "m", None
    if case != "fresh":
        saved("m", **options)
    if case == "fine-tune":
        name, source = "x", "m"
    model, optimizer, _ = start(
        name, config(**options), init_from_model=source, freeze_layers=1, freeze_embeddings=True
    )
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n, _ in model.named_parameters() if n.startswith("blocks.0.") or "embedding" in n
    }
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_freezing_more_layers_than_there_are():
    model = char_model()
    CheckpointManager._apply_layer_freezing(model, 99, False)
    assert not any(p.requires_grad for p in model.blocks.parameters())
    assert model.token_embedding_table.weight.requires_grad


def test_a_char_model_is_trained_saved_and_written_with(here):
    """Q-12: broken in MyPT since 2025-12."""
    model, optimizer, _ = start(text="hello world")
    model.save_checkpoint_bundle("checkpoints/m", 1, optimizer.state_dict())
    again = load_model("m")
    assert not again.training
    assert again.encode("hello") == model.encode("hello")
    assert again.generate("hello", 5, 0) == model.generate("hello", 5, 0)
    assert start(text=None, dataset_tokenizer_state=model.tokenizer.get_state())[2] == 1
    with pytest.raises(KeyError):
        again.generate("Z", 1)


def test_get_model_info(here):
    model, _ = saved()
    info = get_model_info("m")
    assert list(info) == ["config", "tokenizer", "training_state", "format"]
    assert info["config"] == model.config.to_dict()
    assert info["tokenizer"] == model.tokenizer.get_state()
    assert info["training_state"]["step"] == 7
    assert info["format"] == "json"
    foreign(here)
    assert list(get_model_info("f")) == ["config", "format"]


def legacy_bundle(model):
    return bundle.Bundle(
        "latest.pt", model.config.to_dict(), model.state_dict(), CHARS, {"step": 5}
    )


def test_single_files_go_through_the_module_that_knows_them(here, monkeypatch):
    """Which file, when: what is in them is `checkpoint.legacy`'s."""
    model, read = random_model().eval(), []

    class Legacy:
        @staticmethod
        def read(path, optimizer):
            read.append((path.name, optimizer))
            return legacy_bundle(model)

        @staticmethod
        def info(path):
            return {"config": {"n_layer": 2}, "training_state": {"step": 5}}

    monkeypatch.setattr(files, "legacy", Legacy)
    monkeypatch.setattr(core, "legacy", Legacy)
    folder = here / "checkpoints/old"
    folder.mkdir(parents=True)
    for name in ("final.pt", "other.pt"):
        (folder / name).write_bytes(b"x")
    assert load_model("old")(IDX)[0].shape == (1, 4, 13)
    CheckpointManager.load_for_inference("old", legacy_filename="other.pt")
    with pytest.raises(FileNotFoundError):
        load_model("old", base_dir="elsewhere")
    start("new", config(), init_from_model="old")
    assert start("old")[2] == 0  # a lone final.pt is not resumed
    (folder / "latest.pt").write_bytes(b"x")
    found, _, step = start("old")
    assert step == 5
    assert torch.equal(found(IDX)[0], model(IDX)[0])
    load_model("old")
    assert read == [
        ("final.pt", False), ("other.pt", False),  # to write with
        ("final.pt", True), ("latest.pt", True), ("latest.pt", False),
    ]  # fmt: skip
    assert get_model_info("old") == {
        "config": {"n_layer": 2}, "tokenizer": None, "training_state": {"step": 5},
        "format": "legacy",
    }  # fmt: skip
    found.save_checkpoint_bundle(folder, 6)  # from now on the bundle hides the files
    assert GPT.load(folder)[2] == 6
    assert load_model(
        "old",
    ).tokenizer.chars == list(LETTERS)
    assert (folder / "latest.pt").read_bytes() == b"x"
    assert get_model_info("old")["format"] == "json"
    assert len(read) == 5


def test_load_model_needs_only_a_name():
    model, _ = saved()
    found = core.load_model("m")
    assert isinstance(found, GPT)
    torch.testing.assert_close(found(IDX)[0], model.eval()(IDX)[0])
    assert CheckpointManager.load_for_inference("m", "checkpoints").config.n_layer == 2


def test_a_training_config_of_numpy_numbers_and_paths_is_written(here):
    told = {"max_iters": np.int64(3), "learning_rate": np.float64(0.5), "dataset_dir": here}
    char_model().save_checkpoint_bundle("m", training_config=told)
    kept = json.loads((here / "m/training_state.json").read_text())["training_config"]
    assert kept == {"max_iters": 3, "learning_rate": 0.5, "dataset_dir": str(here)}
