"""What a service and a route have in common as gRPC servers: how they listen, how a call is read, streamed and refused.

Every method is read by hand, also those with one request: so keys are looked at before a body is received, a body has its time,
and what cannot be understood is an error like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from shoal.serve.credentials import TlsFiles
from shoal.serve.protocols import proto, v2_grpc
from shoal.serve.refusals import Mishaps, Refusal

_MOST_CALLS = 4096
# Requests of a stream that are worked on at once; more are read when these are answered.
_AHEAD = 64
_OPTIONS = (
    ("grpc.so_reuseport", 1),
    ("grpc.max_metadata_size", 32 << 10),
    ("grpc.absolute_max_metadata_size", 32 << 10),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 75_000),
    ("grpc.max_concurrent_streams", 1024),
    # As over HTTP: a body is what it is, for what a compressed one becomes nobody knows before.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)

Context = Any


async def started(
    handlers: Mapping[str, Any], address: str, tls: TlsFiles | None, body_bytes: int
) -> grpc.aio.Server:
    """A server that listens. ``handlers``: of the service's methods, by name. OSError where the address cannot be had."""
    options = [*_OPTIONS, ("grpc.max_receive_message_length", body_bytes), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=_MOST_CALLS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(proto.SERVICE, dict(handlers)),))
    try:
        if tls is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, grpc.ssl_server_credentials([(tls.key, tls.certificate)]))
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {address}: {error}") from None
    await server.start()
    return server


async def one_message(context: Context, within_s: float) -> bytes:
    """The one message of a call, in its time; Refusal where it does not come."""
    try:
        message = await asyncio.wait_for(context.read(), within_s)
    except (asyncio.TimeoutError, TimeoutError):
        raise Refusal(408, f"The request did not arrive within {within_s:g} s.") from None
    if message is grpc.aio.EOF:
        raise Refusal(400, "The call has no request.")
    raw: bytes = message
    return raw


def parsed(kind: Any, raw: bytes) -> Any:
    """A message of a kind; Refusal where it is none."""
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise Refusal(400, "The request is not the message that this method takes.") from None


async def in_order(context: Context, answer: Callable[[bytes], Awaitable[bytes]]) -> AsyncGenerator[bytes, None]:
    """Answers to the messages of a stream, which are worked on together, in the order in which they came."""
    asked: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_AHEAD)

    async def work(raw: bytes) -> bytes:
        return await answer(raw)

    async def take() -> None:
        try:
            while (raw := await context.read()) is not grpc.aio.EOF:
                task = asyncio.get_running_loop().create_task(work(raw))
                try:
                    await asked.put(task)
                except asyncio.CancelledError:
                    task.cancel()
                    raise
        finally:
            await asked.put(None)

    taking = asyncio.get_running_loop().create_task(take())
    try:
        while (task := await asked.get()) is not None:
            try:
                yield await task
            finally:
                task.cancel()
    finally:
        taking.cancel()
        while not asked.empty():
            if (left := asked.get_nowait()) is not None:
                left.cancel()


async def answered(context: Context, mishaps: Mishaps, work: Awaitable[bytes]) -> bytes:
    """The answer to a call; where there is none, the call ends with an error."""
    try:
        return await work
    except Refusal as refusal:
        await abort(context, refusal)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        await abort(context, mishaps.refusal())
    raise AssertionError("an aborted call goes no further")


def streamed(response: Any, parameters: Mapping[str, Any]) -> bytes:
    """A message of a stream of answers. ``parameters``: of the request that it answers."""
    if parameters.get("triton_enable_empty_final_response"):
        response.infer_response.parameters["triton_final_response"].bool_param = True
    raw: bytes = response.SerializeToString()
    return raw


async def abort(context: Context, refusal: Refusal) -> None:
    """End a call with an error; does not return."""
    await context.abort(grpc.StatusCode[v2_grpc.CODES[refusal.status]], refusal.sentence, v2_grpc.trailers(refusal))


def encoded(context: Context) -> list[tuple[bytes, bytes]]:
    """A call's metadata that is text, as HTTP has its headers."""
    pairs = context.invocation_metadata() or ()
    return [(name.encode(), value.encode("latin-1", "replace")) for name, value in pairs if isinstance(value, str)]


def address_of_peer(peer: str) -> str | None:
    """The IP address in what gRPC calls a peer, such as ipv4:127.0.0.1:4711 or ipv6:%5B::1%5D:4711."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else None
