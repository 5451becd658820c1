"""What stands, in a lead, where a session expects processes of an arena."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from shoal.train.host import TrainHost
from shoal.train.remote.members import Members
from shoal.train.remote.nursery import Nursery, here
from shoal.train.update import WholeUpdater


class Groups(WholeUpdater):
    """What a schedule tells the hyperparameters; nothing is updated here."""

    def __init__(self) -> None:
        self.groups: Sequence[dict[str, Any]] | None = None

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups = groups

    def memory(self) -> dict[str, Any]:
        return {"state": {}, "common": {}, "groups": []}

    def remember(self, memory: dict[str, Any]) -> None:
        """What servers keep is in their state."""


class InLead:
    """The built job inside the lead, where a session expects a template's supervisor."""

    def __init__(self, host: TrainHost, members: Members, nursery: Nursery) -> None:
        self._host, self._members, self._nursery = host, members, nursery

    def call(self, method: str, *arguments: Any, timeout_s: float = 0.0) -> Any:
        if method == "describe_aside":
            # This process has threads, and sockets that a fork of it would share.
            return self._nursery.describe(self._host, timeout_s)
        return getattr(self._host, method)(*arguments)

    def processes(self) -> list[dict[str, Any]]:
        name = socket.gethostname()
        return self._members.rows({"role": "supervisor", "rank": 0, "pid": os.getpid(), "host": name}, *here(self._nursery, name))
