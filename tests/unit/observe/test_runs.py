from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.observe.events import EventLog
from shoal.observe.runs import RunRow, ago, list_runs, supervisor_alive


def make_run(path: Path, started: float, *events: tuple[str, dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    with EventLog(path / "events.jsonl", clock=lambda: started) as log:
        log.write("run_start", job="net", plan="dp=2", run=str(path))
        for kind, fields in events:
            log.write(kind, **fields)
    return path


def write_supervisor(path: Path, pid: int, host: str | None = None) -> None:
    rows = [{"role": "supervisor", "rank": 0, "pid": pid, "host": host or socket.gethostname()}]
    (path / "processes.json").write_text(json.dumps(rows))


EPOCH = ("epoch", {"epoch": 1, "loss": 1.0, "accuracy": 0.5, "eval_loss": 1.5, "eval_accuracy": 0.25, "step": 10})


def test_rows_are_read_from_what_runs_left(tmp_path: Path) -> None:
    make_run(tmp_path / "b", 100.0, EPOCH, ("run_end", {"status": "done", "steps": 12}))
    make_run(tmp_path / "a", 200.0, EPOCH)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").write_text("")
    assert list_runs(tmp_path) == [
        RunRow(
            name="b", job="net", plan="dp=2", status="done", steps=12, metric="eval_accuracy", value=0.25,
            started=100.0, path=str(tmp_path / "b"),
        ),
        RunRow(
            name="a", job="net", plan="dp=2", status="killed", steps=10, metric="eval_accuracy", value=0.25,
            started=200.0, path=str(tmp_path / "a"),
        ),
    ]  # fmt: skip
    assert list_runs(tmp_path / "nowhere") == []


def test_a_resumed_run_is_not_over_because_it_was_once(tmp_path: Path) -> None:
    stopped = ("run_end", {"status": "stopped", "steps": 12})
    make_run(tmp_path / "a", 1.0, stopped, ("run_start", {"job": "net", "plan": "dp=1", "resumed_from": 12}))
    (row,) = list_runs(tmp_path)
    assert (row.status, row.plan, row.steps) == ("killed", "dp=1", 12)


def test_steps_after_the_last_epoch_are_counted(tmp_path: Path) -> None:
    more = [("step", {"step": step, "loss": 1.0, "workers": [{"rank": 0}] * 9}) for step in range(11, 900)]
    run = make_run(tmp_path / "a", 1.0, EPOCH, *more)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"t": 1.0, "kind": "step", "step": 9')
    assert list_runs(tmp_path)[0].steps == 899


def test_a_run_that_died_before_its_first_event(tmp_path: Path) -> None:
    run = tmp_path / "early"
    run.mkdir()
    (run / "job.json").write_text('{"name": "net"}')
    (run / "plan.toml").write_text("dp = 2\nthreads = 1\n")
    (row,) = list_runs(tmp_path)
    assert (row.job, row.plan, row.status, row.started) == ("net", "dp=2,threads=1", "killed", None)


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    make_run(tmp_path / "good", 5.0, EPOCH)
    bad = make_run(tmp_path / "bad", 6.0)
    (bad / "events.jsonl").write_text("nonsense\nnonsense\n")
    assert {row.name: row.status for row in list_runs(tmp_path)} == {"good": "killed", "bad": "damaged"}


def test_a_run_is_running_while_its_supervisor_lives(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1.0)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write_supervisor(run, child.pid)
        assert list_runs(tmp_path)[0].status == "running"
        write_supervisor(run, child.pid, host="another-machine")
        assert not supervisor_alive(run)
        # The same number, but of a process that began long after the file was written: another one.
        write_supervisor(run, child.pid)
        os.utime(run / "processes.json", (1.0, 1.0))
        assert not supervisor_alive(run)
        write_supervisor(run, child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not supervisor_alive(run), "a zombie does not run"
    finally:
        child.kill()
        child.communicate()
    assert not supervisor_alive(run)


def test_a_broken_process_list_is_no_running_run(tmp_path: Path) -> None:
    for text in ("", "{}", '[{"role": "supervisor"}]', '[{"role": "supervisor", "pid": "x"}]', "[3]"):
        (tmp_path / "processes.json").write_text(text)
        assert not supervisor_alive(tmp_path)


@pytest.mark.parametrize(
    ("passed", "text"), [(0, "0 s ago"), (59, "59 s ago"), (61, "1 min ago"), (7300, "2 h ago"), (200_000, "2 d ago")]
)
def test_ago(passed: float, text: str) -> None:
    assert ago(1000.0, 1000.0 + passed) == text
    assert ago(None) == "—"
