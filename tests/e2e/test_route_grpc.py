"""gRPC through ``shoal route``, by tritonclient[grpc] unchanged, to two real services with keys."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch

import shoal
from shoal import bundle

triton = pytest.importorskip("tritonclient.grpc")
Error = pytest.importorskip("tritonclient.utils").InferenceServerException

_WAIT_S = 60.0
_KEY = "0123456789abcdef0123"
_HEADERS = {"x-api-key": _KEY}
_OUTCOMES = ("answered", "failed", "invalid", "expired", "refused", "cancelled")


class _World:
    """Two services, of which one has a second model, and the route."""

    def __init__(self, place: Path) -> None:
        self.odd = bundles.odd(place / "odd")
        keys = place / "keys"
        keys.write_text(f"{_KEY}\n")
        keys.chmod(0o600)
        options: dict[str, Any] = {"slo_ms": 1e3 * _WAIT_S, "replicas": 1, "grpc_port": 0, "api_key_file": keys}
        two = bundles.two(place / "two")
        self.services = [shoal.serve(self.odd, f"pair={two}", **options), shoal.serve(self.odd, **options)]
        command = [sys.executable, "-m", "shoal", "route", *(service.url for service in self.services), "--grpc-port", "0"]
        self.route = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.route.stdout is not None
        said = json.loads(self.route.stdout.readline())
        self.url, self.grpc_url = said["url"], said["grpc_url"]

    def numbers(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/route", timeout=_WAIT_S) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def close(self) -> None:
        self.route.send_signal(signal.SIGTERM)
        assert self.route.wait(_WAIT_S) == 0
        assert self.route.stdout is not None
        self.route.stdout.close()
        for service in self.services:
            service.close()


def _until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_World]:
    made = _World(tmp_path_factory.mktemp("route"))
    yield made
    made.close()


@pytest.fixture
def client(world: _World) -> Iterator[Any]:
    with triton.InferenceServerClient(world.grpc_url) as found:
        _until(lambda: found.is_server_ready() and all(one["grpc_port"] for one in world.numbers()["services"]))
        yield found


def _input(first: int = 7, name: str = "input") -> Any:
    rows = np.random.default_rng(0).integers(0, 250, (1, 3, 4), dtype=np.uint8)
    rows[0, 0, 0] = first
    found = triton.InferInput(name, rows.shape, "UINT8")
    found.set_data_from_numpy(rows)
    return found, rows


def _infer(client: Any, **more: Any) -> Any:
    return client.infer("odd", [_input()[0]], headers=_HEADERS, **more)


def test_answers_errors_and_keys_pass_through(world: _World, client: Any) -> None:
    before = world.numbers()
    assert all(one["grpc_port"] for one in before["services"]) and client.is_server_live()
    with torch.no_grad():
        right = bundle.load(world.odd)(torch.from_numpy(_input()[1])).numpy()
    for number in range(20):
        answer = _infer(client, request_id=str(number), timeout=30_000_000)
        np.testing.assert_allclose(answer.as_numpy("output"), right, rtol=1e-6, atol=1e-6)
        assert answer.get_response().id == str(number)
    # The model that one service lacks is found at the other, whoever is asked first.
    assert all(client.is_model_ready("pair", headers=_HEADERS) in (True, False) for _ in range(2))
    left = triton.InferInput("left", [1, 2], "FP32").set_data_from_numpy(np.ones((1, 2), np.float32))
    other = triton.InferInput("right", [1, 2], "FP32").set_data_from_numpy(np.ones((1, 2), np.float32))
    for _ in range(6):
        assert client.infer("pair", [left, other], headers=_HEADERS).as_numpy("count").shape == (1,)
    for asks, code in (
        (lambda: client.infer("odd", [_input()[0]]), "UNAUTHENTICATED"),
        (lambda: client.infer("odd", [_input(name="inptu")[0]], headers=_HEADERS), "INVALID_ARGUMENT"),
        (lambda: client.infer("even", [_input()[0]], headers=_HEADERS), "NOT_FOUND"),
        (lambda: client.infer("odd", [_input(first=255)[0]], headers=_HEADERS), "INTERNAL"),
        (lambda: client.load_model("odd", headers=_HEADERS), "PERMISSION_DENIED"),
    ):
        with pytest.raises(Error) as error:
            asks()
        assert error.value.status() == f"StatusCode.{code}", error.value
    # The call's own deadline goes with it: the model does not answer. A busy machine may need longer to take it in at all.
    held = triton.InferInput("input", [1, 3, 4], "UINT8").set_data_from_numpy(np.full((1, 3, 4), 252, np.uint8))
    taken = world.numbers()["accepted"]
    for client_timeout in (0.25, 2.0, 10.0):
        with pytest.raises(Error) as error:
            client.infer("odd", [held], headers=_HEADERS, client_timeout=client_timeout)
        assert error.value.status() in ("StatusCode.DEADLINE_EXCEEDED", "StatusCode.RESOURCE_EXHAUSTED")
        if world.numbers()["accepted"] > taken:
            break
    bundles.gate(world.odd).touch()
    assert client.get_model_metadata("odd", headers=_HEADERS).name == "odd"
    _until(lambda: not world.numbers()["open"])
    now = world.numbers()
    grown = {word: now[word] - before[word] for word in (*_OUTCOMES, "accepted")}
    assert (grown["answered"], grown["failed"], grown["invalid"]) == (29, 1, 3), grown
    # A busy machine may hear of a deadline as of a client that leaves, and of an earlier call when another has been made.
    late = grown["expired"] + grown["refused"] + grown["cancelled"]
    assert 1 <= late <= 3 and grown["accepted"] == 33 + late, grown
    assert min(one["answered"] for one in now["services"]) > 0


def test_a_stream_is_answered_in_its_order_while_a_gateway_is_killed_and_a_service_leaves(world: _World, client: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=_HEADERS)

    def ask(first: int, last: int) -> list[Any]:
        for number in range(first, last):
            client.async_stream_infer("odd", [_input(name="inptu" if number == 30 else "input")[0]], request_id=str(number))
        found = [answers.get(timeout=_WAIT_S) for _ in range(first, last)]
        assert [result and result.get_response().id for result, _ in found] == [
            None if number == 30 else str(number) for number in range(first, last)
        ], [str(error) for _, error in found if error]
        return found

    assert 'no input "inptu"' in str(ask(0, 60)[30][1])
    (gateway,) = [row["pid"] for row in world.services[1].processes() if row["role"] == "gateway"]
    os.kill(gateway, signal.SIGKILL)
    ask(100, 160)
    world.services[1].close()
    ask(200, 260)
    client.stop_stream()
    # The other one may have answered all of these: that this one is gone comes to light when it is looked at next.
    _until(lambda: not world.numbers()["services"][1]["ready"])
    assert _infer(client).as_numpy("output").shape == (1, 5)
