"""The shortest way of an inference: from the parser to the desk and back, without an application and a task for each request.

For whole requests of a kind that has nothing unusual about it; everything else goes through ``App``, with the same answers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from shoal.serve.asgi import TIMEOUT_HEADER, UPDATE_HEADER
from shoal.serve.common import Common
from shoal.serve.connection import Asker
from shoal.serve.desk import Desk
from shoal.serve.heads import Heads
from shoal.serve.inbox import Inbox
from shoal.serve.protocols import v2
from shoal.serve.refusals import Mishaps, Refusal
from shoal.serve.slots import Outcome
from shoal.serve.ticket import Outputs

_INFER = re.compile(rb"/v2/models/([^/%?#]+)/infer")
# Who sends one of these means something that the application looks at.
_ELSEWHERE = frozenset({
    b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"authorization", b"x-api-key", TIMEOUT_HEADER,
})  # fmt: skip
_MOST_DIGITS = 12
# Where there is no hope for a request, there is none for those that come within this share of its time.
_HOPELESS_SHARE = 0.01
# Long bodies are counted while they are held, and rarely come in one piece.
_LONG_BYTES = 64 << 10
_OWN_DEADLINE = b'"timeout"'
_JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b"
_BINARY = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ninference-header-content-length: %d\r\n%b"
    b"content-length: %d\r\n\r\n%b"
)


class Route(NamedTuple):
    """What a head asks for, whenever it comes."""

    model: str
    size: int
    header_length: int | None


class Planned(NamedTuple):
    """An inference whose head has been read. ``refuse``: it will not be in time, unless it has a deadline of its own."""

    desk: Desk
    header_length: int | None
    arrived_s: float
    refuse: bool


class Direct:
    """Between connections and desks."""

    def __init__(self, common: Common) -> None:
        self._catalogue = common.catalogue
        self._slo_s = common.limits.slo_s
        self._most_bytes = min(common.limits.body_bytes, _LONG_BYTES)
        self._pace = common.pace
        self.heads = Heads()
        self._inbox = Inbox(common.limits.slo_s)
        # Who may ask is found out by the application, and whose trace a request belongs to.
        self._closed = common.guard is not None or common.tracing is not None
        self._mishaps = Mishaps()
        self._hopeless: tuple[Desk | None, float] = (None, 0.0)

    def route(self, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Route | None:
        """What a POST asks for, if that is an inference that can go this way."""
        found = None if self._closed else _INFER.fullmatch(url)
        if found is None:
            return None
        said = dict(headers)
        size, header = said.get(b"content-length", b""), said.get(b"inference-header-content-length")
        if len(said) < len(headers) or not _ELSEWHERE.isdisjoint(said) or not _is_number(size):
            return None
        if int(size) > self._most_bytes or not (header is None or _is_number(header)):
            return None
        return Route(found[1].decode("latin-1"), int(size), None if header is None else int(header))

    def plan(self, route: Route) -> Planned | None:
        """What becomes of it; to be asked when its head was read."""
        shelf = self._catalogue.shelves.get(route.model)
        # While a version is tried, requests are shared out and answers compared.
        if shelf is None or shelf.trial is not None or (desk := shelf.active) is None or desk.remembers:
            return None
        if route.size > desk.body_bytes:
            return None
        now = time.monotonic()
        arrived_s = self._pace.waiting_since(now)
        return Planned(desk, route.header_length, arrived_s, self._refuses(desk, arrived_s, now))

    def _refuses(self, desk: Desk, arrived_s: float, now: float) -> bool:
        """Whether a request has no hope. Under overload most have none: then to find that out is much of what one costs."""
        known, until_s = self._hopeless
        if known is desk and now < until_s:
            return True
        inbox = self._inbox
        if not (inbox.full() or desk.hopeless(arrived_s + self._slo_s, now, len(inbox), inbox.wait_s)):
            return False
        self._hopeless = (desk, now + _HOPELESS_SHARE * self._slo_s)
        return True

    def handed_on(self) -> None:
        """A request that was planned goes to the application after all, and will arrive there in the next turn."""
        self._pace.handed_on()

    def begin(self, planned: Planned, body: bytes, asker: Asker) -> bool:
        """Have a request answered: ``asker.answer`` is called once, perhaps at once. False where only the application can."""
        desk = planned.desk
        said = body if planned.header_length is None else body[: planned.header_length]
        if not self._catalogue.has(desk):
            return False
        if planned.refuse and not _has(_OWN_DEADLINE, b"o", said):
            now = time.monotonic()
            self._pace.arrive(now)
            asker.answer(desk.turned_away(planned.arrived_s, now))
            return True
        # Texts and pictures take longer than a turn.
        if desk.takes_encoded and _has(b"BYTES", b"Y", said):
            return False
        self._pace.arrive(time.monotonic())
        self._inbox.put(partial(self._work, planned, body, asker))
        return True

    def _work(self, planned: Planned, body: bytes, asker: Asker) -> None:
        desk = planned.desk
        try:
            if not self._catalogue.has(desk):
                # The next version has come meanwhile.
                desk = self._catalogue.desk(desk.signature.name)
            request = v2.decode(desk.signature, body, planned.header_length, desk.max_rows)

            def done(outputs: Outputs | None, refusal: Refusal | None) -> None:
                if outputs is not None:
                    asker.answer(self._rendered(desk, request, outputs, asker.keep_alive))
                elif refusal is not None:
                    asker.answer(refusal)

            desk.submit(request, self._slo_s, asker.gone, planned.arrived_s, done)
        except Refusal as refusal:
            if refusal.status < 429:
                desk.slots.count(Outcome.INVALID)
            asker.answer(refusal)
        except Exception:
            asker.answer(self._mishaps.refusal())

    def _rendered(
        self, desk: Desk, request: v2.InferRequest, outputs: Outputs, keep_alive: bool
    ) -> bytes | Refusal:
        try:
            content, header_length = v2.encode(desk.signature, request, outputs, outputs.update)
        except Exception:
            return self._mishaps.refusal()
        more = b"" if keep_alive else b"connection: close\r\n"
        if outputs.update:
            more += b"%b: %d\r\n" % (UPDATE_HEADER, outputs.update)
        if header_length is None:
            return _JSON % (more, len(content), content)
        return _BINARY % (header_length, more, len(content), content)


def _has(word: bytes, letter: bytes, said: bytes) -> bool:
    """Whether JSON may hold a word, written as it is or escaped. ``letter``: one of the word's that is rare elsewhere.

    In a list of thousands of numbers a single byte is found, or not, in a hundredth of the time that a word takes.
    """
    return (letter in said and word in said) or b"\\" in said


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= _MOST_DIGITS
