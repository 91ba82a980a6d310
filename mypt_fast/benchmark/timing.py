"""How a sample is taken, on a GPU and on a CPU, and what the machine could do at best.

On a GPU a sample is the time between two events. Before it the L2 cache is overwritten, and the
device is put to sleep for as long as the host needs to launch the work: what is timed is the
device's work, not Python. The host's own time is kept beside it.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_FLUSH_BYTES = 128 << 20
SLEEP_MARGIN = 1.5  # of the longest launch seen, and
SLEEP_LEAST_S = 30e-6


def device_error(device: str) -> str | None:
    """Why nothing more can run on the device in this process; None if it can, its cache freed.

    An error inside a kernel ends the context: from then on every call fails with it.
    """
    if device == "cpu":
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as e:
        return f"{type(e).__name__}: {e}"[:300]
    return None


class Clock:
    """Takes samples on one device.

    `host_s` is how long the host took to start what the last sample timed.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.host_s = 0.0
        self.longest_launch = 0.0
        self.cache: Tensor | None = None
        if device == "cuda":
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            size = max(MIN_FLUSH_BYTES, 2 * (getattr(properties, "L2_cache_size", 0) or 0))
            self.cache = torch.empty(size // 4, dtype=torch.int32, device=device)
            self.cycles_per_s = 1e3 * (getattr(properties, "clock_rate", 0) or 2_000_000)

    def sample(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that `work` takes, and what it returned."""
        if self.device == "cpu":
            began = time.perf_counter()
            result = work()
            self.host_s = time.perf_counter() - began
            return self.host_s, result
        assert self.cache is not None
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        sleep = SLEEP_LEAST_S + SLEEP_MARGIN * self.longest_launch
        torch.cuda._sleep(int(sleep * self.cycles_per_s))
        first.record()
        began = time.perf_counter()
        result = work()
        self.host_s = time.perf_counter() - began
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, result

    def learn_launch(self, work: Callable[[], Any]) -> None:
        """Note how long the host takes to launch `work`: the sleep before a sample covers it.

        Work that waits for the device itself, as some peers' does, is covered up to 1 ms; the
        rest is theirs to show.
        """
        if self.device == "cpu":
            return
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        self.longest_launch = max(self.longest_launch, min(1e-3, time.perf_counter() - began))
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    """The middle of the samples."""
    return quantile(values, 0.5)


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest samples."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def copy_rate(clock: Clock, samples: int = 20) -> float:
    """Bytes per second of a large copy, read and written both counted."""
    free = torch.cuda.mem_get_info()[0] if clock.device == "cuda" else 1 << 30
    elements = min(1 << 30, free // 4) // 4
    source = torch.ones(elements, device=clock.device)
    target = torch.empty_like(source)
    clock.sample(lambda: target.copy_(source))
    times = [clock.sample(lambda: target.copy_(source))[0] for _ in range(samples)]
    return 2 * 4 * elements / median(times)


def matmul_rate(clock: Clock, dtype: torch.dtype, samples: int = 10) -> float:
    """FLOP per second of a square product of random numbers in the dtype."""
    n = 8192 if clock.device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        clock.sample(lambda: torch.mm(a, b, out=out))
    times = [clock.sample(lambda: torch.mm(a, b, out=out))[0] for _ in range(samples)]
    return 2 * n**3 / median(times)


def peak_extra_bytes(work: Callable[[], Any]) -> tuple[int, Any]:
    """The most GPU memory that `work` held beyond what was there before, and its result."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result
