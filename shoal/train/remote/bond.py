"""What binds the processes of one worker together: none of them outlives another.

Each partner holds a connection to its head. Whichever of them ends, by whatever, the kernel closes it, and those at its other
ends know at once, also where they wait in an exchange that nobody would end: they go as well. Whoever has started them sees that
and starts all of them anew. Only when the run is over they part: a partner says so before it leaves, and the head waits for that.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

from shoal.errors import DeadlineError

LOST = 75
"""The exit code of a process that goes because another one of its worker has gone, or has not come."""
TOKEN_BYTES = 16
_PLACE_BYTES = _PORT_BYTES = 2
_HELLO_S = 5.0
_PART_S = 30.0
_FAREWELL = b"."
# A machine that is switched off closes nothing.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class Bond:
    """One process's end: of a partner to its head, or of a head to all its partners."""

    def __init__(self, others: Sequence[socket.socket]) -> None:
        self._others = list(others)
        self._over = False
        _bonds.add(self)
        self._parted = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="shoal-bond", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for other in self._others:
                selector.register(other, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._is_farewell(key.fd) and not self._over:
                        os._exit(LOST)
                    selector.unregister(key.fileobj)
        self._parted.set()

    @staticmethod
    def _is_farewell(fd: int) -> bool:
        try:
            return os.read(fd, 1) == _FAREWELL
        except OSError:
            return False

    def let_go(self) -> None:
        """Close what this process holds of the connections, and say nothing."""
        for other in self._others:
            other.close()

    def await_loss(self, seconds: float) -> None:
        """After an error: where it has come because another process has gone, this one goes within so long, and says nothing."""
        self._thread.join(seconds)

    def say_farewell(self) -> None:
        """A partner has nothing more to do."""
        self._over = True
        for other in self._others:
            with contextlib.suppress(OSError):
                other.sendall(_FAREWELL)

    def await_farewells(self) -> None:
        """The head has told its partners that there is nothing more to do: wait until they know."""
        if not self._parted.wait(_PART_S):
            raise DeadlineError(f"A process of a worker has not heard within {_PART_S:.0f} s that the run is over.")
        self._over = True


# What is to be done after a fork cannot be taken back, so it is said once, for all there will be.
_bonds: weakref.WeakSet[Bond] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """The user's code may fork (a loader of data does): such a child would keep a connection open whose process has ended."""
    for one in _bonds:
        one.let_go()


os.register_at_fork(after_in_child=_let_go_in_child)


def listen(host: str) -> socket.socket:
    """A head's socket, to which its partners come; ``host``: "127.0.0.1", or "0.0.0.0" where they may be elsewhere."""
    listener = socket.create_server((host, 0), backlog=16)
    listener.settimeout(1.0)
    return listener


def gather(listener: socket.socket, token: bytes, partners: int, deadline_s: float) -> dict[int, socket.socket]:
    """Let in those who know the token; by the place that each says. DeadlineError where not all come."""
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + deadline_s
    while len(found) < partners:
        if time.monotonic() > deadline:
            raise DeadlineError(f"Only {len(found)} of {partners} further processes of a worker came within {deadline_s:.0f} s.")
        with contextlib.suppress(TimeoutError):
            other, _ = listener.accept()
            said = _read(other, TOKEN_BYTES + _PLACE_BYTES, _HELLO_S)
            place = int.from_bytes(said[TOKEN_BYTES:], "big")
            if not hmac.compare_digest(said[:TOKEN_BYTES], token) or place in found or not 0 < place <= partners:
                other.close()
                continue
            found[place] = _kept_alive(other)
    return found


def tell_port(partners: Mapping[int, socket.socket], port: int) -> None:
    """Tell partners where they meet their head."""
    for other in partners.values():
        other.sendall(port.to_bytes(_PORT_BYTES, "big"))


def come(address: str, token: bytes, place: int, deadline_s: float) -> tuple[socket.socket, str, int]:
    """A partner's way to its head: the connection, and the host and the port at which they meet."""
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    try:
        head = socket.create_connection((host, int(port)), timeout=deadline_s)
        head.sendall(token + place.to_bytes(_PLACE_BYTES, "big"))
        said = _read(head, _PORT_BYTES, deadline_s)
    except OSError as error:
        raise DeadlineError(f"A process of a worker did not reach its first one at {address} ({error}).") from None
    if len(said) < _PORT_BYTES:
        # It has died since.
        os._exit(LOST)
    return _kept_alive(head), host, int.from_bytes(said, "big")


def _read(other: socket.socket, size: int, seconds: float) -> bytes:
    """What somebody says, up to so many bytes; less where it says no more."""
    other.settimeout(seconds)
    said = b""
    with contextlib.suppress(OSError):
        while len(said) < size and (more := other.recv(size - len(said))):
            said += more
    return said


def _kept_alive(other: socket.socket) -> socket.socket:
    other.settimeout(None)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            other.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return other
