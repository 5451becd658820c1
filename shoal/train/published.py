"""What readers of a run see: the weights as the servers hold them, each server's at a moment between two of its updates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from shoal.comm.arena import Arena, Signal
from shoal.comm.parts import put
from shoal.comm.store import Store
from shoal.comm.table import align
from shoal.ps import wire
from shoal.ps.keys import READ_KEY
from shoal.ps.ledger import Ledger
from shoal.ps.publish import Publisher

_WHOLE_S = 1.0
_NAP_S = 20e-6


class Clocks(Protocol):
    """How many updates a server has begun, and how many it has finished."""

    def begun(self, server: int) -> int: ...
    def finished(self, server: int) -> int: ...

    def hold(self, server: int, holds: bool) -> None:
        """Ask a server to begin no update for the moment that a copy takes, or no longer."""


class StepClocks:
    """Of servers that update once a step."""

    def __init__(self, arena: Arena) -> None:
        self._slots = arena.servers

    def begun(self, server: int) -> int:
        return self._slots[server].signal(Signal.GRADIENTS)

    def finished(self, server: int) -> int:
        return self._slots[server].signal(Signal.UPDATED)

    def hold(self, server: int, holds: bool) -> None:
        """There is time while the workers compute."""


class PushClocks:
    """Of servers that update with every push: a version is odd while they do."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def begun(self, server: int) -> int:
        return (self._ledger.version(server) + 1) // 2

    def finished(self, server: int) -> int:
        return self._ledger.version(server) // 2

    def hold(self, server: int, holds: bool) -> None:
        self._ledger.set_reading(self._ledger.workers, server, holds)


class PublishedWeights:
    """A run's parameters and buffers as one block of bytes; implements ``shoal.ps.publish.Source``.

    What each server updates is copied for itself, and versions are a vector. Where the model is cut and a whole tensor is held
    by several, all servers are looked at as one.
    """

    def __init__(self, store: Store, clocks: Clocks) -> None:
        self._store = store
        self._clocks = clocks
        table = store.table
        servers = range(len(store.arena.servers))
        self._cut = any(spec.regions for spec in table.parameters)
        self._groups: list[Sequence[int]] = [servers] if self._cut else [(server,) for server in servers]
        tensors: dict[str, wire.Tensor] = {}
        at = 0
        for spec in table.parameters:
            offset = at if self._cut else spec.offset
            if spec.name not in tensors:
                tensors[spec.name] = _tensor(spec.names, spec.dtype, spec.whole_shape, offset)
                at += align(wire.nbytes(tensors[spec.name]))
        self._weight_bytes = at if self._cut else table.weight_bytes
        self._buffers_at = align(self._weight_bytes)
        for spec in table.buffers:
            if spec.persistent:
                tensors[spec.name] = _tensor(spec.names, spec.dtype, spec.shape, self._buffers_at + spec.offset)
        self.tensors = tuple(tensors.values())
        self.size = self._buffers_at + table.buffer_bytes

    def versions(self) -> tuple[int, ...]:
        return tuple(sum(self._clocks.finished(server) for server in group) for group in self._groups)

    def copy(self, server: int, out: np.ndarray) -> int | None:
        group = self._groups[server]
        for each in group:
            self._clocks.hold(each, True)
        try:
            return self._copy(server, group, out)
        finally:
            for each in group:
                self._clocks.hold(each, False)

    def _copy(self, server: int, group: Sequence[int], out: np.ndarray) -> int | None:
        deadline = time.monotonic() + _WHOLE_S
        while time.monotonic() < deadline:
            before = [self._clocks.begun(each) for each in group]
            if before == [self._clocks.finished(each) for each in group]:
                taken = self._take(server, before[0])
                if before == [self._clocks.begun(each) for each in group]:
                    for start, data in taken:
                        out[start : start + len(data)] = data
                    return sum(before)
            time.sleep(_NAP_S)
        return None

    def _take(self, server: int, step: int) -> list[tuple[int, np.ndarray]]:
        """Copies of what is a server's, with their places."""
        store, table = self._store, self._store.table
        if self._cut:
            taken = self._whole_tensors()
        else:
            ranges = store.ranges(server)
            if server + 1 == len(self._groups):
                # What nobody trains, behind what is trained, comes with the last one.
                ranges.append((table.trained_bytes, table.weight_bytes))
            weights = store.arena.region("weights").numpy()
            taken = [(start, weights[start:stop].copy()) for start, stop in ranges]
        if server == 0 and table.buffer_bytes:
            size = table.buffer_bytes
            held = store.arena.region("buffers")[step % 2 * size : (step % 2 + 1) * size]
            taken.append((self._buffers_at, held.numpy().copy()))
        return taken

    def _whole_tensors(self) -> list[tuple[int, np.ndarray]]:
        wholes: dict[str, torch.Tensor] = {}
        for spec, own in zip(self._store.table.parameters, self._store.weights, strict=True):
            if not spec.regions:
                wholes[spec.name] = own.clone()
                continue
            whole = wholes.setdefault(spec.name, torch.empty(spec.whole_shape, dtype=spec.dtype))
            put(whole, spec.regions, own)
        return [
            (tensor.offset, wholes[tensor.names[0]].reshape(-1).view(torch.uint8).numpy())
            for tensor in self.tensors
            if tensor.names[0] in wholes
        ]


@contextlib.contextmanager
def published(store: Store, clocks: Clocks, run: str, directory: Path) -> Iterator[None]:
    """Let readers subscribe to a run meanwhile; its directory holds the key. Nothing where there are no servers."""
    if not store.arena.servers:
        yield
        return
    publisher = Publisher(PublishedWeights(store, clocks), run)
    # A full disk must not end a run because of readers that may never come.
    with contextlib.suppress(OSError):
        publisher.read_key.write(directory)
    try:
        yield
    finally:
        publisher.close()
        (directory / READ_KEY).unlink(missing_ok=True)


def _tensor(names: Sequence[str], dtype: torch.dtype, shape: Sequence[int], offset: int) -> wire.Tensor:
    return wire.Tensor(tuple(names), str(dtype).removeprefix("torch."), tuple(shape), offset)
