"""What a reader must know to place a number: never a name of a machine or user, never a path."""

import datetime
import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from mypt_fast.training.device import cpu_name

CARD_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"


def machine() -> dict[str, Any]:
    """The processor and the versions that compute."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def facts(device: str) -> dict[str, Any]:
    """`machine`, Triton's version, and the GPU where `device` is "cuda"."""
    found = machine()
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    if device == "cuda":
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        found["gpu"] = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(index)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            **card(index),
        }
    return found


def card(index: int = 0) -> dict[str, str]:
    """Driver and clocks as the driver's tool tells them now; empty where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={CARD_QUERY}", "--format=csv,noheader", f"--id={index}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [v.strip() for v in answer.stdout.strip().split(",")]
    return dict(zip(CARD_QUERY.split(",")[1:], values[1:], strict=False))
