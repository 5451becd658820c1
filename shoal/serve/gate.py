"""The supervisor's side of the gateway: starting it, keeping one in reserve, noticing that it is gone."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from shoal.errors import DeadlineError
from shoal.process.channel import Channel, ChannelClosed

_MODULE = "shoal.serve.gateway"


class GateProcess:
    """One gateway process; in reserve until ``Open`` is sent to it."""

    def __init__(self) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
               "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
        self._process = subprocess.Popen([sys.executable, "-m", _MODULE, str(right.fileno())], pass_fds=[right.fileno()],
                                         env=env, start_new_session=True, stdin=subprocess.DEVNULL)  # fmt: skip
        right.close()
        self.channel = Channel(left)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        """Send; nothing where it is gone, which ``alive`` will tell."""
        with contextlib.suppress(ChannelClosed):
            self.channel.send(message, fds)

    def received(self) -> list[Any]:
        """The messages that have come since, oldest first. Who does not come to the end of one is killed, as one that hangs."""
        found = []
        try:
            while self.channel.ready():
                found.append(self.channel.receive(5.0, "the rest of a message from the gateway")[0])
        except ChannelClosed:
            pass
        except DeadlineError:
            self.kill()
        return found

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End it and wait for it."""
        self.channel.close()
        self._process.kill()
        self._process.wait()
