"""What readers see of a run whose servers share no memory: its lead asks them for what has changed, and publishes that."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from shoal.comm.store import Store
from shoal.errors import ShoalError
from shoal.ps.endpoint import RunKeys
from shoal.ps.placement import Placement
from shoal.ps.publish import Copied
from shoal.ps.published_rows import described
from shoal.ps.requests import Patience
from shoal.ps.row_log import Changes
from shoal.ps.spec import TableSpec
from shoal.ps.watch import Seen, Watcher
from shoal.ps.wire import Malformed
from shoal.train.published import Form, Publication
from shoal.train.remote.line import Meeting

logger = logging.getLogger(__name__)

_WHOLE_S = 5.0


class _Left(ShoalError):
    """Nothing is published any more, or servers are elsewhere."""


class RemoteSource:
    """A run's parameters, buffers and rows; implements ``shoal.ps.publish.Source``, for a publisher's thread.

    Each server is asked by itself and answers between two of its updates. With ``together`` the lead lets them update in
    ``step`` alone, and what is copied is of one step's end.
    """

    def __init__(
        self, store: Store, placement: Placement, specs: Sequence[TableSpec], keys: RunKeys, together: bool, first: int
    ) -> None:
        """``first``: how many updates each server has made as the run begins."""
        self._store, self._placement, self._keys = store, placement, keys
        self._together = together
        self._form = Form.of(store.table)
        self.tensors, self.size = self._form.tensors, self._form.size
        self.tables = tuple(described(spec) for spec in specs)
        self._forms = [(spec.width, np.dtype(table.dtype)) for spec, table in zip(specs, self.tables, strict=True)]
        servers = range(len(placement.servers))
        self.groups: list[Sequence[int]] = [servers] if together else [(server,) for server in servers]
        trained = {spec.name: spec for spec in store.table.trained}
        # Where each piece lies in what is published.
        self._at = {
            n: trained[p.name].offset + p.start * p.dtype.itemsize for n, p in placement.pieces.items()
        }
        self._sizes = placement.sizes
        self._versions = [first] * len(servers)
        self._moment = threading.Lock()
        self._heads: Mapping[int, str] | None = None
        self._connected: dict[int, str] = {}
        self._watcher: Watcher | None = None
        self._left = False
        self.keep_buffers()

    # -- the lead's side -----------------------------------------------------------------------------------------

    def follow(self, heads: Mapping[int, str]) -> None:
        """Where each server is now."""
        self._heads = dict(heads)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """All servers make an update: nothing is copied meanwhile."""
        with self._moment if self._together else contextlib.nullcontext():
            yield

    def made(self, versions: Sequence[int]) -> None:
        """The servers have made so many updates at least; nothing where nothing was pushed."""
        if versions:
            self._versions = [max(pair) for pair in zip(self._versions, versions, strict=True)]

    def keep_buffers(self) -> None:
        """The model's buffers go with what the servers have now."""
        size = self._store.table.buffer_bytes
        self._buffers: np.ndarray | None = self._store.arena.region("buffers")[:size].numpy().copy() if size else None

    @contextlib.contextmanager
    def published(self, publication: Publication, meeting: Meeting, goes_on: Callable[[], bool]) -> Iterator[None]:
        """Publish meanwhile, to whoever may be where the run's processes are; ``goes_on``: see ``Publication.of``."""
        host = meeting.address.removeprefix("tcp://").rsplit(":", 1)[0]
        try:
            with publication.of_source(self, goes_on, meeting.listen_at(), host):
                try:
                    yield
                except BaseException:
                    # What the servers have may never be heard any more.
                    self._left = True
                    raise
        finally:
            if self._watcher is not None:
                self._watcher.close()

    # -- the publisher's thread ----------------------------------------------------------------------------------

    def versions(self) -> tuple[int, ...]:
        return tuple(self._versions)

    def listen(self) -> None:
        """Everything is asked for anew; servers note from the first question on which rows change."""
        if self._watcher is not None:
            self._watcher.begin()

    def copy(self, servers: Sequence[int], out: np.ndarray) -> Copied | None:
        if not self._moment.acquire(timeout=_WHOLE_S):
            return None
        try:
            watcher = self._reach()
            began = time.monotonic()
            found = watcher.watch(servers)
            busy_s = time.monotonic() - began
            if self._together and len({each.version for each in found.values()}) > 1:
                return None
        except (ShoalError, Malformed) as error:
            self._complain(error)
            return None
        finally:
            self._moment.release()
        watcher.accept()
        for server in servers:
            self._put(server, found[server], out)
            self._versions[server] = max(self._versions[server], found[server].version)
        rows: list[tuple[int, Changes | None]] = [row for server in servers for row in found[server].rows]
        return Copied(tuple(found[server].version for server in servers), tuple(rows), busy_s)

    def places(self, servers: Sequence[int]) -> Sequence[tuple[int, int]]:
        pieces = [piece for server in servers for piece in self._placement.pieces_of(server)]
        found = [(self._at[piece.number], self._at[piece.number] + piece.nbytes) for piece in pieces]
        if 0 in servers:
            found += [(self._store.table.trained_bytes, self._store.table.weight_bytes), (self._form.buffers_at, self.size)]
        return found

    def _put(self, server: int, seen: Seen, out: np.ndarray) -> None:
        for piece, data in seen.dense.items():
            at = self._at[piece]
            out[at : at + data.nbytes] = np.frombuffer(data, np.uint8)
        if server == 0:
            table = self._store.table
            # What nobody trains comes with the first one, like the buffers.
            weights = self._store.arena.region("weights").numpy()
            out[table.trained_bytes : table.weight_bytes] = weights[table.trained_bytes : table.weight_bytes]
            buffers = self._buffers
            if buffers is not None:
                out[self._form.buffers_at : self._form.buffers_at + len(buffers)] = buffers

    def piece(self, table: int, shard: int, cold: bool, at: int) -> tuple[np.ndarray, np.ndarray, int | None]:
        try:
            return self._reach().piece(self._placement.server_of_shard(table, shard), table, shard, cold, at)
        except (ShoalError, Malformed) as error:
            self._complain(error)
            width, dtype = self._forms[table]
            # Nothing yet: the reader asks for the same again.
            return np.empty(0, np.int64), np.empty((0, width), dtype), at

    def _complain(self, error: Exception) -> None:
        if not isinstance(error, _Left):
            logger.warning("The servers could not be asked for what is published: %s", error)

    def _reach(self) -> Watcher:
        """The line to the servers, wherever they are now."""
        heads = self._heads
        if self._left or heads is None:
            raise _Left("There are no servers.")
        if self._watcher is None:
            patience = Patience(deadline_s=_WHOLE_S)
            self._watcher = Watcher(heads, self._keys, self._forms, patience, self._look, self._sizes)
            self._connected = dict(heads)
        for server, address in heads.items():
            if self._connected[server] != address:
                self._watcher.connect(server, address)
                self._connected[server] = address
        return self._watcher

    def _look(self) -> None:
        if self._left or self._heads != self._connected:
            raise _Left("The servers are elsewhere.")
