"""Bars that need a GPU, and which rows of a result answer them.

A bar is measured only where the row with its number is there: its preset, its way to train, as many
steps. What is found is told as it is, passed or not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mypt_fast.planner import table

Row = dict[str, Any]
GIB = 1 << 30
BIG, SMALL, HUGE = "base/750M_unified_v1", "500M_1024", "1.3B_1024"
STEPS = 200


@dataclass(frozen=True)
class Bar:
    """What is promised, and who can tell.

    Attributes:
        suite: the file under results/<GPU>/ that can.
        text: the bar.
        measured: from what the file holds to the numbers in words; "" where one of them lacks.
    """

    suite: str
    text: str
    measured: Callable[[Row], str]


def joined(*parts: str) -> str:
    """All of them, or nothing where one lacks."""
    return ", ".join(parts) if all(parts) else ""


# operators


def operator(
    held: Row, op: str, mode: str, key: str, tokens: int | None = None, shape: str = BIG
) -> float | None:
    """A number of our kernel at a shape, in bf16."""
    for row in held["rows"]:
        named = (row["op"], row["mode"], row["shape"], row["dtype"]) == (
            op,
            mode,
            shape,
            "bfloat16",
        )
        if named and row["provider"] == "ours" and tokens in (None, row["tokens"]):
            return row.get(key)
    return None


def large_head(held: Row) -> str:
    """The time of the head of 128,256 words."""
    shape = "BT8192 H4096 V128256"
    found = operator(held, "linear_cross_entropy", "both", "median_ms", shape=shape)
    return f"{found:.4g} ms" if found else ""


def flagship_head(held: Row) -> str:
    """Of the head of the 750M model: memory and share of the rate of a bare matmul."""
    keys = ("peak_extra_bytes", "gradient_bytes", "of_matmul")
    found = [operator(held, "linear_cross_entropy", "both", key, 12_288) for key in keys]
    if None in found:
        return ""
    extra, gradients, share = found
    beyond = (extra - gradients) / 1e9
    return f"{beyond:.2f} GB beyond gradients, {1 / share:.2f}x its bare matmuls"


def of_copy(*wanted: tuple[str, str]) -> Callable[[Row], str]:
    """Shares of a copy's bandwidth, of (operator, mode)."""

    def told(held: Row) -> str:
        shares = [(op, mode, operator(held, op, mode, "of_copy")) for op, mode in wanted]
        return joined(*(f"`{op}` {mode} {s:.0%}" if s else "" for op, mode, s in shares))

    return told


def equal_batch(held: Row) -> str:
    """Our step beside the plain one where both take the same micro-batch."""
    if held.get("preset") != BIG:
        return ""
    timed = [r for r in held["rows"] if r.get("median_s")]
    plain = next((r for r in timed if r["variant"].partition("@")[0] == "plain"), None)
    ours = [
        r for r in timed
        if plain and r["variant"].startswith("auto")
        and all(r.get(k) == plain.get(k) for k in ("micro_batch", "tokens_per_step"))
    ]  # fmt: skip
    return ", ".join(f"`{r['variant']}` {plain['median_s'] / r['median_s']:.3f}x" for r in ours)


# training steps


def ours(held: Row, preset: str, exact: bool | None = None) -> Iterator[Row]:
    """Our bf16 rows of a preset that have samples; of exact states, or of others, where asked."""
    for row in held["rows"]:
        state = table.LAYOUTS.get(row.get("state", ""))
        named = (row.get("preset"), row.get("dtype")) == (preset, "bf16")
        if named and state and row.get("tokens_per_s") and exact in (None, state.exact):
            yield row


def lowest_peak(held: Row, preset: str, sequences: int, exact: bool, whole: bool = False) -> str:
    """The lowest peak, at a whole step a micro-batch where it is asked for."""
    found = [
        (r["peak_allocated_bytes"] / GIB, r["variant"]) for r in ours(held, preset, exact)
        if r.get("sequences") == sequences and r.get("peak_allocated_bytes")
        and (not whole or r.get("micro_batch") == sequences)
    ]  # fmt: skip
    return f"{min(found)[0]:.2f} GiB (`{min(found)[1]}`)" if found else ""


def trained(held: Row, preset: str, exact: bool) -> str:
    """That a run of that many steps came to its end under the cap."""
    if not 0 < held.get("cap_gib", 0) <= 16:
        return ""
    rows = [r for r in ours(held, preset, exact) if r.get("steps", 0) >= STEPS and "loss" in r]
    return f"{rows[0]['steps']} steps of {preset} (`{rows[0]['variant']}`)" if rows else ""


