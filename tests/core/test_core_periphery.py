"""Coverage, banners, special tokens, gold, lineage, prompts, blacklist: what scripts rely on."""

import inspect
import json
import sys

import pytest

from mypt_fast.core import (
    banner,
    dataset_lineage,
    eval_blacklist,
    gold_selection,
    special_tokens,
    system_prompts,
    training_utils,
)

# Training utilities (MyPT specification 1.9)


def test_dataset_coverage_is_the_specifications_arithmetic():
    assert training_utils.calculate_dataset_coverage(100, 4, 8, 1000, 2) == {
        "tokens_per_iter": 64,
        "grad_accum_steps": 2,
        "total_tokens_viewed": 6400,
        "dataset_tokens": 1000,
        "coverage_ratio": 6.4,
        "coverage_percentage": 640.0,
        "recommended_min_iters": 31,  # 2000 / 64 = 31.25
        "recommended_max_iters": 78,
        "recommended_optimal_iters": 54,
    }
    empty = training_utils.calculate_dataset_coverage(100, 4, 8, 0)
    assert (empty["coverage_ratio"], empty["recommended_max_iters"]) == (0, 0)


def test_episode_coverage_counts_whole_batches():
    assert training_utils.calculate_episode_coverage(10, 4, 30, 2) == {
        "episodes_per_iter": 8,
        "grad_accum_steps": 2,
        "total_episodes_viewed": 80,
        "dataset_episodes": 30,
        "batches_per_epoch": 3,
        "coverage_ratio": pytest.approx(80 / 30),
        "coverage_percentage": pytest.approx(8000 / 30),
        "recommended_min_iters": 6,
        "recommended_max_iters": 15,
        "recommended_optimal_iters": 10,
        "is_episode_indexed": True,
    }


@pytest.mark.parametrize(
    ("ratio", "band"),
    [(0, "very low"), (0.49, "very low"), (0.5, "low"), (1, "fair"), (1.99, "fair"), (2, "good"),
     (5, "good"), (5.1, "high"), (10, "high"), (10.1, "very high")],
)  # fmt: skip
def test_the_bands_of_coverage(ratio, band):
    assert training_utils.coverage_band(ratio).split(":")[0] == band


def test_the_reports_name_the_numbers(capsys):
    tokens = training_utils.calculate_dataset_coverage(100, 4, 8, 1000, 2)
    training_utils.print_coverage_analysis(tokens, 100)
    episodes = training_utils.calculate_episode_coverage(10, 4, 30, 2)
    training_utils.print_episode_coverage_analysis(episodes, 10)
    training_utils.print_training_estimates(7200, 100, 4, 8)
    out = capsys.readouterr().out
    for word in ("6,400", "6.40 passes (640.0 %): high", "31 to 78", "30 in the dataset, 8 a step",
                 "1 h 12 min", "72 evaluations"):  # fmt: skip
        assert word in out


def test_time_is_estimated_with_ten_seconds_an_evaluation():
    assert training_utils.estimate_training_time(7200, 100) == {
        "training_time_seconds": 3600.0, "eval_time_seconds": 720.0, "total_seconds": 4320.0,
        "hours": 1, "minutes": 12, "num_evaluations": 72,
    }  # fmt: skip
    assert training_utils.estimate_training_time(10, 100, 2)["training_time_seconds"] == 20


# Banner (1.10)


def test_banners_are_printed_and_take_what_the_specification_says(capsys):
    for f in (banner.print_banner, banner.get_banner_string):
        defaults = [p.default for p in inspect.signature(f).parameters.values()]
        assert defaults == ["MyPT", None, 60]
    text = banner.get_banner_string("A title", subtitle="below", width=30)
    assert {len(line) for line in text.splitlines()} == {30}
    assert "A title" in text
    assert "below" in text
    assert "x" * 99 in banner.get_banner_string("x" * 99)  # never cut
    banner.print_section("Part", char="=", width=12)
    assert capsys.readouterr().out == "\n============\nPart\n============\n"
    for name in ("train", "generate", "webapp", "workspace", "dataset"):
        getattr(banner, f"banner_{name}")()
        assert "MyPT" in capsys.readouterr().out
    assert banner.ROBOT_HEAD.strip()


