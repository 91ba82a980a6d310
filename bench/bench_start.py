"""From the start of a process to its first optimised step: eager, one block compiled, all compiled.

Each start is a process of its own (steps.py says what it trains). A cold one has empty compile
caches, a warm one those that a cold one left. The ways take turns, and so do the steps measured
after: a drift of the machine hits all alike. The CPU seconds are those of the process and of the
compilers that it starts; where others use the machine, they say more than the clock.

    pytest bench/bench_start.py --benchmark-only       one cold start of a layer
    python bench/bench_start.py [--cases tiny-bf16,..] all of them, to bench/results/<device>/
"""

import argparse
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does, for all sides

from bench_step import DEVICE, Case, complete, ratios, runnable, suite
from gpu_suite import Model, Suite
from record import save, slug

from mypt_fast.benchmark.timing import median

# on a GPU as the planner chooses: a search for what fits would count as a part of the start
HOW = "/plan" if DEVICE == "cuda" else ""
EAGER, BLOCKS, WHOLE = f"auto{HOW}-eager", f"auto{HOW}", f"auto{HOW}-whole"
# starts of each kind, steps measured after them
CASES = {
    "cpu": (
        Case("tiny_char", "bf16", 16, 7), Case("tiny", "fp32", 16, 7), Case("tiny", "bf16", 16, 7),
        Case("small", "fp32", 8, 7), Case("small", "bf16", 8, 7),
    ),
    "cuda": (Case("150M_1024", "bf16", 8, 12), Case("500M_1024", "bf16", 8, 12)),
}  # fmt: skip
COLD = 3
LITTLE = {
    "batch_size": 2, "block_size": 32, "vocab_size": 64, "n_embd": 32, "n_head": 2, "n_layer": 1,
}  # fmt: skip


def start(run: Suite, way: str) -> tuple[Model, dict[str, float]]:
    """A process that has trained, and what it took until the end of its first step."""
    began = time.monotonic()
    model = Model(run, way)
    about = model.answer(began + run.left())
    if "failed" in about:
        raise RuntimeError(f"{way}: {about['failed']}: {about.get('tail', '')}")
    return model, {
        "s": about["first_step_at"] - began, "cpu_s": about["first_step_cpu_s"],
    }  # fmt: skip


def compare(case: Case, cold: int = COLD) -> list[dict[str, Any]]:
    """A row per way: its starts, then steps in turn with the others."""
    ways = (EAGER, BLOCKS, WHOLE)
    starts: dict[str, list[dict[str, float]]] = {f"{w} {k}": [] for w in ways for k in KINDS}
    for last in range(cold - 1, -1, -1):
        with suite(case, 16.0, minutes=60.0) as run:
            models = []
            try:
                for kind in KINDS:
                    for way in ways:
                        model, took = start(run, way)
                        starts[f"{way} {kind}"].append(took)
                        if kind == "warm" and not last:
                            models.append(model)
                        else:
                            model.close()
                for _ in range(case.rounds if models else 0):
                    for model in models:
                        model.ask(1, time.monotonic() + run.left())
                rows = [model.row() for model in models]
            finally:
                for model in models:
                    model.close()
    return finish(case, rows, starts)


KINDS = ("cold", "warm")


def finish(
    case: Case, rows: list[dict[str, Any]], starts: dict[str, list[dict[str, float]]]
) -> list[dict[str, Any]]:
    """The rows with their starts, and how much faster than eager their steps are."""
    kept = ("variant", "graphs", "median_s", "samples")
    eager, made = rows[0], []
    for row in rows:
        way = row["variant"]
        found: dict[str, Any] = {
            "preset": case.preset, "dtype": case.dtype, "sequences": case.sequences,
            **{k: row[k] for k in kept},
        }  # fmt: skip
        for kind in KINDS:
            for unit in ("s", "cpu_s"):
                found[f"{kind}_{unit}"] = [took[unit] for took in starts[f"{way} {kind}"]]
        if row is not eager and complete(row, case.rounds):
            found["times_eager"] = ratios(row, eager, in_turn=True)
        made.append(found)
    return made


def show(rows: list[dict[str, Any]]) -> None:
    """A line per row."""
    for row in rows:
        starts = ", ".join(
            f"{kind} {median(row[f'{kind}_s']):.1f} s ({median(row[f'{kind}_cpu_s']):.1f} CPU)"
            for kind in KINDS
        )
        times = f", {row['times_eager']['median']:.3f}x eager" if "times_eager" in row else ""
        name = f"{row['preset']:10} {row['dtype']} {row['variant']:10}"
        print(f"{name} {starts}, step {row['median_s']:.3f} s{times}", flush=True)


def test_cold_start(benchmark, tmp_path) -> None:
    """One small layer."""
    preset = tmp_path / "little.json"
    preset.write_text(json.dumps(LITTLE))
    with suite(Case(str(preset), "fp32", 2), 16.0, minutes=5.0) as run:
        benchmark.group = "start: until the first optimised step"
        benchmark.pedantic(lambda: start(run, BLOCKS)[0], rounds=1).close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", help="only these, comma-separated; the file then has no others")
    args = parser.parse_args()
    known = {c.name: c for c in runnable(CASES[DEVICE])}
    asked = args.cases.split(",") if args.cases else list(known)
    if set(asked) - set(known):
        parser.error(f"--cases: expected some of {', '.join(known)}; found {args.cases}")
    with suite(known[asked[0]], 16.0) as run:
        facts = run.facts
    folder = slug(facts["gpu"]["name"]) if "gpu" in facts else "cpu"
    rows: list[dict[str, Any]] = []
    for name in asked:
        found = compare(known[name])
        show(found)
        rows += found
        save("start", facts, rows, folder)  # after each case: one that fails spares them
    return 0


if __name__ == "__main__":
    sys.exit(main())
