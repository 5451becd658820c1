"""The server axis: servers hold the parameters; workers pull them, compute gradients, and push these; servers update.

The parameter server of DistBelief (Dean et al. 2012) and of Li et al. (2014), on one machine. ``ps=S,workers=W`` has W
workers (each of tp × pp processes) that compute, and S servers that have no model and only update. Every server owns a
slice of the flat trained weights, cut by bytes; where the optimizer works on whole tensors these are dealt out instead.

How a step travels under ``sync``::

    worker 0              worker 1              server 0              server 1
    pull                  pull                                                          the weights, where they lie
    gradients -> stripe   gradients -> stripe                                           compute a share each
    push                  push                                                          the stripe is complete: GRADIENTS
    ------------------------- all pushes of the step are there ----------------------
                                                slice 0 of all        slice 1 of all    sum, optimize
    --------------------------------- all UPDATED posted ----------------------------

A push is the stripe that was written anyway and one signal; a pull reads the servers' weights where they lie, without a
copy. So what moves in a step, for P bytes of trained parameters, is what the data axis moves: each worker writes P, the
servers together read W · P and read and write P of weights and of each optimizer state tensor, twice for the undo log.
What it costs beyond: workers are idle while servers update, and servers while workers compute; on one machine ``dp`` is
the better plan, unless workers are uneven. What it holds: (1 + s) · P once, P of gradients for each worker; a server
process holds nothing of its own but a chunk. How pushes travel that wait for nobody: ``shoal.axes.server_async``.

A model that is cut (tp, pp) is pushed in parts: a stripe is what the ranks of one worker have written together, echoes of
tied weights beside it, and a server's slice may hold parts of several owners. Servers are what coordinates data and model
parallelism: they wait for every rank, and every rank waits for them.

Why a killed process costs nothing: stripes, weights, state and undo log lie in the supervisor's arena. A worker that dies
before it has pushed computes its share again, and nobody has updated meanwhile; one that dies later had nothing left to
do. A server that dies is replaced by one that puts the chunk in work back and goes on; a push that was made is in its
stripe until all servers have posted UPDATED, so none is lost and none is applied twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from shoal.axes.data import ArenaData
from shoal.axes.updating import Hooks, SliceUpdater, Totals, Updates
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Note, Signal
from shoal.comm.rest import Rests
from shoal.comm.store import Store

# How long a copy of the weights may hold an update up.
_READING_S = 2.0


class NothingToUpdate:
    """What a worker updates where servers do."""

    count = 0
    starts_over = False

    def sum_gradients(self, chunk: int, factor: float) -> None:
        raise AssertionError("workers update nothing")

    def apply(self, chunk: int, scale: float) -> None:
        raise AssertionError("workers update nothing")

    def save(self, chunk: int) -> None:
        raise AssertionError("workers update nothing")

    def restore(self, chunk: int) -> None:
        raise AssertionError("workers update nothing")

    def norm_squared(self) -> float:
        return 0.0


class ServedWorker(ArenaData):
    """A worker of a parameter server under ``sync``; see the module's docstring."""

    def __init__(self, store: Store, rank: int, waiting: Waiting) -> None:
        super().__init__(store, rank, NothingToUpdate(), waiting, guard=False)

    @property
    def keeps(self) -> Sequence[int]:
        return ()

    def publish(self, step: int) -> None:
        """Push: say that this worker's stripe and record are complete."""
        self.slot.post(Signal.GRADIENTS, step + 1)

    def update(self, step: int, totals: Totals, grad_clip: float | None, hooks: Hooks) -> None:
        """Pull: wait until every server has updated its slice."""
        self.wait_updaters(Signal.UPDATED, step + 1)

    def finish(self, step: int) -> None:
        """Every server had, before this worker could say that it was done."""


class Server(Updates):
    """A parameter server under ``sync``; ``number``: which one."""

    def __init__(self, store: Store, number: int, updater: SliceUpdater, waiting: Waiting, guard: bool = True) -> None:
        super().__init__(store, store.arena.world_size + number, updater, waiting, guard)
        self.number = number

    def steps_done(self) -> int:
        """Updates that this server has finished; also after it was replaced."""
        return self.slot.signal(Signal.UPDATED)

    def has_taken(self, step: int) -> bool:
        """Whether the update of a step has begun, by this process or its predecessor."""
        return self.slot.signal(Signal.GRADIENTS) > step

    def await_pushes(self, step: int, check: Callable[[], None]) -> None:
        """Wait until all workers have pushed their gradients of a step; ``check`` may raise meanwhile."""
        arena = self.arena
        self.wait_for(lambda s: arena.wait_all(Signal.GRADIENTS, step + 1, *s), f"the push of step {step + 1}", check)

    def sources(self, step: int) -> list[int] | None:
        """The workers whose pushes count, where not all do."""
        return None

    def stripes(self, step: int) -> list[int] | None:
        """The stripes that are summed, where that is not all of them."""
        ranks = self.sources(step)
        return None if ranks is None else [self.store.stripe_of(rank) for rank in ranks]

    def take(self, step: int) -> None:
        """Begin the update of a step."""
        if not self.has_taken(step):
            self._let_read(step)
            self.begin_update()
            self.slot.post(Signal.GRADIENTS, step + 1)

    def _let_read(self, step: int) -> None:
        """Wait while whoever publishes the weights copies them; not where another server has begun: a cut is of one step."""
        supervisor, others = self.arena.supervisor, self.arena.servers
        until, rests = time.monotonic() + _READING_S, Rests()
        while supervisor.note(Note.READING) and time.monotonic() < until:
            if any(slot.signal(Signal.GRADIENTS) > step for slot in others):
                return
            rests.rest()

    def sum_up(self, step: int) -> Totals:
        """The loss over the global batch, and the factor of the gradients' sum."""
        return self.totals(step, range(self.arena.world_size))

    def commit(self, step: int) -> None:
        """Say that this server's slice is updated."""
        self.slot.post(Signal.UPDATED, step + 1)
