"""Taking in connections, many in a turn of the event loop.

libuv, and so uvloop, accepts one connection a turn: under load, when turns take milliseconds, who connects would wait for
seconds while those who are connected are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable

_A_TURN = 16
# Without a descriptor left, nobody can be taken in until somebody leaves.
_NONE_LEFT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_TRY_AGAIN_S = 0.1


class Accepting:
    """A listening socket whose connections become protocols; has of ``asyncio.Server`` what uvicorn needs to end it."""

    def __init__(
        self, listening: socket.socket, make: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None = None,
        greet_s: float | None = None, leave_s: float | None = None,
    ) -> None:  # fmt: skip
        """``greet_s``, ``leave_s``: how long a TLS handshake, and its goodbye, may take. The socket stays its owner's."""
        listening.setblocking(False)
        self._listening = listening
        self._make = make
        self._options = {"ssl": tls, "ssl_handshake_timeout": greet_s, "ssl_shutdown_timeout": leave_s}
        self._loop = asyncio.get_running_loop()
        self._greeting: set[asyncio.Task[None]] = set()
        self._again: asyncio.TimerHandle | None = None
        self._open = True
        self._watch()

    def close(self) -> None:
        """Take in nobody more, and let go of whoever has not finished a handshake."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._listening)
            if self._again is not None:
                self._again.cancel()
            for task in self._greeting:
                task.cancel()

    async def wait_closed(self) -> None:
        """Return when nobody is being taken in any more."""
        await asyncio.gather(*self._greeting, return_exceptions=True)

    def _watch(self) -> None:
        self._again = None
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(_A_TURN):
            try:
                accepted, _ = self._listening.accept()
            except OSError as error:
                if error.errno in _NONE_LEFT:
                    self._loop.remove_reader(self._listening)
                    self._again = self._loop.call_later(_TRY_AGAIN_S, self._watch)
                    return
                if isinstance(error, BlockingIOError):
                    return
                # Whoever it was has left again.
                continue
            accepted.setblocking(False)
            task = self._loop.create_task(self._take_in(accepted))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _take_in(self, accepted: socket.socket) -> None:
        # What does not speak TLS, or leaves meanwhile, is no news.
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await self._loop.connect_accepted_socket(self._make, accepted, **self._options)  # type: ignore[arg-type]
