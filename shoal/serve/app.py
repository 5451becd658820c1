"""The HTTP side of the gateway: one ASGI application that finds out what is asked and gives it to the desk of the model.

Plain ASGI without a framework above it: most of a small model's time goes into what happens to a request here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from shoal.serve import labels, pictures
from shoal.serve.asgi import (
    GRPC_HEADER,
    JSON,
    UPDATE_HEADER,
    Receive,
    Scope,
    Send,
    gone,
    headers_of,
    refuse,
    respond,
    say,
    state,
    timeout_of,
)
from shoal.serve.common import Common
from shoal.serve.desk import Desk
from shoal.serve.guard import Guard, key_of
from shoal.serve.origins import check_origin
from shoal.serve.page import live, page
from shoal.serve.prepare import prepared, tokens_of
from shoal.serve.protocols import embeddings, v2
from shoal.serve.refusals import Mishaps, Refusal
from shoal.serve.shelf import numbers_of
from shoal.serve.slots import Outcome
from shoal.serve.ticket import Outputs

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_CLASSIFY = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/classify")
_INFER_BYTES = re.compile(_INFER.pattern.encode())
_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|stats|config))?")
_PICTURE_BYTES = 16 << 20
_TOP = 5
_REPOSITORY = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")
_FOR_EVERYBODY = frozenset({"/", "/v2/health/live", "/v2/health/ready"})
_MOST_DIGITS = 12
_LONG_BYTES = 64 << 10


class App:
    """What the gateway answers."""

    def __init__(self, common: Common) -> None:
        self.catalogue = common.catalogue
        self.processes: tuple[dict[str, Any], ...] = ()
        self._limits = common.limits
        self._pace = common.pace
        self._metrics = common.metrics
        self._guard = common.guard
        self._bodies = common.bodies
        self._mishaps = Mishaps()
        self._tracing = common.tracing
        self._spoken = [] if common.grpc_port is None else [(GRPC_HEADER, b"%d" % common.grpc_port)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if self._tracing is not None:
            self._tracing.enter(scope["headers"])
        try:
            if self._guard is not None:
                self._admit(self._guard, scope)
            found = _INFER.fullmatch(scope["path"]) if scope["method"] == "POST" else None
            if found is not None:
                await self._infer(found[1], found[2], scope, receive, send)
            else:
                await self._others(scope, receive, send)
        except Refusal as refusal:
            await refuse(receive, send, refusal)
        except Exception:
            mishap = self._mishaps.refusal()
            if state(receive, "response_started"):
                raise
            await refuse(receive, send, mishap)

    def _admit(self, guard: Guard, scope: Scope) -> None:
        """Refusal for who may not ask."""
        if scope["path"] in _FOR_EVERYBODY and scope["method"] == "GET":
            return
        headers, client = dict(scope["headers"]), scope.get("client")
        key = key_of(headers.get(b"authorization", b""), headers.get(b"x-api-key"))
        guard.admit(key, None if client is None else client[0])

    async def _infer(self, name: str, version: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        desk = None
        seen_s = time.monotonic()
        arrived_s = self._pace.arrive(seen_s)
        try:
            desk = self.catalogue.desk(name, version)
            headers = headers_of(scope)
            body = await self._body(headers, receive, v2.longest_body(desk.signature, desk.max_rows))
            if not self.catalogue.has(desk):
                # The next version has come while the body did.
                desk = self.catalogue.desk(name, version)
            limit_s = timeout_of(headers)
            if limit_s is None:
                self._refuse_early(desk, body, seen_s, arrived_s)
            request = v2.decode(desk.signature, body, _header_length(headers), desk.max_rows)
            if limit_s is not None:
                request = replace(request, timeout_s=min(limit_s, request.timeout_s or limit_s))
            if request.encoded:
                with self._bodies.holding(len(body)):
                    request = await prepared(desk, request)
        except Refusal as refusal:
            self._count_bad(desk, refusal)
            raise
        held = len(body) if len(body) > _LONG_BYTES else 0
        self._bodies.bytes += held
        try:
            outputs = await self.catalogue.infer(desk, request, self._limits.slo_s, partial(gone, receive), arrived_s)
        finally:
            self._bodies.bytes -= held
        content, header_length = v2.encode(desk.signature, request, outputs, outputs.update)
        if header_length is None:
            await respond(send, 200, content, [*JSON, *_updated(outputs)])
        else:
            await respond(send, 200, content, [(b"content-type", b"application/octet-stream"), *_updated(outputs),
                                                (b"inference-header-content-length", b"%d" % header_length)])  # fmt: skip

    def _count_bad(self, desk: Desk | None, refusal: Refusal) -> None:
        """Count a request that makes no sense; what a desk has taken in or refused is counted there."""
        if desk is None:
            self._metrics.turned_away("nothing")
        elif refusal.status < 429:
            desk.slots.count(Outcome.INVALID)

    def overload(self, method: bytes, url: bytes) -> Callable[[], Refusal] | None:
        """Whether an inference that was just read is to be refused as it is, see ``shoal.serve.connection.Overload``."""
        # Who is let in is found out first, and what is written in another way may be another address.
        if self._guard is not None or method != b"POST" or b"%" in url:
            return None
        found = _INFER_BYTES.fullmatch(url)
        if found is None:
            return None
        shelf = self.catalogue.shelves.get(found[1].decode("latin-1"))
        desk = shelf.active if shelf is not None else None
        if desk is not None:
            now = time.monotonic()
            arrived_s = self._pace.waiting_since(now)
            if self._pace.full() or desk.hopeless(arrived_s + self._limits.slo_s, now):
                return partial(desk.refused, arrived_s)
        self._pace.handed_on()
        return None

    def _refuse_early(self, desk: Desk, body: bytes, seen_s: float, arrived_s: float) -> None:
        """Refuse what will not be in time before it is read; what has a deadline of its own has to be read first."""
        hopeless = self._pace.behind(seen_s) or desk.hopeless(arrived_s + self._limits.slo_s, seen_s)
        if hopeless and b'"timeout"' not in body:
            raise desk.refused(arrived_s)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, most: int | None = None) -> bytes:
        """All of a body; Refusal where it is longer than ``most`` bytes, or takes too long to come."""
        most = min(most or self._limits.body_bytes, self._limits.body_bytes)
        if b"content-encoding" in headers:
            raise Refusal(415, "Send the body as it is, without content-encoding.")
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or len(said) > _MOST_DIGITS or int(said) > most:
            raise Refusal(413, f"The body is longer than {most} bytes.")
        message = await receive()
        body: bytes = message.get("body", b"")
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The body ended early.")
        if not message.get("more_body", False):
            return body
        parts, size = [body], len(body)
        self._bodies.bytes += size
        try:
            async for part in self._more(receive):
                parts.append(part)
                size += len(part)
                self._bodies.bytes += len(part)
                if size > most:
                    raise Refusal(413, f"The body is longer than {most} bytes.")
                self._bodies.check()
        finally:
            self._bodies.bytes -= size
        return b"".join(parts)

    async def _more(self, receive: Receive) -> AsyncIterator[bytes]:
        """The rest of a body, in time."""
        until = time.monotonic() + self._limits.body_s
        message: MutableMapping[str, Any] = {"more_body": True}
        while message.get("more_body", False):
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                raise Refusal(408, f"The body did not arrive within {self._limits.body_s:g} s.") from None
            if message["type"] == "http.disconnect":
                raise Refusal(400, "The body ended early.")
            yield message.get("body", b"")

    async def _others(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"].rstrip("/"), scope["method"]
        if path == "/v2/repository/index" and method == "POST":
            await self._body(dict(scope["headers"]), receive)
            return await say(send, self.catalogue.index())
        if (found := _REPOSITORY.fullmatch(path)) is not None and method == "POST":
            return await self._repository(found[1], found[2] == "load", scope, receive, send)
        if method == "POST" and (asked := _CLASSIFY.fullmatch(path)) is not None:
            return await self._classify(asked[1], asked[2], scope, receive, send)
        if path == "/v1/embeddings" and method == "POST":
            return await self._embeddings(scope, receive, send)
        if method != "GET":
            raise Refusal(404 if method == "POST" else 405, f"{method} {path[:80]} is nothing that this service does.")
        if path == "":
            content, about = page()
            return await respond(send, 200, content, about)
        if path == "/live":
            return await say(send, live(self.catalogue.desks()))
        if path == "/v2":
            return await say(send, v2.server_metadata())
        if path == "/v1/models":
            rows = [{"id": name, "object": "model", "created": 0, "owned_by": "shoal"} for name in self.catalogue.desks()]
            return await say(send, {"object": "list", "data": rows})
        if path == "/v2/health/live":
            return await respond(send, 200, b"", [])
        if path == "/v2/health/ready":
            return await self._ready(send, [shelf.active for shelf in self.catalogue.shelves.values()])
        if path == "/metrics":
            return await respond(
                send, 200, self._metrics.render(self.catalogue.desks()), [(b"content-type", self._metrics.content_type)]
            )
        if path == "/processes":
            return await self._processes(scope, send)
        if path == "/v2/models/stats":
            return await say(send, {"model_stats": self.catalogue.statistics(self.catalogue.shelves)})
        await self._about_model(path, send)

    async def _classify(self, name: str, version: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        """What is in a picture: a line for people, or JSON for who asks for that."""
        desk, arrived_s = None, time.monotonic()
        try:
            desk = self.catalogue.desk(name, version)
            headers = headers_of(scope)
            body = await self._body(headers, receive, _PICTURE_BYTES)
            raw = pictures.of_body(headers.get(b"content-type", b"").decode("latin-1"), body)
            signature = desk.signature
            if len(signature.outputs) != 1 or len(signature.outputs[0].shape) != 2 or signature.outputs[0].free:
                raise Refusal(400, f"{name} gives no scores of classes.")
            limit_s = timeout_of(headers) or self._limits.slo_s
            if desk.hopeless(arrived_s + limit_s, time.monotonic()):
                raise desk.refused(arrived_s)
            with self._bodies.holding(len(body)):
                row = await asyncio.to_thread(pictures.decode, [raw], signature)
        except Refusal as refusal:
            self._count_bad(desk, refusal)
            raise
        request = v2.InferRequest(id="", inputs=(row,), rows=1, wanted=(), timeout_s=None, priority=v2.USUAL_PRIORITY)
        outputs = await desk.infer(request, limit_s, partial(gone, receive), arrived_s)
        (scores,), updated = outputs, _updated(outputs)
        found = labels.top(numbers_of(signature.outputs[0], scores)[0], signature.labels, _TOP)
        label, score = found[0]
        if b"application/json" in headers.get(b"accept", b""):
            best = [{"label": name, "score": value} for name, value in found]
            content = msgspec.json.encode({"label": label, "score": score, "top": best})
            return await respond(send, 200, content, [*JSON, *updated])
        kind = (b"content-type", b"text/plain; charset=utf-8")
        await respond(send, 200, f"{label} {score:.2f}\n".encode(), [kind, *updated])

    async def _embeddings(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One vector for each text; each is a request of its own to the model, so equal lengths are computed together."""
        desk = None
        arrived_s = self._pace.arrive(time.monotonic())
        try:
            body = await self._body(dict(scope["headers"]), receive)
            name, given, as_base64 = embeddings.decode(body)
            desk = self.catalogue.desk(name)
            if desk.text is None or desk.signature.outputs[0].free or len(desk.signature.outputs) != 1:
                raise Refusal(400, f"{name} gives no embeddings of texts.")
            limit_s = timeout_of(dict(scope["headers"])) or self._limits.slo_s
            if desk.hopeless(arrived_s + limit_s, time.monotonic()):
                raise desk.refused(arrived_s)
            tokens = [t if isinstance(t, list) else [] for t in given]
            if isinstance(given[0], str):
                with self._bodies.holding(len(body)):
                    tokens = await tokens_of(desk.text, [text for text in given if isinstance(text, str)])

            parts = tuple(map(desk.text.request, tokens))
            request = v2.InferRequest("", (), len(parts), (), None, v2.USUAL_PRIORITY, parts=parts)
            outputs = await self.catalogue.infer(desk, request, limit_s, partial(gone, receive), arrived_s)
        except Refusal as refusal:
            self._count_bad(desk, refusal)
            return await refuse(receive, send, refusal, embeddings.error_body(refusal))
        used = sum(map(len, tokens))
        await respond(send, 200, embeddings.encode(name, outputs[0], used, as_base64), [*JSON, *_updated(outputs)])

    async def _repository(self, name: str, load: bool, scope: Scope, receive: Receive, send: Send) -> None:
        """Load a model anew from where it came from, or unload it."""
        if not self._limits.access.keys:
            # Who has a key was let in by it; without keys, any page in a browser on this machine could ask.
            check_origin(dict(scope["headers"]))
        body = await self._body(dict(scope["headers"]), receive)
        await self.catalogue.change(name, load, v2.decode_parameters(body))
        await respond(send, 200, b"", [])

    async def _ready(self, send: Send, desks: Sequence[Desk | None]) -> None:
        await self.catalogue.ready(desks)
        await respond(send, 200, b"", self._spoken)

    async def _about_model(self, path: str, send: Send) -> None:
        found = _MODEL.fullmatch(path)
        if found is None:
            raise Refusal(404, f"{path[:80] or '/'} is nothing that this service has; try /v2 or /v2/models/NAME.")
        desk = self.catalogue.desk(found[1], found[2])
        if found[3] == "ready":
            return await self._ready(send, [desk])
        if found[3] == "stats":
            return await say(send, {"model_stats": self.catalogue.statistics([found[1]], found[2])})
        if found[3] == "config":
            return await say(send, {**desk.signature.metadata(), "max_batch_size": desk.max_rows})
        await say(send, {**desk.signature.metadata(), "precision": desk.precision})

    async def _processes(self, scope: Scope, send: Send) -> None:
        client = scope.get("client")
        if client is None or not ipaddress.ip_address(client[0]).is_loopback:
            raise Refusal(403, "Only this machine itself may ask for the processes.")
        await say(send, list(self.processes))


def _updated(outputs: Outputs) -> list[tuple[bytes, bytes]]:
    """Which update of its run a model had that follows one."""
    return [(UPDATE_HEADER, b"%d" % outputs.update)] if outputs.update else []


def _header_length(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 12:
        raise Refusal(400, "Inference-Header-Content-Length is not a number of bytes.")
    return int(text)
