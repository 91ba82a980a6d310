"""`mypt-fast tune`: choose how kernels are launched, by the clock or ahead of time."""

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypt_fast import accounting, console, presets
from mypt_fast.config import ModelConfig
from mypt_fast.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from mypt_fast.kernels.jit.launch import Config

HELP = "choose how kernels are launched on this GPU"
DESCRIPTION = """\
Time every kernel on this GPU at the widths of the presets, with 1 to 16 warps and 1 to 64 rows a
program, and keep the fastest that hold everything in registers. Training reads the result from
~/.cache/mypt_fast ($XDG_CACHE_HOME where it is set). With --arch no GPU is needed: candidates are
compiled for the architectures named and judged by their machine code; --out keeps the result."""
EXAMPLES = """\
examples:
  mypt-fast tune                                       this GPU, all presets
  mypt-fast tune --config 750M_1024 my_model.json      this GPU, two models
  mypt-fast tune --arch sm_80 sm_90 --out table.json   two that need not be here"""
MAX_WORKERS = 8


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to tune, and where the result goes."""
    parser.add_argument(
        "--arch", nargs="+", metavar="SM", help="compile for these, as sm_90; no GPU is used"
    )
    parser.add_argument(
        "--config_file", nargs="+", metavar="NAME",
        help="only the widths of these presets; also --config (default: all that are shipped)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="put the rows into this table instead")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Tune; returns the exit code."""
    names = args.config_file if args.config_file is not None else presets.shipped()
    shapes = list(map(shape_of, (presets.load(name).model for name in names)))
    archs = list(map(arch_number, args.arch)) if args.arch else []
    import torch

    if not archs and not torch.cuda.is_available():
        raise DeviceError(
            "tune times kernels on a GPU", "no GPU was found",
            "--arch sm_90 compiles ahead of time for that architecture instead",
        )  # fmt: skip
    _needs_triton()
    from mypt_fast.kernels.jit import launch, tuning

    wanted = tuning.slots(shapes, everything=args.config_file is None)
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    timings: dict[Any, Any] = {}
    if archs:
        found = tuning.choose(archs, wanted, workers, console.notice)
        out = Path(args.out) if args.out else None
    else:
        arch, found, timings = _on_this_gpu(wanted, workers)
        out = Path(args.out) if args.out else launch.user_table(arch)
    if out is not None:
        tuning.update(out, found)
    rows = [_described(arch, row, timings) for arch, some in found.items() for row in some]
    if args.json:
        print(json.dumps({"file": str(out) if out else None, "rows": rows}, indent=2))
    else:
        print("\n".join(lines(rows)))
        print(f"\nwritten to {out}" if out else "\nnot kept: --out FILE puts these into a table")
    return 0


def _on_this_gpu(wanted: list[Any], workers: int) -> tuple[int, dict[int, list["Config"]], Any]:
    """The architecture that is here, its rows, and the timings of all candidates."""
    import torch

    from mypt_fast.kernels import _operator
    from mypt_fast.kernels.jit import timing, tuning

    device = torch.device("cuda", torch.cuda.current_device())
    arch = _operator.device_arch(device.index)
    timings = timing.time_all(arch, wanted, device, console.notice)
    measured = [slot for slot in wanted if timings[slot, arch]]
    found = tuning.choose([arch], measured, workers, console.notice, tuning.by_time(timings))
    return arch, found, timings


def _needs_triton() -> None:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise DeviceError("tune compiles Triton kernels", "Triton is not installed", "install it")


FLAGSHIP_WIDTH = 1280  # at which kernels are compiled that no shipped model's training launches


def shape_of(cfg: ModelConfig) -> dict[str, int]:
    """What the kernels of a model are shaped by."""
    swiglu = cfg.mlp_type == "swiglu"
    return {
        "n_embd": cfg.n_embd,
        "hidden": accounting.swiglu_hidden(cfg.n_embd) if swiglu else 4 * cfg.n_embd,
        "n_head": cfg.n_head,
        "head_size": cfg.n_embd // cfg.n_head,
        "vocab_size": cfg.vocab_size,
        "rms_norm": cfg.norm_type == "rmsnorm",
        "layer_norm": cfg.norm_type == "layernorm",
        "rope": cfg.pos_encoding == "rope",
        "everything": cfg.n_embd == FLAGSHIP_WIDTH,
    }


def shipped_shapes() -> list[dict[str, int]]:
    """The shapes of the shipped presets, each once."""
    shapes: Iterable[dict[str, int]] = (shape_of(presets.load(p).model) for p in presets.shipped())
    return list({tuple(shape.values()): shape for shape in shapes}.values())


def arch_number(name: str) -> int:
    """'sm_90' is 90; raises ConfigError for what kernels are not built for."""
    from mypt_fast.kernels.jit import launch

    known = {f"sm_{arch}": arch for arch in launch.ARCHS}
    if name not in known:
        raise ConfigError(f"--arch: expected one of {', '.join(known)}", f"found '{name}'")
    return known[name]


def _described(arch: int, row: "Config", timings: dict[Any, Any]) -> dict[str, Any]:
    """A row as a machine would read it, with its time if it was taken."""
    described = {"arch": f"sm_{arch}", **asdict(row)}
    for (slot, _), timed in timings.items():
        if (slot.kernel, slot.bits, slot.columns) == (row.kernel, row.bits, row.columns):
            one = next(t for r, t in timed.items() if (r.rows, r.warps) == (row.rows, row.warps))
            described |= {"milliseconds": one.milliseconds, "gb_per_s": one.gb_per_s}
    return described


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as people read them."""
    header = ["kernel", "arch", "bits", "columns up to", "rows", "warps", "time", "GB/s"]
    cells = [
        [
            row["kernel"], row["arch"], str(row["bits"]),
            f"{row['columns']:,}" if row["columns"] < 1 << 30 else "any",
            str(row["rows"]), str(row["warps"]),
            f"{1e3 * row['milliseconds']:.1f} us" if "milliseconds" in row else "-",
            f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "-",
        ]
        for row in rows
    ]  # fmt: skip
    return console.table(header, cells, left=2)
