"""The HTTP side of the gateway: one ASGI application that finds out what is asked and gives it to the desk of the model.

Plain ASGI without a framework above it: most of a small model's time goes into what happens to a request here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

import numpy as np

from shoal.errors import did_you_mean
from shoal.serve import labels, pictures
from shoal.serve.asgi import JSON, Receive, Scope, Send, headers_of, refuse, respond, say, state
from shoal.serve.desk import Desk
from shoal.serve.guard import Guard
from shoal.serve.messages import Limits, Told
from shoal.serve.metrics import Metrics
from shoal.serve.pace import Pace
from shoal.serve.protocols import embeddings, v2
from shoal.serve.refusals import Refusal
from shoal.serve.shelf import Shelf, compare, numbers_of
from shoal.serve.slots import Outcome

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_CLASSIFY = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/classify")
_INFER_BYTES = re.compile(_INFER.pattern.encode())
_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|stats|config))?")
_FRESH_S = 1.0
_PROBE_S = 2.0
_PICTURE_BYTES = 16 << 20
_TOP = 5
_PROBE_TOLERANCE = 1e-3
_LOAD_S = 300.0
_REPOSITORY = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")
_FOR_EVERYBODY = frozenset({"/v2/health/live", "/v2/health/ready"})
_MOST_DIGITS = 12
_LONG_BYTES = 64 << 10
_SAID_EVERY_S = 1.0


class App:
    """What the gateway answers.

    ``shelves``: the versions of each model, by its name; ``unavailable``: models that are not loaded, and why.
    """

    def __init__(
        self, limits: Limits, metrics: Metrics, ask: Callable[[str, bool, dict[str, Any]], Awaitable[Told]]
    ) -> None:
        """``ask``: how the supervisor is asked to load (or not) a model, with parameters."""
        self.shelves: dict[str, Shelf] = {}
        self.unavailable: dict[str, str] = {}
        self._ask = ask
        self.processes: tuple[dict[str, Any], ...] = ()
        self.draining = False
        self._limits = limits
        self._pace = Pace(limits.slo_s)
        self._metrics = metrics
        self._guard = None if limits.access.open else Guard(limits.access)
        self._bodies_bytes = 0
        self._probing: dict[Desk, asyncio.Task[list[np.ndarray]]] = {}
        self._said_s = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
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
            self._say_what_happened()
            if state(receive, "response_started"):
                raise
            await refuse(receive, send, Refusal(500, "The service made a mistake; its own messages say more."))

    def _admit(self, guard: Guard, scope: Scope) -> None:
        """Refusal for who may not ask."""
        if scope["path"] in _FOR_EVERYBODY and scope["method"] == "GET":
            return
        headers, client = dict(scope["headers"]), scope.get("client")
        key = headers.get(b"x-api-key")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            key = token.strip()
        try:
            guard.admit(key, None if client is None else client[0])
        except Refusal as refusal:
            self._metrics.turned_away("key" if refusal.status == 401 else "rate")
            raise

    def _say_what_happened(self) -> None:
        """Print the traceback for whoever runs the service, though not as often as clients may please."""
        now = time.monotonic()
        if now - self._said_s > _SAID_EVERY_S:
            self._said_s = now
            traceback.print_exc()

    async def _infer(self, name: str, version: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        desk = None
        seen_s = time.monotonic()
        arrived_s = self._pace.arrive(seen_s)
        try:
            desk = self._desk(name, version)
            shelf = self.shelves[name]
            headers = headers_of(scope)
            body = await self._body(headers, receive, v2.longest_body(desk.signature, desk.max_rows))
            self._refuse_early(desk, body, seen_s, arrived_s)
            request = v2.decode(desk.signature, body, _header_length(headers), desk.max_rows)
        except Refusal as refusal:
            if desk is not None and refusal.status < 429:
                desk.slots.count(Outcome.INVALID)
            elif desk is None:
                self._metrics.turned_away("nothing")
            raise
        held = len(body) if len(body) > _LONG_BYTES else 0
        self._bodies_bytes += held
        try:
            outputs = await desk.infer(request, self._limits.slo_s, lambda: state(receive, "disconnected"), arrived_s)
        finally:
            self._bodies_bytes -= held
        if shelf.trial is not None:
            shelf.mirror(desk, request, outputs, time.monotonic() - arrived_s)
        content, header_length = v2.encode(desk.signature, request, outputs)
        if header_length is None:
            await respond(send, 200, content, JSON)
        else:
            await respond(send, 200, content, [(b"content-type", b"application/octet-stream"),
                                                (b"inference-header-content-length", b"%d" % header_length)])  # fmt: skip

    def overload(self, method: bytes, url: bytes) -> Callable[[], Refusal] | None:
        """Whether an inference that was just read is to be refused as it is, see ``shoal.serve.connection.Overload``."""
        # Who is let in is found out first, and what is written in another way may be another address.
        if self._guard is not None or method != b"POST" or b"%" in url:
            return None
        found = _INFER_BYTES.fullmatch(url)
        if found is None:
            return None
        shelf = self.shelves.get(found[1].decode("latin-1"))
        desk = shelf.active if shelf is not None else None
        if desk is not None:
            now = time.monotonic()
            if self._pace.full() or desk.hopeless(self._pace.waiting_since(now) + self._limits.slo_s, now):
                return desk.refused
        self._pace.handed_on()
        return None

    def _refuse_early(self, desk: Desk, body: bytes, seen_s: float, arrived_s: float) -> None:
        """Refuse what will not be in time before it is read; what has a deadline of its own has to be read first."""
        hopeless = self._pace.behind(seen_s) or desk.hopeless(arrived_s + self._limits.slo_s, seen_s)
        if hopeless and b'"timeout"' not in body:
            raise desk.refused()

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
        self._bodies_bytes += size
        try:
            async for part in self._more(receive):
                parts.append(part)
                size += len(part)
                self._bodies_bytes += len(part)
                if size > most:
                    raise Refusal(413, f"The body is longer than {most} bytes.")
                if self._bodies_bytes > self._limits.bodies_bytes:
                    self._metrics.turned_away("bodies")
                    raise Refusal(503, "Too many long bodies are being sent at once; try again.", 1.0)
        finally:
            self._bodies_bytes -= size
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

    def _desk(self, name: str, version: str | None = None) -> Desk:
        """Who answers a request for a model; without a version the one that the model's shelf picks."""
        shelf = self.shelves.get(name)
        desk = None if shelf is None else shelf.pick() if version is None else shelf.versions.get(version)
        if desk is not None:
            return desk
        if shelf is not None and version is not None:
            raise Refusal(404, f"{name} has the version {', '.join(shelf.versions)}, not {version[:40]}.")
        if shelf is not None or name in self.unavailable:
            raise Refusal(404, f"The model {name} is not loaded.")
        raise Refusal(
            404, f'There is no model "{name[:80]}".{did_you_mean(name[:80], self.shelves)} There is {", ".join(self.shelves)}.'
        )

    async def _others(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"].rstrip("/"), scope["method"]
        if path == "/v2/repository/index" and method == "POST":
            await self._body(dict(scope["headers"]), receive)
            return await say(send, self._index())
        if (found := _REPOSITORY.fullmatch(path)) is not None and method == "POST":
            return await self._repository(found[1], found[2] == "load", scope, receive, send)
        if method == "POST" and (asked := _CLASSIFY.fullmatch(path)) is not None:
            return await self._classify(asked[1], asked[2], scope, receive, send)
        if path == "/v1/embeddings" and method == "POST":
            return await self._embeddings(scope, receive, send)
        if method != "GET":
            raise Refusal(404 if method == "POST" else 405, f"{method} {path[:80]} is nothing that this service does.")
        if path == "/v2":
            return await say(send, v2.server_metadata())
        if path == "/v1/models":
            rows = [{"id": name, "object": "model", "created": 0, "owned_by": "shoal"} for name in self.desks()]
            return await say(send, {"object": "list", "data": rows})
        if path == "/v2/health/live":
            return await respond(send, 200, b"", [])
        if path == "/v2/health/ready":
            return await self._ready(send, [shelf.active for shelf in self.shelves.values()])
        if path == "/metrics":
            return await respond(
                send, 200, self._metrics.render(self.desks()), [(b"content-type", self._metrics.content_type)]
            )
        if path == "/processes":
            return await self._processes(scope, send)
        if path == "/v2/models/stats":
            return await say(send, {"model_stats": self._statistics(self.shelves)})
        await self._about_model(path, send)

    async def _classify(self, name: str, version: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        """What is in a picture: a line for people, or JSON for who asks for that."""
        desk = self._desk(name, version)
        arrived_s = time.monotonic()
        try:
            headers = headers_of(scope)
            body = await self._body(headers, receive, _PICTURE_BYTES)
            raw = pictures.of_body(headers.get(b"content-type", b"").decode("latin-1"), body)
            signature = desk.signature
            if len(signature.outputs) != 1 or len(signature.outputs[0].shape) != 2 or signature.outputs[0].free:
                raise Refusal(400, f"{name} gives no scores of classes.")
            if desk.hopeless(arrived_s + self._limits.slo_s, time.monotonic()):
                raise desk.refused()
            row = await asyncio.to_thread(pictures.decode, raw, signature, desk.preprocess)
        except Refusal as refusal:
            if refusal.status < 429:
                desk.slots.count(Outcome.INVALID)
            raise
        request = v2.InferRequest(id="", inputs=(row,), rows=1, wanted=(), timeout_s=None, priority=v2.USUAL_PRIORITY)
        gone = lambda: state(receive, "disconnected")  # noqa: E731
        (scores,) = await desk.infer(request, self._limits.slo_s, gone, arrived_s)
        found = labels.top(numbers_of(signature.outputs[0], scores)[0], signature.labels, _TOP)
        label, score = found[0]
        if b"application/json" in headers.get(b"accept", b""):
            best = [{"label": name, "score": value} for name, value in found]
            return await say(send, {"label": label, "score": score, "top": best})
        await respond(send, 200, f"{label} {score:.2f}\n".encode(), [(b"content-type", b"text/plain; charset=utf-8")])

    async def _embeddings(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One vector for each text; each is a request of its own to the model, so equal lengths are computed together."""
        try:
            body = await self._body(dict(scope["headers"]), receive)
            name, given, as_base64 = embeddings.decode(body)
            desk = self._desk(name)
            if desk.text is None or desk.signature.outputs[0].free or len(desk.signature.outputs) != 1:
                raise Refusal(400, f"{name} gives no embeddings of texts.")
            tokens = [t if isinstance(t, list) else [] for t in given]
            if isinstance(given[0], str):
                tokens = desk.text.tokens([text for text in given if isinstance(text, str)])

            def left() -> bool:
                return state(receive, "disconnected")

            asked = [desk.infer(desk.text.request(row), self._limits.slo_s, left) for row in tokens]
            found = await asyncio.gather(*asked, return_exceptions=True)
            for one in found:
                if isinstance(one, BaseException):
                    raise one
            vectors = [one[0] for one in found if not isinstance(one, BaseException)]
        except Refusal as refusal:
            return await refuse(receive, send, refusal, embeddings.error_body(refusal))
        used = sum(map(len, tokens))
        await respond(send, 200, embeddings.encode(name, vectors, used, as_base64), JSON)

    def _index(self) -> list[dict[str, str]]:
        """Every version and its state, as the protocol's model repository extension has it."""
        rows = [
            {"name": name, "version": version, "state": "UNAVAILABLE" if version in shelf.leaving else "READY", "reason": ""}
            for name, shelf in self.shelves.items()
            for version in shelf.versions
        ]
        return rows + [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": reason}
            for name, reason in self.unavailable.items()
        ]

    async def _repository(self, name: str, load: bool, scope: Scope, receive: Receive, send: Send) -> None:
        """Load a model anew from where it came from, or unload it."""
        body = await self._body(dict(scope["headers"]), receive)
        parameters = v2.decode_parameters(body)
        try:
            told = await asyncio.wait_for(self._ask(name, load, parameters), _LOAD_S)
        except asyncio.TimeoutError:
            raise Refusal(504, f"The model was not loaded within {_LOAD_S:g} s.") from None
        if told.sentence is not None:
            raise Refusal(told.status, told.sentence)
        await respond(send, 200, b"", [])

    async def _about_model(self, path: str, send: Send) -> None:
        found = _MODEL.fullmatch(path)
        if found is None:
            raise Refusal(404, f"{path[:80] or '/'} is nothing that this service has; try /v2 or /v2/models/NAME.")
        desk = self._desk(found[1], found[2])
        if found[3] == "ready":
            return await self._ready(send, [desk])
        if found[3] == "stats":
            return await say(send, {"model_stats": self._statistics([found[1]], found[2])})
        if found[3] == "config":
            return await say(send, {**desk.signature.metadata(), "max_batch_size": desk.max_rows})
        await say(send, desk.signature.metadata())

    def desks(self) -> dict[str, Desk]:
        """Who answers for each model."""
        return {name: shelf.active for name, shelf in self.shelves.items() if shelf.active is not None}

    def _statistics(self, names: Iterable[str], version: str | None = None) -> list[dict[str, Any]]:
        found = []
        for name in names:
            shelf = self.shelves[name]
            for desk in shelf.versions.values():
                if version in (None, desk.signature.version):
                    found.append(_statistics(desk))
                    if desk is shelf.active and shelf.trial is not None:
                        found[-1]["shoal"]["trial"] = shelf.trial.numbers()
        return found

    async def _ready(self, send: Send, desks: Sequence[Desk | None]) -> None:
        """Ready: every model has just answered, a client or, where none asked within the last second, us."""
        if self.draining or not desks:
            raise Refusal(503, "The service is not ready.", 1.0)
        for desk in desks:
            if desk is None:
                raise Refusal(503, "A model is being unloaded.", 1.0)
            if time.monotonic() - desk.last_answer_s > _FRESH_S:
                await self._probe(desk)
        await respond(send, 200, b"", [])

    async def _probe(self, desk: Desk) -> None:
        """Ask for a sample; those who want to know at the same time share one inference, for anybody may ask."""
        asked = self._probing.get(desk)
        if asked is None:
            asked = asyncio.get_running_loop().create_task(desk.infer(_sample_request(desk), _PROBE_S))
            self._probing[desk] = asked
            asked.add_done_callback(lambda task: (self._probing.pop(desk, None), task.cancelled() or task.exception()))
        await asyncio.shield(asked)

    async def _processes(self, scope: Scope, send: Send) -> None:
        client = scope.get("client")
        if client is None or not ipaddress.ip_address(client[0]).is_loopback:
            raise Refusal(403, "Only this machine itself may ask for the processes.")
        await say(send, list(self.processes))


def _sample_request(desk: Desk) -> v2.InferRequest:
    rows = tuple(np.frombuffer(raw, spec.dtype).reshape(1, *spec.shape[1:])
                 for raw, spec in zip(desk.sample, desk.signature.inputs, strict=True))  # fmt: skip
    return v2.InferRequest(id="", inputs=rows, rows=1, wanted=(), timeout_s=_PROBE_S, priority=0, uncached=True)


async def probe(desk: Desk) -> str | None:
    """Ask a version for its sample through its queue; None where the right answer came, else what was wrong."""
    try:
        found = await desk.infer(_sample_request(desk), _PROBE_S)
    except Refusal as refusal:
        return refusal.sentence
    specs = desk.signature.outputs
    wanted = [
        np.frombuffer(raw, spec.dtype).reshape(values.shape)
        for raw, spec, values in zip(desk.expected, specs, found, strict=True)
    ]
    difference, _ = compare(desk.signature, wanted, found)
    numbers = [numbers_of(spec, values) for spec, values in zip(specs, wanted, strict=True)]
    largest = max((float(np.abs(values.astype("f8")).max()) for values in numbers if values.size), default=0.0)
    if difference > _PROBE_TOLERANCE * max(1.0, largest):
        return f"The first answer is {difference:.3g} away from what the model computes outside the queue."
    return None


def _header_length(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 12:
        raise Refusal(400, "Inference-Header-Content-Length is not a number of bytes.")
    return int(text)


def _statistics(desk: Desk) -> dict[str, Any]:
    """A model's statistics as the protocol has them, and shoal's own under ``shoal``."""
    times, counts = desk.times, desk.slots.counts
    failed = sum(int(counts[o]) for o in (Outcome.FAILED, Outcome.EXPIRED, Outcome.CANCELLED))
    total_ns = times.queue_ns + times.compute_ns
    none = {"count": 0, "ns": 0}
    batches = [
        {"batch_size": size, "compute_input": none, "compute_infer": {"count": count, "ns": ns}, "compute_output": none}
        for size, (count, ns) in sorted(times.by_batch.items())
    ]
    return {
        "name": desk.signature.name, "version": desk.signature.version, "last_inference": int(time.time() * 1000),
        "inference_count": times.rows, "execution_count": times.batches,
        "inference_stats": {
            "success": {"count": times.requests, "ns": total_ns}, "fail": {"count": failed, "ns": 0},
            "queue": {"count": times.requests, "ns": times.queue_ns}, "compute_input": none,
            "compute_infer": {"count": times.requests, "ns": times.compute_ns}, "compute_output": none,
            "cache_hit": {"count": times.hits, "ns": times.hit_ns}, "cache_miss": {"count": times.misses, "ns": 0},
        },
        "batch_stats": batches,
        "shoal": desk.numbers(),
    }  # fmt: skip
