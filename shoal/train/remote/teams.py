"""Workers that are several processes each, where no memory is shared: tp × pp of them, each with a part of the model.

To the lead and to the servers such a worker is one: its *head* asks for units, pulls and pushes for all. Its *partners* hear of
the head what to compute. They begin together, and where one of them is lost the worker is.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from shoal.axes.pipeline_schedule import rank_of_stage, stages_a_rank
from shoal.comm.grid import Grid
from shoal.plan import Plan
from shoal.process.messages import PARTNER, WORKER
from shoal.train.remote.bond import TOKEN_BYTES


def size_of(plan: Plan) -> int:
    """How many processes a worker is."""
    return (plan.tp or 1) * (plan.pp or 1)


def grid_within(plan: Plan) -> Grid:
    """The ranks of one worker."""
    return Grid(pp=plan.pp or 1, tp=plan.tp or 1)


def parts_of(plan: Plan) -> tuple[int, ...]:
    """Which rank of ``grid_within`` each process of a worker has, the head first: that is the one where the loss comes out."""
    grid, schedule = grid_within(plan), plan.schedule or "1f1b"
    last = grid.pp * stages_a_rank(schedule, plan.interleave) - 1
    head = grid.rank(0, rank_of_stage(schedule, grid.pp, last))
    return (head, *(part for part in range(grid.world_size) if part != head))


def place_of(role: str, rank: int, plan: Plan) -> tuple[int, int]:
    """(the worker that a process belongs to, its place among that worker's processes)."""
    if role == WORKER:
        return rank, 0
    worker, place = divmod(rank, size_of(plan) - 1)
    return worker, place + 1


def member_of(number: int, plan: Plan) -> tuple[str, int]:
    """(role, rank) of one of the processes that are workers, counted through: those of a worker are neighbours."""
    worker, place = divmod(number, size_of(plan))
    return members_of(worker, plan)[place]


def members_of(worker: int, plan: Plan) -> list[tuple[str, int]]:
    """(role, rank) of all processes of a worker, the head first."""
    partners = size_of(plan) - 1
    return [(WORKER, worker), *((PARTNER, worker * partners + k) for k in range(partners))]


@dataclass(frozen=True)
class Begun:
    """A worker whose processes have all come: where its head is, what lets them in there, and who they are."""

    address: str
    token: str
    members: frozenset[tuple[str, int, int]]


class Teams:
    """The processes of each worker as the lead knows them.

    Attributes:
        begun: those workers whose processes have all come, by number.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.begun: dict[int, Begun] = {}
        self._broken: set[tuple[str, int, int]] = set()
        self._met: set[int] = set()

    def begin(self, worker: int, address: str, pids: dict[tuple[str, int], int]) -> Begun:
        """All processes of a worker are there: let them meet."""
        members = frozenset((role, rank, pid) for (role, rank), pid in pids.items())
        # The number of a process that has ended is given to another one some day.
        self._broken -= members
        self.begun[worker] = Begun(address, secrets.token_hex(TOKEN_BYTES), members)
        return self.begun[worker]

    def meet(self, worker: int) -> None:
        """A worker asks for work: its processes have met."""
        self._met.add(worker)

    def apart(self, worker: int) -> str:
        """Where the processes of a worker are to meet that have come and have not met yet, as far as it is known; or nothing."""
        begun = self.begun.get(worker)
        return "" if begun is None or worker in self._met else begun.address

    def is_broken(self, role: str, rank: int, pid: int) -> bool:
        """Whether a process is of a worker that was lost with another one."""
        return (role, rank, pid) in self._broken

    def break_up(self, role: str, rank: int) -> list[tuple[str, int]]:
        """A process is gone: (role, rank) of all that are to begin anew with it, itself among them."""
        worker, _ = place_of(role, rank, self.plan)
        begun = self.begun.pop(worker, None)
        self._met.discard(worker)
        if begun is None:
            # The others wait for it, and go on with that.
            return [(role, rank)]
        self._broken |= begun.members
        return members_of(worker, self.plan)
