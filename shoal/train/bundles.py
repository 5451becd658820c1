"""What a run leaves for those who serve it: its bundle at the end, and beside its checkpoints a description of the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shoal import bundle
from shoal.errors import JobFailed, RequestError
from shoal.job import Job
from shoal.train.api import TrainOptions
from shoal.train.driver import Emitter
from shoal.train.settings import JobFacts

# Exporting holds the weights in memory twice; above this only a model whose code cannot be imported is exported.
_MOST_EXPORTED_BYTES = 200 << 20


class Bundles:
    """Writes bundles of one run. ``call``: asks whoever has the job built, as ``Supervisor.call`` does."""

    def __init__(self, job: Job, options: TrainOptions, facts: JobFacts, call: Callable[..., Any], emit: Emitter) -> None:
        self._job = job
        self._options = options
        self._facts = facts
        self._call = call
        self._emit = emit
        self._described = False

    def describe(self, checkpoints: Path) -> None:
        """Say once how to build the model and what goes in and out, so that a service can follow a run that has no bundle yet."""
        if self._described:
            return
        self._described = True
        description = {"name": self._job.name, "factory": self._options.factory}
        with contextlib.suppress(JobFailed, RequestError, OSError):
            # What goes wrong here is said where it matters, at the run's end.
            description.update(self._call("describe_aside", timeout_s=60.0))
            bundle.describe(checkpoints, description, self._options.source)

    def write(
        self, directory: Path, state: dict[str, torch.Tensor], step: int, history: Sequence[Mapping[str, Any]]
    ) -> None:  # fmt: skip
        """The bundle of the whole ``state`` after ``step`` steps. JobFailed where it cannot be written."""
        description: dict[str, Any] = {"name": self._job.name, "factory": self._options.factory, "step": step}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            export = os.environ.get("SHOAL_EXPORT", "1") != "0" and (
                self._options.factory is None or self._facts.table.weight_bytes <= _MOST_EXPORTED_BYTES
            )
            program = str((directory / bundle.PROGRAM).resolve()) if export else None
            description.update(self._call("describe_bundle", step, program, timeout_s=300.0))
        except (JobFailed, RequestError) as error:
            self._emit("warning", text=f"The bundle does not say what goes in and out: {error}")
        last = history[-1] if history else {}
        description["metrics"] = {k: v for k, v in last.items() if k not in ("epoch", "partial")}
        try:
            bundle.write(directory, state, description, self._options.source)
        except OSError as error:
            raise JobFailed(
                f"The model could not be written to {directory} ({error.strerror}); make room and go on with --resume."
            ) from None
