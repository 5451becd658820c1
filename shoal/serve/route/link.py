"""Connections from the route to one service: HTTP/1.1, kept between requests, answers handed on piece by piece."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import NamedTuple, cast

import httptools

from shoal.serve.wire import Address

_IDLE_KEPT = 256
# A service closes what was idle for 75 s; whoever asks at that moment would not know whether it was read.
_IDLE_S = 30.0
_MOST_HEAD_BYTES = 64 << 10
_HOLD_BYTES = 256 << 10

_BODILESS = (204, 304)


class Broken(Exception):
    """The connection failed, or what came is no HTTP.

    Attributes:
        sent: whether the service may have read the request; where it cannot have, asking again is always safe.
        begun: whether its answer has begun.
    """

    def __init__(self, why: str, *, sent: bool, begun: bool = False) -> None:
        super().__init__(why)
        self.sent = sent
        self.begun = begun


class Head(NamedTuple):
    """How an answer begins."""

    status: int
    headers: list[tuple[bytes, bytes]]

    def header(self, name: bytes) -> bytes | None:
        """A header's value, by its name in lower case."""
        return next((value for known, value in self.headers if known == name), None)


class Link(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._open = False
        self.idle_since_s = 0.0
        self._writable = asyncio.Event()
        self._writable.set()
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._head: Head | None = None
        self._pieces: collections.deque[bytes] = collections.deque()
        self._held = self._head_bytes = 0
        self._whole = self._sent = False
        self._error: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    # -- asking --------------------------------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """Write a part of a request. Broken where the connection is."""
        self._check()
        self._sent = True
        if not self._open:
            # It has answered without reading all of the request.
            return
        self._transport.write(data)
        if not self._writable.is_set():
            await self._writable.wait()
            self._check()

    async def head(self) -> Head:
        """The beginning of the answer."""
        while self._head is None:
            self._check()
            await self._wait()
        return self._head

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body of the answer, as it comes."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._held -= len(piece)
                if self._held <= _HOLD_BYTES and self._open:
                    self._transport.resume_reading()
                yield piece
            if self._whole:
                return
            self._check()
            await self._wait()

    def fail(self, error: Exception) -> None:
        """Whoever waits for something gets this instead; the connection is of no more use."""
        if self._error is None:
            self._error = error
        self._writable.set()
        self._wake()

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent."""
        return self._open and self._error is None and self._whole and not self._pieces and self._parser.should_keep_alive()

    def ready_again(self) -> bool:
        """Whether an idle connection is still there."""
        if not self._open or time.monotonic() - self.idle_since_s > _IDLE_S:
            return False
        self._begin()
        return True

    def close(self) -> None:
        """Let go of it, at once."""
        if self._open:
            self._open = False
            self._transport.abort()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._open and not self._whole:
            raise Broken("it closed the connection", sent=self._sent, begun=self._head is not None)

    async def _wait(self) -> None:
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class.
        self._transport, self._open = cast(asyncio.Transport, transport), True

    def connection_lost(self, error: Exception | None) -> None:
        self._open = False
        if self._head is not None and not self._whole and self._until_closed() and error is None:
            self._whole = True
        self._writable.set()
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._whole:
            # Nobody has asked for this; it would be taken for the next answer.
            self.close()
            return
        if self._head is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if self._head is None and self._head_bytes > _MOST_HEAD_BYTES:
                raise httptools.HttpParserError("its head is too long")
        except httptools.HttpParserError:
            self.fail(Broken("it does not speak HTTP/1.1", sent=True, begun=self._head is not None))
            self.close()
            return
        if self._held > _HOLD_BYTES:
            self._transport.pause_reading()
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _until_closed(self) -> bool:
        assert self._head is not None
        names = {name for name, _ in self._head.headers}
        return not names & {b"content-length", b"transfer-encoding"} and self._head.status not in _BODILESS

    # -- httptools -----------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._whole:
            raise httptools.HttpParserError("two answers to one request")
        self._head = Head(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._held += len(body)

    def on_message_complete(self) -> None:
        if self._head is not None and self._head.status < 200:
            self._head, self._headers = None, []
            return
        self._whole = True


class Links:
    """The connections to one service."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None) -> None:
        self.address = address
        # Where it speaks gRPC too, as its health checks say.
        self.grpc_port: int | None = None
        self._tls = tls
        self._idle: list[Link] = []

    async def take(self, within_s: float) -> Link:
        """A connection to ask on. Broken, with ``sent`` false, where there is none."""
        while self._idle:
            link = self._idle.pop()
            if link.ready_again():
                return link
            link.close()
        loop = asyncio.get_running_loop()
        address = self.address
        try:
            _, made = await asyncio.wait_for(
                loop.create_connection(Link, address.host, address.port, ssl=self._tls), max(1e-3, within_s)
            )
        except (asyncio.TimeoutError, TimeoutError):
            raise Broken("it did not accept a connection in time", sent=False) from None
        except OSError as error:
            raise Broken((error.strerror or type(error).__name__).lower(), sent=False) from None
        with contextlib.suppress(OSError, AttributeError):
            made._transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def give_back(self, link: Link) -> None:
        """Keep a connection for the next request, or close it where it cannot be."""
        if link.reusable and len(self._idle) < _IDLE_KEPT:
            link.idle_since_s = time.monotonic()
            self._idle.append(link)
        else:
            link.close()

    def close(self) -> None:
        """Let go of all that are idle."""
        while self._idle:
            self._idle.pop().close()

    async def get(self, path: str, within_s: float) -> tuple[Head, bytes]:
        """(head, body) of a small GET; Broken or asyncio.TimeoutError where there is none in time."""
        return await asyncio.wait_for(self._get(path, within_s), within_s)

    async def _get(self, path: str, within_s: float) -> tuple[Head, bytes]:
        link = await self.take(within_s)
        try:
            host = self.address.authority
            await link.send(f"GET {self.address.prefix}{path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            head = await link.head()
            return head, b"".join([piece async for piece in link.pieces()])
        finally:
            self.give_back(link)
