"""Kernels and short training steps on a GPU, in one command under nine minutes.

    python bench/gpu_suite.py [--out DIR] [--minutes 9] [--only parity,kernels,steps]

| file in DIR | what |
|---|---|
| parity.json | pytest tests/gpu: the kernel tests on this card, and what only a GPU can show |
| kernels.json | bench_kernels.py: every operator against its peers, all samples |
| steps.json | training steps of the flagship preset beside plain compiled PyTorch, under 16 GiB |
| suite.json | the machine, what ran, how long it took, what the time did not allow |

DIR is bench/results/<GPU> where none is named. What a model needs under a cap, long runs, and
other people's ways to train are bench_step.py's part, starts bench_start.py's. Each step takes the
largest micro-batches that fit; `--only steps --variants auto@1,plain@1` makes them equal.

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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # mypt_fast, installed or not

import torch
from parity_report import summary
from record import RESULTS, slug

from mypt_fast.benchmark.machine import card, facts
from mypt_fast.benchmark.timing import median, quantile
from mypt_fast.cli import ALLOCATOR, has_expandable_segments

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
PARTS = ("parity", "kernels", "steps")
VARIANTS = "auto/plan,auto/norms+exact16,auto,plain"
SHARE = {"parity": 0.4, "kernels": 0.7}  # of the time left, when parts follow
STEP_ROUNDS, STEPS_A_ROUND = 12, 4
KERNEL_STARTS = 4  # of the bench: after a kernel that ended its process it goes on in a new one
ROOMY_BYTES = 80 << 30  # a card on which all models of the steps fit side by side


class Suite:
    """The folder, the clock, and the environment of everything that is started."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.out: Path = args.out
        self.end = time.monotonic() + 60 * args.minutes
        self.facts = facts(args.device)
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
        options = {"env": self.env, **options}
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, start_new_session=True, **options
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
        command += ["-n", str(workers), "--max-worker-restart=20"]
    began, until = time.monotonic(), suite.until("parity")
    with log.open("w") as f:
        process = suite.start(command, stdout=f, stderr=subprocess.STDOUT)
        try:
            done = watch(process, until, lambda: suite.write("parity", summary(lines)))
        finally:
            stop(process)
    found = summary(lines)
    seconds = round(time.monotonic() - began, 1)
    done = done and process.returncode in (0, 1)  # pytest's codes of a run that came to its end
    found |= {"complete": done, "exit_code": process.returncode, "seconds": seconds}
    found["tail"] = log.read_text(errors="replace")[-3000:]
    suite.write("parity", found)
    keys = ("passed", "failed", "skipped", "complete", "seconds")
    suite.note("parity", **{k: found[k] for k in keys})


def kernels(suite: Suite) -> None:
    """The operators; bench_kernels.py keeps its own file up to date."""
    began, until = time.monotonic(), suite.until("kernels")
    out, log = suite.out / "kernels.json", suite.scratch / "kernels.log"
    out.unlink(missing_ok=True)  # of an earlier run
    end = time.time() + until - began - 15  # what is under way then has 15 s to end
    command = [str(BENCH / "bench_kernels.py"), "--out", str(out), "--until", f"{end:.1f}"]
    codes: list[int] = []
    while len(codes) < KERNEL_STARTS and time.monotonic() < until - 20:
        with log.open("a") as f:
            process = suite.start(command, stdout=f, stderr=subprocess.STDOUT)
            try:
                done = watch(process, until, lambda: None)
            finally:
                stop(process)
        codes.append(process.returncode)
        if not done or process.returncode == 0:
            break
        command = [*command[:5], "--resume"]
    text = log.read_text(errors="replace") if log.exists() else ""
    found: dict[str, Any] = {"complete": codes[-1:] == [0], "exit_codes": codes}
    found["not_run"] = json.loads(out.read_text())["not_run"] if out.exists() else "all"
    if not found["complete"]:
        found["tail"] = text[-2000:]
    print(text)
    suite.note("kernels", **found, seconds=round(time.monotonic() - began, 1))


