"""A load generator: closed loop, Poisson stream or recorded trace against one address; and the sweep for the highest rate.

Requests are rendered beforehand and go out over plain sockets with the least that can read a response, because the generator
shares the machine with what it measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import RequestError
from shoal.serve.alarm import Alarm
from shoal.serve.credentials import client_context
from shoal.serve.load_report import Ledger, Report
from shoal.serve.wire import Address, BadResponse, Head, Response, read_head, sentence_of

_WATCH_S = 0.25
_OPEN_FIRST = 16
# What falls due within this time is sent together: waking up takes as long as sending. It counts from when it was due.
_TOGETHER_S = 1e-4
_PAUSE_S = 0.1
"""A closed loop's client that was refused, or lost its connection, waits so long: else refusals alone would fill the machine."""
_HEAD_END, _SHORT_HEAD = b"\r\n\r\n", 1024


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How a service is driven: by ``arrivals_s``, else by a Poisson stream of ``rate``, else by ``concurrency`` clients.

    Attributes:
        rate: requests per second.
        concurrency: clients that each send their next request when they have their last answer.
        arrivals_s: when to send, in seconds from the beginning, in order.
        duration_s, requests: what ends it, whichever comes first; one of them is needed except with ``arrivals_s``.
        warmup_s: requests meant for the first so many seconds are sent but not counted.
        slo_s: what an answer may take; for goodput and the sweep.
        connections: the most that a stream opens; further requests wait, and their latency counts from when they were due.
        give_up_s: a request with no answer after so long has failed.
        seed: of the Poisson stream.
        ca_file: for https: the PEM file of whom to trust; None for whom this machine trusts.
    """

    rate: float | None = None
    concurrency: int = 1
    arrivals_s: tuple[float, ...] | None = None
    duration_s: float | None = None
    requests: int | None = None
    warmup_s: float = 0.0
    slo_s: float | None = None
    connections: int = 1024
    give_up_s: float = 30.0
    seed: int = 0
    ca_file: Path | None = None

    @property
    def mode(self) -> str:
        """What drives it, in words."""
        if self.arrivals_s is not None:
            return f"trace of {len(self.arrivals_s):,} requests"
        return f"Poisson, {self.rate:g}/s" if self.rate is not None else f"closed loop, {self.concurrency} at a time"


@dataclass(frozen=True)
class Progress:
    """How far a load test is."""

    elapsed_s: float
    waiting: int
    ledger: Ledger


def poisson(rate: float, duration_s: float | None, requests: int | None, seed: int) -> list[float]:
    """Return the times of a Poisson stream, in seconds from 0, up to the duration or the number, whichever is first."""
    if duration_s is None and requests is None:
        raise RequestError("A Poisson stream has no end of its own; give a duration or a number of requests.")
    random, last = np.random.default_rng(seed), 0.0
    times: list[float] = []
    while (requests is None or len(times) < requests) and (duration_s is None or last <= duration_s):
        # A fixed size: the same seed begins with the same times whatever the duration.
        more = last + np.cumsum(random.exponential(1 / rate, 4096))
        last = float(more[-1])
        times.extend(more.tolist())
    kept = times if duration_s is None else [t for t in times if t <= duration_s]
    return kept[:requests]


def read_trace(path: Path) -> tuple[float, ...]:
    """Return the times in a trace file: seconds from the beginning, one a line, sorted; RequestError where one is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"The trace {path} cannot be read; give a text file with one time in seconds a line.") from None
    times = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = float(line)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1e9:
            raise RequestError(f"{path}, line {number}: {line.strip()[:40]!r} is no time in seconds from the beginning.")
        times.append(value)
    if not times:
        raise RequestError(f"The trace {path} holds no times; give one in seconds a line.")
    return tuple(sorted(times))


def drive(
    address: Address, payloads: Sequence[bytes], settings: LoadSettings, *,
    progress: Callable[[Progress], None] | None = None, clock: Callable[[], float] = time.monotonic,
) -> Report:  # fmt: skip
    """Send rendered requests (``wire.render``) in turn as the settings say, and return what came of them.

    Raises:
        RequestError: nobody listens at the address, or the settings have no end.
    """
    loop = _new_loop()
    try:
        with _no_garbage_collection():
            return loop.run_until_complete(_Driver(address, payloads, settings, progress, clock).run())
    finally:
        loop.close()


