"""A Run: what training left behind, in memory and in its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import bundle
from shoal.errors import TargetError
from shoal.job import Job
from shoal.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import nn

SUMMARY = "summary.json"


class Run:
    """A finished or stopped run.

    Attributes:
        path: its directory.
        plan: the whole of what was chosen.
        history: a list of epochs, as in the contract.
        samples_per_s: over training steps by wall clock, start-up and evaluation left out; None if no step was made.
    """

    def __init__(self, path: Path, summary: Mapping[str, Any], job: Job | None = None) -> None:
        self.path = path
        self._summary = dict(summary)
        self._job = job
        self.plan = Plan.parse(summary["plan"])
        self.history: list[dict[str, Any]] = list(summary["epochs"])
        self.samples_per_s: float | None = summary["samples_per_s"]

    def summary(self) -> dict[str, Any]:
        """What ``shoal train --json`` prints."""
        return dict(self._summary)

    def weights(self) -> dict[str, torch.Tensor]:
        """The full state_dict under the model's own names, whatever the plan was."""
        return bundle.read_weights(self.path / "model")

    def model(self) -> nn.Module:
        """The module with these weights, in evaluation mode."""
        if self._job is None:
            return bundle.load(self.path / "model")
        from shoal.train.host import build_model

        model = build_model(self._job)
        model.load_state_dict(self.weights())
        return model.eval()

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Evaluate the model on the job's evaluation data, or on other data of the same form.

        Returns name -> value: ``eval_loss`` and ``eval_`` + each metric.
        """
        from shoal.train.evaluate import Slice, combine, evaluate
        from shoal.train.host import build_data

        job = self._job or _find_job(self.path)
        chosen = data if data is not None else job.eval_data
        if chosen is None:
            raise TargetError("The job has no evaluation data; give some, such as run.evaluate(data) or --data PATH.")
        source = build_data(chosen, "data")
        part = Slice(channels_last=self.plan.layout == "channels_last", epoch=len(self.history))
        return combine([evaluate(job, self.model(), source, part)], "eval_")


def open_run(path: str | Path) -> Run:
    """Open a run's directory; TargetError where there is none, or none that has finished or stopped cleanly."""
    directory = Path(path)
    try:
        summary = json.loads((directory / SUMMARY).read_text())
    except (OSError, ValueError):
        if (directory / "events.jsonl").exists():
            raise TargetError(f"The run in {directory} has not ended; go on with --resume, or wait for it.") from None
        raise TargetError(f"{directory} is not a run directory; give the directory that shoal train named.") from None
    return Run(directory, summary)


def _find_job(path: Path) -> Job:
    """The job that a run was made from, where its code can be found."""
    job = bundle.load_job(path / "model")
    if job is None:
        raise TargetError(
            f"The code of the job in {path} cannot be found; in Python, train with shoal.train and call run.evaluate()."
        )
    changes = json.loads((path / "job.json").read_text()).get("changes") or {}
    return job.replace(**changes)
