"""Writes docs/performance.md, and the tables of the README, from bench/results/.

    python bench/report.py            write both
    python bench/report.py --check    exit code 1 if one of them is not what would be written

Nothing here measures, and no number is typed by hand: what is not under bench/results/ is listed
as not yet measured.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from gpu_bars import GPU_BARS
from report_tables import NAMES, TABLES, Row, number, plain, sequences, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
RIVALS = ("plain", "mypt-eager")  # whom the README compares with
INTRO = """\
# Performance

Made by `make bench-report` from the files under [bench/results](../bench/results), which hold every
raw sample; a test compares this page with them. Ratios are of runs in one session, both sides in
turn; a spread in brackets is the 20th to the 80th percentile, of a ratio the smallest to the
largest unless said. `python bench/bench_<name>.py` repeats one of them and writes its file anew;
`mypt-fast bench` measures your machine.
"""


def load(folder: Path) -> dict[str, dict[str, Row]]:
    """Device folder to suite to what its file holds; CPU first, then by name.

    A file without rows is no table: how gpu_suite.py went, and which tests passed.
    """
    found: dict[str, dict[str, Row]] = {}
    for path in sorted(folder.glob("*/*.json"), key=lambda p: (p.parent.name != "cpu", p)):
        held = json.loads(path.read_text("utf-8"))
        if isinstance(held.get("rows"), list):
            found.setdefault(path.parent.name, {})[path.stem] = held
    return found


def facts(held: Row) -> str:
    """Machine, date and versions of a file, in a line."""
    m = {**held, **held.get("machine", {})}
    words = [m.get("gpu", {}).get("name") or f"{m.get('cores')} cores of {m.get('cpu')}"]
    if "gpu" not in m and m.get("threads") != m.get("cores"):
        words.append(f"{m.get('threads')} thread(s)")
    words += [f"torch {m['torch']}"] if "torch" in m else []
    words += [f"cap of {m['cap_gib']:g} GiB"] if "cap_gib" in m else []
    return f"{m.get('date', 'no date')}, {', '.join(words)}."


def suite_lines(device: str, name: str, held: Row) -> list[str]:
    """One suite: title, machine, table, and what the header says beside."""
    title, make = TABLES.get(name, (f"`{name}`", plain))
    source = f"results/{device}/{name}.json"
    lines = [f"### {title}", "", f"{facts(held)} [{source}](../bench/{source})", ""]
    lines += make(held["rows"])
    for key, what in (("failed", "Failed"), ("absent", "Absent"), ("not_run", "Not run")):
        for item in held.get(key) or ():
            why = held[key][item] if isinstance(held[key], dict) else ""
            lines += ["", f"{what}: {item}{f': {why}' if why else ''}."]
    if "overhead" in held:
        lines += ["", f"A save every 50 steps adds {100 * held['overhead']:.2f} % to a step."]
    return [*lines, ""]


def missing(results: dict[str, dict[str, Row]]) -> list[str]:
    """Bars on a GPU: not yet measured, or what was found and where."""
    rows = []
    for bar in GPU_BARS:
        found = [
            f"{told}: {bar.suite} on {device}"
            for device, suites in results.items()
            if device != "cpu" and bar.suite in suites
            if (told := bar.measured(suites[bar.suite]))
        ]
        rows.append([bar.text, "; ".join(found) or "not yet measured"])
    return ["## Bars on a GPU", "", *table(["bar", "state"], rows), ""]


def page(results: dict[str, dict[str, Row]]) -> str:
    """The whole page."""
    lines = [INTRO]
    for device, suites in results.items():
        lines += [f"## {'CPU' if device == 'cpu' else device}", ""]
        order = [s for s in TABLES if s in suites] + sorted(set(suites) - set(TABLES))
        for name in order:
            lines += suite_lines(device, name, suites[name])
    return "\n".join([*lines, *missing(results)]).rstrip("\n") + "\n"


def readme_step(rows: list[Row]) -> list[str]:
    """Our compiled step: ratios and speed."""
    found = []
    for row in (r for r in rows if r["variant"] == "auto" and r.get("times")):
        case = f"`{row['preset']}`, {row['dtype']}, {sequences(row)}"
        times = row["times"]
        cells = [
            f"{times[k]['median']:.2f}x" if k in times else "" for k in ("plain", "mypt-eager")
        ]
        found.append([case, number(row["tokens_per_s"]), *cells])
    others = (f"times {NAMES[k]}" for k in RIVALS)
    return table(["our compiled step", "tokens/s", *others], found)


def readme_loader(rows: list[Row]) -> list[str]:
    """The two usual shapes."""
    ways = ("get_batch", "strided NumPy", "mypt_fast native")
    by = {(r["case"], r["way"]): r for r in rows}
    found = []
    for case in dict.fromkeys(r["case"] for r in rows):
        some = [by.get((case, way)) for way in ways]
        if "B12" not in case and all(some):
            cells = [number(r["median_us"]) for r in some if r]
            label = re.sub(r"(\w+) B(\d+) T(\d+)", r"\2 x \3 of \1", case)
            found.append(
                [label, *cells, f"{by[case, ways[2]]['times faster than get_batch']:.0f}x"]
            )
    header = ["loader, microseconds a batch", "nanoGPT's `get_batch`", "strided NumPy", "ours"]
    return table([*header, "times `get_batch`"], found)


def readme_head(rows: list[Row]) -> list[str]:
    """The head with its loss."""
    who = {"eager": "plain PyTorch", "compile": "`torch.compile` of the plain head"}
    found = [
        [
            who.get(r["provider"], r["provider"].replace("native", "`F.linear_cross_entropy`")),
            f"{number(r['median_ms'])} ms",
            f"{r['logits_bytes'] / 1e6:.1f} MB" if "logits_bytes" in r else "in chunks",
        ]
        for r in rows
        if (r["mode"], r["op"]) == ("both", "linear_cross_entropy")
        and r["provider"] != "ours inductor"
    ]  # fmt: skip
    return table(["head with its loss, forward and backward", "time", "logits held"], found)


def readme_prepare(rows: list[Row]) -> list[str]:
    """Text to tokens."""
    found = [[r["way"], number(r["MB/s"]), number(r["MB per CPU second"])] for r in rows]
    size = f"{rows[0]['megabytes']:.0f} MB" if rows else "text"
    return table([f"`prepare`, {size} to GPT-2 tokens", "MB/s", "MB per CPU second"], found)


BLOCKS = {
    "step": readme_step, "loader": readme_loader, "prepare": readme_prepare, "kernels": readme_head,
}  # fmt: skip


def readme(text: str, results: dict[str, dict[str, Row]]) -> str:
    """The README with the tables between its `bench:NAME` marks made anew from CPU results.

    Raises:
        ValueError: for a mark of a suite that has no table or no result.
    """

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS or name not in results.get("cpu", {}):
            raise ValueError(f"README: no committed result for the mark bench:{name}")
        lines = BLOCKS[name](results["cpu"][name]["rows"])
        return "\n".join([f"<!-- bench:{name} -->", *lines, "<!-- end -->"])

    return re.sub(r"<!-- bench:(\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def contents(root: Path = ROOT) -> dict[Path, str]:
    """Each file and what it should hold."""
    results = load(root / "bench" / "results")
    told = root / "README.md"
    return {
        root / "docs" / "performance.md": page(results),
        told: readme(told.read_text("utf-8"), results),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    stale: list[Any] = []
    for path, text in contents(ROOT).items():
        if path.exists() and path.read_text("utf-8") == text:
            continue
        stale.append(path.name)
        if not args.check:
            path.write_text(text, "utf-8")
    if stale:
        print(f"{'not current' if args.check else 'written'}: {', '.join(stale)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
