"""gRPC through the route: calls pass to services as they are, by the same balance, deadlines, breakers and counts as over HTTP.

Only inferences are looked into, for whose they are and how long their client waits. All that passes is pure, so it may always be
asked of another service; what changes a service is that service's own business.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from shoal.serve import grpc_calls
from shoal.serve.asgi import TIMEOUT_HEADER
from shoal.serve.credentials import TlsFiles
from shoal.serve.grpc_calls import Context
from shoal.serve.protocols import proto, v2_grpc
from shoal.serve.refusals import Mishaps, Refusal
from shoal.serve.route.balance import Ask, Balancer, Ended
from shoal.serve.route.choosing import MOST_TRIES, Late, choose
from shoal.serve.route.grpc_link import GrpcLink
from shoal.serve.route.request import BODY_BYTES, BODY_S
from shoal.serve.route.tally import Ending, Outcome, Tally
from shoal.serve.tracing import Tracing

_PASSED = ("ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer", "RepositoryIndex")
_NOT_OURS = ("RepositoryModelLoad", "RepositoryModelUnload")
# What belongs to one connection, or is said anew.
_OWN_NAMES = frozenset({"user-agent", "te", "content-type", TIMEOUT_HEADER.decode()})
_LONGEST_US = 1 << 40
Metadata = Sequence[tuple[str, "str | bytes"]]


class Failed(Exception):
    """A service's error, to be handed on as it is."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        super().__init__(details)
        self.code, self.details = code, details
        self.trailers = tuple((name, value) for name, value in trailers if _is_passed(name))

    @property
    def retry_after_s(self) -> float | None:
        """What a refusal says of when to come again."""
        said = dict(self.trailers).get("retry-after")
        return float(said) if isinstance(said, str) and said.isdigit() else None

    @property
    def ended(self) -> Ended:
        """What it says of the service."""
        code = self.code.name
        if code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE") and self.retry_after_s is not None:
            return Ended.REFUSED
        if code == "DEADLINE_EXCEEDED":
            return Ended.LATE
        return Ended.FAULT if code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN", "INTERNAL", "DATA_LOSS") else Ended.REJECTED

    @property
    def unheard(self) -> bool:
        """Whether it is the connection that failed, and no answer."""
        return self.code.name in ("UNAVAILABLE", "CANCELLED") and self.ended is Ended.FAULT

    @property
    def outcome(self) -> Outcome:
        """What it makes of the request."""
        return {
            Ended.REFUSED: Outcome.REFUSED, Ended.LATE: Outcome.EXPIRED, Ended.FAULT: Outcome.FAILED,
        }.get(self.ended, Outcome.INVALID)  # fmt: skip


