"""`mypt-fast ceiling`: what this device's matmuls and memory reach, measured in about 2 s."""

import argparse
import json
import time
from typing import Any

from mypt_fast import console
from mypt_fast.planner import cards, ceiling

HELP = "measure what this device's matmuls and memory reach"
DESCRIPTION = """\
Measure the matmul ceiling of this device in TFLOP/s per dtype, and its memory bandwidth, in about
two seconds. `plan` and the share of the ceiling that training reports use the result, which is kept
in ~/.cache/mypt_fast ($XDG_CACHE_HOME where it is set)."""
EXAMPLES = """\
examples:
  mypt-fast ceiling                  the GPU where there is one
  mypt-fast ceiling --device cpu"""
SECONDS = 1.6  # of measuring; the rest is warming up


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to measure."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N")
    parser.add_argument("--no_save", action="store_true", help="measure only, keep nothing")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    import torch

    from mypt_fast.kernels import ceiling as measuring
    from mypt_fast.training import device as devices

    device, notice = devices.pick(args.device, explicit=args.device is not None)
    if notice:
        console.notice(notice)
    name = devices.describe(device)
    dtypes = native_dtypes(device)
    each = SECONDS / (len(dtypes) + 1)
    with torch.inference_mode():
        rates = {
            dtype: measuring.matmul_tflops(device, measuring.DTYPES[dtype], each)
            for dtype in dtypes
        }
        bandwidth = measuring.copy_gb_per_s(device, each)
    entry = {
        "tflops": {dtype: float(f"{rate:.4g}") for dtype, rate in rates.items()},
        "gb_per_s": float(f"{bandwidth:.4g}"),
        "torch": torch.__version__,
        "measured": time.strftime("%Y-%m-%d"),
    }
    path = None if args.no_save else ceiling.keep(name, entry)
    card = cards.known(name)
    if args.json:
        report = {"device": name, **entry, "file": str(path) if path else None}
        if card:
            report["published"] = {"card": card.name, "tflops": card.tflops, "source": card.source}
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(lines(name, entry, card)))
        if path:
            print(f"kept in {path}")
    return 0


def native_dtypes(device: Any) -> list[str]:
    """Dtypes that the device multiplies itself; emulated ones take seconds and say nothing."""
    import torch

    from mypt_fast.training import device as devices

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["fp32", "fp16", *(["bf16"] if native else [])]
    return ["fp32", *(["bf16"] if devices.cpu_has_bf16() else [])]


def lines(name: str, entry: dict[str, Any], card: cards.Card | None) -> list[str]:
    """Return the result as people read it, and what was published for such a card."""
    found = [
        name,
        f"matmul  {_rates(entry['tflops'])}",
        f"memory  {entry['gb_per_s']:g} GB/s, read and written by a copy",
    ]
    if card:
        found.append(f"others  {_rates(card.tflops)}: {card.name}, {card.source}")
    return found


def _rates(tflops: dict[str, float]) -> str:
    return ", ".join(f"{dtype} {rate:g}" for dtype, rate in tflops.items()) + " TFLOP/s"