def prediction(held: Row) -> str:
    """The measured peaks beside the predicted ones, the furthest off on either side."""
    off = [
        r["peak_allocated_bytes"] / r["predicted_bytes"] - 1
        for r in held["rows"] if r.get("peak_allocated_bytes") and r.get("predicted_bytes")
    ]  # fmt: skip
    return f"{min(off):+.1%} to {max(off):+.1%} of {len(off)} predictions" if off else ""


def fastest(held: Row, preset: str) -> str:
    """The most tokens a second of an exact state, on an H200."""
    gpu = {**held, **held.get("machine", {})}.get("gpu", {}).get("name", "")
    found = [r["tokens_per_s"] for r in ours(held, preset, exact=True)] if "H200" in gpu else []
    return f"{preset} {max(found):,.0f} tokens/s" if found else ""


def times(held: Row, other: str) -> str:
    """How many times another's speed the fastest exact state has, by preset, under the cap."""
    if not 0 < held.get("cap_gib", 0) <= 16:
        return ""
    told = []
    for preset in (SMALL, BIG):
        rows = [r for r in ours(held, preset, exact=True) if other in r.get("times", {})]
        if rows:
            told.append(f"{preset} {max(r['times'][other]['median'] for r in rows):.2f}x")
    return ", ".join(told)


def first_step(held: Row) -> str:
    """Seconds until the first step, cold and warm, of what `train` compiles."""
    found = [
        f"{r['preset']} {max(r['cold_s']):.1f} s, {max(r['warm_s']):.1f} s warm"
        for r in held["rows"]
        if r["variant"] in ("auto", "auto/plan") and r.get("cold_s") and r.get("warm_s")
    ]
    return "; ".join(found)


GPU_BARS = (
    Bar("kernels", "`linear_cross_entropy`, 8,192 x 4096 x 128,256, bf16: at most 36 ms on an "
        "H200, or 1.45x Liger's default in at most 1.65 GB", large_head),
    Bar("kernels", "head of 12,288 x 1280 x 50,304: at most 0.30 GB beyond gradients, at most "
        "1.10x its bare matmuls", flagship_head),
    Bar("kernels", "RMSNorm backward at 80 %, add + norm at 90 / 80 % of the bandwidth of a copy",
        of_copy(("rms_norm", "backward"), ("add_rms_norm", "forward"),
                ("add_rms_norm", "backward"))),
    Bar("kernels", "SwiGLU at 90 / 85 %, cross-entropy at 88 % of the bandwidth of a copy",
        of_copy(("swiglu", "forward"), ("swiglu", "backward"), ("cross_entropy", "both"))),
    Bar("steps", "step of the 750M model: never below 0.99x, at least 1.02x of `torch.compile` "
        "alone at equal batch", equal_batch),
    Bar("step", "500M_1024, 8 sequences, exact: peak of at most 12.6 GiB",
        lambda held: lowest_peak(held, SMALL, 8, exact=True, whole=True)),
    Bar("step", "750M, 96 sequences a step: peak of at most 13.9 GiB exact, 12.9 GiB fast",
        lambda held: joined(*(lowest_peak(held, BIG, 96, exact) for exact in (True, False)))),
    Bar("step", f"both trained for {STEPS} steps under a cap of 16 GB",
        lambda held: joined(trained(held, SMALL, True), trained(held, BIG, True),
                            trained(held, BIG, False))),
    Bar("step", "planner's peak within 3 % of the measured one", prediction),
    Bar("step", "H200, bf16, exact: 500M at 144,000 tokens/s, 750M at 110,000",
        lambda held: joined(fastest(held, SMALL), fastest(held, BIG))),
    Bar("step", "1.15x the tokens/s of `torch.compile` alone in the same 16 GB",
        lambda held: times(held, "plain")),
    Bar("step", "2x MyPT-style", lambda held: times(held, "mypt-eager")),
    Bar("step", "the 1.3B preset trains in 16 GB in the fast tier",
        lambda held: next((f"{r['tokens_per_s']:,.0f} tokens/s (`{r['variant']}`)"
                           for r in ours(held, HUGE, exact=False)
                           if 0 < held.get("cap_gib", 0) <= 16), "")),
    Bar("start", "first optimised step in 15 s, in 5 s from a warm cache", first_step),
)  # fmt: skip
