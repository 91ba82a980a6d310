import json

import pytest

from mypt_fast import settings
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.settings import DataConfig

# A value that is none of the defaults for each source, by field. Every kind of field is here:
# whole number, number, boolean, choice, text, text that may be absent, count or share.
RUN_FIELDS = {
    "batch_size": (10, 20, 30),
    "dropout": (0.3, 0.4, 0.5),
    "save_dtype": ("bf16", "fp16", "fp32"),
    "use_checkpoint": (True, False, True),
    "max_iters": (2000, 3000, 4000),
    "learning_rate": (1e-3, 2e-3, 3e-3),
    "warmup_iters": (5, 0.25, 7),
    "use_amp": (False, True, False),
    "amp_dtype": ("fp16", "bf16", "fp16"),
    "grad_accum_steps": (2, 3, 4),
    "log_file": ("a.jsonl", "b.jsonl", "c.jsonl"),
    "eval_seed": (1, 2, 3),
}
MODEL_KEYS = set(ModelConfig().to_dict())
# training_state.json as MyPT writes it (its specification, section 5)
MYPT_STATE = {
    "step": 400,
    "training_config": {
        "max_iters": 500, "eval_interval": 40, "eval_iters": 30, "learning_rate": 1e-4,
        "start_step": 0, "save_dtype": "bf16", "warmup_iters": 25, "grad_clip": 0.5,
        "grad_accum_steps": 4, "config_file": "configs/old.json", "dataset_dir": "data/old",
        "gold_selection": {
            "strategy": "external_gate", "note": "MyPT keeps what it was given",
            "guards": {"overfit_ratio": 6.0, "consecutive_rises": 3, "why": "lenient"},
            "external_gate": {"enabled": True, "script": "gate.py", "metric_goal": "max"},
        },
        "token_accuracy_saturation": {
            "enabled": True, "window": 5, "min_steps_before_check": 150, "min_delta": 0.002,
            "gap_growth_threshold": 0.01, "action": "log", "saturation_detected": False,
            "saturation_step": None, "last_train_masked_token_acc": 0.5,
            "last_val_masked_token_acc": 0.4, "last_masked_acc_gap": 0.1,
            "last_saturation_reason": None,
        },
        "model_params": {
            "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 64,
            "dropout": 0.1, "bias": False, "pos_encoding": "learned", "mlp_type": "gelu",
            "norm_type": "layernorm", "total_params": 9000,
        },
    },
    "model_dtype_at_save": "float32", "checkpoint_dtype": "bf16", "optimizer_file": "optimizer.pt",
}  # fmt: skip
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 64}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_preset(folder):
    def write(name="mine", **content):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def write_run(folder):
    """A function that leaves a saved run behind; only its JSON is read before torch."""

    def write(name="old", config=None, state=None):
        run = folder / "checkpoints" / name
        run.mkdir(parents=True)
        (run / "model.pt").write_bytes(b"")
        (run / "config.json").write_text(json.dumps({**ModelConfig().to_dict(), **(config or {})}))
        if state is not None:
            (run / "training_state.json").write_text(json.dumps(state))
        return name

    return write


def section(out, key):
    return getattr(out.model if key in MODEL_KEYS else out.train, key)


@pytest.mark.parametrize("key", RUN_FIELDS)
def test_a_run_setting_comes_from_the_strongest_source_that_names_it(key, write_preset, write_run):
    saved, preset, flag = RUN_FIELDS[key]
    default = section(settings.resolve({}), key)
    config, training = ({key: saved}, {}) if key in MODEL_KEYS else ({}, {key: saved})
    run = write_run(config=config, state={"step": 1, "training_config": training})
    silent, loud = write_preset("silent"), write_preset("loud", **{key: preset})

    def found(typed=None, **kwargs):
        return section(settings.resolve(typed or {}, **kwargs), key)

    assert default != saved
    assert found(model_name=run) == saved
    assert found(model_name=run, config_file=silent) == saved
    assert found(model_name=run, config_file=loud) == preset
    assert found({key: flag}, model_name=run, config_file=loud) == flag
    assert found(config_file=loud) == preset
    assert found({key: flag}) == flag


@pytest.mark.parametrize("key", [k for k in RUN_FIELDS if k not in ("save_dtype", "log_file")])
def test_typing_the_default_overrides_the_file(key, write_preset):
    default = section(settings.resolve({}), key)
    loud = write_preset(**{key: RUN_FIELDS[key][0]})
    assert section(settings.resolve({key: default}, config_file=loud), key) == default


def test_a_nested_section_is_replaced_as_a_whole(write_preset, write_run):
    run = write_run(state={"training_config": {"eval_sets": {"a": "x", "b": "y"}}})
    assert settings.resolve({}, model_name=run).train.eval_sets == {"a": "x", "b": "y"}
    preset = write_preset(eval_sets={"c": "z"})
    out = settings.resolve({}, model_name=run, config_file=preset)
    assert out.train.eval_sets == {"c": "z"}


