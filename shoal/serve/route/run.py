"""``shoal route``: the process. It listens, watches the services, answers, and drains when it is told to end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from shoal.errors import RequestError
from shoal.serve import wire
from shoal.serve.connection import quietly
from shoal.serve.credentials import TlsFiles, client_context, read_tls, server_context
from shoal.serve.http_server import HttpServer
from shoal.serve.listening import address_of, check_grpc, hold, listen
from shoal.serve.route.balance import Balancer
from shoal.serve.route.front import Front
from shoal.serve.route.health import Health
from shoal.serve.route.link import Links
from shoal.serve.route.metrics import RouteMetrics
from shoal.serve.tracing import Tracing

if TYPE_CHECKING:
    from shoal.serve.route.grpc_front import GrpcFront

_COLLECT_AFTER = 50_000
_FIRST_LOOK_S = 2.0
_LEAVE_S, _AGAIN_S = 1.0, 0.05


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """How to route.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        timeout_s: the deadline of a request that brings none of its own, and the longest of any.
        drain_s: how long accepted requests may take at the end.
        grpc_port: where to answer gRPC too; 0 takes a free one, None: nowhere.
        affinity_header: requests with equal values of it go to the same service.
        ca_file: for https services: trust whom this PEM file vouches for; None for whom this machine trusts.
        tls_cert, tls_key: PEM files to speak TLS with; both, or none for plain HTTP.
    """

    host: str = "127.0.0.1"
    port: int = 0
    grpc_port: int | None = None
    timeout_s: float = 30.0
    drain_s: float = 30.0
    affinity_header: str = "X-Affinity-Key"
    ca_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def check(self) -> None:
        """RequestError where a value makes no sense."""
        if not 0 < self.timeout_s < 1e6:
            raise RequestError(f"Requests may take {1e3 * self.timeout_s:g} ms; give a time above 0, such as 30000.")
        if not self.drain_s >= 0:
            raise RequestError(f"The time to drain is {self.drain_s:g} s; give 0 or more.")
        for port in (self.port, self.grpc_port or 0):
            if not 0 <= port <= 65535:
                raise RequestError(f"There is no port {port}; give 0 for a free one, or 1 to 65535.")
        if self.grpc_port is not None:
            check_grpc()
        name = self.affinity_header
        if not name or not all(c.isascii() and (c.isalnum() or c in "-_") for c in name):
            raise RequestError(f"{name!r} is no name of a header; write it as in X-Affinity-Key.")

    def tls(self) -> TlsFiles | None:
        """What to speak TLS with. RequestError where the files are of no use."""
        if self.tls_cert is None and self.tls_key is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise RequestError("TLS needs a certificate and its key; give --tls-cert and --tls-key, or neither.")
        return read_tls(self.tls_cert, self.tls_key)


class Route:
    """A front over several services; ``run`` answers until it is interrupted.

    ``url``: where it listens, from the beginning; ``grpc_url``: where it answers gRPC, None for nowhere.
    """

    def __init__(self, urls: Sequence[str], options: RouteOptions) -> None:
        """RequestError where an address is none, is there twice, or an option makes no sense."""
        options.check()
        if not urls:
            raise RequestError("There is nothing to route to; give the urls that shoal serve prints.")
        addresses = [wire.parse_url(url) for url in urls]
        for k, address in enumerate(addresses):
            if address in addresses[:k]:
                raise RequestError(f"{address.url} is there twice; give each service once.")
        self._options = options
        tls = options.tls()
        self._tls_files = tls
        self._tls = None if tls is None else server_context(tls)
        client = client_context(options.ca_file) if any(address.tls for address in addresses) else None
        self._links = [Links(address, client if address.tls else None) for address in addresses]
        self._balancer = Balancer([address.url for address in addresses])
        self._metrics = RouteMetrics()
        self._front = Front(
            self._balancer, self._links, self._metrics, options.timeout_s, options.affinity_header
        )
        self._front.tracing = Tracing.from_environment(os.environ, "shoal-route")
        self._listening: socket.socket = listen(options.host, options.port)
        self.url = f"{'http' if tls is None else 'https'}://{address_of(self._listening)}"
        self._signals = 0
        self._ending = asyncio.Event()
        self._loop = uvloop.new_event_loop()
        self.grpc_url: str | None = None
        self._held: socket.socket | None = None
        self._grpc: GrpcFront | None = None
        if options.grpc_port is not None:
            try:
                self._listen_grpc(options.grpc_port)
            except BaseException:
                self.close()
                raise

    def _listen_grpc(self, port: int) -> None:
        """Listen for gRPC from now on, as for HTTP: whoever calls waits until ``run``."""
        # Its library takes a tenth of a second to import, which who does not want it shall not wait for.
        from shoal.serve.route.grpc_front import GrpcFront
        from shoal.serve.route.grpc_link import GrpcLink

        options, ca_file = self._options, self._options.ca_file
        # Its library listens itself, at an address that is kept for it.
        self._held = hold(options.host, port, "--grpc-port")
        self.grpc_url = address_of(self._held)
        self._front.grpc_port = int(self.grpc_url.rpartition(":")[2])
        ca = None if ca_file is None else ca_file.read_bytes()
        links = [GrpcLink(links, ca, links.address.tls) for links in self._links]
        found = GrpcFront(
            self._balancer, links, self._front.tally, options.timeout_s, options.affinity_header, self._front.tracing
        )
        self._loop.run_until_complete(found.start(self.grpc_url, self._tls_files))
        self._grpc = found

    def run(self, say: Callable[[str], None]) -> bool:
        """Answer until SIGINT or SIGTERM, then finish what was accepted; False where that took longer than it may."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        asyncio.set_event_loop(self._loop)
        try:
            clean: bool = self._loop.run_until_complete(self._run(say))
            return clean
        finally:
            self.close()

    def catch(self) -> None:
        """Let SIGINT and SIGTERM end ``run`` also where they come before it: its loop knows nothing of those."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda _number, _frame: self._interrupt())

    def close(self) -> None:
        """Stop listening; ``run`` does it at its end."""
        self._listening.close()
        if self._loop.is_closed():
            return
        if self._grpc is not None:
            self._loop.run_until_complete(self._grpc.stop(0.0))
        if self._held is not None:
            self._held.close()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def numbers(self) -> dict[str, object]:
        """Outcomes, and what is known of each service."""
        return self._front.numbers()

    async def _run(self, say: Callable[[str], None]) -> bool:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(quietly)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        ending, grpc = self._ending, self._grpc

        def down(index: int) -> None:
            self._front.down(index)
            if grpc is not None:
                grpc.down(index)

        watches = [Health(self._balancer, k, links, down, say) for k, links in enumerate(self._links)]
        # So that the first request finds somebody.
        await asyncio.wait([loop.create_task(watch.look()) for watch in watches], timeout=_FIRST_LOOK_S)
        tasks = [loop.create_task(watch.watch()) for watch in watches] + [loop.create_task(self._front.look())]
        server = HttpServer(self._front, asyncio.Event(), self._tls, self._metrics.turned_away)
        serving = loop.create_task(server.serve(sockets=[self._listening]))
        await asyncio.wait([loop.create_task(ending.wait()), serving], return_when=asyncio.FIRST_COMPLETED)
        tally = self._front.tally
        tally.draining = True
        say("Finishing what was accepted; Ctrl-C once more leaves at once.")
        until = time.monotonic() + self._options.drain_s
        while tally.open and time.monotonic() < until and self._signals < 2:
            await asyncio.sleep(0.01)
        clean = not tally.open
        server.should_exit = True
        if not clean:
            server.force_exit = True
        await serving
        if grpc is not None:
            # What was answered is on its way; its connections end after this at the latest.
            await grpc.stop(_LEAVE_S if clean else 0.0)
        await end(tasks)
        for links in self._links:
            links.close()
        if self._front.tracing is not None:
            self._front.tracing.close()
        return clean

    def _interrupt(self) -> None:
        self._signals += 1
        self._ending.set()


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended, for a second at the most.

    Before Python 3.12 ``asyncio.wait_for`` swallows a cancellation that comes in the same turn as what it waits for: whoever
    goes on in a loop has to be told once more.
    """
    left, until = set(tasks), time.monotonic() + _LEAVE_S
    while left and time.monotonic() < until:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
