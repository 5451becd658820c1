"""Typed messages between our own processes, over a Unix socket pair that nobody else can reach.

A message is a dataclass, pickled by cloudpickle so that it can carry a job with lambdas; a frame is its length and its bytes.
Descriptors (shared memory, sockets) travel beside it.
"""

from __future__ import annotations

import array
import importlib
import io
import select
import socket
import struct
import sys
import time
from types import ModuleType
from typing import Any

import cloudpickle

from shoal.errors import DeadlineError

_HEADER = struct.Struct("!Q")
_MOST_DESCRIPTORS = 8


class ChannelClosed(Exception):
    """The other side is gone."""


class _Pickler(cloudpickle.Pickler):
    """Knows modules of a type of their own: whoever says ``torch`` and ``x.classes`` would else send torch.classes along."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)


def dumps(value: Any) -> bytes:
    """Pickle a value with its functions and classes, as ``cloudpickle.dumps`` does."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class Channel:
    """One end of a socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(True)
        self._received = bytearray()

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(left), cls(right)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        """Send a message, with descriptors; ChannelClosed where nobody is there to read it."""
        data = dumps(message)
        try:
            header = _HEADER.pack(len(data))
            # By one call: whoever reads a header waits only so long for the rest, and we may not run for a while in between.
            whole = [header, data]
            sent = socket.send_fds(self._socket, whole, list(fds)) if fds else self._socket.sendmsg(whole)
            self._socket.sendall(header[sent:])
            self._socket.sendall(memoryview(data)[max(0, sent - len(header)) :])
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self, timeout_s: float | None = None, what: str = "a message") -> tuple[Any, list[int]]:
        """Wait for a message; (message, descriptors). DeadlineError after ``timeout_s``, ChannelClosed at the end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        fds: list[int] = []
        header = self._exactly(_HEADER.size, deadline, what, fds)
        body = self._exactly(_HEADER.unpack(header)[0], deadline, what, fds)
        return cloudpickle.loads(body), fds

    def ready(self, timeout_s: float = 0.0) -> bool:
        """Whether something can be received (or the other side is gone)."""
        return bool(self._received) or bool(select.select([self._socket], [], [], timeout_s)[0])

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int, deadline: float | None, what: str, fds: list[int]) -> bytes:
        while len(self._received) < size:
            if (
                deadline is not None
                and not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]
            ):
                raise DeadlineError(f"Waited too long for {what}.")
            wanted = min(1 << 20, max(size - len(self._received), 1))
            try:
                data, ancillary, _, _ = self._socket.recvmsg(wanted, socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4))
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % 4])
                    fds.extend(received)
            if not data:
                raise ChannelClosed("closed")
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken
