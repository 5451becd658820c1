"""The route's application over small real services."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import small_service
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
            assert front.accepted == sum(front.counts.values()) and front.open_requests == 0
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
        assert (await ask("/v2/models/nothing/infer"))[0] == 404

    _with(work)


def test_a_deadline_ends_the_wait() -> None:
    async def work(services: list[Service], ask: Any, front: Front) -> None:
        for service in services:
            service.otherwise = lambda _: b""
        status, _ = await ask(_INFER, x_shoal_timeout_ms="50")
        assert status == 504 and front.numbers()["expired"] == 1
        headers = [r.headers for service in services for r in service.inferences]
        assert len(headers) == 1 and 0 < int(headers[0]["x-shoal-timeout-ms"]) <= 50

    _with(work)
