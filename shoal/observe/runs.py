"""The runs in a directory, read from what each left behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.errors import RunDirectoryError, ShoalError
from shoal.observe.events import read_events
from shoal.observe.lines import epoch_values
from shoal.plan import Plan

EVENTS_FILE = "events.jsonl"
_TAIL_BYTES = 1 << 16
_TOLD = ("run_start", "plan", "replan", "epoch", "checkpoint", "stop", "run_end")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run.

    Attributes:
        name: the directory's name.
        job, plan: what was trained and how; '' where the run did not get as far as to say.
        status: "running", "done", "stopped", "failed", or "killed" where it ended without a word.
        steps: the last step known of.
        metric, value: the last evaluation metric (the loss where there is no other), or None.
        started: seconds since 1970, or None.
        path: the directory.
    """

    name: str
    job: str
    plan: str
    status: str
    steps: int
    metric: str | None
    value: float | None
    started: float | None
    path: str

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


def list_runs(root: str | os.PathLike[str]) -> list[RunRow]:
    """Return the runs directly under ``root``, oldest first; none where it does not exist.

    A directory is a run if it holds job.json or events.jsonl. One that cannot be read is listed as "damaged".
    """
    base = Path(root)
    if not base.is_dir():
        return []
    rows = [read_run(path) for path in sorted(base.iterdir()) if is_run(path)]
    return sorted(rows, key=lambda row: (row.started or 0.0, row.name))


def is_run(path: Path) -> bool:
    """Tell whether a directory looks like a run."""
    return (path / EVENTS_FILE).is_file() or (path / "job.json").is_file()


def read_run(path: Path) -> RunRow:
    """Return the row of one run directory."""
    told: dict[str, dict[str, Any]] = {}
    started, steps, status = None, 0, ""
    metric: tuple[str, float | None] | None = None
    try:
        for event in read_events(path / EVENTS_FILE, _TOLD) if (path / EVENTS_FILE).is_file() else ():
            told[event["kind"]] = event
            if event["kind"] == "run_start":
                started = event["t"] if started is None else started
                status = ""  # resumed: what an earlier end said no longer holds
                told.pop("replan", None)
            steps = max(steps, event.get("step") or event.get("steps") or 0)
            metric = _metric(event) or metric if event["kind"] == "epoch" else metric
            status = event["status"] if event["kind"] == "run_end" else status
        steps = max(steps, _last_step(path / EVENTS_FILE))
    except (RunDirectoryError, KeyError):
        status = "damaged"
    if supervisor_alive(path):
        status = "running"
    start, described = told.get("run_start", {}), _json(path / "job.json")
    return RunRow(
        name=path.name,
        job=str(start.get("job") or described.get("name") or ""),
        plan=str((told.get("replan") or told.get("plan", {})).get("plan") or start.get("plan") or _plan_of(path)),
        status=status or "killed",
        steps=steps,
        metric=metric[0] if metric else None,
        value=metric[1] if metric else None,
        started=started,
        path=os.fspath(path),
    )


def supervisor_alive(path: Path) -> bool:
    """Tell whether the supervisor named in a run's processes.json still runs on this machine."""
    import psutil

    file = path / "processes.json"
    try:
        written = file.stat().st_mtime
        processes = json.loads(file.read_text())
        supervisors = [p for p in processes if p["role"] == "supervisor" and p.get("host") in _own_hosts()]
        for supervisor in supervisors:
            process = psutil.Process(int(supervisor["pid"]))
            # A process that is younger than the file only has the number of the one that was meant.
            if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written + 1.0:
                return True
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False
    return False


def ago(started: float | None, now: float | None = None) -> str:
    """Return when that was, for people, as in '5 min ago'."""
    if started is None:
        return "—"
    passed = max(0, int((time.time() if now is None else now) - started))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= length:
            return f"{passed // length} {unit} ago"
    return f"{passed} s ago"


def _last_step(file: Path) -> int:
    """The number of the last step event, looked for at the file's end: steps are most of a file."""
    if not file.is_file():
        return 0
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        tail = stream.read().split(b"\n")
    for line in reversed(tail):
        # The first line and the last may be parts of one, which are no JSON.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(line)
            if found["kind"] == "step":
                return int(found["step"])
    return 0


def _metric(entry: Mapping[str, Any]) -> tuple[str, float | None] | None:
    evaluated = {name: value for name, value in epoch_values(entry).items() if name.startswith("eval_")}
    for name, value in evaluated.items():
        if name != "eval_loss":
            return name, value
    return ("eval_loss", evaluated["eval_loss"]) if "eval_loss" in evaluated else None


def _own_hosts() -> tuple[str | None, ...]:
    return (None, "", "localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plan_of(path: Path) -> str:
    """The plan of a run that died before its first event."""
    try:
        return str(Plan.from_toml((path / "plan.toml").read_text()))
    except (OSError, ValueError, ShoalError):
        return ""
