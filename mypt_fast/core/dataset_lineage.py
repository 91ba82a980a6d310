"""Where a dataset's rows come from: files, shares and the script that made it.

Metadata only; nothing in training reads it (MyPT specification 8.4). A record is

    {"direct_inputs": [{path, sampled_rows, effective_ratio}],
     "recursive_origins": [{origin_path, rows, notes}],
     "flattened_contributions": [{origin_path, effective_rows, effective_percent}],
     "creation_context": {timestamp, script, args},
     "upstream_configs": [...]}
"""

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mypt_fast.publish import write_json

KEYS = ("direct_inputs", "recursive_origins", "flattened_contributions", "creation_context",
        "upstream_configs")  # fmt: skip
SIDECAR = "dataset_lineage.json"
NO_LINEAGE = "no lineage metadata found"


def iso_now() -> str:
    """Return the time in UTC, with its offset."""
    return datetime.now(timezone.utc).isoformat()


def count_jsonl_rows(path: str | Path) -> int:
    """Count the lines of a file that hold something; 0 where there is no such file."""
    try:
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    except FileNotFoundError:
        return 0


def load_lineage_for_input(path: str | Path) -> dict[str, Any]:
    """Return the lineage of a JSONL file or a dataset directory, from what lies beside it.

    A `lineage` record is taken as it is, else one is derived from `mix_info.sources`, else from
    keys of the same names at the top level; without any, the input is an origin of its own.
    """
    path = Path(path)
    for beside in _candidates(path):
        content = _read_object(beside)
        if content is None:
            continue
        record = content.get("lineage")
        if isinstance(record, dict):
            return _complete(record)
        sources = _mapping(content.get("mix_info")).get("sources")
        if sources:
            return _from_mix(sources)
        if any(content.get(key) for key in KEYS):
            return _complete(content)
    rows = count_jsonl_rows(path) if path.is_file() else 0
    return _leaf(str(path), rows)


def _candidates(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / "dataset_metadata.json", path / SIDECAR]
    ends = (".mix_meta.json", ".meta.json", ".lineage.json")
    both = (path.with_suffix(""), path)  # data.meta.json or data.jsonl.meta.json
    return [base.with_name(base.name + end) for end in ends for base in both]


def merge_lineage(
    inputs: Iterable[dict[str, Any]],
    output_rows: int,
    creation_context: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge the lineages of several inputs into that of what was made from them.

    Each input's `sampled_rows` are spread over its upstream contributions in proportion to them.

    Args:
        inputs: objects with `path` and `sampled_rows`, and `lineage` where it is known already;
            else it is looked for beside the path.
        output_rows: rows of the result, the whole of all percentages.
        creation_context: what made it; `timestamp` is added where it is missing.
    """
    inputs = list(inputs)
    rows: dict[str, float] = {}
    origins: list[dict[str, Any]] = []
    configs: list[Any] = []
    direct = []
    for item in inputs:
        path, sampled = _path_of(item), _count(item.get("sampled_rows", item.get("rows", 0)))
        ratio = item.get("effective_ratio", sampled / output_rows if output_rows else 0.0)
        direct.append({"path": path, "sampled_rows": sampled, "effective_ratio": ratio})
        known = item.get("lineage")
        lineage = _complete(known) if isinstance(known, dict) else load_lineage_for_input(path)
        for origin, share in _shares(lineage, path):
            rows[origin] = rows.get(origin, 0.0) + sampled * share
        origins += [o for o in lineage["recursive_origins"] if o not in origins]
        configs += [c for c in lineage["upstream_configs"] if c not in configs]
    return {
        "direct_inputs": direct,
        "recursive_origins": origins,
        "flattened_contributions": _contributions(rows, output_rows),
        "creation_context": {"timestamp": iso_now(), **(creation_context or {})},
        "upstream_configs": configs,
    }


def write_lineage_sidecar(path: str | Path, lineage: dict[str, Any]) -> Path:
    """Write `{"lineage": ...}` beside a file, or into a dataset directory; returns the file."""
    path = Path(path)
    is_file = path.suffix == ".jsonl" and not path.is_dir()
    target = path.with_name(path.name + ".lineage.json") if is_file else path / SIDECAR
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {"lineage": lineage})
    return target


def _contributions(rows: dict[str, float], total: float) -> list[dict[str, Any]]:
    ordered = sorted(rows.items(), key=lambda item: (-item[1], item[0]))
    return [
        {
            "origin_path": origin,
            "effective_rows": int(count) if count == int(count) else round(count, 6),
            "effective_percent": round(100 * count / total, 6) if total else 0.0,
        }
        for origin, count in ordered
    ]


def _shares(lineage: dict[str, Any], path: str) -> list[tuple[str, float]]:
    """Each origin's share of an input; the input itself where nothing is known of it."""
    known = [
        (str(part["origin_path"]), _count(part.get("effective_rows")))
        for part in lineage["flattened_contributions"]
        if isinstance(part, dict) and part.get("origin_path")
    ]
    total = sum(count for _, count in known)
    return [(origin, count / total) for origin, count in known] if total > 0 else [(path, 1.0)]


def _from_mix(sources: Any) -> dict[str, Any]:
    """The lineage of a mixture, by the tokens that each source gave."""
    parts = sources if isinstance(sources, list) else list(_mapping(sources).values())
    counts: dict[str, float] = {}
    for part in filter(lambda p: isinstance(p, dict), parts):
        name = str(part.get("directory") or part.get("path") or "unknown")
        counts[name] = counts.get(name, 0) + _count(part.get("actual_tokens"))
    total = sum(counts.values())
    record = _complete({})
    record["direct_inputs"] = [
        {"path": p, "sampled_rows": n, "effective_ratio": n / total if total else 0.0}
        for p, n in counts.items()
    ]
    record["recursive_origins"] = [
        {"origin_path": p, "rows": n, "notes": "tokens, from mix_info"} for p, n in counts.items()
    ]
    record["flattened_contributions"] = _contributions(counts, total)
    return record


def _leaf(path: str, rows: int) -> dict[str, Any]:
    record = _complete({})
    record["recursive_origins"] = [{"origin_path": path, "rows": rows, "notes": NO_LINEAGE}]
    record["flattened_contributions"] = _contributions({path: rows}, rows)
    return record


def _complete(record: dict[str, Any]) -> dict[str, Any]:
    """The five sections of a record, whatever else it holds."""
    lists = {k: record.get(k) for k in KEYS}
    return {
        k: _mapping(v) if k == "creation_context" else list(v) if isinstance(v, list) else []
        for k, v in lists.items()
    }


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _path_of(item: dict[str, Any]) -> str:
    return str(item.get("path") or item.get("input_path") or "unknown")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
