"""From what workers leave in the arena to the run's events and its history."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shoal.comm.arena import Signal
from shoal.comm.store import RING_STEPS, Columns, Store

Emit = Callable[..., Any]


class Recorder:
    """Reads step records in order, sums them up by epoch, and keeps the run's clock."""

    def __init__(self, store: Store, emit: Emit, steps_per_epoch: int, first_step: int) -> None:
        self._store = store
        self._emit = emit
        self._steps_per_epoch = steps_per_epoch
        self.step = first_step
        self.names: tuple[str, ...] = ()
        self.step_times_s: list[float] = []
        self.longest_step_s = 0.0
        self.train_s = 0.0
        self.samples = 0.0
        self.lost_events = 0
        self.logged: Callable[[], int] | None = None
        """Updates that are on disk, where a write-ahead log is kept: no other counts as done."""
        self.last_end: float | None = None
        self.first_step_at: float | None = None
        self._epoch_train_s = 0.0
        self._epoch_samples = 0.0

    def go_on_from(self, before: Recorder) -> None:
        """Go on with the sums and the clock of the plan that was; steps' times are those of one plan."""
        self.names, self.longest_step_s, self.first_step_at = before.names, before.longest_step_s, before.first_step_at
        self.train_s, self.samples, self.lost_events = before.train_s, before.samples, before.lost_events
        self._epoch_train_s, self._epoch_samples = before._epoch_train_s, before._epoch_samples

    def committed(self) -> int:
        """Steps that all workers have finished."""
        done = min(slot.signal(Signal.UPDATED) for slot in self._store.arena.slots)
        return done if self.logged is None else min(done, self.logged())

    def drain(self, until: int | None = None) -> None:
        """Turn every finished step that was not reported yet into an event."""
        last = self.committed() if until is None else until
        if last - self.step > RING_STEPS:
            self.lost_events += last - self.step - RING_STEPS
            self.step = last - RING_STEPS
        while self.step < last:
            self._report(self.step)
            self.step += 1

    def _report(self, step: int) -> None:
        rows = self._rows(step)
        sums = self._sums(step, rows)
        ended = max(float(row[Columns.ENDED]) for row in rows.values())
        began = min(float(row[Columns.BEGAN]) for row in rows.values())
        new_epoch = step % self._steps_per_epoch == 0
        step_s = ended - (began if self.last_end is None or new_epoch else self.last_end)
        self.last_end = ended
        if self.first_step_at is None:
            self.first_step_at = ended
        if new_epoch:
            self._epoch_train_s = self._epoch_samples = 0.0
        samples = float(sums[Columns.SAMPLES])
        self.step_times_s.append(step_s)
        # Without waiting: for how long a worker works on a step says how patient to be with one that is silent.
        work_s = max(float(row[Columns.DATA] + row[Columns.COMPUTE] + row[Columns.REDUCE]) for row in rows.values())
        self.longest_step_s = max(self.longest_step_s, work_s)
        self.train_s += step_s
        self.samples += samples
        self._epoch_train_s += step_s
        self._epoch_samples += samples
        self._tell_pushes(step, rows)
        self._emit(
            "step",
            step=step + 1,
            epoch=step // self._steps_per_epoch + 1,
            loss=_ratio(sums[Columns.LOSS], sums[Columns.WEIGHT]),
            loss_mean=_ratio(sums[Columns.LOSS_SUM], sums[Columns.WEIGHT_SUM]),
            metrics=self._values(sums),
            samples=int(samples),
            step_s=step_s,
            workers=[
                {
                    "rank": rank,
                    "compute_s": float(row[Columns.COMPUTE]),
                    "reduce_s": float(row[Columns.REDUCE]),
                    "wait_s": float(row[Columns.WAIT]),
                    "data_s": float(row[Columns.DATA]),
                }
                for rank, row in rows.items()
            ],
        )

    def _rows(self, step: int) -> Mapping[int, np.ndarray]:
        """The records of a step, by the ranks whose shares counted."""
        return {rank: self._store.record(rank, step) for rank in range(self._store.arena.world_size)}

    def _sums(self, step: int, rows: Mapping[int, np.ndarray]) -> np.ndarray:
        """A record for all of them together, with the running sums over the epoch."""
        return np.sum(list(rows.values()), axis=0)

    def _epoch_sums(self) -> np.ndarray:
        """The running sums after the last step that was told."""
        return self._sums(self.step - 1, self._rows(self.step - 1))

    def _tell_pushes(self, step: int, rows: Mapping[int, np.ndarray]) -> None:
        """Where servers have taken the pushes of a step: whose they were, and each worker's clock."""
        grid = self._store.grid
        if not grid.servers:
            return
        epoch, batch = divmod(step, self._steps_per_epoch)
        for replica in range(grid.dp):
            team = grid.team(grid.rank(replica))
            self._emit("clock", rank=team[0], clock=step + 1, slowest=step + 1)
            # A share of no samples is no push.
            if any(rows[rank][Columns.SAMPLES] for rank in team):
                self._emit(
                    "push_ack", rank=team[0], epoch=epoch + 1, batch=batch + 1, shard=replica,
                    versions=[step + 1] * grid.servers, staleness=0,
                )  # fmt: skip

    def _values(self, sums: np.ndarray) -> dict[str, float]:
        count = float(sums[Columns.SAMPLES_SUM])
        columns = sums[Columns.VALUE_SUMS :]
        return {name: _ratio(columns[k], count) for k, name in enumerate(self.names)}

    def epoch_entry(self, epoch: int, partial: bool = False) -> dict[str, Any]:
        """The training half of an epoch's history: running means up to the last finished step."""
        sums = self._epoch_sums()
        entry: dict[str, Any] = {
            "epoch": epoch,
            "loss": _ratio(sums[Columns.LOSS_SUM], sums[Columns.WEIGHT_SUM]),
            **self._values(sums),
        }
        entry["samples_per_s"] = _ratio(self._epoch_samples, self._epoch_train_s)
        if partial:
            entry["partial"] = True
        return entry

    def told(self) -> dict[str, Any]:
        """What a run's summary says besides of how its pushes went."""
        return {}

    @property
    def epoch_train_s(self) -> float:
        return self._epoch_train_s

    @property
    def samples_per_s(self) -> float | None:
        """Samples by wall clock over the training steps of this session."""
        return self.samples / self.train_s if self.train_s else None

    @property
    def step_s(self) -> float | None:
        """The median step."""
        return statistics.median(self.step_times_s) if self.step_times_s else None


def _ratio(a: float, b: float) -> float:
    return float(a) / float(b) if b else 0.0


class Goal:
    """When to stop before the last epoch: ``until`` and ``patience`` of a job."""

    def __init__(self, until: Mapping[str, float] | None, patience: int | None) -> None:
        self._until = until
        self._patience = patience

    def reached(self, history: list[dict[str, Any]]) -> str | None:
        """'until' or 'patience' where the history says that it is enough, else None."""
        last = history[-1]
        if self._until and all(_as_good(name, last.get(name), goal) for name, goal in self._until.items()):
            return "until"
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        if self._patience is not None and len(losses) > self._patience:
            best = min(range(len(losses)), key=lambda k: losses[k])
            if len(losses) - 1 - best >= self._patience:
                return "patience"
        return None


def _as_good(name: str, value: Any, goal: float) -> bool:
    if value is None:
        return False
    return bool(value <= goal) if name.endswith("loss") else bool(value >= goal)
