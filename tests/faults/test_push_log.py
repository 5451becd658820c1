"""kill -9 of every process of a run at once, and full disks: with a log of pushes nothing that was acknowledged is lost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import counted_job
import noisy_job
import pytest
from logged_runs import killed_whole, train
from noisy_job import digest, events, held_at, processes, wait_until

import shoal
from shoal.ps.log import segments

COUNTED = f"{counted_job.__file__}:job"
CALM = "threads=1,batchnorm=local"


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "1000")


def killed(target: str, run: Path, pushes: int, *more: str) -> list[dict[str, Any]]:
    """Train until this session has acknowledged so many pushes, kill -9 everything at once; all that was acknowledged.

    At most 36 are waited for: SHOAL_FAULTS keeps a run of these from getting much further.
    """
    wanted, sessions = min(len(events(run, "push_ack")) + pushes, 36), len(events(run, "run_start"))
    with killed_whole(target, run, *more) as process:
        wait_until(lambda: len(events(run, "run_start")) > sessions and process.pid in processes(run), process)
        wait_until(lambda: len(events(run, "push_ack")) >= wanted, process)
    return events(run, "push_ack")


def test_everything_acknowledged_is_there_once_after_kills_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, choose = tmp_path / "run", random.Random(1)
    plans = [f"ps=2,workers=2,async,{CALM}", f"ps=1,workers=2,staleness=2,{CALM}", f"ps=3,workers=2,async,{CALM}"]
    monkeypatch.setenv("SHOAL_FAULTS", held_at(22, 0, 1))
    # Of the first session the log alone tells; then there are checkpoints as often as it goes.
    acknowledged = killed(COUNTED, run, choose.randrange(10, 25), "--plan", plans[0], "--push-log")
    assert [e["step"] for e in events(run, "checkpoint")] == [0]
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    acknowledged = killed(COUNTED, run, choose.randrange(10, 25), "--plan", plans[1], "--resume")
    assert len({(e["epoch"], e["batch"], e["shard"]) for e in acknowledged}) == len(acknowledged)
    # Servers that die on their own, too, after an update came to the log and before the arena says so, and in its midst.
    kills = [(step // 2 % 3, step, phase) for step in range(26, 34, 2) for phase in ("logged", "update")]
    monkeypatch.setenv("SHOAL_FAULTS", ";".join(f"kill(server={n},step={s},phase={p})" for n, s, p in kills))
    train(COUNTED, run, "--plan", plans[2], "--resume")
    counted_job.check(shoal.open(run), events(run, "push_ack"))
    assert {e["role"] for e in events(run, "death")} == {"server"}
    assert [e["epoch"] for e in events(run, "epoch")] == [1, 2, 3]
    sessions = sorted((run / "push-log").iterdir())
    assert len(sessions) == 1 and len(segments(sessions[0], "server-0")) <= 3


def test_sync_goes_on_with_the_same_bits_behind_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plan = noisy_job.make_job(epochs=2), "ps=2,workers=2,sync,threads=1"
    calm = shoal.train(job, plan=plan, run_dir=tmp_path / "calm")
    run = tmp_path / "run"
    target = f"{noisy_job.__file__}:job"
    monkeypatch.setenv("SHOAL_FAULTS", held_at(20, 1))
    killed(target, run, 34, "--plan", plan, "--epochs", "2", "--push-log")
    monkeypatch.delenv("SHOAL_FAULTS")
    train(target, run, "--plan", plan.replace("ps=2", "ps=1"), "--epochs", "2", "--resume")
    resumed = shoal.open(run)
    assert digest(resumed) == digest(calm)
    assert [e["loss"] for e in resumed.history] == pytest.approx([e["loss"] for e in calm.history])
    acks = [(e["epoch"], e["batch"], e["shard"]) for e in events(run, "push_ack")]
    assert sorted(acks) == [(e, b, s) for e in (1, 2) for b in range(1, 14) for s in range(2)]
    assert events(run, "run_start")[-1]["resumed_from"] >= 17


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plan = tmp_path / "run", f"ps=2,workers=2,async,{CALM}"
    monkeypatch.setenv("SHOAL_PUSH_LOG_BYTES", "4000000")
    answer, said = train(COUNTED, run, "--plan", plan, "--push-log", code=1)
    assert "no further push was taken" in said.splitlines()[-1] and answer["exit_code"] == 1
    assert "4000000 bytes are the log's limit" in said
    (failed,) = events(run, "push_log_failed")
    assert failed["server"] in (0, 1) and events(run, "error")[-1]["sentence"] == answer["error"]
    assert 0 < len(events(run, "push_ack")) < 72
    monkeypatch.delenv("SHOAL_PUSH_LOG_BYTES")
    train(COUNTED, run, "--plan", plan, "--resume")
    counted_job.check(shoal.open(run), events(run, "push_ack"))
