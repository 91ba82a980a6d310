"""`mypt-fast train`: settle the settings, open the run, train."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast import console, publish, settings
from mypt_fast.cli import flags
from mypt_fast.config import ModelConfig, TrainConfig
from mypt_fast.core.config import strict_compat

if TYPE_CHECKING:
    from mypt_fast.training.trainer import Trainer

HELP = "train a model, or continue a run"
DESCRIPTION = """\
Train a GPT. A run that exists is continued: everything not given comes from it, its data too.
Without data, a new run trains on the Python standard library's own sources."""
EXAMPLES = """\
examples:
  mypt-fast train --config tiny_char --input_file book.txt --tokenization char --model_name book
  mypt-fast train --config 150M_1024 --dataset_dir data/books --model_name books --max_iters 20000
  mypt-fast train --model_name books --max_iters 40000          continue with the same settings
  mypt-fast train --config 500M_1024 --dry_run                  check everything, train nothing

Ctrl-C saves and stops; the resumed run equals one that was never stopped. So do SIGTERM and
SIGUSR1; a second Ctrl-C stops at once, and SIGUSR2 saves and goes on."""
SUPPRESS = True


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the run's own flags, then one per setting."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--model_name",
        metavar="NAME",
        help="run directory under checkpoints/ (default: the preset's name)",
    )
    run.add_argument(
        "--config_file",
        metavar="FILE",
        help="preset: a JSON file, or the name of a shipped one; also --config",
    )
    run.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, open the data, print the plan and stop",
    )
    run.add_argument(
        "--strict", action="store_true", help="an ignored flag is an error, not a warning"
    )
    run.add_argument(
        "--allow_gate",
        action="store_true",
        help="let gold_selection.external_gate run its script; without it, never",
    )
    run.add_argument(
        "--yes", action="store_true", help="never ask, not even as `mypt-fast run train.py`"
    )
    run.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)  # as train.py does
    flags.add_section(parser, settings.DataConfig, "data")
    flags.add_section(parser, TrainConfig, "training")
    flags.add_section(parser, ModelConfig, "model: run settings", role="run")
    flags.add_section(
        parser, ModelConfig, "model: architecture (fixed by a preset or a saved run)", role="arch"
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    given: dict[str, Any] = {}
    for section in (ModelConfig, TrainConfig, settings.DataConfig):
        given |= flags.given(args, section)
    options: dict[str, Any] = {
        "model_name": getattr(args, "model_name", None),
        "config_file": getattr(args, "config_file", None),
        "strict": getattr(args, "strict", False),
        "allow_gate": getattr(args, "allow_gate", False),
        "preset_yields": getattr(args, "ask", False),
        "strict_compat": strict_compat(),
    }
    dry_run = getattr(args, "dry_run", False)
    run_dir = settings.run_dir(options["model_name"], options["config_file"])
    from mypt_fast.checkpoint.legacy import old_run
    from mypt_fast.checkpoint.lock import RunLock

    with RunLock(run_dir.with_name(run_dir.name + end) for end in ("", "_gold", "_fp16")) as lock:
        if not dry_run and run_dir.parent.is_dir():
            _own(run_dir, lock)
        resolved = settings.resolve(given, **options, read_old=old_run)
        if not resolved.resume and (run_dir / "final.pt").is_file():
            resolved.notices.append(
                f"{run_dir / 'final.pt'} is not continued: --init_from_model {run_dir.name} "
                "starts from it"
            )
        for notice in resolved.notices:
            console.notice(f"note: {notice}")
        if resolved.train.terminal_log_file:
            console.tee(Path(resolved.train.terminal_log_file))
        asks = getattr(args, "ask", False) and not getattr(args, "yes", False)
        return _train(resolved, dry_run, lock, asks)


def _own(run_dir: Path, lock: Any) -> None:
    """Lock out other trainers, then put a damaged checkpoint right, before anything is read."""
    from mypt_fast.checkpoint.snapshots import settle

    lock.acquire()
    publish.clean_stale(run_dir)
    for notice in settle(run_dir):
        console.notice(f"note: {notice}")


def _train(resolved: settings.Settings, dry_run: bool, lock: Any, asks: bool) -> int:
    # imported here: a wrong setting is reported before torch is loaded
    from mypt_fast.training.numerics import applied
    from mypt_fast.training.signals import StopRequested, StopSignal

    with StopSignal() as stop:
        try:
            with stop.interruptible():
                trainer = _prepared(resolved, dry_run, lock, asks)
        except StopRequested:
            console.notice("stopped before training began; there was nothing to save")
            return stop.exit_code
        if trainer is None:
            return 0
        try:
            with applied(trainer.run):
                return trainer.train(stop)
        finally:
            trainer.live.close()
            trainer.run.close()


def _prepared(
    resolved: settings.Settings, dry_run: bool, lock: Any, asks: bool
) -> "Trainer | None":
    """Open data and weights and print the plan; None where that was all."""
    from mypt_fast.training.compiling import choose
    from mypt_fast.training.plan import plan_lines
    from mypt_fast.training.run import open_run
    from mypt_fast.training.space import check_space
    from mypt_fast.training.trainer import Trainer
    from mypt_fast.training.utilisation import find

    with console.byte_progress() as progress:
        opened = open_run(resolved, progress, keeps=not dry_run)
    opened.ceilings, measured = find(
        opened.device, opened.precision, resolved.model, tf32=resolved.train.tf32,
        keeps=not dry_run,
    )  # fmt: skip
    opened.notices += [measured] if measured else []
    for notice in opened.notices:
        console.notice(f"note: {notice}")
    start = int(resolved.saved_state.get("step") or 0)
    choice = choose(opened, start)
    if start < resolved.train.max_iters or not resolved.resume:
        for line in plan_lines(opened, start, choice):
            console.say(line)
    if tight := check_space(resolved):
        console.notice(f"note: {tight}")
    is_wanted = _covers(opened.train_tokens, resolved, asks)
    if dry_run or resolved.train.max_iters == 0:
        console.say("dry run: settings and data are good; nothing was trained")
        opened.close()
        return None
    if not is_wanted:
        console.say("not started; --max_iters N trains longer, --yes does not ask")
        opened.close()
        return None
    live = console.Live(resolved.train.max_iters, start)
    try:
        lock.acquire()
        for notice in lock.notices:
            console.notice(f"note: {notice}")
        return Trainer(opened, live)
    except BaseException:
        live.close()
        opened.close()
        raise


def _covers(train_tokens: int, resolved: settings.Settings, asks: bool) -> bool:
    """Say how much of the data the run reads where that is little or much; False: the user said no.

    The plan tells the passes of every run; below one and above ten they deserve a line.
    """
    from mypt_fast.core.training_utils import calculate_dataset_coverage, coverage_line

    cfg, train = resolved.model, resolved.train
    coverage = calculate_dataset_coverage(
        train.max_iters, cfg.batch_size, cfg.block_size, train_tokens, train.grad_accum_steps
    )
    ratio = coverage["coverage_ratio"]
    if 1 <= ratio <= 10 or train.max_iters == 0:
        return True
    console.notice(f"note: {coverage_line(coverage, train.max_iters)}")
    if ratio > 1 or not asks or sys.stdin is None or not sys.stdin.isatty():
        return True
    print("Train anyway? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
