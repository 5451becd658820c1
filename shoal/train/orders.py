"""Asking a running run to change its plan: a file that the command leaves in the run directory, and one with the answer.

Whoever may write in the directory as its owner may ask. The supervisor looks for requests between steps, and answers when the
change is made or refused; a request that a dead supervisor has left is removed when the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import DeadlineError, RequestError, TargetError
from shoal.observe.runs import is_run, supervisor_alive

_REQUEST, _ANSWER = ".request", ".answer"
_LOOK_EVERY_S = 0.2
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Asked:
    """A plan string that was asked for, and where the answer goes."""

    plan: str
    path: Path


class Inbox:
    """The supervisor's side."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._looked_at = 0.0
        for path in [*directory.glob(f"replan-*{_REQUEST}"), *directory.glob(f"replan-*{_ANSWER}")]:
            path.unlink(missing_ok=True)

    def next(self) -> Asked | None:
        """The oldest request that is waiting; looks a few times a second."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return None
        self._looked_at = now
        try:
            waiting = sorted(entry.name for entry in os.scandir(self._directory) if entry.name.endswith(_REQUEST))
        except OSError:
            return None
        for name in waiting:
            path = self._directory / name
            text = _read_own(path)
            path.unlink(missing_ok=True)
            if text is not None:
                return Asked(text, path.with_suffix(_ANSWER))
        return None

    def answer(self, asked: Asked, **fields: Any) -> None:
        """Say what has become of a request."""
        # Who asked may have gone, and the disk be full: neither is a reason to end a run.
        with contextlib.suppress(OSError):
            scratch = asked.path.with_suffix(".tmp")
            scratch.write_text(json.dumps(fields))
            scratch.replace(asked.path)

    def close(self, why: str) -> None:
        """Refuse whatever has come too late."""
        self._looked_at = 0.0
        while (asked := self.next()) is not None:
            self.answer(asked, error=why)
            self._looked_at = 0.0


def _read_own(path: Path) -> str | None:
    """What a request says, if it is a file of whoever this process runs as."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > _MOST_BYTES:
            return None
        return file.read().decode(errors="replace")


def ask(run: Path, plan: str, deadline_s: float) -> dict[str, Any]:
    """Ask a running run for another plan and wait until it has it: ``step``, ``before``, ``plan``, ``pause_s``.

    Raises:
        TargetError: there is no run there, or none that is running on this machine.
        RequestError: it says no.
        DeadlineError: it has not said anything for so long.
    """
    if not is_run(run):
        raise TargetError(f"{run} is no run directory; give the one that shoal train named.")
    if not supervisor_alive(run):
        raise TargetError(
            f"{run} is not running; go on with it under the plan by shoal train … --run {run} --resume --plan {plan}."
        )
    if not _has_template(run):
        raise RequestError(
            f"{run} was started by torchrun or trains on GPUs, and its plan cannot change meanwhile; stop it, and go on with it "
            f"by --resume --plan {plan}."
        )
    request = run / f"replan-{time.time_ns()}-{uuid.uuid4().hex}{_REQUEST}"
    answer = request.with_suffix(_ANSWER)
    scratch = request.with_suffix(".tmp")
    try:
        scratch.write_text(plan)
        scratch.replace(request)
    except OSError as error:
        raise RequestError(f"{run} cannot be written ({error.strerror}); ask as the user whose run it is.") from None
    try:
        return _await(run, answer, deadline_s)
    finally:
        for path in (scratch, request, answer):
            path.unlink(missing_ok=True)


def _has_template(run: Path) -> bool:
    """Whether workers are forked from a template there; true as long as there are none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        roles = {row["role"] for row in json.loads((run / "processes.json").read_text())}
        return "worker" not in roles or "template" in roles
    return True


def _await(run: Path, answer: Path, deadline_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + deadline_s
    while True:
        alive = supervisor_alive(run)
        with contextlib.suppress(OSError):
            found: dict[str, Any] = json.loads(answer.read_text())
            if "error" in found:
                raise RequestError(str(found["error"]))
            return found
        if not alive:
            raise RequestError(f"{run} ended before it had changed its plan; see its events.jsonl.")
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"{run} has not answered for {deadline_s:g} s; a step may take that long, and the change still come: see the "
                "event replan in its events.jsonl."
            )
        time.sleep(0.1)