def test_phases_survive_the_way_from_preset_to_settings(write_preset):
    phases = [{"dataset_dir": "a", "until_iter": 3}, {"dataset_dir": "b"}]
    out = settings.resolve({}, config_file=write_preset(curriculum={"phases": phases}))
    assert [p.dataset_dir for p in out.train.curriculum.phases] == ["a", "b"]


def test_the_global_batch_counts_accumulation():
    assert settings.resolve({"batch_size": 6, "grad_accum_steps": 4}).global_batch == 24


def test_architecture_flags_shape_a_run_that_has_no_preset():
    out = settings.resolve({"n_embd": 24, "n_head": 3, "pos_encoding": "rope"})
    assert (out.model.n_embd, out.model.n_head, out.model.pos_encoding) == (24, 3, "rope")
    assert out.notices == []


@pytest.mark.parametrize("source", ["preset", "saved run"])
def test_an_architecture_flag_is_ignored_with_one_notice_that_names_both(
    source, write_preset, write_run
):
    if source == "preset":
        given, name = {"config_file": write_preset(**SHAPE)}, "mine.json"
    else:
        given, name = {"model_name": write_run(config=SHAPE)}, "checkpoints/old"
    typed = {"n_embd": 100, "n_layer": 2, "dropout": 0.5, "device": "cpu", "batch_size": 3}
    out = settings.resolve(typed, **given)
    assert (out.model.n_embd, out.model.n_layer) == (16, 2)
    assert (out.model.dropout, out.model.device, out.model.batch_size) == (0.5, "cpu", 3)
    assert len(out.notices) == 1  # n_layer says what the file says: nothing to tell
    for word in ("--n_embd", "100", "16", name):
        assert word in out.notices[0]
    with pytest.raises(ConfigError, match=r"--n_embd 100 is ignored: .* has 16"):
        settings.resolve(typed, **given, strict=True)
    assert settings.resolve({"n_layer": 2}, **given, strict=True).notices == []


def test_a_preset_of_another_architecture_cannot_continue_a_run(write_preset, write_run):
    run = write_run(config=SHAPE)
    other = write_preset("other", **{**SHAPE, "n_layer": 3})
    with pytest.raises(ConfigError) as error:
        settings.resolve({}, model_name=run, config_file=other)
    text = str(error.value)
    for word in ("checkpoints/old", "other.json", "n_layer is 2 in the run and 3 in the preset"):
        assert word in text
    same = write_preset("same", **SHAPE, dropout=0.7)
    assert settings.resolve({}, model_name=run, config_file=same).model.dropout == 0.7


def test_the_tokenizer_decides_the_vocabulary_so_a_preset_may_differ_there(write_preset, write_run):
    run = write_run(config=SHAPE)
    preset = write_preset(**{**SHAPE, "vocab_size": 256})
    assert settings.resolve({}, model_name=run, config_file=preset).model.vocab_size == 64


@pytest.mark.parametrize("source", ["dataset_dir", "input_file"])
def test_the_data_of_a_saved_run_is_used_again_until_a_flag_replaces_it(source, write_run):
    run = write_run(state={"training_config": {source: "saved", "tokenization": "char"}})
    again = settings.resolve({}, model_name=run).data
    assert again == DataConfig(**{source: "saved"}, tokenization="char")
    new = settings.resolve({"dataset_dir": "new"}, model_name=run).data
    assert (new.dataset_dir, new.input_file) == ("new", None)
    new = settings.resolve({"input_file": "new.txt"}, model_name=run).data
    assert (new.dataset_dir, new.input_file) == (None, "new.txt")
    # a further validation set is no new source
    more = settings.resolve({"eval_dataset_dir": "e"}, model_name=run).data
    assert getattr(more, source) == "saved"


def test_two_sources_of_data_are_refused():
    with pytest.raises(ConfigError, match="--dataset_dir and --input_file are both given"):
        settings.resolve({"dataset_dir": "a", "input_file": "b"})


