import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mypt_fast import presets
from mypt_fast.config import ARCHITECTURE_KEYS, ModelConfig, TrainConfig, split_flat
from mypt_fast.errors import ConfigError
from mypt_fast.schema import allowed, build, field_names

FULL = {
    "name": "x", "description": "y", "comment_why": ["anything", 1], "device": "cpu",
    "batch_size": 4, "block_size": 16, "n_embd": 24, "n_head": 2, "n_layer": 2, "dropout": 0.1,
    "bias": True, "pos_encoding": "rope", "warmup_iters": 0.05, "save_dtype": None,
    "eval_sets": {"general": "data/a", "code": "data/b"},
    "curriculum": {"phases": [
        {"name": "one", "dataset_dir": "data/a", "until_iter": 5},
        {"name": "two", "dataset_dir": "data/b", "until_iter": None, "description": "rest"},
    ]},
    "gold_selection": {
        "strategy": "hybrid", "guards": {"overfit_ratio": 4, "consecutive_rises": 3},
        "external_gate": {"enabled": True, "script": "gate.py", "args": ["--fast"]},
    },
    "token_accuracy_saturation": {"enabled": None, "window": 3, "action": "log"},
}  # fmt: skip


def refusal(raw):
    """Return the message that refuses `raw`: always one printable line that names the file."""
    with pytest.raises(ConfigError) as error:
        split_flat(raw, "mine.json")
    text = str(error.value)
    assert text.isprintable(), text
    assert text.startswith("mine.json: ")
    assert error.value.exit_code == 2
    return text.removeprefix("mine.json: ")


def read(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return presets.load(path)


def refused_file(tmp_path, content):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, content)
    text = str(error.value)
    assert text.isprintable(), text
    assert "mine.json" in text
    return text


def test_every_kind_of_key_is_read_and_nested_sections_are_built():
    model, train, display = split_flat(FULL, "mine.json")
    assert display == {"name": "x", "description": "y"}
    assert (model.n_embd, model.bias, model.device, model.save_dtype) == (24, True, "cpu", None)
    assert [p.until_iter for p in train.curriculum.phases] == [5, None]
    assert train.gold_selection.guards.overfit_ratio == 4
    assert train.gold_selection.guards.eval_regression == 0.2
    assert train.gold_selection.external_gate.args == ("--fast",)
    assert train.token_accuracy_saturation.window == 3
    assert train.eval_sets == {"general": "data/a", "code": "data/b"}


def test_what_is_written_can_be_read_back():
    _, train, _ = split_flat(FULL, "mine.json")
    text = json.dumps(train.to_dict())
    assert build(TrainConfig, json.loads(text), "again") == train


def test_an_empty_object_is_all_defaults():
    assert split_flat({}, "x") == (ModelConfig(), TrainConfig(), {})


def test_the_model_fields_are_mypts_in_mypts_order():
    """MyPT specification 1.2: field order is the key order of config.json."""
    words = """batch_size block_size vocab_size n_embd n_head n_layer dropout bias use_checkpoint
        device use_loss_mask tie_weights save_dtype pos_encoding mlp_type norm_type rope_theta
        rope_scale segment_position_reset neftune_alpha batch_sampling_mode pad_token_id
        episode_min_tokens epoch_seed epoch_shuffle epoch_drop_last"""
    assert list(ModelConfig().to_dict()) == words.split()


def test_no_key_has_two_owners():
    assert not set(field_names(ModelConfig)) & set(field_names(TrainConfig))
    assert "batch_size" not in ARCHITECTURE_KEYS
    assert "dropout" not in ARCHITECTURE_KEYS
    assert "device" not in ARCHITECTURE_KEYS


def test_save_every_is_save_interval():
    assert split_flat({"save_every": 7}, "x")[1].save_interval == 7


def test_both_names_of_one_setting_are_refused():
    assert "one setting" in refusal({"save_every": 7, "save_interval": 8})


@pytest.mark.parametrize("key", ["comment", "comment_1", "comment_why"])
def test_comments_of_archived_mypt_configs_are_accepted(key):
    assert split_flat({key: {"any": [1]}}, "x")[0] == ModelConfig()


