"""kill -9 of workers, anywhere and again and again: the final weights are those of an undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import noisy_job
import pytest
import torch
from noisy_job import digest, events, history, kill, make_job, processes, settle, wait_until

import shoal
from shoal.comm.arena import Arena
from shoal.comm.store import Store
from shoal.jobs.recsys import clicks_wide_deep
from shoal.plan import Plan
from shoal.process.supervisor import Child, Supervisor
from shoal.train.api import TrainOptions
from shoal.train.choose import run_trial
from shoal.train.crew import bind
from shoal.train.session import run_settings

PLAN = "dp=2,threads=1"
EDGE = noisy_job.STEPS_PER_EPOCH
# (rank, step from 0, phase) and what the replacement does. A worker that dies after its commit joins the next step.
KILLS: list[tuple[int, int, str, str]] = [
    (1, 0, "data", "recomputed"),
    (0, 1, "update", "rolled_forward"),
    (1, 2, "forward", "recomputed"),
    (0, 3, "backward", "recomputed"),
    (1, 4, "published", "rolled_forward"),
    (0, 5, "reduce", "rolled_forward"),
    (1, 6, "update", "rolled_forward"),
    (0, 7, "committed", "recomputed"),
    (1, 8, "checkpoint", "rolled_forward"),
    (0, 14, "data", "recomputed"),
    (1, 15, "backward", "recomputed"),
    (0, 16, "forward", "recomputed"),
    (1, 17, "reduce", "rolled_forward"),
    (0, 18, "published", "rolled_forward"),
    (1, 19, "committed", "recomputed"),
    (0, 20, "checkpoint", "rolled_forward"),
    (0, 22, "updated", "rolled_forward"),
    (1, EDGE, "evaluate", "recomputed"),
    (0, 2 * EDGE, "evaluate", "recomputed"),
    (1, 2 * EDGE, "forward", "recomputed"),
]


LONG = make_job(epochs=20)


def nadam(params: Any) -> torch.optim.Optimizer:
    """Works on whole tensors: some of them belong to each worker."""
    return torch.optim.NAdam(params, lr=1e-3)


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")


def with_faults(
    monkeypatch: pytest.MonkeyPatch, job: shoal.Job, run: Path, faults: str, plan: str = PLAN, **options: Any
) -> shoal.Run:
    monkeypatch.setenv("SHOAL_FAULTS", faults)
    return shoal.train(job, plan=plan, run_dir=run, **options)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> shoal.Run:
    """The undisturbed run of LONG."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        return shoal.train(LONG, plan=PLAN, run_dir=tmp_path_factory.mktemp("calm") / "run")


