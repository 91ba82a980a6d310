"""Everything that needs a GPU, in one command under nine minutes.

    python bench/gpu_suite.py --out DIR [--minutes 9] [--only parity,kernels,steps]

| file in DIR | what |
|---|---|
| parity.json | pytest tests/gpu: the kernel tests on this card, and what only a GPU can show |
| kernels.json | bench_kernels.py: every operator against its peers, all samples |
| steps.json | training steps of the flagship preset beside plain compiled PyTorch, under 16 GiB |
| suite.json | the machine, what ran, how long it took, what the time did not allow |

Every file is written as soon as there is something to write, and names the card, its driver, its
clocks, torch and Triton, never the machine. Peers (liger_kernel, quack) are used when installed:
to compare on a machine without a network, unpack their wheels in a folder of PYTHONPATH. Compile
caches lie in a temporary folder; nothing else outside DIR is written. Without a GPU: one line,
and exit code 2.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import card, facts, median, quantile
from parity_report import summary

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
PARTS = ("parity", "kernels", "steps")
VARIANTS = "auto,plain,triton,inductor"
SHARE = {"parity": 0.4, "kernels": 0.7}  # of the time left, when parts follow
STEP_ROUNDS, STEPS_A_ROUND = 12, 4
ROOMY_BYTES = 80 << 30  # a card on which all models of the steps fit side by side


class Suite:
    """The folder, the clock, and the environment of everything that is started."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.out: Path = args.out
        self.end = time.monotonic() + 60 * args.minutes
        self.facts = facts("cuda")
        self.parts = [p for p in PARTS if p in args.only.split(",")]
        self.record: dict[str, Any] = {"minutes": args.minutes, "parts": {}}
        # `tests` is a folder without __init__: this one wins over a package of that name elsewhere
        (scratch / "path" / "tests").mkdir(parents=True)
        (scratch / "path" / "tests" / "__init__.py").write_text(
            f"__path__ = [{str(ROOT / 'tests')!r}]\n"
        )
        paths = [str(scratch / "path"), str(ROOT), str(BENCH), os.environ.get("PYTHONPATH", "")]
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(8, (os.cpu_count() or 2) // 4))),
        }
        self.env.pop("TRITON_INTERPRET", None)

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def until(self, part: str) -> float:
        """When a part must stop: a share of what is left, all of it for the last."""
        last = part == self.parts[-1]
        return time.monotonic() + (self.left() - 5 if last else SHARE[part] * self.left())

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write one file whole."""
        part = self.out / f"{name}.part"
        part.write_text(json.dumps({"machine": self.facts, **content}, indent=1) + "\n")
        os.replace(part, self.out / f"{name}.json")

    def note(self, part: str, **found: Any) -> None:
        """Keep a line about a part in suite.json."""
        self.record["parts"].setdefault(part, {}).update(found)
        self.write("suite", self.record)
        print(f"{part}: {', '.join(f'{k} {v}' for k, v in found.items())}", flush=True)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """Start a Python program in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=self.env, start_new_session=True, **options
        )


