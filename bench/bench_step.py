"""A training step: this engine beside plain PyTorch, MyPT's manner and Hugging Face.

Each model trains in a process of its own, on the same weights, batches, dtype, AdamW and clipping
(steps.py says how). The processes take turns, a step each, so that a ratio is taken round by round
and a drift of the machine hits all alike. A card too small for all of them at once gives each its
rounds in turn: then the ratios are of medians, and the row says so.

    pytest bench/bench_step.py --benchmark-only            one short case, about two minutes
    python bench/bench_step.py [--cases tiny-bf16,...]     all of them, to bench/results/<device>/
    python bench/bench_step.py --vram 16G                  on a GPU: no process may hold more

Where a call may take minutes only: --cases, --variants and --minutes take a part, and --keep adds
it to the file that other parts have begun.

MFU (accounting.mfu) is a share of the rate of a bare matmul in the same dtype, measured here before
and after; the better of the two counts. The bars are on a CPU: `auto` at least 0.97 times `plain`
(both compiled), and at 150M 1.5 times `mypt-eager`.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does, for all sides

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # mypt_fast, installed or not

import hf_gpt
import pytest
import torch
from gpu_suite import ROOMY_BYTES, Model, Suite
from record import rows_of, save, slug
from steps import DTYPES, Variant

from mypt_fast import presets
from mypt_fast.accounting import flops_per_token, mfu
from mypt_fast.benchmark.timing import Clock, matmul_rate, median
from mypt_fast.training import device as devices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS, BASELINE, MYPT = "auto", "plain", "mypt-eager"
VARIANTS = {
    "cpu": ("plain-eager", BASELINE, MYPT, "hf", "auto-eager", OURS),
    "cuda": (BASELINE, MYPT, "hf", OURS, "auto/norms+exact16", "auto/norms+fast", "auto/plan"),
}[DEVICE]
BARS = {BASELINE: 0.97, MYPT: 1.5}  # on a CPU; the second at 150M only
LEAST_ROUNDS = 7
HUNDRED = 97  # rounds of a step, after three to warm up: the loss is that after 100 steps
TWO_HUNDRED = (50, 4)  # rounds, and steps of each
MINUTES = 30.0  # of the processes that are there at once


@dataclass(frozen=True)
class Case:
    """A preset at a number of sequences a step."""

    preset: str
    dtype: str
    sequences: int
    rounds: int = LEAST_ROUNDS
    steps: int = 1  # a round
    variants: tuple[str, ...] = VARIANTS
    more: str = ""  # what tells it from another of this preset and dtype

    @property
    def name(self) -> str:
        """As --cases takes it."""
        return f"{self.preset.rpartition('/')[2]}-{self.dtype}{self.more and '-'}{self.more}"


# The preset's batch for tiny; 8 of small's 32 sequences and one of 150M's 24, as a CPU has hours.
CASES = {
    "cpu": (
        Case("tiny_char", "bf16", 16, HUNDRED), Case("tiny", "fp32", 16), Case("tiny", "bf16", 16),
        Case("small", "fp32", 8), Case("small", "bf16", 8),
        # all at once would not fit 24 GB
        Case("150M_1024", "fp32", 1, variants=(BASELINE, MYPT, f"{MYPT}~kept", OURS)),
        Case("150M_1024", "bf16", 1, variants=(BASELINE, MYPT, f"{MYPT}~kept", OURS)),
    ),
    "cuda": (
        Case("500M_1024", "bf16", 8, HUNDRED), Case("500M_1024_llama", "bf16", 8, 12, 4),
        Case("base/750M_unified_v1", "bf16", 96, 12),
        # the peaks that are promised, each at its own micro-batch, and that a run stays there
        Case("500M_1024", "bf16", 8, *TWO_HUNDRED, ("auto/norms@8", "auto/norms+exact16@8"), "200"),
        Case(
            "base/750M_unified_v1", "bf16", 96, *TWO_HUNDRED,
            ("auto/norms+exact16@3", "auto/norms+fast@6"), "200",
        ),
        Case("1.3B_1024", "bf16", 8, 12, 4, ("auto/norms+fast", "auto/plan")),
    ),
}  # fmt: skip
# pytest has ten minutes for all of bench/, and each compiled process takes half a minute of a CPU
# to start: one case of three rounds there shows that it runs, the script measures all with seven
SHORT = {
    "cpu": (Case("tiny", "bf16" if devices.cpu_has_bf16() else "fp32", 16, 3),),
    "cuda": (Case("500M_1024", "bf16", 8, 3, 2),),
}


@contextmanager
def suite(case: Case, vram_gib: float, minutes: float = MINUTES) -> Iterator[Suite]:
    """What the processes of a case are started with; its caches go with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args = Namespace(
            out=Path(folder), minutes=minutes, only="steps", preset=case.preset,
            sequences=case.sequences, cap_gib=vram_gib, device=DEVICE, dtype=case.dtype,
        )  # fmt: skip
        yield Suite(args, Path(folder, "scratch"))


