"""The gateway: the process that speaks HTTP. ``python -m shoal.serve.gateway FD``, FD a channel to the service's supervisor.

It imports no torch, so a new one is there in a fraction of a second; the supervisor keeps one in reserve, holds the listening
socket and the memory in which requests lie, and puts the reserve to work when this one dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from typing import Any

import uvloop

from shoal.errors import DeadlineError
from shoal.process.channel import Channel, ChannelClosed
from shoal.process.template import die_with_parent
from shoal.serve.app import App
from shoal.serve.catalogue import Catalogue, probe
from shoal.serve.common import Common
from shoal.serve.connection import quietly
from shoal.serve.credentials import server_context
from shoal.serve.desk import Desk
from shoal.serve.direct import Direct
from shoal.serve.guard import Bodies, Guard
from shoal.serve.http_server import HttpServer
from shoal.serve.messages import (
    AddModel,
    Asked,
    Drain,
    Drained,
    Edition,
    Known,
    Numbers,
    Open,
    Opened,
    Probe,
    Probed,
    Processes,
    Released,
    ReplicaDown,
    ReplicaLeave,
    ReplicaLeft,
    ReplicaUp,
    Retire,
    Retired,
    Take,
    Told,
)
from shoal.serve.metrics import Metrics
from shoal.serve.pace import Pace
from shoal.serve.shelf import Shelf
from shoal.serve.tracing import Tracing

_NUMBERS_EVERY_S = 0.5
# What was answered over gRPC is on its way; its connections end after this at the latest.
_LEAVE_S = 1.0
_INTRODUCED_S = 30.0
_COLLECT_AFTER = 50_000
# A request that was being read when its version was retired may still come to it.
_LATE_S = 0.5


class Gateway:
    """The event loop's side of the channel to the supervisor, and what it was told."""

    def __init__(self, channel: Channel, opening: Open, listening: socket.socket) -> None:
        self._channel = channel
        self._listening = listening
        self._metrics = Metrics()
        limits, turned = opening.limits, self._metrics.turned_away
        self._catalogue = Catalogue(self._ask)
        guard = None if limits.access.open else Guard(limits.access, turned=turned)
        self._tracing = Tracing.from_environment(os.environ)
        common = Common(
            limits=limits, metrics=self._metrics, catalogue=self._catalogue, guard=guard,
            bodies=Bodies(limits.bodies_bytes, turned), pace=Pace(limits.slo_s), tracing=self._tracing,
            grpc_port=None if opening.grpc is None else int(opening.grpc.rpartition(":")[2]),
        )  # fmt: skip
        self._app = App(common)
        self._grpc = None
        if opening.grpc is not None:
            # Its library takes a tenth of a second to import, which who does not want it shall not wait for.
            from shoal.serve.grpc_server import GrpcServer

            self._grpc = GrpcServer(common)
        self._opening = opening
        self._questions = 0
        self._answers: dict[int, asyncio.Future[Told]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        # Set when all models that there are have been told.
        self._introduced = asyncio.Event()
        tls = None if opening.tls is None else server_context(opening.tls)
        self._server = HttpServer(self._app, self._opened, tls, turned, self._app.overload, Direct(common))

    async def serve(self) -> None:
        """Answer until the supervisor says to drain, or is gone."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(quietly)
        loop.add_reader(self._channel.fileno(), self._receive)
        # Whoever connects meanwhile waits in the socket's backlog: to who asks now, a model is not unknown.
        await asyncio.wait_for(self._introduced.wait(), _INTRODUCED_S)
        if self._grpc is not None:
            await self._grpc.start(self._opening.grpc or "", self._opening.tls)
        numbers = loop.create_task(self._report())
        try:
            await self._server.serve(sockets=[self._listening])
        finally:
            numbers.cancel()
        if self._grpc is not None:
            await self._grpc.stop(_LEAVE_S)
        # uvicorn has sent what was to be sent and closed its connections.
        self._say(self._numbers())
        if self._tracing is not None:
            self._tracing.close()
        self._say(Drained())

    def _receive(self) -> None:
        try:
            message, fds = self._channel.receive(5.0, "the rest of a message from the supervisor")
        except ChannelClosed:
            os._exit(0)
        except DeadlineError:
            # What comes next would be taken for the beginning of a message.
            os._exit(1)
        self._obey(message, fds)

    def _obey(self, message: Any, fds: list[int]) -> None:
        app, catalogue = self._app, self._catalogue
        if isinstance(message, AddModel):
            model, version = message.edition
            desk = Desk(message, fds[0], fds[1], self._metrics.observer(model))
            desk.tracing = self._tracing
            catalogue.shelves.setdefault(model, Shelf()).versions[version] = desk
            desk.watch(asyncio.get_running_loop())
        elif isinstance(message, ReplicaUp):
            self._desk(message.edition).replica_up(message.rank, fds[0])
        elif isinstance(message, ReplicaLeave):
            left = ReplicaLeft(message.edition, message.rank)
            self._desk(message.edition).replica_leave(message.rank, lambda: self._say(left))
        elif isinstance(message, ReplicaDown):
            self._desk(message.edition).replica_down(message.rank)
            self._say(Released(message.edition, message.rank))
        elif isinstance(message, Processes):
            app.processes = message.rows
        elif isinstance(message, Drain):
            self._begin(self._drain(message.within_s))
        elif isinstance(message, Probe):
            self._begin(self._probe(message.edition))
        elif isinstance(message, Take):
            catalogue.shelves[message.edition.model].take(message.edition.version, message.share, message.shadow)
        elif isinstance(message, Retire):
            self._begin(self._retire(message.edition))
        elif isinstance(message, Known):
            catalogue.unavailable = message.unavailable
            self._introduced.set()
        elif isinstance(message, Told):
            if (waiting := self._answers.pop(message.number, None)) is not None and not waiting.done():
                waiting.set_result(message)
        else:
            raise TypeError(f"the gateway does not know {type(message).__name__}")

    def _desk(self, edition: Edition) -> Desk:
        return self._catalogue.shelves[edition.model].versions[edition.version]

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, model: str, load: bool, parameters: dict[str, Any]) -> Told:
        """Hand what a client wants to the supervisor, and wait for what becomes of it."""
        self._questions += 1
        answer = self._answers[self._questions] = asyncio.get_running_loop().create_future()
        self._say(Asked(self._questions, model, load, parameters))
        return await answer

    async def _probe(self, edition: Edition) -> None:
        self._say(Probed(edition, await probe(self._desk(edition))))

    async def _retire(self, edition: Edition) -> None:
        shelf = self._catalogue.shelves[edition.model]
        desk = shelf.versions[edition.version]
        shelf.retire(edition.version)
        await asyncio.sleep(_LATE_S)
        while desk.open_requests:
            await asyncio.sleep(0.02)
        shelf.remove(edition.version)
        if not shelf.versions:
            del self._catalogue.shelves[edition.model]
        self._say(Retired(edition))

    def _numbers(self) -> Numbers:
        return Numbers({name: shelf.numbers() for name, shelf in self._catalogue.shelves.items()})

    def _say(self, message: Any) -> None:
        with contextlib.suppress(ChannelClosed):
            self._channel.send(message)

    async def _report(self) -> None:
        await self._opened.wait()
        self._say(Opened())
        while True:
            await asyncio.sleep(_NUMBERS_EVERY_S)
            self._say(self._numbers())

    async def _drain(self, within_s: float) -> None:
        self._catalogue.draining = True
        desks = [desk for shelf in self._catalogue.shelves.values() for desk in shelf.versions.values()]
        for desk in desks:
            desk.close()
        until = time.monotonic() + within_s
        while time.monotonic() < until and any(desk.open_requests for desk in desks):
            await asyncio.sleep(0.01)
        self._server.should_exit = True


def main() -> None:
    channel = Channel.from_fd(int(sys.argv[1]))
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Whatever is printed here must not get between the lines that the command promises on standard output.
    os.dup2(2, 1)
    try:
        opening, fds = channel.receive()
    except ChannelClosed:
        return
    listening = socket.socket(fileno=fds[0])

    async def serve() -> None:
        await Gateway(channel, opening, listening).serve()

    # What is here now stays, and requests leave no cycles behind: looking for some at each 700 objects took 3 % of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)
    uvloop.run(serve())


if __name__ == "__main__":
    main()
