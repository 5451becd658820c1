"""Servers with copies: whoever is killed, the run goes on, and every push that was acknowledged is in the weights once.

This file is also the script that torchrun starts: see ``script``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replans import Strikes
from torch import nn
from torchrun import torchrun

import shoal
from shoal.data.order import epoch_order
from shoal.errors import PlanError
from shoal.observe.events import read_events
from shoal.ps.initialisers import Zeros

HERE = Path(__file__).resolve()

# One that another process of the job keeps, and the one that answers in its place; then one of the lead's own, and the worker.
KEPT = [("server", 1), ("server", 3), ("server", 0), ("worker", 0)]
# Of these two at once.
LOGGED = [("server", 2), ("server", 1), ("server", 3), ("worker", 0)]


class Sums(nn.Module):
    """Linear in everything that it learns, so that what is learned is the sum over pushes, in whatever order they come."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = shoal.ps.Embedding(4, optimizer=shoal.ps.SGD(lr=0.1), init=Zeros(), mode="sum")
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(6)])

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        found = self.rows(keys).sum(-1)
        for number, weight in enumerate(self.weights):
            found = found + torch.sin(keys[:, :1] * torch.arange(1, 17) + number).to(weight.dtype) @ weight
        return found


def data() -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randint(0, 60, (200, 5), generator=torch.Generator().manual_seed(3))
    return keys, torch.cos(keys[:, 1].double())


def job(**changes: Any) -> shoal.Job:
    return shoal.Job(**{
        "name": "sums", "model": lambda: Sums().double(), "train_data": data, "batch_size": 20, "epochs": 1000,
        "loss": lambda output, target: (output * target).mean(), "optimizer": lambda p: torch.optim.SGD(p, lr=1e-2), **changes,
    })  # fmt: skip


def learned(acknowledged: Sequence[tuple[int, int, int]], workers: int = 2, together: bool = False) -> dict[str, torch.Tensor]:
    """What the model has after these pushes, each the mean over its samples: (epoch, batch, shard) from 1, 1 and 0.

    ``together``: those of all workers make one step, the mean over its batch.
    """
    size = 20 // workers
    keys, target = data()
    orders = {epoch: epoch_order(len(keys), 0, epoch - 1) for epoch, _, _ in acknowledged}
    samples = np.concatenate([orders[e][20 * (b - 1) + size * s :][:size] for e, b, s in acknowledged])
    keys, target = keys[samples], target[samples] / (20 if together else size)
    rows = torch.zeros(60, 4, dtype=torch.float64)
    rows.index_add_(0, keys.reshape(-1), -0.1 * target.repeat_interleave(5)[:, None].expand(-1, 4))
    found = {"rows.keys": torch.arange(60), "rows.rows": rows}
    for number in range(6):
        features = torch.sin(keys[:, :1] * torch.arange(1, 17) + number).double()
        found[f"weights.{number}"] = 1 - 1e-2 * target @ features
    return found


class Killer:
    """Hears a run's events: kills one after the other, each when the one before is back, and then lets the run end.

    ``at_once``: so many are killed together. ``last``: whom it kills when the run has ended. ``acknowledged``: what was heard to
    be acknowledged, as (epoch, batch, shard).
    """

    def __init__(
        self, run: Path, order: Sequence[tuple[str, int]], at_once: int = 1, last: tuple[str, int] | None = None
    ) -> None:
        self._run, self._order, self._at_once, self._last = run, list(order), at_once, last
        self._killed = self._recovered = 0
        self.acknowledged: list[tuple[int, int, int]] = []

    def hear(self, event: dict[str, Any]) -> None:
        """Note what was acknowledged."""
        if event["kind"] == "push_ack":
            self.acknowledged.append((event["epoch"], event["batch"], event["shard"]))

    def __call__(self, event: dict[str, Any]) -> str | None:
        self.hear(event)
        self._recovered += event["kind"] == "recovered"
        back = event["kind"] == "recovered" and self._recovered == self._killed
        due = back if self._killed else event["kind"] == "step" and event["step"] == 6
        if due and self._killed == len(self._order):
            return "stop"
        if due:
            for who in self._order[self._killed : self._killed + self._at_once]:
                self._kill(*who)
                self._killed += 1
        if event["kind"] == "run_end" and self._last is not None:
            self._kill(*self._last)
        return None

    def _kill(self, role: str, rank: int) -> None:
        rows = json.loads((self._run / "processes.json").read_text())
        os.kill(next(row["pid"] for row in rows if (row["role"], row["rank"]) == (role, rank)), signal.SIGKILL)

    def check_deaths(self) -> None:
        """All were killed, nobody else has died, and all are back."""
        events = list(read_events(self._run / "events.jsonl", {"death", "recovered"}))
        assert {e["cause"] for e in events if e["kind"] == "death"} == {"SIGKILL"}
        for kind in ("death", "recovered"):
            found = [(e["role"], e["rank"]) for e in events if e["kind"] == kind]
            assert found == self._order if self._at_once == 1 else sorted(found) == sorted(self._order)


