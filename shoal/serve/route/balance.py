"""Which service gets the next request: decisions only, no sockets and no clock. Times are seconds of one monotonic clock.

The best service is the one that is predicted to finish first: its latency for requests of this model and size, learned over how
many are on their way, times how often it has to be asked because it refuses. What is overdue counts too, so a service that
hangs is left alone before anybody has said that it does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from shoal.serve.route.affinity import Ring
from shoal.serve.route.breaker import Breaker
from shoal.serve.route.estimate import Latency, Pressure

_FIRST_GUESS_S = 0.01
# Predictions so close to each other are equal; then the one takes it that has not had one for the longest time.
_EQUAL = 1.05
_LACKS_S = 10.0
_MOST_KEYS = 256
_ASK_AGAIN_SHARE, _ASK_AGAIN_MOST = 0.2, 20.0


class Ended(Enum):
    """How asking one service ended, as far as deciding is concerned."""

    ANSWERED = "answered"
    REJECTED = "rejected"  # 4xx: the client's doing
    REFUSED = "refused"  # 429, or 503 with Retry-After: not taken in
    LATE = "late"  # 504: taken in, and not in time
    FAULT = "fault"  # no connection, no whole answer, 500 and the like
    DROPPED = "dropped"  # the client left, or the answer was no longer wanted


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is known of a request.

    Attributes:
        model: whose requests take equally long, "" for what is no inference.
        size: bytes of its body.
        affinity: requests of equal keys go to the same service, where one is given.
    """

    model: str
    size: int = 0
    affinity: str | None = None

    @property
    def kind(self) -> tuple[str, int]:
        """Model, and size within a factor of four."""
        return self.model, max(0, self.size.bit_length() - 10) // 2


@dataclass
class Upstream:
    """What is known of one service."""

    name: str
    ready: bool = False
    why: str = "not asked yet"
    breaker: Breaker = field(default_factory=Breaker)
    pressure: Pressure = field(default_factory=Pressure)
    latencies: dict[tuple[str, int], Latency] = field(default_factory=dict)
    counts: dict[Ended, int] = field(default_factory=lambda: dict.fromkeys(Ended, 0))
    # Number -> (when it was asked, when its answer was predicted, how many others were on their way).
    asked: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    lacks: dict[str, float] = field(default_factory=dict)
    last: int = 0

    @property
    def outstanding(self) -> int:
        """Requests on their way."""
        return len(self.asked)

    def overdue_s(self, now_s: float) -> float:
        """By how much the answer to what it was asked first is late."""
        oldest = next(iter(self.asked.values()), None)
        return 0.0 if oldest is None else max(0.0, now_s - oldest[1])