@pytest.mark.parametrize(
    "name",
    [".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "a\nb", "a\0b", "\x1b[0m", " a", " "],
)
def test_a_run_name_that_is_more_than_a_name_is_refused(name, folder):
    with pytest.raises(ConfigError) as error:
        settings.resolve({}, model_name=name)
    assert str(error.value).startswith("--model_name is a plain name; found '")
    assert str(error.value).isprintable()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("key", ["dataset_dir", "input_file", "eval_dataset_dir", "log_file"])
def test_an_empty_flag_is_an_unset_variable_not_a_wish_for_the_demo(key):
    with pytest.raises(ConfigError, match=f"^--{key} is empty"):
        settings.resolve({key: ""})


@pytest.mark.parametrize("key", ["model_name", "config_file"])
def test_an_empty_name_is_refused(key):
    with pytest.raises(ConfigError, match=f"^--{key} is empty"):
        settings.resolve({}, **{key: ""})


@pytest.mark.parametrize("name", ["book", "750M_unified_v1", "1.3B_1024", "my run", "été", "a-b.c"])
def test_ordinary_names_are_taken(name, folder):
    assert settings.resolve({}, model_name=name).run_dir.name == name


def test_the_run_is_named_after_the_preset(write_preset):
    assert settings.resolve({}, config_file=write_preset("1.3B_1024x")).model_name == "1.3B_1024x"
    assert settings.resolve({}).model_name == "default"
    out = settings.resolve({}, config_file=write_preset("other"), model_name="own")
    assert (out.model_name, out.resume, out.saved_state) == ("own", False, {})


def test_a_state_written_by_mypt_is_accepted(write_run):
    run = write_run(config={**SHAPE, "device": "cuda", "use_loss_mask": True}, state=MYPT_STATE)
    out = settings.resolve({}, model_name=run)
    assert out.resume
    assert out.saved_state == MYPT_STATE
    train = out.train
    assert (train.max_iters, train.learning_rate, train.grad_accum_steps) == (500, 1e-4, 4)
    assert (train.warmup_iters, train.grad_clip, train.eval_interval) == (25, 0.5, 40)
    assert out.data.dataset_dir == "data/old"
    assert train.token_accuracy_saturation.window == 5
    assert train.gold_selection.strategy == "external_gate"
    assert train.gold_selection.guards.overfit_ratio == 6.0
    assert train.gold_selection.external_gate.script == "gate.py"
    assert out.model.n_embd == 16


@pytest.mark.parametrize("state", [None, {}, {"step": 7, "optimizer_file": "optimizer.pt"}])
def test_a_state_of_an_older_mypt_is_accepted(state, write_run):
    """Seed 004: step and optimizer_file are all there was."""
    out = settings.resolve({}, model_name=write_run(config=SHAPE, state=state))
    assert out.resume
    assert out.train == TrainConfig()
    assert out.saved_state == (state or {})


@pytest.mark.parametrize("raw", [None, {}, "val_loss", {"guards": None, "external_gate": []}])
def test_a_gold_section_mypt_would_read_as_defaults_is_read_so(raw, write_run):
    run = write_run(config=SHAPE, state={"training_config": {"gold_selection": raw}})
    gold = settings.resolve({}, model_name=run).train.gold_selection
    assert gold is None or gold.guards.overfit_ratio == 5.0


def test_unknown_keys_of_a_saved_config_are_another_programs_business(write_run):
    run = write_run(config={**SHAPE, "legacy_mlp_activation": "relu"})
    assert settings.resolve({}, model_name=run).model.n_embd == 16


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "[]", "expected a JSON object"),
        ("config.json", '{"n_layer": 2', "not valid JSON"),
        ("config.json", '{"n_layer": "2"}', "n_layer: expected a whole number"),
        ("config.json", '{"n_embd": 10, "n_head": 3}', "n_embd must be divisible by n_head"),
        ("training_state.json", "[]", "expected a JSON object"),
        ("training_state.json", '{"step": "7"}', "step: expected a whole number; found '7'"),
        ("training_state.json", '{"step": -1}', "step: expected a whole number; found -1"),
        ("training_state.json", '{"step": true}', "step: expected a whole number; found True"),
        ("training_state.json", '{"training_config": {"max_iters": "9"}}', "max_iters: expected"),
        ("training_state.json", '{"training_config": [1]}', "training_config: expected an object"),
    ],
)
def test_a_damaged_run_is_refused_with_the_files_name(file, content, said, write_run, folder):
    run = write_run(config=SHAPE, state={"step": 1})
    (folder / "checkpoints" / run / file).write_text(content)
    with pytest.raises(ConfigError) as error:
        settings.resolve({}, model_name=run)
    assert said in str(error.value)
    assert "checkpoints/old" in str(error.value)


def test_a_folder_without_a_model_is_a_new_run(folder):
    (folder / "checkpoints/half").mkdir(parents=True)
    (folder / "checkpoints/half/config.json").write_text("{}")
    assert not settings.resolve({}, model_name="half").resume


def test_flags_are_checked_like_files():
    with pytest.raises(ConfigError, match=r"^command line: max_iters is out of range; found -1"):
        settings.resolve({"max_iters": -1})
    with pytest.raises(ConfigError, match="nearest n_head that divides is 2"):
        settings.resolve({"n_embd": 10, "n_head": 3})


def test_a_resumed_curriculum_keeps_its_phases_and_drops_foreign_keys(write_run):
    phases = [{"name": "a", "dataset_dir": "x", "until_iter": 3, "theirs": 1}, {"dataset_dir": "y"}]
    saved = {"curriculum": {"phases": phases, "note": "theirs"}}
    run = write_run(config=SHAPE, state={"training_config": saved})
    found = settings.resolve({}, model_name=run).train.curriculum.phases
    assert [(p.name, p.dataset_dir, p.until_iter) for p in found] == [
        ("a", "x", 3), ("", "y", None),
    ]  # fmt: skip
