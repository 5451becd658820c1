"""Learning-rate schedules, and remembering them for a replacement.

Every process that updates weights, worker or server, steps a scheduler of its own; all of them come to the same values.
What a scheduler and the optimizer's groups hold is kept in the arena's notebook at each step, so that a replacement goes on
from there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shoal.comm.arena import Order
from shoal.comm.store import Store
from shoal.job import Job
from shoal.train import notes
from shoal.train.describe import hyperparameters
from shoal.train.update import Updater


class NoSchedule:
    """For a worker that updates nothing: the servers have the schedulers."""

    def recall(self, step: int) -> None:
        """Nothing was kept."""

    def after_step(self, step: int) -> None:
        """Nothing changes."""

    def after_epoch(self, eval_loss: float) -> None:
        """Nothing changes."""


class Schedule:
    """The scheduler of one worker, or server, over the job's own optimizer, whose groups the updater is told."""

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer, store: Store, place: int, updater: Updater) -> None:
        self._optimizer = optimizer
        self._store = store
        self._place = place
        self._updater = updater
        self._every = job.scheduler_every
        self._scheduler: Any = job.scheduler(optimizer) if job.scheduler is not None else None
        # The optimizer that the scheduler sees never steps itself; its slices do.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self._wants_loss = (
            self._scheduler is not None and "metrics" in inspect.signature(self._scheduler.step).parameters
        )
        self._first = 0
        # How many steps and epochs the scheduler has seen.
        self._steps = 0
        self.epochs = 0
        self._keeps = self._scheduler is not None or updater.memory() is not None

    def recall(self, step: int) -> None:
        """Take up what was kept at the beginning of ``step``, or keep the beginning."""
        page = self._store.read_notebook(self._place, step) if step else None
        self._steps = step
        self.epochs = self._store.arena.supervisor.signal(Order.EPOCH_DONE)
        if page is not None:
            self._steps, self.epochs = page.get("steps", step), page.get("epochs", self.epochs)
            if self._scheduler is not None and page["scheduler"] is not None:
                self._scheduler.load_state_dict(page["scheduler"])
            for group, kept in zip(self._optimizer.param_groups, page["groups"], strict=True):
                group.update(kept)
            if page["optimizer"] is not None:
                self._updater.remember(page["optimizer"])
        elif self._keeps:
            self._keep(step, check=True)
        self._first = step
        if self._scheduler is not None:
            self._updater.take_groups(self._optimizer.param_groups)

    def after_step(self, step: int) -> None:
        """The update of ``step`` is done: step the scheduler and keep what the next step begins with."""
        self.reach(step + 1)
        self.keep(step + 1)

    def reach(self, step: int) -> None:
        """Step the scheduler until it has seen so many steps."""
        while self._steps < step:
            self._steps += 1
            if self._scheduler is not None and self._every == "step":
                self._advance(None)

    def keep(self, updates: int) -> None:
        """Keep what holds after so many updates."""
        if self._keeps:
            # An optimizer may keep something from its first step on.
            self._keep(updates, check=updates == self._first + 1)

    def page(self, updates: int) -> Any:
        """What was kept of it; None where nothing has to be."""
        return self._store.read_notebook(self._place, updates) if self._keeps else None

    def after_epoch(self, eval_loss: float) -> None:
        """An epoch is over; a scheduler such as ReduceLROnPlateau gets the evaluation loss."""
        self.epochs += 1
        if self._scheduler is not None and self._every == "epoch":
            self._advance(eval_loss)

    @contextlib.contextmanager
    def scaled(self, factor: float) -> Iterator[Callable[[], None]]:
        """Let the updater use the learning rates times ``factor`` meanwhile.

        Gives what does so once more, for when an update has put the optimizer back to what it was.
        """
        groups = self._optimizer.param_groups
        kept = [group["lr"] for group in groups]

        def scale() -> None:
            for group, lr in zip(groups, kept, strict=True):
                group["lr"] = lr * factor

        try:
            scale()
            self._updater.take_groups(groups)
            yield scale
        finally:
            for group, lr in zip(groups, kept, strict=True):
                group["lr"] = lr

    def _advance(self, eval_loss: float | None) -> None:
        if self._wants_loss:
            self._scheduler.step(eval_loss)
        else:
            self._scheduler.step()
        self._updater.take_groups(self._optimizer.param_groups)

    def _keep(self, step: int, check: bool) -> None:
        page = {
            "scheduler": self._scheduler.state_dict() if self._scheduler is not None else None,
            "groups": [hyperparameters(g) for g in self._optimizer.param_groups],
            "steps": self._steps,
            "epochs": self.epochs,
            "optimizer": self._updater.memory(),
        }
        if check:
            # Better now than when somebody wants to go on with the run.
            notes.to_bytes(page)
        self._store.write_notebook(self._place, step, page)
