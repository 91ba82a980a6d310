"""What people read: MyPT's two-line eval summary, gold lines, tables, the live line."""

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def say(text: str = "") -> None:
    """Print one line of the story of a run, which goes on when nobody reads it any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = _Nowhere()


class _Nowhere(io.TextIOBase):
    """Takes what nobody reads."""

    def write(self, text: str) -> int:
        return len(text)


def notice(text: str) -> None:
    """Print one line about a choice made for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Minutes up to an hour, then hours: '15m', '52.3h'."""
    return f"{int(seconds / 60)}m" if seconds < 3600 else f"{seconds / 3600:.1f}h"


def span(seconds: float) -> str:
    """A duration to the second while seconds matter: '48s', '2m 31s', '3.4h'."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m {int(seconds % 60)}s"
    return duration(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def token_count(n: float) -> str:
    """Millions, from a billion on billions: '34M', '7.37B'."""
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{int(n / 1e6)}M"


def count(n: float) -> str:
    """A short count: '602.28M', '21.17M', '1.5k'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.2f}{unit}" if unit != "k" else f"{n / size:.1f}k"
    return f"{n:.3g}"


def bytes_text(n: float) -> str:
    """Binary units: '12.0 GiB'."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{int(n)} B"


def eval_lines(
    *,
    step: int,
    start_step: int,
    max_iters: int,
    elapsed_s: float,
    tokens: int,
    val_loss: float,
    lr: float,
    phase: str,
    eval_sets: dict[str, float],
    clock: str | None = None,
) -> list[str]:
    """MyPT's two-line summary of an evaluation; percent and ETA count from `start_step`."""
    done, span = step - start_step, max(1, max_iters - start_step)
    eta = duration(elapsed_s / done * (span - done)) if done > 0 else "..."
    clock = clock or time.strftime("%H:%M:%S")
    parts = [f"val {val_loss:.4f}", f"lr {lr:.2e}", f"phase: {phase}"]
    parts += [f"{name} {loss:.4f}" for name, loss in eval_sets.items()]
    return [
        f"step {step}/{max_iters} ({100 * done / span:.1f}%) | {clock} | {duration(elapsed_s)}"
        f" | ETA {eta} | {token_count(tokens)} tokens",
        "  " + " | ".join(parts),
    ]


def gold_saved_line(val_loss: float, step: int) -> str:
    """Seed wording of a new best checkpoint."""
    return f"  🏆 New GOLD checkpoint! val_loss={val_loss:.4f} at step {step}"


def gold_blocked_line(val_loss: float, best: float | None, reason: str) -> str:
    """Seed wording of a new minimum that a guard refused."""
    kind, _, detail = reason.partition(": ")
    shown = f"{kind} ({detail})" if detail else kind
    below = f" < best {best:.4f}" if best is not None and val_loss < best else ""
    return f"  ⚠️  GOLD blocked: val {val_loss:.4f}{below} but {shown}"


# MyPT's own words (specification 4.6): what reads the output of its scripts looks for these


def mypt_gold_line(
    strategy: str, val_loss: float, step: int, gate: dict[str, Any], final: bool
) -> str:
    """A new best checkpoint; with the gate's words where it was asked."""
    begin = "GOLD checkpoint updated from final eval:" if final else "GOLD checkpoint!"
    parts = [f"strategy={strategy}", f"val_loss={val_loss:.4f}", f"step={step}"]
    shown = [name for name in ("gate_metric", "gate_pass") if gate.get(name) is not None]
    return f"  {begin} {' '.join([*parts, *(f'{name}={gate[name]}' for name in shown)])}"


def mypt_baseline_line(baselines: dict[str, float]) -> str:
    """What later losses of the eval sets are compared with."""
    return "  Eval baselines: " + ", ".join(f"{k} {loss:.4f}" for k, loss in baselines.items())


def mypt_complete_lines(
    train: float,
    val: float,
    seconds: float,
    steps: int,
    tokens: int,
    gold: tuple[float, int] | None,
) -> list[str]:
    """The block at the end; `gold` is the loss and the step of the best checkpoint."""
    best = f"val_loss={gold[0]:.4f} at step {gold[1]}" if gold else "none"
    rule = "=" * 60
    return [
        "", rule, "TRAINING COMPLETE", rule,
        f"  Final losses: train {train:.4f}, val {val:.4f}",
        f"  Time: {seconds / 3600:.2f} h",
        f"  Tokens: {token_count(tokens)}",
        f"  Speed: {steps / seconds:.2f} steps/s, {tokens / seconds:,.0f} tokens/s",
        f"  Best gold: {best}",
    ]  # fmt: skip


def finished_lines(
    run_dir: str, fp16_dir: str | None, gold: tuple[str, int, float] | None
) -> list[str]:
    """Return the 'Training finished!' block."""
    lines = ["Training finished!", f"  Resume training from: {run_dir}"]
    if fp16_dir:
        lines.append(f"  Deploy inference from: {fp16_dir}")
    if gold:
        path, step, val_loss = gold
        lines.append(f"  🏆 Best (GOLD) checkpoint: {path} (step {step}, val_loss={val_loss:.4f})")
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Align columns; the first `left` columns to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in pairs).rstrip()

    return [line(header), line(["-" * w for w in widths]), *map(line, rows)]


