"""Every operator against its peers: time, bandwidth, memory, on the GPU that is here or the CPU.

    pytest bench/bench_kernels.py --benchmark-only     a row of medians per operator and shape
    python bench/bench_kernels.py                      all samples, to bench/results/<device>/

Providers are sampled in turn, so that a drift of the machine hits all alike. A forward is one that
leaves what its backward needs. Memory is the most held beyond the inputs during a forward and a
backward, gradients included; their own size is given beside it. How a sample is taken says
mypt_fast/benchmark/timing.py, who is compared says kernel_cases.py.

On a CPU the bar is the head: ours at most 1.10 times the best of the others, in at most 60 MB of
logits.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the CLI does, for all providers

import pytest
import record
import torch
from kernel_cases import BUILDERS, Case, Shape, plan
from kernel_measure import ROUNDS, DeviceLostError, Measurement, digits, logits_bytes
from peers import Peers
from record import slug

from mypt_fast.benchmark.machine import facts
from mypt_fast.benchmark.timing import Clock, copy_rate, device_error, matmul_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAR, BAR_LOGITS_BYTES = 1.10, 60e6
DEVICE_LOST = 9  # exit code: a new process with --resume can go on
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
HOW = {
    "samples": "rounds over all providers in turn",
    "upstream": "1 for a loss, fixed random tensors for the rest",
    "cuda": "events; L2 overwritten before each; launches hidden behind a sleeping device",
}


def build(op: str, shape: Shape, device: str, peers: Peers) -> Case:
    """The case, with nothing compiled for an earlier one."""
    torch.compiler.reset()
    return BUILDERS[op](shape, DTYPES[device], device, peers)


def check_bar(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """Ours over the best of the others on a CPU, and who that is."""
    both = {r["provider"]: r["median_ms"] for r in rows if r["mode"] == "both"}
    others = {name: ms for name, ms in both.items() if not name.startswith("ours")}
    best = min(others, key=lambda name: others[name])
    return both["ours"] / others[best], best


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    ("op", "shape"), [pytest.param(o, s, id=f"{o}-{s.name}") for o, s in plan(DEVICE)]
)
def test_kernel(benchmark, op: str, shape: Shape) -> None:
    measured = Measurement(build(op, shape, DEVICE, Peers(DEVICE)), Clock(DEVICE))
    measured.warm_up()
    first, *others = measured.samples
    benchmark.group = f"{op}, {shape.name}"

    def sample_others() -> None:
        for name in others:
            if measured.wants_more(name):
                measured.sample(name)

    benchmark.pedantic(lambda: measured.sample(first), setup=sample_others, rounds=ROUNDS[DEVICE])
    rows = measured.rows()
    benchmark.extra_info["rows"] = rows
    benchmark.extra_info["failed"] = measured.failed
    assert first not in measured.failed
    for row in (r for r in rows if r["mode"] == "both"):
        print(f"\n{op} {row['provider']:16} {row['median_ms']:10.3f} ms", end="")
    if DEVICE == "cpu" and op == "linear_cross_entropy":
        ratio, best = check_bar(rows)
        assert ratio <= BAR, f"{ratio:.3f} times {best}, where the bar is {BAR}"
        assert logits_bytes(measured.case, "ours") <= BAR_LOGITS_BYTES


class Resident:
    """The most memory that this process held while inside, looked at every 2 ms."""

    def __enter__(self) -> "Resident":
        self.most = self.before = self._now()
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._look, daemon=True)
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watch.join()

    def _look(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def resident_growth(op: str, shape: Shape, provider: str) -> int:
    """Bytes by which a process grows at its peak in one forward and backward; run in a child."""
    measured = Measurement(build(op, shape, "cpu", Peers("cpu")), Clock("cpu"))
    a = torch.randn(256, 256, requires_grad=True)
    (a @ a).sum().backward()  # the threads and the buffers of the BLAS are not the operator's
    with Resident() as memory:
        measured.both(provider)
    return memory.most - memory.before


def add_resident_growth(rows: list[dict[str, Any]], op: str) -> None:
    """Measure each provider's growth in a process of its own."""
    for row in (r for r in rows if r["mode"] == "both" and r["op"] == op):
        command = [sys.executable, __file__, "--rss", op, "--provider", row["provider"]]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            row["rss_growth_bytes"] = int(answer.stdout.split()[-1])
        else:
            row["rss_failure"] = answer.stderr.strip().rpartition("\n")[2][-300:]


class Report:
    """The file, written anew after each case: a run that is stopped leaves what it has."""

    def __init__(self, out: Path | None, header: dict[str, Any]) -> None:
        self.header = header
        self.rows: list[dict[str, Any]] = []
        folder = slug(header["gpu"]["name"]) if "gpu" in header else "cpu"
        self.out = out or record.RESULTS / folder / "kernels.json"

    def write(self) -> None:
        """Write beside the file, then put in its place."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        text = json.dumps({**self.header, "rows": []}, indent=1)
        part = self.out.with_suffix(".part")
        part.write_text(text.replace('"rows": []', f'"rows": [\n  {lines}\n ]') + "\n")
        os.replace(part, self.out)


def label(op: str, shape: Shape) -> str:
    """A case's name in the header."""
    return f"{op} {shape.name}"


