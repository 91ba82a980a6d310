"""`mypt-fast plan`: what training a model needs, and about how fast it is, before it starts."""

import argparse
import dataclasses
import json
import re
from typing import Any

from mypt_fast import accounting, console, presets
from mypt_fast.config import TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import advice, cards, ceiling, search, step, table
from mypt_fast.schema import not_among

HELP = "predict memory and speed of training, without a GPU"
DESCRIPTION = """\
Predict the peak memory of training by part, and about how many tokens a second it makes; choose
the state layout, what is recomputed, the micro-batch and the head's chunk of logits. Tokens per
step stay as the config has them. Without --config: every shipped preset on that card."""
EXAMPLES = """\
examples:
  mypt-fast plan --config 500M_1024 --vram 16G
  mypt-fast plan --config 750M_1024 --gpu "RTX 5060 Ti"
  mypt-fast plan --gpu T4                              what could be trained on it"""

UNITS = {"": 1.0, "g": 1.0, "gb": 1.0, "gib": 1.0, "m": 1 / 1024, "mb": 1 / 1024, "mib": 1 / 1024}
MOST_GIB = 4096
NARROW = 512  # matmuls of such widths are bound by launches, which no ceiling tells


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model, the card, and what the search may not touch."""
    parser.add_argument(
        "--config_file", metavar="FILE", help="preset: file or name; also --config (default: all)"
    )
    parser.add_argument("--vram", metavar="SIZE", help="memory of the card, as 16G or 16384M")
    parser.add_argument("--gpu", metavar="NAME", help="card, for its memory and speed")
    parser.add_argument("--state", metavar="LAYOUT", help="only this state layout")
    parser.add_argument("--recompute", metavar="POLICY", help="only this recompute policy")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Plan; returns the exit code."""
    device = the_device(args.gpu, args.vram)
    able = search.Able()
    typed = {"state": args.state, "recompute": args.recompute}
    check("--state", args.state, able.layouts)
    check("--recompute", args.recompute, able.policies)
    if args.config_file is None:
        loaded = [presets.load(path) for path in presets.shipped()]
        rows = [_ranked(preset, device, typed) for preset in loaded]
        rows.sort(key=lambda row: (-row["fits"], -row["parameters"], row["config"]))
        report = {"device": described(device), "presets": rows}
        text = ranking_lines(device, rows)
    else:
        preset = presets.load(args.config_file)
        device = device.computing_in(dtype_of(preset, device))
        plans = _search(preset, device, typed)
        report = report_of(preset, device, plans)
        if not plans[0].fits:
            if args.json:
                print(json.dumps(report, indent=2))
            raise _does_not_fit(preset, device, plans, typed)
        text = plan_lines(preset, device, plans)
    print(json.dumps(report, indent=2) if args.json else "\n".join(text))
    return 0


def the_device(gpu: str | None, vram: str | None) -> search.Device:
    """What --gpu and --vram come to; raises ConfigError."""
    if gpu is None and vram is None:
        raise ConfigError("plan needs a card", "neither --gpu nor --vram", "as --vram 16G")
    card = cards.find(gpu) if gpu is not None else None
    own: dict[str, float] = {}
    if card is not None:
        entry = ceiling.measured(gpu or "") or ceiling.measured(card.name) or {}
        own = {k: v for k in card.tflops if (v := ceiling.measured_ceiling(card.name, k))}
        if own and isinstance(entry.get("gb_per_s"), (int, float)):
            own["gb_per_s"] = float(entry["gb_per_s"])
    return search.device_for(card, parse_size(vram) if vram is not None else None, own)


def parse_size(text: str) -> int:
    """'16G', '16GiB', '16384M' or '16' as bytes; raises ConfigError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3})", text.strip())
    unit = UNITS.get(found[2].lower()) if found else None
    size = float(found[1]) * unit if found and unit else 0.0
    if not 0.25 <= size <= MOST_GIB:
        raise ConfigError(
            f"--vram: expected a size from 0.25G to {MOST_GIB}G",
            f"found {text[:40]!r}",
            "write it as 16G",
        )
    return int(size * table.GIB)


def check(flag: str, wanted: str | None, able: tuple[str, ...]) -> None:
    """Raise ConfigError for a name that is unknown."""
    if wanted is not None and wanted not in able:
        raise ConfigError(f"{flag}: {not_among(wanted, able)}")


def settings_of(preset: presets.Preset, typed: dict[str, str | None]) -> TrainConfig:
    """The preset's settings, with what was typed before them."""
    train = preset.train
    return dataclasses.replace(
        train,
        state=typed["state"] or train.state, recompute=typed["recompute"] or train.recompute,
    )  # fmt: skip


