"""How long a service takes, learned from its answers. Pure: time is handed in, in seconds of one monotonic clock."""

from __future__ import annotations

import math

# An answer counts for so much at least, and for more the less what was learned before is still worth.
_GAIN = 0.1
# After so long, or so many requests that went elsewhere, what was learned counts for a third: so a service that was slow, or
# only unlucky, is tried again, and the sooner the less there is to lose.
_STALE_S, _STALE_REQUESTS = 10.0, 100
# How many squared requests on their way the assumption is worth that twice as many take twice as long.
_ASSUMED = 1.0
_LEAST = 0.1
_PRESSURE_GAIN = 0.2
_MOST_PRESSURE = 0.95


class Latency:
    """Seconds until an answer as a line over the number of requests that were on their way: a running regression.

    Where all answers came at the same load the line's slope is not known; then latency is taken to grow in proportion to load.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean_s = self._mean_load = self._variance = self._covariance = 0.0
        self._asked_s, self._turn = -math.inf, 0

    def learn(self, load: int, took_s: float, asked_s: float, turn: int) -> None:
        """An answer came.

        Args:
            load: how many others were on their way when it was asked for.
            took_s: seconds until it was here.
            asked_s, turn: when it was asked for; as which of all requests to anybody.
        """
        gain = max(_GAIN, 1 / (self._count + 1), 1 - self.trust(asked_s, turn))
        self._count += 1
        self._asked_s, self._turn = max(asked_s, self._asked_s), max(turn, self._turn)
        off_load, off_s = load - self._mean_load, took_s - self._mean_s
        self._mean_load += gain * off_load
        self._mean_s += gain * off_s
        self._variance = (1 - gain) * (self._variance + gain * off_load * off_load)
        self._covariance = (1 - gain) * (self._covariance + gain * off_load * off_s)

    def trust(self, now_s: float, turn: int) -> float:
        """How much to believe it for the next request, from 0 to 1."""
        if not self._count:
            return 0.0
        return math.exp(-max(0.0, (now_s - self._asked_s) / _STALE_S, (turn - self._turn) / _STALE_REQUESTS))

    def predict(self, load: int) -> float:
        """Seconds until the answer to a request that is asked beside ``load`` others."""
        usual = self._mean_s / (1 + self._mean_load)
        slope = max(0.0, (self._covariance + _ASSUMED * usual) / (self._variance + _ASSUMED))
        return max(_LEAST * usual, self._mean_s + slope * (load - self._mean_load))


class Pressure:
    """How likely a service refuses: the share of the latest requests, forgotten as fast as its Retry-After asks for."""

    def __init__(self) -> None:
        self._share = 0.0
        self._pause_s = 1.0
        self._at_s = 0.0

    def refused(self, retry_after_s: float, now_s: float) -> None:
        """It refused, and wants to be left alone for so long."""
        self._pause_s = max(0.1, min(60.0, retry_after_s))
        self._move(1.0, now_s)

    def answered(self, now_s: float) -> None:
        """It took a request in."""
        if self._share:
            self._move(0.0, now_s)

    def share(self, now_s: float) -> float:
        """From 0 to nearly 1."""
        return self._share * math.exp(-(now_s - self._at_s) / self._pause_s)

    def costs(self, now_s: float) -> float:
        """How many times a request has to be asked until it is taken in."""
        return 1 / (1 - min(_MOST_PRESSURE, self.share(now_s)))

    def _move(self, towards: float, now_s: float) -> None:
        share = self.share(now_s)
        self._share, self._at_s = share + _PRESSURE_GAIN * (towards - share), now_s
