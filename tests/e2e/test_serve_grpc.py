"""gRPC as clients meet it: tritonclient[grpc] unchanged, and raw calls for what it does not send."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles
import certificates
import numpy as np
import pytest
import torch

import shoal
from shoal import bundle

triton = pytest.importorskip("tritonclient.grpc")
grpc = pytest.importorskip("grpc")
Error = pytest.importorskip("tritonclient.utils").InferenceServerException

_DEADLINE_S = 60.0
_KEY = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.odd(tmp_path_factory.mktemp("odd") / "bundle")


@pytest.fixture(scope="module")
def service(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    two = bundles.two(tmp_path_factory.mktemp("two") / "bundle")
    with shoal.serve(odd, f"pair={two}", slo_ms=_DEADLINE_S * 1e3, replicas=1, grpc_port=0) as running:
        yield running


@contextlib.contextmanager
def _serving(odd: Path, asked: dict[str, Any] | None = None, **options: Any) -> Iterator[tuple[Any, Any]]:
    with (
        shoal.serve(odd, slo_ms=_DEADLINE_S * 1e3, replicas=1, grpc_port=0, **options) as service,
        triton.InferenceServerClient(service.grpc_url, **(asked or {})) as client,
    ):
        yield service, client


@pytest.fixture
def client(service: Any) -> Iterator[Any]:
    with triton.InferenceServerClient(service.grpc_url) as found:
        yield found


def _rows(count: int = 1, first: int = 7) -> np.ndarray:
    rows = np.random.default_rng(0).integers(0, 250, (count, 3, 4), dtype=np.uint8)
    rows[0, 0, 0] = first
    return rows


def _input(rows: np.ndarray, name: str = "input", datatype: str = "UINT8") -> Any:
    found = triton.InferInput(name, rows.shape, datatype)
    found.set_data_from_numpy(rows)
    return found


def _counts(service: Any, name: str = "odd") -> dict[str, int]:
    words = ("accepted", "answered", "expired", "failed", "cancelled", "lost", "refused", "invalid")
    return {word: service.numbers()[name][word] for word in words}


def _settled(service: Any, before: dict[str, int], **more: int) -> None:
    """Everything has ended, and the counts have grown by so much."""
    until = time.monotonic() + _DEADLINE_S
    wanted = {**before, **{word: before[word] + n for word, n in more.items()}}
    while time.monotonic() < until and _counts(service) != wanted:
        time.sleep(0.02)
    assert _counts(service) == wanted


def _accepted(service: Any, before: dict[str, int]) -> bool:
    """Whether the one request since then was taken in, once it has ended."""
    until = time.monotonic() + _DEADLINE_S
    while time.monotonic() < until and sum((now := _counts(service)).values()) == sum(before.values()):
        time.sleep(0.02)
    return now["accepted"] > before["accepted"]


def _ended(service: Any, before: dict[str, int]) -> str:
    """How the one request since then has ended."""
    until = time.monotonic() + _DEADLINE_S
    while time.monotonic() < until:
        now = _counts(service)
        if ended := [word for word in now if word != "accepted" and now[word] > before[word]]:
            return ended[0]
        time.sleep(0.02)
    raise AssertionError(now)


def test_what_there_is(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("odd") and client.is_model_ready("odd", "1")
    assert not client.is_model_ready("even") and not client.is_model_ready("odd", "9")
    assert client.get_server_metadata().name == "shoal"
    metadata = client.get_model_metadata("pair", as_json=True)
    assert [entry["name"] for entry in metadata["inputs"]] == ["left", "right"]
    config = client.get_model_config("odd").config
    assert config.max_batch_size == 32 and list(config.input[0].dims) == [3, 4] and config.input[0].data_type == 2
    assert {model.name: model.state for model in client.get_model_repository_index().models} == {
        "odd": "READY", "pair": "READY"
    }  # fmt: skip


def test_answers(client: Any, service: Any, odd: Path) -> None:
    before, rows = _counts(service), _rows(3)
    answer = client.infer("odd", [_input(rows)], request_id="abc", priority=1, timeout=10_000_000)
    with torch.no_grad():
        right = bundle.load(odd)(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(answer.as_numpy("output"), right, rtol=1e-6, atol=1e-6)
    assert answer.get_response().id == "abc"
    left, other = np.ones((2, 2), np.float32), np.full((2, 2), 3, np.float32)
    answer = client.infer("pair", [_input(other, "right", "FP32"), _input(left, "left", "FP32")],
                          outputs=[triton.InferRequestedOutput("count")])  # fmt: skip
    assert answer.as_numpy("count").tolist() == [7, 7] and answer.as_numpy("sum") is None
    assert client.get_inference_statistics("odd").model_stats[0].inference_count >= 3
    _settled(service, before, accepted=1, answered=1)


def test_what_makes_no_sense(client: Any, service: Any) -> None:
    before = _counts(service)
    for model, inputs, code in (
        ("odd", [_input(_rows(), "inptu")], "INVALID_ARGUMENT"), ("even", [_input(_rows())], "NOT_FOUND"),
        ("odd", [_input(_rows(33))], "INVALID_ARGUMENT"),
        ("odd", [_input(np.zeros((1, 3, 4), np.int8), datatype="INT8")], "INVALID_ARGUMENT"),
    ):  # fmt: skip
        with pytest.raises(Error) as error:
            client.infer(model, inputs)
        assert error.value.status() == f"StatusCode.{code}"
    with pytest.raises(Error, match="ValueError") as error:
        client.infer("odd", [_input(_rows(first=255))])
    assert error.value.status() == "StatusCode.INTERNAL" and "secret" not in str(error.value)
    _settled(service, before, accepted=1, failed=1, invalid=3)


def test_raw_calls(service: Any) -> None:
    with grpc.insecure_channel(service.grpc_url, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for body, code in ((b"\xff\xff", "INVALID_ARGUMENT"), (bytes(33 << 20), "RESOURCE_EXHAUSTED")):
            with pytest.raises(grpc.RpcError) as error:
                call(body, timeout=_DEADLINE_S)
            assert error.value.code().name == code
        with pytest.raises(grpc.RpcError) as error:
            call(b"", timeout=_DEADLINE_S, compression=grpc.Compression.Gzip)
        assert error.value.code().name in ("UNIMPLEMENTED", "NOT_FOUND")
        for method in ("TraceSetting", "SystemSharedMemoryRegister"):
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"", timeout=_DEADLINE_S)
            assert error.value.code().name == "UNIMPLEMENTED"


def test_deadlines_and_clients_that_leave(client: Any, service: Any, odd: Path) -> None:
    before = _counts(service)
    # Admitted or not by what is predicted; a millisecond is too short for anything.
    with pytest.raises(Error) as error:
        client.infer("odd", [_input(_rows())], timeout=1)
    assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    _settled(service, before, refused=1)
    # The call's own deadline counts: the model does not answer. A busy machine may need longer to take it in at all.
    held = [_input(np.full((1, 3, 4), 252, np.uint8))]
    for client_timeout in (0.25, 2.0, 10.0):
        before = _counts(service)
        with pytest.raises(Error) as error:
            client.infer("odd", held, client_timeout=client_timeout)
        if error.value.status() == "StatusCode.DEADLINE_EXCEEDED" and _accepted(service, before):
            break
    assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    # To a gateway that was kept from hearing of it at once, the client leaves before its deadline.
    _settled(service, before, accepted=1, **{"expired" if _ended(service, before) == "expired" else "cancelled": 1})
    before = _counts(service)
    left = threading.Event()
    call = client.async_infer("odd", held, callback=lambda result, error: left.set())
    until = time.monotonic() + _DEADLINE_S
    while _counts(service)["accepted"] == before["accepted"] and time.monotonic() < until:
        time.sleep(0.01)
    call.cancel()
    assert left.wait(_DEADLINE_S)
    _settled(service, before, accepted=1, cancelled=1)
    bundles.gate(odd).touch()


def test_a_stream_is_answered_in_its_order(client: Any, service: Any) -> None:
    before = _counts(service)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(100):
        name = "inptu" if number == 50 else "input"
        client.async_stream_infer("odd", [_input(_rows(), name)], request_id=str(number))
    found = [answers.get(timeout=_DEADLINE_S) for _ in range(100)]
    client.stop_stream()
    assert [result and result.get_response().id for result, _ in found] == [
        None if number == 50 else str(number) for number in range(100)
    ]
    assert 'no input "inptu"' in str(found[50][1])
    _settled(service, before, accepted=99, answered=99, invalid=1)


def test_a_new_gateway_has_the_same_port_and_models_come_and_go(odd: Path) -> None:
    rows = _rows()
    with _serving(odd) as (service, client):
        assert client.infer("odd", [_input(rows)]).as_numpy("output").shape == (1, 5)
        (gateway,) = [row["pid"] for row in service.processes() if row["role"] == "gateway"]
        os.kill(gateway, signal.SIGKILL)
        until = time.monotonic() + _DEADLINE_S
        while True:
            try:
                assert client.infer("odd", [_input(rows)]).as_numpy("output").shape == (1, 5)
                break
            except Error as error:
                assert error.status() == "StatusCode.UNAVAILABLE" and time.monotonic() < until, error
                time.sleep(0.05)
        client.load_model("odd")
        assert [(m.name, m.version) for m in client.get_model_repository_index().models if m.state == "READY"] == [
            ("odd", "2")
        ]
        with pytest.raises(Error) as error:
            client.unload_model("even")
        assert error.value.status() == "StatusCode.NOT_FOUND"
        client.unload_model("odd")
        assert not client.is_model_ready("odd") and not client.is_server_ready()
        with pytest.raises(Error, match="not loaded"):
            client.infer("odd", [_input(rows)])


def test_keys_and_tls(odd: Path, tmp_path: Path) -> None:
    certificate, key = certificates.make(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text(f"{_KEY}\n")
    keys.chmod(0o600)
    tls = {"ssl": True, "root_certificates": str(certificate)}
    with _serving(odd, tls, api_key_file=keys, rate_limit=6, tls_cert=certificate, tls_key=key) as (_, client):
        assert client.is_server_live() and client.is_server_ready()
        for headers in ({}, {"authorization": "Bearer wrong"}):
            with pytest.raises(Error, match="API key") as error:
                client.infer("odd", [_input(_rows())], headers=headers)
            assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        for headers in ({"authorization": f"Bearer {_KEY}"}, {"x-api-key": _KEY}):
            assert client.infer("odd", [_input(_rows())], headers=headers).as_numpy("output").shape == (1, 5)
        with pytest.raises(Error, match="requests a second") as error:
            for _ in range(1000):
                client.infer("odd", [_input(_rows())], headers={"x-api-key": _KEY})
        assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
