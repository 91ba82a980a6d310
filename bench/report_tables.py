"""How each suite's rows become a table: one function per suite, from rows to Markdown lines.

A median stands beside its 20th and 80th percentile where raw samples are kept.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from mypt_fast.benchmark.timing import median, quantile

Row = dict[str, Any]
SPREAD = (0.2, 0.8)
NAMES = {
    "plain-eager": "nanoGPT-style, eager", "plain": "nanoGPT-style, compiled",
    "mypt-eager": "MyPT-style, eager", "mypt": "MyPT-style, eager",
    "mypt-eager~kept": "MyPT-style, eager, keeping freed memory as ours",
    "hf": "transformers, compiled", "hf-eager": "transformers, eager", "auto": "ours, compiled",
    "auto-eager": "ours, eager",
}  # fmt: skip


def number(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if value == 0 or abs(value) >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return text.rstrip("0").rstrip(".") if "." in text and abs(value) >= 100 else text.rstrip(".")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def spread(samples: Sequence[float], scale: float = 1.0) -> str:
    """Median (20th to 80th percentile)."""
    low, high = (quantile(list(samples), q) * scale for q in SPREAD)
    return f"{number(median(list(samples)) * scale)} ({number(low)} to {number(high)})"


def who(row: Row) -> str:
    """A variant in words; transformers' row says whether Liger's kernels ran."""
    kind, _, rows = row["variant"].partition("@")
    name = NAMES.get(kind, kind)
    if row.get("liger"):
        name = name.replace("transformers", f"transformers with Liger {row['liger']}")
    return f"{name}, in micro-batches of {rows}" if rows else name


def reason(row: Row) -> str:
    """Why a row has no samples."""
    why = row.get("absent") or row.get("failed") or row.get("cut_short") or "no samples"
    return f"none: {why}".replace("|", "\\|").replace("\n", " ")


def peak(row: Row) -> str:
    """The peak, on a GPU beside the predicted one."""
    found = row.get("peak_allocated_bytes") or row.get("peak_resident_bytes") or 0
    text, predicted = f"{found / 2**30:.2f} GiB", row.get("predicted_bytes")
    if "peak_allocated_bytes" in row and predicted:
        text += f", {found / predicted - 1:+.1%} on the prediction"
    return text


def sequences(row: Row) -> str:
    """Of a step, in words."""
    n = row["sequences"]
    return f"{n} sequence{'' if n == 1 else 's'}"


def step(rows: list[Row]) -> list[str]:
    """Training steps of processes in turn."""
    found = []
    for row in rows:
        case = f"{row['preset']}, {row['dtype']}, {sequences(row)}"
        if "tokens_per_s" not in row:
            found.append([case, who(row), reason(row), "", "", "", ""])
            continue
        loss = f"{row['loss']:.4f} after {row['steps']} steps" if "loss" in row else ""
        same = ("preset", "dtype", "sequences")
        others = {r["variant"]: who(r) for r in rows if all(r[k] == row[k] for k in same)}
        times = [ratio(others.get(k, k), v) for k, v in row.get("times", {}).items()]
        found.append([
            case, who(row), number(row["tokens_per_s"]), f"{row['mfu']:.0%}", peak(row), loss,
            "; ".join(times),
        ])  # fmt: skip
    header = ["case", "who", "tokens/s", "MFU", "peak memory", "loss", "times the others' speed"]
    return table(header, found)


def steps(rows: list[Row]) -> list[str]:
    """Short training steps of gpu_suite.py: the ratio is of medians, to the plain one."""
    plain_s = {
        r["tokens_per_step"]: r["median_s"] for r in rows
        if r["variant"].partition("@")[0] == "plain" and "median_s" in r
    }  # fmt: skip
    found = []
    for row in rows:
        if "median_s" not in row:
            found.append([who(row), reason(row), "", "", "", ""])
            continue
        is_plain = row["variant"].startswith("plain")
        other = None if is_plain else plain_s.get(row["tokens_per_step"])
        found.append([
            who(row), number(row["tokens_per_s"]), str(row["micro_batch"]),
            spread(row["samples"], 1e3), peak(row),
            f"{other / row['median_s']:.2f}x (of medians)" if other else "",
        ])  # fmt: skip
    header = ["who", "tokens/s", "micro-batch", "step, ms", "peak memory", "times plain's speed"]
    return table(header, found)


def ratio(name: str, found: Row) -> str:
    """A ratio with its spread, where rounds were paired."""
    if "rounds" not in found:
        return f"{found['median']:.2f}x {name} (of medians)"
    return f"{found['median']:.2f}x {name} ({found['min']:.2f} to {found['max']:.2f})"


def loader(rows: list[Row]) -> list[str]:
    """Microseconds a batch by case and way, and how many times faster than `get_batch`."""
    ways = list(dict.fromkeys(r["way"] for r in rows))
    cases = list(dict.fromkeys(r["case"] for r in rows))
    by = {(r["case"], r["way"]): r for r in rows}
    found = []
    for case in cases:
        cells = [
            spread(by[case, w]["seconds_per_batch"], 1e6) if (case, w) in by else "" for w in ways
        ]
        times = by.get((case, "mypt_fast native"), {}).get("times faster than get_batch")
        found.append([case, *cells, f"{times:.0f}x" if times else ""])
    return table(["microseconds a batch", *ways, "native, times get_batch"], found)


def prefetch(rows: list[Row]) -> list[str]:
    """What is waited for, in microseconds; the rest of a row in words."""
    shown = {"case", "way", "p50_us", "p99_us", "p99.9_us", "seconds"}
    found = [
        [
            r["case"], r["way"], *(number(r[k]) for k in ("p50_us", "p99_us", "p99.9_us")),
            ", ".join(f"{k} {v}" for k, v in r.items() if k not in shown),
        ]
        for r in rows
    ]  # fmt: skip
    return table(["case", "way", "median, us", "99th percentile", "99.9th", "more"], found)


def prepare(rows: list[Row]) -> list[str]:
    """Text to tokens."""
    found = [
        [r["way"], number(r["MB/s"]), number(r["MB per CPU second"]), spread(r["seconds"])]
        for r in rows
    ]
    size = f"{rows[0]['megabytes']:.0f} MB of text" if rows else "text"
    return table([size, "MB/s", "MB per CPU second", "seconds"], found)


def kernels(rows: list[Row]) -> list[str]:
    """Forward and backward of every operator by provider."""
    found = []
    for r in (r for r in rows if r["mode"] == "both"):
        logits = f"{r['logits_bytes'] / 1e6:.1f} MB" if "logits_bytes" in r else ""
        extra = r.get("peak_extra_bytes") or r.get("rss_growth_bytes")
        found.append([
            f"{r['op']}, {r['shape']}, {r['dtype']}", r["provider"],
            f"{number(r['median_ms'])} ({number(r['p20_ms'])} to {number(r['p80_ms'])})",
            str(r["count"]), logits, f"{extra / 1e6:.0f} MB" if extra else "",
        ])  # fmt: skip
    header = ["forward and backward", "who", "ms", "samples", "logits held", "memory grown"]
    return table(header, found)


def saves(rows: list[Row]) -> list[str]:
    """Parts of a save."""
    found = [
        [
            r["what"], f"{spread(r['seconds'], 1e3)}", str(len(r["seconds"])),
            number(r["gb_per_s"]) if "gb_per_s" in r else "",
        ]
        for r in rows
    ]  # fmt: skip
    return table(["what", "ms", "samples", "GB/s"], found)


def start(rows: list[Row]) -> list[str]:
    """Seconds of a process until its first optimised step, and the steps after it."""
    words = {"auto": "ours, blocks compiled", "auto-whole": "ours, compiled whole"}
    found = []
    for r in rows:
        name = r["variant"].replace("/plan", "")
        times = r.get("times_eager")
        faster = (
            f"{times['median']:.2f}x ({times['min']:.2f} to {times['max']:.2f})" if times else ""
        )
        found.append([
            f"`{r['preset']}` {r['dtype']}", words.get(name) or NAMES[name],
            *(spread(r[k]) for k in ("cold_s", "cold_cpu_s", "warm_s", "warm_cpu_s")), faster,
        ])  # fmt: skip
    header = ["preset", "way", "cold, s", "CPU s", "warm, s", "CPU s"]
    return table([*header, "speed of a step, times eager's"], found)


def attention(rows: list[Row]) -> list[str]:
    """Attention with dropout on a CPU, in strips and PyTorch's."""
    found = [
        [
            f"`{r['preset']}`, {r['dtype']}", " x ".join(map(str, r["shape"])),
            *(number(1e3 * r["median_s"][side]) for side in ("strips", "torch")),
            f"{number(r['times_torch']['median'])} ({number(r['times_torch']['min'])} to "
            f"{number(r['times_torch']['max'])})x",
        ]
        for r in rows
    ]  # fmt: skip
    header = [
        "shape of",
        "sequences, heads, length, head size",
        "ours, ms",
        "PyTorch's, ms",
        "faster",
    ]
    return table(header, found)