def dtype_of(preset: presets.Preset, device: search.Device) -> str:
    """What the preset computes in on the device."""
    if not preset.train.use_amp:
        return "fp32"
    return "fp16" if preset.train.amp_dtype == "fp16" else device.dtype


def residual_of(preset: presets.Preset) -> int | None:
    """Bytes an element of the residual stream, where the preset says."""
    return 4 if preset.train.residual_dtype == "fp32" else None


def _search(
    preset: presets.Preset, device: search.Device, typed: dict[str, str | None]
) -> list[search.Plan]:
    choices = search.able(preset.model, settings_of(preset, typed), device.dtype)
    return search.search(
        preset.model, sequences_of(preset), device, choices, residual=residual_of(preset)
    )


def _does_not_fit(
    preset: presets.Preset, device: search.Device, plans: list[search.Plan],
    typed: dict[str, str | None],
) -> ConfigError:  # fmt: skip
    train = settings_of(preset, typed)
    choices, able = (
        search.able(preset.model, t, device.dtype) for t in (train, search.left_open(train))
    )
    return advice.does_not_fit(
        preset.path.stem, preset.model, sequences_of(preset), device, plans, choices, able,
        residual_of(preset),
    )  # fmt: skip


def sequences_of(preset: presets.Preset) -> int:
    """Sequences of a step."""
    return preset.model.batch_size * preset.train.grad_accum_steps


# what people and machines read


def described(device: search.Device) -> dict[str, Any]:
    """A device as a machine would read it."""
    return {
        "name": device.name or None, "memory_bytes": device.memory, "room_bytes": device.room,
        "dtype": device.dtype,
        "ceiling_tflops": device.tflops or None, "ceiling_measured_here": device.measured,
        "ceiling_source": device.source or None, "gb_per_s": device.gb_per_s or None,
    }  # fmt: skip


def plan_dict(plan: search.Plan, device: search.Device) -> dict[str, Any]:
    """A plan as a machine would read it."""
    s = plan.setup
    parts = {**plan.peak.parts, "context": plan.peak.context, "slack": plan.peak.slack}
    return {
        "state": s.layout.name, "recompute": s.policy.name, "micro_batch_size": s.rows,
        "micro_steps": s.sequences // s.rows, "chunk_rows": step.chunk_rows(s),
        "exact": plan.exact, "fits": plan.fits, "peak_bytes": plan.peak.total,
        "parts_bytes": parts, "peak_in": plan.peak.when,
        "tokens_per_s": plan.tokens_per_s if device.tflops else None,
        "flags": advice.flags_of(plan),
    }  # fmt: skip


def report_of(
    preset: presets.Preset, device: search.Device, plans: list[search.Plan]
) -> dict[str, Any]:
    """Everything about one config."""
    tokens = sequences_of(preset) * preset.model.block_size
    best = plans[0]
    seconds = preset.train.max_iters * tokens / best.tokens_per_s
    return {
        "config": preset.path.stem, "fits": best.fits, "tokens_per_step": tokens,
        "parameters": accounting.count_parameters(preset.model).total,
        "max_iters": preset.train.max_iters,
        "eta_s": seconds if device.tflops and best.fits else None,
        "device": described(device),
        "plans": [plan_dict(plan, device) for plan in plans],
    }  # fmt: skip


def plan_lines(
    preset: presets.Preset, device: search.Device, plans: list[search.Plan]
) -> list[str]:
    """One config's plans as people read them."""
    best, report = plans[0], report_of(preset, device, plans)
    size, count = console.bytes_text, console.count
    where = f"{device.name}, " if device.name else ""
    parts = {**best.peak.parts, "context": best.peak.context, "slack": best.peak.slack}
    listed = ", ".join(
        f"{name.replace('_', ' ')} {v / table.GIB:.2f}" for name, v in parts.items() if v
    )
    lines = [
        f"model   {report['config']}: {count(report['parameters'])} parameters, "
        f"{sequences_of(preset)} sequences = {report['tokens_per_step']:,} tokens a step",
        f"card    {where}{size(device.room)} for training, {device.dtype}",
        f"plan    {advice.flags_of(best)}",
        f"memory  {size(best.peak.total)}, most of it in the {best.peak.when}; in GiB:",
        f"        {listed}",
        f"speed   {_speed(device, best, report)}",
        "",
    ]
    shown = worth_showing(plans)
    lines += _table(device, shown)
    if len(shown) < len(plans):
        lines.append(f"and {len(plans) - len(shown)} that are slower and need no less; see --json")
    return lines