def training_env(env: dict[str, str]) -> dict[str, str]:
    """The environment with the allocator that `train` asks for, so that nobody's memory fragments.

    All sides get it: a cap on memory would otherwise measure who fragments most.
    """
    if ALLOCATOR & env.keys() or not has_expandable_segments():
        return env
    return {**env, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


class Model:
    """One variant in its own process: its own cap on memory, its own compiler state."""

    def __init__(self, suite: Suite, variant: str) -> None:
        self.variant, self.over = variant, False
        self.about: dict[str, Any] = {}
        self.seconds: list[float] = []
        self.retries: list[int] = []  # of the allocator, by round
        args = suite.args
        self.log = (suite.scratch / f"{variant.replace('/', '-')}.log").open("w+")
        self.process = suite.start(
            [
                str(BENCH / "steps.py"), "--variant", variant, "--preset", args.preset,
                "--sequences", str(args.sequences), "--cap-gib", str(args.cap_gib),
                "--device", args.device, "--dtype", args.dtype,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=training_env(suite.env),
        )  # fmt: skip
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # what a library prints is no answer
                answer = json.loads(line)
                if isinstance(answer, dict):
                    self.lines.put(answer)
        self.lines.put({"failed": "the process ended"})

    def answer(self, until: float) -> dict[str, Any]:
        """The next answer; after none in time, or a failure, nothing more is asked.

        One that has samples by then is cut short; one without any has failed.
        """
        if self.over:
            return {}
        try:
            found = self.lines.get(timeout=max(0.1, until - time.monotonic()))
        except queue.Empty:
            why = "no answer in the time there was"
            found = {"cut_short": why} if self.seconds else {"failed": why}
        if "failed" in found or "cut_short" in found:
            self.over = True
            stop(self.process)
            if "failed" in found:
                self.log.seek(0)
                found["tail"] = self.log.read()[-2000:]
        by_round = ("seconds", "alloc_retries")
        self.about |= {k: v for k, v in found.items() if k not in by_round}
        self.seconds += found.get("seconds", [])
        self.retries += [found["alloc_retries"]] if "alloc_retries" in found else []
        return found

    def ask(self, steps: int | str, until: float) -> None:
        """Have it run some steps, or tell its `loss`, after which it is done."""
        if not self.over:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{steps}\n")
                self.process.stdin.flush()
            self.answer(until)

    def close(self) -> None:
        """End the process; what is known of it stays."""
        self.over = True
        stop(self.process)
        self.reader.join(10)
        for file in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):  # a number that nobody has read
                file.close()

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
        return made | ({"alloc_retries": self.retries} if self.retries else {})


def write_steps(suite: Suite, models: list[Model]) -> None:
    """All rows so far; each says whose it may be compared with: those of as many tokens a step."""
    args, rows = suite.args, [m.row() for m in models]
    for row in rows:
        size = row.get("tokens_per_step")
        row["comparable_with"] = [
            r["variant"] for r in rows if r is not row and size and r.get("tokens_per_step") == size
        ]
    suite.write("steps", {
        "preset": args.preset, "dtype": f"{args.dtype} autocast", "cap_gib": args.cap_gib,
        "sequences": args.sequences, "card_now": card(),
        "rows": rows,
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
        try:
            models[-1].answer(until)
            time_in_turn(suite, models, until)
        finally:
            models[-1].close()
        write_steps(suite, models)


def start_models(suite: Suite, models: list[Model]) -> None:
    """Start every variant; they compile while something else runs."""
    for variant in suite.args.variants.split(","):
        models.append(Model(suite, variant))  # noqa: PERF401 - one that fails hides no other


def wait_for(suite: Suite, models: list[Model]) -> None:
    """Nothing is timed while they compile."""
    until = time.monotonic() + 0.5 * suite.left()
    for model in models:
        model.answer(until)
    write_steps(suite, models)
    suite.note("steps", ready=[m.variant for m in models if not m.over])


def steps(suite: Suite, models: list[Model]) -> None:
    """Time the models that wait, or one after the other those that would not fit together."""
    if models:
        time_in_turn(suite, models, time.monotonic() + suite.left() - 5)
        write_steps(suite, models)
    else:
        steps_one_by_one(suite)
    suite.note("steps", seconds_left=round(suite.left(), 1))


def guarded(suite: Suite, part: str, work: Callable[..., None], *args: Any) -> None:
    """Do the work of one part; its failure is kept in suite.json and the next part runs."""
    try:
        work(suite, *args)
    except Exception as e:
        traceback.print_exc()
        suite.note(part, error=f"{type(e).__name__}: {e}"[:1000])


def run(suite: Suite) -> None:
    """The parts in order; on a roomy card the models compile while the parity tests run."""
    roomy = suite.facts["gpu"]["memory_bytes"] > ROOMY_BYTES
    models: list[Model] = []
    try:
        if "steps" in suite.parts and roomy:
            guarded(suite, "steps", start_models, models)
        if "parity" in suite.parts:
            guarded(suite, "parity", parity)
        if models:
            guarded(suite, "steps", wait_for, models)
        if "kernels" in suite.parts:
            guarded(suite, "kernels", kernels)
        if "steps" in suite.parts:
            guarded(suite, "steps", steps, models)
    finally:
        for model in models:
            model.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results, bench/results/<GPU>")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--variants", default=VARIANTS, help="of the steps, see steps.py")
    parser.add_argument("--preset", default="base/750M_unified_v1")
    parser.add_argument("--sequences", type=int, default=8, help="of a step")
    parser.add_argument("--cap-gib", type=float, default=16.0)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    args = parser.parse_args()
    args.device = "cuda"
    unknown = set(args.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(PARTS)}; found {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("gpu_suite: torch finds no GPU here; nothing was run", file=sys.stderr)
        return 2
    args.out = (args.out or RESULTS / slug(torch.cuda.get_device_name())).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        suite = Suite(args, Path(scratch))
        suite.note("start", gpu=suite.facts["gpu"]["name"])
        run(suite)
        suite.note("end", seconds_left=round(suite.left(), 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
