"""The names that scripts import from `core`: all there, none loaded before it is asked for."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mypt_fast.core as core

FOLDER = Path(core.__file__).parent
# MyPT specification 1.1, name by name
NAMES = [
    "GPT",
    "GPTConfig",
    "CausalSelfAttention",
    "FeedForward",
    "Block",
    "Tokenizer",
    "GPTDataLoader",
    "GPTEpisodeDataLoader",
    "is_episode_indexed_dataset",
    "CheckpointManager",
    "Generator",
    "create_model",
    "load_model",
    "get_model_info",
    "print_banner",
    "print_section",
    "get_banner_string",
    "banner_train",
    "banner_generate",
    "banner_webapp",
    "banner_workspace",
    "banner_dataset",
    "ROBOT_HEAD",
    "calculate_dataset_coverage",
    "print_coverage_analysis",
    "calculate_episode_coverage",
    "print_episode_coverage_analysis",
    "estimate_training_time",
    "print_training_estimates",
    "iso_now",
    "count_jsonl_rows",
    "load_lineage_for_input",
    "merge_lineage",
    "write_lineage_sidecar",
    "parse_gold_selection_config",
    "should_run_gate",
    "run_external_gate",
    "compare_metric",
    "deep_get",
    "CONVERSATION_SYSTEM_PROMPT",
    "DEFAULT_CONVERSATION_PROMPT",
    "AGENTIC_COMPACT_PROMPT",
    "AGENTIC_STANDARD_PROMPT",
    "AGENTIC_VERBOSE_PROMPT",
    "AGENTIC_SYSTEM_PROMPT",
    "DEFAULT_AGENTIC_PROMPT",
]
# the sub-module paths that scripts and tests use
PATHS = {
    "model": "GPT GPTConfig CausalSelfAttention FeedForward Block RMSNorm SwiGLUFeedForward "
    "precompute_rope_frequencies apply_rotary_emb",
    "checkpoint": "CheckpointManager create_model load_model get_model_info",
    "tokenizer": "Tokenizer",
    "generator": "Generator",
    "data_loader": "GPTDataLoader",
    "episode_data_loader": "GPTEpisodeDataLoader is_episode_indexed_dataset",
    "special_tokens": "SPECIAL_TOKEN_STRINGS SPECIAL_TOKEN_IDS get_special_token_ids "
    "BASE_VOCAB_SIZE",
    "banner": "print_banner",
    "system_prompts": "CONVERSATION_SYSTEM_PROMPT CHAT_SYSTEM_PROMPT CHAT_SYSTEM_PROMPTS "
    "DEFAULT_CHAT_PROMPT",
    "dataset_lineage": "iso_now merge_lineage",
    "eval_blacklist": "is_eval_leak payload_is_forbidden user_prompt_is_forbidden "
    "template_is_forbidden",
    "gold_selection": "deep_get compare_metric",
    "training_utils": "calculate_dataset_coverage",
}


def module_of(name):
    return core._MODULE_OF[name]


def test_the_table_holds_the_specifications_names_and_no_others():
    assert sorted(core._MODULE_OF) == sorted(NAMES)
    assert sorted(core.__all__) == sorted([*NAMES, "__version__", "__author__"])
    assert core.__version__ == "0.2.0"
    assert isinstance(core.__author__, str)
    assert not {"Head", "MultiHeadAttention"} & set(core.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_comes_from_its_module(name):
    module = importlib.import_module(f"mypt_fast.core.{module_of(name)}")
    assert getattr(core, name) is getattr(module, name)
    assert name in dir(core)


@pytest.mark.parametrize("module", PATHS)
def test_every_path_that_scripts_use_is_there(module):
    found = importlib.import_module(f"mypt_fast.core.{module}")
    assert getattr(core, module) is found
    assert [name for name in PATHS[module].split() if not hasattr(found, name)] == []


def test_a_star_import_brings_every_name():
    names: dict = {}
    exec("from mypt_fast.core import *", names)
    assert set(NAMES) <= set(names)


def test_an_unknown_name_is_an_attribute_error_or_an_import_error():
    with pytest.raises(AttributeError, match="did you mean CheckpointManager"):
        core.CheckpointManger  # noqa: B018
    assert not hasattr(core, "nonsense")
    assert getattr(core, "nonsense", 3) == 3
    with pytest.raises(
        ImportError, match=r"'CheckpointManger'.* CheckpointManager\?.*submodules: "
    ):
        from mypt_fast.core import CheckpointManger  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mypt_fast.core.nonsense")


def test_the_face_loads_nothing_heavy_until_a_name_needs_it():
    light = ["banner", "training_utils", "special_tokens", "gold_selection",
                         "dataset_lineage", "system_prompts", "eval_blacklist"]  # fmt: skip
    code = (
        "import sys, mypt_fast.core as core\n"
        "assert [m for m in sys.modules if m.startswith('mypt_fast.')] == ['mypt_fast.core']\n"
        f"[getattr(core, name) for name in {light!r}]\n"
        "print([m for m in ('torch', 'numpy', 'tiktoken') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_face_knows_no_engine_of_its_own():
    tree = ast.parse((FOLDER / "__init__.py").read_text("utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"difflib", "importlib", "importlib.util", "sys"}
