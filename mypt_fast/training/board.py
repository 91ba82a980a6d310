"""TensorBoard, fed from the events of the JSONL log; an optional dependency."""

from __future__ import annotations

import json
from typing import Any

from mypt_fast.errors import ConfigError
from mypt_fast.training.events import EventLog

STEPS = ("loss", "lr", "grad_norm", "tokens_per_sec", "mfu")
NOT_SCALARS = ("iter", "elapsed_s", "tokens_processed", "progress_pct", "lr", "eval_duration_s")
INCIDENTS = ("skipped_step", "loss_spike", "rollback", "oom", "phase_switch", "gold_blocked")


class Board:
    """Writes events as scalars and texts.

    Args:
        folder: of TensorBoard's own files.
        log: whose events are shown.
        start_step: what an earlier run showed from here on is hidden.

    Raises:
        ConfigError: if TensorBoard is not installed.
    """

    def __init__(self, folder: str, log: EventLog, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ConfigError(
                "--tensorboard needs TensorBoard",
                "it is not installed",
                "pip install 'mypt_fast[log]', or drop the flag",
            ) from e
        self._writer: Any = SummaryWriter(folder, purge_step=start_step)
        log.listeners.append(self.show)

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind, step = event["event"], event.get("iter")
        if kind == "train":
            self._scalars("train", {k: event.get(k) for k in STEPS}, step)
        elif kind == "eval":
            self._scalars("eval", {k: v for k, v in event.items() if k not in NOT_SCALARS}, step)
        elif kind.startswith("gold_checkpoint"):
            self._scalars("gold", {"val_loss": event.get("val_loss")}, step)
        elif kind in INCIDENTS:
            self._writer.add_text(kind, json.dumps(event, ensure_ascii=False), step)

    def _scalars(self, group: str, values: dict[str, Any], step: int | None) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