def guard(rows: list[Row]) -> list[str]:
    """Cost per step."""
    found = [
        [r["what"], number(1e6 * r["median_s"]), number(1e6 * r["p99_s"]), str(r["rounds"])]
        for r in rows
    ]
    return table(["what", "median, us", "99th percentile", "rounds"], found)


def core(rows: list[Row]) -> list[str]:
    """A step of `fit` beside one of the trainer."""
    found = [
        [
            f"{r['preset']}, {r['dtype']}, dropout {r['dropout']:g}", f"{r['ratio_median']:.3f}x",
            f"{min(r['ratios']):.3f} to {max(r['ratios']):.3f}",
        ]
        for r in rows
    ]  # fmt: skip
    return table(["model", "fit's step, times the trainer's", "smallest to largest"], found)


def states(rows: list[Row]) -> list[str]:
    """A table each: loss by layout and seed, step and bytes, 8-bit moments, saved states."""
    losses = [r for r in rows if "val_loss" in r]
    seeds = sorted({r["seed"] for r in losses})
    by = {(r["variant"], r["seed"]): r["val_loss"] for r in losses}
    names = list(dict.fromkeys(r["variant"] for r in losses))
    steps = f"held-out loss after {losses[0]['steps']} steps" if losses else "held-out loss"
    found = [
        [n, *(f"{by[n, s]:.4f}" for s in seeds), f"{sum(by[n, s] for s in seeds) / len(seeds):.4f}"]
        for n in names
    ]
    lines = table([steps, *(f"seed {s}" for s in seeds), "mean"], found)
    others = (("step", states_steps), ("round_trip", states_codes), ("persistence", states_saved))
    for key, make in others:
        lines += ["", *make([r for r in rows if key in r])]
    return lines


