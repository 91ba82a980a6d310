"""`mypt-fast inspect`: what a run directory holds, without loading its weights."""

import argparse
import json
from pathlib import Path
from typing import Any

from mypt_fast import console
from mypt_fast.accounting import count_parameters
from mypt_fast.config import ModelConfig
from mypt_fast.errors import CheckpointError, ConfigError, IntegrityError
from mypt_fast.schema import build, field_names

HELP = "show what a run directory holds"
DESCRIPTION = """\
Show a run's architecture, tokenizer, training state, best checkpoint and files. Reads the JSON
files only; --verify also reads every byte and compares it with the hashes saved beside them."""
EXAMPLES = """\
examples:
  mypt-fast inspect book
  mypt-fast inspect --model_name book_gold --verify     exit code 3 when a file differs
  mypt-fast inspect /mnt/backup/book --json"""

# MyPT prints these first, in this order (MyPT specification 1.2)
FIRST = (
    "batch_size", "block_size", "vocab_size", "n_embd", "n_head", "n_layer", "dropout", "bias",
    "device", "use_loss_mask", "tie_weights", "save_dtype", "batch_sampling_mode",
)  # fmt: skip
STATUS_TEXT = {
    "unlisted": "not in the manifest",
    "differs": "DIFFERS from what was saved",
    "missing": "MISSING",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to inspect and how."""
    parser.add_argument("path", nargs="?", metavar="NAME_OR_PATH", help="run or directory")
    parser.add_argument("--model_name", metavar="NAME", help="the same, as a flag")
    parser.add_argument(
        "--legacy_checkpoint",
        metavar="FILE",
        help="single file of the run to read where it has no bundle (default: final.pt, latest.pt)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="hash every file; exit code 3 when one differs"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Inspect; returns the exit code."""
    if (args.path is None) == (args.model_name is None):
        raise ConfigError("inspect needs one model", cure="give a name, a path or --model_name")
    from mypt_fast.checkpoint.legacy import INSPECT, choose

    name = args.model_name if args.path is None else args.path
    path, notices = choose(name, INSPECT, args.legacy_checkpoint)
    for text in notices:
        console.notice(f"note: {text}")
    report = gather(path, verify=args.verify)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(report)))
    damaged = [f["file"] for f in report["files"] if f["status"] in ("differs", "missing")]
    if damaged and args.verify:
        raise IntegrityError(
            f"{path}: {', '.join(damaged)} not as saved",
            "size or hash differs from manifest.json",
            f"restore from a backup, or use {path.name}_gold if that exists",
        )
    return 0


def gather(path: Path, verify: bool) -> dict[str, Any]:
    """Collect everything that is shown.

    Raises:
        CheckpointError, ConfigError: for a JSON member that cannot be read.
        IntegrityError: for one that is also not the file that was saved.
    """
    from mypt_fast.checkpoint import legacy
    from mypt_fast.checkpoint import manifest as bundles

    if path.is_file():
        return _gather_file(path, verify)
    manifest_path = path / "manifest.json"
    manifest = bundles.read_member(manifest_path) if manifest_path.is_file() else None
    if manifest is None and verify:
        raise CheckpointError(
            f"{path} cannot be verified", "it has no manifest.json",
            "a bundle gets one when mypt-fast saves it",
        )  # fmt: skip
    listed = bundles.listed_files(path, manifest) if manifest is not None else {}
    files = [_file(path, name, listed, verify) for name in _names(path, listed)]
    try:
        info = bundles.read_info(path)
    except ConfigError as e:
        if any(f["status"] == "differs" for f in files):
            raise IntegrityError(str(e), "and it is not the file that was saved") from e
        raise
    known = {k: v for k, v in info["config"].items() if k in set(field_names(ModelConfig))}
    is_old = manifest is None and legacy.is_per_head_bundle(path)
    cfg = build(ModelConfig, {**known, "per_head_era": is_old or known.get("per_head_era", False)},
                str(path / "config.json"))  # fmt: skip
    return {
        "path": str(path),
        "format": "bundle",
        "per_head_era": cfg.per_head_era,
        "config": info["config"],
        "total_params": count_parameters(cfg).total,
        "tokenizer": info.get("tokenizer"),
        "training_state": info.get("training_state"),
        "gold_selection_state": info.get("gold_selection_state"),
        "gold_path": _gold(path),
        "saved_by": manifest and {k: manifest.get(k) for k in ("mypt_fast", "torch")},
        "files": files,
        "verified": verify and all(f["status"] in ("ok", "unlisted") for f in files),
    }


def _gather_file(path: Path, verify: bool) -> dict[str, Any]:
    """The same of a single file.

    Raises:
        CheckpointError, ConfigError, IntegrityError: naming what is wrong with it.
    """
    from mypt_fast.checkpoint import legacy

    info = legacy.info(path)
    saved = legacy.read(path, optimizer=False, values=verify)
    cfg = build(ModelConfig, saved.config, str(path))
    status = "ok" if verify else "not checked"
    return {
        "path": str(path),
        "format": "legacy",
        "per_head_era": cfg.per_head_era,
        "config": info["config"],
        "total_params": count_parameters(cfg).total,
        "tokenizer": info.get("tokenizer"),
        "training_state": info["training_state"],
        "gold_selection_state": None,
        "gold_path": None,
        "saved_by": None,
        "files": [{"file": path.name, "bytes": path.stat().st_size, "status": status}],
        "verified": verify,
    }


