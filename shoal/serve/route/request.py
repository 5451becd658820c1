"""What the route needs to know of a request, and its body, which may have to be sent twice."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.serve.asgi import TIMEOUT_HEADER, Receive, Scope, state, timeout_of
from shoal.serve.refusals import Refusal
from shoal.serve.wire import Address

BODY_BYTES = 32 << 20
BODY_S = 10.0
# A body up to this is read before a service is chosen; a longer one is passed on as it comes, and kept as long as it fits here.
_READ_FIRST = 64 << 10
_KEEP_BYTES = 1 << 20
_MOST_DIGITS = 12
_LONGEST_US = 1 << 40

_KEYS = (b"idempotency-key", b"x-idempotency-key")
# What belongs to one connection and not to the request (RFC 9110, 7.6.1); the length is said anew.
_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
                  b"host", b"content-length", b"expect", TIMEOUT_HEADER})  # fmt: skip
# A version is a model of its own: who lacks it may well have the others.
_MODEL = re.compile(rb"/v2/models/([^/]+(?:/versions/[^/]+)?)/(?:infer|classify)")
_PURE = re.compile(rb"/v2/models/[^/]+(?:/versions/[^/]+)?/(?:infer|classify)|/v1/embeddings|/v2/repository/index")


class _Inference(msgspec.Struct):
    parameters: dict[str, Any] = {}


class _Embeddings(msgspec.Struct):
    model: str = ""


_INFERENCE = msgspec.json.Decoder(_Inference)
_EMBEDDINGS = msgspec.json.Decoder(_Embeddings)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request's head, and what its beginning says.

    Attributes:
        model: whose inference it is, with the version where that is asked for; "" for what is none.
        repeatable: whether a service may be asked again for what another may have read: inference and metadata change
            nothing, GET by its definition; anything else where it has an idempotency key.
        timeout_s: how long its client waits, where it says so.
    """

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    length: int | None
    chunked: bool
    model: str
    repeatable: bool
    timeout_s: float | None

    def rendered(self, address: Address, left_s: float | None, extra: list[tuple[bytes, bytes]]) -> bytes:
        """The head as it goes to a service; ``left_s``: how long its client still waits, where it had said so."""
        first = b"%s %s%s HTTP/1.1" % (self.method, address.prefix.encode(), self.target)
        lines = [first, b"host: %s" % address.authority.encode()]
        replaced = {name for name, _ in extra}
        lines += [b"%s: %s" % pair for pair in (*self.headers, *extra) if pair in extra or pair[0] not in replaced]
        if left_s is not None:
            lines.append(b"%s: %d" % (TIMEOUT_HEADER, max(1, round(left_s * 1e3))))
        if self.length is not None:
            lines.append(b"content-length: %d" % self.length)
        elif self.chunked:
            lines.append(b"transfer-encoding: chunked")
        return b"\r\n".join([*lines, b"", b""])


def read(scope: Scope, body: Body) -> Asked:
    """What a request is. Refusal where its own deadline is no number."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    listed = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    path = scope["raw_path"]
    method = scope["method"].encode()
    said = dict(headers)
    query = scope.get("query_string", b"")
    found = _MODEL.fullmatch(path)
    return Asked(
        method=method, target=path + (b"?" + query if query else b""),
        headers=[pair for pair in headers if pair[0] not in _HOP and pair[0] not in listed],
        length=body.length, chunked=body.length is None and not body.whole,
        model=found[1].decode("latin-1") if found else _embeddings_model(path, body),
        repeatable=method == b"GET" or _PURE.fullmatch(path) is not None or any(key in said for key in _KEYS),
        timeout_s=_timeout(said, body),
    )  # fmt: skip


def _embeddings_model(path: bytes, body: Body) -> str:
    if path != b"/v1/embeddings":
        return ""
    try:
        return _EMBEDDINGS.decode(body.beginning).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def _timeout(headers: dict[bytes, bytes], body: Body) -> float | None:
    """Seconds, from the header or the request's own parameter, whichever is less."""
    said = timeout_of(headers)
    found = [] if said is None else [said]
    if b'"timeout"' in body.beginning:
        length = headers.get(b"inference-header-content-length", b"")
        end = int(length) if length.isdigit() and len(length) <= _MOST_DIGITS else None
        try:
            given = _INFERENCE.decode(body.beginning[:end]).parameters.get("timeout")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            given = None
        # Longer ones are refused by services.
        if type(given) is int and 0 < given < _LONGEST_US:
            found.append(given / 1e6)
    return min(found, default=None)


class Body:
    """A request's body: its beginning is read at once, the rest as it is sent on.

    Attributes:
        length: of the whole, None where nobody knows yet.
        beginning: all of a short one.
    """

    def __init__(self, receive: Receive, length: int | None) -> None:
        self._receive = receive
        self._until_s = time.monotonic() + BODY_S
        self.length = length
        self._kept: list[bytes] = []
        self._size = 0
        self.whole = False
        self._lost = False

    @classmethod
    async def begun(cls, scope: Scope, receive: Receive) -> Body:
        """Read the beginning; Refusal where the body is too long or does not come."""
        said = dict(scope["headers"]).get(b"content-length")
        if said is not None and (not said.isdigit() or len(said) > _MOST_DIGITS or int(said) > BODY_BYTES):
            raise Refusal(413, f"The body is longer than {BODY_BYTES} bytes.")
        body = cls(receive, None if said is None else int(said))
        while not body.whole and body._size <= _READ_FIRST:
            await body._next()
        if body.whole:
            body.length = body._size if body._size or scope["method"] != "GET" else None
        return body

    @property
    def beginning(self) -> bytes:
        return b"".join(self._kept)

    @property
    def held_bytes(self) -> int:
        """So much of it is kept at the most, as far as that is known."""
        return self.length if self.length is not None else 0 if self.whole else _KEEP_BYTES

    @property
    def again(self) -> bool:
        """Whether all of it that was read is still here."""
        return not self._lost

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it, from its beginning; only while ``again``."""
        for piece in list(self._kept):
            if piece:
                yield piece
        while not self.whole:
            piece = await self._next()
            if piece:
                yield piece

    async def _next(self) -> bytes:
        try:
            if state(self._receive, "body") or not state(self._receive, "more_body"):
                message = await self._receive()
            else:
                message = await asyncio.wait_for(self._receive(), max(0.0, self._until_s - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError):
            raise Refusal(408, f"The body did not arrive within {BODY_S:g} s.") from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The body ended early.")
        piece: bytes = message.get("body", b"")
        self.whole = not message.get("more_body", False)
        self._size += len(piece)
        if self._size > BODY_BYTES:
            raise Refusal(413, f"The body is longer than {BODY_BYTES} bytes.")
        if self._size <= _KEEP_BYTES:
            self._kept.append(piece)
        else:
            self._lost = True
            self._kept.clear()
        return piece
