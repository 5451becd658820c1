"""Servers that share no memory and keep a log: killed alone they come back, killed with all the run goes on; no push is lost."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counted_job
import lost_report_job
import noisy_job
import pytest
import torch
from logged_runs import killed_whole, train
from noisy_job import events, held_at, kill, processes, wait_until

import shoal
from shoal.errors import RequestError, WorkerLostError
from shoal.ps.log import segments
from shoal.train.remote.state import RemoteTables
from shoal.train.remote.worker import RemoteWorker

COUNTED, NOISY = f"{counted_job.__file__}:job", f"{noisy_job.__file__}:job"
CALM = "threads=1,batchnorm=local"


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "1000")
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")


def pid_of(run: Path, role: str, rank: int) -> int:
    rows = json.loads((run / "processes.json").read_text())
    return next(int(row["pid"]) for row in rows if (row["role"], row["rank"]) == (role, rank))


def killed(
    target: str, run: Path, pushes: int, *more: str, alone: Callable[[], None] = lambda: None, early: bool = False
) -> list[dict[str, Any]]:
    """Train until this session has acknowledged so many pushes, kill -9 all at once; ``alone``: what is done in the middle.

    A run gets not much further than that, however late it is killed. ``early``: a server is killed as soon as there is one.
    """
    before = len(events(run, "push_ack"))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("SHOAL_FAULTS", held_at((before + pushes) // 2 + 4, 0, 1))
        process = stack.enter_context(killed_whole(target, run, *more))
        if early:
            kill(wait_until(lambda: processes(run, "server"), process)[0])
        wait_until(lambda: len(events(run, "push_ack")) >= before + pushes // 2, process)
        alone()
        wait_until(lambda: len(events(run, "push_ack")) >= before + pushes, process)
    return events(run, "push_ack")


def test_everything_acknowledged_is_there_once_after_kills_of_servers_and_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, chance = tmp_path / "run", random.Random(5)

    def kill_servers() -> None:
        for rank in (1, 0):
            before = len(events(run, "recovered"))
            kill(pid_of(run, "server", rank))
            wait_until(lambda: len(events(run, "recovered")) > before)  # noqa: B023

    # Of the first session the log alone tells, whatever dies.
    plan = f"ps=2,workers=2,async,{CALM}"
    killed(COUNTED, run, chance.randrange(16, 24), "--plan", plan, "--push-log", alone=kill_servers, early=True)
    assert [e["step"] for e in events(run, "checkpoint")] == [0]
    back = [(e["role"], e["rank"], e["action"]) for e in events(run, "recovered")]
    assert back == [("server", 1, "replayed"), ("server", 0, "replayed")]
    # Processes that share memory keep logs of another kind.
    with monkeypatch.context() as patch, pytest.raises(RequestError, match=r"that share no memory .*in the same way"):
        patch.setenv("SHOAL_TRANSPORT", "arena")
        shoal.train(counted_job.job, plan=plan, run_dir=run, resume=True)
    # On another number of servers, until the disk is full.
    monkeypatch.setenv("SHOAL_PUSH_LOG_BYTES", "4000000")
    answer, said = train(COUNTED, run, "--plan", plan.replace("ps=2", "ps=1"), "--resume", code=1)
    assert "no further push was taken" in said.splitlines()[-1] and answer["exit_code"] == 1
    assert events(run, "push_log_failed")[-1]["server"] == 0
    monkeypatch.delenv("SHOAL_PUSH_LOG_BYTES")

    def kill_both() -> None:
        before = len(events(run, "recovered"))
        for pid in [pid_of(run, "server", rank) for rank in (1, 0)]:
            kill(pid)
        wait_until(lambda: len(events(run, "recovered")) == before + 2)

    # With checkpoints as often as it goes; and to the end.
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    killed(COUNTED, run, 12, "--plan", plan, "--resume", alone=kill_both)
    train(COUNTED, run, "--plan", plan.replace("async", "staleness=2").replace("ps=2", "ps=3"), "--resume")
    counted_job.check(shoal.open(run), events(run, "push_ack"))
    assert [e["epoch"] for e in events(run, "epoch")] == [1, 2, 3]
    sessions = sorted((run / "push-log").iterdir())
    assert len(sessions) == 1 and len(segments(sessions[0], "server-0")) <= 3 and not (sessions[0] / "base").exists()


def test_sync_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # BatchNorm over the global batch.
    job, plan, run = noisy_job.make_job(epochs=2), "ps=2,workers=2,sync,threads=1", tmp_path / "run"
    calm = shoal.train(job, plan=plan, run_dir=tmp_path / "calm")

    def kill_a_server() -> None:
        kill(pid_of(run, "server", 1))
        # Else all may be killed before it is back.
        wait_until(lambda: events(run, "recovered"))

    killed(NOISY, run, 34, "--plan", plan, "--epochs", "2", "--push-log", alone=kill_a_server)
    assert [e["rank"] for e in events(run, "recovered")] == [1]
    train(NOISY, run, "--plan", plan, "--epochs", "2", "--resume")
    resumed = shoal.open(run)
    ours, theirs = resumed.weights(), calm.weights()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [e["loss"] for e in resumed.history] == pytest.approx([e["loss"] for e in calm.history])
    acks = [(e["epoch"], e["batch"], e["shard"]) for e in events(run, "push_ack")]
    assert sorted(acks) == [(e, b, s) for e in (1, 2) for b in range(1, 14) for s in range(2)]
    assert events(run, "run_start")[-1]["resumed_from"] >= 17

    # Once more, and the checkpoint that a server would go on from is changed as soon as it is there.
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    passed_over = tmp_path / "passed-over"

    def change_and_kill(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint" and event["step"] >= 4 and not killed_at:
            killed_at.append(event["step"])
            change(Path(event["path"]))
            kill(pid_of(passed_over, "server", 1))

    killed_at: list[int] = []
    theirs = shoal.train(job, plan=plan, run_dir=passed_over, push_log=True, on_event=change_and_kill).weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [Path(e["path"]).name for e in events(passed_over, "checkpoint_damaged")] == [f"step-{killed_at[0]:08d}"]
    (back,) = events(passed_over, "recovered")
    assert back["action"] == "replayed" and back["parts_s"]["checkpoint_s"] > 0


def change(checkpoint: Path) -> None:
    """Change one bit of its tensors."""
    path = checkpoint / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_without_a_whole_checkpoint_a_sentence_says_what_a_server_lacks(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def change_and_kill(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            change(run / "checkpoints" / "step-00000000")
            kill(pid_of(run, "server", 0))

    with pytest.raises(WorkerLostError, match=r"no whole checkpoint .*state.safetensors is not what was written.*--resume"):
        shoal.train(counted_job.job, plan=f"ps=1,workers=1,async,{CALM}", run_dir=run, push_log=True, on_event=change_and_kill)


def test_a_push_of_several_units_whose_worker_was_killed_counts_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers have applied it when its worker dies before it has said so; everything dies while others do its units again.

    As the run goes on, a server is killed before what it goes on from is written down.
    """
    run, calls = tmp_path / "run", tmp_path / "calls"
    calls.mkdir()
    monkeypatch.setenv("SHOAL_TEST_CALLS", str(calls))
    target = f"{lost_report_job.__file__}:job"
    plan = f"ps=2,workers=2,async,push_every={lost_report_job.PUSH_EVERY},{CALM}"
    with killed_whole(target, run, "--plan", plan, "--push-log") as process:
        # Whoever does it had pushed what it had itself.
        wait_until(lambda: (calls / "held").exists() and events(run, "push_ack"), process)
    assert [e["cause"] for e in events(run, "death")] == ["SIGKILL"]
    # Once more, and whoever does the first of its units again dies as well.
    (calls / "over").touch()
    write, struck = RemoteTables.write, list[int]()

    def kill_and_write(tables: RemoteTables, directory: Path) -> None:
        if "push-log" in directory.parts and not struck:
            struck.append(pid_of(run, "server", 1))
            kill(struck[0])
        write(tables, directory)

    monkeypatch.setattr(RemoteTables, "write", kill_and_write)
    # The job changes it.
    monkeypatch.setattr(RemoteWorker, "report", RemoteWorker.report)
    found = shoal.train(lost_report_job.job, plan=plan, run_dir=run, resume=True)
    counted_job.check(found, events(run, "push_ack"))
    deaths = [e["pid"] for e in events(run, "death")]
    assert (calls / "again").exists() and len(deaths) == 4 and len(struck) == 1 and struck[0] in deaths
