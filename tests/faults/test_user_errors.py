"""Errors in the user's own code: their traceback once, with the rank, exit code 1, and nothing left running."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import noisy_job
import pytest
import torch
from noisy_job import command, digest, environment, events, gone, make_job, processes, wait_until
from torch import nn

import shoal
from shoal.comm.arena import Arena
from shoal.comm.grid import Grid
from shoal.comm.store import arena_layout
from shoal.data.order import epoch_order
from shoal.errors import JobError, LossNotFiniteError, UserCodeError
from shoal.plan import Plan
from shoal.process.supervisor import Supervisor
from shoal.train.crew import Crew
from shoal.train.settings import JobFacts, RunSettings

PLAN = "dp=2,threads=1"


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")


def test_loss_raises_in_one_worker(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run), env=environment(SHOAL_TEST_LOSS="raise:7"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_until(lambda: processes(run, "worker") or process.poll() is not None)
    family = processes(run)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 1 and gone(family)
    assert err.count("Traceback (most recent call last)") == 1
    assert err.count("ValueError: the user's own mistake") == 1
    assert "your code raised, in worker" in err and "noisy_job.py" in err and "/shoal/train/" not in err
    last = err.strip().splitlines()[-1]
    assert "ValueError in worker" in last and "the user's own mistake" in last
    assert json.loads(out)["exit_code"] == 1
    (error,) = events(run, "error")
    assert error["rank"] in (0, 1) and "noisy_job.py" in error["traceback"]


def test_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_TEST_LOSS", "nan:9")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    run = tmp_path / "run"
    with pytest.raises(LossNotFiniteError) as caught:
        shoal.train(noisy_job.job, plan=PLAN, run_dir=run)
    text = str(caught.value)
    assert "The loss became nan in step 9 " in text and "\n" not in text
    order = epoch_order(12 * noisy_job.STEPS_PER_EPOCH - 5, 0, 0)
    samples = ", ".join(map(str, sorted(int(i) for i in order[8 * 12 : 9 * 12])))
    assert f"(samples {samples})" in text
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert str(newest) in text
    assert max(event["step"] for event in events(run, "step")) == 8
    # The bad step has changed nothing: gone on with, without the fault, the run ends as any other.
    monkeypatch.delenv("SHOAL_TEST_LOSS")
    resumed = shoal.train(noisy_job.job, plan=PLAN, run_dir=run, resume=True, epochs=2)
    whole = shoal.train(noisy_job.job, plan=PLAN, run_dir=tmp_path / "whole", epochs=2)
    assert digest(resumed) == digest(whole)


# -- the same template for many mistakes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    started = Supervisor()
    started.start()
    yield started
    started.close()


def work(supervisor: Supervisor, job: shoal.Job, folder: Path) -> list[dict[str, Any]]:
    """Run a job's workers to the end; the events. Raises what they raise."""
    supervisor.load("shoal.train.host:TrainHost", job, 200.0)
    facts: JobFacts = supervisor.call("facts")
    plan = Plan.parse("dp=2,threads=1,accumulate=1")
    settings = RunSettings(
        plan=plan, layout=arena_layout(facts.table, Grid(dp=2), facts.collective_bytes(plan)), total_steps=12, steps_per_epoch=13,
        checkpoint_dir=str(folder),
    )  # fmt: skip
    arena = Arena.create(settings.layout)
    seen: list[dict[str, Any]] = []
    try:
        supervisor.call("bind", settings, True, fds=(arena.memory.fd,))
        crew = Crew(supervisor, arena, settings, lambda kind, **e: seen.append({"kind": kind, **e}), (arena.memory.fd,))
        crew.start(spare=False)
        while not crew.finished:
            crew.poll(0.05, 0.0, lambda: "there is no checkpoint yet.")
    finally:
        supervisor.dismiss()
        arena.memory.close()
    return seen


def mistake(*_: Any, **__: Any) -> Any:
    raise KeyError("a mistake of theirs")


class Broken(noisy_job.Noisy):
    def __getitem__(self, index: int) -> Any:
        return mistake() if index == 50 else super().__getitem__(index)


class BrokenScheduler(torch.optim.lr_scheduler.StepLR):
    def step(self, epoch: Any = None) -> None:
        if self.last_epoch >= 5:
            mistake()
        super().step()


class Remembering(torch.optim.lr_scheduler.StepLR):
    """Keeps an object of its own, from the beginning or from its first step on."""

    def __init__(self, optimizer: torch.optim.Optimizer, late: bool) -> None:
        super().__init__(optimizer, 1)
        self.kept = None if late else Path("somewhere")

    def step(self, epoch: Any = None) -> None:
        super().step()
        self.kept = Path("somewhere") if self.last_epoch else None


@pytest.mark.parametrize("late", [False, True])
def test_what_no_checkpoint_can_hold_is_refused_at_once(late: bool, supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=r"keeps a pathlib\S*Path, which a checkpoint cannot hold; let it keep"
    ) as caught:
        work(supervisor, make_job(scheduler=lambda optimizer: Remembering(optimizer, late)), tmp_path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], bool]] = {
    "model": ({"model": mistake}, False),
    "train_data": ({"train_data": mistake}, False),
    "optimizer": ({"optimizer": mistake}, False),
    "an item of train_data": ({"train_data": lambda: Broken(151)}, True),
    "collate": ({"collate": mistake}, True),
    "metrics": ({"metrics": {"wrong": mistake}}, True),
    "the making of a scheduler": ({"scheduler": mistake}, True),
    "a step of a scheduler": ({"scheduler": lambda optimizer: BrokenScheduler(optimizer, 1)}, True),
    "the loss": ({"loss": mistake}, True),
}


@pytest.mark.parametrize("where", WRONG)
def test_mistake_in(where: str, supervisor: Supervisor, tmp_path: Path) -> None:
    changes, in_worker = WRONG[where]
    with pytest.raises(UserCodeError) as caught:
        work(supervisor, make_job(**changes), tmp_path)
    error = caught.value
    assert error.exit_code == 1
    assert error.rank in ((0, 1) if in_worker else (None,))
    assert "raised KeyError" in str(error) and "a mistake of theirs" in str(error)
    assert error.traceback_text.count("Traceback") == 1
    assert "in mistake" in error.traceback_text and "/shoal/train/" not in error.traceback_text


def test_exit_in_user_code_is_a_death(supervisor: Supervisor, tmp_path: Path) -> None:
    def leave(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with open(tmp_path / "calls", "ab") as file:
            file.write(b"x")
        if (tmp_path / "calls").stat().st_size >= 5 and not (tmp_path / "left").exists():
            (tmp_path / "left").touch()
            os._exit(0)
        return nn.functional.cross_entropy(output, target)

    seen = work(supervisor, make_job(loss=leave), tmp_path)
    # Both may have come to it at the same time.
    deaths = [e for e in seen if e["kind"] == "death"]
    assert deaths and {(e["cause"], e["phase"]) for e in deaths} == {("exit code 0", "forward")}
    assert [e["action"] for e in seen if e["kind"] == "recovered"] == ["recomputed"] * len(deaths)