def worth_showing(plans: list[search.Plan]) -> list[search.Plan]:
    """Without those that another one beats in speed and matches in memory and exactness.

    Of those that do not fit, the closest.
    """

    def beaten(plan: search.Plan) -> bool:
        return any(
            other.fits
            and other.exact >= plan.exact
            and other.peak.total <= plan.peak.total
            and other.tokens_per_s > plan.tokens_per_s
            for other in plans
        )

    fitting = [plan for plan in plans if plan.fits and not beaten(plan)]
    return fitting + [plan for plan in plans if not plan.fits][:2]


def _speed(device: search.Device, best: search.Plan, report: dict[str, Any]) -> str:
    if not device.tflops:
        return "unknown; --gpu NAME estimates it"
    kind = "measured here" if device.measured else "measured elsewhere"
    if best.setup.cfg.n_embd < NARROW:
        return (
            f"{shown_rate(best.tokens_per_s, 0)} tokens/s; so narrow a model is bound by launches"
        )
    eta = console.span(report["eta_s"])
    return (
        f"about {console.count(best.tokens_per_s)} tokens/s, from a ceiling of "
        f"{device.tflops:.0f} TFLOP/s {kind}; {eta} for {report['max_iters']:,} steps"
    )


def _table(device: search.Device, plans: list[search.Plan]) -> list[str]:
    fastest = max((p.tokens_per_s for p in plans if p.fits), default=1.0)
    header = ["state", "recompute", "micro-batch", "chunk", "memory", "tokens/s", ""]
    cells = []
    for plan in plans:
        s, size = plan.setup, console.bytes_text(plan.peak.total)
        rate = console.count(plan.tokens_per_s) if device.tflops else (
            f"{100 * plan.tokens_per_s / fastest:.0f} %"
        )  # fmt: skip
        note = "" if plan.exact else "not exact"
        if not plan.fits:
            over = console.bytes_text(plan.peak.total - device.room)
            rate, note = "-", f"does not fit: {over} too much"
        cells.append(
            [s.layout.name, s.policy.name, str(s.rows), str(step.chunk_rows(s)), size, rate, note]
        )
    rows = console.table(header, cells, left=2)
    return [row.rstrip() for row in rows]


def shown_rate(rate: float, width: int) -> str:
    """Tokens/s; of narrow models only what they cannot reach."""
    return f"{'< ' if width < NARROW else ''}{console.count(rate)}"


def _ranked(
    preset: presets.Preset, device: search.Device, typed: dict[str, str | None]
) -> dict[str, Any]:
    device = device.computing_in(dtype_of(preset, device))
    plans = _search(preset, device, typed)
    report = report_of(preset, device, plans)
    best = report.pop("plans")[0]
    report.pop("device")
    return {**report, **best, "n_embd": preset.model.n_embd}


def ranking_lines(device: search.Device, rows: list[dict[str, Any]]) -> list[str]:
    """Every preset on one card, as people read it."""
    where = f"{device.name}, " if device.name else ""
    header = [
        "preset", "parameters", "state", "recompute", "micro-batch", "memory", "tokens/s", "time"
    ]  # fmt: skip
    cells = []
    for row in rows:
        rate, eta = row["tokens_per_s"], row["eta_s"]
        cells.append(
            [
                row["config"], console.count(row["parameters"]), row["state"], row["recompute"],
                str(row["micro_batch_size"]) if row["fits"] else "does not fit",
                console.bytes_text(row["peak_bytes"]),
                shown_rate(rate, row["n_embd"]) if rate and row["fits"] else "-",
                console.span(eta) if eta and row["n_embd"] >= NARROW else "-",
            ]
        )  # fmt: skip
    title = f"{where}{console.bytes_text(device.room)} for training, {device.dtype}"
    return [title, "", *console.table(header, cells)]