@pytest.mark.parametrize("optimizer", [noisy_job.adam, nadam, noisy_job.Counting])
def test_killed_in_every_phase(
    optimizer: Callable[[Any], torch.optim.Optimizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if optimizer is noisy_job.adam:
        job, calm = LONG, request.getfixturevalue("calm")
    else:
        job = make_job(optimizer, scheduler_every="epoch" if optimizer is nadam else "step")
        calm = shoal.train(job, plan=PLAN, run_dir=tmp_path / "calm")
    assert not events(calm.path, "death", "stall")

    text = ";".join(f"kill(rank={rank},step={step},phase={phase})" for rank, step, phase, _ in KILLS)
    # A short run could else be over before there was a checkpoint to die in.
    run = with_faults(monkeypatch, job, tmp_path / "killed", text, on_event=None if job is LONG else settle)

    assert digest(run) == digest(calm)
    assert history(run) == history(calm) and "confusion_3" in run.history[0]
    deaths, recovered = events(run.path, "death"), events(run.path, "recovered")
    # An optimizer of the user's own works in rank 0 alone, so that rank 1 has no update to die in.
    expected = [k for k in KILLS if k[0] == 0 or k[2] != "update" or optimizer is not noisy_job.Counting]
    assert len(deaths) == len(recovered) == len(expected)
    assert {event["cause"] for event in deaths} == {"SIGKILL"}
    for rank, step, phase, action in expected:
        if phase == "checkpoint":
            # The clock decides at which step that is.
            assert any(e["rank"] == rank and e["phase"] == phase and e["step"] > step for e in deaths)
            continue
        at = step + 1 + (phase == "committed")
        (death,) = [e for e in deaths if (e["rank"], e["step"]) == (rank, at) and e["phase"] in _shown(phase)]
        back = [e for e in recovered if (e["rank"], e["step"], e["action"]) == (rank, at, action)]
        assert back and all(e["pid"] != death["pid"] for e in back)


def _shown(phase: str) -> tuple[str, ...]:
    """What the event says for the places that are between two phases."""
    return {"published": ("backward",), "updated": ("update",), "committed": ("update",)}.get(phase, (phase,))


def test_a_recommender_whose_workers_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of its table travel by rows, and their lines are marked: whoever takes over knows nothing of either."""
    job = clicks_wide_deep.job().replace(
        train_data=lambda: clicks_wide_deep._tensors(1280, seed=1), eval_data=None, batch_size=64, epochs=1
    )
    plan = PLAN + ",rewrites=perceptron,compile=off"
    calm = shoal.train(job, plan=plan, run_dir=tmp_path / "calm")
    places = [(1, 2, "backward"), (0, 5, "published"), (1, 8, "reduce"), (0, 11, "update"), (1, 14, "updated")]
    text = ";".join(f"kill(rank={rank},step={step},phase={phase})" for rank, step, phase in places)
    run = with_faults(monkeypatch, job, tmp_path / "killed", text, plan)
    assert digest(run) == digest(calm) and history(run) == history(calm)
    assert len(events(run.path, "recovered")) == len(places)


def test_who_died_after_its_commit_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: shoal.Run
) -> None:
    """Rank 1 is done with the step and dies; rank 0 hangs in its update and still needs rank 1's gradients."""
    monkeypatch.setenv("SHOAL_STALL_S", "4")
    faults = "stall(rank=0,step=5,phase=update);kill(rank=1,step=5,phase=committed)"
    run = with_faults(monkeypatch, LONG, tmp_path / "run", faults)
    assert digest(run) == digest(calm)
    assert {(e["rank"], e["cause"]) for e in events(run.path, "death")} >= {(0, "stalled"), (1, "SIGKILL")}
    # It is named before it is replaced; a stopped process cannot show its stack, and that is said.
    told = events(run.path, "stall", "death")
    stalled = next(e for e in told if e["kind"] == "stall" and (e["rank"], e["step"], e["phase"]) == (0, 6, "update"))
    death = next(e for e in told if e["kind"] == "death" and e["pid"] == stalled["pid"])
    assert death["cause"] == "stalled" and told.index(stalled) < told.index(death)
    assert "stopped" in stalled["stack"] and stalled["replaced_after_s"] >= 4


def test_killed_at_random_moments(tmp_path: Path, calm: shoal.Run) -> None:
    run = tmp_path / "run"
    trouble = _Trouble(run)
    trouble.start()
    try:
        disturbed = shoal.train(LONG, plan=PLAN, run_dir=run)
    finally:
        trouble.stop()
    assert digest(disturbed) == digest(calm)
    assert history(disturbed) == history(calm)
    deaths = events(run, "death")
    # How many, the clock decides: workers do not wait until somebody has seen their steps.
    assert deaths
    assert all(event["cause"] == "SIGKILL" for event in deaths)
    assert len(events(run, "recovered")) == len(deaths)
    assert processes(run) == []


class _Trouble(threading.Thread):
    """Kills what processes.json names: single workers, all of them, standbys, the template."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._run = run
        self._random = random.Random(7)
        self._over = threading.Event()

    def run(self) -> None:
        later = ["standby", "all", "worker", "template", "worker", "standby", "all", "worker", "worker"]
        for target in ["worker"] * 6 + later:
            before = self._last_step()
            # Each time somewhere else in a step, and never three times in the same one.
            while not self._over.is_set() and self._last_step() < before + 8:
                time.sleep(0.005)
            time.sleep(self._random.random() * 0.02)
            while not (pids := processes(self._run, "worker" if target == "all" else target)) and not self._over.is_set():
                # A standby takes a place, and there is not another one yet.
                time.sleep(0.005)
            if self._over.is_set():
                return
            for pid in pids if target == "all" else [self._random.choice(pids)]:
                kill(pid)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _last_step(self) -> int:
        return max((event["step"] for event in events(self._run, "step", "epoch")), default=-8)


class _Struck(Supervisor):
    """Loses its template as soon as there are workers, once each time that it is told to."""

    strikes = False

    def poll(self, timeout_s: float) -> list[Child]:
        if self.strikes and any(child.role == "worker" for child in self.children.values()):
            self.strikes = False
            kill(self.template_pid)
        return super().poll(timeout_s)


def test_template_killed_while_plans_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a trial, in its midst, and before the run itself: each time there is a new one, and the first weights."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    plan = Plan.parse(PLAN).filled()
    with contextlib.closing(_Struck()) as supervisor:
        supervisor.start()
        supervisor.load("shoal.train.host:TrainHost", LONG, 200.0)
        facts = supervisor.call("facts")
        kill(supervisor.template_pid)
        assert run_trial(plan, LONG, facts, supervisor, 0.05).step_times_s and supervisor.template_deaths == 1

        supervisor.strikes = True
        assert run_trial(plan, LONG, facts, supervisor, 0.5).step_times_s and supervisor.template_deaths == 2
        kill(supervisor.template_pid)
        settings = run_settings(plan, LONG, facts, TrainOptions(), tmp_path)
        arena = Arena.create(settings.layout)
        bind(supervisor, settings, (arena.memory.fd,), last=True)
        first = Store(arena, facts.table).weights[0].clone()
        torch.manual_seed(0)
        wanted = {tuple(p.shape): p for p in noisy_job.model().parameters() if p.dim() == 2}
        assert torch.equal(first, wanted[tuple(first.shape)].data)
        arena.memory.close()


def test_three_deaths_in_the_same_step_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(shoal.errors.ShoalError) as caught:
        with_faults(monkeypatch, make_job(), tmp_path / "run", "kill(rank=1,step=20,phase=forward,times=3)")
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert "Worker 1 died 3 times in step 21" in text and "SIGKILL" in text and "\n" not in text
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert checkpoints and str(checkpoints[-1]) in text
    assert [e["sentence"] for e in events(tmp_path / "run", "error")] == [text]
    wait_until(lambda: processes(tmp_path / "run") == [])
