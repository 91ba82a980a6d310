"""Stop a run at random moments, resume it each time, and compare it with one left alone.

A fork server: one process imports everything, every start of the run is a fork of it.

    python tests/faults/restarts.py --kills 200 --steps 2000            SIGKILL
    python tests/faults/restarts.py --kills 100 --signals               those that save first
"""

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "training"), str(HERE.parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from conftest import SMALL, write_dataset  # noqa: E402

from mypt_fast.checkpoint import bundle  # noqa: E402
from mypt_fast.cli import main  # noqa: E402
from mypt_fast.training import trainer  # noqa: E402
from mypt_fast.training.signals import EXIT_CODES  # noqa: E402

# Clocks, and what the log's format counts from the last start on.
SINCE_START = {
    "timestamp", "started_at", "elapsed_s", "eval_duration_s", "tokens_per_sec", "mfu",
    "steps_per_sec", "total_elapsed_s", "total_elapsed_h", "tokens_processed", "progress_pct",
    "total_steps", "total_tokens",
}  # fmt: skip


def flags(steps: int) -> list[str]:
    """The settings of the run: evaluations and saves in it, dropout, accumulation."""
    own = ["--max_iters", str(steps), "--eval_interval", str(max(20, steps // 8))]
    return [*SMALL, *own, "--save_interval", "7", "--dataset_dir", "data/toy"]


class Start:
    """One start of the run, in a child process."""

    def __init__(self, name: str, steps: int) -> None:
        self.began, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.close(self.began)
                self._train(name, steps, told)
                code = main(["train", "--model_name", name, *flags(steps)])
            except SystemExit as e:
                code = int(e.code or 0)
            finally:
                os._exit(code)
        os.close(told)

    @staticmethod
    def _train(name: str, steps: int, told: int) -> None:
        """Send the output to a file, and tell the parent when training begins."""
        out = os.open(f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        original = trainer.Journal.start

        def start(self: trainer.Journal) -> None:
            original(self)
            os.write(told, b"1")

        trainer.Journal.start = start  # type: ignore[method-assign]

    def wait_for_training(self) -> None:
        """Until the first step is due, or the process has ended."""
        os.read(self.began, 1)

    def ends_within(self, seconds: float) -> bool:
        """Whether the process ended by itself in that time: its end of the pipe closes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self.began], [], [], left)[0] and not os.read(self.began, 1):
                return True
        return False

    def code(self) -> int:
        """Exit code, or minus the signal that killed it."""
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.began)
        return os.waitstatus_to_exitcode(status)


def saved_step(name: str) -> int:
    """Step of the checkpoint; 0 before the first."""
    path = Path("checkpoints", name, "training_state.json")
    return json.loads(path.read_text())["step"] if path.is_file() else 0


def logged(name: str) -> list[dict]:
    """What the log says, without clocks and starts."""
    lines = Path(f"logs/train/{name}_eval.jsonl").read_text().splitlines()
    kept = [e for e in map(json.loads, lines) if e["event"] != "training_start"]
    return [{k: v for k, v in e.items() if k not in SINCE_START} for e in kept]


def digest(name: str) -> dict[str, str]:
    """SHA-256 of weights, optimizer, data position with RNG and progress, and log of a run."""
    saved = bundle.read(Path("checkpoints", name))
    assert saved.optimizer is not None
    assert saved.manifest is not None
    moments = {f"{i}.{k}": v for i, s in saved.optimizer["state"].items() for k, v in s.items()}
    groups = json.dumps(saved.optimizer["param_groups"], sort_keys=True)
    position = {k: saved.manifest[k] for k in ("data", "rng", "progress", "scaler")}
    return {
        "weights": _sha(saved.state_dict),
        "optimizer": hashlib.sha256((_sha(moments) + groups).encode()).hexdigest(),
        "position": hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest(),
        "log": hashlib.sha256(json.dumps(logged(name)).encode()).hexdigest(),
    }


def _sha(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
    return total.hexdigest()


def stop(name: str, steps: int, span: float, chance: random.Random, gently: bool) -> bool:
    """Start the run and stop it at a random moment; False if it was done before that."""
    run = Start(name, steps)
    number = signal.SIGKILL
    if gently or chance.random() < 0.8:  # else also while it starts
        run.wait_for_training()
    if gently:
        number = chance.choice([*EXIT_CODES])
    ended = run.ends_within(chance.uniform(0, span))
    if not ended:
        os.kill(run.pid, number)
    code = run.code()
    if gently and code == -number:  # it was done, and its handlers were gone
        assert logged(name)[-1]["event"] == "training_complete", code
    elif gently and code != 0:
        assert code == EXIT_CODES[number], code
        trained = [e["iter"] for e in logged(name) if e["event"] == "train"]
        assert trained == list(range(saved_step(name))), "a finished step was not saved"
    assert code in (0, -number, EXIT_CODES.get(number)), code
    return code != 0


def finish_in_parts(
    name: str, steps: int, kills: int, whole_s: float, chance: random.Random, gently: bool
) -> int:
    """Run to the end, stopped up to `kills` times; returns how often it was stopped."""
    done = 0
    while done < kills:
        left = whole_s * (1 - saved_step(name) / steps)
        if not stop(name, steps, left / (kills - done), chance, gently):
            break
        done += 1
    code, said = Start(name, steps).code(), Path(f"{name}.out").read_text()
    assert code == 0, said[-2000:]
    assert [e["iter"] for e in logged(name) if e["event"] == "train"] == list(range(steps))
    assert not [w for w in said.splitlines() if w.startswith("error")], said[-2000:]
    return done


def compare(kills: int, steps: int, seed: int, gently: bool = False) -> dict:
    """Run once whole and then in parts; raises AssertionError where they differ.

    A run may be done before its last stop: the machine's pace is not known beforehand. Then
    another one takes the stops that are left.
    """
    write_dataset(Path("data/toy"))
    began = time.monotonic()
    assert Start("whole", steps).code() == 0
    whole_s, whole = time.monotonic() - began, digest("whole")
    chance, done, runs = random.Random(seed), 0, 0
    while done < kills:
        assert runs < kills, f"{done} stops in {runs} runs"
        runs, name = runs + 1, f"parts_{runs}"
        done += finish_in_parts(name, steps, kills - done, whole_s, chance, gently)
        parts = digest(name)
        assert whole == parts, {k: (whole[k], parts[k]) for k in whole if whole[k] != parts[k]}
    seconds = round(time.monotonic() - began, 1)
    return {"stopped": done, "runs": runs, "steps": steps, "seconds": seconds, **whole}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFF)
    parser.add_argument("--signals", action="store_true", help="SIGINT, SIGTERM, SIGUSR1, SIGHUP")
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = compare(args.kills, args.steps, args.seed, args.signals)
        os.chdir("/")
    print(json.dumps(result))
