"""The table of bench/results/cpu/step.json in its older form: pairs of a plain step and ours.

Once that file has rows of today's bench_step.py, this file goes, and with it its import and
`@or_pairs` in report.py and report_tables.py, and its test.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

Row = dict[str, Any]
Make = Callable[[list[Row]], list[str]]


def or_pairs(make: Make) -> Make:
    """`make`, but rows of the older form get their own table."""

    @wraps(make)
    def made(rows: list[Row]) -> list[str]:
        return step_pairs(rows) if rows and "reference_s" in rows[0] else make(rows)

    return made


def step_pairs(rows: list[Row]) -> list[str]:
    """Pairs of a plain step and ours."""
    from report_tables import number, spread, table

    found = [
        [
            f"`{r['preset']}`, {r['dtype']}, {r['sequences']} sequences, {r['mode']} both",
            spread([p / o for p, o in zip(r["reference_s"], r["ours_s"], strict=True)]) + "x",
            number(r["ours_tokens_per_s"]),
            str(len(r["ours_s"])),
        ]
        for r in rows
    ]
    header = ["training step", "times plain PyTorch's speed, pair by pair", "tokens/s", "rounds"]
    return table(header, found)
