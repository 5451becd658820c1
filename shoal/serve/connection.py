"""One HTTP connection of the gateway: uvicorn's, with limits on what a client may send and how long it may take.

uvicorn buffers a head as long as it grows and waits for its end for ever. Here a head, what surrounds a body, requests ahead of
their answers and connections are bounded, and whoever sends none of these in time is cut off. Hot path: nothing but counters;
the time is kept by one ``Watch`` for all connections.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shoal.serve.asgi import TIMEOUT_HEADER
from shoal.serve.heads import Heads
from shoal.serve.protocols.v2 import error_body
from shoal.serve.refusals import Refusal

Overload = Callable[[bytes, bytes], "Callable[[], Refusal] | None"]
"""Method and address of a request -> what counts it as refused and says how, where it is to be; else None."""

class Asker(Protocol):
    """Who waits for an answer. ``keep_alive``: whether the connection stays after it."""

    keep_alive: bool

    def gone(self) -> bool:
        """Whether nobody waits any more."""

    def answer(self, answered: bytes | Refusal) -> None:
        """Take the answer: a whole response, or why there is none."""


class Shortcut(Protocol):
    """A way past the application for the most usual requests, see ``shoal.serve.direct.Direct``."""

    heads: Heads

    def route(self, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Any:
        """What a POST asks for by its head alone; None where only the application knows."""

    def plan(self, route: Any) -> Any:
        """What becomes of such a request that has just come; None where it has to go to the application."""

    def begin(self, planned: Any, body: bytes, asker: Asker) -> bool:
        """Have it answered, once; False where it has to go to the application after all."""

    def handed_on(self) -> None:
        """Told of each request that was planned, and goes to the application after all."""


_OWN_DEADLINE = b'"timeout"'
_TICK_S = 1.0
# Of what is no body: the head, the lengths of chunks, what follows the last one. The shortest chunks have six bytes beside one.
_MOST_AROUND = 64 << 10
_AROUND_EACH = 8
# Who was told that the connection ends may still send so much for so long.
_MOST_AFTER = 1 << 20
_LEAVE_S = 2.0
_OTHER_DESCRIPTORS = 256


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What one connection may do, and how many there may be.

    Attributes:
        connections: at once; the next is answered 503 and closed.
        head_bytes, headers: the longest head of a request, and the most headers in it.
        head_s: how long a client may take for a head, from the first byte of it (of the first: from its connecting).
        idle_s: how long it may keep a connection on which nothing is asked.
        ahead: requests on one connection that wait for the answer to the one before.
    """

    connections: int = 4096
    head_bytes: int = 32 << 10
    headers: int = 100
    head_s: float = 10.0
    idle_s: float = 75.0
    ahead: int = 64


class _Broken(Exception):
    """What came is over a limit; raised through the parser, which stops reading there."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class _OneWrite:
    """A transport that keeps a response's head until its body comes: one system call and one packet instead of two."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write = transport.write
        self._head = b""
        # Whether the client says nothing more, and may have left.
        self.half_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.endswith(b"\r\n\r\n") and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._head = data
            return
        # Of several requests on a connection that has ended, uvicorn tells only the newest.
        if not self._transport.is_closing():
            self._write(data)

    def write_whole(self, data: bytes) -> None:
        """Write a whole response, however it ends."""
        self._write(data)

    def flush(self) -> None:
        """Write a head that no body follows."""
        if self._head:
            self._write(self._head)
            self._head = b""

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _Nobody:
    """Nobody waits for a body that has come."""

    def set(self) -> None:
        return


