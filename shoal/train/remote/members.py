"""The processes of a run as its lead knows them: which it has started itself, who has joined, and who is gone."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.process.messages import WORKER
from shoal.train.remote.bond import LOST
from shoal.train.remote.nursery import Process

SILENCE = "silence"
WENT_TOO = f"exit code {LOST}"
"""The end of a process of a worker another one of which has gone."""
START_S = 300.0
"""So long may a process take until it is there."""
MOST_DEATHS = 5
"""So often may one process, or one worker, die without having come any further in between."""

Known = tuple[str, int, str, int]
"""A process by its role and rank, its host, and its number there."""
Start = Callable[[str, int], Process]
"""Starts the process of a role and a rank."""


@dataclass
class Member:
    """A process.

    ``heard_at``: when it last said something; ``missed``: whether it was named for being silent since; ``process``: where
    the lead has started it; ``died``: of what, as its keeper says; ``identity``: the name that it asks under.
    """

    role: str
    rank: int
    pid: int
    host: str = ""
    address: str = ""
    heard_at: float = 0.0
    missed: bool = False
    joined: bool = False
    left: bool = False
    process: Process | None = None
    died: str = ""
    identity: bytes = b""

    def is_process(self, pid: int, host: str) -> bool:
        """Whether it is this one; of one that the lead has started and that has not joined there is no host."""
        return self.pid == pid and (self.host == host or (self.process is not None and not self.joined))

    @property
    def machine(self) -> str:
        """Its host; those that the lead has started are where it is itself, and say so when they join."""
        return self.host or socket.gethostname()

    @property
    def is_over(self) -> bool:
        """Whether the lead has seen its process end."""
        return self.process is not None and self.process.poll() is not None


@dataclass(frozen=True)
class Lost:
    """Somebody who is gone, and by what; ``returns``: whoever keeps it starts another one."""

    member: Member
    cause: str
    returns: bool = False

    @property
    def dead(self) -> bool:
        """Whether it can say nothing any more."""
        return self.cause != SILENCE or self.member.process is not None


def _cause_of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class Members:
    """All processes but the lead's own.

    Args:
        own: the (role, rank) of those that the lead starts, and starts again.
    """

    def __init__(self, start: Start, own: Sequence[tuple[str, int]]) -> None:
        self._start = start
        self._own = tuple(own)
        self.of: dict[tuple[str, int], Member] = {}
        # By role, rank, host and number: on two machines processes may have the same number, and in containers they often do.
        self._gone: set[Known] = set()
        # All who have ever joined.
        self._joined: set[Known] = set()
        self.changed = True

    def begin(self) -> None:
        for role, rank in self._own:
            self.start(role, rank)

    @property
    def are_own(self) -> bool:
        """Whether the lead has started all of them, and can start others."""
        return all(member.process is not None for member in self.of.values())

    def let_be(self, own: Sequence[tuple[str, int]]) -> None:
        """Those that the lead starts again are others now; nobody is started or ended here."""
        self._own = tuple(own)

    @property
    def has_workers(self) -> bool:
        """Whether a worker is there that has not left."""
        return any(m.role == WORKER and m.joined and not m.left and not m.is_over for m in self.of.values())

    def forget(self, role: str, rank: int) -> None:
        """Somebody has gone who was to go; what it may still have said is not heard."""
        member = self.of.pop((role, rank), None)
        if member is not None:
            self._gone.add((role, rank, member.machine, member.pid))
        self.changed = True

    def start(self, role: str, rank: int) -> Member:
        """Start a process, or start it again."""
        process = self._start(role, rank)
        found = self.of[role, rank] = Member(role, rank, process.pid, heard_at=time.monotonic(), process=process)
        self.changed = True
        return found

    def is_own(self, role: str, rank: int) -> bool:
        """Whether the lead starts this one again."""
        return (role, rank) in self._own

    def join(self, role: str, rank: int, pid: int, host: str, address: str, identity: bytes) -> Member:
        """Somebody is there."""
        found = self.of.get((role, rank))
        if found is None or not found.is_process(pid, host):
            found = self.of[role, rank] = Member(role, rank, pid)
        found.host, found.address, found.joined, found.heard_at = host, address, True, time.monotonic()
        found.identity, found.missed = identity, False
        self._joined.add((role, rank, host, pid))
        self.changed = True
        return found

    def hear(self, role: str, rank: int) -> None:
        """Somebody has said something."""
        if (role, rank) in self.of:
            member = self.of[role, rank]
            member.heard_at, member.missed = time.monotonic(), False

    def leave(self, role: str, rank: int) -> None:
        """Somebody is done."""
        if (role, rank) in self.of:
            self.of[role, rank].left = True

    def gone(self, role: str, rank: int, pid: int, host: str, cause: str) -> bool:
        """Somebody has died who was started elsewhere; perhaps before what it said itself was heard. Whether it had joined."""
        member = self.of.get((role, rank))
        if member is not None and member.is_process(pid, host):
            member.died = cause
        else:
            self._gone.add((role, rank, host, pid))
        return (role, rank, host, pid) in self._joined

    def was_gone(self, role: str, rank: int, pid: int, host: str) -> bool:
        """Whether it was said that this one has died, before it was there."""
        return (role, rank, host, pid) in self._gone

    def lost(self, silent_s: Callable[[Member], float]) -> list[Lost]:
        """Take those out who have died, or have said nothing for longer than ``silent_s``."""
        found = []
        for key, member in list(self.of.items()):
            cause = member.died
            code = None if member.process is None else member.process.poll()
            if member.left or (code == 0 and member.joined):
                continue
            if code is not None:
                cause = _cause_of(code)
            elif not cause and member.joined and time.monotonic() - member.heard_at > silent_s(member):
                cause = SILENCE
                if member.process is not None:
                    member.process.kill()
            if cause:
                del self.of[key]
                self.changed = True
                found.append(Lost(member, cause, bool(member.died)))
        # Who went because another one had is of no interest where that one is there.
        return sorted(found, key=lambda lost: lost.cause == WENT_TOO)

    def ended(self, member: Member) -> Lost | None:
        """What is known of the end of one that the lead has started; None while it is alive."""
        code = None if member.process is None else member.process.poll()
        return None if code is None else Lost(member, _cause_of(code))

    def missed(self, silent_s: float) -> list[Member]:
        """Who has said nothing for longer than this; each once, until it is heard again."""
        now = time.monotonic()
        found = [m for m in self.of.values() if m.joined and not m.left and not m.missed and now - m.heard_at > silent_s]
        for member in found:
            member.missed = True
        return found

    def joined(self, role: str) -> list[Member]:
        return [m for m in self.of.values() if m.role == role and m.joined]

    def rows(self, lead: dict[str, Any], *further: dict[str, Any]) -> list[dict[str, Any]]:
        """What ``processes.json`` holds."""
        self.changed = False
        members = [{"role": m.role, "rank": m.rank, "pid": m.pid, "host": m.host or lead["host"]} for m in self.of.values()]
        return [lead, *further, *sorted(members, key=lambda row: (row["role"], row["rank"]))]
