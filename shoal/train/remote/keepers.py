"""The processes of a job that torchrun or Slurm has started, as the lead knows them: who of them keeps which server or worker.

Their number is fixed. What each of them keeps (``shoal.train.remote.keeper``) is another process, so a run can have another plan
with them, as long as they are enough: who is not needed keeps nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import RequestError
from shoal.plan import Plan
from shoal.process.messages import SERVER
from shoal.train.remote.keeper import spread
from shoal.train.remote.teams import member_of

Kept = tuple[str, int, int]
"""A role, which one of it, and a term: with a higher one whoever is kept begins anew. No role: nobody is kept."""


def roles(machines: Sequence[str], plan: Plan) -> list[tuple[str, int]]:
    """Of each process of a job, what it is, or keeps: a role, and which one of it; ``machines``: see ``spread``."""
    servers, replicas = servers_of(plan), plan.replicas or 0
    numbers = spread(machines, plan.servers, replicas)
    workers = [member_of(number, plan) for number in range(plan.world_size)]
    everybody = [*((SERVER, number) for number in range(servers)), *workers]
    return [everybody[number] if number < len(everybody) else ("", 0) for number in numbers]


def servers_of(plan: Plan) -> int:
    """How many processes are servers."""
    return plan.servers * (1 + (plan.replicas or 0))


class Keepers:
    """All processes of a job but the first, which is the lead and has server 0 itself."""

    def __init__(self, machines: Sequence[str], plan: Plan) -> None:
        self._machines = tuple(machines)
        self._of: list[Kept] = [(role, number, 0) for role, number in roles(machines, plan)]
        self._left: set[int] = set()

    def keeps(self, place: int) -> Kept:
        """What the process of this number is to keep."""
        return self._of[place] if place < len(self._of) else ("", 0, 0)

    def refuse(self, plan: Plan) -> None:
        """RequestError where a plan takes more processes than there are."""
        wanted, found = servers_of(plan) + plan.world_size, len(self._of)
        if wanted > found:
            raise RequestError(
                f"{plan.brief()} takes {wanted} processes, and torchrun or Slurm has started {found}, whose number cannot "
                "change; ask for fewer, or stop the run, start more, and go on with it by --resume --plan."
            )

    def appoint(self, plan: Plan, only: str = "") -> None:
        """Let all begin anew under a plan; ``only``: those of one role, where the plan stays what it was."""
        for place, (role, number) in enumerate(roles(self._machines, plan)):
            if not only or role == only:
                self._of[place] = (role, number, self._of[place][2] + 1)

    def renew(self, members: Sequence[tuple[str, int]]) -> None:
        """Let those of these roles and numbers begin anew: whoever is there is ended, though it may hear nothing."""
        for place, (role, number, term) in enumerate(self._of):
            if (role, number) in members:
                self._of[place] = (role, number, term + 1)

    def leave(self, place: int) -> None:
        """One is done: the run has ended."""
        self._left.add(place)

    @property
    def have_left(self) -> bool:
        return self._left >= set(range(1, len(self._of)))
