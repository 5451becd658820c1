"""What a lead keeps of what its servers have: checkpoints, the beginnings of logs, and what is left at the end."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shoal.comm.store import Store
from shoal.ps.client import Client
from shoal.ps.placement import Placement
from shoal.train import checkpoint as checkpoints
from shoal.train.pacing import Pacer, PushRecorder
from shoal.train.remote.chains import Chains
from shoal.train.remote.coordinator import Coordinator
from shoal.train.remote.log import RemoteLog
from shoal.train.remote.recovery import Recovery
from shoal.train.remote.state import StoreState
from shoal.train.schedule import Schedule
from shoal.train.session import Session


class Keeping(Session):
    """A session whose state is elsewhere: with its servers.

    Attributes:
        _collected: the step at which their state was brought into the store last.
        _versions: how many updates each server had made then.
        _first_step: the step that this session began with.
    """

    _recorder: PushRecorder
    _pacer: Pacer
    _log: RemoteLog  # type: ignore[assignment]
    _client: Client | None = None
    _placement: Placement
    _state: StoreState
    _schedule: Schedule
    _recovery: Recovery
    # Where the job's optimizer is L-BFGS.
    _coordinator: Coordinator | None
    _chains: Chains
    _collected: int
    _versions: dict[int, int]
    _first_step: int

    def _look_behind(self, found: checkpoints.Checkpoint, store: Store) -> bool:
        return False

    def _read_checkpoint(self, found: checkpoints.Checkpoint, store: Store) -> checkpoints.Restored:
        self._log.refuse(found)
        return checkpoints.restore(found, store)

    @property
    def _servers_move(self) -> bool:
        """Whether a server may go on elsewhere."""
        return bool(self._plan.replicas) or self._log.kept

    def _write_base(self, directory: Path, more: Mapping[str, Any]) -> checkpoints.Checkpoint:
        """Write what the run begins with, as a checkpoint."""
        step = self._first_step
        self._write_last(step, directory)
        self._tables.write(checkpoints.part_path(directory, step))
        return checkpoints.complete(directory, step, {**self._meta(), **more})

    def _tell_checkpoint(self, found: checkpoints.Checkpoint) -> None:
        super()._tell_checkpoint(found)
        if self._log.kept and self._client is not None:
            self._recovery.checkpointed(self._client, self._versions)

    def _collect(self) -> None:
        """Bring the servers' state into the store; nobody is at work."""
        if self._client is not None and self._collected != self._recorder.step:
            self._collected = self._recorder.step
            for server in self._placement.servers:
                snapshot = self._client.take(server, None, {}, partial(self._state.check, server))
                self._versions[server] = snapshot.kept.version
                self._state.take(snapshot)

    def _note(self, step: int) -> None:
        """Write down what has to be kept of a step beside tensors."""
        place = self._arena.world_size
        self._schedule.reach(step)
        self._schedule.keep(step)
        page = self._store.read_notebook(place, step)
        whole = not self._facts.table.elementwise
        page["optimizer"] = {"state": self._state.numbers, "common": {}, "groups": page["groups"]} if whole else None
        if self._coordinator is not None:
            page["optimizer"] = self._coordinator.memory(step)
        self._store.write_notebook(place, step, page)

    def _write_last(self, step: int, directory: Path | None = None) -> None:
        self._collect()
        self._note(step)
        checkpoints.PartWriter(self._store, directory or self._directory.checkpoints, step).write_all()

    def _final_state(self, step: int) -> dict[str, torch.Tensor]:
        self._collect()
        return super()._final_state(step)

    def _all_evaluated(self, epoch: int) -> bool:
        return True

    def _processes_here(self) -> list[dict[str, Any]]:
        host = socket.gethostname()
        return [row for row in self._supervisor.processes() if row["host"] == host]

    def close(self) -> None:
        """Leave the directory to whoever comes next."""
        self._finish_completing()
        if self._client is not None:
            self._client.close()
        self._chains.close()
        self._publication.close()
        self._log.close()
        with contextlib.suppress(OSError):
            self._directory.release([])

