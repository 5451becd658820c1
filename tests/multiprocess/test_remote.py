"""A parameter server whose servers and workers share no memory: processes of this machine that speak over sockets."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convex
import pytest
import torch
from plain_torch import assert_equal
from torch import nn
from torch.nn import functional
from torchmetrics.classification import BinaryAUROC

import shoal
from shoal.errors import NotBuiltError, WorkerLostError
from shoal.observe.events import read_events
from shoal.plan import Plan


class Clicks(nn.Module):
    """Rows by key, a tied weight, and one that no sample touches."""

    def __init__(self, admission: int = 1) -> None:
        super().__init__()
        self.rows = shoal.ps.Embedding(4, optimizer=shoal.ps.Adagrad(lr=0.1), mode="sum", admission=admission)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(4, 1)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(self.rows(keys)))))).squeeze(-1)


def clicks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(0, 40, (190, 5), generator=generator)
    return keys * 10**12 - 7, (keys[:, 0] > 20).double()


def log_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(output, target)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def steps_down(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)


def nadam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(parameters, lr=1e-2)


def job(**changes: Any) -> shoal.Job:
    return shoal.Job(**{
        "name": "clicks", "model": lambda: Clicks().double(), "train_data": clicks, "eval_data": clicks, "loss": log_loss,
        "metrics": {"auc": BinaryAUROC()}, "batch_size": 30, "epochs": 3, "optimizer": adam, "scheduler": steps_down,
        "grad_clip": 0.05, **changes,
    })  # fmt: skip


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    yield


def alone(of: shoal.Job, directory: Path, monkeypatch: pytest.MonkeyPatch, steps: int | None = None) -> Any:
    with monkeypatch.context() as patch:
        patch.setenv("SHOAL_TRANSPORT", "arena")
        return shoal.train(of, plan="dp=1,threads=1", run_dir=directory, steps=steps)


def slowly_admitted() -> shoal.Job:
    """A key is seen some four times a step: it has its row after some thirteen of them."""
    return job(model=lambda: Clicks(admission=50).double())


@pytest.fixture(scope="module")
def admitted_by_one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        return alone(slowly_admitted(), tmp_path_factory.mktemp("one") / "run", patch)


def kill_at(step: int, role: str, rank: int, run: Path, seen: list[tuple[str, int]] | None = None) -> Any:
    """What to do at every event so that a process is killed after a step; ``seen``: who was there."""
    killed: list[int] = []

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step and not killed:
            rows = json.loads((run / "processes.json").read_text())
            if seen is not None:
                seen.extend(sorted((row["role"], row["rank"]) for row in rows))
            killed.extend(row["pid"] for row in rows if (row["role"], row["rank"]) == (role, rank))
            os.kill(killed[0], signal.SIGKILL)

    return watch


def pushes(run: Path) -> list[tuple[int, int, int]]:
    return [(e["epoch"], e["batch"], e["shard"]) for e in read_events(run / "events.jsonl", {"push_ack"})]


def test_sync_is_one_worker_also_when_a_worker_is_killed_and_goes_on_in_the_arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, admitted_by_one: Any
) -> None:
    of, one, run, seen = slowly_admitted(), admitted_by_one, tmp_path / "run", []
    watch = kill_at(3, "worker", 1, run, seen)
    shoal.train(of, plan="ps=2,workers=2,sync,threads=1", run_dir=run, steps=10, on_event=watch)
    deaths = list(read_events(run / "events.jsonl", {"death"}))
    assert [(e["role"], e["rank"], e["cause"]) for e in deaths] == [("worker", 1, "SIGKILL")]
    assert seen == [("server", 0), ("server", 1), ("supervisor", 0), ("template", 0), ("worker", 0), ("worker", 1)]
    with monkeypatch.context() as patch:
        patch.setenv("SHOAL_TRANSPORT", "arena")
        shoal.train(of, plan="ps=1,workers=2,sync,threads=1", run_dir=run, steps=15, resume=True)
    admitted = len(shoal.open(run).weights()["rows.keys"])
    found = shoal.train(of, plan="ps=3,workers=1,sync,threads=1", run_dir=run, resume=True)
    assert_equal(found.weights(), one.weights(), within=1e-9)
    assert 0 < admitted < len(found.weights()["rows.keys"])
    # From step 16 on there is one worker.
    expected = [((step - 1) // 7 + 1, (step - 1) % 7 + 1, s) for step in range(1, 22) for s in range(2 if step < 16 else 1)]
    assert sorted(pushes(run)) == expected
    for ours, theirs in zip(found.history, one.history, strict=True):
        for entry in (ours, theirs):
            entry.pop("samples_per_s")
            # Of a training metric with a state, what a worker had that was killed is missing, and of an epoch that was resumed.
            entry.pop("auc")
        assert ours == pytest.approx(theirs, rel=1e-8)


def test_what_was_counted_of_keys_without_a_row_outlives_a_server_and_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, admitted_by_one: Any
) -> None:
    """It is in the checkpoint that the log stands on, and a step behind it there is a row of hardly any key."""
    plan, run = "ps=2,workers=1,sync,threads=1", tmp_path / "run"
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "1000")
    shoal.train(slowly_admitted(), plan=plan, run_dir=run, steps=8)
    watch = kill_at(9, "server", 1, run)

    def fail_later(event: dict[str, Any]) -> None:
        watch(event)
        if event["kind"] == "step" and event["step"] == 11:
            raise RuntimeError("as if the lights had gone out")

    with pytest.raises(RuntimeError, match="lights"):
        shoal.train(slowly_admitted(), plan=plan, run_dir=run, resume=True, push_log=True, on_event=fail_later)
    assert [event["action"] for event in read_events(run / "events.jsonl", {"recovered"})] == ["replayed"]
    assert [event["step"] for event in read_events(run / "events.jsonl", {"checkpoint"})][-1] == 8
    found = shoal.train(slowly_admitted(), plan=plan, run_dir=run, resume=True)
    assert_equal(found.weights(), admitted_by_one.weights(), within=1e-9)


class Normed(nn.Module):
    """BatchNorm twice; whoever computes a certain sample in the first epoch is killed between them, on the way back another."""

    def __init__(self, scratch: Path | None) -> None:
        super().__init__()
        self.scratch = scratch
        self.first = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        between = self.first(x)
        if self.training and self.scratch is not None:
            self._die("forward", bool((x[:, 0] == NORMED[0][17, 0]).any()))
            back = bool((x[:, 0] == NORMED[0][60, 0]).any())
            between.register_hook(lambda gradient: self._die("backward", back))
        return self.second(between).squeeze(-1)

    def _die(self, name: str, here: bool) -> None:
        assert self.scratch is not None
        if here and not (self.scratch / name).exists():
            (self.scratch / name).touch()
            os.kill(os.getpid(), signal.SIGKILL)


_stream = torch.Generator().manual_seed(2)
NORMED = torch.randn(62, 5, generator=_stream, dtype=torch.float64), torch.randn(62, generator=_stream, dtype=torch.float64)


def test_batchnorm_over_the_global_batch_is_one_workers_also_when_workers_are_killed_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch of an epoch has two samples: of three workers one has none."""

    def normed(scratch: Path | None) -> shoal.Job:
        return job(
            model=lambda: Normed(scratch).double(), train_data=NORMED, eval_data=NORMED, loss=functional.mse_loss, metrics={},
            batch_size=12, epochs=2, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        )  # fmt: skip

    run = tmp_path / "run"
    one = alone(normed(None), tmp_path / "one", monkeypatch)
    found = shoal.train(normed(tmp_path), plan="ps=2,workers=3,sync,threads=1", run_dir=run)
    deaths = list(read_events(run / "events.jsonl", {"death"}))
    assert [e["role"] for e in deaths] == ["worker", "worker"] and (tmp_path / "backward").exists()
    assert_equal(found.weights(), one.weights(), within=1e-9)
    assert found.weights()["first.1.num_batches_tracked"] == one.weights()["first.1.num_batches_tracked"]
    assert sorted(pushes(run)) == [(e, b, s) for e in (1, 2) for b in range(1, 7) for s in range(3 if b < 6 else 2)]


