"""A process's line to the lead of its run."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import JobFailed
from shoal.process.failure import Failure
from shoal.ps.endpoint import RunKeys
from shoal.ps.requests import DEADLINE_S, Check, Patience, Requests, Ticket
from shoal.train.remote import words
from shoal.train.remote.answers import check_answer
from shoal.train.remote.words import Ended, Failed, Join, Leave, Placed

LEAD = 0
_SIGN_S = 1.0


@dataclass(frozen=True)
class Meeting:
    """Where the lead of a run is, and the keys that let somebody in; it goes from process to process by hand."""

    address: str
    keys: RunKeys
    deadline_s: float = DEADLINE_S

    def listen_at(self) -> str:
        """Where a process that others speak to listens: as far as the lead does."""
        host = self.address.removeprefix("tcp://").rsplit(":", 1)[0]
        return "tcp://127.0.0.1:*" if host == "127.0.0.1" else "tcp://0.0.0.0:*"

    def own_host(self) -> str:
        """This machine's address as the lead's machine sees it."""
        host, port = self.address.removeprefix("tcp://").rsplit(":", 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return str(probe.getsockname()[0])


class Line(Requests):
    """Asks the lead, one thing at a time."""

    def __init__(self, meeting: Meeting, role: str, rank: int) -> None:
        self.meeting, self.role, self.rank = meeting, role, rank
        # Raises Malformed where what was asked is not answered by what has come.
        self.check: Callable[[msgspec.Struct, Any, Sequence[Any]], None] = check_answer
        super().__init__(
            {LEAD: meeting.address}, meeting.keys, words.decode_answered, lambda _: "the lead of the run",
            Patience(meeting.deadline_s),
        )  # fmt: skip

    def _check_of(self, asked: msgspec.Struct) -> Check:
        return lambda answer, frames: self.check(asked, answer, frames)

    def ask(self, make: Callable[[int], msgspec.Struct], what: str, frames: Sequence[Any] = ()) -> tuple[Any, list[memoryview]]:
        """The answer to a question, and its frames. JobFailed where the run has failed."""
        ticket = self.send(LEAD, make, frames)
        self.wait([ticket], what)
        return ticket.answer, ticket.further

    def look(self, seen: words.Orders | None) -> Ticket:
        """Ask for new orders without waiting for them."""
        return self.send(LEAD, lambda n: words.Look(n, self.role, self.rank, seen))

    def join(self, built: str, address: str = "") -> Placed:
        """Say that this process is there; what it is to do, once it can begin."""
        placed, _ = self.ask(
            lambda n: Join(
                number=n, role=self.role, rank=self.rank, pid=os.getpid(), host=socket.gethostname(), built=built,
                address=address,
            ),
            "the run to begin",
        )  # fmt: skip
        assert isinstance(placed, Placed)
        return placed

    def leave(self, frames: Sequence[Any] = ()) -> tuple[Path, dict[str, Any]]:
        """Say that this process is done, and wait for the run's end: its directory and its summary; ``frames``: see ``Leave``."""
        ended, _ = self.ask(lambda n: Leave(n, self.role, self.rank), "the run's end", frames)
        assert isinstance(ended, Ended)
        return Path(ended.path), json.loads(ended.summary)

    def tell_failure(self, error: BaseException) -> None:
        """Let the lead end the run because of an error here."""
        if isinstance(error, KeyboardInterrupt):
            error = JobFailed(f"{self.role.capitalize()} {self.rank} was interrupted; go on with --resume.")
        failure = Failure.of(error, self.rank)
        self.patience = Patience(deadline_s=10.0)
        self.ask(
            lambda n: Failed(
                number=n, rank=self.rank, kind=failure.kind, sentence=failure.sentence, traceback=failure.traceback_text
            ),
            "the end of the run",
        )


class Signs:
    """Lets the lead hear that a process lives which has nothing else to say."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._ticket: Ticket | None = None
        self._given_at = 0.0

    def give(self) -> None:
        """Say so, about once a second, without waiting for an answer."""
        if time.monotonic() - self._given_at < _SIGN_S:
            return
        self._given_at = time.monotonic()
        self._line.receive(0.0)
        if self._ticket is None or self._ticket.answer is not None:
            self._ticket = self._line.look(None)
        else:
            self._line.again(self._ticket)
