"""Run directories: choosing one, claiming it, and what is written there beside events and checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import RunDirectoryError

RUNS = Path("runs")


class RunDirectory:
    """One run's directory, claimed by this process while it runs."""

    def __init__(self, path: Path, held_run: bool = True, made: Sequence[Path] = ()) -> None:
        """``held_run``: a run was here before; ``made``: the folders that were made for this one, innermost first."""
        self.path = path
        self._held_run = held_run
        self._made = tuple(made)
        self.checkpoints = path / "checkpoints"
        self.events = path / "events.jsonl"
        self.model = path / "model"

    @classmethod
    def claim(cls, wanted: Path | None, job_name: str, resume: bool) -> RunDirectory:
        """Choose and make the directory. RunDirectoryError where it is in use, exists already, or cannot be written."""
        path = wanted or (_latest(job_name) if resume else None) or _fresh(job_name)
        held_run = _has_run(path)
        directory = cls(path, held_run, [folder for folder in (path, *path.parents) if not folder.exists()])
        if held_run:
            owner = _owner(path)
            if owner is not None:
                raise RunDirectoryError(
                    f"{path} is in use by process {owner}; wait for it, or choose another directory with --run."
                )
            if not resume:
                raise RunDirectoryError(f"{path} holds a run already; go on with --resume, or choose another --run.")
        try:
            directory.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunDirectoryError(
                f"{path} cannot be written ({error.strerror}); choose another directory with --run."
            ) from None
        return directory

    @staticmethod
    def latest(wanted: Path | None, job_name: str) -> Path | None:
        """Where a run would be gone on with, if there is one."""
        path = wanted or _latest(job_name)
        return path if path is not None and _has_run(path) else None

    def abandon(self) -> None:
        """Remove what this process left here, where no run was before: the request was refused before its first step."""
        if self._held_run:
            return
        if self.path in self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        for file in (self.events, *(self.path / name for name in ("processes.json", "job.json", "plan.toml"))):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in (self.checkpoints, *self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write(self, name: str, text: str) -> None:
        """Write a small file in one move."""
        scratch = self.path / f".{name}.tmp"
        scratch.write_text(text)
        scratch.replace(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, default=str) + "\n")

    def read_json(self, name: str) -> Any:
        """The file's value, or None where it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None

    def release(self, rows: list[Mapping[str, Any]]) -> None:
        """Say that no process is left."""
        self.write_json("processes.json", rows)


def _has_run(path: Path) -> bool:
    return (path / "events.jsonl").exists() or (path / "job.json").exists()


def _fresh(job_name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = RUNS / f"{job_name}-{stamp}"
    number = 2
    while path.exists():
        path = RUNS / f"{job_name}-{stamp}-{number}"
        number += 1
    return path


def _latest(job_name: str) -> Path | None:
    """The newest directory of a run of this job."""
    found = []
    for path in RUNS.glob(f"{job_name}-*") if RUNS.is_dir() else ():
        try:
            if json.loads((path / "job.json").read_text()).get("name") == job_name:
                found.append(path)
        except (OSError, ValueError):
            continue
    return max(found, key=lambda p: (p / "job.json").stat().st_mtime, default=None)


def _owner(path: Path) -> int | None:
    """The supervisor that works in a directory now, if it is still alive on this machine."""
    try:
        rows = json.loads((path / "processes.json").read_text())
    except (OSError, ValueError):
        return None
    for row in rows:
        if row.get("role") == "supervisor" and row.get("host") == socket.gethostname() and row["pid"] != os.getpid():
            try:
                os.kill(int(row["pid"]), 0)
            except OSError:
                continue
            if _is_python(int(row["pid"])):
                return int(row["pid"])
    return None


def _is_python(pid: int) -> bool:
    """Whether a live process may be ours: its number may have been given to something else since."""
    try:
        return (
            b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
            or b"shoal" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    except OSError:
        return True
