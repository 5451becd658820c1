from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_service import METADATA, Service, double, refuse, respond, say, serving

from shoal.errors import DeadlineError, RequestError
from shoal.serve import client as client_module
from shoal.serve.client import Client, ServiceError, ServiceTimeoutError, ServiceUnreachableError

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client waits, instead of waiting."""
    found: list[float] = []

    async def pause(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(client_module.time, "sleep", found.append)
    monkeypatch.setattr(client_module.asyncio, "sleep", pause)
    return found


def test_arrays_go_in_and_come_out_over_one_connection(service: Service) -> None:
    with Client(service.url) as client:
        for inputs in ({"input": ROWS}, ROWS, ROWS.tolist(), ROWS.astype(np.float16), np.asfortranarray(ROWS)):
            found = client.infer(inputs if not isinstance(inputs, list) else {"input": np.float32(inputs)})
            assert list(found) == ["output"] and found["output"].dtype == np.float32
            np.testing.assert_array_equal(found["output"], ROWS * 2)
            found["output"] += 1  # the caller's own
        assert client.metadata() == METADATA and client.metadata("double") == METADATA
        assert client.models() == ["double"] and client.ready() and client.ready("double")
    assert service.connections == 1
    request = service.inferences[0]
    assert request.path == "/v2/models/double/infer" and request.header["parameters"] == {"binary_data_output": True}
    assert request.body.endswith(ROWS.tobytes())


def test_the_same_awaited(service: Service) -> None:
    client = Client(service.url)

    async def ask() -> None:
        async with client:
            np.testing.assert_array_equal((await client.infer_async(ROWS))["output"], ROWS * 2)
            many = await asyncio.gather(*(client.infer_async({"input": ROWS + i}) for i in range(8)))
            for i, found in enumerate(many):
                np.testing.assert_array_equal(found["output"], (ROWS + i) * 2)
            assert await client.metadata_async() == METADATA
            assert await client.models_async() == ["double"] and await client.ready_async()

    # A client outlives the loop it was used in.
    asyncio.run(ask())
    asyncio.run(ask())
    assert service.connections <= 2 * 8 + 1


def test_deadline_and_priority_are_told_to_the_service(service: Service) -> None:
    with Client(service.url) as client:
        client.infer(ROWS, timeout_s=5.0, priority=1)
    parameters = service.inferences[0].header["parameters"]
    assert 0 < parameters["timeout"] <= 5_000_000 and isinstance(parameters["timeout"], int)
    assert parameters["priority"] == 1


@pytest.mark.parametrize("status", [429, 503])
def test_what_was_not_taken_in_is_tried_again_after_as_long_as_the_service_says(
    service: Service, pauses: list[float], status: int
) -> None:
    with Client(service.url) as client:
        for ask in (client.infer, lambda inputs: asyncio.run(client.infer_async(inputs))):
            service.script.extend([refuse(status, "Later.", retry_after="7"), refuse(status, "Later.")])
            np.testing.assert_array_equal(ask(ROWS)["output"], ROWS * 2)
            assert pauses == [7.0, 0.1]
            pauses.clear()
    assert len(service.inferences) == 6


def test_no_longer_than_the_deadline_and_no_more_often_than_told(service: Service, pauses: list[float]) -> None:
    service.otherwise = refuse(429, "Too much at once.", retry_after="60")
    with Client(service.url, retries=2) as client, pytest.raises(ServiceError, match="Too much at once") as caught:
        client.infer(ROWS, timeout_s=30.0)
    assert caught.value.status == 429 and pauses == [] and len(service.inferences) == 1
    service.otherwise = refuse(503, "No replica.", retry_after="0")
    with Client(service.url, retries=2) as client, pytest.raises(ServiceError) as caught:
        client.infer(ROWS)
    assert caught.value.status == 503 and caught.value.sentence == "No replica."
    assert pauses == [0.0, 0.0] and len(service.inferences) == 1 + 3


@pytest.mark.parametrize("status", [400, 404, 413, 500])
def test_other_errors_are_not_tried_again(service: Service, pauses: list[float], status: int) -> None:
    service.otherwise = refuse(status, "No.")
    with Client(service.url) as client, pytest.raises(ServiceError, match="^No.$") as caught:
        client.infer(ROWS)
    assert caught.value.status == status and pauses == [] and len(service.inferences) == 1


def test_a_deadline_that_passed_has_its_own_type(service: Service) -> None:
    service.otherwise = refuse(504, "The deadline passed.")
    with Client(service.url) as client:
        with pytest.raises(ServiceTimeoutError) as caught:
            client.infer(ROWS)
        assert caught.value.status == 504 and isinstance(caught.value, DeadlineError)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        quiet = Client(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.05)
        with pytest.raises(ServiceTimeoutError, match="did not answer within"):
            quiet.metadata()
        with pytest.raises(ServiceTimeoutError, match="did not answer within"):
            asyncio.run(quiet.metadata_async())
        assert not quiet.ready()


def test_where_nobody_listens_it_is_tried_again_then_said(pauses: list[float]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # held, so that nobody else gets it
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", retries=2)
        for ask in (lambda: client.infer(ROWS), lambda: asyncio.run(client.infer_async(ROWS))):
            with pytest.raises(ServiceUnreachableError, match="Nobody answers at http://127.0.0.1") as caught:
                ask()
            assert caught.value.status == 0 and pauses == [0.05, 0.1]
            pauses.clear()
        assert not client.ready()


def test_a_request_that_was_sent_is_not_sent_again(service: Service, pauses: list[float]) -> None:
    client = Client(service.url)
    client.metadata("double")
    for ask in (client.infer, lambda inputs: asyncio.run(client.infer_async(inputs))):
        service.script.append(lambda _: None)
        with pytest.raises(ServiceError, match="closed the connection|broke") as caught:
            ask(ROWS)
        assert caught.value.status == 0 and pauses == []
    assert len(service.inferences) == 2


def test_a_connection_that_the_service_has_closed_meanwhile_is_not_used(service: Service) -> None:
    with Client(service.url) as client:
        client.infer(ROWS)
        for kept in client._idle:
            kept.shutdown(socket.SHUT_RDWR)  # the end that a closed connection has
        assert client.infer(ROWS)["output"].shape == (2, 3)
        service.script.append(lambda request: double(request).replace(b"Said\r\n", b"Said\r\nConnection: close\r\n"))
        client.infer(ROWS)
        assert client._idle == []


def test_an_answer_in_pieces_and_one_without_a_length(service: Service) -> None:
    whole = double

    def chunked(request: object) -> bytes:
        head, _, body = whole(request).partition(b"\r\n\r\n")  # type: ignore[arg-type]
        kept = b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"content-length"))
        pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
        coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return kept + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n\r\n"

    service.otherwise = chunked
    with Client(service.url) as client:
        for _ in range(2):
            np.testing.assert_array_equal(client.infer(ROWS)["output"], ROWS * 2)
    assert service.connections == 1


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH\r\n\r\n", respond(200, b"<html>"), say(200, {"outputs": [{"name": 1}]})])
def test_what_is_no_service_is_told(service: Service, reply: bytes) -> None:
    service.otherwise = lambda _: reply
    with Client(service.url) as client, pytest.raises(ServiceError, match="is no service of this protocol"):
        client.infer(ROWS)


def test_requests_that_make_no_sense(service: Service) -> None:
    for url in ("wss://127.0.0.1:1", "ftp://a", "http://", "http://a b", "http://a:port", "http://a?b=c", ""):
        with pytest.raises(RequestError, match="127.0.0.1:8000"):
            Client(url)
    client = Client(service.url)
    with pytest.raises(RequestError, match="above 0"):
        client.infer(ROWS, timeout_s=0)
    with pytest.raises(RequestError, match="cannot be sent"):
        client.infer({"input": np.array(["text"])})
    with pytest.raises(ServiceError, match="no such model"):
        client.infer(ROWS, model="a/b")
    assert service.requests[-1].path == "/v2/models/a%2Fb"
    service.models["other"] = {**METADATA, "name": "other", "inputs": METADATA["inputs"] * 2}
    with Client(service.url) as fresh, pytest.raises(RequestError, match="serves double, other; name one"):
        fresh.infer(ROWS)
    service.models["other"]["inputs"] = [{**entry, "name": name} for entry, name in zip(METADATA["inputs"] * 2, "ab")]  # noqa: B905
    with Client(service.url) as fresh, pytest.raises(RequestError, match="has the inputs a, b"):
        fresh.infer(ROWS, model="other")
    service.ready = False
    assert not client.ready()
    client.close()


def test_client_and_load_generator_do_without_torch() -> None:
    code = "import sys, shoal.serve.client, shoal.serve.load, shoal.serve.load_inputs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True)
    assert done.stdout.strip() == "False"
