"""An admitted request, and who is told what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.serve.refusals import Refusal
from shoal.serve.slots import Outcome
from shoal.serve.tracing import Traced


class Outputs(list[np.ndarray]):
    """Arrays in the signature's order; ``update``: so many updates of the run that the weights follow are in them, 0: unknown."""

    update: int = 0


Done = Callable[["Outputs | None", "Refusal | None"], None]
"""What is to be called with outputs, or with why there are none."""


class Reply:
    """Stands where a ticket's future does, for who is called and does not wait: no task has to be woken."""

    __slots__ = ("__weakref__", "_done", "_free", "_outputs", "ticket")

    def __init__(
        self, outputs: Callable[[Ticket], Outputs], free: Callable[[Ticket], None], done: Done
    ) -> None:
        """``outputs``: copies them out of a ticket's slots; ``free``: gives a ticket's slots back."""
        self._outputs, self._free, self._done = outputs, free, done
        self.ticket: Ticket | None = None

    def done(self) -> bool:
        """A ticket is ended once."""
        return False

    def set_result(self, _: float) -> None:
        ticket = self._take()
        outputs = self._outputs(ticket)
        self._free(ticket)
        self._done(outputs, None)

    def set_exception(self, refusal: Refusal) -> None:
        self._free(self._take())
        self._done(None, refusal)

    def _take(self) -> Ticket:
        """The ticket, which is let go of: it has this, and a cycle for each request would be collected in long pauses."""
        assert self.ticket is not None
        ticket, self.ticket = self.ticket, None
        return ticket


@dataclass(slots=True)
class Ticket:
    """Holds slots until the request has its outcome."""

    number: int
    slots: list[int]
    rows_left: int
    arrived_s: float
    deadline_s: float
    future: asyncio.Future[float] | Reply
    abandoned: Callable[[], bool]
    in_flight: int = 0
    ended: bool = False
    deaths: int = 0
    compute_s: float = 0.0
    outcome: Outcome | None = None
    # Asked by the service itself.
    own: bool = False
    # The oldest update of the run that any of its rows was computed with; 0: none is known.
    update: int = 0
    # Where traces are kept.
    traced: Traced | None = None
