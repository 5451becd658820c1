"""The supervisor's part of the write-ahead log: where it lies, and what of it is still needed.

``push-log/`` in a run directory has a folder for each session of the run that kept one, ``0001`` and so on: ``session.json`` (who
wrote it, from which step on), the logs of its servers, and ``epochs``, in which the supervisor keeps what an epoch's
evaluation found. How a run goes on from it: ``shoal.train.replay``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.comm.arena import Arena, Note
from shoal.comm.table import ParameterTable
from shoal.errors import JobFailed, PlanError, RequestError
from shoal.plan import Plan
from shoal.ps import log as logs
from shoal.ps.log import LogWriter
from shoal.train.checkpoint import Checkpoint, Restored
from shoal.train.pacing import PushRecorder
from shoal.train.recorder import Emit, Recorder
from shoal.train.replay import EPOCHS, FOLDER, LoggedTensors, Replay, SessionLog, sessions
from shoal.train.row_tables import RunTables
from shoal.train.settings import RunSettings
from shoal.train.update_log import LogTrouble, log_limit, log_name

_SYNC_S = 120.0
# A log that has grown beyond this, and beyond so many times the checkpoint's size, asks for a checkpoint.
_LONG_BYTES, _LONG_TIMES = 256 << 20, 4
_LOOK_S = 1.0


def wants_log(asked: bool | None, plan: Plan, run: Path) -> bool:
    """Whether a run keeps a log: as it is told, else as it has done so far. PlanError where it cannot."""
    if asked and plan.ps is None:
        raise PlanError(
            "push_log keeps the pushes of parameter servers; give a plan such as ps=1,workers=4,async, or leave push_log out."
        )
    if asked and plan.replicas:
        raise PlanError(f"push_log and replicas={plan.replicas} both keep pushes; leave one of them out.")
    if asked is None:
        return plan.ps is not None and not plan.replicas and (run / FOLDER).exists()
    return asked


class KeptLog:
    """What a run's log is to its session: where processes share memory, a ``RunLog``; where not, a ``RemoteLog``.

    Args:
        run: the run directory.
        plan: of this session.
        kept: whether this session keeps a log; else it only goes on from the one that there is.
    """

    remote = False
    """Of which kind: see ``SessionLog``."""

    def __init__(self, run: Path, plan: Plan, kept: bool) -> None:
        self._run, self._plan, self.kept = run, plan, kept
        found = sessions(run)
        self._old = [session for session in found if session.remote == self.remote]
        # Those of the other kind.
        self._others = [session for session in found if session.remote != self.remote]
        number = 1 + max((int(path.name) for path in (run / FOLDER).glob("[0-9]*")), default=0)
        self.directory = (run / FOLDER / f"{number:04d}").resolve()
        self._epochs: LogWriter | None = None
        self._first = 0
        self._looked, self._long = 0.0, False
        if kept:
            log_limit()

    def forget(self) -> None:
        """There is no checkpoint that the old sessions' logs could be behind."""
        shutil.rmtree(self._run / FOLDER, ignore_errors=True)
        self._old, self._others = [], []

    def holds(self, recorder: Recorder, step: int) -> bool:
        """Whether all steps before this one are on disk, where a log is kept."""
        return not self.kept or recorder.committed() >= step

    def keep_epoch(self, entry: dict[str, Any], eval_loss: float, beside: Mapping[str, Any]) -> None:
        """What an epoch has come to, on disk before anybody goes on. JobFailed where it does not get there.

        ``beside``: what its event says beside the entry.
        """
        if self._epochs is None:
            return
        number = int(entry["epoch"])
        try:
            self._epochs.begin(number, 0)
            self._epochs.commit(json.dumps({"entry": entry, "eval_loss": eval_loss, "beside": beside}).encode())
            self._epochs.wait(number, _SYNC_S)
        except OSError as error:
            raise self._full(error) from None

    def checkpointed(self, found: Checkpoint) -> None:
        """A checkpoint is on disk: what no checkpoint needs is deleted."""
        oldest = min((int(path.name.removeprefix("step-")) for path in found.path.parent.glob("step-*")), default=0)
        self._let_go(found, oldest)
        if oldest > self._first:
            discard(self._others)
        self._looked = 0.0

    def _let_go(self, found: Checkpoint, oldest: int) -> None:
        """Delete of this kind of log what the checkpoints from step ``oldest`` on do not need; ``found`` is the newest."""
        raise NotImplementedError

    def is_long(self, checkpoint_bytes: int) -> bool:
        """Whether the log has grown so long that a checkpoint should be made."""
        now = time.monotonic()
        if self.kept and now - self._looked > _LOOK_S:
            self._looked = now
            self._long = logs.total_bytes(self.directory) > max(_LONG_BYTES, _LONG_TIMES * checkpoint_bytes)
        return self._long

    def fail(self, trouble: LogTrouble, emit: Emit) -> None:
        """A log could not be written: JobFailed."""
        emit("push_log_failed", server=trouble.server, reason=trouble.reason)
        raise full(self._run, trouble.reason)

    def close(self) -> None:
        if self._epochs is not None:
            self._epochs.close()

    def _refuse(self, others: Sequence[SessionLog], found: Checkpoint) -> None:
        """RequestError where these sessions have pushes behind a checkpoint: whoever asks cannot read them."""
        for session in others:
            if session.holds_beyond(found.step):
                how = "share one machine's memory"
                if session.remote:
                    how = "share no memory (torchrun, Slurm, SHOAL_TRANSPORT=group)"
                raise RequestError(
                    f"{self._run} has a log of pushes behind its checkpoint, kept by processes that {how}; go on with it in the "
                    "same way until the next checkpoint."
                )

    def _full(self, error: OSError) -> JobFailed:
        return full(self._run, error.strerror or str(error))