class Balancer:
    """Several services, by their index."""

    def __init__(self, names: Sequence[str]) -> None:
        self.upstreams = [Upstream(name) for name in names]
        self._ring = Ring(names)
        self._turn = 0
        self._again = _ASK_AGAIN_MOST

    def choose(
        self, ask: Ask, now_s: float, tried: Collection[int] = (), without: Collection[int] = ()
    ) -> int | None:
        """Who is to be asked; None where nobody may be. ``without``: who cannot be asked such a thing.

        Where all lack the model, the first try asks one of them all the same: it may have it by now, and it knows what to answer.
        """
        having = {k for k, u in enumerate(self.upstreams) if u.lacks.get(ask.model, 0.0) <= now_s and k not in without}
        asked = having if having or tried else range(len(self.upstreams))
        able = [k for k in asked if k not in tried and k not in without and self._able(k, now_s)]
        if ask.affinity is not None:
            return self._ring.choose(ask.affinity, {k: self.upstreams[k].outstanding for k in able})
        if len(able) < 2:
            return able[0] if able else None
        finish = {k: self.predict(k, ask, now_s) for k in able}
        best = min(finish.values())
        return min((k for k in able if finish[k] <= _EQUAL * best), key=lambda k: self.upstreams[k].last)

    def _able(self, index: int, now_s: float) -> bool:
        upstream = self.upstreams[index]
        return upstream.ready and upstream.breaker.allows(now_s)

    def predict(self, index: int, ask: Ask, now_s: float) -> float:
        """After how many seconds a service would have answered."""
        upstream = self.upstreams[index]
        load = upstream.outstanding
        latency = upstream.latencies.get(ask.kind)
        trust = 0.0 if latency is None else latency.trust(now_s, self._turn)
        # What is not known, or no longer, is hoped to be as good as the best of the others.
        expected = (1 - trust) * (1 + load) * self._best_alone(ask) if trust < 1 else 0.0
        if latency is not None:
            expected += trust * latency.predict(load)
        return (expected + upstream.overdue_s(now_s)) * upstream.pressure.costs(now_s)

    def _best_alone(self, ask: Ask) -> float:
        known = [u.latencies[ask.kind].predict(0) for u in self.upstreams if ask.kind in u.latencies]
        return min(known, default=_FIRST_GUESS_S)

    # -- what becomes of requests --------------------------------------------------------------------------------

    def begin(self, index: int, ask: Ask, now_s: float) -> int:
        """A service is asked; returns a number to say ``end`` with."""
        self._turn += 1
        upstream, number = self.upstreams[index], self._turn
        due_s = now_s + self.predict(index, ask, now_s)
        upstream.breaker.begin(now_s)
        upstream.asked[number] = (now_s, due_s, upstream.outstanding)
        upstream.last = number
        return number

    def end(
        self, index: int, number: int, ask: Ask, ended: Ended, now_s: float, retry_after_s: float = 1.0
    ) -> None:
        """It was asked, and this came of it; once for each ``begin``."""
        upstream = self.upstreams[index]
        began_s, due_s, load = upstream.asked.pop(number)
        upstream.counts[ended] += 1
        if ended is Ended.FAULT:
            upstream.breaker.fault(now_s)
        elif ended in (Ended.DROPPED, Ended.LATE):
            # A client's short deadline says nothing against a service; one that hangs is found by its health checks.
            upstream.breaker.dropped()
        else:
            upstream.breaker.fine()
        if ended is Ended.ANSWERED:
            upstream.lacks.pop(ask.model, None)
        if ended is Ended.REFUSED:
            upstream.pressure.refused(retry_after_s, now_s)
        elif ended in (Ended.ANSWERED, Ended.LATE):
            upstream.pressure.answered(now_s)
            # What was given up at a client's deadline would have taken longer: that it took less than predicted is no news.
            took_s = now_s - began_s if ended is Ended.ANSWERED else max(now_s, due_s) - began_s
            self._latency(upstream, ask).learn(load, took_s, began_s, number)

    def _latency(self, upstream: Upstream, ask: Ask) -> Latency:
        found = upstream.latencies.get(ask.kind)
        if found is None:
            if len(upstream.latencies) >= _MOST_KEYS:
                upstream.latencies.pop(next(iter(upstream.latencies)))
            found = upstream.latencies[ask.kind] = Latency()
        return found

    def lacks(self, index: int, model: str, now_s: float) -> None:
        """A service has no such model: it is not asked for it for a while."""
        lacks = self.upstreams[index].lacks
        if len(lacks) >= _MOST_KEYS:
            lacks.pop(next(iter(lacks)))
        lacks[model] = now_s + _LACKS_S

    def health(self, index: int, trouble: str | None) -> bool:
        """What a health check found, None where all is well; returns whether that is news."""
        upstream = self.upstreams[index]
        ready = trouble is None
        news = ready != upstream.ready or (upstream.why == "not asked yet")
        upstream.ready, upstream.why = ready, trouble or ""
        if ready and news:
            # Whatever it lacked, it may have been started with.
            upstream.lacks.clear()
        return news

    # -- asking again --------------------------------------------------------------------------------------------

    def count_request(self) -> None:
        """A request came: for every five of them one refusal may be asked about elsewhere, so that no storm is made of one."""
        self._again = min(_ASK_AGAIN_MOST, self._again + _ASK_AGAIN_SHARE)

    def may_ask_again(self, ended: Ended) -> bool:
        """Whether another service may be asked after this; a refusal takes from what may be asked again."""
        if ended is not Ended.REFUSED:
            return ended is Ended.FAULT
        if self._again < 1:
            return False
        self._again -= 1
        return True

    def any_ready(self, now_s: float, without: Collection[int] = ()) -> bool:
        """Whether somebody can be asked, beside those ``without`` what it takes."""
        return any(
            u.ready and u.breaker.state(now_s) != "open" and k not in without for k, u in enumerate(self.upstreams)
        )

    def numbers(self, now_s: float) -> list[dict[str, object]]:
        """What the statistics say of each service."""
        return [self._numbers_of(k, now_s) for k in range(len(self.upstreams))]

    def _numbers_of(self, index: int, now_s: float) -> dict[str, object]:
        upstream = self.upstreams[index]
        finish = [self.predict(index, Ask(model=model, size=_size(size)), now_s) for model, size in upstream.latencies]
        return {
            "url": upstream.name, "ready": upstream.ready, "why": upstream.why,
            "breaker": upstream.breaker.state(now_s), "outstanding": upstream.outstanding,
            **{ended.value: count for ended, count in upstream.counts.items()},
            "refusal_share": upstream.pressure.share(now_s),
            "predicted_ms": 1e3 * min(finish) if finish and math.isfinite(min(finish)) else None,
        }  # fmt: skip


def _size(kind: int) -> int:
    return 1 << (2 * kind + 9)
