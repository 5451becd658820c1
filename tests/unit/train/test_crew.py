"""Patience: how long a silent worker may take; and the workers of an arena, seen from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.comm.arena import Arena, Note, Signal
from shoal.comm.grid import Grid
from shoal.comm.store import arena_layout
from shoal.errors import RequestError
from shoal.plan import Plan
from shoal.process.supervisor import Supervisor
from shoal.train.crew import Crew, Patience
from shoal.train.settings import RunSettings

STEPS = 200


def test_patience_grows_with_the_longest_step() -> None:
    patience = Patience(report_s=5, replace_s=60, first_report_s=30, first_replace_s=600)
    assert patience.limits(0.1, first=False) == (5, 60)
    assert patience.limits(10.0, first=False) == (50, 200)
    assert patience.limits(10.0, first=True) == (30, 600)


def test_patience_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_STALL_S", raising=False)
    assert Patience.from_environment() == Patience()
    monkeypatch.setenv("SHOAL_STALL_S", "8")
    assert Patience.from_environment().limits(0.0, first=True) == (4, 8)
    for wrong in ("0", "-1", "soon"):
        monkeypatch.setenv("SHOAL_STALL_S", wrong)
        with pytest.raises(RequestError, match="SHOAL_STALL_S"):
            Patience.from_environment()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(20, 3), torch.zeros(20, 1)


JOB = shoal.Job(
    model=lambda: nn.Linear(3, 1), train_data=data, loss=nn.functional.mse_loss, batch_size=2, epochs=100,
    optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
)  # fmt: skip


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    started = Supervisor()
    started.start()
    yield started
    started.close()


def until(crew: Crew, condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        crew.poll(0.01, 0.0, lambda: "there is no checkpoint.")


def test_what_is_stopped_or_killed_is_replaced(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_STALL_S", "3")
    supervisor.load("shoal.train.host:TrainHost", JOB, 60.0)
    table = supervisor.call("facts").table
    plan = Plan.parse("dp=2,threads=1,accumulate=1")
    settings = RunSettings(plan=plan, layout=arena_layout(table, Grid(dp=2)), total_steps=STEPS, steps_per_epoch=1000)
    arena = Arena.create(settings.layout)
    seen: list[dict[str, Any]] = []
    supervisor.call("bind", settings, True, fds=(arena.memory.fd,))
    crew = Crew(supervisor, arena, settings, lambda kind, **e: seen.append({"kind": kind, **e}), (arena.memory.fd,))
    crew.start()
    worker, other = (next(c for c in supervisor.children.values() if c.rank == rank) for rank in (0, 1))
    standby = next(c for c in supervisor.children.values() if c.role == "standby")

    # The standby is stopped, so that it never begins what it is given: it is found out as well.
    os.kill(standby.pid, signal.SIGSTOP)
    os.kill(worker.pid, signal.SIGKILL)
    until(crew, lambda: any(e["kind"] == "recovered" and e["rank"] == 0 for e in seen))
    assert standby.pid not in supervisor.children
    deaths = [(e["pid"], e["cause"]) for e in seen if e["kind"] == "death"]
    assert deaths[:2] == [(worker.pid, "SIGKILL"), (standby.pid, "stalled")]
    stall = next(e for e in seen if e["kind"] == "stall" and e["pid"] == standby.pid)
    assert stall["phase"] == "starting" and "stopped" in stall["stack"]
    assert seen.index(stall) < next(k for k, e in enumerate(seen) if e["kind"] == "death" and e["pid"] == standby.pid)
    assert supervisor.children[other.pid] is other, "who was well stays"

    # Without the template all die, and go on under a new one where they were.
    template, step = supervisor.template_pid, arena.slots[0].signal(Signal.UPDATED)
    os.kill(template, signal.SIGKILL)
    until(crew, lambda: supervisor.template_pid != template)
    assert arena.slots[0].signal(Signal.UPDATED) >= step
    until(crew, lambda: crew.finished)
    assert [slot.signal(Signal.UPDATED) for slot in arena.slots] == [STEPS, STEPS]
    assert all(slot.note(Note.INCARNATION) >= 2 for slot in arena.slots)
    arena.memory.close()
