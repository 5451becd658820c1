"""uvicorn as gateway and route use it: on a socket that somebody else holds, with limits on what connections do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from shoal.serve.accepting import Accepting
from shoal.serve.connection import Connection, ConnectionLimits, Overload, Shortcut, Watch, connections_possible

_KEEP_ALIVE_S = 75
# Who does not say goodbye in TLS holds up nobody's shutdown.
_TLS_LEAVE_S = 1.0


class HttpServer(uvicorn.Server):
    """uvicorn that leaves signals alone, limits what connections do, and says when it has begun."""

    def __init__(
        self, app: Any, opened: asyncio.Event, tls: ssl.SSLContext | None, turned: Callable[[str], None],
        overload: Overload = lambda method, url: None, shortcut: Shortcut | None = None,
    ) -> None:  # fmt: skip
        """``app``: the ASGI application; ``opened`` is set when it listens; ``turned``, ``overload``: see ``Connection``."""
        super().__init__(
            uvicorn.Config(app, loop="none", http="httptools", ws="none", lifespan="off", log_config=None,
                           access_log=False, server_header=False, date_header=False, proxy_headers=False,
                           timeout_keep_alive=_KEEP_ALIVE_S, log_level="error")
        )  # fmt: skip
        self._opened = opened
        self._tls = tls
        self._turned = turned
        self._overload = overload
        self._shortcut = shortcut
        self._limits = ConnectionLimits(connections=connections_possible(ConnectionLimits.connections))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # The listening sockets are ours: uvicorn has no way of saying how long a TLS handshake may take.
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        greet_s, leave_s = (None, None) if self._tls is None else (self._limits.head_s, _TLS_LEAVE_S)
        for sock in sockets or []:
            self.servers.append(Accepting(sock, self._connection, self._tls, greet_s, leave_s))  # type: ignore[arg-type]
        self._watch = loop.create_task(Watch(self.server_state.connections).run())
        self._opened.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets=sockets)
        self._watch.cancel()

    def _connection(self) -> Connection:
        return Connection(
            self._limits, self._turned, self._overload, config=self.config, server_state=self.server_state, app_state={},
            shortcut=self._shortcut,
        )