def stop(process: subprocess.Popen) -> None:
    """End a program and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def watch(process: subprocess.Popen, until: float, each: Callable[[], None]) -> bool:
    """Wait for a program, calling `each` now and then; False if it had to be stopped."""
    while process.poll() is None:
        if time.monotonic() > until:
            stop(process)
            each()
            return False
        time.sleep(1)
        each()
    return True


def parity(suite: Suite) -> None:
    """The tests of tests/gpu; failures with their text."""
    lines, log = suite.scratch / "parity.jsonl", suite.scratch / "parity.log"
    suite.env["MYPT_PARITY_LINES"] = str(lines)
    command = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "parity_report"]
    # warnings of this machine's own packages are no failures of ours
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "default", "--tb=short"]
    workers = min(8, (os.cpu_count() or 2) // 2)
    if importlib.util.find_spec("xdist") and suite.facts["gpu"]["memory_bytes"] > ROOMY_BYTES:
        command += ["-n", str(workers)]
    began, until = time.monotonic(), suite.until("parity")
    with log.open("w") as f:
        process = suite.start(command, stdout=f, stderr=subprocess.STDOUT)
        done = watch(process, until, lambda: suite.write("parity", summary(lines)))
    found = summary(lines)
    seconds = round(time.monotonic() - began, 1)
    found |= {"complete": done, "exit_code": process.returncode, "seconds": seconds}
    found["tail"] = log.read_text(errors="replace")[-3000:]
    suite.write("parity", found)
    keys = ("passed", "failed", "skipped", "complete", "seconds")
    suite.note("parity", **{k: found[k] for k in keys})


def kernels(suite: Suite) -> None:
    """The operators; bench_kernels.py keeps its own file up to date."""
    began, until = time.monotonic(), suite.until("kernels")
    minutes = max(0.2, (until - began - 15) / 60)  # what is under way then has 15 s to end
    out, log = suite.out / "kernels.json", suite.scratch / "kernels.log"
    command = [str(BENCH / "bench_kernels.py"), "--out", str(out), "--minutes", f"{minutes:.2f}"]
    with log.open("w") as f:
        process = suite.start(command, stdout=f, stderr=subprocess.STDOUT)
        done = watch(process, until, lambda: None)
    text = log.read_text(errors="replace")
    found = {"complete": done and process.returncode == 0, "cases_in_file": out.exists()}
    if not found["complete"]:
        found["tail"] = text[-2000:]
    print(text)
    suite.note("kernels", **found, seconds=round(time.monotonic() - began, 1))


class Model:
    """One variant in its own process: its own cap on memory, its own compiler state."""

    def __init__(self, suite: Suite, variant: str) -> None:
        self.variant, self.about, self.seconds = variant, {}, []
        args = suite.args
        self.log = (suite.scratch / f"{variant.replace('/', '-')}.log").open("w+")
        self.process = suite.start(
            [
                str(BENCH / "gpu_steps.py"), "--variant", variant, "--preset", args.preset,
                "--micro-batch", str(args.micro_batch), "--cap-gib", str(args.cap_gib),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # what a library prints is no answer
                self.lines.put(json.loads(line))
        self.lines.put({"failed": "the process ended"})

    def answer(self, until: float) -> dict[str, Any]:
        """The next answer; a failure if none comes in time, after which nothing is asked."""
        if "failed" in self.about:
            return {}
        try:
            found = self.lines.get(timeout=max(0.1, until - time.monotonic()))
        except queue.Empty:
            found = {"failed": "no answer in the time there was"}
        if "failed" in found:
            stop(self.process)
            self.log.seek(0)
            found["tail"] = self.log.read()[-2000:]
        self.about |= {k: v for k, v in found.items() if k != "seconds"}
        self.seconds += found.get("seconds", [])
        return found

    def ask(self, steps: int, until: float) -> None:
        """Have it run some steps."""
        if "failed" not in self.about:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{steps}\n")
                self.process.stdin.flush()
            self.answer(until)

    def row(self) -> dict[str, Any]:
        """What is known of it."""
        made = {"variant": self.variant, **self.about}
        if self.seconds:
            middle = median(self.seconds)
            made |= {
                "median_s": middle,
                "p20_s": quantile(self.seconds, 0.2),
                "p80_s": quantile(self.seconds, 0.8),
                "tokens_per_s": self.about["tokens_per_step"] / middle,
                "samples": self.seconds,
            }
        return made


def write_steps(suite: Suite, models: list[Model]) -> None:
    """All rows so far."""
    args = suite.args
    suite.write("steps", {
        "preset": args.preset, "dtype": "bf16 autocast", "cap_gib": args.cap_gib,
        "asked_micro_batch": args.micro_batch, "card_now": card(),
        "rows": [m.row() for m in models],
    })  # fmt: skip


def time_in_turn(suite: Suite, models: list[Model], until: float) -> None:
    """Rounds over all models that are ready, so that a drift hits all alike."""
    for _ in range(STEP_ROUNDS):
        for model in models:
            if time.monotonic() > until:
                return
            model.ask(STEPS_A_ROUND, until)
        write_steps(suite, models)


def steps_one_by_one(suite: Suite) -> None:
    """On a small card each model has it to itself; the time is shared out evenly."""
    models: list[Model] = []
    variants = suite.args.variants.split(",")
    for i, variant in enumerate(variants):
        until = time.monotonic() + (suite.left() - 5) / (len(variants) - i)
        models.append(Model(suite, variant))
        models[-1].answer(until)
        time_in_turn(suite, models[-1:], until)
        stop(models[-1].process)
        write_steps(suite, models)


def run(suite: Suite) -> None:
    """The parts in order; on a roomy card the models compile while the parity tests run."""
    roomy = suite.facts["gpu"]["memory_bytes"] > ROOMY_BYTES
    models: list[Model] = []
    try:
        if "steps" in suite.parts and roomy:
            models = [Model(suite, v) for v in suite.args.variants.split(",")]
        if "parity" in suite.parts:
            parity(suite)
        if models:
            waiting = time.monotonic() + 0.5 * suite.left()
            for model in models:  # nothing is timed while they compile
                model.answer(waiting)
            write_steps(suite, models)
            suite.note("steps", ready=[m.variant for m in models if "failed" not in m.about])
        if "kernels" in suite.parts:
            kernels(suite)
        if models:
            time_in_turn(suite, models, time.monotonic() + suite.left() - 5)
            write_steps(suite, models)
        elif "steps" in suite.parts:
            steps_one_by_one(suite)
        if "steps" in suite.parts:
            suite.note("steps", seconds_left=round(suite.left(), 1))
    finally:
        for model in models:
            stop(model.process)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--variants", default=VARIANTS, help="of the steps, see gpu_steps.py")
    parser.add_argument("--preset", default="base/750M_unified_v1")
    parser.add_argument("--micro-batch", type=int, default=2, help="halved until it fits")
    parser.add_argument("--cap-gib", type=float, default=16.0)
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(PARTS)}; found {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("gpu_suite: torch finds no GPU here; nothing was run", file=sys.stderr)
        return 2
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        suite = Suite(args, Path(scratch))
        suite.note("start", gpu=suite.facts["gpu"]["name"])
        run(suite)
        suite.note("end", seconds_left=round(suite.left(), 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
