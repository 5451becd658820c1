"""The addresses at which a service answers. They are the supervisor's, so they outlive whoever answers there."""

from __future__ import annotations

import importlib.util
import socket

from shoal.errors import RequestError

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one. RequestError where it cannot be had."""
    listening = _bound(host, port, "--port")
    listening.listen(_BACKLOG)
    return listening


def hold(host: str, port: int, option: str) -> socket.socket:
    """Keep an address for processes that listen there themselves, with SO_REUSEPORT; port 0 takes a free one.

    Nothing is accepted by the socket that is returned: as long as it is open, whoever comes next can bind the same address.
    RequestError, naming ``option``, where it cannot be had.
    """
    # With SO_REUSEPORT one address can be had twice, and requests would go to whoever is luckier: so look without it first.
    probe = _bound(host, port, option)
    found = probe.getsockname()
    probe.close()
    return _bound(str(found[0]), int(found[1]), option, shared=True)


def address_of(sock: socket.socket) -> str:
    """host:port, an IPv6 host in brackets."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_grpc() -> None:
    """RequestError where gRPC's library is not there."""
    try:
        found = all(importlib.util.find_spec(name) for name in ("grpc", "google.protobuf"))
    except ModuleNotFoundError:
        found = False
    if not found:
        raise RequestError('gRPC needs grpcio; install it with "pip install shoal[grpc]", or leave --grpc-port out.')


def _bound(host: str, port: int, option: str, shared: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except (OSError, UnicodeError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or "not an address"
        raise RequestError(f"Cannot listen on {host}:{port} ({reason}); give another --host or {option}.") from None
    return sock
