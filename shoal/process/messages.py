"""What the supervisor and the template say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WORKER, SERVER, PARTNER = "worker", "server", "partner"
"""The roles of a training run's processes. A partner is one of those that make up a worker and share no memory, but its head."""


@dataclass(frozen=True)
class Load:
    """Make the host: ``entry`` is "module:class", called with what ``payload`` is the pickle of."""

    entry: str
    payload: bytes
    sys_path: tuple[str, ...]
    cwd: str


@dataclass(frozen=True)
class Call:
    """Call a method of the host; descriptors that came along are passed as ``fds``."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Returned:
    """The result of Load or Call."""

    value: Any


@dataclass(frozen=True)
class Fork:
    """Fork a standby."""


@dataclass(frozen=True)
class Forked:
    """A standby is there; its channel and its stack file come as descriptors. Or a template, without any."""

    pid: int


@dataclass(frozen=True)
class Grow:
    """Fork a template, which obeys whoever has the other end of the descriptor that came along; answered by Forked."""

    gentle: bool


@dataclass(frozen=True)
class Exited:
    """A child is gone, with its wait status."""

    pid: int
    status: int


@dataclass(frozen=True)
class Assign:
    """Sent to a standby: your role from now on."""

    role: str
    rank: int
    incarnation: int