def begin(args: argparse.Namespace, clock: Clock, peers: Peers) -> Report:
    """The report, its header written before a case can fail; or the one there is, to go on with."""
    wanted = [c for c in plan(DEVICE) if not args.ops or c[0] in args.ops.split(",")]
    header: dict[str, Any] = {
        **facts(DEVICE), "how": HOW, "absent": peers.absent, "peers": peers.versions,
        "failed": {}, "not_run": [label(*c) for c in wanted],
    }  # fmt: skip
    report = Report(args.out, header)
    if args.resume and report.out.exists():
        old = json.loads(report.out.read_text())
        report.rows = old.pop("rows")
        peers.absent.update(old.pop("absent"))
        peers.versions.update(old.pop("peers"))
        header.update(old)
        ended = header.pop("running", None)
        if ended is not None:  # the process had no time to say more
            header["failed"].setdefault(ended, {})["all"] = "the process ended in it"
            header["not_run"].remove(ended)
    report.write()
    if "matmul_tflops" not in header:
        header["copy_gb_per_s"] = digits(copy_rate(clock) / 1e9)
        header["matmul_tflops"] = digits(matmul_rate(clock, DTYPES[DEVICE]) / 1e12)
        report.write()
    return report


def measure_one(
    report: Report, op: str, shape: Shape, clock: Clock, peers: Peers, deadline: float
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a case, and whether one of its providers is known to have lost the device.

    What failed goes to the header; a provider that is there already is left out.
    """
    header = report.header
    failed = dict(header["failed"].get(label(op, shape), {}))
    measured, known = None, False
    try:
        case = build(op, shape, DEVICE, peers)
        for name in failed:
            case.providers.pop(name, None)
        measured = Measurement(case, clock, deadline)
        measured.warm_up()
        measured.run()
    except Exception as e:  # a smaller shape may fit, another operator may work
        known = isinstance(e, DeviceLostError) and bool(measured and measured.failed)
        failed["device" if known else "all"] = f"{type(e).__name__}: {e}"[:300]
    if measured is not None:
        failed |= measured.failed
    if failed:
        header["failed"][label(op, shape)] = failed
    rates = 1e9 * header["copy_gb_per_s"], 1e12 * header["matmul_tflops"]
    return measured.rows(*rates) if measured is not None else [], known


def measure_all(args: argparse.Namespace) -> tuple[Report, int]:
    """Every case of the plan until the time is over; the report and the exit code."""
    deadline = time.monotonic() + min(60 * args.minutes, args.until - time.time())
    clock, peers = Clock(DEVICE), Peers(DEVICE)
    report = begin(args, clock, peers)
    header = report.header
    for op, shape in [c for c in plan(DEVICE) if label(*c) in header["not_run"]]:
        left = deadline - time.monotonic()
        if left < 5:
            break
        header["running"] = label(op, shape)
        report.write()
        rows, known = measure_one(report, op, shape, clock, peers, time.monotonic() + left / 2)
        del header["running"]
        if DEVICE == "cpu":
            add_resident_growth(rows, op)
        report.rows += rows
        if not known:  # else it is worth another try, without that provider
            header["not_run"].remove(label(op, shape))
        lost = device_error(DEVICE)
        if lost is not None:
            header["failed"].setdefault(label(op, shape), {})["device"] = lost
        report.write()
        show(rows)
        if known or lost is not None:
            return report, DEVICE_LOST
    if DEVICE == "cuda":
        header["copy_gb_per_s_after"] = digits(copy_rate(clock) / 1e9)
    report.write()
    return report, 0


def show(rows: list[dict[str, Any]]) -> None:
    """One line per provider: the modes side by side."""
    for row in (r for r in rows if r["mode"] == "both"):
        of = row.get("of_copy") or row.get("of_matmul") or 0
        print(
            f"{row['op']:21} {row['shape']:22} {row['provider']:16} {row['median_ms']:10.3f} ms "
            f"({row['p20_ms']:.3f} .. {row['p80_ms']:.3f}) {of:6.1%} n={row['count']}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="file; default bench/results/<device>/")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop sampling after these")
    parser.add_argument("--until", type=float, default=math.inf, help="the same, in Unix time")
    parser.add_argument("--resume", action="store_true", help="run what --out lists as not run")
    parser.add_argument("--ops", help="comma-separated operators; default all of the plan")
    parser.add_argument("--rss", help=argparse.SUPPRESS)  # what a child is asked
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rss:
        shape = next(s for o, s in plan("cpu") if o == args.rss)
        print(resident_growth(args.rss, shape, args.provider))
        return 0
    report, code = measure_all(args)
    if DEVICE == "cpu":
        ratio, best = check_bar(report.rows)
        print(f"head on a CPU: {ratio:.3f} times the best of the others ({best}); bar {BAR}")
    return code


if __name__ == "__main__":
    sys.exit(main())
