"""The names that MyPT's scripts import as `core`, each loaded when it is first asked for.

`mypt-fast run SCRIPT` gives a script this package under the name `core`; `import mypt_fast.core`
is the same. Importing it loads no torch. What lies behind a name is the engine: nothing here is a
second implementation (MyPT specification 1.1).
"""

import difflib
import importlib
import importlib.util
import sys
from typing import Any

__version__ = "0.2.0"  # of the interface: MyPT's own version
__author__ = "the mypt_fast authors"

# submodule: the names that MyPT's package hands out from it
_NAMES = {
    "model": ("GPT", "GPTConfig", "CausalSelfAttention", "FeedForward", "Block"),
    "tokenizer": ("Tokenizer",),
    "data_loader": ("GPTDataLoader",),
    "episode_data_loader": ("GPTEpisodeDataLoader", "is_episode_indexed_dataset"),
    "checkpoint": ("CheckpointManager", "create_model", "load_model", "get_model_info"),
    "generator": ("Generator",),
    "banner": (
        "print_banner", "print_section", "get_banner_string", "banner_train", "banner_generate",
        "banner_webapp", "banner_workspace", "banner_dataset", "ROBOT_HEAD",
    ),
    "training_utils": (
        "calculate_dataset_coverage", "print_coverage_analysis", "calculate_episode_coverage",
        "print_episode_coverage_analysis", "estimate_training_time", "print_training_estimates",
    ),
    "dataset_lineage": (
        "iso_now", "count_jsonl_rows", "load_lineage_for_input", "merge_lineage",
        "write_lineage_sidecar",
    ),
    "gold_selection": (
        "parse_gold_selection_config", "should_run_gate", "run_external_gate", "compare_metric",
        "deep_get",
    ),
    "system_prompts": (
        "CONVERSATION_SYSTEM_PROMPT", "DEFAULT_CONVERSATION_PROMPT", "AGENTIC_COMPACT_PROMPT",
        "AGENTIC_STANDARD_PROMPT", "AGENTIC_VERBOSE_PROMPT", "AGENTIC_SYSTEM_PROMPT",
        "DEFAULT_AGENTIC_PROMPT",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
# scripts write `import core` and then `core.model`: these answer as attributes too
_SUBMODULES = (*_NAMES, "config", "special_tokens", "eval_blacklist")
__all__ = ["__author__", "__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Load the submodule that `name` comes from.

    Raises:
        AttributeError: for a name that is not there.
        ImportError: the same for `from core import name`, which would hide this text.
    """
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("__") and _asked_by_from_import() and not _is_submodule(name):
        raise ImportError(_unknown(name), name=__name__)
    raise AttributeError(_unknown(name), name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _asked_by_from_import() -> bool:
    """Whether `from core import name` is what asks, by the frame that called `__getattr__`."""
    frame = sys._getframe(2)
    return (
        frame.f_code.co_name == "_handle_fromlist"
        and frame.f_globals.get("__name__") == "importlib._bootstrap"
    )


def _is_submodule(name: str) -> bool:
    """Whether `from core import name` means a module: ours, or the user's under `run`."""
    return importlib.util.find_spec(f"{__name__}.{name}") is not None


def _unknown(name: str) -> str:
    known = [*_MODULE_OF, *_SUBMODULES]
    lower = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), lower, 1)
    hint = f"did you mean {lower[near[0]]}?" if near else f"it has {', '.join(_MODULE_OF)}"
    modules = f"submodules: {', '.join(sorted(_SUBMODULES))}"
    if near:
        modules = f"core has {', '.join(_MODULE_OF)}; {modules}"
    return f"core has no '{name}'; {hint}; {modules}"