class Changer:
    """Wants one plan after the other, each some steps after the one before, once a killer has done what it had to."""

    def __init__(self, plans: Sequence[str], killer: Killer | None = None) -> None:
        self._plans, self._killer, self._at = [*plans], killer, 3

    def __call__(self, event: dict[str, Any]) -> str | shoal.Plan | None:
        if self._killer is not None:
            if self._killer(event) == "stop":
                self._killer, self._at = None, event["step"] + 2
            return None
        if event["kind"] != "step" or event["step"] < self._at:
            return None
        self._at = event["step"] + 4
        return shoal.Plan.parse(self._plans.pop(0)) if self._plans else "stop"


def learned_in_turn(
    acknowledged: Sequence[tuple[int, int, int]], edges: Sequence[int], workers: Sequence[int]
) -> dict[str, torch.Tensor]:
    """What the model has after these pushes of so many workers, of others from each of the steps ``edges`` on."""
    found: dict[str, torch.Tensor] = {}
    for first, last, count in zip([0, *edges], [*edges, 10**9], workers, strict=True):
        part = learned([push for push in acknowledged if first <= (push[0] - 1) * 10 + push[1] - 1 < last], count)
        # All begins with ones, but for rows.
        found = {name: found[name] + value - float(name[0] == "w") for name, value in part.items()} if found else part
    return {**found, "rows.keys": torch.arange(60)}


def test_servers_are_killed_one_after_the_other_and_every_push_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    run, first = tmp_path / "run", random.Random(7).choice([0, 1])
    # Who answers in the first one's place has the only other copy when it comes back; then a tail of the other shard.
    killer = Killer(run, [("server", rank) for rank in (first, first + 2, 3 - first)])
    found = shoal.train(job(), plan="ps=2,workers=2,async,replicas=1,threads=1", run_dir=run, on_event=killer)
    killer.check_deaths()
    back = read_events(run / "events.jsonl", {"recovered"})
    assert {event["action"] for event in back} == {"copied"}
    assert len(set(killer.acknowledged)) == len(killer.acknowledged)
    check_sum(found, learned(killer.acknowledged))


def sync_job() -> shoal.Job:
    return job(optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), grad_clip=0.5)


def pushes(run: shoal.Run) -> list[tuple[int, int, int]]:
    """What was acknowledged, as (epoch, batch, shard)."""
    return [(e["epoch"], e["batch"], e["shard"]) for e in read_events(run.path / "events.jsonl", {"push_ack"})]


def check_sum(run: shoal.Run, expected: dict[str, torch.Tensor]) -> None:
    """Every push is in a run's weights and rows once."""
    weights = run.weights()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)


