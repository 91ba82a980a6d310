"""How fast a device multiplies big matrices and streams memory, measured."""

import time
from collections.abc import Callable

import torch

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
# several times any cache, so that the rate is the memory's
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def matmul_tflops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """TFLOP/s of the best square matmul within about `seconds`; TF32 as it is set.

    A size whose calls would take longer than its part of the time is left out.
    """
    best, sizes = 0.0, SIZES[device.type]
    # numbers as in training: a GPU multiplies constants with less power, at a higher clock
    draw = torch.Generator(device).manual_seed(0)
    for n in sizes:
        if best and 3 * 2 * n**3 / (1e12 * best) > seconds / len(sizes):
            break
        try:
            a, b = (torch.randn(n, n, generator=draw, device=device).to(dtype) for _ in "ab")
            out = torch.empty_like(a)
        except RuntimeError:  # torch.OutOfMemoryError is one: a smaller size may have fitted
            if not best:
                raise
            break

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        best = max(best, 2 * n**3 / best_seconds(multiply, device, seconds / len(sizes)) / 1e12)
    return best


def copy_gb_per_s(device: torch.device, seconds: float) -> float:
    """GB/s, read and written, of copying memory within about `seconds`."""
    size = COPY_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, seconds) / 1e9


def best_seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """The shortest time of a call, over about `budget` seconds of them, at least two.

    The first call warms up and does not count. The shortest: other programs only ever add.
    """
    run()
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget:
        _settle(device)
        began = time.perf_counter()
        run()
        _settle(device)
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
