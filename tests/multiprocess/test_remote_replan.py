"""A run without shared memory whose servers and workers come and go: nothing is lost or counted twice, and few keys move."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from noisy_job import events, kill, wait_until
from plain_torch import assert_equal
from replans import changing, check_counted, counted, pushes
from torch import nn
from torch.nn import functional
from torchmetrics.classification import BinaryAUROC

import shoal
from shoal.plan import Plan
from shoal.train import orders
from shoal.train.orders import ask
from shoal.train.remote.elastic import ElasticLead


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    yield


class Clicks(nn.Module):
    """Rows by key, which come into being when they are seen for the second time, and a dense part."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = shoal.ps.Embedding(4, optimizer=shoal.ps.Adagrad(lr=0.1), mode="sum", admission=2)
        self.hidden = nn.Linear(4, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(self.rows(keys)))).squeeze(-1)


def clicks() -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randint(0, 300, (190, 5), generator=torch.Generator().manual_seed(1))
    return keys * 10**12 - 7, (keys[:, 0] > 150).double()


class Auc(BinaryAUROC):
    """Over probabilities: of logits it takes those of a batch for probabilities that all lie between 0 and 1."""

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        super().update(output.sigmoid(), target)


def job() -> shoal.Job:
    return shoal.Job(
        name="clicks", model=lambda: Clicks().double(), train_data=clicks, eval_data=clicks, batch_size=30, epochs=3,
        loss=functional.binary_cross_entropy_with_logits, metrics={"auc": Auc()}, grad_clip=0.05,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> shoal.Run:
    """A run that never changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        patch.setenv("SHOAL_TRANSPORT", "arena")
        return shoal.train(job(), plan="dp=1,threads=1", run_dir=tmp_path_factory.mktemp("one") / "run")


def test_weights_and_history_are_those_of_a_run_that_never_changed(
    tmp_path: Path, one: shoal.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of an epoch (7), and with a worker that is killed while it leaves."""
    run, send_away, struck = tmp_path / "run", ElasticLead._send_away, []

    def kill_and_send_away(lead: ElasticLead, role: str, ranks: Any) -> None:
        if not struck:
            struck.append(lead._members.of["worker", 1].pid)
            kill(struck[0])
        send_away(lead, role, ranks)

    monkeypatch.setattr(ElasticLead, "_send_away", kill_and_send_away)
    changes = {2: "ps=2,workers=3", 4: "ps=200", 7: "ps=2,workers=2", 10: "ps=1,workers=1", 12: "dp=2", 15: "ps=3,workers=2"}
    found = shoal.train(job(), plan="ps=1,workers=2,sync,threads=1", run_dir=run, on_event=changing(changes))
    assert_equal(found.weights(), one.weights(), within=1e-9)
    for ours, theirs in zip(found.history, one.history, strict=True):
        for entry in (ours, theirs):
            entry.pop("samples_per_s")
        # Of a training metric with a state, what the worker had seen that was killed is missing.
        assert ours.pop("auc") == theirs.pop("auc") or ours["epoch"] == 1
        assert ours == pytest.approx(theirs, rel=1e-8)
    workers = [2] * 2 + [3] * 5 + [2] * 3 + [1] * 5 + [2] * 6
    assert sorted(pushes(run)) == [(s // 7 + 1, s % 7 + 1, shard) for s, w in enumerate(workers) for shard in range(w)]
    assert [e["step"] for e in events(run, "step")] == list(range(1, 22))

    told = events(run, "replan")
    assert [(e["step"], e["world_size"], e["by"]) for e in told] == [
        (step, world, "on_event") for step, world in ((2, 3), (7, 2), (10, 1), (15, 2))
    ]
    assert all(a["plan"] == b["before"] for a, b in zip(told, told[1:], strict=False))
    there, nothing, back, third = told
    # What goes to a server that is new is what comes back when it goes; a third server gets a third, not two of three.
    assert nothing["keys_moved"] == nothing["bytes_moved"] == nothing["rows_moved"] == 0
    assert there["keys_moved"] == back["keys_moved"] and 0.35 < back["keys_moved"] / back["keys"] < 0.65
    assert 0.5 < third["keys_moved"] / third["keys"] < 0.8 and back["rows_moved"] > 0 and back["bytes_moved"] > 0
    (many, gone) = (e["text"] for e in events(run, "warning"))
    assert many.startswith("The plan was not changed: ps=200 is more servers than parameters") and "stay servers" in gone
    assert [(e["role"], e["rank"], e["pid"]) for e in events(run, "death")] == [("worker", 1, struck[0])]
    assert str(found.plan) == told[-1]["plan"] == str(Plan.from_toml((run / "plan.toml").read_text()))


def test_with_a_log_or_copies_weights_are_those_of_a_run_that_never_changed(tmp_path: Path, one: shoal.Run) -> None:
    changes = changing({2: "ps=2,workers=3", 4: "ps=2,workers=1", 5: "ps=1,workers=2"})
    for name, more in (("logged", ""), ("copied", ",replicas=1")):
        run, plan = tmp_path / name, f"ps=1,workers=2,sync,threads=1{more}"
        found = shoal.train(job(), plan=plan, run_dir=run, push_log=not more, on_event=changes)
        assert_equal(found.weights(), one.weights(), within=1e-9)
        there, nothing, back = events(run, "replan")
        assert there["keys_moved"] == back["keys_moved"] > 0 == nothing["keys_moved"] and back["rows_moved"] > 0
        assert not events(run, "death")


def test_each_push_counts_once_though_workers_are_killed_as_the_plan_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of the plan that was and of the one that comes. The first change is asked for from outside, as the command does."""
    run, make, struck = tmp_path / "run", ElasticLead._make, []
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(ask(run, "ps=2,workers=4", 120.0)))

    def kill_and_make(lead: ElasticLead, change: Any) -> None:
        kill(lead._members.of["worker", 0].pid)
        make(lead, change)
        struck.append(lead._members.of["worker", 0].pid)
        kill(struck[-1])

    monkeypatch.setattr(ElasticLead, "_make", kill_and_make)
    look, taken = orders.Inbox.next, list[orders.Asked]()

    def look_and_note(inbox: orders.Inbox) -> orders.Asked | None:
        found = look(inbox)
        taken.extend([found] if found is not None else [])
        return found

    # Requests are looked for whenever they can be.
    monkeypatch.setattr(orders, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(orders.Inbox, "next", look_and_note)
    changes = changing({13: "ps=3,workers=1,async", 20: "ps=1,workers=2,staleness=2,push_every=2,pull_every=2"})

    def on_event(event: dict[str, Any]) -> Plan | None:
        if event["kind"] == "step" and event["step"] == 2:
            asking.start()
        elif event["kind"] == "step" and event["step"] == 5:
            wait_until(lambda: taken or [*run.glob("replan-*.request")])
        return changes(event)

    plan = "ps=1,workers=2,staleness=1,threads=1"
    found = shoal.train(counted(), plan=plan, run_dir=run, on_event=on_event)
    asking.join()
    told = events(run, "replan")
    (first, *others) = [e["step"] for e in told]
    assert 2 <= first <= 5 and others == [13, 20] and [e["by"] for e in told] == ["command", "on_event", "on_event"]
    assert answers[0]["keys_moved"] == told[0]["keys_moved"] > 0 and answers[0]["step"] == first
    assert {e["pid"] for e in events(run, "death")} >= set(struck) and len(struck) == 3
    workers = [2] * first + [4] * (13 - first) + [1] * 7 + [2] * 16
    check_counted(found, workers)
    # All servers count all updates, whenever they came; the last ones may be told of in another order.
    versions = [max(e["versions"]) for e in events(run, "push_ack")]
    assert max(versions[-8:]) == max(versions)
    assert json.loads((run / "processes.json").read_text()) == [] and not list(run.glob("replan-*"))
