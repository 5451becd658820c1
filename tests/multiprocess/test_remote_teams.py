"""Workers of several processes each, tensor- or pipeline-parallel, whose servers share no memory with them.

This file is also the script that torchrun starts: see ``script``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from plain_torch import assert_equal
from torch import nn
from torchrun import torchrun

import shoal
from shoal.errors import NotBuiltError, PlanError, ShoalError
from shoal.observe.events import read_events

HERE = Path(__file__).resolve()
STEPS = 20


def job() -> shoal.Job:
    """A transformer with a tied head: clipped, with a schedule, an evaluation, and a last batch that is smaller."""
    return zoo.job(
        "gpt", grad_clip=0.5, metrics={"accuracy": zoo.accuracy},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5),
    )  # fmt: skip


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(37, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 10)
    ).double()


def normed_job() -> shoal.Job:
    """Running statistics in each half of a model."""
    return zoo.job("odd").replace(model=normed, eval_data=None)


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[shoal.Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield shoal.train(job(), plan="dp=1,threads=1", run_dir=tmp_path_factory.mktemp("alone") / "run", steps=STEPS)


def killing(run: Path, *victims: tuple[int, str, int]) -> Any:
    """What to do at every event so that processes are killed after a step: (the step, role, rank)."""
    left = list(victims)

    def watch(event: dict[str, Any]) -> None:
        if left and event["kind"] == "step" and event["step"] == left[0][0]:
            _, role, rank = left.pop(0)
            rows = json.loads((run / "processes.json").read_text())
            (pid,) = (row["pid"] for row in rows if (row["role"], row["rank"]) == (role, rank))
            os.kill(pid, signal.SIGKILL)

    return watch


def deaths(run: Path) -> list[tuple[str, int, str]]:
    return [(e["role"], e["rank"], e["cause"]) for e in read_events(run / "events.jsonl", {"death"})]


def assert_same_history(found: shoal.Run, expected: shoal.Run) -> None:
    for ours, theirs in zip(found.history, expected.history, strict=True):
        assert {**ours, "samples_per_s": 0} == pytest.approx({**theirs, "samples_per_s": 0}, rel=1e-8)


def test_two_groups_of_two_are_one_worker_also_when_processes_of_both_are_killed(tmp_path: Path, alone: shoal.Run) -> None:
    run = tmp_path / "run"
    watch = killing(run, (4, "partner", 1), (8, "worker", 0))
    found = shoal.train(job(), plan="tp=2,ps=2,workers=2,sync,threads=1", run_dir=run, steps=STEPS, on_event=watch)
    assert_equal(found.weights(), alone.weights(), within=1e-9)
    assert_same_history(found, alone)
    assert deaths(run) == [("partner", 1, "SIGKILL"), ("worker", 0, "SIGKILL")]
    back = [(e["role"], e["rank"]) for e in read_events(run / "events.jsonl", {"recovered"})]
    # Either may be the first to have done something again.
    assert sorted(back) == [("worker", 0), ("worker", 1)]
    pushes = [(e["epoch"], e["batch"], e["shard"]) for e in read_events(run / "events.jsonl", {"push_ack"})]
    per_epoch = -(-zoo.SAMPLES // job().batch_size)
    assert sorted(pushes) == [(step // per_epoch + 1, step % per_epoch + 1, s) for step in range(STEPS) for s in (0, 1)]
    assert found.summary()["world_size"] == 4


def test_each_plan_goes_on_from_any_other(tmp_path: Path, alone: shoal.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    legs = [
        ("tp=2,ps=1,sync", "group", 7, None),
        ("dp=2", "arena", 11, None),
        ("pp=2,microbatches=3,ps=2,sync", "group", STEPS, killing(run, (13, "partner", 0))),
    ]
    for number, (plan, transport, steps, watch) in enumerate(legs):
        monkeypatch.setenv("SHOAL_TRANSPORT", transport)
        found = shoal.train(
            job(), plan=f"{plan},threads=1", run_dir=run, steps=steps, resume=number > 0, on_event=watch
        )
    assert_equal(found.weights(), alone.weights(), within=1e-9)
    assert_same_history(found, alone)
    assert deaths(run) == [("partner", 0, "SIGKILL")]


def test_a_log_and_copies_keep_what_servers_had_of_a_worker_of_two(tmp_path: Path, alone: shoal.Run) -> None:
    for plan, log, killed, action in (
        ("tp=2,ps=1,sync", True, ((4, "server", 0), (8, "partner", 0)), "replayed"),
        ("pp=2,ps=1,replicas=1,sync", False, ((4, "server", 0), (8, "worker", 0)), "copied"),
    ):
        run = tmp_path / action
        watch = killing(run, *killed)
        found = shoal.train(job(), plan=f"{plan},threads=1", run_dir=run, steps=STEPS, on_event=watch, push_log=log)
        assert_equal(found.weights(), alone.weights(), within=1e-9)
        assert_same_history(found, alone)
        assert deaths(run) == [(role, rank, "SIGKILL") for _, role, rank in killed]
        back = {e["action"] for e in read_events(run / "events.jsonl", {"recovered"}) if e["role"] == "server"}
        assert back == {action}


def test_buffers_of_all_stages_come_to_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = "pp=2,microbatches=1,ps=1,sync,batchnorm=local,threads=1"
    found = shoal.train(normed_job(), plan=plan, run_dir=tmp_path / "run", steps=4)
    monkeypatch.setenv("SHOAL_TRANSPORT", "arena")
    one = shoal.train(normed_job(), plan="dp=1,threads=1", run_dir=tmp_path / "one", steps=4)
    assert any("running_var" in name for name in found.weights())
    assert_equal(found.weights(), one.weights(), within=1e-9)


def test_what_makes_no_sense_is_said_in_a_sentence(tmp_path: Path) -> None:
    for of, plan, error, said in (
        (job(), "tp=2,ps=1,async", NotBuiltError, "write sync alone, or leave tp and pp out"),
        (job(), "pp=99,ps=1,sync", PlanError, "pp=99"),
        (normed_job(), "pp=2,ps=1,workers=2,sync", NotBuiltError, "add batchnorm=local"),
    ):
        with pytest.raises(error, match=said):
            shoal.train(of, plan=plan, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def script(place: Path) -> None:
    """What each of three processes does that torchrun has started."""
    rank = int(os.environ["RANK"])
    said: dict[str, Any] = {}
    uncut, calls = zoo.job("odd", eval_data=None).replace(model=lambda: nn.Linear(37, 10).double()), list[int]()

    def fickle() -> nn.Module:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("not there yet")
        return normed()

    late = normed_job().replace(model=fickle)
    for of, plan, at in (
        (job(), "tp=2,ps=2,sync", "refused"), (uncut, "pp=2,ps=1,sync", "refused"), (late, "tp=2,ps=1,sync", "failed"),
    ):  # fmt: skip
        try:
            shoal.train(of, plan=plan, run_dir=place / at)
        except ShoalError as error:
            said[plan] = str(error)
    run = place / "run"
    watch = killing(run, (6, "partner", 0))
    found = shoal.train(job(), plan="tp=2,ps=1,sync,threads=1", run_dir=run, steps=STEPS, on_event=watch)
    said["weights"] = {name: float(weight.double().sum()) for name, weight in found.weights().items()}
    # Nothing is left to do, which the others have to be told: the first process begins nothing then.
    said["again"] = shoal.train(job(), plan="tp=2,ps=1,sync,threads=1", run_dir=run, steps=STEPS, resume=True).summary()["steps"]
    (place / f"said-{rank}.json").write_text(json.dumps(said))


def test_under_torchrun_a_killed_partner_costs_nothing(tmp_path: Path, alone: shoal.Run) -> None:
    process = torchrun(HERE, tmp_path, processes=3)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(3)]
    assert said[0] == said[1] == said[2] and said[0]["again"] == STEPS
    refused = "tp=2,ps=2,sync takes 4 processes, 2 of them servers, and the job was started with 3; start 4"
    assert said[0]["tp=2,ps=2,sync"].startswith(refused) and "pp=2" in said[0]["pp=2,ps=1,sync"]
    # A model that only the first process could not build, the first time.
    (failed,) = read_events(tmp_path / "failed" / "events.jsonl", {"error"})
    assert "OSError: not there yet" in failed["sentence"] and failed["sentence"] in said[0]["tp=2,ps=1,sync"]
    assert not (tmp_path / "refused").exists()
    assert_equal(shoal.open(tmp_path / "run").weights(), alone.weights(), within=1e-9)
    assert deaths(tmp_path / "run") == [("partner", 0, "SIGKILL")]


if __name__ == "__main__":
    script(Path(sys.argv[1]))