# Special tokens (9.3)


def test_the_special_tokens_are_the_pinned_nineteen():
    ids = special_tokens.get_special_token_ids()
    assert list(ids.values()) == list(range(50257, 50276))
    assert (ids["myPT_system_open"], ids["myPT_assistant_open"], ids["myPT_eot"]) == (
        50257, 50261, 50275,
    )  # fmt: skip
    assert special_tokens.SPECIAL_TOKEN_STRINGS["myPT_cite_close"] == "</myPT_cite>"
    assert special_tokens.BASE_VOCAB_SIZE == 50257
    ids.clear()  # a copy
    assert len(special_tokens.get_special_token_ids()) == 19


def test_names_without_ids_are_an_error(monkeypatch):
    monkeypatch.setitem(special_tokens.SPECIAL_TOKEN_STRINGS, "myPT_new", "<myPT_new>")
    with pytest.raises(ValueError, match="myPT_new"):
        special_tokens.get_special_token_ids()


# Gold selection (6.1, 6.6)

GATE = """\
import argparse, json, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("--output")
parser.add_argument("--model")
args = parser.parse_args()
json.dump({"gate_passed": PASSED, "scores": {"mean": 0.25}, "cwd": os.getcwd(),
           "model": args.model}, open(args.output, "w"))
print("looked at", args.model)
print("complaint", file=sys.stderr)
sys.exit(CODE)
"""


@pytest.fixture
def gate(tmp_path):
    def write(passed=True, code=0):
        text = GATE.replace("PASSED", str(passed)).replace("CODE", str(code))
        (tmp_path / "root/eval").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root/eval/gate.py").write_text(text)
        return {
            "enabled": True, "script": "eval/gate.py", "args": ["--model", "{model_name}"],
            "metric_path": "scores.mean",
        }  # fmt: skip

    return write


def test_a_selection_is_completed_with_the_defaults():
    found = gold_selection.parse_gold_selection_config(None)
    assert (found["strategy"], found["apply_loss_guards"]) == ("val_loss", True)
    assert found["guards"] == {
        "overfit_ratio": 5.0, "consecutive_rises": 2, "eval_regression": 0.20,
    }  # fmt: skip
    gate = found["external_gate"]
    assert (gate["enabled"], gate["timeout_s"], gate["run_interval_evals"]) == (False, 1200, 1)
    assert (gate["metric_goal"], gate["pass_path"]) == ("max", "gate_passed")
    assert (gate["require_pass"], gate["strict"], gate["run_on_final_eval"]) == (False, False, True)
    assert found.guards.overfit_ratio == 5.0  # as attributes too
    with pytest.raises(AttributeError, match="no setting 'gards'"):
        found.gards  # noqa: B018
    json.dumps(found)


def test_what_is_odd_in_a_selection_becomes_the_default():
    found = gold_selection.parse_gold_selection_config(
        {"strategy": "best", "guards": [1], "external_gate": {"enabled": True, "args": [1, "x"]}}
    )
    assert found["strategy"] == "val_loss"
    assert found["guards"]["consecutive_rises"] == 2
    assert (found["external_gate"]["enabled"], found["external_gate"]["args"]) == (True, ["1", "x"])
    assert gold_selection.parse_gold_selection_config({"strategy": "hybrid"}).strategy == "hybrid"


