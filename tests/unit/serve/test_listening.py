"""Addresses that outlive who answers there."""

from __future__ import annotations

import socket
import sys

import pytest

from shoal.errors import RequestError
from shoal.serve.listening import address_of, check_grpc, hold, listen


def test_a_held_address_can_be_had_again_and_again() -> None:
    with hold("127.0.0.1", 0, "--grpc-port") as held:
        port = held.getsockname()[1]
        for _ in range(2):
            with socket.socket() as server, socket.socket() as client:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                server.bind(("127.0.0.1", port))
                server.listen()
                # What only holds the address takes no connections away.
                client.connect(("127.0.0.1", port))
                with server.accept()[0], pytest.raises(RequestError, match="give another --host or --grpc-port"):
                    hold("127.0.0.1", port, "--grpc-port")


def test_an_address_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"127.0.0.1:{port}"
        for again in (lambda: listen("127.0.0.1", port), lambda: hold("127.0.0.1", port, "--grpc-port")):
            with pytest.raises(RequestError, match="already in use"):
                again()
    with pytest.raises(RequestError, match="--port"):
        listen("not an address", 0)


def test_without_grpcio_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_grpc()
    # As the import system notes a module that is not there.
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(RequestError, match=r"pip install shoal\[grpc\]"):
        check_grpc()