def states_steps(rows: list[Row]) -> list[str]:
    """The optimizer's step on a CPU, and the bytes a parameter that stay for a run."""
    fast = {r["parameters"]: r["seconds"] for r in rows if r["step"] == "fast"}
    found = []
    for r in rows:
        times = [a / b for a, b in zip(fast[r["parameters"]], r["seconds"], strict=True)]
        each = [r[k] / r["parameters"] for k in ("weight_bytes", "gradient_bytes", "moment_bytes")]
        found.append([
            r["step"], f"{r['parameters'] / 1e6:.1f} M", spread(r["seconds"], 1e3),
            "" if r["step"] == "fast" else spread(times), number(r["first_s"]),
            *(f"{b:.2f}" for b in (*each, sum(each))),
        ])  # fmt: skip
    header = [
        "optimizer's step",
        "parameters",
        "ms",
        "time of `fast` / time of this (20th to 80th percentile)",
        "first step, s",
    ]
    return table([*header, "bytes of weights", "gradients", "moments", "all"], found)


def states_codes(rows: list[Row]) -> list[str]:
    """What 8 bits lose of real moments, by whose codes."""

    def again(row: Row, which: str) -> str:
        share, most = row[f"{which}_changed_again"]
        return f"{share:.0%} by up to {100 * most:.1f} %" if share else "none"

    what: dict[str, Callable[[Row], str]] = {
        "error of the first moment": lambda r: f"{100 * r['first']:.2f} %",
        "error of the second": lambda r: f"{100 * r['second']:.2f} %",
        "error of the next update": lambda r: f"{100 * r['update']:.2f} %",
        "largest update, in learning rates": lambda r: (
            f"{r['update_largest'][1]:.2f}, in exact {r['update_largest'][0]:.2f}"
        ),
        "first moments that become zero, in a million": lambda r: number(1e6 * r["first_zeroed"]),
        "second moments that do": lambda r: number(1e6 * r["second_zeroed"]),
        "first moments that a second trip changes": lambda r: again(r, "first"),
        "second moments that it changes": lambda r: again(r, "second"),
    }
    found = [[label, *(cell(r) for r in rows)] for label, cell in what.items()]
    return table(["8-bit moments, one round trip", *(r["round_trip"] for r in rows)], found)


def states_saved(rows: list[Row]) -> list[str]:
    """Who reads a saved state."""
    keys = ("weights_only", "weights_only_elsewhere", "our_reader")
    found = [
        [
            r["persistence"], f"{r['file_bytes'] / 1e6:.1f} MB",
            *(r[k].partition(":")[0] for k in keys), "yes" if r["resumes_bit_for_bit"] else "no",
        ]
        for r in rows
    ]  # fmt: skip
    header = ["saved state", "weights and moments", "`weights_only=True`", "torchao not imported"]
    return table([*header, "our checkpoints' reader", "resumes bit for bit"], found)


def plain(rows: list[Row]) -> list[str]:
    """A suite nobody wrote a table for: what its rows hold but for raw samples."""
    keys = [
        k for k in dict.fromkeys(k for r in rows for k in r)
        if not any(isinstance(r.get(k), (list, dict)) for r in rows)
    ]  # fmt: skip

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return number(value)
        text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return table(keys, [[cell(r.get(k)) for k in keys] for r in rows])


TABLES: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
    "step": ("Training steps", step),
    "steps": ("Training steps, short", steps),
    "core": ("`fit` of MyPT's interface", core),
    "kernels": ("Operators", kernels),
    "loader": ("Token loader, file in the page cache", loader),
    "prefetch": ("Token loader beside a training process, and from disk", prefetch),
    "prepare": ("Text to tokens", prepare),
    "states": ("State layouts", states),
    "saves": ("Saves", saves),
    "start": ("From a process's start to its first optimised step", start),
    "attention": ("Attention with dropout", attention),
    "guard": ("Guards and log, per step", guard),
}