def variants_of(case: Case) -> tuple[list[str], dict[str, str]]:
    """The variants that can run here, and why the others cannot."""
    absent = {}
    why = hf_gpt.why_not(presets.load(case.preset).model, DEVICE)
    if why and "hf" in case.variants:
        absent["hf"] = why
    return [v for v in case.variants if v not in absent], absent


def start(run: Suite, names: list[str]) -> list[Model]:
    """Start and warm up one after the other: no two compile, or hold their peak, at once."""
    models: list[Model] = []
    try:
        for name in names:
            models.append(Model(run, name))
            models[-1].answer(time.monotonic() + run.left())
    except BaseException:
        close(models)
        raise
    return models


def close(models: list[Model]) -> None:
    """End all processes."""
    for model in models:
        model.close()


def roomy() -> bool:
    """Whether the processes of a case fit side by side, and so can take turns."""
    return DEVICE == "cpu" or torch.cuda.get_device_properties(0).total_memory > ROOMY_BYTES


def measure(
    case: Case, vram_gib: float, names: list[str], minutes: float | None = None
) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, a row per variant: all at once, or one more each time.

    Args:
        case: what is trained.
        vram_gib: that each process may hold.
        names: of the variants.
        minutes: that all may take; by default each that has the card to itself gets its own.
    """
    rows: list[dict[str, Any]] = []
    groups = [names] if roomy() else [[name] for name in names]
    end = time.monotonic() + 60 * (minutes or 0.0)
    for i, group in enumerate(groups):
        share = (end - time.monotonic()) / 60 / (len(groups) - i) if minutes else MINUTES
        with suite(case, vram_gib, share) as run:
            models = start(run, group)
            try:
                for _ in range(case.rounds):
                    for model in models:
                        model.ask(case.steps, time.monotonic() + run.left())
                for model in models:
                    model.ask("loss", time.monotonic() + run.left())
                rows += [model.row() for model in models]
            finally:
                close(models)
        yield rows


def ratios(own: dict[str, Any], other: dict[str, Any], in_turn: bool) -> dict[str, Any]:
    """How many times faster `own` is: round by round, or of medians."""
    if not in_turn:
        middle = median(other["samples"]) / median(own["samples"])
        return {"median": middle, "of": "medians"}
    each = [b / a for a, b in zip(own["samples"], other["samples"], strict=True)]
    return {"median": median(each), "min": min(each), "max": max(each), "rounds": len(each)}


def complete(row: dict[str, Any], rounds: int) -> bool:
    """Whether it has all its samples."""
    return len(row.get("samples", ())) == rounds


def finish(
    case: Case, rows: list[dict[str, Any]], in_turn: bool, matmul: float
) -> list[dict[str, Any]]:
    """The rows with what follows from them: MFU, and the ratios of our variants to the others."""
    flops, samples = flops_per_token(presets.load(case.preset).model), case.rounds * case.steps
    by_name = {row["variant"]: row for row in rows}
    for row in rows:
        row |= about(case)
        if "tokens_per_s" in row:
            row["mfu"] = mfu(row["tokens_per_s"], flops, matmul / 1e12)
            row["matmul_tflops"] = matmul / 1e12
    for own in (name for name in by_name if name.startswith("auto")):
        if own in by_name and complete(by_name[own], samples):
            by_name[own]["times"] = {
                name: ratios(by_name[own], row, in_turn)
                for name, row in by_name.items()
                if name != own
                and complete(row, samples)
                and row["tokens_per_step"] == by_name[own]["tokens_per_step"]
            }
    return rows


def about(case: Case) -> dict[str, Any]:
    """What every row of a case says of it."""
    return {
        "case": case.name, "preset": case.preset, "dtype": case.dtype, "sequences": case.sequences,
    }  # fmt: skip


def compare(
    case: Case, vram_gib: float = 16.0, minutes: float | None = None,
    each: Callable[[list[dict[str, Any]]], Any] = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """All rows of a case; a variant that is not here has a row that says why.

    `each` gets the rows as they are whenever there are more: a call that is killed leaves those.
    """
    clock, dtype = Clock(DEVICE), DTYPES[case.dtype]
    names, absent = variants_of(case)
    others = [{"variant": v, "absent": why, **about(case)} for v, why in absent.items()]
    rows: list[dict[str, Any]] = []
    before, in_turn = matmul_rate(clock, dtype), roomy()
    for rows in measure(case, vram_gib, names, minutes):
        each(finish(case, rows, in_turn, before) + others)
    return finish(case, rows, in_turn, max(before, matmul_rate(clock, dtype))) + others


def runnable(cases: tuple[Case, ...]) -> list[Case]:
    """Without bf16 on a CPU that emulates it."""
    return [c for c in cases if DEVICE == "cuda" or c.dtype == "fp32" or devices.cpu_has_bf16()]


@pytest.mark.parametrize("case", SHORT[DEVICE], ids=lambda c: c.name)
def test_step(benchmark, case: Case) -> None:
    benchmark.group = f"training step, {case.name}"
    names, _ = variants_of(case)
    with suite(case, 16.0, minutes=5.0) as run:
        models = start(run, names)
        try:
            own = models[names.index(OURS)]

            def others() -> None:
                for model in models:
                    if model is not own:
                        model.ask(case.steps, time.monotonic() + run.left())

            benchmark.pedantic(
                lambda: own.ask(case.steps, time.monotonic() + run.left()),
                setup=others,
                rounds=case.rounds,
            )
            rows = finish(case, [m.row() for m in models], True, 1e12)
        finally:
            close(models)
    assert not [row for row in rows if "failed" in row]
    benchmark.extra_info["rows"] = rows
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """A line per row."""
    for row in rows:
        case = f"{row['preset']:10} {row['dtype']} {row['variant']:12}"
        if "tokens_per_s" not in row:
            print(f"{case} {row.get('absent') or row.get('failed')}", flush=True)
            continue
        times = {k: f"{v['median']:.3f}x" for k, v in row.get("times", {}).items()}
        words = ", ".join(f"{ratio} {name}" for name, ratio in times.items())
        loss = f" loss {row['loss']:.4f} after {row['steps']}" if "loss" in row else ""
        print(f"{case} {row['tokens_per_s']:10,.0f} tokens/s{loss} {words}", flush=True)


def gib(text: str) -> float:
    """A size as people write it, in GiB: 16, 16G, 16GiB, 500M."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:(G|M)(?:i?B)?)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size as 16G; found {text!r}")
    return float(found[1]) / (1024 if (found[2] or "G").upper() == "M" else 1)


