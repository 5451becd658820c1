"""The connection to one service that speaks gRPC; where, it says itself when it is asked whether it is ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from shoal.serve.protocols import proto
from shoal.serve.route.link import Links

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A service that was started again is found at once, and not after minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The route itself asks again, and knows what is pure.
    ("grpc.enable_retries", 0),
)


class GrpcLink:
    """One channel, opened when it is needed."""

    def __init__(self, links: Links, ca: bytes | None, tls: bool) -> None:
        """``links``: the service over HTTP. ``ca``: whom to trust, PEM; None for whom this machine trusts."""
        self._links, self._ca, self._tls = links, ca, tls
        self._channel: grpc.aio.Channel | None = None
        self._port: int | None = None
        self._old: list[grpc.aio.Channel] = []

    @property
    def there(self) -> bool:
        """Whether the service speaks gRPC."""
        return self._links.grpc_port is not None

    def call(self, method: str, raw: bytes, metadata: Sequence[tuple[str, str | bytes]], timeout_s: float | None) -> Any:
        """Begin a call with one message; to be awaited for its answer."""
        asks = self._open().unary_unary(f"/{proto.SERVICE}/{method}")
        return asks(raw, timeout=timeout_s, metadata=tuple(metadata))

    async def close(self) -> None:
        """Let go of it; calls that are under way end."""
        for channel in (*self._old, *([] if self._channel is None else [self._channel])):
            await channel.close()

    def _open(self) -> grpc.aio.Channel:
        if self._channel is not None and self._port != self._links.grpc_port:
            # It was started again elsewhere; what is under way there may still end.
            self._old.append(self._channel)
            self._channel = None
        if self._channel is None:
            self._port = self._links.grpc_port
            host = self._links.address.host
            target = f"{f'[{host}]' if ':' in host else host}:{self._port}"
            if self._tls:
                credentials = grpc.ssl_channel_credentials(self._ca)
                self._channel = grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
            else:
                self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        return self._channel
