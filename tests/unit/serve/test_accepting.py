"""Taking in connections over real sockets."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import uvloop

from shoal.serve.accepting import Accepting


class _Greeter(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        transport.write(b"hello")
        transport.close()


class _NoneLeft:
    """A listening socket for which there is now and then no descriptor left, and whose clients leave again."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real
        self.errors = [OSError(errno.EMFILE, "none left"), ConnectionAbortedError(errno.ECONNABORTED, "left")]

    def accept(self) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return self.real.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


async def _all_are_greeted(listening: Any, clients: int) -> None:
    accepting = Accepting(listening, _Greeter)
    try:
        opened = await asyncio.gather(*(asyncio.open_connection(*listening.getsockname()) for _ in range(clients)))
        for reader, writer in opened:
            assert await reader.read() == b"hello"
            writer.close()
    finally:
        accepting.close()
        accepting.close()
        await accepting.wait_closed()
    # Whoever comes now waits for the next who accepts there.
    _, writer = await asyncio.open_connection(*listening.getsockname())
    writer.close()


def test_many_are_taken_in_and_nobody_after_the_end() -> None:
    for run in (asyncio.run, uvloop.run):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            run(asyncio.wait_for(_all_are_greeted(listening, 50), 60))


def test_it_goes_on_where_there_was_no_descriptor_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        flaky = _NoneLeft(listening)
        asyncio.run(asyncio.wait_for(_all_are_greeted(flaky, 3), 60))
        assert not flaky.errors
