"""What `mypt-fast ceiling` measured on the user's own devices: kept in the cache folder."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mypt_fast import cache
from mypt_fast.planner.cards import plain

MAX_BYTES = 1 << 20
LEAST, MOST = 1e-6, 1e6  # TFLOP/s or GB/s of any device: what lies outside is a damaged file


def ceiling_file() -> Path:
    """Where it is kept: below $XDG_CACHE_HOME or ~/.cache, as what `tune` measures."""
    return cache.folder() / "ceiling.json"


def measured(device_name: str) -> dict[str, Any] | None:
    """What was measured on a device, {"tflops": {dtype: TFLOP/s}, "gb_per_s": ...}, or None.

    A file that is missing or no good counts as none: a measurement can be made again.
    """
    entry = read().get(plain(device_name))
    return entry if isinstance(entry, dict) else None


def measured_ceiling(device_name: str, dtype: str | None = None) -> float | None:
    """TFLOP/s that big matmuls reached on this device, or None where nobody measured.

    Args:
        device_name: as `training.device.describe` says it, or nearly so: "RTX 4090" will do.
        dtype: "fp32", "fp16" or "bf16"; None: the fastest of them.
    """
    good = _rates(measured(device_name) or {})
    return good.get(dtype) if dtype else max(good.values(), default=None)


def best_known(names: Sequence[str]) -> tuple[dict[str, float], float]:
    """TFLOP/s by dtype and GB/s, 0 where unknown, of the first of these names that was measured."""
    for name in names:
        if entry := measured(name):
            bandwidth: Any = entry.get("gb_per_s")
            return _rates(entry), float(bandwidth) if _is_rate(bandwidth) else 0.0
    return {}, 0.0


def _rates(entry: dict[str, Any]) -> dict[str, float]:
    rates = entry.get("tflops")
    if not isinstance(rates, dict):
        return {}
    return {dtype: float(rate) for dtype, rate in rates.items() if _is_rate(rate)}


def _is_rate(value: Any) -> bool:
    """Whether a number may be one; NaN is not."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and LEAST <= value <= MOST


def read() -> dict[str, Any]:
    """Every measurement, by the plain name of its device."""
    try:
        with open(ceiling_file(), "rb") as f:
            data = json.loads(f.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def add(device_name: str, dtype: str, tflops: float, **facts: Any) -> Path:
    """Keep the ceiling of one dtype beside what is known of the device; as `keep`."""
    entry = measured(device_name) or {}
    rates = entry.get("tflops")
    rates = {**(rates if isinstance(rates, dict) else {}), dtype: tflops}
    return keep(device_name, {**entry, **facts, "tflops": rates})


def keep(device_name: str, entry: dict[str, Any]) -> Path:
    """Add or replace a device's measurement; returns the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = ceiling_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    entries = {**read(), plain(device_name): {"name": device_name, **entry}}
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
        os.replace(aside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
    return path
