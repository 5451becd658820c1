"""Connections over real sockets; their time is counted by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from shoal.serve.connection import Connection, ConnectionLimits
from shoal.serve.heads import Heads
from shoal.serve.refusals import Refusal

_LIMITS = ConnectionLimits(connections=2, head_bytes=2000, headers=10, head_s=10, idle_s=75, ahead=4)
_LONG = 64 << 20


class _Server:
    """An application that answers its path; /wait only after ``let_go``, /long with more than a socket holds."""

    def __init__(self) -> None:
        self.turned: list[str] = []
        self.overloaded = False
        self.refused = self.routed = 0
        self.heads = Heads()
        self.askers: list[Any] = []
        self.let_go = asyncio.Event()
        self.state = ServerState()
        self.config = uvicorn.Config(self._app, ws="none", lifespan="off", log_config=None, log_level="error",
                                     interface="asgi3", proxy_headers=False)  # fmt: skip

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            await self.let_go.wait()
        if scope["path"] == "/in":
            while (await receive()).get("more_body", False):
                pass
        body = b"x" * _LONG if scope["path"] == "/long" else scope["path"].encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    def make(self) -> Connection:
        return Connection(
            _LIMITS, self.turned.append, self._overload, config=self.config, server_state=self.state, app_state={},
            shortcut=self,
        )  # fmt: skip

    def route(self, url: bytes, headers: Any) -> Any:
        self.routed += 1
        return url if url.startswith(b"/short") else None

    def plan(self, route: bytes) -> Any:
        return route

    def handed_on(self) -> None:
        pass

    def begin(self, planned: bytes, body: bytes, asker: Any) -> bool:
        """/short?later is answered after ``let_go``, /short?app by the application."""
        if planned.endswith(b"app"):
            return False
        self.askers.append(asker)

        def answer() -> None:
            said = b"short " + body
            asker.answer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said))

        if planned.endswith(b"later"):
            asyncio.get_running_loop().create_task(self.let_go.wait()).add_done_callback(lambda _: answer())
        elif planned.endswith(b"no"):
            asker.answer(Refusal(429, "Too late.", 0.2))
        else:
            answer()
        return True

    def _overload(self, method: bytes, url: bytes) -> Callable[[], Refusal] | None:
        if not self.overloaded or method != b"POST":
            return None

        def refused() -> Refusal:
            self.refused += 1
            return Refusal(429, "Too much.", 1.0)

        return refused

    async def tick(self, times: int) -> None:
        for _ in range(times):
            for connection in list(self.state.connections):
                connection.tick()  # type: ignore[union-attr]
            await asyncio.sleep(0)


def _run(test: Callable[[_Server, Any], Awaitable[None]], loop: Callable[[Any], None] = asyncio.run) -> None:
    async def run() -> None:
        service = _Server()
        server = await asyncio.get_running_loop().create_server(service.make, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        writers = []

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            open_now = len(service.state.connections)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            while len(service.state.connections) == open_now:
                await asyncio.sleep(0.001)
            return reader, writer

        try:
            await asyncio.wait_for(test(service, connect), 60)
        finally:
            for writer in writers:
                writer.transport.abort()
            server.close()
            await asyncio.sleep(0)

    loop(run())


async def _head_arrived(service: _Server) -> None:
    while not any(connection._in_head for connection in service.state.connections):  # type: ignore[union-attr]
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nA: ", b""])
def test_who_does_not_ask_in_time_is_cut_off(sent: bytes) -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(sent)
        if sent:
            await _head_arrived(service)
        await service.tick(10)
        assert not service.turned
        await service.tick(1)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer and service.turned == ["slow"]

    _run(test)


def test_an_idle_connection_may_stay_longer_but_not_for_ever() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"GET /a HTTP/1.1\r\n\r\n")
        assert (await reader.readuntil(b"/a")).startswith(b"HTTP/1.1 200")
        await service.tick(70)
        writer.write(b"GET /b HTTP/1.1\r\n\r\n")
        assert (await reader.readuntil(b"/b")).startswith(b"HTTP/1.1 200")
        await service.tick(75)
        writer.write(b"\r\n")  # is not a request
        await asyncio.sleep(0.05)
        await service.tick(1)
        assert await reader.read() == b""

    _run(test)


def test_who_waits_for_an_answer_is_not_cut_off() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
        while not service.state.tasks:
            await asyncio.sleep(0.001)
        await service.tick(200)
        service.let_go.set()
        assert (await reader.readuntil(b"/wait")).startswith(b"HTTP/1.1 200")

    _run(test)


def test_who_does_not_read_is_cut_off() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.transport.pause_reading()
        writer.write(b"GET /long HTTP/1.1\r\n\r\n")
        while not any(connection.flow.write_paused for connection in service.state.connections):  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        await service.tick(76)
        await asyncio.sleep(0)
        assert not service.state.connections
        writer.transport.resume_reading()
        with pytest.raises(ConnectionError):
            while await reader.read(1 << 20):
                pass
            raise ConnectionError

    _run(test)


def test_connections_are_limited() -> None:
    async def test(service: _Server, connect: Any) -> None:
        first, _ = await connect(), await connect()
        reader, _ = await connect()
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer and service.turned == ["connections"]
        first[1].write(b"GET /a HTTP/1.1\r\n\r\n")
        assert (await first[0].readuntil(b"/a")).startswith(b"HTTP/1.1 200")

    _run(test)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 3000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 11 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 300_000, b"431"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
)
def test_long_heads_and_nonsense(sent: bytes, status: bytes) -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(sent)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 " + status) and answer.endswith(b'."}') and service.turned == ["http"]

    _run(test)


@pytest.mark.parametrize("after", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 12, b"GET /b HTTP/1.1\r\n\r\n" * 9])
def test_what_was_asked_before_nonsense_is_answered_and_nothing_else_is(after: bytes) -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"GET /wait HTTP/1.1\r\n\r\n" + after)
        while not service.turned:
            await asyncio.sleep(0.001)
        service.let_go.set()
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1 200") == answer.count(b"HTTP/1.1")
        assert answer.count(b"/wait") == 1 and answer.count(b"/b") == min(_LIMITS.ahead, after.count(b"/b"))

    _run(test)


def test_a_body_after_the_answer_ends_the_connection() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"GET /a HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        assert (await reader.read()).endswith(b"/a")

    _run(test)


async def _answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of the next response."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length"))
    return head, await reader.readexactly(length)


def _post(body: bytes, more: bytes = b"") -> bytes:
    return b"POST /in HTTP/1.1\r\nHost: a\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_overload_is_answered_past_the_application_and_the_connection_goes_on() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        service.overloaded = True
        # Two at once, the second behind the first on the same connection.
        writer.write(_post(b"one") + _post(b"two"))
        for _ in range(2):
            head, body = await _answer(reader)
            assert head.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in head and b"close" not in head
            assert b"Too much." in body
        writer.write(b"GET /get HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await _answer(reader))[1] == b"/get"
        service.overloaded = False
        writer.write(_post(b"three"))
        assert (await _answer(reader))[1] == b"/in"
        assert service.refused == 2 and not service.turned
        service.overloaded = True
        writer.write(_post(b"four", b"Connection: close\r\n"))
        assert (await reader.read()).startswith(b"HTTP/1.1 429")

    _run(test)


def test_overload_leaves_to_the_application_what_it_cannot_judge() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        service.overloaded = True
        writer.write(_post(b'{"parameters": {"timeout": 9}}'))
        assert (await _answer(reader))[1] == b"/in", "a deadline of its own"
        whole = _post(b"slowly")
        writer.write(whole[:-3])
        await writer.drain()
        (connection,) = service.state.connections
        while not connection.cycle.more_body:  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        writer.write(whole[-3:])
        assert (await _answer(reader))[1] == b"/in", "a body that takes longer than its head"
        writer.write(_post(b"after", b"Expect: 100-continue\r\n"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        assert (await _answer(reader))[1] == b"/in"
        assert service.refused == 0

    _run(test)


def _short(kind: bytes, body: bytes, more: bytes = b"") -> bytes:
    return b"POST /short?" + kind + b" HTTP/1.1\r\nHost: a\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_the_short_way_is_answered_in_order_and_the_connection_goes_on() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        # At once, refused, at once again, by the application after all, all in one piece.
        writer.write(_short(b"", b"one") + _short(b"no", b"two") + _short(b"", b"three") + _short(b"app", b"four"))
        assert (await _answer(reader))[1] == b"short one"
        head, _ = await _answer(reader)
        assert head.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in head and b"close" not in head
        assert (await _answer(reader))[1] == b"short three"
        assert (await _answer(reader))[1] == b"/short"
        # What is asked behind one that takes its time waits for it, on either way.
        writer.write(_short(b"later", b"five") + _short(b"", b"six") + b"GET /get HTTP/1.1\r\nHost: a\r\n\r\n")
        while len(service.askers) < 4:
            await asyncio.sleep(0.001)
        await service.tick(200)
        service.let_go.set()
        assert [(await _answer(reader))[1] for _ in range(3)] == [b"short five", b"/short", b"/get"]
        assert not service.turned
        writer.write(_short(b"", b"last", b"Connection: close\r\n"))
        assert (await reader.read()).endswith(b"short last")

    _run(test)


def test_a_head_that_was_read_before_is_not_parsed_again() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        for number in range(3):
            writer.write(_short(b"", b"one %d" % number))
            assert (await _answer(reader))[1] == b"short one %d" % number
        assert service.routed == 1
        # In two pieces, behind another one, longer than it says, with another length: all as before.
        whole = _short(b"", b"one 4")
        for cut in (10, len(whole) - 2):
            writer.write(whole[:cut])
            await asyncio.sleep(0.02)
            writer.write(whole[cut:])
            assert (await _answer(reader))[1] == b"short one 4"
        writer.write(whole + _short(b"app", b"five") + whole)
        assert [(await _answer(reader))[1] for _ in range(3)] == [b"short one 4", b"/short", b"/short"]
        writer.write(_short(b"later", b"six"))
        while len(service.askers) < 7:
            await asyncio.sleep(0.001)
        # Known, but one is under way: it waits for it.
        writer.write(whole)
        await asyncio.sleep(0.02)
        service.let_go.set()
        assert [(await _answer(reader))[1] for _ in range(2)] == [b"short six", b"/short"]
        writer.write(whole + b"GET")
        assert (await _answer(reader))[1] == b"short one 4"
        await service.tick(11)
        assert b"408" in (await reader.read())

    _run(test)


def test_a_body_in_pieces_goes_the_short_way_unless_it_takes_long() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        for ticks, answer in ((0, b"short slowly"), (1, b"/short")):
            whole = _short(b"", b"slowly")
            writer.write(whole[:-3])
            (connection,) = service.state.connections
            while connection._planned is None:  # type: ignore[union-attr]
                await asyncio.sleep(0.001)
            await service.tick(ticks)
            writer.write(whole[-3:])
            assert (await _answer(reader))[1] == answer

    _run(test)


def test_who_left_is_known_and_gets_nothing() -> None:
    async def test(service: _Server, connect: Any) -> None:
        _, writer = await connect()
        writer.write(_short(b"later", b"x"))
        while not service.askers:
            await asyncio.sleep(0.001)
        assert not service.askers[0].gone()
        writer.transport.abort()
        while not service.askers[0].gone():
            await asyncio.sleep(0.001)
        service.let_go.set()
        await asyncio.sleep(0.01)

    _run(test)


def test_who_has_said_all_and_waits_is_answered() -> None:
    async def test(service: _Server, connect: Any) -> None:
        for asked in (b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n", _short(b"later", b"x")):
            service.let_go.clear()
            reader, writer = await connect()
            writer.write(asked)
            writer.write_eof()
            (connection,) = service.state.connections
            while not connection.transport.half_closed:  # type: ignore[union-attr]
                await asyncio.sleep(0.001)
            assert not service.askers or service.askers[0].gone(), "it may as well have left: others go first"
            service.let_go.set()
            assert (await reader.read()).endswith((b"/wait", b"short x")) and not service.state.connections
        # All that was asked is answered, in order.
        service.let_go.clear()
        reader, writer = await connect()
        writer.write(_short(b"later", b"1") + _short(b"", b"2") + b"GET /3 HTTP/1.1\r\nHost: a\r\n\r\n")
        writer.write_eof()
        await asyncio.sleep(0.02)
        service.let_go.set()
        said = await reader.read()
        assert 0 < said.find(b"short 1") < said.find(b"/short") < said.find(b"/3")
        # In the middle of a request, or where nothing was asked, it has left.
        for asked in (b"", _short(b"later", b"x")[:-1], b"POST /in HTTP/1.1\r\nContent-Length: 9\r\n\r\n"):
            reader, writer = await connect()
            writer.write(asked)
            writer.write_eof()
            assert await reader.read() == b""

    _run(test, uvloop.run)


def test_a_connection_that_was_cut_off_with_another_request_behind_gets_nothing() -> None:
    async def test(service: _Server, connect: Any) -> None:
        troubles: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        _, writer = await connect()
        writer.write(_short(b"later", b"x") + _short(b"", b"y"))
        (connection,) = service.state.connections
        while not connection.pipeline:  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        connection.transport.abort()  # type: ignore[union-attr]
        while not service.askers[0].gone():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        service.let_go.set()
        await asyncio.sleep(0.01)
        # A desk that answers is in the middle of a batch: an exception there would cost others their answers.
        assert not troubles and len(service.askers) == 1

    _run(test, uvloop.run)


def test_an_answer_of_the_application_to_who_left_is_no_mishap(caplog: pytest.LogCaptureFixture) -> None:
    async def test(service: _Server, connect: Any) -> None:
        _, writer = await connect()
        writer.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" + b"GET /get HTTP/1.1\r\nHost: a\r\n\r\n")
        (connection,) = service.state.connections
        while not connection.pipeline:  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        connection.transport.abort()  # type: ignore[union-attr]
        await asyncio.sleep(0.01)
        service.let_go.set()
        await asyncio.sleep(0.01)

    _run(test, uvloop.run)
    assert not caplog.records


def test_refusals_are_not_piled_up_for_who_does_not_read() -> None:
    async def test(service: _Server, connect: Any) -> None:
        service.overloaded = True
        _, writer = await connect()
        asked = 0
        (connection,) = service.state.connections
        transport = connection.transport  # type: ignore[union-attr]
        transport.set_write_buffer_limits(high=1000)
        while not connection.flow.read_paused:  # type: ignore[union-attr]
            writer.write(b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n" * 100)
            asked += 100
            await asyncio.sleep(0)
            assert asked < 500_000
        assert service.refused < asked and transport.get_write_buffer_size() < 1 << 20

    _run(test)


def test_at_the_end_of_the_service_the_open_one_is_answered() -> None:
    async def test(service: _Server, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(_short(b"later", b"x"))
        while not service.askers:
            await asyncio.sleep(0.001)
        for connection in list(service.state.connections):
            connection.shutdown()  # type: ignore[union-attr]
        service.let_go.set()
        assert (await reader.read()).endswith(b"short x")

    _run(test)
