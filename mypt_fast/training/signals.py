"""Signals become requests: to save and stop, to save and go on, or to stop at once.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 save and exit with 128 + the signal's number; a SIGINT after
any of them exits at once; SIGUSR2 saves and training goes on.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}
SAVE = signal.SIGUSR2


class StopRequested(KeyboardInterrupt):
    """Raised at the next safe point after a signal; no `except Exception` on the way keeps it."""


class StopSignal:
    """Context manager; `raise_if_set()` is asked at every safe point of the loop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._save = False
        self._at_once = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        self._start_watching()
        for number in (*EXIT_CODES, SAVE):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._told)
        self._watcher.join()

    def _start_watching(self) -> None:
        """Hear of signals in a thread too: Python's handlers wait while the main one is in C."""
        heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._previous_fd = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=_watch, args=(heard,), daemon=True)
        self._watcher.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self._save = True
        elif self.received is None:
            self.received = signal.Signals(number)
            if self._at_once:
                raise StopRequested

    @property
    def exit_code(self) -> int:
        """Exit code for the signal received, 0 for none."""
        return EXIT_CODES[self.received] if self.received else 0

    def raise_if_set(self) -> None:
        """Raise StopRequested if a signal has arrived."""
        if self.received is not None:
            raise StopRequested

    def save_requested(self) -> bool:
        """Whether SIGUSR2 has arrived since this was asked last."""
        asked, self._save = self._save, False
        return asked

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, a signal raises StopRequested wherever the program is, waiting included.

        For work that is thrown away whole: reading, compiling, forward and backward passes.
        """
        self._at_once = True
        try:
            self.raise_if_set()
            yield
        finally:
            self._at_once = False


def _watch(heard: int) -> None:
    """Answer signals until the other end closes; a SIGINT after another one ends the process."""
    is_stopping = False
    while data := os.read(heard, 64):
        for number in data:
            if is_stopping and number == signal.SIGINT:
                os.write(2, b"\nstopped at once; the last saved checkpoint is intact\n")
                os._exit(EXIT_CODES[signal.SIGINT])
            if not is_stopping and number in EXIT_CODES:
                # os.write: print may be inside its own lock when a signal arrives
                os.write(2, b"\nstopping: saving first (press Ctrl-C again to stop at once)\n")
                is_stopping = True
    os.close(heard)