def check_bits(killed: shoal.Run, workers: int, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has the bits of one in which nobody was killed, and each of its pushes was acknowledged once, in order."""
    steps = killed.summary()["steps"]
    assert pushes(killed) == [(step // 10 + 1, step % 10 + 1, shard) for step in range(steps) for shard in range(workers)]
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    found = shoal.train(sync_job(), plan=f"ps=2,workers={workers},sync,threads=1", run_dir=whole, steps=steps)
    assert killed.summary()["weights_sha256"] == found.summary()["weights_sha256"]


def test_steps_that_wait_for_all_have_the_bits_of_a_run_in_which_nobody_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    run = tmp_path / "run"
    # A head, the one that answers in its place, a tail of the other shard, and a worker.
    killer = Killer(run, [("server", 0), ("server", 2), ("server", 3), ("worker", 1)])
    found = shoal.train(sync_job(), plan="ps=2,workers=2,sync,replicas=1,threads=1", run_dir=run, on_event=killer)
    killer.check_deaths()
    check_bits(found, 2, tmp_path / "whole", monkeypatch)


def test_a_server_that_is_killed_as_soon_as_it_is_there_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    run = tmp_path / "run"

    def kill_first() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                rows = json.loads((run / "processes.json").read_text())
                pids = [row["pid"] for row in rows if (row["role"], row["rank"]) == ("server", 1)]
                if pids:
                    os.kill(pids[0], signal.SIGKILL)
                    return
            time.sleep(0.001)

    # Whether it is given something to hold before it dies is left to chance: in the end it makes no difference.
    thread = threading.Thread(target=kill_first)
    thread.start()
    heard = Killer(run, [("server", 1)])

    def hear(event: dict[str, Any]) -> None:
        heard.hear(event)
        if event["kind"] == "step":
            # There is no other before it is killed.
            thread.join()

    # As many copies as servers: server 1 has the same as server 0.
    shoal.train(job(), plan="ps=1,workers=2,sync,replicas=1,threads=1", run_dir=run, steps=30, on_event=hear)
    assert [e["rank"] for e in read_events(run / "events.jsonl", {"death"}) if e["role"] == "server"] == [1]
    assert heard.acknowledged == [(step // 10 + 1, step % 10 + 1, shard) for step in range(30) for shard in (0, 1)]
    check_sum(shoal.open(run), learned(heard.acknowledged, together=True))


def script(run: Path) -> None:
    """What each of five processes does that torchrun has started, on two machines as far as they know."""
    rank = int(os.environ["RANK"])
    os.environ["SHOAL_MACHINE"] = f"number {rank // 3}"
    with pytest.raises(PlanError, match="takes 7 processes, 4 of them servers, and the job was started with 5; start 7"):
        shoal.train(sync_job(), plan="ps=2,workers=3,sync,replicas=1", run_dir=run)
    killer = Killer(run, KEPT, last=("server", 2))
    shoal.train(sync_job(), plan="ps=2,workers=1,sync,replicas=1,threads=1", run_dir=run, on_event=killer)
    # With a log in place of copies, processes are kept as well, and keep others when the plan changes.
    killer = Killer(logged := run.with_name("logged"), LOGGED, at_once=2)
    changer = Changer(["ps=2,workers=2,async", "ps=1,workers=5", "ps=1,workers=4,async"], killer)
    shoal.train(job(), plan="ps=4,workers=1,async,threads=1", run_dir=logged, push_log=True, on_event=changer)
    # One of them has nothing to do meanwhile; and who has just come is killed.
    with pytest.MonkeyPatch.context() as patch:
        if not rank:
            Strikes(patch, [("copy", 1), None])
        changer = Changer(["ps=1,workers=2,async", "ps=2,workers=1,async"])
        plan = "ps=2,workers=1,async,replicas=1,threads=1"
        shoal.train(job(), plan=plan, run_dir=run.with_name("changed"), on_event=changer)


@pytest.mark.timeout(500)
def test_a_job_that_torchrun_has_started_outlives_servers_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    # Whoever is gone when the run has ended is not waited for: it would take longer than there is time.
    process = torchrun(HERE, run, processes=5, SHOAL_STALL_S="1000")
    _, errors = process.communicate(timeout=480)
    assert process.returncode == 0, errors
    found = shoal.open(run)
    Killer(run, KEPT).check_deaths()
    Killer(tmp_path / "logged", LOGGED, at_once=2).check_deaths()
    logged = shoal.open(tmp_path / "logged")
    assert len(set(pushes(logged))) == len(pushes(logged))
    changed = shoal.open(tmp_path / "changed")
    for found_run, workers in ((logged, [1, 2, 4]), (changed, [1, 2, 1])):
        told = list(read_events(found_run.path / "events.jsonl", {"replan"}))
        assert [e["plan"].partition("workers=")[2][:1] for e in told] == [str(count) for count in workers[1:]]
        check_sum(found_run, learned_in_turn(pushes(found_run), [e["step"] for e in told], workers))
    assert [e["text"] for e in read_events(logged.path / "events.jsonl", {"warning"}) if "has started 5, whose" in e["text"]]
    (back,) = read_events(changed.path / "events.jsonl", {"recovered"})
    assert (back["rank"], back["action"]) == (1, "given")
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    check_bits(found, 1, tmp_path / "whole", monkeypatch)


if __name__ == "__main__":
    script(Path(sys.argv[1]))
