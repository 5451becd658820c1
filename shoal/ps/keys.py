"""Who may read a run: CURVE keys made for it (RFC 26/CurveZMQ), kept in a file that only its owner can read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shoal.errors import RequestError, TargetError

if TYPE_CHECKING:
    import zmq

READ_KEY = "read.key"
"""The file in a run's directory that lets somebody subscribe to it."""


@dataclass(frozen=True)
class Pair:
    """A CURVE key pair, in Z85 text."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> Pair:
        import zmq

        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    def listen_by(self, socket: zmq.Socket[bytes]) -> None:
        """Let a socket be one that others connect to, known to them by this pair's public key."""
        socket.curve_server = True
        socket.curve_secretkey, socket.curve_publickey = self.secret.encode(), self.public.encode()

    def speak_by(self, socket: zmq.Socket[bytes], server: str) -> None:
        """Let a socket speak to whoever has the public key ``server``, as the one who has this pair."""
        socket.curve_serverkey = server.encode()
        socket.curve_secretkey, socket.curve_publickey = self.secret.encode(), self.public.encode()


class ReadKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a reader needs: the address, the publisher's public key, and a key pair of its own."""

    address: str
    publisher: str
    public: str
    secret: str

    def write(self, directory: Path) -> None:
        """Put the key into a run's directory, readable by its owner alone. OSError where that fails."""
        scratch = directory / f".{READ_KEY}.{os.getpid()}"
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(self) + b"\n")
        scratch.replace(directory / READ_KEY)

    @classmethod
    def read(cls, path: Path) -> ReadKey:
        """Read a key file, or the one in a run's directory.

        Raises:
            TargetError: there is none. RequestError: the file is no key.
        """
        path = path / READ_KEY if path.is_dir() else path
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError:
            raise TargetError(
                f"There is no key at {path}; give the directory of a run in training under a parameter server (ps=…), or its "
                f"{READ_KEY}."
            ) from None
        except msgspec.DecodeError as error:
            raise RequestError(f"{path} is not a read key ({error}); take the one that the run wrote.") from None


class Doorkeeper:
    """Answers ZeroMQ's question who may connect (ZAP, RFC 27): those whose public key is known."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: set[str]) -> None:
        import zmq
        from zmq.utils import z85

        self._allowed = {z85.decode(key) for key in allowed}
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self.refused = 0

    def attend(self) -> None:
        """Answer one question."""
        import zmq

        try:
            # Whoever dies while it is asked about takes the question away again: to wait for it would be to wait for ever.
            version, request, _domain, _address, _identity, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        known = mechanism == b"CURVE" and bool(credentials) and credentials[0] in self._allowed
        self.refused += not known
        status = (b"200", b"OK") if known else (b"400", b"unknown key")
        self.socket.send_multipart([version, request, *status, b"", b""])

    def close(self) -> None:
        self.socket.close()