class _Connection(asyncio.Protocol):
    """One connection, with at most one request under way."""

    __slots__ = ("driver", "transport", "intended", "sent", "busy", "response")

    def __init__(self, driver: _Driver) -> None:
        self.driver = driver
        self.transport: Any = None
        self.intended = self.sent = 0.0
        self.busy = False
        self.response: Response | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, request: bytes, intended: float, now: float) -> None:
        self.intended, self.sent, self.busy = intended, now, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            if self.response is None:
                head = _head_of(data)
                if head is not None and len(data) == head.start + head.length:
                    # The whole response at once: nearly always so.
                    self._done(head.status, data[head.start :] if head.status >= 300 else b"", head.keep_alive)
                    return
                self.response = Response()
            if self.response.feed(data):
                response, self.response = self.response, None
                self._done(response.status, response.body, response.keep_alive)
        except BadResponse as error:
            self.driver.note(0, f"What answers cannot be read: {error}.")
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy and self.response is not None and self.response.end():
            self._done(self.response.status, self.response.body, False)
            return
        self.driver.lost(self)

    def _done(self, status: int, body: bytes, keep_alive: bool) -> None:
        if not self.busy:
            # Nothing was asked: a server that says goodbye (408) before it closes.
            self.transport.abort()
            return
        self.busy = False
        self.driver.finished(self, status, body, keep_alive)


