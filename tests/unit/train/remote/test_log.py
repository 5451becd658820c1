"""Which units count, and from when on, in the log that the lead of a run without shared memory keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shoal.plan import Plan
from shoal.ps.log import read
from shoal.train.checkpoint import Checkpoint
from shoal.train.remote.dealing import Orphan
from shoal.train.remote.log import RemoteLog
from shoal.train.replay import FOLDER, UNITS, SessionLog
from shoal.train.update_log import Commit


def nothing(kind: str, **fields: Any) -> None: ...


@pytest.fixture
def log(tmp_path: Path) -> RemoteLog:
    plan = Plan.parse("ps=2,workers=3,async,push_every=3")
    facts = SimpleNamespace(table=SimpleNamespace(state_keys=()))
    store, host = SimpleNamespace(table=SimpleNamespace(buffers=())), SimpleNamespace(facts=lambda: facts)
    (tmp_path / FOLDER / "0001").mkdir(parents=True)
    SessionLog(tmp_path / FOLDER / "0001", 2, 3, 1, 0, remote=True).begin()
    found = RemoteLog(tmp_path, plan, True, store, host)  # type: ignore[arg-type]
    found.begin(0, Checkpoint(tmp_path / "checkpoints" / "step-00000000", 0, {}), lambda directory, meta: pytest.fail())
    return found


class Settled:
    """Settles units in turn; what of it counts together is in the log."""

    def __init__(self, log: RemoteLog) -> None:
        self._log = log
        self._recorder: Any = SimpleNamespace(ledger=SimpleNamespace(row=lambda unit: np.array([float(unit)])))

    def __call__(self, *units: int) -> None:
        self._log.settled(units, self._recorder, nothing)

    def counted(self) -> list[list[int]]:
        self._log.close()
        return [[int(row[0]) for row in Commit.from_bytes(r.notes).rows] for r in read(self._log.directory, UNITS)]


def test_units_of_a_push_count_together_whoever_dies_that_does_one_of_them_again(log: RemoteLog) -> None:
    settled = Settled(log)
    log.together([Orphan(4, 0), Orphan(5, 0), Orphan(6, 0)])
    log.together([])
    # Whoever was given the first of them has died before it had reported it; another one, after one was settled.
    log.together([Orphan(4, 0)])
    settled(5)
    log.together([Orphan(6, 0)])
    settled(7, 8)
    settled(6)
    assert not log.has(5, nothing)
    settled(4)
    assert settled.counted() == [[7, 8], [4, 5, 6]]
    assert all(log.has(unit, nothing) for unit in (4, 5, 6, 7, 8))


def test_groups_that_one_worker_held_units_of_become_one(log: RemoteLog) -> None:
    settled = Settled(log)
    log.together([Orphan(1, 0), Orphan(2, 0)])
    log.together([Orphan(3, 1), Orphan(4, 1)])
    settled(1)
    log.together([Orphan(2, 0), Orphan(3, 1), Orphan(9, 2)])
    settled(2, 9, 3)
    settled(4)
    assert settled.counted() == [[1, 2, 3, 4, 9]]


def test_the_log_of_the_session_before_is_there_until_servers_write_to_the_new_one(log: RemoteLog) -> None:
    assert sorted(path.name for path in log.directory.parent.iterdir()) == ["0001", "0002"]
    log.begun()
    assert [*log.directory.parent.iterdir()] == [log.directory]
    log.close()