def test_workers_that_wait_for_nobody_lose_no_push_when_one_is_killed(tmp_path: Path) -> None:
    run, of = tmp_path / "run", job(epochs=4, optimizer=nadam, scheduler=None)
    plan = "ps=2,workers=2,staleness=2,push_every=2,pull_every=2,threads=1"
    found = shoal.train(of, plan=plan, run_dir=run, on_event=kill_at(9, "worker", 0, run))
    assert sorted(pushes(run)) == [(e, b, s) for e in range(1, 5) for b in range(1, 8) for s in (0, 1)]
    clocks = list(read_events(run / "events.jsonl", {"clock"}))
    assert len(clocks) == 56 and all(e["clock"] - e["slowest"] <= 2 for e in clocks)
    assert sum(found.summary()["staleness"].values()) == 56
    assert found.history[-1]["eval_loss"] < found.history[0]["eval_loss"] and found.history[-1]["eval_auc"] > 0.6
    assert {"death", "run_end"} <= {e["kind"] for e in read_events(run / "events.jsonl")}


def test_lbfgs_on_servers_is_torchs_also_when_a_server_comes_back_and_goes_on_in_the_arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, run = 24, tmp_path / "run"
    of, watch = convex.job(steps), kill_at(5, "server", 1, run)

    def on_event(event: dict[str, Any]) -> Plan | None:
        watch(event)
        return Plan.parse("ps=3,workers=1,sync") if event["kind"] == "step" and event["step"] == 2 else None

    shoal.train(of, plan="ps=2,workers=2,sync,threads=1", run_dir=run, steps=8, push_log=True, on_event=on_event)
    # The history goes along to where the weights are.
    assert [(e["step"], e["keys_moved"] > 0) for e in read_events(run / "events.jsonl", {"replan"})] == [(2, True)]
    back = [event["action"] for event in read_events(run / "events.jsonl", {"recovered"})]
    assert back == ["replayed"]
    with monkeypatch.context() as patch:
        patch.setenv("SHOAL_TRANSPORT", "arena")
        shoal.train(of, plan="ps=1,workers=1,sync,threads=1", run_dir=run, steps=15, resume=True, push_log=False)
    found = shoal.train(of, plan="ps=1,workers=3,sync,replicas=1,threads=1", run_dir=run, resume=True)
    assert_equal(found.weights(), convex.by_torch(steps), within=1e-9)


def test_a_server_that_is_gone_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(WorkerLostError, match=r"Server 1 died \(SIGKILL\).*--resume"):
        shoal.train(job(), plan="ps=2,workers=1,async,threads=1", run_dir=run, on_event=kill_at(2, "server", 1, run))


def test_what_is_not_built_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    normed = job(model=lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    apart = "ps=1,workers=2,async,accumulate=2,batchnorm=micro"
    with pytest.raises(NotBuiltError, match="add batchnorm=local"):
        shoal.train(normed, plan=apart, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
