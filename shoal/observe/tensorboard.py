"""A run in TensorBoard: an observer that writes its event files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from shoal.errors import RequestError
from shoal.observe.lines import epoch_values


class TensorBoardObserver:
    """Writes each step's loss, running metrics and samples/s, and each epoch's values, for TensorBoard.

    Tags: ``step/loss``, ``step/samples_per_s``, ``step/<metric>`` over steps; ``epoch/<name>`` over epochs, under the
    names of ``run.history``.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        """Create the event file in ``log_dir``; RequestError where tensorboardX is not installed."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise RequestError("--tensorboard needs tensorboardX; install it with: pip install tensorboardX") from None
        self._writer: Any = SummaryWriter(os.fspath(log_dir))

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write what one event holds; kinds without numbers are passed over."""
        if self._writer is None:
            return
        if event["kind"] == "step":
            self._scalars("step", {"loss": event.get("loss"), **(event.get("metrics") or {})}, event)
            if event.get("step_s"):
                self._scalars("step", {"samples_per_s": event["samples"] / event["step_s"]}, event)
        elif event["kind"] == "epoch":
            values = {**epoch_values(event), "samples_per_s": event.get("samples_per_s")}
            self._scalars("epoch", values, {**event, "step": event["epoch"]})
            self._writer.flush()
        elif event["kind"] == "run_end":
            self.close()

    def close(self) -> None:
        """Write out what is left; a second call does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, group: str, values: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", float(value), event["step"], walltime=event.get("t"))
