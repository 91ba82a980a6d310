"""The external gate: a script of the user's that judges a checkpoint (MyPT specification 6).

It is code that a config names, so it runs only where the caller was told to allow it. It has a time
limit and gets no shell; whatever goes wrong with it means no.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mypt_fast.config import ExternalGate
from mypt_fast.errors import ConfigError
from mypt_fast.presets import read_json
from mypt_fast.training.gold import Verdict

MAX_JSON_BYTES = 1 << 20
TAIL_BYTES = 2000  # of the script's output that is kept
_POLL_S = 0.05


@dataclass(frozen=True)
class GateResult:
    """One run of the gate, as the log and gold_selection_state.json show it."""

    ran: bool
    ok: bool = False
    returncode: int | None = None
    gate_pass: bool = False
    metric_value: float | None = None
    metric_path: str | None = None
    output_json: str | None = None
    error: str | None = None
    output_tail: str = ""
    command: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """What the gold decision takes from it."""
        return Verdict(self.ran, self.ok, self.gate_pass, self.metric_value)

    @property
    def line(self) -> str:
        """What people read."""
        if self.error:
            last = self.output_tail.strip().splitlines()[-1:]
            shown = "".join(c for c in last[0] if c.isprintable())[:200] if last else ""
            return f"  gate: no ({self.error}{'; ' + shown if shown else ''})"
        metric = "" if self.metric_value is None else f" | {self.metric_path} {self.metric_value:g}"
        return f"  gate: {'passed' if self.gate_pass else 'no'}{metric}"

    def fields(self) -> dict[str, Any]:
        """Return what the log holds, in MyPT's order."""
        names = (
            "ran", "ok", "returncode", "gate_pass", "metric_value", "metric_path", "output_json",
            "error",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def is_due(ext: ExternalGate, evaluations: int, final: bool) -> bool:
    """Whether the gate is asked at this evaluation.

    Args:
        ext: its settings.
        evaluations: how many there were before.
        final: the one at the end of the run.
    """
    if not ext.enabled:
        return False
    return ext.run_on_final_eval if final else evaluations % ext.run_interval_evals == 0


def run_gate(
    ext: ExternalGate,
    checkpoint_dir: Path,
    model_name: str,
    step: int,
    between: Callable[[], None] = lambda: None,
    cwd: Path | None = None,
) -> GateResult:
    """Run the gate on the checkpoint that was just saved; never raises for what it does.

    Args:
        ext: script, arguments, limits. `{model_name}` and `{output_json}` in the arguments are
            replaced; where none is `{output_json}`, `--output PATH` is added.
        checkpoint_dir: where its JSON goes, as gold_gate_step_<step>.json.
        model_name: of the run.
        step: of the checkpoint.
        between: called every twentieth of a second; may raise to stop, which ends the script.
        cwd: where the script runs, and what it is relative to; `checkpoint_dir` is absolute then.
    """
    out = checkpoint_dir / f"gold_gate_step_{step}.json"
    if not ext.script:
        return GateResult(False, error="external_gate.script is not set")
    script = ext.script if cwd is None else str(cwd.absolute() / ext.script)
    command = [sys.executable, script, *_arguments(ext.args, model_name, str(out))]
    result: dict[str, Any] = {
        "metric_path": ext.metric_path, "output_json": str(out), "command": tuple(command),
    }  # fmt: skip
    try:
        if not Path(script).is_file():
            return GateResult(False, error=f"no script {ext.script}")
        out.unlink(missing_ok=True)  # the verdict of an evaluation that a kill cut short
        code, tail = _finish(command, ext.timeout_s, between, cwd)
    except OSError as e:
        return GateResult(True, error=e.strerror or str(e), **result)
    result |= {"returncode": code, "output_tail": tail}
    if code is None:
        return GateResult(True, error=f"timed out after {ext.timeout_s:g} s", **result)
    if code:
        return GateResult(True, error=f"exit code {code}", **result)
    try:
        passed, metric = _read(out, ext)
    except ConfigError as e:
        return GateResult(True, error=str(e)[:300], **result)
    return GateResult(True, True, gate_pass=passed, metric_value=metric, **result)


def _arguments(args: tuple[str, ...], model_name: str, out: str) -> list[str]:
    filled = [a.replace("{model_name}", model_name).replace("{output_json}", out) for a in args]
    return filled if any("{output_json}" in a for a in args) else [*filled, "--output", out]


def _read(path: Path, ext: ExternalGate) -> tuple[bool, float | None]:
    """Read the gate's verdict and metric; raises ConfigError for what is neither."""
    if not path.is_file():  # a pipe of that name would be waited for
        raise ConfigError("the gate ended well", f"it wrote no {path.name}")
    content = read_json(path, "gate result", MAX_JSON_BYTES)
    passed = deep_get(content, ext.pass_path, True)
    if not isinstance(passed, bool):
        raise ConfigError(f"{path.name}: {ext.pass_path} is neither true nor false")
    value = deep_get(content, ext.metric_path) if ext.metric_path else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and abs(value) <= sys.float_info.max):
        raise ConfigError(f"{path.name}: {ext.metric_path} is no number")
    return passed, None if value is None else float(value)


def deep_get(content: Any, path: str, default: Any = None) -> Any:
    """Follow a dotted path through nested objects."""
    for key in path.split("."):
        if not isinstance(content, dict) or key not in content:
            return default
        content = content[key]
    return content


def _finish(
    command: list[str], timeout_s: float, between: Callable[[], None], cwd: Path | None = None
) -> tuple[int | None, str]:
    """Run a command to its end or to the time limit; returns exit code, or None, and last words.

    It has a session of its own: Ctrl-C is for the run, and what it started ends with it.
    """
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, cwd=cwd,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            return _watch(process, process.stdout, time.monotonic() + timeout_s, between)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _watch(
    process: subprocess.Popen[bytes],
    output: IO[bytes],
    deadline: float,
    between: Callable[[], None],
) -> tuple[int | None, str]:
    os.set_blocking(output.fileno(), False)
    tail, code = b"", process.poll()
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while code is None and time.monotonic() < deadline:
            between()
            if selector.get_map() and selector.select(_POLL_S):
                data = output.read(1 << 16)
                if data == b"":  # closed, and the script goes on
                    selector.unregister(output)
                tail = (tail + (data or b""))[-TAIL_BYTES:]
            elif not selector.get_map():
                time.sleep(_POLL_S)
            code = process.poll()
    tail = (tail + (output.read(1 << 16) or b""))[-TAIL_BYTES:]
    return code, tail.decode("utf-8", "replace")