def asked_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Case]:
    """The cases that the flags name, each with the variants that they name."""
    known = {c.name: c for c in runnable(CASES[DEVICE])}
    asked = args.cases.split(",") if args.cases else list(known)
    if set(asked) - set(known):
        parser.error(f"--cases: expected some of {', '.join(known)}; found {args.cases}")
    if args.variants is None:
        return [known[name] for name in asked]
    variants = tuple(args.variants.split(","))
    try:
        for name in variants:
            Variant.named(name)
    except ValueError as e:
        parser.error(f"--variants: {e}")
    return [replace(known[name], variants=variants) for name in asked]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vram", type=gib, default=16.0, metavar="SIZE", help="of GPU memory")
    parser.add_argument("--cases", help="only these, comma-separated; the file has no others")
    parser.add_argument("--variants", help="only these, see steps.py; ratios are among them")
    parser.add_argument("--minutes", type=float, help="of a case; else 30 for those in turn")
    parser.add_argument("--keep", action="store_true", help="what the file holds of anything else")
    args = parser.parse_args()
    cases = asked_of(parser, args)
    with suite(cases[0], args.vram) as run:
        header = {**run.facts, **({"cap_gib": args.vram} if DEVICE == "cuda" else {})}
    folder = slug(header["gpu"]["name"]) if "gpu" in header else "cpu"
    try:
        rows = rows_of("step", header, folder) if args.keep else []
    except ValueError as e:
        parser.error(f"--keep: {e}")
    for case in cases:
        again = {(case.name, variant) for variant in case.variants}
        others = [r for r in rows if (r.get("case"), r["variant"]) not in again]

        def keep(found: list[dict[str, Any]], others: list[dict[str, Any]] = others) -> None:
            save("step", header, [*others, *found], folder)

        found = compare(case, args.vram, args.minutes, keep)
        show(found)
        rows = [*others, *found]
        save("step", header, rows, folder)  # after each case: one that fails spares them
    return 0


if __name__ == "__main__":
    sys.exit(main())
