"""Where a process of a run can be spoken to: a socket that lets in only those who have the run's keys.

CURVE (RFC 26/CurveZMQ): everything is encrypted, and who does not know a key of this run gets no answer at all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from shoal.errors import RequestError
from shoal.ps.complaints import Complaints
from shoal.ps.keys import Doorkeeper, Pair

logger = logging.getLogger(__name__)

_MOST_FRAME_BYTES = 8 << 30
_MOST_QUEUED = 1024


@dataclass(frozen=True)
class RunKeys:
    """The keys of one run: of whoever is spoken to, and of whoever speaks. They go from process to process by hand."""

    server: Pair
    member: Pair

    @classmethod
    def new(cls) -> RunKeys:
        return cls(Pair.new(), Pair.new())

    def dealer(self, context: zmq.Context[zmq.Socket[bytes]], queued: int) -> zmq.Socket[bytes]:
        """A socket to speak to an endpoint with; ``queued``: so many messages may wait in it, 0 for any number."""
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = queued
        socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 500
        self.member.speak_by(socket, self.server.public)
        return socket


class Endpoint:
    """A bound socket; one thread uses it.

    Attributes:
        address: where it can be reached.
        complain: a message was none: drop it, and say so in the log.
    """

    def __init__(self, keys: RunKeys, address: str = "tcp://127.0.0.1:*") -> None:
        """Bind. RequestError where the address cannot be had."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._door = Doorkeeper(self._context, {keys.member.public})
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = _MOST_QUEUED
        self._socket.maxmsgsize = _MOST_FRAME_BYTES
        keys.server.listen_by(self._socket)
        self._poller = zmq.Poller()
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise RequestError(f"{address} cannot be listened at ({error.strerror}); choose another port.") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._complaints = Complaints(logger)
        self.complain = self._complaints.add
        self._attended: dict[Any, Callable[[], None]] = {self._door.socket: self._door.attend}
        for socket in (self._socket, self._door.socket):
            self._poller.register(socket, zmq.POLLIN)

    def attend(self, socket: Any, callback: Callable[[], None]) -> None:
        """Call back, from ``receive``, whenever another socket or descriptor has something to read."""
        self._attended[socket] = callback
        self._poller.register(socket, zmq.POLLIN)

    def forget(self, socket: Any) -> None:
        """Look at another socket no longer."""
        self._attended.pop(socket, None)
        self._poller.unregister(socket)

    def receive(self, timeout_s: float) -> list[tuple[bytes, list[memoryview]]]:
        """What has come, within ``timeout_s``: from whom, and the frames."""
        found: list[tuple[bytes, list[memoryview]]] = []
        for socket, _ in self._poller.poll(max(0, round(timeout_s * 1000))):
            if socket is not self._socket:
                # One that was looked at may have been forgotten by the one before it.
                self._attended.get(socket, lambda: None)()
                continue
            while len(found) < _MOST_QUEUED:
                try:
                    identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                found.append((bytes(identity.buffer), [frame.buffer for frame in frames]))
        return found

    def send(self, identity: bytes, head: bytes, frames: Sequence[Any] = ()) -> None:
        """Answer somebody. Who has gone, or takes nothing off its queue, gets nothing: it asks again."""
        self._socket.send_multipart([identity, head, *frames])

    @property
    def dropped(self) -> int:
        """How many messages were none."""
        return self._complaints.dropped

    @property
    def refused(self) -> int:
        """How often somebody without a key has tried to come in."""
        return self._door.refused

    def close(self) -> None:
        self._socket.close()
        self._door.close()
        self._context.term()


class Serving(threading.Thread):
    """Runs something that serves in a thread of its own, until it is left."""

    def __init__(self, serve: Callable[[Callable[[], bool]], None], name: str) -> None:
        """``serve`` is called with a function that says when to end."""
        super().__init__(name=name, daemon=True)
        self._serve = serve
        self._over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._serve(self._over.is_set)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Serving:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
