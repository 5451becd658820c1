"""The supervisor's part of a run whose workers share no memory, played by rank 0 in between its own steps."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.comm.group import Group
from shoal.comm.store import Store
from shoal.errors import JobFailed
from shoal.train import checkpoint as checkpoints
from shoal.train.choose import predicted_step
from shoal.train.device import peak_mb
from shoal.train.host import TrainHost
from shoal.train.push_log import RunLog, wants_log
from shoal.train.recorder import Recorder
from shoal.train.row_tables import RunTables
from shoal.train.run import Run
from shoal.train.session import Session
from shoal.train.settings import RunSettings


class Gathered:
    """How rank 0 comes to tensors that lie in parts in the memory of all.

    Attributes:
        collect: writes a checkpoint of a step, together with all other processes.
        described: whether it is known what goes into the model and comes out.
    """

    def __init__(self, group: Group, host: TrainHost, described: bool = False) -> None:
        self._group, self._host = group, host
        self.described = described
        self.collect: Callable[[int], None] | None = None
        self._source: checkpoints.Checkpoint | None = None

    def begin_from(self, found: checkpoints.Checkpoint) -> None:
        """Let the run begin from a checkpoint, and not from the weights that the model was built with."""
        checkpoints.check(found, self._host.facts().table)
        self._source = found

    def read(self, kind: str, name: str) -> torch.Tensor:
        """A whole tensor at the run's beginning, named as in a checkpoint."""
        if self._source is None:
            return self._host.first_weight(name)
        with checkpoints.open_tensors(self._source) as file:
            tensor: torch.Tensor = file.get_tensor(f"{kind}/{name}")
            return tensor

    def write_last(self, step: int | None) -> None:
        """Write a last checkpoint; None: none is needed. The others wait to be told."""
        self._group.broadcast_object(step is not None, 0, "the last checkpoint")
        if step is not None and self.collect is not None:
            self.collect(step)

    def keep_final(self, found: checkpoints.Checkpoint) -> dict[str, torch.Tensor]:
        """The whole state_dict of the run's end, which the bundle is made of."""
        state = checkpoints.read_state(found, self._host.facts().table)
        self._host.final_state = state
        return state


class InProcess:
    """The built job inside this process, where a session expects a template's supervisor."""

    def __init__(self, host: TrainHost, rows: Sequence[dict[str, Any]], description: dict[str, Any] | None = None) -> None:
        """``description``: what goes into the model and comes out, from when all of it was here."""
        self._host = host
        self._description = description
        here = {"role": "supervisor", "rank": 0, **rows[0]}
        self._rows = [here, *({"role": "worker", "rank": rank, **row} for rank, row in enumerate(rows))]

    def call(self, method: str, *arguments: Any, timeout_s: float = 0.0) -> Any:
        if method == "describe_aside" and self._description is not None:
            return self._description
        return getattr(self._host, method)(*arguments)

    def processes(self) -> list[dict[str, Any]]:
        return self._rows


class Lead(Session):
    """The supervisor's part of a run, played by rank 0 in between its steps."""

    def begin(self, settings: RunSettings, store: Store) -> None:
        """Take up the run; fill the store from a checkpoint where there is one to go on from."""
        self._plan = settings.plan
        self._settings = settings
        self._store, self._arena = store, store.arena
        # A job with tables of rows is refused here.
        self._tables = RunTables((), settings.cold_dir)
        self._predicted_s = predicted_step(self._plan, self._job, self._facts)
        run = self._directory.path
        self._log = RunLog(run, self._plan, wants_log(self._options.push_log, self._plan, run))
        first = self._restore(store)
        self._write_beginning(first)
        self._recorder = Recorder(store, self._emit, settings.steps_per_epoch, first)
        self._tell_processes()

    # Where the model is split: how rank 0 comes to the parts of the others.
    parts: Gathered | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self._last_checkpoint is not None

    def _look_behind(self, found: checkpoints.Checkpoint, store: Store) -> bool:
        return self.parts is None and super()._look_behind(found, store)

    def _read_checkpoint(self, found: checkpoints.Checkpoint, store: Store) -> checkpoints.Restored:
        if self.parts is None:
            return super()._read_checkpoint(found, store)
        self._log.refuse(found)
        self.parts.begin_from(found)
        with checkpoints.open_tensors(found) as file:
            for index, spec in enumerate(store.table.buffers):
                for parity in (0, 1):
                    store.buffer(parity, index).copy_(file.get_tensor(f"buffers/{spec.name}"))
        return checkpoints.restore_notes(found)

    def _last_one(self, step: int) -> None:
        if self.parts is None:
            super()._last_one(step)
            return
        self._finish_completing()
        if self._last_checkpoint is not None and self._last_checkpoint.step == step:
            self.parts.write_last(None)
        elif step:
            super()._last_one(step)
        else:
            # Nobody else has the whole model, so even a run without a step needs one.
            with contextlib.suppress(OSError):
                self._write_last(0)
                self._last_checkpoint = checkpoints.complete(self._directory.checkpoints, 0, self._meta())

    def _write_last(self, step: int) -> None:
        if self.parts is None:
            super()._write_last(step)
        else:
            self.parts.write_last(step)

    def _describe_checkpoints(self) -> None:
        # In parts, nobody has the whole model before the run's end: it was described before.
        if self.parts is None or self.parts.described:
            super()._describe_checkpoints()

    def _final_state(self, step: int) -> dict[str, torch.Tensor]:
        if self.parts is None:
            return {name: tensor.cpu() for name, tensor in super()._final_state(step).items()}
        if self._last_checkpoint is None or self._last_checkpoint.step != step:
            raise JobFailed(
                "The last checkpoint could not be written, and the whole model is nowhere else; make room and go on with "
                "--resume."
            )
        return self.parts.keep_final(self._last_checkpoint)

    def take(self, message: Any) -> None:
        self._take(message)

    def attend(self) -> None:
        self._attend()

    def _all_evaluated(self, epoch: int) -> bool:
        # The parts have come through the group, after everybody had evaluated.
        return True

    def wish_to_stop(self) -> None:
        self._interrupts.wanted = True

    def end(self, began: float) -> Run:
        """What is left to do once the loop is over."""
        self._device_memory_mb = peak_mb(self._arena.device)
        self._recorder.drain()
        self._startup_s = (self._recorder.first_step_at or time.monotonic()) - began
        return self._end(began)

    def release(self) -> None:
        """Leave the directory to whoever comes next."""
        self._finish_completing()
        with contextlib.suppress(OSError):
            self._directory.release([])

    def _processes_here(self) -> list[dict[str, Any]]:
        host = socket.gethostname()
        return list({row["pid"]: row for row in self._supervisor.processes() if row["host"] == host}.values())