class _Short:
    """What uvicorn's cycle is to a connection, for a request that goes past the application."""

    __slots__ = ("_connection", "disconnected", "keep_alive", "response_complete")

    more_body = response_started = False
    message_event = _Nobody()

    def __init__(self, connection: Connection, keep_alive: bool) -> None:
        self._connection = connection
        self.keep_alive = keep_alive
        self.disconnected = self.response_complete = False

    def gone(self) -> bool:
        return self._left() or self._connection.transport.half_closed  # type: ignore[attr-defined,no-any-return]

    def _left(self) -> bool:
        # Where another request waits behind this one, only that one is told that the client left.
        return self.disconnected or self._connection.transport.is_closing()

    def answer(self, answered: bytes | Refusal) -> None:
        """The one answer, if there is still somebody to get it."""
        if not self.response_complete:
            self.response_complete = True
            if not self._left():
                self._connection.answered(self, answered)


class Connection(HttpToolsProtocol):
    """One client's connection.

    ``turned``: told, with a word for why, of each request that never came to the application. ``overload``: asked, with method
    and address, whether a request is to be refused as it is; then the application is not troubled, which is most of its cost.
    """

    def __init__(
        self, limits: ConnectionLimits, turned: Callable[[str], None], overload: Overload, *args: Any,
        shortcut: Shortcut | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._shortcut = shortcut
        self._route: Any = None
        self._planned: Any = None
        # Nothing of another request was read; and the piece that is read now, as long as it may be one whole request.
        self._between, self._single = True, b""
        self._overload = overload
        self._refuse: Callable[[], Refusal] | None = None
        self._held: list[bytes] = []
        self._limits = limits
        self._turned = turned
        # Nothing more is read: the last answer is on its way (and, where leaving, written).
        self._given_up = self._leaving = False
        self._in_head = self._asked = False
        self._ticks = 0
        self._piece = self._raw = self._body = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.transport = _OneWrite(self.transport)  # type: ignore[assignment]
        if len(self.connections) > self._limits.connections:
            self._turned("connections")
            self._say(Refusal(503, "Too many connections are open; try again later.", 1.0))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._planned is not None:
            # It ended within a body: the application counts it.
            self._go_on()
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client says nothing more: it has left, or (``printf … | nc -N``) waits for its answer; both look alike."""
        cycle = self.cycle
        if not self._between or cycle is None or cycle.response_complete or self.scheme == "https":
            return None
        if self._given_up:
            # Said again when an answer to one of several requests lets reading go on.
            return self.transport.half_closed or None  # type: ignore[attr-defined]
        self.transport.half_closed = True  # type: ignore[attr-defined]
        self._finish_and_close()
        return True

    def shutdown(self) -> None:
        if self._planned is not None:
            self._go_on()
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        self._piece = len(data)
        self._raw += self._piece
        if self._given_up:
            if self._leaving and self._raw > _MOST_AFTER:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        if self._between:
            if self._shortcut is not None and self._answer_known(self._shortcut, data):
                return
            self._single = data
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # "Upgrade: h2c" and the like: the request is answered as the HTTP/1.1 that it is, and nothing after it is read.
            self._finish_and_close()
            return
        except httptools.HttpParserError as error:
            cause = error.__context__ if isinstance(error.__context__, _Broken) else None
            self._break(cause or _Broken(400, "This is not HTTP/1.1."))
            return
        if self._refuse is not None:
            # Its body takes longer than that.
            self._go_on()
        self._single = b""
        if self._in_head or self._raw > _MOST_AROUND:
            self._look_at_size()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._between = True, False
        # The piece that a request begins in is not counted with it.
        self._ticks = self._raw = self._body = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > self._limits.headers:
            raise _Broken(431, f"The request has more than {self._limits.headers} headers.")

    def on_headers_complete(self) -> None:
        self._in_head, self._asked = False, True
        self._ticks = 0
        most = self._limits.head_bytes
        if self._raw + self._piece > most:
            if len(self.url) > most:
                raise _Broken(414, f"The address asked for is longer than {most} bytes.")
            if sum(len(name) + len(value) for name, value in self.headers) > most:
                raise _Broken(431, f"The headers are longer than {most} bytes.")
        if len(self.pipeline) >= self._limits.ahead:
            raise _Broken(429, f"More than {self._limits.ahead} requests wait on this connection; read the answers first.")
        if self.cycle is None or self.cycle.response_complete:
            self._planned = self._plan()
            if self._planned is not None:
                return
            self._refuse = self._overload(self.parser.get_method(), self.url)
            # Who does not read its answers waits for the application, which waits for it.
            waits = self.flow.write_paused or self.expect_100_continue
            if self._refuse is not None and not (waits or TIMEOUT_HEADER in dict(self.headers)):
                return
            self._refuse = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if self._refuse is not None or self._planned is not None:
            self._held.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._between = True
        if self._planned is not None and self._answer_directly():
            return
        if self._refuse is not None:
            if not any(_OWN_DEADLINE in body for body in self._held):
                refusal = self._refuse()
                self._refuse, self._held = None, []
                self.transport.write(_rendered(refusal, self.parser.should_keep_alive()))
                if not self.parser.should_keep_alive():
                    self._finish_and_close()
                return
            self._go_on()
        super().on_message_complete()

    def _plan(self) -> Any:
        if self._shortcut is None or self.flow.write_paused or self.parser.get_method() != b"POST":
            return None
        if self.parser.get_http_version() != "1.1":
            return None
        self._route = self._shortcut.route(self.url, self.headers)
        return None if self._route is None else self._shortcut.plan(self._route)

    def _answer_known(self, shortcut: Shortcut, piece: bytes) -> bool:
        """Have a whole request answered past the parser, too, where it has a head that was parsed before."""
        before = self.cycle
        if self.flow.write_paused or not (before is None or before.response_complete):
            return False
        known = shortcut.heads.find(piece)
        planned = None if known is None else shortcut.plan(known[0])
        if known is None or planned is None:
            return False
        self.cycle = short = _Short(self, keep_alive=True)  # type: ignore[assignment]
        if not shortcut.begin(planned, known[1], short):  # type: ignore[arg-type]
            self.cycle = before
            return False
        self._asked = True
        self._ticks = self._raw = self._body = 0
        return True

    def _answer_directly(self) -> bool:
        """Have a whole request answered past the application, if that is possible."""
        assert self._shortcut is not None
        before, short = self.cycle, _Short(self, self.parser.should_keep_alive())
        self.cycle = short  # type: ignore[assignment]
        body = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        if self._shortcut.begin(self._planned, body, short):
            if self._single and short.keep_alive and self._single.endswith(body):
                self._shortcut.heads.keep(self._single, len(body), self._route)
            self._single = b""
            self._planned, self._held = None, []
            return True
        self.cycle = before
        self._go_on()
        return False

    def answered(self, short: _Short, answered: bytes | Refusal) -> None:
        """Write an answer that came past the application."""
        whole = answered if isinstance(answered, bytes) else _rendered(answered, short.keep_alive)
        self.transport.write_whole(whole)  # type: ignore[attr-defined]
        self._ticks = 0
        if not short.keep_alive or (self._given_up and not self.pipeline):
            self.transport.close()
        if self.pipeline:
            super().on_response_complete()
        else:
            # How long it may be idle is kept by ``tick``: uvicorn would start a timer for each request.
            self.server_state.total_requests += 1

    def _go_on(self) -> None:
        """Give a request to the application after all."""
        if self._planned is not None and self._shortcut is not None:
            self._shortcut.handed_on()
        held, self._refuse, self._planned, self._held = self._held, None, None, []
        super().on_headers_complete()
        for body in held:
            super().on_body(body)

    def on_response_complete(self) -> None:
        last = not self.pipeline
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
        self._ticks = 0
        # Answered before it was read: what is still to come is of no use, and might be endless.
        if last and (self._given_up or self.cycle.more_body):
            self._unset_keepalive_if_required()
            self.transport.close()

    def tick(self) -> None:
        """A second has passed; cut off whoever takes too long to ask, or to read what was answered."""
        if self._planned is not None:
            # Its body takes long: the application keeps the time.
            self._go_on()
        limits, cycle = self._limits, self.cycle
        self._ticks += 1
        spent_s = self._ticks * _TICK_S
        if self._leaving or self.transport.is_closing() or self.flow.write_paused:
            if spent_s > (_LEAVE_S if self._leaving else limits.idle_s):
                self.transport.abort()
        elif cycle is not None and (not cycle.response_complete or self._given_up):
            # The application has its own deadlines, for bodies and for answers.
            self._ticks = 0
        elif self._in_head or not self._asked:
            if spent_s > limits.head_s:
                self._turned("slow")
                self._say(Refusal(408, f"The request did not arrive within {limits.head_s:g} s."))
        elif spent_s > limits.idle_s:
            self.transport.close()

    # -- what is wrong -------------------------------------------------------------------------------------------

    def _look_at_size(self) -> None:
        """What has been received of a request and is no part of its body is bounded, also the headers behind the body."""
        around, most = self._raw - self._body, self._limits.head_bytes
        if self._in_head:
            if around > most or len(self.url) > most:
                self._break(_Broken(431, f"The headers are longer than {most} bytes."))
        elif around > _MOST_AROUND + _AROUND_EACH * self._body:
            self._break(_Broken(400, "There is far more around the body than in it."))

    def _break(self, why: _Broken) -> None:
        """What comes next cannot be understood: answer it after what is under way, and close."""
        if self._planned is not None:
            self._go_on()
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._turned("http")
            self._say(Refusal(why.status, why.sentence))
        elif not cycle.more_body:
            # Earlier requests still get their answers; one to this could be taken for one of theirs.
            self._turned("http")
            self._finish_and_close()
        elif self.pipeline:
            # The broken one is the newest of those that wait.
            self._turned("http")
            self.pipeline.popleft()
            self._given_up = True
        else:
            # The application is reading it: it learns that there is no more, and counts it.
            said = cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
            self._leave() if said else self._say(Refusal(why.status, why.sentence))

    def _finish_and_close(self) -> None:
        """Read nothing more; close when what was asked is answered."""
        self._given_up = True
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.flow.pause_reading()
            self.cycle.keep_alive = False

    def _say(self, refusal: Refusal) -> None:
        """Write an answer past the application, and leave."""
        self.transport.write(_rendered(refusal, keep_alive=False))
        self._leave()

    def _leave(self) -> None:
        """Close, but read for a moment what was sent meanwhile: else the client's machine would throw away our answer."""
        self._given_up = self._leaving = True
        self._ticks = self._raw = 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()


def _rendered(refusal: Refusal, keep_alive: bool) -> bytes:
    """A whole response."""
    later_s = refusal.retry_after_s
    return _whole(refusal.status, refusal.sentence, None if later_s is None else max(1, round(later_s)), keep_alive)


@functools.lru_cache(maxsize=64)
def _whole(status: int, sentence: str, retry_after_s: int | None, keep_alive: bool) -> bytes:
    body = error_body(sentence)
    more = "" if retry_after_s is None else f"retry-after: {retry_after_s}\r\n"
    more += "" if keep_alive else "connection: close\r\n"
    phrase = "Client Closed Request" if status == 499 else HTTPStatus(status).phrase
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n{more}"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Watch:
    """Keeps the time for all connections, once a second."""

    def __init__(self, connections: set[Any]) -> None:
        self._connections = connections

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            for connection in list(self._connections):
                connection.tick()


def connections_possible(wanted: int) -> int:
    """Raise how many descriptors this process may have as far as it may; return how many of ``wanted`` connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + _OTHER_DESCRIPTORS:
        soft = wanted + _OTHER_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, wanted + _OTHER_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(16, min(wanted, soft - _OTHER_DESCRIPTORS))


def quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's handler of exceptions: what only says that a client did not speak TLS, or left, is no news."""
    if not isinstance(context.get("exception"), ssl.SSLError | ConnectionError | TimeoutError | asyncio.TimeoutError):
        loop.default_exception_handler(context)
