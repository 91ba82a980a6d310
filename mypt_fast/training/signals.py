"""SIGINT, SIGTERM and SIGHUP become a request to stop; a second SIGINT stops at once."""

import os
import signal
from types import FrameType, TracebackType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class StopRequested(Exception):
    """Raised by the loop at the next safe point after a signal."""


class StopSignal:
    """Context manager; `raise_if_set()` is asked at every safe point of the loop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in EXIT_CODES:
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os.write(2, b"\nstopped at once; the last saved checkpoint is intact\n")
            os._exit(EXIT_CODES[signal.SIGINT])
        self.received = signal.Signals(number)
        # os.write: print may be inside its own lock when a signal arrives
        os.write(2, b"\nstopping: saving first (press Ctrl-C again to stop at once)\n")

    @property
    def exit_code(self) -> int:
        """Exit code for the signal received, 0 for none."""
        return EXIT_CODES[self.received] if self.received else 0

    def raise_if_set(self) -> None:
        """Raise StopRequested if a signal has arrived."""
        if self.received is not None:
            raise StopRequested
