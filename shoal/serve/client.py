"""A client of a service: ``shoal.Client(url)``, in plain calls and for asyncio, with deadlines and retries.

What happens in a call (deadline, retries, errors) is written once, as a generator that asks for things to be sent and for
pauses; the two ways of calling differ only in who does them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import ssl
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from shoal.errors import DeadlineError, JobFailed, RequestError
from shoal.serve import wire
from shoal.serve.credentials import client_context

_T = TypeVar("_T")
_FIRST_PAUSE_S = 0.05
_READ_BYTES = 1 << 18
_IDLE_KEPT = 64
_TRY_AGAIN = (429, 503)


class ServiceError(JobFailed):
    """A service did not give the answer that was asked for.

    Attributes:
        status: the HTTP status; 0 where no answer came.
        sentence: what the service said, or what went wrong on the way.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


class ServiceTimeoutError(ServiceError, DeadlineError):
    """The deadline passed: the service said so (504), or no answer came in time (0)."""


class ServiceUnreachableError(ServiceError):
    """Nothing was sent, because nobody answers at the address (status 0)."""


@dataclass(frozen=True)
class _Send:
    request: bytes
    within_s: float


@dataclass(frozen=True)
class _Pause:
    seconds: float


class _NotSent(Exception):
    """The connection could not be made, so that trying again is safe."""


_Steps = Generator["_Send | _Pause", Any, _T]