@pytest.mark.parametrize(
    ("ext", "count", "final", "due"),
    [
        ({}, 0, False, False),
        ({"enabled": True}, 5, False, True),
        ({"enabled": True, "run_interval_evals": 3}, 3, False, True),
        ({"enabled": True, "run_interval_evals": 3}, 4, False, False),
        ({"enabled": True, "run_interval_evals": 0}, 4, False, True),
        ({"enabled": True, "run_interval_evals": 3}, 4, True, True),
        ({"enabled": True, "run_on_final_eval": False}, 3, True, False),
    ],
)
def test_when_the_gate_is_asked(ext, count, final, due):
    assert gold_selection.should_run_gate(ext, count, final) is due


def test_metrics_are_compared_by_their_goal():
    assert gold_selection.compare_metric(1.0, None, "max")
    assert gold_selection.compare_metric(2.0, 1.0, "max")
    assert not gold_selection.compare_metric(1.0, 1.0, "max")
    assert gold_selection.compare_metric(1.0, 2.0, "min")
    assert gold_selection.deep_get({"a": {"b": 0}}, "a.b", 7) == 0
    assert gold_selection.deep_get({"a": 1}, "a.b", 7) == 7


def test_the_gate_runs_in_the_projects_root_and_tells_all(gate, tmp_path):
    ext = gate()
    found = gold_selection.run_external_gate(ext, tmp_path / "root", tmp_path / "run", "m", 30)
    out = str(tmp_path / "run/gold_gate_step_30.json")
    assert {k: found[k] for k in ("ran", "ok", "returncode", "gate_pass", "error")} == {
        "ran": True, "ok": True, "returncode": 0, "gate_pass": True, "error": None,
    }  # fmt: skip
    script = str(tmp_path / "root/eval/gate.py")
    assert found["cmd"] == [sys.executable, script, "--model", "m", "--output", out]
    assert (found["output_json"], found["metric_path"]) == (out, "scores.mean")
    assert (found["metric_value"], found["raw_metric_value"]) == (0.25, 0.25)
    assert found["gate_json"]["cwd"] == str(tmp_path / "root")
    assert found["gate_json"]["model"] == "m"
    assert "looked at m" in found["stdout_tail"]


def test_the_gates_root_is_the_working_directory_where_none_is_given(gate, tmp_path, monkeypatch):
    ext = gate(passed=False)
    monkeypatch.chdir(tmp_path / "root")
    found = gold_selection.run_external_gate(ext, None, "run", "m", 1)
    assert (found["ok"], found["gate_pass"]) == (True, False)
    assert (tmp_path / "root/run/gold_gate_step_1.json").is_file()


def test_a_gate_that_fails_keeps_its_verdict_and_is_not_ok(gate, tmp_path):
    ext = gate(passed=False, code=1)
    found = gold_selection.run_external_gate(ext, tmp_path / "root", tmp_path, "m", 2)
    assert (found["ok"], found["returncode"], found["gate_pass"]) == (False, 1, False)
    assert (found["metric_value"], found["error"]) == (0.25, "exit code 1")
    assert "complaint" in found["stderr_tail"]


def test_a_gate_that_is_not_there_is_an_answer_not_an_exception(tmp_path):
    ext = {"enabled": True, "script": "nothing.py"}
    found = gold_selection.run_external_gate(ext, tmp_path, tmp_path, "m", 2)
    assert (found["ran"], found["ok"], found["gate_pass"], found["metric_value"]) == (
        False, False, False, None,
    )  # fmt: skip
    assert "nothing.py" in found["error"]


# Lineage (8.4)


