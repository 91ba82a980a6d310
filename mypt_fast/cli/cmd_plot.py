"""`mypt-fast plot`: draw training logs into an image."""

import argparse
import json
from collections import Counter
from pathlib import Path

from mypt_fast import console

HELP = "draw loss curves from training logs"
DESCRIPTION = """\
Draw training, validation and further losses, gold checkpoints, learning rate and speed from JSONL
logs. A resumed run is one line; several logs are compared in one picture."""
EXAMPLES = """\
examples:
  mypt-fast plot book                                   logs/train/book_eval.jsonl to loss.png
  mypt-fast plot book book_wide --x tokens --out compare.png
  mypt-fast plot old.jsonl --x time --title "First try" """


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add logs, axis and output."""
    parser.add_argument("logs", nargs="+", metavar="LOG", help="JSONL log, or a model's name")
    parser.add_argument(
        "--out", default="loss.png", metavar="FILE", help="image (default: loss.png)"
    )
    parser.add_argument(
        "--x", choices=("step", "tokens", "time"), default="step", help="axis (default: step)"
    )
    parser.add_argument("--title", metavar="TEXT", help="default: the runs' names")
    parser.add_argument("--json", action="store_true", help="what was read and drawn, as JSON")


def run(args: argparse.Namespace) -> int:
    """Draw; returns the exit code."""
    from mypt_fast import plot, run_log

    logs = [run_log.read_log(run_log.find(name)) for name in args.logs]
    report = []
    for log in logs:
        bad = run_log.not_finite(log.train, "loss") + run_log.not_finite(log.evals, "val_loss")
        if log.junk:
            lines = "1 line" if log.junk == 1 else f"{log.junk} lines"
            console.notice(f"note: {log.path}: {lines} skipped, not events")
        if bad:
            console.notice(f"note: {log.path}: {bad} losses left out, not finite")
        losses = run_log.series(log.evals, "val_loss", "step")[1]
        report.append({
            "log": str(log.path), "train_points": len(log.train), "evals": len(log.evals),
            "resumed": max(0, log.starts - 1), "skipped_lines": log.junk, "not_finite": bad,
            "final_val_loss": losses[-1] if losses else None,
            "best_val_loss": min(losses, default=None),
            "incidents": dict(Counter(str(p.values["event"]) for p in log.incidents)),
        })  # fmt: skip
    out = Path(args.out)
    plot.draw(logs, out, axis=args.x, title=args.title)
    if args.json:
        print(json.dumps({"out": str(out), "logs": report}, indent=2, ensure_ascii=False))
    else:
        print(f"wrote {out}")
    return 0