class Client:
    """Asks a service that speaks the Open Inference Protocol v2 (shoal serve, Triton, …). Threads may share one.

    Every call exists twice: ``infer`` waits, ``infer_async`` is awaited. Connections are kept between calls; ``close`` (or
    ``with``) lets go of them.

    Tried again, at most ``retries`` times and only where the deadline leaves room for it: a connection that could not be
    made, and a request that the service did not take in (429, 503), after as long as its ``Retry-After`` says. A request
    that was sent and got no answer is not sent a second time.

    Args:
        url: as ``shoal serve`` prints it, such as http://127.0.0.1:8000.
        timeout_s: how long a call may take where it does not say so itself.
        retries: see above; 0 tries once.
        api_key: what the service wants to let this client in.
        ca_file: for https: trust whom this PEM file vouches for, such as a certificate that signed itself; None for whom
            this machine trusts.

    Raises:
        RequestError: the url is none, or the file cannot be read.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 30.0, retries: int = 3, api_key: str | None = None,
        ca_file: str | Path | None = None,
    ) -> None:  # fmt: skip
        self._address = wire.parse_url(url, api_key)
        self._tls = client_context(ca_file) if self._address.tls else None
        self._timeout_s = timeout_s
        self._retries = retries
        self._models: dict[str, dict[str, Any]] = {}
        self._idle: list[socket.socket] = []
        self._idle_async: list[tuple[asyncio.AbstractEventLoop, asyncio.StreamReader, asyncio.StreamWriter]] = []

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._address.url

    # -- what can be asked ---------------------------------------------------------------------------------------

    def infer(
        self, inputs: Mapping[str, Any] | Any, model: str | None = None, *, timeout_s: float | None = None, priority: int = 0
    ) -> dict[str, np.ndarray]:
        """Return a model's outputs by name.

        Args:
            inputs: arrays by name, each [rows, ...]; or one array for a model with one input.
            model: may be left out where the service has one.
            timeout_s: seconds until the answer has to be here. The service is told, and refuses at once what it cannot
                do in that time. Left out: the service's own limit holds, and this call waits as long as the client does.
            priority: 1 is the most urgent, greater numbers wait for smaller; 0 leaves it to the service.

        Returns:
            NumPy arrays [rows, ...]; BF16 comes as float32.

        Raises:
            ServiceTimeoutError: the deadline passed.
            ServiceUnreachableError: nobody answers at the address.
            ServiceError: the service refused (429, 503), did not like the request (4xx), or failed (5xx).
            RequestError: the inputs or the model's name make no sense.
        """
        return self._do(self._infer(inputs, model, timeout_s, priority))

    async def infer_async(
        self, inputs: Mapping[str, Any] | Any, model: str | None = None, *, timeout_s: float | None = None, priority: int = 0
    ) -> dict[str, np.ndarray]:
        """``infer``, awaited."""
        return await self._do_async(self._infer(inputs, model, timeout_s, priority))

    def metadata(self, model: str | None = None) -> dict[str, Any]:
        """Return a model's name, versions, inputs and outputs (name, datatype, shape), as the protocol has them."""
        return self._do(self._metadata(model, self._timeout_s))

    async def metadata_async(self, model: str | None = None) -> dict[str, Any]:
        """``metadata``, awaited."""
        return await self._do_async(self._metadata(model, self._timeout_s))

    def models(self) -> list[str]:
        """Return the names of the models that the service has."""
        return self._do(self._names(self._timeout_s))

    async def models_async(self) -> list[str]:
        """``models``, awaited."""
        return await self._do_async(self._names(self._timeout_s))

    def ready(self, model: str | None = None) -> bool:
        """Whether the service (or one model of it) can answer right now; False too where nobody listens."""
        return self._do(self._ready(model))

    async def ready_async(self, model: str | None = None) -> bool:
        """``ready``, awaited."""
        return await self._do_async(self._ready(model))

    def close(self) -> None:
        """Let go of all connections; the client can still be used."""
        while self._idle:
            self._idle.pop().close()
        while self._idle_async:
            loop, _, writer = self._idle_async.pop()
            if not loop.is_closed():
                writer.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writers = [writer for _, _, writer in self._idle_async]
        self.close()
        for writer in writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    # -- what a call does ----------------------------------------------------------------------------------------

    def _infer(self, inputs: Any, model: str | None, timeout_s: float | None, priority: int) -> _Steps[dict[str, np.ndarray]]:
        if timeout_s is not None and not timeout_s > 0:
            raise RequestError(f"timeout_s is {timeout_s}; give a number of seconds above 0.")
        until = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        metadata = yield from self._metadata(model, until - time.monotonic())
        wanted = {entry["name"]: entry.get("datatype") for entry in metadata.get("inputs", ())}
        name = str(metadata["name"])
        if not isinstance(inputs, Mapping):
            if len(wanted) != 1:
                raise RequestError(f"{name} has the inputs {', '.join(wanted)}; give a dict of arrays by these names.")
            inputs = {next(iter(wanted)): inputs}
        tensors = [(key, *wire.as_sent(value, wanted.get(key))) for key, value in inputs.items()]

        def request(left_s: float) -> bytes:
            # The protocol has no unit for it; Triton reads microseconds.
            parameters: dict[str, Any] = {} if timeout_s is None else {"timeout": max(1, int(left_s * 1e6))}
            if priority:
                parameters["priority"] = priority
            body, headers = wire.encode_infer(tensors, parameters)
            return wire.render(self._address, "POST", wire.model_path(name, "infer"), body, headers)

        response = yield from self._ask(request, until - time.monotonic())
        try:
            return wire.decode_infer(response)
        except wire.BadResponse as error:
            raise ServiceError(response.status, f"{self.url} is no service of this protocol: {error}.") from error

    def _metadata(self, model: str | None, within_s: float) -> _Steps[dict[str, Any]]:
        if model is None:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            names = yield from self._names(within_s)
            if len(names) != 1:
                raise RequestError(f"{self.url} serves {', '.join(names) or 'no model'}; name one with model=.")
            model = names[0]
        known = self._models.get(model)
        if known is None:
            path = wire.model_path(model)
            response = yield from self._ask(lambda _: wire.render(self._address, "GET", path), within_s)
            known = self._read(response, dict)
            if "name" not in known:
                raise ServiceError(response.status, f"{self.url} says nothing about its model; is it a service of this protocol?")
            self._models[model] = known
        return known

    def _names(self, within_s: float) -> _Steps[list[str]]:
        request = wire.render(self._address, "POST", "/v2/repository/index", b"{}", {"Content-Type": "application/json"})
        response = yield from self._ask(lambda _: request, within_s)
        return [str(entry["name"]) for entry in self._read(response, list)]

    def _ready(self, model: str | None) -> _Steps[bool]:
        path = "/v2/health/ready" if model is None else wire.model_path(model, "ready")
        try:
            response = yield _Send(wire.render(self._address, "GET", path), self._timeout_s)
        except (_NotSent, ServiceError):
            return False
        return bool(response.status == 200)

    def _read(self, response: wire.Response, kind: type[_T]) -> _T:
        try:
            found = json.loads(response.body)
        except ValueError:
            found = None
        if not isinstance(found, kind):
            raise ServiceError(response.status, f"{self.url} answers, but not as a service of this protocol does.")
        return found

    def _ask(self, request: Callable[[float], bytes], within_s: float) -> _Steps[wire.Response]:
        """Send ``request(seconds left)`` until there is an answer that counts."""
        deadline, tries = time.monotonic() + within_s, 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _too_late(self.url, within_s)
            pause = _FIRST_PAUSE_S * 2**tries
            try:
                response = yield _Send(request(left), left)
            except _NotSent as error:
                sentence = f"Nobody answers at {self.url} ({error}); is the service running, and is this its address?"
                failure: ServiceError = ServiceUnreachableError(0, sentence)
            else:
                if response.status < 300:
                    return response
                sentence = wire.sentence_of(response.body, response.status)
                if response.status not in _TRY_AGAIN:
                    raise (ServiceTimeoutError if response.status == 504 else ServiceError)(response.status, sentence)
                failure = ServiceError(response.status, sentence)
                pause = _seconds(response.header("retry-after"), pause)
            tries += 1
            if tries > self._retries or time.monotonic() + pause >= deadline:
                raise failure
            yield _Pause(pause)

    # -- who does it: this thread --------------------------------------------------------------------------------

    def _do(self, steps: _Steps[_T]) -> _T:
        try:
            step = next(steps)
            while True:
                try:
                    done: Any = None
                    if isinstance(step, _Pause):
                        time.sleep(step.seconds)
                    else:
                        done = self._send(step)
                except (_NotSent, ServiceError) as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(done)
        except StopIteration as end:
            answer: _T = end.value
            return answer

    def _send(self, step: _Send) -> wire.Response:
        deadline = time.monotonic() + step.within_s
        connection = self._connect(step.within_s)
        response, kept = wire.Response(), False
        try:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
            connection.sendall(step.request)
            while True:
                connection.settimeout(max(1e-3, deadline - time.monotonic()))
                data = connection.recv(_READ_BYTES)
                if response.feed(data) if data else response.end():
                    kept = response.keep_alive and bool(data) and len(self._idle) < _IDLE_KEPT
                    return response
                if not data:
                    raise ServiceError(0, f"{self.url} closed the connection without an answer; it may be tried again.")
                if time.monotonic() >= deadline:
                    raise _too_late(self.url, step.within_s)
        except TimeoutError:
            raise _too_late(self.url, step.within_s) from None
        except (OSError, wire.BadResponse) as error:
            raise ServiceError(0, _broken(self.url, error)) from error
        finally:
            if kept:
                self._idle.append(connection)
            else:
                connection.close()

    def _connect(self, within_s: float) -> socket.socket:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            # Readable before anything was asked: the service has closed it meanwhile.
            look = select.poll()
            look.register(connection, select.POLLIN)
            if not look.poll(0):
                return connection
            connection.close()
        try:
            connection = socket.create_connection((self._address.host, self._address.port), timeout=within_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                return connection
            try:
                return self._tls.wrap_socket(connection, server_hostname=self._address.host)
            except OSError:
                connection.close()
                raise
        except OSError as error:
            raise _NotSent(_reason(error)) from None

    # -- or an event loop ----------------------------------------------------------------------------------------

    async def _do_async(self, steps: _Steps[_T]) -> _T:
        try:
            step = next(steps)
            while True:
                try:
                    done: Any = None
                    if isinstance(step, _Pause):
                        await asyncio.sleep(step.seconds)
                    else:
                        done = await self._send_async(step)
                except (_NotSent, ServiceError) as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(done)
        except StopIteration as end:
            answer: _T = end.value
            return answer

    async def _send_async(self, step: _Send) -> wire.Response:
        try:
            return await asyncio.wait_for(self._exchange(step.request), step.within_s)
        except (asyncio.TimeoutError, TimeoutError):  # two classes before Python 3.11
            raise _too_late(self.url, step.within_s) from None
        except (OSError, wire.BadResponse) as error:
            raise ServiceError(0, _broken(self.url, error)) from error

    async def _exchange(self, request: bytes) -> wire.Response:
        reader, writer = await self._connect_async()
        response, kept = wire.Response(), False
        try:
            writer.write(request)
            await writer.drain()
            while True:
                data = await reader.read(_READ_BYTES)
                if response.feed(data) if data else response.end():
                    kept = response.keep_alive and bool(data) and len(self._idle_async) < _IDLE_KEPT
                    return response
                if not data:
                    raise ServiceError(0, f"{self.url} closed the connection without an answer; it may be tried again.")
        finally:
            if kept:
                self._idle_async.append((asyncio.get_running_loop(), reader, writer))
            else:
                writer.close()

    async def _connect_async(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        here = asyncio.get_running_loop()
        for index in range(len(self._idle_async) - 1, -1, -1):
            loop, reader, writer = self._idle_async[index]
            if loop is here or loop.is_closed():
                del self._idle_async[index]
                if loop is here:
                    if not reader.at_eof() and not writer.is_closing():
                        return reader, writer
                    writer.close()
        try:
            host, port = self._address.host, self._address.port
            return await asyncio.open_connection(host, port, limit=_READ_BYTES, ssl=self._tls)
        except OSError as error:
            raise _NotSent(_reason(error)) from None


def _too_late(url: str, within_s: float) -> ServiceTimeoutError:
    return ServiceTimeoutError(0, f"{url} did not answer within {within_s:.3g} s; give it more time or less to do.")


def _broken(url: str, error: Exception) -> str:
    if isinstance(error, wire.BadResponse):
        return f"{url} is no service of this protocol: {error}."
    return f"The connection to {url} broke before the answer was here ({_reason(error)})."


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        what = getattr(error, "verify_message", None) or (error.reason or "no tls").replace("_", " ")
        return f"tls: {what}".lower()
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower().rstrip(".")


def _seconds(text: str | None, otherwise: float) -> float:
    """Seconds of a Retry-After header; a date, or nothing, is ``otherwise``."""
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return otherwise