class _Driver:
    """Sends each request when it is due, as soon as a connection is free."""

    def __init__(
        self, address: Address, payloads: Sequence[bytes], settings: LoadSettings,
        progress: Callable[[Progress], None] | None, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._address, self._payloads, self._settings = address, list(payloads), settings
        self._progress, self._clock = progress, clock
        self._closed_loop = settings.arrivals_s is None and settings.rate is None
        self._due = [] if self._closed_loop else _arrivals(settings)
        self._most = settings.concurrency if self._closed_loop else settings.connections
        self._next = 0  # of _due
        self._sent = 0
        self._pending: deque[float] = deque()
        self._idle: list[_Connection] = []
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._pausing = 0
        self._in_flight = 0
        self._ledger = Ledger(settings.slo_s)
        self._tls = client_context(settings.ca_file) if address.tls else None
        self._begin = self._counted_from = 0.0
        self._stop_at = float("inf")

    async def run(self) -> Report:
        settings = self._settings
        if self._closed_loop and settings.duration_s is None and settings.requests is None:
            raise RequestError("A closed loop has no end of its own; give a duration or a number of requests.")
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._alarm, self._alarm_set = Alarm(self._loop, self._due_now), False
        try:
            first = self._most if self._closed_loop else min(self._most, _OPEN_FIRST)
            for _ in range(first):
                await self._open()
            cpu_s, self._begin = time.process_time(), self._clock()
            self._counted_from = self._begin + settings.warmup_s
            if self._closed_loop and settings.duration_s is not None:
                self._stop_at = self._begin + settings.duration_s
            watch = self._loop.create_task(self._watch())
            self._start()
            await self._ended.wait()
            watch.cancel()
            end = self._begin + (self._due[-1] if self._due else 0.0)
            if self._due and settings.duration_s is not None and settings.arrivals_s is None and settings.requests is None:
                end = self._begin + settings.duration_s
            elapsed = max(end, self._ledger.last_s) - self._counted_from
            return self._ledger.report(settings.mode, max(0.0, elapsed), time.process_time() - cpu_s)
        finally:
            self._alarm.close()
            for task in list(self._opening):
                task.cancel()
            for connection in list(self._connections):
                connection.transport.abort()
            # Let the loop close the sockets before it is closed itself.
            await asyncio.sleep(0)

    def note(self, status: int, reason: str) -> None:
        """Keep the first reason for a status that is no answer."""
        self._ledger.reasons.setdefault(status, reason)

    # -- sending -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._closed_loop:
            for _ in range(self._most):
                self._ask_again()
        else:
            self._release()
        self._end_if_done()

    def _due_now(self) -> None:
        self._alarm_set = False
        self._release()

    def _release(self) -> None:
        """Take in the requests of a stream that are due by now, and have the alarm ring for the next."""
        due, index, now = self._due, self._next, self._clock() - self._begin
        while index < len(due) and due[index] <= now:
            self._pending.append(self._begin + due[index])
            index += 1
        self._next = index
        self._send_pending()
        if index < len(due) and not self._alarm_set:
            # One that is set rings no later than that, for then the next one was earlier.
            self._alarm_set = True
            self._alarm.set(max(_TOGETHER_S, self._begin + due[index] - self._clock()))

    def _ask_again(self) -> None:
        """A closed loop's client sends its next request, unless it is time to stop."""
        now = self._clock()
        limit = self._settings.requests
        if now < self._stop_at and (limit is None or self._sent + len(self._pending) < limit):
            self._pending.append(now)
            self._send_pending()

    def _send_pending(self) -> None:
        pending, idle = self._pending, self._idle
        while pending and idle:
            connection = idle.pop()
            if connection.transport.is_closing():
                continue
            payload = self._payloads[self._sent % len(self._payloads)]
            self._sent += 1
            self._in_flight += 1
            connection.send(payload, pending.popleft(), self._clock())
        wanted = min(len(pending) - len(self._opening), self._most - len(self._connections) - len(self._opening))
        for _ in range(wanted):
            task = self._loop.create_task(self._open_for_pending())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    async def _open(self) -> None:
        try:
            host, port = self._address.host, self._address.port
            make = self._loop.create_connection(lambda: _Connection(self), host, port, ssl=self._tls)
            _, connection = await asyncio.wait_for(make, self._settings.give_up_s)
        except (OSError, asyncio.TimeoutError) as error:
            raise _nobody(self._address, error) from None
        self._connections.add(connection)
        self._idle.append(connection)

    async def _open_for_pending(self) -> None:
        try:
            await self._open()
        except RequestError as error:
            self.note(0, str(error))
            if self._pending:
                now = self._clock()
                self._sent += 1
                self._count(0, self._pending.popleft(), now, now)
                self._after(0)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if not task.cancelled():
            self._send_pending()
            self._end_if_done()

    # -- what comes back -----------------------------------------------------------------------------------------

    def finished(self, connection: _Connection, status: int, body: bytes, keep_alive: bool) -> None:
        """A response is here."""
        self._in_flight -= 1
        self._count(status, connection.intended, connection.sent, self._clock())
        if status >= 300 and status not in self._ledger.reasons:
            self.note(status, sentence_of(body, status))
        if keep_alive:
            self._idle.append(connection)
        else:
            self._connections.discard(connection)
            connection.transport.close()
        self._after(status)

    def lost(self, connection: _Connection) -> None:
        """A connection has ended; whether or not a request was under way on it."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.busy:
            connection.busy = False
            self._in_flight -= 1
            self.note(0, "The connection broke before the answer was here.")
            self._count(0, connection.intended, connection.sent, self._clock())
            self._after(0)

    def _count(self, status: int, intended: float, sent: float, done: float) -> None:
        if intended >= self._counted_from:
            self._ledger.record(status, intended, sent, done)

    def _after(self, status: int) -> None:
        """One request has ended: what comes next?"""
        if not self._closed_loop:
            if self._next < len(self._due) and self._begin + self._due[self._next] <= self._clock():
                self._release()
            elif self._pending:
                self._send_pending()
        elif 200 <= status < 300:
            self._ask_again()
        else:
            self._pausing += 1
            self._loop.call_later(_PAUSE_S, self._resume)
        if not self._in_flight:
            self._end_if_done()

    def _resume(self) -> None:
        self._pausing -= 1
        self._ask_again()
        self._end_if_done()

    def _end_if_done(self) -> None:
        if not (self._in_flight or self._pending or self._pausing or self._next < len(self._due)):
            self._ended.set()

    async def _watch(self) -> None:
        """Give up on what takes too long, and tell how far it is."""
        while True:
            await asyncio.sleep(_WATCH_S)
            now = self._clock()
            oldest = now - self._settings.give_up_s
            for connection in [c for c in self._connections if c.busy and c.sent < oldest]:
                self.note(0, f"No answer came within {self._settings.give_up_s:g} s.")
                # What has come of it so far is no answer, even where it has no length.
                connection.response = None
                connection.transport.abort()
            while self._pending and self._pending[0] < oldest:
                self.note(0, f"No connection was free within {self._settings.give_up_s:g} s.")
                self._sent += 1
                self._count(0, self._pending.popleft(), now, now)
                self._after(0)
            if self._progress is not None:
                self._progress(Progress(now - self._begin, self._in_flight + len(self._pending), self._ledger))


# -- the sweep ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """The highest rate that held, its report (None where none did), and every rate that was tried, in order."""

    rate: float | None
    report: Report | None
    tried: tuple[tuple[float, Report], ...]


def sweep(
    probe: Callable[[float], Report], start: float, *, precision: float = 0.05, least: float = 0.5, most: float = 1e6
) -> Sweep:
    """Find the highest rate at which ``probe(rate)`` holds its SLO, by doubling from ``start``, then bisection.

    Where already the start does not hold, it is halved, down to ``least``, or until nothing is answered at all. Bisection
    ends when the rate that holds and the rate that does not are within ``precision`` of each other.
    """
    tried: list[tuple[float, Report]] = []

    def holds(rate: float) -> bool:
        tried.append((rate, probe(rate)))
        return tried[-1][1].holds

    rate = min(max(start, least), most)
    if holds(rate):
        low, high = rate, rate * 2
        while high <= most and holds(high):
            low, high = high, high * 2
    else:
        low, high = rate / 2, rate
        while tried[-1][1].answered and low >= least and not holds(low):
            low, high = low / 2, low
        if low < least or not tried[-1][1].answered:
            return Sweep(None, None, tuple(tried))
    while high <= most and high > low * (1 + precision):
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    best = next(report for rate, report in reversed(tried) if rate == low)
    return Sweep(low, best, tuple(tried))


def prober(
    address: Address, payloads: Sequence[bytes], settings: LoadSettings, progress: Callable[[Progress], None] | None = None
) -> Callable[[float], Report]:
    """Return the probe of a sweep: a Poisson stream as the settings say, each time another one.

    A probe is made up to four times as long where that is what 200 requests take: a p99 of a few says little.
    """
    if settings.slo_s is None:
        raise RequestError("A sweep looks for the highest rate that holds an SLO; give one with --slo-ms.")
    slo_s, count = settings.slo_s, iter(range(1 << 30))

    def probe(rate: float) -> Report:
        asked_s = settings.duration_s or 5.0
        length = max(asked_s, min(200 / rate, 4 * asked_s))
        # What an overloaded service has not answered by then is far beyond the SLO, and would only delay the next probe.
        patience = min(settings.give_up_s, max(2.0, 10 * slo_s))
        asked = replace(settings, rate=rate, arrivals_s=None, duration_s=length, requests=None, give_up_s=patience,
                        seed=settings.seed + next(count))  # fmt: skip
        return drive(address, payloads, asked, progress=progress)

    return probe


_known_head = functools.lru_cache(maxsize=256)(read_head)


def _head_of(data: bytes) -> Head | None:
    """As ``read_head``, which is asked only once for equal heads: most are."""
    end = data.find(_HEAD_END) + len(_HEAD_END)
    return _known_head(data[:end]) if len(_HEAD_END) <= end <= _SHORT_HEAD else read_head(data)


def _arrivals(settings: LoadSettings) -> list[float]:
    if settings.arrivals_s is None:
        assert settings.rate is not None
        return poisson(settings.rate, settings.duration_s, settings.requests, settings.seed)
    limit = float("inf") if settings.duration_s is None else settings.duration_s
    return [t for t in settings.arrivals_s if t <= limit][: settings.requests]


def _nobody(address: Address, error: Exception) -> RequestError:
    reason = (getattr(error, "strerror", None) or str(error) or "no answer").lower().rstrip(".")
    return RequestError(f"Nobody answers at {address.url} ({reason}); is the service running, and is this its address?")


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The generator makes no cycles on its way, and a collection in the middle would be measured as latency."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


