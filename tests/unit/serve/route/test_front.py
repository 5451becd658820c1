"""The route's application over small real services."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import small_service
import uvloop
from small_service import Request, Service, refuse, respond

from shoal.serve import wire
from shoal.serve.route.balance import Balancer
from shoal.serve.route.front import Front
from shoal.serve.route.link import Links
from shoal.serve.route.metrics import RouteMetrics

_INFER = "/v2/models/double/infer"
_BODY = json.dumps(
    {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}], "parameters": {"timeout": 20_000_000}}
).encode()


def _with(work: Callable[[list[Service], Callable[..., Awaitable[tuple[int, bytes]]], Front], Awaitable[None]]) -> None:
    """Run ``work`` with two services, a way to ask the front, and the front."""
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(small_service.serving()) for _ in range(2)]
        links = [Links(wire.parse_url(service.url), None) for service in services]
        balancer = Balancer([service.url for service in services])
        front = Front(balancer, links, RouteMetrics(), 20.0, "X-Affinity-Key")

        async def ask(path: str, body: bytes = _BODY, **headers: str) -> tuple[int, bytes]:
            pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
            scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": pairs}
            said: list[Any] = []

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body}

            async def send(message: Any) -> None:
                said.append(message)

            await front(scope, receive, send)
            return said[0]["status"], b"".join(message["body"] for message in said[1:])

        async def run() -> None:
            look = asyncio.create_task(front.look())
            for k in range(2):
                balancer.health(k, None)
            await work(services, ask, front)
            look.cancel()
            assert front.tally.accepted == sum(front.tally.counts.values()) and front.tally.open == 0
            for link in links:
                link.close()

        asyncio.run(run())


def _hang_up(_: Request) -> bytes | None:
    return None


@pytest.mark.parametrize(
    ("path", "headers", "repeatable"),
    [(_INFER, {}, True), ("/v2/other/infer", {}, False), ("/v2/other/infer", {"idempotency_key": "k"}, True)],
)
def test_what_is_pure_is_asked_again_and_nothing_else_unless_it_has_a_key(
    path: str, headers: dict[str, str], repeatable: bool
) -> None:
    async def work(services: list[Service], ask: Any, front: Front) -> None:
        services[0].otherwise = services[1].otherwise = _hang_up
        assert (await ask(path, **headers))[0] == 502
        assert (sum(len(service.requests) for service in services) > 1) == repeatable
        services[1].otherwise = small_service.double
        if repeatable:
            assert [(await ask(path, **headers))[0] for _ in range(3)] == [200] * 3

    _with(work)


def test_a_refusal_is_asked_about_elsewhere_and_given_where_all_refuse() -> None:
    async def work(services: list[Service], ask: Any, front: Front) -> None:
        services[0].otherwise = refuse(429, "Too much here.", retry_after="3")
        assert [(await ask(_INFER))[0] for _ in range(4)] == [200] * 4
        services[1].otherwise = refuse(429, "Too much there.", retry_after="3")
        status, body = await ask(_INFER)
        assert status == 429 and b"Too much" in body
        assert {u.breaker.state(0.0) for u in front._balancer.upstreams} == {"closed"}

    _with(work)


def test_an_answer_that_breaks_off_is_never_asked_for_again() -> None:
    async def work(services: list[Service], ask: Any, front: Front) -> None:
        for service in services:
            service.otherwise = lambda request: respond(200, b"x" * 100)[:-50]
            service.hangs_up = True
        before = sum(len(service.inferences) for service in services)
        status, body = await ask(_INFER)
        # The beginning was handed on, so that is all: the connection is cut, and it counts as failed.
        assert status == 200 and body == b"x" * 50
        assert sum(len(service.inferences) for service in services) == before + 1
        assert front.numbers()["failed"] == 1

    _with(work)


def test_a_model_that_one_service_lacks_is_found_at_another() -> None:
    async def work(services: list[Service], ask: Any, front: Front) -> None:
        services[0].otherwise = refuse(404, "There is no such model here.")
        assert [(await ask(_INFER))[0] for _ in range(6)] == [200] * 6
        assert len(services[0].inferences) <= 1
        services[1].otherwise = services[0].otherwise
        for _ in range(2):
            assert (await ask("/v2/models/nothing/infer"))[0] == 404
        # Each was asked once; after that one of them is enough.
        assert sum(request.path.startswith("/v2/models/nothing") for s in services for request in s.requests) == 3

    _with(work)


def test_who_asks_for_a_version_that_is_not_there_takes_the_model_from_nobody() -> None:
    def missing(request: Request) -> bytes | None:
        there = "/versions/9/" not in request.path
        return small_service.double(request) if there else refuse(404, "There is no such version.")(request)

    async def work(services: list[Service], ask: Any, front: Front) -> None:
        services[0].otherwise = services[1].otherwise = missing
        assert (await ask("/v2/models/double/versions/9/infer"))[0] == 404
        assert [(await ask(_INFER))[0] for _ in range(4)] == [200] * 4

    _with(work)


@pytest.mark.parametrize("answered", [b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n", b""])
def test_a_body_of_unknown_length_is_framed_as_its_head_says_when_it_is_sent_again(answered: bytes) -> None:
    pieces = [b"x" * 70_000, b"5\r\nhello\r\n0\r\n\r\n", b""]
    heads: list[bytes] = []
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            assert await reader.readline() == b"\r\n"
        bodies.append(body)
        writer.write(answered if len(heads) == 1 else b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        links = [Links(wire.parse_url(url), None), Links(wire.parse_url(url.replace("127.0.0.1", "localhost")), None)]
        front = Front(balancer := Balancer(["one", "two"]), links, RouteMetrics(), 20.0, "X-Affinity-Key")
        balancer.health(0, None)
        balancer.health(1, None)
        left, said = list(pieces), list[Any]()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": "POST", "path": _INFER, "raw_path": _INFER.encode(), "headers": []}
        await front(scope, receive, send)
        assert said[0]["status"] == 200 and bodies == [b"".join(pieces)] * 2
        assert all(b"transfer-encoding: chunked" in head and b"content-length" not in head for head in heads)
        for link in links:
            link.close()
        server.close()

    asyncio.run(run())


def test_a_service_that_answers_before_it_has_read_everything_is_understood() -> None:
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(60_000)
        writer.write(b"HTTP/1.1 413 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno")
        writer.close()
        await writer.wait_closed()
        left.set()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        links = [Links(wire.parse_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), None)]
        front = Front(balancer := Balancer(["one"]), links, RouteMetrics(), 20.0, "X-Affinity-Key")
        balancer.health(0, None)
        asked, said = 0, list[Any]()

        async def receive() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked == 2:
                await left.wait()
                await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b"x" * 70_000, "more_body": asked < 2}

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": "POST", "path": _INFER, "raw_path": _INFER.encode(),
                 "headers": [(b"content-length", b"140000")]}  # fmt: skip
        await front(scope, receive, send)
        assert said[0]["status"] == 413 and front.numbers()["invalid"] == 1
        server.close()

    uvloop.run(run())


def test_who_does_not_read_its_answer_holds_no_service() -> None:
    class Client:
        """Reads nothing; what is to be sent waits until its connection is gone."""

        disconnected = False

        def __init__(self) -> None:
            self.transport = self
            self.aborted = asyncio.Event()

        def abort(self) -> None:
            self.aborted.set()

        async def receive(self) -> dict[str, Any]:
            return {"type": "http.request", "body": _BODY}

        async def send(self, message: Any) -> None:
            if message.get("body"):
                await self.aborted.wait()

    async def work(services: list[Service], ask: Any, front: Front) -> None:
        services[0].otherwise = services[1].otherwise = lambda request: respond(200, b"x" * (8 << 20))
        client = Client()
        scope = {"type": "http", "method": "POST", "path": _INFER, "raw_path": _INFER.encode(),
                 "headers": [(b"x-shoal-timeout-ms", b"3000")]}  # fmt: skip
        await front(scope, client.receive, client.send)
        assert client.aborted.is_set() and front.numbers()["expired"] == 1
        assert all(upstream.outstanding == 0 for upstream in front._balancer.upstreams)

    _with(work)


def test_a_deadline_ends_the_wait() -> None:
    async def work(services: list[Service], ask: Any, front: Front) -> None:
        # Nobody's number is too long for the route; whether it makes sense is for services to say.
        assert (await ask(_INFER, _BODY.replace(b"20000000", b"1" + b"0" * 400)))[0] == 200
        for service in services:
            service.requests.clear()
        for service in services:
            service.otherwise = lambda _: b""
        status, _ = await ask(_INFER, x_shoal_timeout_ms="3000")
        assert status == 504 and front.numbers()["expired"] == 1
        headers = [r.headers for service in services for r in service.inferences]
        assert len(headers) == 1 and 0 < int(headers[0]["x-shoal-timeout-ms"]) <= 3000

    _with(work)
