"""gRPC beside HTTP in the gateway: the same models, desks and guard behind the Open Inference Protocol's service."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from shoal.serve import grpc_calls
from shoal.serve.common import Common
from shoal.serve.credentials import TlsFiles
from shoal.serve.grpc_calls import Context
from shoal.serve.guard import key_of
from shoal.serve.prepare import prepared
from shoal.serve.protocols import proto, v2, v2_grpc
from shoal.serve.refusals import Mishaps, Refusal
from shoal.serve.slots import Outcome

_FOR_EVERYBODY = frozenset({"ServerLive", "ServerReady"})
_LONG_BYTES = 64 << 10
_MOST_TIMEOUT_S = 3600.0

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
        self._server = await grpc_calls.started(self._handlers(), address, tls, self._limits.body_bytes)

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
                self._common.tracing.enter(grpc_calls.encoded(context))
            return await grpc_calls.answered(context, self._mishaps, answer(context))

        async def answer(context: Context) -> bytes:
            if name not in _FOR_EVERYBODY:
                self._admit(context)
            request = grpc_calls.parsed(request_kind, await grpc_calls.one_message(context, self._limits.body_s))
            said = await work(request, context)
            found = said if isinstance(said, response_kind) else response_kind(**said)
            raw: bytes = found.SerializeToString()
            return raw

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
        guard.admit(key, grpc_calls.address_of_peer(context.peer()))

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
        return v2_grpc.encode(desk.signature, request, outputs, outputs.update)

    async def _stream(self, _: Any, context: Context) -> AsyncIterator[bytes]:
        """Requests of a stream are computed together, and answered in the order in which they came."""
        kind, response_kind = self._kinds["ModelStreamInfer"]

        async def answer(raw: bytes) -> bytes:
            said: dict[str, Any] = {}
            try:
                self._admit(context)
                message = grpc_calls.parsed(kind, raw)
                said = v2_grpc.parameters(message.parameters)
                found = response_kind(infer_response=await self._answer(message, time.monotonic(), None))
            except Refusal as refusal:
                found = response_kind(error_message=refusal.sentence)
            except Exception:
                found = response_kind(error_message=self._mishaps.refusal().sentence)
            return grpc_calls.streamed(found, said)

        if self._common.tracing is not None:
            self._common.tracing.enter(grpc_calls.encoded(context))
        try:
            self._admit(context)
        except Refusal as refusal:
            await grpc_calls.abort(context, refusal)
        async with contextlib.aclosing(grpc_calls.in_order(context, answer)) as answers:
            async for answered in answers:
                yield answered

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


async def _works(asked: Awaitable[None]) -> bool:
    try:
        await asked
    except Refusal:
        return False
    return True
