"""Following a run in training: each new checkpoint becomes the next version of the model that is served."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from shoal import bundle
from shoal.errors import DeadlineError, RequestError, TargetError

_LOOK_EVERY_S = 1.0
_BEGIN_S = 60.0
_NO_RUN = "{} is not the directory of a run; give the one that shoal train named."

Load = Callable[[Path, Callable[["str | None"], None]], None]
"""Begins to load a checkpoint or a bundle, and calls back with None, or with why it did not come in."""


class Follower:
    """Watches the directory of one run. ``look`` is called now and then, and begins a load where there is something newer."""

    def __init__(self, run: Path, load: Load, say: Callable[[str], None], served: Path | None) -> None:
        """``say`` is told, in a sentence, what became of each checkpoint; ``served``: what answers already, None for nothing.

        TargetError where ``run`` is no run's directory.
        """
        if not (run / "events.jsonl").is_file():
            raise TargetError(_NO_RUN.format(run))
        self._run = run.resolve()
        self._load = load
        self._say = say
        self._taken = served
        self._busy = False
        self._looked_s = float("-inf")

    def look(self, now_s: float) -> None:
        """See whether there is a newer checkpoint, or the finished model, and begin to load it; ``now_s``: of a steady clock."""
        if self._busy or now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        found = newest(self._run)
        if found is None or found == self._taken:
            return
        if self._taken is None and found.name != "model" and not describes(self._run):
            return
        self._taken, self._busy = found, True
        try:
            self._load(found, self._ended)
        except RequestError as error:
            self._ended(str(error))

    def _ended(self, trouble: str | None) -> None:
        self._busy = False
        assert self._taken is not None
        name = self._taken.name if self._taken.name != "model" else "the finished model"
        self._say(f"{self._run}: {name} answers now." if trouble is None else f"{self._run}: {name} was not taken. {trouble}")


def checkpoints_of(run: Path) -> Path:
    """Where a run says how to build its model while it goes on: a bundle without weights."""
    return run / "checkpoints"


def describes(run: Path) -> bool:
    """Whether a run has said yet how to build its model."""
    return (checkpoints_of(run) / bundle.DESCRIPTION).is_file()


def job_of(run: Path) -> str:
    """The name of the job that a run trains, waited for where the run is only preparing its first step.

    TargetError where ``run`` is no run's directory, DeadlineError where it does not begin.
    """
    if not (run / "events.jsonl").is_file():
        raise TargetError(_NO_RUN.format(run))
    until = time.monotonic() + _BEGIN_S
    while True:
        try:
            return str(json.loads((run / "job.json").read_text())["name"])
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > until:
                raise DeadlineError(f"The run {run} did not begin within {_BEGIN_S:g} s; is it still there?") from None
            time.sleep(0.1)


def newest(run: Path) -> Path | None:
    """The finished model of a run, else its latest whole checkpoint, else None."""
    if (run / "model" / bundle.DESCRIPTION).is_file():
        return run / "model"
    steps: list[tuple[int, Path]] = []
    for path in (run / "checkpoints").glob("step-*"):
        try:
            steps.append((int(json.loads((path / "meta.json").read_text())["step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(steps)[1] if steps else None