def _names(path: Path, listed: dict[str, Any]) -> list[str]:
    return sorted({p.name for p in path.iterdir() if p.is_file()} | set(listed))


def _file(path: Path, name: str, listed: dict[str, Any], verify: bool) -> dict[str, Any]:
    from mypt_fast.checkpoint import manifest as bundles

    member = path / name
    if not member.is_file():
        return {"file": name, "bytes": None, "status": "missing"}
    size = member.stat().st_size
    if name not in listed:
        return {"file": name, "bytes": size, "status": "unlisted"}
    if not bundles.same_size(member, listed[name]):
        status = "differs"
    elif not verify:
        status = "not checked"
    else:
        status = "ok" if bundles.matches(member, listed[name]) else "differs"
    return {"file": name, "bytes": size, "status": status}


def _gold(path: Path) -> str | None:
    from mypt_fast.checkpoint.manifest import exists

    gold = path.with_name(path.name + "_gold")
    return str(gold) if exists(gold) else None


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report as people read it, in MyPT's sections and order."""
    return [
        "=== FORMAT ===", *_format_lines(report),
        f"Location: {report['path']}",
        "", "=== CONFIG ===", *_config_lines(report),
        "", "=== TOKENIZER ===", *_tokenizer_lines(report["tokenizer"]),
        "", "=== TRAINING STATE ===", *_state_lines(report["training_state"]),
        *_gold_lines(report),
        "", "=== FILES ===", *_file_lines(report),
    ]  # fmt: skip


def _format_lines(report: dict[str, Any]) -> list[str]:
    if report["format"] == "legacy":
        first = "Legacy single-file format"
    else:
        by, first = report["saved_by"], "New JSON-based format"
        first += f", saved by mypt_fast {by['mypt_fast']} (torch {by['torch']})" if by else ""
    era = "Weights of the per-head era: ReLU, bias in the attention's output"
    return [first, *([era] if report["per_head_era"] else [])]


def _config_lines(report: dict[str, Any]) -> list[str]:
    config = report["config"]
    first = [f"{k}:{config[k]}" for k in FIRST if k in config]
    rest = [f"{k}:{v}" for k, v in config.items() if k not in FIRST]
    n = report["total_params"]
    return [
        ", ".join(first),
        *([", ".join(rest)] if rest else []),
        f"Parameters: {n:,} ({console.count(n)})",
    ]


def _tokenizer_lines(state: dict[str, Any] | None) -> list[str]:
    if state is None:
        return ["No tokenizer.json"]
    kind = state.get("token_kind")
    out = [f"kind      : {kind}"]
    if kind == "gpt2":
        out.append("vocab     : GPT-2 BPE (fixed ~50k tokens)")
    elif kind == "char":
        chars = state.get("chars") or []
        shown = json.dumps("".join(map(str, chars[:60])), ensure_ascii=False)[1:-1]
        out.append(f"vocab     : {len(chars)} characters")
        out.append(f"chars     : {shown}{' ...' if len(chars) > 60 else ''}")
    else:
        out.append(f"vocab     : {state.get('base_vocab_size')} tokens of its own BPE")
    special = state.get("special_token_encoder") or {}
    return [*out, f"special   : {len(special)} tokens{_moved(state)}"] if special else out


def _moved(state: dict[str, Any]) -> str:
    from mypt_fast.tokenizer import SPECIAL_TOKENS
    from mypt_fast.tokenizer_state import moved_specials

    for name, (old, new) in moved_specials(state, SPECIAL_TOKENS).items():
        return f", at the ids the weights were trained with ({name} {old}, today {new})"
    return ""


def _state_lines(state: dict[str, Any] | None) -> list[str]:
    if state is None:
        return ["No training state recorded"]
    out = [f"Last recorded training step: {state.get('step', 'unknown')}"]
    config = state.get("training_config")
    if isinstance(config, dict):
        out.append("Training configuration:")
        out += [f"  {k}: {json.dumps(v) if isinstance(v, dict) else v}" for k, v in config.items()]
    return out


def _gold_lines(report: dict[str, Any]) -> list[str]:
    state = report["gold_selection_state"]
    if not state and not report["gold_path"]:
        return []
    out = ["", "=== GOLD ==="]
    if state:
        best = state.get("best_gold_val_loss")
        loss = f"{best:.4f}" if isinstance(best, (int, float)) else "unknown"
        out.append(f"Best step: {state.get('gold_step')} (val_loss={loss})")
    return [*out, f"Location: {report['gold_path'] or 'not there any more'}"]


def _file_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            f["file"], "-" if f["bytes"] is None else console.bytes_text(f["bytes"]),
            "" if f["file"] == "manifest.json" else STATUS_TEXT.get(f["status"], f["status"]),
        ]
        for f in report["files"]
    ]  # fmt: skip
    total = sum(f["bytes"] or 0 for f in report["files"])
    out = console.table(["file", "size", "hash"], rows, left=1)
    out.append(f"Total: {console.bytes_text(total)}")
    if report["format"] == "legacy":
        out.append("`mypt-fast convert` makes a bundle of it")
    elif report["saved_by"] is None:
        out.append("No manifest.json: files cannot be verified")
    elif report["verified"]:
        out.append("Verified: every file is what was saved")
    return out