class RunLog(KeptLog):
    """The log of a run whose processes share one machine's memory."""

    def __init__(self, run: Path, plan: Plan, kept: bool) -> None:
        super().__init__(run, plan, kept)
        self._replay: Replay | None = None
        self._arena: Arena | None = None

    # -- going on ------------------------------------------------------------------------------------------------

    def look_behind(self, found: Checkpoint, table: ParameterTable) -> bool:
        """Look at what the log has behind a checkpoint; whether that is all of its tensors. RequestError: it is another log."""
        self._refuse(self._others, found)
        self._replay = Replay(self._run, self._old, found)
        return self.tensors is not None and self.tensors.covers(table)

    @property
    def tensors(self) -> LoggedTensors | None:
        """The tensors of the checkpoint that was looked at as the log has them after it; None where it has nothing."""
        return None if self._replay is None else self._replay.tensors

    def refuse(self, found: Checkpoint) -> None:
        """RequestError where there is a log behind a checkpoint: whoever asks cannot read it."""
        self._refuse([*self._old, *self._others], found)

    def roll_forward(
        self, found: Checkpoint, restored: Restored, tables: RunTables, settings: RunSettings
    ) -> tuple[Checkpoint, Restored]:
        """The checkpoint and what it holds beside tensors, as if it had been written after the last push in the log."""
        if self._replay is None:
            return found, restored
        self._replay.fill(tables)
        return self._replay.roll_forward(restored, self._plan, settings)

    # -- keeping one ---------------------------------------------------------------------------------------------

    def begin(self, recorder: Recorder, arena: Arena, first: int, emit: Emit) -> None:
        """Before anybody works: ``first`` is the step that this session begins with."""
        self._first = first
        if self._replay is not None:
            if isinstance(recorder, PushRecorder):
                self._replay.lay_ahead(recorder)
            self._replay.tell(emit)
        if not self.kept:
            return
        self._arena = arena
        arena.supervisor.write(Note.CHECKPOINTED, first)
        for slot in arena.servers:
            slot.write(Note.LOGGED, first)
        recorder.logged = self.logged
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            grid = arena.layout.grid
            SessionLog(self.directory, grid.servers, grid.world_size, grid.team_size, first).begin()
            self._epochs = LogWriter(self.directory, EPOCHS)
        except OSError as error:
            raise self._full(error) from None

    def logged(self) -> int:
        """Updates that are on disk at every server."""
        assert self._arena is not None
        return int(min(slot.note(Note.LOGGED) for slot in self._arena.servers))

    def _let_go(self, found: Checkpoint, oldest: int) -> None:
        if self._arena is not None:
            self._arena.supervisor.write(Note.CHECKPOINTED, found.step)
            for server in range(len(self._arena.servers)):
                logs.prune(self.directory, log_name(server), oldest)
        firsts = [*(session.first for session in self._old[1:]), self._first]
        for session, following in zip(list(self._old), firsts, strict=False):
            if oldest > following:
                shutil.rmtree(session.path, ignore_errors=True)
                self._old.remove(session)


def full(run: Path, reason: str) -> JobFailed:
    """The sentence with which a run ends whose log takes no more."""
    return JobFailed(
        f"The log of pushes in {run / FOLDER} could not be written ({reason}), so no further push was taken, and none that was "
        "acknowledged is lost; make room and go on with --resume."
    )


def discard(others: list[SessionLog]) -> None:
    """Delete sessions that no checkpoint needs any more."""
    for session in others:
        shutil.rmtree(session.path, ignore_errors=True)
    others.clear()