@pytest.mark.parametrize(
    ("raw", "nearest"),
    [
        ({"n_embed": 1}, "n_embd"),
        ({"N_EMBD": 1}, "n_embd"),
        ({"n-embd": 1}, "n_embd"),
        ({"learningrate": 1}, "learning_rate"),
        ({"save_evry": 1}, "save_every"),
        ({"descripton": ""}, "description"),
        ({"gold_selection": {"guards": {"overfitratio": 2}}},
         "gold_selection.guards.overfit_ratio"),
        ({"gold_selection": {"stratgy": "x"}}, "gold_selection.strategy"),
        ({"curriculum": {"phase": []}}, "curriculum.phases"),
        ({"curriculum": {"phases": [{"dataset_dir": "a"}, {"data_dir": "b"}]}},
         "curriculum.phases[1].dataset_dir"),
        ({"token_accuracy_saturation": {"windows": 4}}, "token_accuracy_saturation.window"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_the_nearest(raw, nearest):
    text = refusal(raw)
    assert text.startswith("unknown key '")
    assert text.endswith(f"the nearest valid key is '{nearest}'")


def test_a_key_near_none_is_answered_with_where_to_look():
    assert "train --help" in refusal({"zzzz": 1})
    assert "valid keys: consecutive_rises, eval_regression, overfit_ratio" in refusal(
        {"gold_selection": {"guards": {"zzzz": 1}}}
    )


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"n_layer": True}, "n_layer: expected a whole number; found True"),
        ({"n_layer": "4"}, "n_layer: expected a whole number; found '4'"),
        ({"n_layer": 4.0}, "n_layer: expected a whole number; found 4.0"),
        ({"n_layer": None}, "n_layer: expected a whole number; found null"),
        ({"n_layer": [4]}, "n_layer: expected a whole number; found [4]"),
        ({"bias": 1}, "bias: expected true or false; found 1"),
        ({"bias": "true"}, "bias: expected true or false; found 'true'"),
        ({"bias": None}, "bias: expected true or false; found null"),
        ({"dropout": "0.1"}, "dropout: expected a number; found '0.1'"),
        ({"dropout": False}, "dropout: expected a number; found False"),
        ({"name": 3}, "name: expected a string; found 3"),
        ({"device": 0}, "device: expected a string; found 0"),
        ({"log_file": "a\0b"}, r"log_file: expected text; found 'a\x00b'"),
        ({"log_file": "\ud800"}, r"log_file: expected text; found '\ud800'"),
        ({"eval_sets": ["a"]}, "eval_sets: expected an object of strings; found ['a']"),
        ({"eval_sets": {"a": 3}}, "eval_sets['a']: expected a string; found 3"),
        ({"curriculum": []}, "curriculum: expected an object; found []"),
        ({"curriculum": {"phases": {}}}, "curriculum.phases: expected a list; found {}"),
        ({"curriculum": {"phases": [3]}}, "curriculum.phases[0]: expected an object; found 3"),
        (
            {"curriculum": {"phases": [{"dataset_dir": "a"}, {"until_iter": "9"}]}},
            "curriculum.phases[1].until_iter: expected a whole number; found '9'",
        ),
        (
            {"gold_selection": {"guards": None}},
            "gold_selection.guards: expected an object; found null",
        ),
        (
            {"gold_selection": {"external_gate": {"args": ["a", 3]}}},
            "gold_selection.external_gate.args[1]: expected a string; found 3",
        ),
    ],
)
def test_a_wrong_type_names_the_path_what_was_expected_and_what_was_found(raw, said):
    assert refusal(raw) == said


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"n_layer": 0}, "n_layer is out of range; found 0; use >= 1 and <= 1024"),
        ({"batch_size": 1 << 21}, "found 2097152; use >= 1 and <= 2^20"),
        ({"dropout": 1}, "dropout is out of range; found 1; use >= 0 and < 1"),
        ({"dropout": -0.1}, "found -0.1; use >= 0 and < 1"),
        ({"learning_rate": 0}, "found 0; use > 0 and <= 10"),
        ({"seed": 1 << 63}, "use >= 0 and <= 9223372036854775807"),
        ({"warmup_iters": -0.5}, "warmup_iters is out of range; found -0.5; use >= 0"),
        (
            {"gold_selection": {"guards": {"overfit_ratio": 0}}},
            "gold_selection.guards.overfit_ratio is out of range; found 0; use > 0",
        ),
        ({"curriculum": {"phases": [{"until_iter": 0}]}}, "phases[0].until_iter is out of range"),
        ({"amp_dtype": "FP16"}, "expected one of bf16, fp16; found 'FP16'; did you mean 'fp16'?"),
        ({"mlp_type": "relu"}, "mlp_type: expected one of gelu, swiglu; found 'relu'"),
    ],
)
def test_a_value_out_of_range_names_the_range(raw, said):
    assert said in refusal(raw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["learning_rate", "dropout", "rope_theta", "warmup_iters"])
