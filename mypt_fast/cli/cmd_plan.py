"""`mypt-fast plan`: what training a model needs, and about how fast it is, before it starts."""

import argparse
import dataclasses
import json
import re
import textwrap
from typing import Any

from mypt_fast import accounting, console, presets
from mypt_fast.config import TrainConfig
from mypt_fast.errors import ConfigError
from mypt_fast.planner import advice, cards, options, search, step, table
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
WIDTH = 80  # of a terminal
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
    typed = {"state": args.state, "recompute": args.recompute}
    check("--state", args.state, options.Options().layouts)
    check("--recompute", args.recompute, options.Options().policies)
    if args.config_file is None:
        loaded = [presets.load(path) for path in presets.shipped()]
        rows = [_ranked(preset, device, typed) for preset in loaded]
        rows.sort(key=lambda row: (-row["fits"], -row["parameters"], row["config"]))
        report: dict[str, Any] = {"device": described(device), "presets": rows}
        text = ranking_lines(device, rows)
    else:
        preset = presets.load(args.config_file)
        device = computing(preset, device)
        plans = _search(preset, device, typed)
        report = report_of(preset, device, plans)
        if not plans[0].fits:
            refusal = _refusal(preset, device, plans[0], typed)
            if args.json:
                report |= {"change": refusal.change or None, "card_gb": refusal.card_gb}
                print(json.dumps(report, indent=2))
            raise refusal.error()
        text = plan_lines(preset, device, plans)
    print(json.dumps(report, indent=2) if args.json else "\n".join(text))
    return 0


def the_device(gpu: str | None, vram: str | None) -> search.Device:
    """What --gpu and --vram come to; raises ConfigError."""
    if gpu is None and vram is None:
        raise ConfigError("plan needs a card", "neither --gpu nor --vram", "as --vram 16G")
    card = cards.find(gpu) if gpu is not None else None
    memory = search.nominal(card, parse_size(vram) if vram is not None else None)
    names = [gpu or "", card.name] if card else []  # as it was typed, drivers say it, too
    return search.device_for(memory, None, card, names)


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


def computing(preset: presets.Preset, device: search.Device) -> search.Device:
    """The device in the dtype that the preset computes in there."""
    dtype = device.dtype
    if not preset.train.use_amp:
        dtype = "fp32"
    elif preset.train.amp_dtype == "fp16":
        dtype = "fp16"
    return dataclasses.replace(device, dtype=dtype)


def residual_of(preset: presets.Preset) -> int | None:
    """Bytes an element of the residual stream, where the preset says."""
    return 4 if preset.train.residual_dtype == "fp32" else None


def _search(
    preset: presets.Preset, device: search.Device, typed: dict[str, str | None]
) -> list[search.Plan]:
    cfg, train, sequences = preset.model, settings_of(preset, typed), sequences_of(preset)
    choices = options.options_of(cfg, train, device.dtype)
    options.check_rows(train.micro_batch_size, sequences)
    options.check_residual(train.residual_dtype, device.dtype)
    named = "--recompute" if typed["recompute"] else "recompute"
    options.check_policy(train.recompute, cfg, train, f"{named} {train.recompute}")
    return search.search(cfg, sequences, device, choices, residual=residual_of(preset))


def _refusal(
    preset: presets.Preset, device: search.Device, least: search.Plan,
    typed: dict[str, str | None],
) -> advice.Refusal:  # fmt: skip
    train = settings_of(preset, typed)
    choices, everything = (
        options.options_of(preset.model, t, device.dtype) for t in (train, options.left_open(train))
    )
    return advice.refusal(preset.path.stem, preset.model, device, least, choices, everything)


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
        "ceiling_source": None if device.measured else device.source or None,
        "gb_per_s": device.gb_per_s or None,
    }  # fmt: skip


def plan_dict(plan: search.Plan, device: search.Device) -> dict[str, Any]:
    """A plan as a machine would read it."""
    s = plan.setup
    parts = {**plan.peak.parts, "context": plan.peak.context, "slack": plan.peak.slack}
    return {
        "state": s.layout.name, "recompute": s.policy.name, "micro_batch_size": s.rows,
        "micro_steps": -(-s.sequences // s.rows), "chunk_rows": step.chunk_rows(s),
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
        f"memory  {size(best.peak.total)} at its peak, which is in the {best.peak.when}; in GiB:",
        *wrapped(listed),
        *_speed(device, best, report),
        "",
    ]
    shown = worth_showing(plans)
    return [*lines, *_table(device, shown), *_not_shown(plans, shown)]


def wrapped(text: str) -> list[str]:
    """Lines of a part of the plan, set in below its name."""
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _not_shown(plans: list[search.Plan], shown: list[search.Plan]) -> list[str]:
    """A line about the plans that the table leaves out, and why."""
    left = [plan for plan in plans if plan not in shown]
    slower, larger = (sum(plan.fits is fits for plan in left) for fits in (True, False))
    found = [f"{slower} slower that need no less"] if slower else []
    found += [f"{larger} more that do not fit"] if larger else []
    return [f"and {', '.join(found)}; see --json"] if found else []


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


def _speed(device: search.Device, best: search.Plan, report: dict[str, Any]) -> list[str]:
    """Lines about the speed of a plan."""
    if not device.tflops:
        cure = "`mypt-fast ceiling`, run on it, measures one" if device.name else (
            "--gpu NAME estimates it"
        )  # fmt: skip
        of = f": no {device.dtype} ceiling of the {device.name} is known" if device.name else ""
        return [f"speed   unknown{of}; {cure}"]
    if best.setup.cfg.n_embd < NARROW:
        rate = shown_rate(best.tokens_per_s, 0)
        return [f"speed   {rate} tokens/s; so narrow a model is bound by launches"]
    kind = "measured here" if device.measured else "measured elsewhere"
    return [
        f"speed   about {console.count(best.tokens_per_s)} tokens/s: "
        f"{console.span(report['eta_s'])} for {report['max_iters']:,} steps",
        f"        from a matmul ceiling of {device.tflops:.3g} TFLOP/s {kind}",
    ]


def _table(device: search.Device, plans: list[search.Plan]) -> list[str]:
    fastest = max((p.tokens_per_s for p in plans if p.fits), default=1.0)
    header = ["state", "recompute", "micro-batch", "chunk", "memory", "tokens/s"]
    cells, notes = [], []
    for plan in plans:
        s, size = plan.setup, console.bytes_text(plan.peak.total)
        rate = console.count(plan.tokens_per_s) if device.tflops else (
            f"{100 * plan.tokens_per_s / fastest:.0f} %"
        )  # fmt: skip
        note = "" if plan.exact else "not exact"
        if not plan.fits:
            over = console.bytes_text(plan.peak.total - device.room)
            rate, note = "-", f"{over} too much"
        cells.append(
            [s.layout.name, s.policy.name, str(s.rows), str(step.chunk_rows(s)), size, rate]
        )
        notes.append(note)
    head, rule, *rows = console.table(header, cells, left=2)
    noted = [f"{row}  {note}".rstrip() for row, note in zip(rows, notes, strict=True)]
    return [head, rule, *noted]


def shown_rate(rate: float, width: int) -> str:
    """Tokens/s; of narrow models only what they cannot reach."""
    return f"{'< ' if width < NARROW else ''}{console.count(rate)}"


def _ranked(
    preset: presets.Preset, device: search.Device, typed: dict[str, str | None]
) -> dict[str, Any]:
    device = computing(preset, device)
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
