"""``shoal route`` over three real services: one slowed, one that hangs, one killed; a ledger of every request is kept here."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundles
import dashboard
import numpy as np
import psutil
import pytest
import torch

from shoal import bundle

_CLIENTS = 6
_WAIT_S = 60.0


class _Command:
    """A ``shoal`` command that says where it is; ``twice``: started again, by a shell, where it dies."""

    def __init__(self, *arguments: str, twice: bool = False) -> None:
        command = [sys.executable, "-m", "shoal", *arguments]
        shell = ["sh", "-c", '"$@"; exec "$@"', "sh"] if twice else []
        self.process = subprocess.Popen([*shell, *command], stdout=subprocess.PIPE, text=True)
        self.url, self.port, self._in_shell = "", 0, twice

    def started(self) -> _Command:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        here = psutil.Process(self.process.pid)
        children = here.children(recursive=True)
        for process in children if self._in_shell else [here, *children]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        """Kill all of its processes; where it is started again, ``started`` waits for that."""
        self.signal(signal.SIGKILL)
        self._in_shell = False

    def end(self) -> int:
        if self._in_shell:
            self.process.kill()
            self.kill()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


class _SlowProxy:
    """TCP in between, in a thread of its own; ``delay_s`` is how late each piece towards the client comes."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.port = 0
        self._to = port
        self._loop = asyncio.new_event_loop()
        up = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._talk, "127.0.0.1", 0))
            self.port = server.sockets[0].getsockname()[1]
            up.set()
            self._loop.run_forever()
            server.close()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        up.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            return writer.close()
        await asyncio.gather(self._pipe(reader, back, lambda: 0.0), self._pipe(there, writer, lambda: self.delay_s))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: Callable[[], float]) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(delay())
                writer.write(data)
                await writer.drain()
        writer.close()