@dataclass(eq=False)
class _Call:
    """A call on its way to a service. ``cut``: the service is not there any more."""

    index: int
    call: Any
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One message for a service. ``timed``: its client has said how long it waits."""

    method: str
    raw: bytes
    metadata: Metadata
    ask: Ask
    timed: bool
    deadline_s: float


class GrpcFront:
    """The service that a route's clients see. ``start`` listens, ``stop`` lets what is under way come to its end."""

    def __init__(
        self, balancer: Balancer, links: Sequence[GrpcLink], tally: Tally, timeout_s: float, affinity_header: str,
        tracing: Tracing | None = None,
    ) -> None:  # fmt: skip
        """``timeout_s``: the deadline of a request that brings none; ``affinity_header``: which metadata has a request's key."""
        self._balancer, self._links, self._tally = balancer, links, tally
        self._timeout_s = timeout_s
        self._affinity = affinity_header.lower()
        self._tracing = tracing
        self._mishaps = Mishaps()
        self._kinds = proto.methods()
        self._calls: set[_Call] = set()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str, tls: TlsFiles | None) -> None:
        """Listen. OSError where the address cannot be had."""
        handlers: dict[str, Any] = {name: grpc.stream_unary_rpc_method_handler(self._passed(name)) for name in _PASSED}
        handlers |= {name: grpc.stream_unary_rpc_method_handler(self._answered(name)) for name in ("ServerLive", "ServerReady")}
        handlers |= {name: grpc.stream_unary_rpc_method_handler(_refused) for name in _NOT_OURS}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        self._server = await grpc_calls.started(handlers, address, tls, BODY_BYTES)

    async def stop(self, within_s: float) -> None:
        """Take no more calls, and end those that are under way after so many seconds."""
        if self._server is not None:
            await self._server.stop(within_s)
        for link in self._links:
            await link.close()

    def down(self, index: int) -> None:
        """A service does not answer health checks: whoever waits for it asks somebody else."""
        for each in self._calls:
            if each.index == index:
                each.cut = True
                each.call.cancel()

    # -- calls ---------------------------------------------------------------------------------------------------

    def _answered(self, name: str) -> Callable[[Any, Context], Any]:
        """What is asked of the route itself."""
        _, kind = self._kinds[name]

        async def call(_: Any, context: Context) -> bytes:
            ready = not self._tally.draining and self._balancer.any_ready(time.monotonic(), self._without())
            raw: bytes = kind(**({"live": True} if name == "ServerLive" else {"ready": ready})).SerializeToString()
            return raw

        return call

    def _passed(self, name: str) -> Callable[[Any, Context], Any]:
        async def call(_: Any, context: Context) -> bytes:
            return await grpc_calls.answered(context, self._mishaps, answer(context))

        async def answer(context: Context) -> bytes:
            try:
                with self._tally.request() as ending:
                    raw = await grpc_calls.one_message(context, BODY_S)
                    return await self._pass(name, raw, context, context.time_remaining(), ending)
            except Failed as failed:
                await context.abort(failed.code, failed.details, failed.trailers)
            raise AssertionError("an aborted call goes no further")

        return call

    async def _stream(self, _: Any, context: Context) -> AsyncIterator[bytes]:
        """Requests of a stream are requests of their own, to whichever service; answers come in their order."""
        kind, response_kind = self._kinds["ModelStreamInfer"]
        _, answer_kind = self._kinds["ModelInfer"]

        async def answer(raw: bytes) -> bytes:
            said: dict[str, Any] = {}
            try:
                with self._tally.request() as ending:
                    said = v2_grpc.parameters(grpc_calls.parsed(kind, raw).parameters)
                    found = response_kind(
                        infer_response=answer_kind.FromString(await self._pass("ModelInfer", raw, context, None, ending))
                    )
            except Failed as failed:
                found = response_kind(error_message=failed.details)
            except Refusal as refusal:
                found = response_kind(error_message=refusal.sentence)
            except Exception:
                found = response_kind(error_message=self._mishaps.refusal().sentence)
            return grpc_calls.streamed(found, said)

        async with contextlib.aclosing(grpc_calls.in_order(context, answer)) as answers:
            async for answered in answers:
                yield answered

    # -- one request ---------------------------------------------------------------------------------------------

    async def _pass(self, method: str, raw: bytes, context: Context, remaining_s: float | None, ending: Ending) -> bytes:
        """Have a service answer; Failed with its own error, Refusal where none has answered."""
        self._tally.take_in()
        asked = self._read(method, raw, context, remaining_s)
        ending.deadline_s = asked.deadline_s
        self._balancer.count_request()
        named = f"route {asked.ask.model}".rstrip()
        tracing = self._tracing
        spanned: contextlib.AbstractContextManager[list[tuple[bytes, bytes]]] = contextlib.nullcontext([])
        if tracing is not None:
            spanned = tracing.forwarded(grpc_calls.encoded(context), named)
        try:
            with self._tally.holding(len(raw)), spanned as extra:
                answer = await self._try(asked, [(name.decode(), value.decode("latin-1")) for name, value in extra])
        except Failed as failed:
            ending.outcome = failed.outcome
            raise
        except Late:
            raise Refusal(504, "The deadline passed before a service had answered.") from None
        ending.outcome = Outcome.ANSWERED
        return answer

    def _read(self, method: str, raw: bytes, context: Context, remaining_s: float | None) -> Asked:
        """What a request is. ``remaining_s``: how long its client waits, None where nobody knows."""
        metadata = [(name, value) for name, value in context.invocation_metadata() or () if _is_passed(name)]
        found, model = [] if remaining_s is None else [remaining_s], ""
        if method == "ModelInfer":
            request = grpc_calls.parsed(self._kinds[method][0], raw)
            # Named as over HTTP: what was learned of one holds for the other.
            model = request.model_name + (f"/versions/{request.model_version}" if request.model_version else "")
            given = v2_grpc.parameters({"timeout": request.parameters["timeout"]} if "timeout" in request.parameters else {})
            if type(given.get("timeout")) is int and 0 < given["timeout"] < _LONGEST_US:
                found.append(given["timeout"] / 1e6)
        affinity = next((value for name, value in metadata if name == self._affinity and isinstance(value, str)), None)
        within_s = min([self._timeout_s, *found])
        return Asked(
            method=method, raw=raw, metadata=metadata, ask=Ask(model=model, size=len(raw), affinity=affinity),
            timed=bool(found), deadline_s=time.monotonic() + within_s,
        )  # fmt: skip

    async def _try(self, asked: Asked, extra: Metadata) -> bytes:
        """Ask services until one has answered. Raises what ended it where none did."""
        tried: set[int] = set()
        best: Failed | None = None
        for _ in range(MOST_TRIES):
            index = await choose(
                self._balancer, asked.ask, tried, asked.deadline_s, content=best is not None, without=self._without
            )
            if index is None:
                break
            ended, retry_after_s = Ended.DROPPED, 1.0
            number = self._balancer.begin(index, asked.ask, time.monotonic())
            try:
                answer = await self._ask(index, asked, extra)
                ended = Ended.ANSWERED
                return answer
            except Failed as failed:
                ended, retry_after_s = failed.ended, failed.retry_after_s or 1.0
                if not self._ask_again(asked.ask, index, tried, failed):
                    raise
                # Of two answers that are none, the one that says when to come again says more.
                if not failed.unheard and (best is None or ended is Ended.REFUSED):
                    best = failed
                tried.add(index)
            except Late:
                ended = Ended.LATE
                raise
            finally:
                self._balancer.end(index, number, asked.ask, ended, time.monotonic(), retry_after_s)
                self._tally.metrics.asked(self._balancer.upstreams[index].name, ended.value)
        if best is not None:
            raise best
        raise Refusal(502, "The services that were asked did not answer.")

    def _ask_again(self, ask: Ask, index: int, tried: set[int], failed: Failed) -> bool:
        """Whether another service may have a better answer than this one's."""
        if failed.unheard:
            return True
        now = time.monotonic()
        lacking = failed.code.name == "NOT_FOUND" and bool(ask.model)
        if lacking:
            self._balancer.lacks(index, ask.model, now)
        elif failed.ended is not Ended.REFUSED:
            return False
        if self._balancer.choose(ask, now, {*tried, index}, self._without()) is None:
            return False
        return lacking or self._balancer.may_ask_again(failed.ended)

    async def _ask(self, index: int, asked: Asked, extra: Metadata) -> bytes:
        """Ask one service; Failed with its error, Late where the time is over."""
        left_s = asked.deadline_s - time.monotonic()
        if left_s <= 0:
            raise Late
        replaced = {name for name, _ in extra}
        metadata = [pair for pair in asked.metadata if pair[0] not in replaced] + list(extra)
        # Who has not said how long it waits gets the service's own deadline.
        call = self._links[index].call(asked.method, asked.raw, metadata, left_s if asked.timed else None)
        each = _Call(index, call)
        self._calls.add(each)
        try:
            raw: bytes = await asyncio.wait_for(call, left_s)
            return raw
        except (asyncio.TimeoutError, TimeoutError):
            raise Late from None
        except asyncio.CancelledError:
            if each.cut:
                raise Failed(grpc.StatusCode.UNAVAILABLE, "The service that was asked did not answer.", ()) from None
            raise
        except grpc.aio.AioRpcError as error:
            raise Failed(error.code(), error.details() or "", tuple(error.trailing_metadata() or ())) from None
        finally:
            self._calls.discard(each)
            call.cancel()

    def _without(self) -> list[int]:
        """Who does not speak gRPC."""
        return [index for index, link in enumerate(self._links) if not link.there]


async def _refused(_: Any, context: Context) -> bytes:
    await grpc_calls.abort(context, Refusal(403, "This is between you and each service; ask the services themselves."))
    raise AssertionError("an aborted call goes no further")


def _is_passed(name: str) -> bool:
    return name == "grpc-status-details-bin" or not (name.startswith(("grpc-", ":")) or name in _OWN_NAMES)
