"""What clients of the route talk to: takes a request, has a service answer it, gives it exactly one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from shoal.serve.asgi import GRPC_HEADER, Receive, Scope, Send, gone, refuse, respond, say, state
from shoal.serve.refusals import Refusal
from shoal.serve.route.balance import Ask, Balancer, Ended
from shoal.serve.route.choosing import CONNECT_S, MOST_TRIES, PAUSE_S, Down, Late, Left, choose
from shoal.serve.route.link import Broken, Head, Link, Links
from shoal.serve.route.metrics import RouteMetrics
from shoal.serve.route.request import Asked, Body, read
from shoal.serve.route.tally import Outcome, Tally, outcome_of
from shoal.serve.tracing import Tracing

_LOOK_EVERY_S = 0.02
# Who has closed its side of the connection may have left, or may have said all that it wanted: so long its answer is waited for.
_HALF_CLOSED_S = 1.0
_REFUSAL_BYTES = 64 << 10
_DROPPED_HEADERS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})


@dataclass
class _Whole:
    """An answer that was not handed on at once: others were to be asked first."""

    head: Head
    body: bytes


@dataclass(eq=False)
class _Open:
    """A request on its way: what may end the wait for its service. ``begun``: the client has a part of its answer."""

    receive: Receive
    deadline_s: float
    began_s: float
    link: Link | None = None
    index: int = -1
    begun: bool = False
    tried: set[int] = field(default_factory=set)
    best: _Whole | None = None
    left: bool = False


class Front:
    """The ASGI application of ``shoal route``."""

    def __init__(
        self, balancer: Balancer, links: list[Links], metrics: RouteMetrics, timeout_s: float,
        affinity_header: str,
    ) -> None:  # fmt: skip
        """``timeout_s``: the deadline of a request that brings none; ``affinity_header``: which header has a request's key."""
        self.tally = Tally(metrics)
        # Where the route speaks gRPC too.
        self.grpc_port: int | None = None
        # Set where traces are kept.
        self.tracing: Tracing | None = None
        self._balancer = balancer
        self._links = links
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._affinity = affinity_header.lower().encode()
        self._open: set[_Open] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if not await self._own(scope, receive, send):
                await self._forward(scope, receive, send)
        except Refusal as refusal:
            if not state(receive, "response_started"):
                await refuse(receive, send, refusal)
        except Exception:
            traceback.print_exc()
            if state(receive, "response_started"):
                raise
            await refuse(receive, send, Refusal(500, "The route made a mistake; its own messages say more."))

    # -- what the route answers itself ---------------------------------------------------------------------------

    async def _own(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer what is asked of the route itself; False where it is for a service."""
        path, method = scope["path"].rstrip("/"), scope["method"]
        if path == "/processes" or path.startswith("/v2/repository/models/"):
            raise Refusal(403, "This is between you and each service; ask the services themselves.")
        if method not in ("GET", "POST"):
            raise Refusal(405, f"{method} is nothing that services do.")
        if method != "GET":
            return False
        if path == "/v2/health/live":
            await respond(send, 200, b"", [])
        elif path == "/v2/health/ready":
            if self.tally.draining or not self._balancer.any_ready(time.monotonic()):
                raise Refusal(503, "No service is ready.", 1.0)
            spoken = [] if self.grpc_port is None else [(GRPC_HEADER, b"%d" % self.grpc_port)]
            await respond(send, 200, b"", spoken)
        elif path == "/metrics":
            content = self._metrics.render(self.numbers())
            await respond(send, 200, content, [(b"content-type", self._metrics.content_type)])
        elif path == "/route":
            client = scope.get("client")
            if client is None or not ipaddress.ip_address(client[0]).is_loopback:
                raise Refusal(403, "Only this machine itself may ask for the services.")
            await say(send, self.numbers())
        else:
            return False
        return True

    def numbers(self) -> dict[str, Any]:
        """Outcomes, and what is known of each service."""
        tally = self.tally
        counts = {outcome.value: count for outcome, count in tally.counts.items()}
        services = self._balancer.numbers(time.monotonic())
        for service, links in zip(services, self._links, strict=True):
            service["grpc_port"] = links.grpc_port
        return {"accepted": tally.accepted, **counts, "open": tally.open, "services": services}

    # -- what services answer ------------------------------------------------------------------------------------

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        began_s = time.monotonic()
        request = _Open(receive, began_s + self._timeout_s, began_s)
        self._open.add(request)
        try:
            with self.tally.request() as ending:
                ending.outcome = await self._answer(scope, request, send)
        finally:
            self._open.discard(request)

    async def _answer(self, scope: Scope, request: _Open, send: Send) -> Outcome:
        self.tally.take_in()
        began_s = time.monotonic()
        body = await Body.begun(scope, request.receive)
        asked = read(scope, body)
        if asked.timeout_s is not None:
            request.deadline_s = began_s + min(asked.timeout_s, self._timeout_s)
        key = next((value for name, value in asked.headers if name == self._affinity), None)
        ask = Ask(model=asked.model, size=body.length or 0, affinity=None if key is None else key.decode("latin-1"))
        self._balancer.count_request()
        with self.tally.holding(body.held_bytes), self._traced(asked) as extra:
            try:
                return await self._try(request, asked, ask, body, send, extra)
            except Late:
                if request.begun:
                    return await self._cut(request, Outcome.EXPIRED)
                raise Refusal(504, "The deadline passed before a service had answered.") from None
            except Left:
                return Outcome.CANCELLED
            except (Broken, Down):
                if request.begun:
                    return await self._cut(request, Outcome.FAILED)
                raise Refusal(502, "The service that was asked did not answer.") from None

    async def _try(
        self, request: _Open, asked: Asked, ask: Ask, body: Body, send: Send, extra: list[tuple[bytes, bytes]]
    ) -> Outcome:
        """Ask services until one has answered. Raises what ended it where none did."""
        for tries in range(MOST_TRIES):
            index = await choose(
                self._balancer, ask, request.tried, request.deadline_s, request.best is not None,
                lambda: state(request.receive, "disconnected"),
            )  # fmt: skip
            if index is None:
                break
            request.index = index
            ended = Ended.DROPPED
            retry_after_s = 1.0
            number = self._balancer.begin(request.index, ask, time.monotonic())
            try:
                head = await self._exchange(request, asked, body, extra)
                ended, retry_after_s = _judge(head)
                if await self._set_aside(request, ask, head, ended, body):
                    continue
                return await self._hand_on(request, head, send)
            except (Broken, Down) as error:
                ended = Ended.FAULT
                sent = not isinstance(error, Broken) or error.sent
                if request.begun or not body.again or tries + 1 == MOST_TRIES or (sent and not asked.repeatable):
                    raise
                request.tried.add(request.index)
            except Late:
                ended = Ended.LATE
                raise
            finally:
                self._balancer.end(request.index, number, ask, ended, time.monotonic(), retry_after_s)
                self._metrics.asked(self._balancer.upstreams[request.index].name, ended.value)
                self._release(request)
        if request.best is not None:
            return await _give(request.best, send)
        raise Refusal(502, "The services that were asked did not answer.")

    async def _exchange(self, request: _Open, asked: Asked, body: Body, extra: list[tuple[bytes, bytes]]) -> Head:
        """Send the request to the service that was chosen; the beginning of its answer."""
        left_s = request.deadline_s - time.monotonic()
        if left_s <= 0:
            raise Late
        links = self._links[request.index]
        link = request.link = await links.take(min(left_s, CONNECT_S))
        said = None if asked.timeout_s is None else request.deadline_s - time.monotonic()
        head = asked.rendered(links.address, said, extra)
        if body.whole and not asked.chunked:
            await link.send(head + b"".join([piece async for piece in body.pieces()]))
        else:
            await link.send(head)
            # Framed as its head says, also where it is sent again and its length is known by now.
            async for piece in body.pieces():
                await link.send(b"%x\r\n%s\r\n" % (len(piece), piece) if asked.chunked else piece)
            if asked.chunked:
                await link.send(b"0\r\n\r\n")
        return await link.head()

    async def _set_aside(self, request: _Open, ask: Ask, head: Head, ended: Ended, body: Body) -> bool:
        """Keep an answer back, and have somebody else asked, where another service may have a better one."""
        lacking = head.status == 404 and bool(ask.model)
        if lacking:
            self._balancer.lacks(request.index, ask.model, time.monotonic())
        if not body.again or not (lacking or ended is Ended.REFUSED):
            return False
        others = {*request.tried, request.index}
        if self._balancer.choose(ask, time.monotonic(), others) is None:
            return False
        if ended is Ended.REFUSED and not self._balancer.may_ask_again(ended):
            return False
        assert request.link is not None
        kept = _Whole(head, b"")
        async for piece in request.link.pieces():
            kept.body += piece
            if len(kept.body) > _REFUSAL_BYTES:
                raise Broken("a refusal of its is endless", sent=True, begun=True)
        request.tried = others
        # Of two answers that are none, the one that says when to come again says more.
        if request.best is None or ended is Ended.REFUSED:
            request.best = kept
        return True

    async def _hand_on(self, request: _Open, head: Head, send: Send) -> Outcome:
        """Give the client the answer as it comes; from its first byte on no other service is asked."""
        assert request.link is not None
        headers = [pair for pair in head.headers if pair[0] not in _DROPPED_HEADERS]
        request.begun = True
        await send({"type": "http.response.start", "status": head.status, "headers": headers})
        async for piece in request.link.pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return outcome_of(head.status)

    async def _cut(self, request: _Open, outcome: Outcome) -> Outcome:
        """End a connection whose answer broke off: its client must not take a part for the whole."""
        if self._abort(request):
            # uvicorn hears of it in a later turn of the loop, and would complain of an answer that was not finished.
            await asyncio.sleep(PAUSE_S)
        return outcome

    def _abort(self, request: _Open) -> bool:
        transport = getattr(getattr(request.receive, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()
        return transport is not None

    def _traced(self, asked: Asked) -> contextlib.AbstractContextManager[list[tuple[bytes, bytes]]]:
        """A span around a request where traces are kept; headers that tell services of it."""
        if self.tracing is None:
            return contextlib.nullcontext([])
        return self.tracing.forwarded(asked.headers, f"route {asked.model}".rstrip())

    def _release(self, request: _Open) -> None:
        if request.link is not None:
            self._links[request.index].give_back(request.link)
            request.link = None

    # -- what ends a wait ----------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Until it is cancelled: let go of requests whose time is over, or whose client has left."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = time.monotonic()
            for request in self._open:
                if request.link is None:
                    continue
                late = now - request.began_s > _HALF_CLOSED_S
                if now >= request.deadline_s:
                    request.link.fail(Late())
                    if request.begun:
                        # Who does not read its answer would hold a service's connection.
                        self._abort(request)
                elif state(request.receive, "disconnected") or (late and gone(request.receive)):
                    request.link.fail(Left())

    def down(self, index: int) -> None:
        """A service does not answer health checks: whoever waits for it asks somebody else."""
        for request in self._open:
            if request.index == index and request.link is not None and not request.begun:
                request.link.fail(Down())


def _judge(head: Head) -> tuple[Ended, float]:
    """What an answer says about its service, and for how long it wants to be left alone."""
    status = head.status
    later = head.header(b"retry-after")
    if status == 429 or (status == 503 and later is not None):
        return Ended.REFUSED, float(later) if later is not None and later.isdigit() else 1.0
    if status >= 500:
        return (Ended.LATE if status == 504 else Ended.FAULT), 1.0
    return (Ended.REJECTED if status >= 400 else Ended.ANSWERED), 1.0


async def _give(whole: _Whole, send: Send) -> Outcome:
    """Hand on an answer that was set aside."""
    headers = [pair for pair in whole.head.headers if pair[0] not in _DROPPED_HEADERS | {b"content-length"}]
    await respond(send, whole.head.status, whole.body, headers)
    return outcome_of(whole.head.status)