def test_only_finite_numbers_are_numbers(key, value):
    assert refusal({key: value}) == f"{key}: expected a finite number; found {value}"


def test_a_whole_number_too_large_for_a_float_is_refused():
    assert "learning_rate: expected a number; found 1000" in refusal({"learning_rate": 10**400})


def test_a_share_of_warmup_and_a_count_stay_different_types():
    assert type(split_flat({"warmup_iters": 1}, "x")[1].warmup_iters) is int
    assert type(split_flat({"warmup_iters": 1.0}, "x")[1].warmup_iters) is float


@pytest.mark.parametrize(
    ("n_embd", "n_head", "best"),
    [(100, 3, 2), (384, 7, 6), (64, 40, 32), (13, 6, 1), (8194, 4096, 482)],
)
def test_heads_that_do_not_divide_are_answered_with_the_nearest_that_do(n_embd, n_head, best):
    text = refusal({"n_embd": n_embd, "n_head": n_head})
    assert text.endswith(
        f"found n_embd={n_embd}, n_head={n_head}; the nearest n_head that divides is {best}"
    )
    assert split_flat({"n_embd": n_embd, "n_head": best}, "x")[0].n_head == best


def test_rope_refuses_an_odd_head_and_learned_positions_take_it():
    odd = {"n_embd": 12, "n_head": 4}
    assert "12/4 = 3" in refusal({**odd, "pos_encoding": "rope"})
    assert split_flat(odd, "x")[0].n_head == 4


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"name": "a"}], "curriculum.phases[0].dataset_dir is missing"),
        ([{"dataset_dir": "a"}, {"dataset_dir": "b"}], "phases[0].until_iter: only the last"),
        ([{"dataset_dir": "a", "until_iter": 5}, {"dataset_dir": "b", "until_iter": 5}],
         "curriculum.phases[1].until_iter must grow from phase to phase; found 5 after 5"),
    ],
)  # fmt: skip
def test_phases_need_a_dataset_and_growing_ends(phases, said):
    assert said in refusal({"curriculum": {"phases": phases}})


@pytest.mark.parametrize("sets", [{"": "data/a"}, {"general": ""}])
def test_a_validation_set_needs_a_name_and_a_folder(sets):
    assert "eval_sets maps a name to a dataset_dir" in refusal({"eval_sets": sets})


def test_the_range_is_described_as_it_is_tested():
    assert allowed({"lo": 1, "hi": 1 << 20}) == ">= 1 and <= 2^20"
    assert allowed({"above": 0.0, "below": 1.0}) == "> 0 and < 1"
    assert allowed({}) == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not valid JSON; line 1"),
        ("{\n\n'n_layer': 1}", "not valid JSON; line 3"),
        ('{"n_layer": 1,}', "not valid JSON; line 1"),
        ('{\n"n_layer": 1 // four\n}', "not valid JSON; line 2"),
        ("[1]", r"expected one JSON object; found [1]"),
        ("null", "expected one JSON object; found null"),
        ("NaN", "expected one JSON object; found nan"),
        ('{"n_layer": 1, "n_layer": 2}', "key 'n_layer' is given twice"),
        ('{"gold_selection": {"guards": {"a": 1, "a": 2}}}', "key 'a' is given twice"),
        ('{"a\\nb": 1, "a\\nb": 2}', r"key 'a\nb' is given twice"),
        (b'{"name": "\xe9"}', "not UTF-8 text; byte 10"),
        ("{}".encode("utf-16"), "not UTF-8 text; byte 0"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        (" " * (1 << 20) + "{}", "a config is at most 1 MiB"),
        ('{"learning_rate": 1' + "0" * 400 + "}", "learning_rate: expected a number"),
        ('{"learning_rate": NaN}', "learning_rate: expected a finite number"),
        ('{"n_layer": Infinity}', "n_layer: expected a whole number; found inf"),
        ('{"n_layer":' + "[" * 800 + "]" * 800 + "}", "n_layer: expected a whole number; found ["),
        ('{"' + "k" * 100_000 + '": 1}', "unknown key 'kkk"),
        ('{"save_dtype": "' + "x" * 100_000 + '"}', "save_dtype: expected one of"),
        ('{"a\\nb": 1}', r"unknown key 'a\nb'"),
        ('{"\\u001b[31m": 1}', r"unknown key '\x1b[31m'"),
    ],
    ids=lambda v: repr(v[:24]),
)
def test_an_unusable_file_is_refused_in_one_short_line(content, said, tmp_path):
    text = refused_file(tmp_path, content)
    assert said in text
    assert len(text) - len(str(tmp_path)) < 400