class _Ledger:
    """Clients that ask all the time. Every request's number goes in as the row and has to come back as its answer, once."""

    def __init__(self, port: int, model: torch.nn.Module) -> None:
        self._port, self._model = port, model
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.asked = 0
        self.answers: dict[int, list[Any]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_CLIENTS)
        self._work = [self._pool.submit(self._ask) for _ in range(_CLIENTS)]

    @staticmethod
    def row(number: int) -> np.ndarray:
        return (np.arange(12) * 17 + np.array([number % 251, number // 251 % 251] * 6)).astype(np.uint8).reshape(1, 3, 4) % 250

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_WAIT_S)
        while not self._stop.is_set():
            with self._lock:
                number = self.asked = self.asked + 1
                self.answers[number] = []
            tensor = {"name": "input", "datatype": "UINT8", "shape": [1, 3, 4], "data": self.row(number).ravel().tolist()}
            body = {"id": str(number), "inputs": [tensor], "parameters": {"timeout": 20_000_000}}
            connection.request("POST", "/v2/models/odd/infer", json.dumps(body))
            answer = connection.getresponse()
            self.answers[number].append((answer.status, json.loads(answer.read())))
        connection.close()

    def close(self) -> None:
        self._stop.set()
        for work in self._work:
            work.result(_WAIT_S)
        self._pool.shutdown()

    def check(self) -> None:
        """Each request has one answer, the right one."""
        numbers = sorted(self.answers)
        assert all(len(self.answers[number]) == 1 for number in numbers)
        found = [self.answers[number][0] for number in numbers]
        assert {status for status, _ in found} == {200}
        assert [said["id"] for _, said in found] == [str(number) for number in numbers]
        with torch.no_grad():
            wanted = self._model(torch.from_numpy(np.concatenate([self.row(number) for number in numbers]))).numpy()
        np.testing.assert_allclose([said["outputs"][0]["data"] for _, said in found], wanted, rtol=1e-5, atol=1e-5)


def _free_port() -> int:
    """One to come back to: below those that the kernel hands out, so that nobody gets it by chance while nobody listens."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


class _World:
    """The services, the route, and what its statistics say."""

    def __init__(self, directory: Path) -> None:
        self.odd = bundles.odd(directory / "bundle")
        port = _free_port()
        options = ["serve", str(self.odd), "--replicas", "1", "--slo-ms", "20000"]
        self.services = [_Command(*options), _Command(*options), _Command(*options, "--port", str(port), twice=True)]
        for service in self.services:
            service.started()
        # Two of them behind the same kind of proxy, so that only the delay makes a difference.
        self.proxies = [_SlowProxy(service.port) for service in self.services[:2]]
        self.urls = [*(f"http://127.0.0.1:{proxy.port}" for proxy in self.proxies), self.services[2].url]
        self.route = _Command("route", *self.urls).started()

    def numbers(self, route: _Command | None = None) -> dict[str, Any]:
        status, body = get((route or self.route).port, "/route")
        assert status == 200
        found: dict[str, Any] = json.loads(body)
        return found

    def shares(self, requests: int) -> list[int]:
        """What each service answers of the next so many."""
        before = self.numbers()
        after = until(self.numbers, lambda now: now["answered"] >= before["answered"] + requests)
        return [b["answered"] - a["answered"] for a, b in zip(before["services"], after["services"], strict=True)]

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()
        for command in (self.route, *self.services):
            command.end()


def get(port: int, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_S)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def until(ask: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
    give_up = time.monotonic() + _WAIT_S
    while not enough(found := ask()):
        assert time.monotonic() < give_up, found
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_World]:
    made = _World(tmp_path_factory.mktemp("route"))
    yield made
    made.close()


def test_no_request_is_lost_and_shares_shift(world: _World) -> None:
    before = world.numbers()
    ledger = _Ledger(world.route.port, bundle.load(world.odd))
    try:
        # A busy machine may fool the route for a while: what counts is where shares come to.
        assert until(lambda: world.shares(100), lambda shares: shares[0] > 0.3 * shares[1])
        world.proxies[0].delay_s = 0.2
        assert until(lambda: world.shares(100), lambda shares: shares[0] < min(0.3 * shares[1], 0.1 * shares[2]))

        hanging = world.services[1]
        hanging.signal(signal.SIGSTOP)
        until(world.numbers, lambda now: not now["services"][1]["ready"])
        assert world.shares(100)[1] == 0
        hanging.signal(signal.SIGCONT)
        until(world.numbers, lambda now: now["services"][1]["ready"])
        assert until(lambda: world.shares(50), lambda shares: shares[1] > 5)

        world.services[2].kill()
        assert until(lambda: world.shares(50), lambda shares: shares[2] == 0)
        world.services[2].started()
        assert until(lambda: world.shares(50), lambda shares: shares[2] > 5)
    finally:
        ledger.close()
        world.proxies[0].delay_s = 0.0
    ledger.check()
    now = until(world.numbers, lambda now: not now["open"])
    new = {name: now[name] - before[name] for name in ("accepted", "answered")}
    assert new["accepted"] == new["answered"] == ledger.asked and now["open"] == 0


def test_what_passes_through_is_what_the_service_said(world: _World) -> None:
    direct, through = world.services[1].port, world.route.port
    tensor = {"name": "input", "datatype": "UINT8", "shape": [1, 3, 4], "parameters": {"binary_data_size": 12}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    binary = {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"}
    for path, headers, body in (
        ("/v2", {}, None), ("/v2/models/odd", {}, None), ("/v2/models/even", {}, None), ("/v2/repository/index", {}, b"{}"),
        ("/v2/models/odd/infer", binary, header + bytes(12)), ("/v2/models/odd/infer", {}, b'{"inputs": 1}'),
        ("/v2/models/odd/infer", {"X-Shoal-Timeout-Ms": "soon"}, b"{}"), ("/v1/embeddings", {}, b"{}"),
    ):  # fmt: skip
        assert get(through, path, headers, body) == get(direct, path, headers, body), path
    for path, body in (("/processes", None), ("/v2/repository/models/odd/unload", b"{}")):
        assert get(through, path, body=body)[0] == 403
    connection = http.client.HTTPConnection("127.0.0.1", through, timeout=_WAIT_S)
    connection.request("HEAD", "/v2")
    assert connection.getresponse().status == 405
    connection.close()
    # Longer than what is read before a service is chosen, and in chunks: it is passed on as it comes.
    long = json.dumps({"inputs": [{"name": "input", "datatype": "UINT8", "shape": [1, 3, 4],
                                   "data": list(range(12))}], "id": " " * 50}).encode() + b" " * 60_000  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", through, timeout=_WAIT_S)
    connection.request("POST", "/v2/models/odd/infer", iter([long[:7], long[7:]]), encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


def test_deadlines_go_with_a_request_and_metrics_say_what_became_of_it(world: _World) -> None:
    before = world.numbers()
    slow = np.full((1, 3, 4), 253).tolist()
    body = {"inputs": [{"name": "input", "datatype": "UINT8", "shape": [1, 3, 4], "data": slow}]}
    status, said = get(world.route.port, "/v2/models/odd/infer", {"X-Shoal-Timeout-Ms": "100"}, json.dumps(body).encode())
    assert status in (429, 504), said
    now = until(world.numbers, lambda now: not now["open"])
    assert now["expired"] + now["refused"] == before["expired"] + before["refused"] + 1

    def metrics() -> dict[str, str]:
        _, page = get(world.route.port, "/metrics")
        assert dashboard.metrics("shoal_route_") <= dashboard.exported(page.decode()) and dashboard.metrics("shoal_route_")
        return dict(line.rsplit(" ", 1) for line in page.decode().splitlines() if not line.startswith("#"))

    # A busy machine may keep a service from answering a health check in time.
    lines = until(metrics, lambda lines: lines[f'shoal_route_ready{{service="{world.services[2].url}"}}'] == "1.0")
    assert float(lines['shoal_route_requests_total{outcome="answered"}']) == now["answered"]


def test_sigterm_finishes_what_was_accepted(world: _World) -> None:
    route = _Command("route", *world.urls).started()
    slow = np.full((1, 3, 4), 253).tolist()
    body = json.dumps({"inputs": [{"name": "input", "datatype": "UINT8", "shape": [1, 3, 4], "data": slow}]}).encode()
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            work = pool.submit(get, route.port, "/v2/models/odd/infer", None, body)
            until(lambda: world.numbers(route), lambda now: now["accepted"] > 0)
            os.kill(route.process.pid, signal.SIGTERM)
            assert work.result(_WAIT_S)[0] == 200
    finally:
        assert route.end() == 0


def test_whoever_has_read_the_first_line_may_end_it_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        route = _Command("route", f"http://127.0.0.1:{silent.getsockname()[1]}").started()
        os.kill(route.process.pid, signal.SIGTERM)
        assert route.process.wait(_WAIT_S) == 0
    route.end()
