"""What applications of the gateway and of the route have in common: plain ASGI, answers, refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from shoal.serve.guard import retry_after
from shoal.serve.protocols import v2
from shoal.serve.refusals import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = [(b"content-type", b"application/json")]
# A request in which one of these is there twice means two things; nobody says which.
_ONCE = frozenset({b"authorization", b"x-api-key", b"content-encoding", b"inference-header-content-length"})
TIMEOUT_HEADER = b"x-shoal-timeout-ms"
"""How long a client, or a route on its behalf, still waits for the answer."""
UPDATE_HEADER = b"shoal-update"
"""With how many updates of its run an answer was computed, where the model follows one."""
GRPC_HEADER = b"shoal-grpc-port"
"""Where a service that is ready speaks gRPC too, for a route."""
_DISCARD_S = 2.0
_DISCARD_BYTES = 128 << 20


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Answer with a whole body."""
    await send({"type": "http.response.start", "status": status,
                "headers": [*headers, (b"content-length", b"%d" % len(body))]})  # fmt: skip
    await send({"type": "http.response.body", "body": body})


async def say(send: Send, value: Any) -> None:
    """Answer with JSON."""
    await respond(send, 200, msgspec.json.encode(value), JSON)


async def refuse(receive: Receive, send: Send, refusal: Refusal, body: bytes | None = None) -> None:
    """Answer; where the request has not all been read, close the connection after looking away for a while.

    A client that first sends everything would else find its connection broken, and not the answer.
    """
    headers = list(JSON)
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % retry_after(refusal.retry_after_s)))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    content = body or v2.error_body(refusal.sentence)
    if not state(receive, "more_body"):
        return await respond(send, refusal.status, content, headers)
    headers += [(b"connection", b"close"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    await _discard(receive)
    await send({"type": "http.response.body", "body": b""})


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """The headers by name; Refusal where one that matters is there twice."""
    pairs = scope["headers"]
    headers = dict(pairs)
    if len(headers) < len(pairs):
        names = [name for name, _ in pairs]
        for name in _ONCE:
            if names.count(name) > 1:
                raise Refusal(400, f"The header {name.decode()} is there twice.")
    return headers


def timeout_of(headers: Mapping[bytes, bytes]) -> float | None:
    """Seconds that a request's header allows, None where it has none; Refusal where that is no number of milliseconds."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    if not text.isdigit() or len(text) > 9 or int(text) == 0:
        raise Refusal(400, "X-Shoal-Timeout-Ms is a whole number of milliseconds from 1.")
    return int(text) / 1e3


def state(receive: Receive, word: str) -> bool:
    """What uvicorn notes of a request, on the object whose method ``receive`` is.

    ``disconnected``: the client has gone; ``more_body``: not all has come yet; ``response_started``.
    """
    return bool(getattr(getattr(receive, "__self__", None), word, False))


def gone(receive: Receive) -> bool:
    """Whether the client has left, or may have: it has closed its side of the connection, as who leaves does too."""
    cycle = getattr(receive, "__self__", None)
    return bool(getattr(cycle, "disconnected", False) or getattr(getattr(cycle, "transport", None), "half_closed", False))


async def _discard(receive: Receive) -> None:
    """Read what a client goes on sending, for a moment and up to a size."""
    until, size = time.monotonic() + _DISCARD_S, 0
    while size < _DISCARD_BYTES:
        try:
            message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
        except asyncio.TimeoutError:
            return
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