def test_an_integer_of_thousands_of_digits_is_refused(tmp_path):
    # CPython says so itself since 3.10.7; before that the range does
    text = refused_file(tmp_path, '{"batch_size": 1' + "0" * 5000 + "}")
    assert re.search("thousands of digits|out of range", text)
    assert len(text) - len(str(tmp_path)) < 200


def test_a_byte_order_mark_of_a_windows_editor_is_accepted(tmp_path):
    assert read(tmp_path, b'\xef\xbb\xbf{"n_layer": 3}').model.n_layer == 3


def test_a_file_name_with_a_colon_does_not_confuse_the_key_path():
    with pytest.raises(ConfigError, match=r"^a: b\.json: unknown key 'curriculum\.x'"):
        split_flat({"curriculum": {"x": 1}}, "a: b.json")


def test_many_keys_are_checked_in_one_pass(tmp_path):
    # 40,000 keys: comparing each with each would take minutes
    many = {f"comment{i}": i for i in range(40_000)}
    assert read(tmp_path, json.dumps(many)).model == ModelConfig()


# Damage of every kind: keys misspelt, values of any JSON type, sections cut, moved and nested.
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 70)
    | st.floats(allow_nan=True) | st.text(max_size=8)
    | st.sampled_from(["", "gelu", "rope", "bf16", "\n", "\x1b[0m", "\0", "\ud800", 10**400, -0.0])
)  # fmt: skip
KNOWN = st.sampled_from([*field_names(ModelConfig), *field_names(TrainConfig), "name", "phases",
                         "guards", "args", "save_every", "comment_x"])  # fmt: skip
KEYS = KNOWN | KNOWN.map(lambda k: k[:-1]) | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=6
)


def places(value, at=()):
    """Every container in a JSON value, as a path."""
    if isinstance(value, (dict, list)):
        yield at
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


@st.composite
def damaged(draw):
    raw = copy.deepcopy(FULL)
    for _ in range(draw(st.integers(1, 3))):
        spot = raw
        for key in draw(st.sampled_from(list(places(raw)))):
            spot = spot[key]
        if isinstance(spot, list):
            spot.append(draw(VALUES))
        elif spot and draw(st.booleans()):
            key = draw(st.sampled_from(sorted(spot)))
            if draw(st.booleans()):
                spot[key] = draw(VALUES)
            else:
                del spot[key]
        else:
            spot[draw(KEYS)] = draw(VALUES)
    return raw


def check_damage(raw):
    try:
        model, train, _ = split_flat(raw, "mine.json")
    except ConfigError as e:
        refused = str(e)
    else:
        refused = ""
    assert refused == "" or refused.isprintable()
    assert len(refused) < 500
    if refused:
        return
    # what was accepted is in range, and survives being written and read
    assert model.n_embd % model.n_head == 0
    assert 0 <= model.dropout < 1
    assert build(ModelConfig, json.loads(json.dumps(model.to_dict())), "again") == model
    assert build(TrainConfig, json.loads(json.dumps(train.to_dict())), "again") == train


@given(damaged())
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_config_loads_or_is_refused_and_nothing_else(raw):
    check_damage(raw)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_object_loads_or_is_refused_and_nothing_else(raw):
    check_damage(raw)


@given(
    st.binary(max_size=40)
    | st.text(max_size=40).map(lambda t: ('{"' + t).encode("utf-8", "replace"))
)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_are_a_config_or_refused_and_nothing_else(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        presets.load(path)
    except ConfigError as e:
        refused = str(e)
    else:
        refused = ""
    assert refused == "" or (refused.isprintable() and refused.startswith(str(path)))


@pytest.mark.parametrize("action", ["log", "log_only", "stop"])
def test_an_action_of_saturation_is_taken_as_it_comes(action):
    """MyPT logs and flags, whatever the word: a config of its must not be refused for one."""
    _, train, _ = split_flat({"token_accuracy_saturation": {"action": action}}, "mine.json")
    assert train.token_accuracy_saturation is not None
    assert train.token_accuracy_saturation.action == action
