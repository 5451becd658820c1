"""Servers with a log or with copies are killed at every point of a change of plan, and every acknowledged push counts once.

This file is also a script that trains, changes its plan, and kills itself with all of its processes: see ``script``.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from noisy_job import events, kill, processes
from replans import Strikes, changing, check_counted, counted

import shoal
from shoal.errors import WorkerLostError
from shoal.plan import Plan
from shoal.train.remote.elastic import ElasticLead


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "1000")
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")


LOGGED = {
    3: "ps=2,workers=2,async", 7: "ps=3,workers=1,async", 11: "ps=1,workers=2,async", 15: "ps=2,workers=2,async",
    19: "ps=3,workers=4,staleness=2", 23: "ps=2,workers=2,sync", 27: "ps=2,workers=1,sync", 30: "ps=3,workers=2,async",
}  # fmt: skip
KILLED = [("secure", 0), ("leave", 1), ("hand", 2), ("come", 1), ("part", 1), ("log", 0), ("part", 1), None]


def script(run: Path) -> None:
    """Train with a log, with servers killed in every change of plan but the last one, and kill everything soon after that."""
    wanted = changing(LOGGED)

    def on_event(event: dict[str, Any]) -> Plan | None:
        if event["kind"] == "step" and event["step"] == 33:
            print(json.dumps(strikes.pids), flush=True)
            for pid in (*set(processes(run)) - {os.getpid()}, os.getpid()):
                kill(pid)
        return wanted(event)

    with pytest.MonkeyPatch.context() as patch:
        strikes = Strikes(patch, KILLED)
        shoal.train(counted(), plan="ps=1,workers=2,async,threads=1", run_dir=run, push_log=True, on_event=on_event)


def test_servers_with_a_log_come_back_wherever_in_a_change_they_are_killed_and_when_all_are(tmp_path: Path) -> None:
    run = tmp_path / "run"
    paths = os.pathsep.join(str(path) for path in (Path(shoal.__file__).parents[1], Path(__file__).parents[1] / "helpers"))
    own = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__, str(run)], capture_output=True, text=True, env=own, timeout=250)
    assert done.returncode == -9, done.stderr
    # What a plan has logged is in the checkpoint with which the next one begins.
    assert [e["step"] for e in events(run, "checkpoint")] == [0, *LOGGED] == [0, *(e["step"] for e in events(run, "replan"))]
    assert len([*(run / "push-log").iterdir()]) == 1
    pids = json.loads(done.stdout.splitlines()[-1])
    assert [e["pid"] for e in events(run, "death") if e["role"] == "server"] == pids and len(pids) == len(KILLED) - 1
    # Who was to leave comes back nowhere; all others do.
    assert [(e["rank"], e["action"]) for e in events(run, "recovered") if e["role"] == "server"] == [
        (0, "replayed"), (1, "given"), (1, "given"), (1, "given"), (0, "replayed"), (1, "given"),
    ]  # fmt: skip
    # Of each push the log knows that was acknowledged, and of no other, on any number of servers.
    found = shoal.train(counted(), plan="ps=2,workers=2,async,threads=1", run_dir=run, resume=True)
    assert events(run, "run_start")[-1]["resumed_from"] >= 33
    workers = [2] * 7 + [1] * 4 + [2] * 8 + [4] * 4 + [2] * 4 + [1] * 3 + [2] * 6
    check_counted(found, workers, [23 <= step < 30 for step in range(36)])


def test_servers_with_copies_go_on_wherever_in_a_change_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, last_one, full = tmp_path / "run", ElasticLead._write_alone, []

    def write(lead: ElasticLead, step: int) -> None:
        if step == 31 and not full:
            full.append(step)
            raise OSError(errno.ENOSPC, "No space left on device")
        last_one(lead, step)

    monkeypatch.setattr(ElasticLead, "_write_alone", write)
    changes = {
        3: "ps=2,workers=2", 7: "ps=2,workers=4", 11: "ps=3,workers=2", 16: "ps=2,workers=1", 21: "ps=1,workers=2",
        26: "ps=2,workers=2", 31: "ps=1,workers=4",
    }  # fmt: skip
    # After the second change the copy of a shard answers for it, and the one that came back is its copy, or not yet.
    strikes = Strikes(monkeypatch, [("hand", 0), ("leave", 0), ("copy", 4), ("part", 0), None, ("leave", 1)])
    plan = "ps=1,workers=2,async,replicas=1,threads=1"
    found = shoal.train(counted(), plan=plan, run_dir=run, on_event=changing(changes))
    told = events(run, "replan")
    assert [e["step"] for e in told] == [*changes][:-1] and all("replicas=1" in e["plan"] for e in told)
    assert [e["text"] for e in events(run, "warning") if "make room" in e["text"]]
    assert {e["action"] for e in events(run, "recovered")} == {"given", "copied"}
    workers = [2] * 7 + [4] * 4 + [2] * 5 + [1] * 5 + [2] * 15
    check_counted(found, workers)
    assert [e["pid"] for e in events(run, "death") if e["role"] == "server"] == strikes.pids


def test_without_log_and_copies_one_that_has_just_come_may_be_killed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    strikes = Strikes(monkeypatch, [("come", 1), ("part", 0)])
    changes = {2: "ps=2,workers=2", 4: "ps=1,workers=2"}
    with pytest.raises(WorkerLostError, match="Server 0 died .*gone with it; go on with --resume"):
        shoal.train(counted(), plan="ps=1,workers=2,async,threads=1", run_dir=run, on_event=changing(changes))
    assert [e["step"] for e in events(run, "replan")] == [2] and len(strikes.pids) == 2
    assert [e["rank"] for e in events(run, "recovered")] == [1]


if __name__ == "__main__":
    script(Path(sys.argv[1]))
