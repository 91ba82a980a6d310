"""`mypt-fast configs`: list, show and check model presets."""

import argparse
import json
from pathlib import Path
from typing import Any

from mypt_fast import console, presets
from mypt_fast.accounting import count_parameters
from mypt_fast.config import TrainConfig
from mypt_fast.errors import ConfigError, MyptError
from mypt_fast.schema import field_names

HELP = "list, show and check model presets"
DESCRIPTION = """\
List the presets in ./configs and the shipped ones, with exact parameter counts; show one in full;
or check that files are valid presets."""
EXAMPLES = """\
examples:
  mypt-fast configs
  mypt-fast configs --config 150M_1024
  mypt-fast configs --validate my_config.json           exit code 2 when a file is not valid"""

RULE = "=" * 70
# MyPT's table: column and its least width
COLUMNS = (("File", 20), ("Name", 15), ("Params", 12), ("Layers", 8), ("Heads", 8), ("Embed", 8))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to list, show or check."""
    parser.add_argument("--config_file", metavar="FILE", help="show this preset; also --config")
    parser.add_argument("--configs_dir", metavar="DIR", help="list only this folder")
    parser.add_argument(
        "--validate",
        nargs="*",
        metavar="PATH",
        help="check these files, every .json in these folders, or every preset listed",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """List, show or validate; returns the exit code."""
    if args.validate is not None:
        return _validate(args)
    if args.config_file is not None:
        preset = presets.load(args.config_file)
        if args.json:
            print(json.dumps(describe(preset, preset.path.name), indent=2, ensure_ascii=False))
        else:
            print("\n".join(detail_lines(preset)))
        return 0
    rows = []
    for label, path in listing(args.configs_dir):
        try:
            rows.append(describe(presets.load(path), label))
        except ConfigError as e:
            console.notice(f"note: left out: {e}")
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print("\n".join(table_lines(rows)))
    return 0


def listing(folder: str | None) -> list[tuple[str, Path]]:
    """Presets to list, as (name shown, path): one folder's, or ./configs and the shipped ones.

    Raises:
        ConfigError: if the folder is not there or holds no preset.
    """
    if folder is not None:
        found = _in_folder(Path(folder))
        if not found:
            missing = "no such folder" if not Path(folder).is_dir() else "no .json file in it"
            raise ConfigError(f"--configs_dir {folder}", missing)
        return list(found.items())
    # a user's file of the same name is the one that `--config NAME.json` would read
    both = {**_in_folder(presets.shipped_dir()), **_in_folder(Path("configs"))}
    return sorted(both.items(), key=lambda item: ("/" in item[0], item[0]))


def _in_folder(root: Path) -> dict[str, Path]:
    paths = [*sorted(root.glob("*.json")), *sorted((root / "base").glob("*.json"))]
    return {p.relative_to(root).as_posix(): p for p in paths}


def describe(preset: presets.Preset, label: str) -> dict[str, Any]:
    """Return what a machine would read of a preset."""
    train = preset.train.to_dict()
    return {
        "file": label,
        "path": str(preset.path),
        "name": preset.name,
        "description": preset.description,
        "total_params": count_parameters(preset.model).total,
        "model": preset.model.to_dict(),
        "train": {k: train[k] for k in field_names(TrainConfig) if k in preset.given},
    }


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return MyPT's table of presets."""
    cells = [
        [
            r["file"], r["name"], millions(r["total_params"]), str(r["model"]["n_layer"]),
            str(r["model"]["n_head"]), str(r["model"]["n_embd"]),
        ]
        for r in rows
    ]  # fmt: skip
    header = [name for name, _ in COLUMNS]
    widths = [
        max(least, *(len(row[i]) for row in cells)) if cells else least
        for i, (_, least) in enumerate(COLUMNS)
    ]

    def line(row: list[str]) -> str:
        return " ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()

    return [
        "Available Model Configurations", RULE, "",
        line(header), line(["-" * w for w in widths]), *map(line, cells),
        "", "`mypt-fast configs --config NAME` shows one in full.",
    ]  # fmt: skip


def short_path(path: Path) -> str:
    """Return what `--config` takes: shipped presets as configs/NAME.json, wherever they lie."""
    root = presets.shipped_dir()
    inside = path.is_relative_to(root)
    return f"configs/{path.relative_to(root).as_posix()}" if inside else str(path)


def millions(n: int) -> str:
    """Parameters in MyPT's unit: '602.28M'."""
    return f"{n / 1e6:.2f}M"


def detail_lines(preset: presets.Preset) -> list[str]:
    """Return MyPT's page about one preset."""
    cfg, shown = preset.model, short_path(preset.path)
    total = count_parameters(cfg).total
    train = describe(preset, preset.path.name)["train"]
    rope = f" (theta {cfg.rope_theta:g}, scale {cfg.rope_scale:g})"
    rows = {
        "Layers": cfg.n_layer, "Heads": cfg.n_head, "Embedding": cfg.n_embd,
        "Block size": cfg.block_size, "Vocab size": cfg.vocab_size, "Dropout": cfg.dropout,
        "Bias": cfg.bias,
        "Positions": cfg.pos_encoding + (rope if cfg.pos_encoding == "rope" else ""),
        "MLP": cfg.mlp_type, "Norm": cfg.norm_type, "Tied": cfg.tie_weights,
    }  # fmt: skip
    return [
        RULE, f"Config: {preset.name}", f"File: {shown}", RULE,
        *([f"Description: {preset.description}"] if preset.description else []),
        "", "Architecture:", *(f"  {k:<12}: {v}" for k, v in rows.items()),
        "", "Parameters:",
        f"  {'Total':<12}: {total:,} ({millions(total)})",
        f"  {'Batch size':<12}: {cfg.batch_size}",
        *(["", "Training:"] if train else []),
        *(f"  {k:<12}: {json.dumps(v) if isinstance(v, dict) else v}" for k, v in train.items()),
        "", "Usage:",
        f"  mypt-fast train --config_file {shown} --model_name my_model --input_file input.txt",
        RULE,
    ]  # fmt: skip


def _named(word: str) -> list[tuple[str, Path]]:
    """A file, or every preset in a folder and those under it; raises ConfigError for none."""
    if not Path(word).is_dir():
        return [(word, Path(word))]
    found = sorted(p for p in Path(word).rglob("*.json") if p.is_file())
    if not found:
        raise ConfigError(f"--validate {word}", "no .json file in the folder")
    return [(str(p), p) for p in found]


def _validate(args: argparse.Namespace) -> int:
    files = args.validate or ([args.config_file] if args.config_file else [])
    named = [item for f in files for item in _named(f)] or listing(args.configs_dir)
    results = []
    for label, path in named:
        try:
            total = count_parameters(presets.load(path).model).total
            results.append({"file": label, "valid": True, "total_params": total})
        except MyptError as e:
            results.append({"file": label, "valid": False, "error": str(e)})
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        for r in results:
            fine = f"ok   {r['file']}: {r.get('total_params', 0):,} parameters"
            print(fine if r["valid"] else f"bad  {r['file']}: {r['error']}")
    bad = sum(not r["valid"] for r in results)
    if bad:
        raise ConfigError(f"{bad} of {len(results)} files are not valid presets")
    return 0
