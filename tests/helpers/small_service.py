"""A tiny real HTTP server that speaks just enough of the Open Inference Protocol, in a thread of its own.

Its model ``double`` answers each float with twice it. What it does instead is said by ``script``: a list of replies for the next
requests to infer, each a function from the request to the bytes of a response (or None: hang up).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Request:
    """What arrived: method, path, headers in lower case, body."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def header(self) -> dict[str, Any]:
        """The JSON part of an inference request."""
        return json.loads(self.body[: int(self.headers.get("inference-header-content-length", len(self.body)))])


Reply = Callable[[Request], "bytes | None"]

METADATA = {
    "name": "double", "versions": ["1"], "platform": "test",
    "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}],
}  # fmt: skip


def respond(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return the bytes of a response; header names with underscores."""
    lines = [f"HTTP/1.1 {status} Said", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def say(status: int, value: Any, **headers: str) -> bytes:
    """Return a response of JSON."""
    return respond(status, json.dumps(value).encode(), **headers)


def refuse(status: int, sentence: str, **headers: str) -> Reply:
    """Return a reply that is an error of the protocol."""
    return lambda _: say(status, {"error": sentence}, **headers)


def double(request: Request) -> bytes:
    """Answer as the model does, in binary or JSON as the request came."""
    length = request.headers.get("inference-header-content-length")
    (given,) = request.header["inputs"]
    if length is None:
        values = np.asarray(given["data"], np.float32).reshape(given["shape"])
    else:
        values = np.frombuffer(request.body[int(length) :], np.float32).reshape(given["shape"])
    output: dict[str, Any] = {"name": "output", "datatype": "FP32", "shape": list(values.shape)}
    raw = (values * 2).tobytes()
    if length is None:
        return say(200, {"model_name": "double", "outputs": [{**output, "data": (values * 2).ravel().tolist()}]})
    header = json.dumps({"outputs": [{**output, "parameters": {"binary_data_size": len(raw)}}]}).encode()
    return respond(200, header + raw, inference_header_content_length=str(len(header)))


@dataclass
class Service:
    """The server: where it is, what it was asked, and what it is to answer."""

    port: int = 0
    models: dict[str, dict[str, Any]] = field(default_factory=lambda: {"double": METADATA})
    requests: list[Request] = field(default_factory=list)
    script: deque[Reply] = field(default_factory=deque)
    otherwise: Reply = double
    connections: int = 0
    ready: bool = True
    hangs_up: bool = False

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def inferences(self) -> list[Request]:
        """The requests to infer."""
        return [request for request in self.requests if request.path.endswith("/infer")]

    def answer(self, request: Request) -> bytes | None:
        """Return the response to a request."""
        self.requests.append(request)
        if request.path.endswith("/infer"):
            return (self.script.popleft() if self.script else self.otherwise)(request)
        if request.path.endswith("/ready"):
            return respond(200 if self.ready else 503)
        if request.path == "/v2/repository/index":
            return say(200, [{"name": name} for name in self.models])
        found = self.models.get(request.path.removeprefix("/v2/models/"))
        return say(200, found) if found else say(404, {"error": "There is no such model here."})


async def _talk(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    service.connections += 1
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            method, path, _ = first.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            response = service.answer(Request(method, path, headers, body))
            if response is None:
                break
            writer.write(response)
            await writer.drain()
            if service.hangs_up:
                break
    writer.close()


@contextlib.contextmanager
def serving() -> Iterator[Service]:
    """Serve until the end of the block."""
    service, loop, up = Service(), asyncio.new_event_loop(), threading.Event()

    async def begin() -> asyncio.Server:
        server = await asyncio.start_server(lambda r, w: _talk(service, r, w), "127.0.0.1", 0)
        service.port = server.sockets[0].getsockname()[1]
        return server

    def run() -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(begin())
        up.set()
        loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    up.wait()
    try:
        yield service
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
