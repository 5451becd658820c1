"""A process of a job that torchrun or Slurm has started, and that keeps a server or a worker of a run alive.

Such a job ends when one of its processes does. So who serves or works is another process, which this one has started: when that
dies this one says so to the lead, which needs not wait for its silence, and starts another one. It is so where nothing that was
acknowledged goes with a server: with copies, or a log.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import WorkerLostError
from shoal.ps.messages import Refused
from shoal.ps.requests import Ticket
from shoal.train.remote import words
from shoal.train.remote.line import LEAD, Line
from shoal.train.remote.members import MOST_DEATHS
from shoal.train.remote.nursery import Nursery, Process

ROLE = "keeper"
_WHOLE_S = 60.0
_END_S = 10.0
_POLL_S = 0.02


def spread(machines: Sequence[str], servers: int, replicas: int) -> tuple[int, ...]:
    """Of each process of a job the number of its server, or servers · (1 + replicas) + the rank of its worker.

    Those that hold the same shard are on different machines as far as there are machines for it; the first process is always
    server 0, and workers follow in order.

    Args:
        machines: of each process, the name of its machine.
    """
    count = servers * (1 + replicas)
    placed: dict[int, int] = {}
    for number in range(count):
        taken = {machines[rank] for rank, other in placed.items() if other % servers == number % servers}
        free = [rank for rank in range(len(machines)) if rank not in placed]
        placed[next((rank for rank in free if machines[rank] not in taken), free[0])] = number
    workers = iter(range(count, len(machines)))
    return tuple(placed[rank] if rank in placed else next(workers) for rank in range(len(machines)))


class Keeper:
    """Starts a process, and starts it again when it has died: not for ever where it dies at once each time."""

    def __init__(self, nursery: Nursery, line: Line, role: str, number: int) -> None:
        self._nursery, self._line, self._role, self._number = nursery, line, role, number
        self._term = 0
        self._process: Process | None = None
        self._started_at = 0.0
        self._deaths = 0
        # The words of its death, and of its predecessors'; and whether these have ended for another one to come.
        self._told: list[Ticket] = []
        self._turned = False

    def start(self) -> None:
        if self._role:
            self._process = self._nursery.start(self._role, self._number)
            self._started_at = time.monotonic()

    def turn_to(self, role: str, number: int, term: int) -> None:
        """Keep another one where the term is another; whoever there is ends, for the run's plan has changed."""
        if term == self._term:
            return
        process, self._process = self._process, None
        if process is not None:
            deadline = time.monotonic() + _END_S
            if process.poll() is None:
                process.kill()
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            self._tell(process)
        self._role, self._number, self._term, self._deaths, self._turned = role, number, term, 0, True
        if not self._told:
            self.start()

    def attend(self) -> None:
        """Several times a second: see whether it lives, and whether the lead knows that it has died."""
        if self._told:
            for ticket in self._told:
                self._line.again(ticket)
            if all(ticket.answer is not None for ticket in self._told):
                answers, self._told = [ticket.answer for ticket in self._told], []
                self._go_on(answers)
            return
        process = self._process
        code = process.poll() if process is not None else None
        if process is None or not code:
            return
        if time.monotonic() - self._started_at > _WHOLE_S:
            self._deaths = 0
        self._deaths += 1
        self._process, self._turned = None, False
        self._tell(process)

    def _go_on(self, answers: Sequence[Any]) -> None:
        """The lead knows of a death: start another one, unless it is not missed, as when the run has ended."""
        if any(isinstance(answer, words.Heard) and answer.counts for answer in answers):
            self._deaths = 0
        missed = not any(isinstance(answer, Refused) for answer in answers)
        if missed and self._deaths >= MOST_DEATHS:
            raise WorkerLostError(
                f"{self._role.capitalize()} {self._number} died {self._deaths} times before it had begun; see what kills it, "
                "and go on with --resume."
            )
        if self._turned or missed:
            self.start()

    def _tell(self, process: Process) -> None:
        """Say that it has died, unless it had ended by itself."""
        role, rank, host, code = self._role, self._number, socket.gethostname(), process.poll()
        if code:
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._told.append(self._line.send(LEAD, lambda n: words.Gone(n, role, rank, process.pid, host, cause)))

    def see_end(self) -> None:
        """The run has ended: wait a moment until the process has, too, or the lead knows that it did not come to that."""
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline and (self._told or self._is_at_work()):
            self._line.receive(_POLL_S)
            self.attend()

    def _is_at_work(self) -> bool:
        return self._process is not None and self._process.poll() != 0


def keep(nursery: Nursery, role: str, number: int, place: int) -> tuple[Path, dict[str, Any]]:
    """Keep the server or the worker of this number until the run has ended; the run's directory and its summary.

    ``place``: which process of the job this is. The lead may let it keep another one as the plan changes.
    """
    line = Line(nursery.meeting, ROLE, place)
    try:
        nursery.ready()
        keeper = Keeper(nursery, line, role, number)
        keeper.start()
        line.while_waiting = keeper.attend
        orders: words.Orders | None = None
        while orders is None or not orders.over:
            ticket = line.look(orders)
            line.wait([ticket], "the run to go on")
            orders = ticket.answer.orders
            if not orders.over:
                keeper.turn_to(*orders.keeps)
        ended = line.leave()
        keeper.see_end()
        return ended
    except BaseException as error:
        line.while_waiting = lambda: None
        line.tell_failure(error)
        raise
    finally:
        line.close()
