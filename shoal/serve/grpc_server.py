"""gRPC beside HTTP in the gateway: the same models, desks and guard behind the Open Inference Protocol's service.

Every method is read by hand, also those with one request: so keys are looked at before a body is received, a body has its time,
and what cannot be understood is an error like any other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from shoal.serve.common import Common
from shoal.serve.credentials import TlsFiles
from shoal.serve.guard import key_of
from shoal.serve.prepare import prepared
from shoal.serve.protocols import proto, v2, v2_grpc
from shoal.serve.refusals import Mishaps, Refusal
from shoal.serve.slots import Outcome

_FOR_EVERYBODY = frozenset({"ServerLive", "ServerReady"})
_MOST_CALLS = 4096
_LONG_BYTES = 64 << 10
# Requests of a stream that are computed at once; more are read when these are answered.
_AHEAD = 64
_MOST_TIMEOUT_S = 3600.0
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
Work = Callable[[Any, Context], Awaitable[Any]]


class GrpcServer:
    """The service. ``start`` listens, ``stop`` lets what is under way come to its end."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._catalogue, self._limits = common.catalogue, common.limits
        self._mishaps = Mishaps()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str, tls: TlsFiles | None) -> None:
        """Listen. OSError where the address cannot be had."""
        options = [*_OPTIONS, ("grpc.max_receive_message_length", self._limits.body_bytes),
                   ("grpc.max_send_message_length", -1)]  # fmt: skip
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=_MOST_CALLS)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(proto.SERVICE, self._handlers()),))
        try:
            if tls is None:
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, grpc.ssl_server_credentials([(tls.key, tls.certificate)]))
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}: {error}") from None
        await server.start()
        self._server = server

    async def stop(self, within_s: float) -> None:
        """Take no more calls, and end those that are under way after so many seconds."""
        if self._server is not None:
            await self._server.stop(within_s)

    def _handlers(self) -> dict[str, Any]:
        works: dict[str, Work] = {
            "ServerLive": self._live, "ServerReady": self._ready, "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready, "ModelMetadata": self._model_metadata, "ModelConfig": self._model_config,
            "ModelStatistics": self._statistics, "ModelInfer": self._infer, "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load, "RepositoryModelUnload": self._unload,
        }  # fmt: skip
        self._kinds = proto.methods()
        handlers = {name: grpc.stream_unary_rpc_method_handler(self._called(name, work)) for name, work in works.items()}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        return handlers

    # -- one call ------------------------------------------------------------------------------------------------

    def _called(self, name: str, work: Work) -> Callable[[Any, Context], Awaitable[bytes]]:
        request_kind, response_kind = self._kinds[name]

        async def call(_: Any, context: Context) -> bytes:
            if self._common.tracing is not None:
                self._common.tracing.enter(_encoded(context))
            try:
                if name not in _FOR_EVERYBODY:
                    self._admit(context)
                request = _parsed(request_kind, await self._read(context))
                answer = await work(request, context)
                found = answer if isinstance(answer, response_kind) else response_kind(**answer)
                raw: bytes = found.SerializeToString()
                return raw
            except Refusal as refusal:
                await _abort(context, refusal)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception:
                await _abort(context, self._mishaps.refusal())
            raise AssertionError("an aborted call goes no further")

        return call

    def _admit(self, context: Context) -> None:
        guard = self._common.guard
        if guard is None:
            return
        said: dict[str, str] = {}
        for name, value in context.invocation_metadata() or ():
            if name in ("authorization", "x-api-key"):
                if name in said:
                    raise Refusal(400, f"The header {name} is there twice.")
                said[name] = value
        key = key_of(said.get("authorization", "").encode(), said.get("x-api-key", "").encode() or None)
        guard.admit(key, _address(context.peer()))

    async def _read(self, context: Context) -> bytes:
        """The one message of a call, in its time."""
        try:
            message = await asyncio.wait_for(context.read(), self._limits.body_s)
        except asyncio.TimeoutError:
            raise Refusal(408, f"The request did not arrive within {self._limits.body_s:g} s.") from None
        if message is grpc.aio.EOF:
            raise Refusal(400, "The call has no request.")
        raw: bytes = message
        return raw

    # -- inference -----------------------------------------------------------------------------------------------

    async def _infer(self, message: Any, context: Context) -> Any:
        seen_s = time.monotonic()
        remaining_s = context.time_remaining()
        return await self._answer(message, seen_s, remaining_s)

    async def _answer(self, message: Any, seen_s: float, remaining_s: float | None) -> Any:
        """Compute one request; ``remaining_s``: how long its client waits, None where nobody knows."""
        common, desk = self._common, None
        arrived_s = common.pace.arrive(seen_s)
        until_s = None if remaining_s is None else seen_s + min(remaining_s, _MOST_TIMEOUT_S) - arrived_s
        try:
            desk = self._catalogue.desk(message.model_name, message.model_version or None)
            timed = "timeout" in message.parameters
            deadline_s = arrived_s + (self._limits.slo_s if until_s is None else until_s)
            if not timed and (common.pace.behind(seen_s) or desk.hopeless(deadline_s, seen_s)):
                raise desk.refused(arrived_s)
            request = v2_grpc.decode(desk.signature, message, desk.max_rows)
            if until_s is not None:
                request = request.within(until_s)
            if request.encoded:
                with common.bodies.holding(message.ByteSize()):
                    request = await prepared(desk, request)
        except Refusal as refusal:
            if desk is not None and refusal.status < 429:
                desk.slots.count(Outcome.INVALID)
            elif desk is None:
                common.metrics.turned_away("nothing")
            raise
        size = message.ByteSize()
        held = size if size > _LONG_BYTES else 0
        common.bodies.bytes += held
        try:
            common.bodies.check()
            outputs = await self._catalogue.infer(desk, request, self._limits.slo_s, arrived_s=arrived_s)
        finally:
            common.bodies.bytes -= held
        return v2_grpc.encode(desk.signature, request, outputs)

    async def _stream(self, _: Any, context: Context) -> AsyncIterator[bytes]:
        """Requests of a stream are computed together, and answered in the order in which they came."""
        kind, response_kind = self._kinds["ModelStreamInfer"]
        asked: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(_AHEAD)

        async def answer(raw: bytes) -> Any:
            said: dict[str, Any] = {}
            try:
                self._admit(context)
                message = _parsed(kind, raw)
                said = v2_grpc.parameters(message.parameters)
                found = response_kind(infer_response=await self._answer(message, time.monotonic(), None))
            except Refusal as refusal:
                found = response_kind(error_message=refusal.sentence)
            except Exception:
                found = response_kind(error_message=self._mishaps.refusal().sentence)
            if said.get("triton_enable_empty_final_response"):
                found.infer_response.parameters["triton_final_response"].bool_param = True
            return found.SerializeToString()

        async def take() -> None:
            try:
                while (raw := await context.read()) is not grpc.aio.EOF:
                    task = asyncio.get_running_loop().create_task(answer(raw))
                    try:
                        await asked.put(task)
                    except asyncio.CancelledError:
                        task.cancel()
                        raise
            finally:
                await asked.put(None)

        if self._common.tracing is not None:
            self._common.tracing.enter(_encoded(context))
        try:
            self._admit(context)
        except Refusal as refusal:
            await _abort(context, refusal)
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

    # -- the rest ------------------------------------------------------------------------------------------------

    async def _live(self, message: Any, context: Context) -> dict[str, Any]:
        return {"live": True}

    async def _ready(self, message: Any, context: Context) -> dict[str, Any]:
        return {"ready": await _works(self._catalogue.ready([s.active for s in self._catalogue.shelves.values()]))}

    async def _server_metadata(self, message: Any, context: Context) -> dict[str, Any]:
        return v2.server_metadata()

    async def _model_ready(self, message: Any, context: Context) -> dict[str, Any]:
        async def ready() -> None:
            await self._catalogue.ready([self._catalogue.desk(message.name, message.version or None)])

        return {"ready": await _works(ready())}

    async def _model_metadata(self, message: Any, context: Context) -> dict[str, Any]:
        return v2_grpc.metadata(self._catalogue.desk(message.name, message.version or None).signature)

    async def _model_config(self, message: Any, context: Context) -> dict[str, Any]:
        desk = self._catalogue.desk(message.name, message.version or None)
        return {"config": v2_grpc.config(desk.signature, desk.max_rows)}

    async def _statistics(self, message: Any, context: Context) -> dict[str, Any]:
        names = list(self._catalogue.shelves)
        if message.name:
            self._catalogue.desk(message.name, message.version or None)
            names = [message.name]
        found = self._catalogue.statistics(names, message.version or None)
        return {"model_stats": [{key: value for key, value in one.items() if key != "shoal"} for one in found]}

    async def _index(self, message: Any, context: Context) -> dict[str, Any]:
        return {"models": [row for row in self._catalogue.index() if row["state"] == "READY" or not message.ready]}

    async def _load(self, message: Any, context: Context) -> dict[str, Any]:
        await self._catalogue.change(message.model_name, True, v2_grpc.numbers(v2_grpc.parameters(message.parameters)))
        return {}

    async def _unload(self, message: Any, context: Context) -> dict[str, Any]:
        await self._catalogue.change(message.model_name, False, v2_grpc.parameters(message.parameters))
        return {}


def _parsed(kind: Any, raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise Refusal(400, "The request is not the message that this method takes.") from None


async def _works(asked: Awaitable[None]) -> bool:
    try:
        await asked
    except Refusal:
        return False
    return True


async def _abort(context: Context, refusal: Refusal) -> None:
    await context.abort(grpc.StatusCode[v2_grpc.CODES[refusal.status]], refusal.sentence, v2_grpc.trailers(refusal))


def _encoded(context: Context) -> list[tuple[bytes, bytes]]:
    """A call's metadata that is text, as HTTP has its headers."""
    pairs = context.invocation_metadata() or ()
    return [(name.encode(), value.encode("latin-1", "replace")) for name, value in pairs if isinstance(value, str)]


def _address(peer: str) -> str | None:
    """The IP address in what gRPC calls a peer, such as ipv4:127.0.0.1:4711 or ipv6:%5B::1%5D:4711."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else None
