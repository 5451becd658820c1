"""The ledger of a parameter server whose workers wait for nobody: which push each server has applied, and what it held.

Work is cut into *units*: one shard of one batch, numbered in the one global order (unit = step · workers + shard). A worker
computes a unit, *pushes* its gradient, and every server applies the push by itself, as one step of the optimizer. The
ledger lies in the arena, in words that have one writer each, so that it is exact whoever is killed:

* ``applied[server][worker]``: how many pushes of a worker a server has applied. Writing this word commits the update;
* ``version[server]``: twice the number of updates, odd while one is being made (a sequence lock: Lameter 2005). A pull is
  whole where it is even and the same before and after;
* ``reading[worker][server]``: a worker, or the publisher, is copying; a server begins no update before it is done, so that
  none starves;
* a row for each of the last units: whose it was, what was found, with which push it went, the versions at its pull and at
  its application. The supervisor reads rows before they are used again: see ``Claims``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shoal.comm.arena import SLOT_BYTES, Arena, Signal
from shoal.comm.store import VALUE_COLUMNS

LINE = 64
UNITS_KEPT = 4096
ORDER_KEPT = 1024


class UnitColumns:
    """The fields of a unit's row, float64 each; the values that a job logs, and two versions a server, follow."""

    UNIT = 0
    RANK = 1
    PUSH = 2
    SLOWEST = 3
    LOSS = 4
    WEIGHT = 5
    SAMPLES = 6
    MEASURED = 7
    BEGAN = 8
    ENDED = 9
    DATA = 10
    COMPUTE = 11
    REDUCE = 12
    WAIT = 13
    GIVEN = 15
    VALUES = 16
    VERSIONS = 16 + VALUE_COLUMNS


_WORDS = ("applied", "versions", "reading")
EMPTY, REJECTED, LOGGED, DROPPED = -1, -2, -3, -4
"""What PUSH says of a unit without samples, of one whose gradient was no number, of one that an earlier session has done, and of
one that came too late (``backup``)."""
UNCOUNTED = (EMPTY, REJECTED, DROPPED)
"""Units of which nothing is in the weights."""


def regions(workers: int, servers: int, push_every: int) -> Mapping[str, int]:
    """The regions of the arena that a ledger and the claims need, with their sizes in bytes."""
    return {
        "applied": servers * workers * LINE,
        "versions": servers * LINE,
        # How many pushes server 0 has taken, and whose the last ones were: see ``shoal.axes.server_order``.
        "order": LINE + ORDER_KEPT * 8,
        # The last row is of whoever publishes the weights.
        "reading": (workers + 1) * servers * LINE,
        "units": UNITS_KEPT * (UnitColumns.VERSIONS + 2 * servers) * 8,
        # A place more than a worker may have open claims: see Claims.
        "claims": workers * (2 * LINE + 8 * (push_every + 1) + (-8 * (push_every + 1)) % LINE),
    }


class Ledger:
    """Views of the ledger in an arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.workers, self.servers = arena.world_size, len(arena.servers)
        self._words = {name: arena.region(name).numpy().view(np.uint32)[:: LINE // 4] for name in _WORDS}
        self._bases = {name: arena.memory.address + arena.layout.regions[name][0] for name in _WORDS}
        self._pushes_at = arena.slot_address(Signal.GRADIENTS)
        rows = arena.region("units").numpy().view(np.float64)
        self.rows: np.ndarray = rows.reshape(UNITS_KEPT, -1)

    def row(self, unit: int) -> np.ndarray:
        """A unit's row; it speaks of that unit where its UNIT column says so (unit + 1)."""
        row: np.ndarray = self.rows[unit % UNITS_KEPT]
        return row

    def was_logged(self, unit: int) -> bool:
        """Whether an earlier session has done a unit: its push is in the weights."""
        row = self.row(unit)
        return bool(row[UnitColumns.UNIT] == unit + 1 and row[UnitColumns.PUSH] == LOGGED)

    def pulled(self, unit: int) -> np.ndarray:
        """For each server, how many updates it had made when the unit's worker pulled."""
        return self.row(unit)[UnitColumns.VERSIONS : UnitColumns.VERSIONS + self.servers]

    def made(self, unit: int) -> np.ndarray:
        """For each server, how many updates it had made with the unit's push."""
        return self.row(unit)[UnitColumns.VERSIONS + self.servers :]

    # -- pushes that were applied --------------------------------------------------------------------------------

    def applied(self, server: int, worker: int) -> int:
        return self._word("applied", server * self.workers + worker)

    def commit(self, server: int, worker: int, push: int) -> None:
        """A server has applied a worker's push."""
        self._post("applied", server * self.workers + worker, push)

    def is_applied(self, worker: int, push: int) -> bool:
        """Whether all servers hold a push."""
        return all(_reached(self.applied(server, worker), push) for server in range(self.servers))

    def wait_applied(self, worker: int, push: int, spin_s: float, timeout_s: float) -> int:
        """Wait until all servers hold a push; -1, or the server that does not."""
        address = self._address("applied", worker)
        stride = self.workers * LINE
        return self._arena.native.wait_all(address, stride, self.servers, push, spin_s, timeout_s)

    def any_push(self, server: int, spin_s: float) -> bool:
        """Whether a server has a push of some worker yet to apply; looks for spin_s at most."""
        applied = self._address("applied", server * self.workers)
        return self._arena.native.wait_any(self._pushes_at, SLOT_BYTES, applied, LINE, self.workers, spin_s) >= 0

    def updates(self, server: int, first: int) -> int:
        """How many updates a server has made, counted from ``first``."""
        own = self._words["applied"][server * self.workers : (server + 1) * self.workers]
        return first + sum((count - first) & 0xFFFFFFFF for count in own.tolist())

    def begin_at(self, first: int) -> None:
        """Let all counts begin at ``first``. For the supervisor, before anybody works."""
        for server in range(self.servers):
            for worker in range(self.workers):
                self.commit(server, worker, first)
            self.post_version(server, 2 * first)

    # -- versions ------------------------------------------------------------------------------------------------

    def version(self, server: int) -> int:
        return self._word("versions", server)

    def post_version(self, server: int, version: int) -> None:
        self._post("versions", server, version)

    def wait_version(self, server: int, beyond: int, spin_s: float, timeout_s: float) -> bool:
        """Wait until a server's version is past ``beyond``."""
        address = self._address("versions", server)
        return self._arena.native.wait_all(address, LINE, 1, beyond + 1, spin_s, timeout_s) < 0

    def reading(self, worker: int, server: int) -> bool:
        return self._word("reading", worker * self.servers + server) == 1

    def reading_of(self, server: int) -> np.ndarray:
        """The words of all who may read a server's weights, as they are now: 1 where one does."""
        return self._words["reading"][server :: self.servers]

    def pull_words(self, worker: int, server: int) -> tuple[int, int]:
        """Where a server's version lies, and a worker's word that it reads there; see ``shoal.comm.dense``."""
        return self._address("versions", server), self._address("reading", worker * self.servers + server)

    def set_reading(self, worker: int, server: int, reads: bool) -> None:
        self._post("reading", worker * self.servers + server, int(reads))

    # -- words ---------------------------------------------------------------------------------------------------

    def _address(self, region: str, index: int) -> int:
        return self._bases[region] + index * LINE

    def _word(self, region: str, index: int) -> int:
        return int(self._words[region][index])

    def _post(self, region: str, index: int, value: int) -> None:
        self._arena.native.post(self._address(region, index), value)


def _reached(seen: int, target: int) -> bool:
    return (seen - target) & 0xFFFFFFFF < 1 << 31
