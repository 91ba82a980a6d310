"""core.GPTConfig against specification 1.2."""

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch

from mypt_fast.cli import main
from mypt_fast.config import ModelConfig
from mypt_fast.core.config import OUR_FIELDS, GPTConfig, strict_compat

DEFAULTS = {
    "batch_size": 32, "block_size": 256, "vocab_size": 50304, "n_embd": 384, "n_head": 6,
    "n_layer": 6, "dropout": 0.2, "bias": False, "use_checkpoint": False, "device": "cpu",
    "use_loss_mask": False, "tie_weights": False, "save_dtype": None, "pos_encoding": "learned",
    "mlp_type": "gelu", "norm_type": "layernorm", "rope_theta": 10000.0, "rope_scale": 1.0,
    "segment_position_reset": True, "neftune_alpha": 0.0, "batch_sampling_mode": "epoch",
    "pad_token_id": None, "episode_min_tokens": 2, "epoch_seed": 1337, "epoch_shuffle": True,
    "epoch_drop_last": True,
}  # fmt: skip


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_the_26_fields_their_order_and_defaults():
    assert list(GPTConfig().to_dict().items()) == list(DEFAULTS.items())


def test_the_device_is_asked_for_when_a_config_is_made(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert GPTConfig().device == "cuda"
    assert GPTConfig(device="cpu").device == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert GPTConfig().device == GPTConfig(device=None).device == "cpu"


def test_fields_by_position_and_by_name():
    config = GPTConfig(4, 16, vocab_size=99, device="cpu")
    assert (config.batch_size, config.block_size, config.vocab_size) == (4, 16, 99)
    assert GPTConfig(*DEFAULTS.values()).to_dict() == DEFAULTS
    assert config == GPTConfig(4, 16, 99, device="cpu") != GPTConfig(5, 16, 99, device="cpu")
    assert isinstance(config, ModelConfig)  # the engine takes it as it is


@pytest.mark.usefixtures("no_gpu")
def test_what_python_sees_are_the_26_fields():
    config = GPTConfig()
    assert dataclasses.asdict(config) == vars(config) == DEFAULTS
    assert [f.name for f in dataclasses.fields(GPTConfig)] == list(DEFAULTS)
    assert dataclasses.replace(config, n_layer=2).n_layer == 2
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    for name in OUR_FIELDS:  # what old weights need is kept, and shown only where it is set
        made = GPTConfig(**{name: True})
        assert GPTConfig.from_dict(made.to_dict()).to_dict() == {**DEFAULTS, name: True}
        assert getattr(made, name) is True


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {"n_embed": 3}, "unexpected keyword argument 'n_embed'"),
        ((4,), {"batch_size": 4}, "multiple values for argument 'batch_size'"),
        (range(99), {}, "takes at most"),
    ],
)
def test_what_no_dataclass_takes_is_a_type_error(args, kwargs, text):
    with pytest.raises(TypeError, match=text):
        GPTConfig(*args, **kwargs)


def test_from_dict_drops_unknown_keys():
    config = GPTConfig.from_dict({"n_layer": 3, "learning_rate": 1, "name": "x", "device": "cpu"})
    assert config.n_layer == 3
    assert not hasattr(config, "name")


def test_nothing_is_validated():
    config = GPTConfig(n_embd=10, n_head=3, mlp_type="relu", dropout=7, device="cpu")
    assert (config.n_embd, config.mlp_type, config.dropout) == (10, "relu", 7)


def test_files_round_trip(tmp_path, capsys):
    path = tmp_path / "deep" / "er" / "config.json"
    config = GPTConfig(n_layer=2, save_dtype="bf16", device="cpu")
    config.save_json(path)
    assert capsys.readouterr().out == f"Saved config to {path}\n"
    assert path.read_text() == json.dumps(config.to_dict(), indent=2)
    assert GPTConfig.load_json(str(path)) == config
    path.write_text(json.dumps({**config.to_dict(), "comment_x": 1}))
    assert GPTConfig.load_json(path) == config


def test_a_bare_filename(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GPTConfig(device="cpu").save_json("config.json")
    assert GPTConfig.load_json("config.json").device == "cpu"
    monkeypatch.setenv("MYPT_STRICT_COMPAT", "1")
    with pytest.raises(FileNotFoundError):
        GPTConfig(device="cpu").save_json("other.json")


def test_as_one_line():
    assert str(GPTConfig(device="cpu")) == (
        "batch_size:32, block_size:256, vocab_size:50304, n_embd:384, n_head:6, n_layer:6, "
        "dropout:0.2, bias:False, device:cpu, use_loss_mask:False, tie_weights:False, "
        "save_dtype:None, batch_sampling_mode:epoch"
    )


def test_a_signature_names_the_26_fields():
    parameters = inspect.signature(GPTConfig).parameters
    assert list(parameters) == [field.name for field in dataclasses.fields(GPTConfig)]
    assert parameters["n_embd"].default == 384


def test_a_torch_device_is_written_as_its_name(tmp_path):
    config = GPTConfig(device=torch.device("cpu"))
    assert config.device == torch.device("cpu")  # as it came
    assert config.to_dict()["device"] == "cpu"
    config.save_json(tmp_path / "config.json")
    assert GPTConfig.load_json(tmp_path / "config.json").device == "cpu"


@pytest.mark.parametrize(
    ("value", "is_strict"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_one_word_means_the_same_to_every_part(value, is_strict, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setenv("MYPT_STRICT_COMPAT", value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mypt_fast.settings.resolve", lambda given, **options: seen.update(options) or 1 / 0
    )
    assert main(["train", "--model_name", "x"]) == 1
    assert seen["strict_compat"] is is_strict
    assert strict_compat() is is_strict