class Live:
    """Progress between evaluations: one live line on a terminal, else a plain line now and then."""

    def __init__(self, total: int, start: int, every_s: float = 10.0) -> None:
        self.total, self.start, self.every_s = total, start, every_s
        self._bar: Any = None
        self._next = time.perf_counter() + every_s
        self._first: tuple[float, int] | None = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, bar_format="{percentage:3.0f}% |{bar:12}| {desc}",
                leave=False, dynamic_ncols=True, file=sys.__stderr__,
            )  # fmt: skip

    def within(self, step: int, done: int, left: int) -> None:
        """Show that a step of several micro-steps is under way."""
        if self._bar is not None:
            text = f"step {step}/{self.total} | {done} of {done + left} sequences"
            self._bar.set_description_str(text)

    def step(
        self, step: int, loss: float, tokens_per_s: float, peak_bytes: int, mfu: float | None
    ) -> None:
        """Show a finished step; `mfu` where the device's ceiling is known."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, step)
        done = step - self._first[1]
        eta = (now - self._first[0]) / done * (self.total - step) if done else None
        share = "" if mfu is None else f" | {100 * mfu:.0f} % of ceiling"
        text = (
            f"step {step}/{self.total} | loss {loss:.4f} | {count(tokens_per_s)} tok/s{share}"
            f" | {bytes_text(peak_bytes)} | ETA {span(eta) if eta is not None else '...'}"
        )
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now >= self._next:
            self._next = now + self.every_s
            notice(text)

    def clear(self) -> None:
        """Take the live line away, so that a line can be printed."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Take the live line away for good."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (phase, bytes done, bytes in all or 0): a bar, or a line per phase."""
    if not sys.stderr.isatty():
        yield _plain()
        return
    from tqdm import tqdm

    bar: Any = None
    phase_shown = ""

    def advance(phase: str, done: int, total: int) -> None:
        nonlocal bar, phase_shown
        if phase != phase_shown:
            if bar is not None:
                bar.close()
            phase_shown = phase
            bar = tqdm(total=total or None, desc=phase, unit="B", unit_scale=True, file=sys.stderr)
        bar.update(done - bar.n)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


def _plain() -> Callable[[str, int, int], None]:
    shown: set[str] = set()

    def advance(phase: str, done: int, total: int) -> None:
        if phase not in shown:
            shown.add(phase)
            size = f" {total / 1e6:.1f} MB" if total else ""
            notice(f"{phase}{size}")

    return advance


class _Tee:
    """A text stream that also writes to a file."""

    def __init__(self, stream: Any, file: Any) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return int(self._stream.write(text))

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tee(path: Path) -> None:
    """Append everything printed from here on to `path` as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    sys.stdout, sys.stderr = _Tee(sys.stdout, file), _Tee(sys.stderr, file)
