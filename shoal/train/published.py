"""What readers of a run see: the weights as the servers hold them, each server's at a moment between two of its updates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from shoal.comm.arena import Arena, Note, Signal
from shoal.comm.parts import put
from shoal.comm.store import Store
from shoal.comm.table import ParameterTable, align
from shoal.ps import wire
from shoal.ps.keys import READ_KEY
from shoal.ps.ledger import Ledger
from shoal.ps.publish import Copied, Publisher, Source, Succession
from shoal.ps.published_rows import PublishedRows
from shoal.ps.table import Table

_WHOLE_S = 1.0
_NAP_S = 20e-6


class Clocks(Protocol):
    """How many updates a server has begun, and how many it has finished.

    ``together``: whether all of them are to be seen after the same number of updates.
    """

    together: bool

    def begun(self, server: int) -> int: ...
    def finished(self, server: int) -> int: ...

    def hold(self, server: int, holds: bool) -> None:
        """Ask a server to begin no update for the moment that a copy takes, or no longer."""


class StepClocks:
    """Of servers that update once a step."""

    together = True

    def __init__(self, arena: Arena) -> None:
        self._slots, self._supervisor = arena.servers, arena.supervisor

    def begun(self, server: int) -> int:
        return self._slots[server].signal(Signal.GRADIENTS)

    def finished(self, server: int) -> int:
        return self._slots[server].signal(Signal.UPDATED)

    def hold(self, server: int, holds: bool) -> None:
        """One word for all of them."""
        self._supervisor.write(Note.READING, float(holds))


class PushClocks:
    """Of servers that update with every push: a version is odd while they do."""

    together = False

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def begun(self, server: int) -> int:
        return (self._ledger.version(server) + 1) // 2

    def finished(self, server: int) -> int:
        return self._ledger.version(server) // 2

    def hold(self, server: int, holds: bool) -> None:
        self._ledger.set_reading(self._ledger.workers, server, holds)


@dataclass(frozen=True)
class Form:
    """Where everything lies in what is published: weights, as in an arena or whole tensors, and then buffers."""

    tensors: tuple[wire.Tensor, ...]
    weight_bytes: int
    buffers_at: int
    size: int

    @classmethod
    def of(cls, table: ParameterTable, whole: bool = False) -> Form:
        """``whole``: parameters are in parts in the arena, and published whole."""
        tensors: dict[str, wire.Tensor] = {}
        at = 0
        for spec in table.parameters:
            offset = at if whole else spec.offset
            if spec.name not in tensors:
                tensors[spec.name] = _tensor(spec.names, spec.dtype, spec.whole_shape, offset)
                at += align(wire.nbytes(tensors[spec.name]))
        weight_bytes = at if whole else table.weight_bytes
        buffers_at = align(weight_bytes)
        for buffer in table.buffers:
            if buffer.persistent:
                tensors[buffer.name] = _tensor(buffer.names, buffer.dtype, buffer.shape, buffers_at + buffer.offset)
        return cls(tuple(tensors.values()), weight_bytes, buffers_at, buffers_at + table.buffer_bytes)


class PublishedWeights:
    """A run's parameters, buffers and rows; implements ``shoal.ps.publish.Source``. Tensors are one block of bytes.

    What each server updates is copied for itself, and versions are a vector; under ``sync`` all of it is of one step. Where the
    model is cut and a whole tensor is held by several, all servers are looked at as one.
    """

    def __init__(self, store: Store, clocks: Clocks, tables: Sequence[Table] = ()) -> None:
        self._store = store
        self._clocks = clocks
        table = store.table
        servers = range(len(store.arena.servers))
        self._cut = any(spec.regions for spec in table.parameters)
        # Of each entry of the versions, whose updates it counts.
        self._members: list[Sequence[int]] = [servers] if self._cut else [(server,) for server in servers]
        entries = range(len(self._members))
        self.groups: list[Sequence[int]] = [entries] if clocks.together else [(entry,) for entry in entries]
        self._rows = PublishedRows(tables, len(servers))
        self.tables = self._rows.described
        self._form = Form.of(table, self._cut)
        self.tensors, self.size = self._form.tensors, self._form.size

    def versions(self) -> tuple[int, ...]:
        return tuple(sum(self._clocks.finished(server) for server in members) for members in self._members)

    def listen(self) -> None:
        self._rows.listen()

    def piece(self, table: int, shard: int, cold: bool, at: int) -> tuple[np.ndarray, np.ndarray, int | None]:
        return self._rows.piece(table, shard, cold, at)

    def copy(self, servers: Sequence[int], out: np.ndarray) -> Copied | None:
        everybody = [server for entry in servers for server in self._members[entry]]
        for each in everybody:
            self._clocks.hold(each, True)
        try:
            return self._copy(servers, everybody, out)
        finally:
            for each in everybody:
                self._clocks.hold(each, False)

    def places(self, servers: Sequence[int]) -> Sequence[tuple[int, int]]:
        return [place for entry in servers for place in self._places(entry)]

    def _copy(self, entries: Sequence[int], servers: Sequence[int], out: np.ndarray) -> Copied | None:
        deadline = time.monotonic() + _WHOLE_S
        while time.monotonic() < deadline:
            before = [self._clocks.begun(each) for each in servers]
            still = before == [self._clocks.finished(each) for each in servers]
            if still and (not self._clocks.together or len(set(before)) == 1):
                for entry in entries:
                    self._take(entry, before[0], out)
                rows = self._rows.take(servers)
                if before == [self._clocks.begun(each) for each in servers]:
                    counts = dict(zip(servers, before, strict=True))
                    versions = tuple(sum(counts[server] for server in self._members[entry]) for entry in entries)
                    return Copied(versions, self._rows.accept(rows))
            time.sleep(_NAP_S)
        return None

    def _places(self, entry: int) -> list[tuple[int, int]]:
        """Where lies what belongs to an entry of the versions."""
        buffers = [(self._form.buffers_at, self.size)] if entry == 0 else []
        return [*([(0, self._form.weight_bytes)] if self._cut else self._ranges(entry)), *buffers]

    def _ranges(self, entry: int) -> list[tuple[int, int]]:
        """Of weights that lie here as they lie in the arena."""
        ranges = self._store.ranges(entry)
        if entry + 1 == len(self._members):
            # What nobody trains, behind what is trained, comes with the last one.
            ranges.append((self._store.table.trained_bytes, self._store.table.weight_bytes))
        return ranges

    def _take(self, entry: int, step: int, out: np.ndarray) -> None:
        """Copy what belongs to an entry of the versions to its places."""
        store, size = self._store, self._store.table.buffer_bytes
        if self._cut:
            self._take_whole_tensors(out)
        else:
            weights = store.arena.region("weights").numpy()
            for start, stop in self._ranges(entry):
                out[start:stop] = weights[start:stop]
        if entry == 0 and size:
            held = store.arena.region("buffers")[step % 2 * size : (step % 2 + 1) * size]
            out[self._form.buffers_at : self.size] = held.numpy()

    def _take_whole_tensors(self, out: np.ndarray) -> None:
        offsets = {tensor.names[0]: tensor for tensor in self.tensors}
        wholes: dict[str, torch.Tensor] = {}
        for spec, own in zip(self._store.table.parameters, self._store.weights, strict=True):
            tensor = offsets[spec.name]
            place = out[tensor.offset : tensor.offset + wire.nbytes(tensor)]
            whole = wholes.setdefault(spec.name, torch.from_numpy(place).view(spec.dtype).view(tensor.shape))
            if spec.regions:
                put(whole, spec.regions, own)
            else:
                whole.copy_(own.view(tensor.shape))


class Publication:
    """What readers of a run subscribe to, over all changes of its plan: its directory holds the key."""

    def __init__(self, run: str, directory: Path) -> None:
        self._run, self._directory = run, directory
        self._before: Succession | None = None
        self._publisher: Publisher | None = None
        self._troubles: list[str] = []

    def settle(self) -> None:
        """The servers rest, and this process will be busy: let readers have what there is. Not for long."""
        if self._publisher is not None:
            self._publisher.settle()

    def troubles(self) -> list[str]:
        """What went wrong in publishing since this was last asked, a sentence each."""
        if self._publisher is not None:
            self._gather(self._publisher)
        found, self._troubles = self._troubles, []
        return found

    def _gather(self, publisher: Publisher) -> None:
        while not publisher.troubles.empty():
            self._troubles.append(publisher.troubles.get())

    @contextlib.contextmanager
    def of(self, store: Store, clocks: Clocks, tables: Sequence[Table], goes_on: Callable[[], bool]) -> Iterator[None]:
        """Publish these weights meanwhile; nothing where there are no servers.

        ``goes_on``: asked at the end, whether the run does, under another plan.
        """
        if not store.arena.servers:
            yield
            return
        with self.of_source(PublishedWeights(store, clocks, tables), goes_on):
            yield

    @contextlib.contextmanager
    def of_source(
        self, source: Source, goes_on: Callable[[], bool], address: str = "tcp://127.0.0.1:*", host: str = ""
    ) -> Iterator[None]:
        """Publish this meanwhile; ``address``, ``host``: see ``Publisher``."""
        publisher = Publisher(source, self._run, address, self._before, host)
        # A full disk must not end a run because of readers that may never come.
        with contextlib.suppress(OSError):
            publisher.read_key.write(self._directory)
        silent = False
        self._publisher = publisher
        try:
            yield
            silent = goes_on()
        finally:
            self._publisher = None
            if silent:
                publisher.close(None)
                self._before = publisher.succession
            else:
                publisher.close()
            self._gather(publisher)

    def close(self) -> None:
        """The run is over, under whatever plan."""
        (self._directory / READ_KEY).unlink(missing_ok=True)


def _tensor(names: Sequence[str], dtype: torch.dtype, shape: Sequence[int], offset: int) -> wire.Tensor:
    return wire.Tensor(tuple(names), str(dtype).removeprefix("torch."), tuple(shape), offset)
