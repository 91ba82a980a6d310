"""Gold selection as MyPT's scripts use it: plain dicts over the trainer's gate and its rules.

Whoever calls `run_external_gate` runs the script that the settings name: no file makes that call
by itself (MyPT specification 6.6).
"""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from mypt_fast.config import ExternalGate, GoldGuards, GoldSelection
from mypt_fast.errors import ConfigError
from mypt_fast.presets import read_json
from mypt_fast.training.gate import deep_get as _follow
from mypt_fast.training.gate import is_due, run_gate
from mypt_fast.training.gold import is_better

STRATEGIES = ("val_loss", "hybrid", "external_gate")


class Section(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """Return an entry; raises AttributeError."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting '{name}'; there are {', '.join(self)}") from None


def parse_gold_selection_config(config: Any = None) -> Section:
    """Complete a `gold_selection` section with the defaults.

    Unknown strategies become val_loss, sections that are no objects their defaults, and unknown
    keys go (MyPT specification 6.1).
    """
    raw = config if isinstance(config, dict) else {}
    strategy = raw.get("strategy", "val_loss")
    return Section(
        strategy=strategy if strategy in STRATEGIES else "val_loss",
        apply_loss_guards=bool(raw.get("apply_loss_guards", GoldSelection().apply_loss_guards)),
        guards=_merged(GoldGuards(), raw.get("guards")),
        external_gate=_merged(ExternalGate(), raw.get("external_gate")),
    )


def _merged(default: Any, raw: Any) -> Section:
    known = asdict(default)
    given = raw if isinstance(raw, dict) else {}
    merged = Section({**known, **{k: v for k, v in given.items() if k in known}})
    if "args" in merged:
        merged["args"] = [str(word) for word in merged["args"] or ()]
    return merged


def _gate(ext: Any) -> ExternalGate:
    """The settings of a gate, from whatever holds them."""
    raw: Any = {}
    if isinstance(ext, dict):
        raw = ext
    elif is_dataclass(ext) and not isinstance(ext, type):
        raw = {f.name: getattr(ext, f.name) for f in fields(ext)}
    values = dict(_merged(ExternalGate(), raw))
    values["args"] = tuple(values["args"])
    values["run_interval_evals"] = max(1, int(values["run_interval_evals"] or 1))
    return ExternalGate(**values)


def deep_get(obj: Any, path: str | None, default: Any = None) -> Any:
    """Follow a dotted path through nested dicts."""
    return _follow(obj, path, default) if path else default


def compare_metric(candidate: float, best: float | None, goal: str = "max") -> bool:
    """Whether a metric beats the best one: below it for the goal "min", above it otherwise."""
    return is_better(candidate, best, goal)


def should_run_gate(ext: Any, eval_count: int, is_final_eval: bool = False) -> bool:
    """Whether the gate is asked at this evaluation; `eval_count` were there before."""
    return is_due(_gate(ext), int(eval_count), bool(is_final_eval))


def run_external_gate(
    ext: Any,
    project_root: str | Path | None,
    checkpoint_dir: str | Path,
    model_name: str,
    iter_step: int,
    is_final_eval: bool = False,
) -> dict[str, Any]:
    """Run the gate's script on a checkpoint; never raises for what the script does.

    Args:
        ext: the external_gate section: script, args, limits.
        project_root: where it runs and where a relative script lies; None: the working directory.
        checkpoint_dir: where its JSON goes, as gold_gate_step_<iter_step>.json.
        model_name: for `{model_name}` in its arguments.
        iter_step: of the checkpoint.
        is_final_eval: recorded only.

    Returns:
        ran, ok, returncode, cmd, stdout_tail, stderr_tail, output_json, gate_pass, metric_path,
        metric_value, raw_metric_value, gate_json, error and is_final_eval. The two tails are one
        stream: the script's output and its errors in the order they came.
    """
    gate = _gate(ext)
    root = Path.cwd() if project_root is None else Path(project_root)
    folder = Path(checkpoint_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = run_gate(gate, folder, model_name, iter_step, cwd=root)
    content = _json_of(found.output_json)
    # A script that fails may still have written its verdict; that it failed is in `ok`.
    verdict = deep_get(content, gate.pass_path, found.returncode == 0)
    metric = deep_get(content, gate.metric_path)
    return {
        "ran": found.ran,
        "ok": found.ok,
        "returncode": found.returncode,
        "cmd": list(found.command),
        "stdout_tail": found.output_tail,
        "stderr_tail": found.output_tail if found.returncode else "",
        "output_json": found.output_json,
        "gate_pass": found.ran and found.returncode is not None and bool(verdict),
        "metric_path": gate.metric_path,
        "metric_value": _number(metric),
        "raw_metric_value": metric,
        "gate_json": content,
        "error": found.error,
        "is_final_eval": bool(is_final_eval),
    }


def _json_of(path: str | None) -> Any:
    """The gate's JSON, None where there is none that can be read."""
    if path is None or not Path(path).is_file():
        return None
    try:
        return read_json(Path(path), "gate result")
    except ConfigError:
        return None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