def test_rows_are_spread_over_what_each_input_was_made_of(tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("{}\n\n{}\n")
    assert dataset_lineage.count_jsonl_rows(mixed) == 2
    record = {"flattened_contributions": [
        {"origin_path": "a", "effective_rows": 300, "effective_percent": 75.0},
        {"origin_path": "b", "effective_rows": 100, "effective_percent": 25.0},
    ]}  # fmt: skip
    target = dataset_lineage.write_lineage_sidecar(mixed, record)
    assert target.name == "mixed.jsonl.lineage.json"
    (tmp_path / "plain.jsonl").write_text("{}\n")
    merged = dataset_lineage.merge_lineage(
        [{"path": str(mixed), "sampled_rows": 40},
         {"path": str(tmp_path / "plain.jsonl"), "sampled_rows": 20}],
        60, {"script": "mix.py", "args": {}},
    )  # fmt: skip
    assert merged["flattened_contributions"] == [
        {"origin_path": "a", "effective_rows": 30, "effective_percent": 50.0},
        {"origin_path": str(tmp_path / "plain.jsonl"), "effective_rows": 20,
         "effective_percent": 33.333333},
        {"origin_path": "b", "effective_rows": 10, "effective_percent": 16.666667},
    ]  # fmt: skip
    assert merged["direct_inputs"][0]["sampled_rows"] == 40
    assert merged["direct_inputs"][0]["effective_ratio"] == pytest.approx(2 / 3)
    assert merged["creation_context"]["script"] == "mix.py"
    assert merged["creation_context"]["timestamp"].endswith("+00:00")
    assert "no lineage" in merged["recursive_origins"][0]["notes"]


def test_a_mixtures_sources_and_a_dataset_folder(tmp_path):
    (tmp_path / "dataset_metadata.json").write_text(json.dumps(
        {"mix_info": {"sources": [{"directory": "x", "actual_tokens": 10},
                                  {"directory": "y", "actual_tokens": 30}]}}
    ))  # fmt: skip
    found = dataset_lineage.load_lineage_for_input(tmp_path)
    shares = {c["origin_path"]: c["effective_percent"] for c in found["flattened_contributions"]}
    assert list(shares.items()) == [("y", 75.0), ("x", 25.0)]
    target = dataset_lineage.write_lineage_sidecar(tmp_path, {"direct_inputs": [1]})
    assert target == tmp_path / "dataset_lineage.json"
    (tmp_path / "dataset_metadata.json").write_text("{broken")
    assert dataset_lineage.load_lineage_for_input(tmp_path)["direct_inputs"] == [1]


def test_an_input_that_nothing_is_known_of_is_an_origin(tmp_path):
    for path, rows in ((tmp_path / "gone.jsonl", 0), (tmp_path, 0)):
        found = dataset_lineage.load_lineage_for_input(path)
        assert found["recursive_origins"][0]["origin_path"] == str(path)
        assert found["recursive_origins"][0]["rows"] == rows
    assert dataset_lineage.merge_lineage([], 0)["flattened_contributions"] == []
    assert dataset_lineage.iso_now().endswith("+00:00")


# Prompts and blacklist


def test_the_conversations_prompt_is_the_one_in_datasets():
    assert system_prompts.CONVERSATION_SYSTEM_PROMPT == "You are MyPT."
    assert system_prompts.DEFAULT_CONVERSATION_PROMPT == "You are MyPT."
    assert isinstance(system_prompts.CHAT_SYSTEM_PROMPTS, list)
    others = [getattr(system_prompts, n) for n in vars(system_prompts) if n.startswith("AGENTIC_")]
    assert len(others) == 4
    assert all(isinstance(text, str) and text for text in others)


def test_a_leak_is_found_whatever_its_case_and_spaces():
    prompt = eval_blacklist.FORBIDDEN_USER_PROMPTS[0]
    assert eval_blacklist.user_prompt_is_forbidden(f"  {prompt.upper()}\n")
    assert eval_blacklist.is_eval_leak(prompt.replace(" ", "\n "), "harmless")
    assert eval_blacklist.is_eval_leak("harmless", eval_blacklist.FORBIDDEN_PAYLOADS[0].title())
    assert eval_blacklist.is_eval_leak("a", "b", eval_blacklist.FORBIDDEN_TEMPLATES[0])
    assert not eval_blacklist.is_eval_leak("harmless " + prompt, "b")
    assert not eval_blacklist.is_eval_leak("", None)
