"""Bringing a server back that keeps a log: another process takes up the last checkpoint, and does what the log has behind it.

The lead does nothing else meanwhile, so that it may be done wherever it waits for that server; what others ask is kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from shoal.errors import RequestError, WorkerLostError
from shoal.ps.applied import PushId
from shoal.ps.client import Client, Patience
from shoal.ps.logged import Mark, Recover
from shoal.ps.requests import Damaged
from shoal.train.recorder import Emit
from shoal.train.remote import words
from shoal.train.remote.desk import Asked, Desk
from shoal.train.remote.line import Meeting
from shoal.train.remote.log import RemoteLog
from shoal.train.remote.members import MOST_DEATHS, START_S, Members
from shoal.train.remote.state import kept_of
from shoal.train.update_log import log_name

_SEEN_S = 10.0
_POLL_S = 0.02


class Recovery:
    """Looks after the servers' logs.

    Args:
        settled_at: the first push behind a step.

    Attributes:
        backlog: what was asked while a server was brought back.
        seconds: what the parts of the last recovery took.
    """

    def __init__(
        self, desk: Desk, members: Members, meeting: Meeting, log: RemoteLog, settled_at: Callable[[int], PushId], emit: Emit
    ) -> None:  # fmt: skip
        self._desk, self._members, self._meeting = desk, members, meeting
        self._log, self._settled_at, self._emit = log, settled_at, emit
        self.backlog: list[Asked] = []
        self.seconds: dict[str, float] = {}
        # By the step of a checkpoint: how many updates each server had made when it was written.
        self._versions: dict[int, dict[int, int]] = {}
        self._deaths: Counter[int] = Counter()

    def begin(self, client: Client, versions: Mapping[int, int] | None = None) -> None:
        """The servers have what the session begins with: let them write their logs from here on.

        ``versions``: how many updates each of them has made by then, where that is not one a step.
        """
        mark, session = self._log.baselines[-1].step, self._log.directory.name
        self._versions = {} if versions is None else {mark: dict(versions)}
        for server in client.places:
            client.wait([client.send(server, lambda n: Recover(n, mark, session=session))], "a server to begin its log")
        deadline = time.monotonic() + _SEEN_S
        for server in client.places:
            while not (self._log.directory / f"{log_name(server)}.here").exists():
                if time.monotonic() > deadline:
                    raise RequestError(
                        f"Server {server} keeps its log in {self._log.directory} of its own machine, which the first process "
                        "does not see; choose a --run that all machines share, or leave --push-log out."
                    )
                time.sleep(_POLL_S)
        # Not earlier: on a disk of the network a file that is open and was deleted elsewhere can no longer be written.
        self._log.begun()

    def checkpointed(self, client: Client, versions: Mapping[int, int]) -> None:
        """A checkpoint holds all that the servers have, and nobody works."""
        mark = self._log.baselines[-1].step
        kept = {found.step for found in self._log.baselines}
        self._versions = {step: made for step, made in self._versions.items() if step in kept} | {mark: dict(versions)}
        client.wait([client.send(s, lambda n: Mark(n, mark)) for s in client.places], "a server to go on with its log")

    def heard(self) -> None:
        """All servers have done something."""
        self._deaths.clear()

    def bring_back(self, rank: int, take: Callable[[Asked], None]) -> str:
        """Start a server again that has died, or let its keeper do so; its address.

        Args:
            take: hears what it asks, and answers; and what its keeper says.

        Raises:
            WorkerLostError: it dies always, or does not come.
        """
        while True:
            self._deaths[rank] += 1
            if self._deaths[rank] > MOST_DEATHS:
                raise WorkerLostError(
                    f"Server {rank} died {self._deaths[rank]} times without having done anything; what was acknowledged is in "
                    "its log: see what kills it, and go on with --resume."
                )
            self._members.of.pop(("server", rank), None)
            if self._members.is_own("server", rank):
                self._members.start("server", rank)
            address = self._await(rank, take)
            if address is not None and self._fill(rank, address, take):
                return address

    def _await(self, rank: int, take: Callable[[Asked], None]) -> str | None:
        """Where a server is that was started, once it is there; None where it has died."""
        deadline = time.monotonic() + START_S
        # Its keeper may have started it while another server was brought back.
        for asked in [asked for asked in self.backlog if _joins(asked, rank)]:
            self.backlog.remove(asked)
            take(asked)
        while (member := self._members.of.get(("server", rank))) is None or not member.joined:
            self._hear(rank, take, _POLL_S)
            if self._is_dead(rank):
                return None
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"Server {rank} has not come back within {START_S:.0f} s; what was acknowledged is in its log: go on with "
                    "--resume."
                )
        return member.address

    def _hear(self, rank: int, take: Callable[[Asked], None], timeout_s: float) -> None:
        """Hear a server that comes back, and of those who have died; what others ask is kept."""
        for asked in self._desk.receive(timeout_s):
            if isinstance(asked.said, words.Gone) or _joins(asked, rank):
                take(asked)
            else:
                self.put_off(asked)

    def put_off(self, asked: Asked) -> None:
        """Somebody lives and asks something, which is heard when the lead waits for no server."""
        self._members.hear(getattr(asked.said, "role", "worker"), getattr(asked.said, "rank", -1))
        self.backlog.append(asked)

    def _is_dead(self, rank: int) -> bool:
        member = self._members.of.get(("server", rank))
        if member is None:
            return False
        return bool(member.died) or (member.process is not None and member.process.poll() is not None)

    def _fill(self, rank: int, address: str, take: Callable[[Asked], None]) -> bool:
        """Let a server have what it has lost; False where it has died meanwhile."""

        class Died(Exception):
            pass

        def look() -> None:
            self._hear(rank, take, 0.0)
            if self._is_dead(rank):
                raise Died

        client = Client({rank: address}, self._meeting.keys, Patience(deadline_s=self._meeting.deadline_s), look)
        try:
            self.seconds = self._go_on(client, rank)
        except Died:
            return False
        finally:
            client.close()
        return True

    def _go_on(self, client: Client, rank: int) -> dict[str, float]:
        """Let a server go on from the newest checkpoint that is whole and what its log has behind that; what it took."""
        log, damage = self._log, ""
        mark = log.baselines[-1].step
        for found in reversed(log.baselines):
            version = self._versions.get(found.step, {}).get(rank, found.step)
            kept = kept_of(version, self._settled_at(found.step), log.ahead_ids)
            asked = partial(Recover, mark=mark, checkpoint=log.name_of(found), since=found.step, kept=kept)
            ticket = client.send(rank, asked)
            try:
                client.wait([ticket], "a server to do again what its log has")
            except Damaged as error:
                damage = str(error)
                self._emit("checkpoint_damaged", path=str(found.path), reason=damage)
                continue
            return dict(getattr(ticket.answer, "seconds", {}))
        raise WorkerLostError(
            f"Server {rank} died, and there is no whole checkpoint for another one to begin with ({damage}), without which its "
            "log is of no use; put back what was changed, and go on with --resume."
        )


def _joins(asked: Asked, rank: int) -> bool:
    """Whether a server of this rank says that it is there."""
    said = asked.said
    return isinstance(said, words.Join) and (said.role, said.rank) == ("server", rank)
