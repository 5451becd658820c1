"""Who is let in: API keys, and how many requests each may send. Knows nothing of HTTP: a key and an address come in."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.serve.refusals import Refusal

_MOST_BUCKETS = 10_000


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask.

    Attributes:
        keys: (name, SHA-256 of the key) of each; none: everybody may.
        rate_limit: requests a second for each key, or where there are no keys for each address; None: any number.
    """

    keys: tuple[tuple[str, bytes], ...] = ()
    rate_limit: float | None = None

    @property
    def open(self) -> bool:
        """Whether everything is let in."""
        return not self.keys and self.rate_limit is None


class Guard:
    """Looks at each request before anything else does."""

    def __init__(
        self, access: Access, clock: Callable[[], float] = time.monotonic, turned: Callable[[str], None] = lambda why: None
    ) -> None:
        """``turned`` is told, with a word for why, of each request that may not come in."""
        self._access = access
        self._turned = turned
        self._buckets = self._strangers = None
        if access.rate_limit is not None:
            # Of their own: whoever tries keys must not push those who have one out of the table.
            self._buckets, self._strangers = Buckets(access.rate_limit, clock), Buckets(access.rate_limit, clock)

    def admit(self, key: bytes | None, address: str | None) -> str:
        """Return who asks; Refusal (401, 429) where that one may not, or not now.

        Where keys are wanted, those who send a wrong one or none use up what their address may ask.

        Args:
            key: what the client sent as its key, None where it sent none.
            address: its IP address, None where nobody knows.
        """
        if self._access.keys:
            who = self._owner(key)
            if who is None:
                self._take(self._strangers, network_of(address))
                self._turned("key")
                raise Refusal(401, "This service wants an API key, as in Authorization: Bearer KEY or X-Api-Key: KEY.")
        else:
            who = network_of(address)
        self._take(self._buckets, who)
        return who

    def _take(self, buckets: Buckets | None, who: str) -> None:
        later_s = 0.0 if buckets is None else buckets.take(who)
        if later_s > 0:
            self._turned("rate")
            raise Refusal(429, f"More than {self._access.rate_limit:g} requests a second; wait a little.", later_s)

    def _owner(self, key: bytes | None) -> str | None:
        """Whose key it is. All are compared, in the same time each, so that the time says nothing about any of them."""
        digest = hashlib.sha256(key or b"").digest()
        found = None
        for name, known in self._access.keys:
            if hmac.compare_digest(digest, known):
                found = name
        return found if key else None


class Bodies:
    """The long bodies that are being received or answered, of all clients and protocols. ``bytes``: of all of them together."""

    def __init__(self, most_bytes: int, turned: Callable[[str], None] = lambda why: None) -> None:
        self.bytes = 0
        self._most_bytes = most_bytes
        self._turned = turned

    def check(self) -> None:
        """Refusal where they are too many."""
        if self.bytes > self._most_bytes:
            self._turned("bodies")
            raise Refusal(503, "Too many long bodies are being sent at once; try again.", 1.0)

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count a body while it waits for what is done to it outside the event loop; Refusal where they are too many."""
        self.bytes += size
        try:
            self.check()
            yield
        finally:
            self.bytes -= size


class Buckets:
    """A token bucket for each name: ``rate`` tokens a second come in, and as many as come in one second fit (at least one).

    The table is bounded: who has not asked for the longest time is forgotten, and begins with a full bucket.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic, most: int = _MOST_BUCKETS) -> None:
        self._rate, self._size = rate, max(1.0, rate)
        self._clock, self._most = clock, most
        # Name -> (tokens, when that was so).
        self._table: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._table)

    def take(self, name: str) -> float:
        """Take a token and return 0, or return after how many seconds there will be one."""
        now = self._clock()
        tokens, since = self._table.pop(name, (self._size, now))
        tokens = min(self._size, tokens + (now - since) * self._rate)
        later_s = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._table[name] = (tokens if later_s else tokens - 1, now)
        if len(self._table) > self._most:
            self._table.popitem(last=False)
        return later_s


def key_of(authorization: bytes, x_api_key: bytes | None) -> bytes | None:
    """The key in what a client sent as Authorization: Bearer KEY, or as X-Api-Key; None where there is none."""
    scheme, _, token = authorization.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else x_api_key


def network_of(address: str | None) -> str:
    """Who counts as one client: an IPv4 address, or an IPv6 network of 64 bits, which is what one subscriber has."""
    try:
        found = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((int(found), 64), strict=False))
    return str(found)


def retry_after(seconds: float) -> int:
    """What Retry-After says: whole seconds, at least 1, never too few."""
    return max(1, math.ceil(seconds))


def is_loopback(host: str) -> bool:
    """Whether only this machine itself reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
