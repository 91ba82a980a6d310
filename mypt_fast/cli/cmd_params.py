"""`mypt-fast params`: exact parameter counts, FLOPs and bytes of an architecture."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from mypt_fast import accounting, console, presets
from mypt_fast.cli import flags
from mypt_fast.config import ModelConfig
from mypt_fast.errors import ConfigError
from mypt_fast.schema import build, shown

HELP = "count parameters and bytes of an architecture"
DESCRIPTION = """\
Count the parameters of an architecture exactly, with the FLOPs and the bytes that follow. Numbers
come from a preset, from flags, or from questions; flags change a preset's numbers."""
EXAMPLES = """\
examples:
  mypt-fast params --config 150M_1024
  mypt-fast params --n_layer 16 --n_embd 768 --n_head 12 --block_size 1024
  mypt-fast params --config 500M_1024 --mlp_type swiglu --tie_weights
  mypt-fast params --interactive"""
SUPPRESS = True

ASKED = ("n_layer", "n_embd", "n_head", "block_size", "vocab_size")
FORMULA = """\
Total = token embeddings + position embeddings + attention + MLP + norms + LM head

  L n_layer, C n_embd, T block_size, V vocab_size

  token embeddings     V C
  position embeddings  T C                      learned; rope has none
  attention            L (4 C^2 + 4 C)          the 4 C only with bias
  MLP, gelu            L (8 C^2 + 5 C)
  MLP, swiglu          L 3 C F                  F: 8 C / 3 rounded up to a multiple of 64
  norms                (2 L + 1) 2 C            layernorm; rmsnorm (2 L + 1) C
  LM head              V C + V                  V when tied to the token embeddings

Roughly 12 L C^2 + 2 V C; n_head changes nothing."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the sources of numbers, then one flag per architecture setting."""
    parser.add_argument("--config_file", metavar="FILE", help="preset: file or name; also --config")
    parser.add_argument("--interactive", action="store_true", default=False, help="ask for numbers")
    parser.add_argument("--show_formula", action="store_true", default=False, help="explain them")
    parser.add_argument("--json", action="store_true", default=False, help="JSON instead of text")
    flags.add_section(parser, ModelConfig, "architecture", role="arch")


def run(args: argparse.Namespace) -> int:
    """Count; returns the exit code."""
    typed = flags.given(args, ModelConfig)
    preset = presets.load(args.config_file) if hasattr(args, "config_file") else None
    if args.show_formula:
        print(FORMULA)
        if preset is None and not typed and not args.interactive:
            return 0
        print()
    if preset is None and not typed and not args.interactive:
        raise ConfigError(
            "nothing to count", cure="give --config, --n_layer and --n_embd ..., or --interactive"
        )
    cfg = preset.model if preset else ModelConfig()
    if preset:
        _say_changes(typed, cfg, str(preset.path))
    build(ModelConfig, typed, "command line")
    cfg = dataclasses.replace(cfg, **typed)
    if args.interactive:
        cfg = ask(cfg)
    cfg.check("command line")
    report = gather(cfg, preset.name if preset else None)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(report, cfg)))
    return 0


def _say_changes(typed: dict[str, Any], cfg: ModelConfig, source: str) -> None:
    for key, value in typed.items():
        if value != getattr(cfg, key):
            was = getattr(cfg, key)
            console.notice(f"note: --{key} {value} instead of {was} in {source}, here only")


def ask(cfg: ModelConfig) -> ModelConfig:
    """Ask for the numbers; an empty answer keeps the one shown.

    Raises:
        ConfigError: for an answer that is not a number in range, or no answer at all.
    """
    answers: dict[str, Any] = {}
    for key in ASKED:
        print(f"{key} [{getattr(cfg, key)}]: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin else ""
        if not line:
            raise ConfigError("--interactive: no answer", f"input ended at {key}")
        if word := line.strip():
            try:
                answers[key] = int(word)
            except ValueError:  # also of thousands of digits
                text = f"{key}: expected a whole number"
                raise ConfigError(text, f"found {shown(word)}") from None
    build(ModelConfig, answers, "answer")
    return dataclasses.replace(cfg, **answers)


def gather(cfg: ModelConfig, name: str | None) -> dict[str, Any]:
    """Return every number as a machine would read it."""
    n, state = accounting.count_parameters(cfg), accounting.state_bytes(cfg)
    return {
        "name": name,
        "config": cfg.to_dict(),
        "parameters": {**dataclasses.asdict(n), "total": n.total},
        "flops_per_token": accounting.flops_per_token(cfg),
        "training_bytes": {**dataclasses.asdict(state), "total": state.total},
        "checkpoint_bytes": {
            # fp32 weights and two fp32 moments; the JSON members are a few KiB
            "model.pt": 4 * n.total, "optimizer.pt": 8 * n.total, "total": 12 * n.total,
            "fp16 copy": 2 * n.total,
        },
    }  # fmt: skip


def lines(report: dict[str, Any], cfg: ModelConfig) -> list[str]:
    """Return the report as people read it."""
    p, state, disk = (report[k] for k in ("parameters", "training_bytes", "checkpoint_bytes"))
    total = p["total"]
    hidden = accounting.swiglu_hidden(cfg.n_embd) if cfg.mlp_type == "swiglu" else 4 * cfg.n_embd
    V, C, L = cfg.vocab_size, cfg.n_embd, cfg.n_layer
    learned, tied = cfg.pos_encoding == "learned", cfg.tie_weights
    shapes = {
        "token_embedding": ("token embeddings", f"{V} x {C}"),
        "position_embedding": (
            "position embeddings", f"{cfg.block_size} x {C}" if learned else "rope: none",
        ),
        "attention": ("attention", f"{L} layers, {cfg.n_head} heads of {C // cfg.n_head}"),
        "mlp": ("MLP", f"{L} layers, {cfg.mlp_type} of width {hidden}"),
        "norms": ("norms", f"{2 * L + 1} x {cfg.norm_type}"),
        "lm_head": ("LM head", "tied, bias only" if tied else f"{C} x {V}, bias"),
    }  # fmt: skip
    rows = [
        [label, shape, f"{p[key]:,}", f"{100 * p[key] / total:.1f} %"]
        for key, (label, shape) in shapes.items()
    ]
    rows.append(["total", "", f"{total:,}", console.count(total)])
    size = console.bytes_text
    return [
        *([f"Config: {report['name']}"] if report["name"] else []),
        *console.table(["part", "shape", "parameters", "share"], rows, left=2),
        "",
        f"FLOPs per token : {report['flops_per_token'] / 1e9:.3f} G, forward and backward",
        f"training state  : {size(state['total'])} = weights {size(state['weights'])}"
        f" + gradients {size(state['gradients'])} + AdamW moments {size(state['moments'])}",
        f"checkpoint      : {size(disk['total'])} = model.pt {size(disk['model.pt'])}"
        f" + optimizer.pt {size(disk['optimizer.pt'])}; fp16 copy {size(disk['fp16 copy'])}",
    ]  # fmt: skip
