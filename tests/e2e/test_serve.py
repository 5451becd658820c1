"""A service from outside: real clients, kill -9, a ledger of every request kept here."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles
import dashboard
import numpy as np
import pytest
import torch
import tritonclient.http as triton

import shoal
from shoal import bundle
from shoal.errors import RequestError, TargetError

_DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.odd(tmp_path_factory.mktemp("odd") / "bundle")


@pytest.fixture(scope="module")
def service(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    two = bundles.two(tmp_path_factory.mktemp("two") / "bundle")
    with shoal.serve(odd, f"pair={two}", slo_ms=_DEADLINE_S * 1e3, replicas=2) as running:
        yield running


def _rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (count, 3, 4), dtype=np.uint8)


def _held() -> np.ndarray:
    """A row that is not answered before its gate is opened."""
    return np.full((1, 3, 4), 252, np.uint8)


def _right(odd: Path, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        answer: np.ndarray = bundle.load(odd)(torch.from_numpy(rows)).numpy()
    return answer


def _post(url: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=_DEADLINE_S)
    try:
        connection.request("POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=_DEADLINE_S) as answer:
        body = answer.read()
    return json.loads(body) if body else None


def _infer(url: str, rows: np.ndarray, timeout_s: float | None = None) -> tuple[int, Any]:
    request: dict[str, Any] = {
        "inputs": [{"name": "input", "datatype": "UINT8", "shape": list(rows.shape), "data": rows.tolist()}]
    }
    if timeout_s is not None:
        request["parameters"] = {"timeout": int(timeout_s * 1e6)}
    status, _, body = _post(url, "/v2/models/odd/infer", json.dumps(request).encode())
    return status, json.loads(body)


def _replicas(url: str) -> list[int]:
    return [row["pid"] for row in _get(url + "/processes") if row["role"] == "replica"]


def _answers(url: str) -> bool:
    try:
        return _infer(url, _rows(1))[0] == 200
    except (ConnectionError, http.client.HTTPException):
        return False


def _counts(url: str) -> dict[str, Any]:
    """What the gateway says of the model at this moment."""
    counts: dict[str, Any] = _get(url + "/v2/models/odd/stats")["model_stats"][0]["shoal"]
    return counts


def _balanced(counts: dict[str, Any]) -> bool:
    ended = sum(counts[name] for name in ("answered", "expired", "failed", "cancelled", "lost"))
    return bool(counts["accepted"] == ended + counts["open"])


class TestPublicClient:
    """tritonclient[http], unchanged."""

    @pytest.mark.parametrize("binary", [True, False])
    def test_infer(self, service: Any, odd: Path, binary: bool) -> None:
        client = triton.InferenceServerClient(service.url.removeprefix("http://"))
        rows = _rows(3)
        given = triton.InferInput("input", list(rows.shape), "UINT8")
        given.set_data_from_numpy(rows, binary_data=binary)
        wanted = triton.InferRequestedOutput("output", binary_data=binary)
        answer = client.infer("odd", [given], outputs=[wanted], request_id="seven")
        np.testing.assert_allclose(answer.as_numpy("output"), _right(odd, rows), rtol=1e-6, atol=1e-6)
        assert answer.get_response()["id"] == "seven"
        client.close()

    def test_named_inputs_and_several_outputs(self, service: Any) -> None:
        client = triton.InferenceServerClient(service.url.removeprefix("http://"))
        left, right = np.float32([[1, 2], [3, 4]]), np.float32([[10, 20], [30, 40]])
        given = []
        for name, value in (("right", right), ("left", left)):
            given.append(triton.InferInput(name, [2, 2], "FP32"))
            given[-1].set_data_from_numpy(value)
        answer = client.infer("pair", given)
        np.testing.assert_array_equal(answer.as_numpy("sum"), 2 * (left + right))
        np.testing.assert_array_equal(answer.as_numpy("count"), [7, 7])
        client.close()

    def test_what_the_dashboard_asks_for_is_exported(self, service: Any) -> None:
        with urllib.request.urlopen(service.url + "/metrics", timeout=30) as answer:
            found = dashboard.exported(answer.read().decode())
        wanted = dashboard.metrics("shoal_", without="shoal_route_")
        assert wanted <= found and len(wanted) >= 8

    def test_health_metadata_statistics_index(self, service: Any) -> None:
        assert _infer(service.url, _rows(1))[0] == 200
        client = triton.InferenceServerClient(service.url.removeprefix("http://"))
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("odd")
        assert not client.is_model_ready("even")
        metadata = client.get_model_metadata("odd")
        assert metadata["inputs"] == [{"name": "input", "datatype": "UINT8", "shape": [-1, 3, 4]}]
        assert client.get_server_metadata()["name"] == "shoal"
        assert {row["name"] for row in client.get_model_repository_index()} == {"odd", "pair"}
        (statistics,) = client.get_inference_statistics("odd")["model_stats"]
        assert statistics["inference_stats"]["success"]["count"] >= 1
        assert _balanced(statistics["shoal"])
        client.close()


class TestAnswers:
    def test_do_not_depend_on_company(self, service: Any, odd: Path) -> None:
        rows = _rows(64, seed=2)
        alone = [_infer(service.url, row[None])[1]["outputs"][0]["data"] for row in rows[:8]]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda row: _infer(service.url, row[None])[1]["outputs"][0]["data"], rows))
        np.testing.assert_allclose(together[:8], alone, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(together, _right(odd, rows), rtol=1e-6, atol=1e-6)

    def test_metrics_and_processes(self, service: Any) -> None:
        assert _infer(service.url, _rows(1))[0] == 200
        with urllib.request.urlopen(service.url + "/metrics") as answer:
            text = answer.read().decode()
        assert 'shoal_requests_total{model="odd",outcome="answered"}' in text
        roles = {row["role"] for row in _get(service.url + "/processes")}
        assert {"supervisor", "gateway", "template", "replica"} <= roles


class TestTrouble:
    def test_model_that_raises(self, service: Any) -> None:
        rows = _rows(1)
        rows[0, 0, 0] = 255
        status, answer = _infer(service.url, rows)
        assert status == 500
        assert (
            "ValueError" in answer["error"] and "secret" not in answer["error"] and "Traceback" not in answer["error"]
        )

    def test_deadline(self, service: Any, odd: Path) -> None:
        busy: list[concurrent.futures.Future[tuple[int, Any]]] = []
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            # What a replica has been given is computed to its end: first give all of them all that they take.
            while not _counts(service.url)["queued"]:
                assert len(busy) < 60, "The replicas take whatever comes."
                accepted = _counts(service.url)["accepted"]
                busy.append(pool.submit(_infer, service.url, _held()))
                _until(lambda: _counts(service.url)["accepted"] > accepted)  # noqa: B023
            accepted = _counts(service.url)["accepted"]
            late = pool.submit(_infer, service.url, _held(), timeout_s=0.05)
            _until(lambda: late.done() or _counts(service.url)["accepted"] > accepted)
            time.sleep(0.1)
            bundles.gate(odd).touch()
            status, answer = late.result()
            assert all(future.result()[0] == 200 for future in busy)
        bundles.gate(odd).unlink()
        assert status in (429, 504), answer

    def test_request_that_kills_is_not_tried_for_ever(self, service: Any) -> None:
        rows = _rows(1)
        rows[0, 0, 0] = 254
        status, answer = _infer(service.url, rows)
        assert (status, answer["error"]) == (500, "The model's process died each time it computed this request.")
        assert _infer(service.url, _rows(1))[0] == 200

    @pytest.mark.parametrize(
        ("path", "body", "headers", "status"),
        [
            ("/v2/models/odd/infer", b"{", {}, 400),
            ("/v2/models/od/infer", b"{}", {}, 404),
            ("/v2/models/odd/versions/9/infer", b"{}", {}, 404),
            ("/v2/models/odd/infer", b'{"inputs":[]}', {"Inference-Header-Content-Length": "99"}, 400),
            ("/v2/models/odd/infer", b"x", {"Content-Length": str(100 << 20)}, 413),
            ("/v2/nothing", b"", {}, 404),
        ],
    )
    def test_bad_requests(self, service: Any, path: str, body: bytes, headers: dict[str, str], status: int) -> None:
        found, _, answer = _post(service.url, path, body, headers)
        assert found == status
        assert json.loads(answer)["error"].endswith(".")


class TestDeaths:
    """kill -9 under load: every request that is sent has one answer, and the right one."""

    def test_replicas(self, service: Any, odd: Path) -> None:
        rows = _rows(400, seed=5)
        right = _right(odd, rows)
        deaths, open_then = 0, list[concurrent.futures.Future[tuple[int, Any]]]()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(_infer, service.url, row[None]) for row in rows]
            while not all(answer.done() for answer in answers):
                # Those that were open are answered in between: a request over which three replicas have died is given up.
                pids = _replicas(service.url) if deaths < 4 and all(answer.done() for answer in open_then) else []
                # The list may still have one that has just died.
                with contextlib.suppress(ProcessLookupError):
                    if pids:
                        os.kill(pids[deaths % len(pids)], signal.SIGKILL)
                        deaths += 1
                        open_then = [answer for answer in answers if answer.running()]
                time.sleep(0.02)
            found = [answer.result() for answer in answers]
        assert {status for status, _ in found} == {200}
        answered = [answer["outputs"][0]["data"] for _, answer in found]
        np.testing.assert_allclose(answered, right, rtol=1e-6, atol=1e-6)
        assert deaths >= 1
        assert _balanced(_counts(service.url))

    def test_gateway(self, odd: Path) -> None:
        with shoal.serve(odd, slo_ms=_DEADLINE_S * 1e3, replicas=2) as service:
            outcomes: list[str] = []

            def ask() -> None:
                try:
                    outcomes.append(str(_infer(service.url, _held())[0]))
                except (ConnectionError, http.client.HTTPException):
                    outcomes.append("cut off")

            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()
            _until(lambda: service.numbers()["odd"]["accepted"] == 2)
            (gateway,) = (row["pid"] for row in service.processes() if row["role"] == "gateway")
            os.kill(gateway, signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert outcomes == ["cut off", "cut off"]
            bundles.gate(odd).touch()
            _until(lambda: _answers(service.url))
            # The slots that replicas were still computing on came back.
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                assert all(status == 200 for status, _ in pool.map(lambda _: _infer(service.url, _rows(1)), range(50)))
        bundles.gate(odd).unlink()
        counts = service.numbers()["odd"]
        assert counts["lost"] == 2 and counts["answered"] >= 51
        assert counts["accepted"] == counts["answered"] + counts["lost"]


class TestCommand:
    def test_first_line_drain_and_end(self, odd: Path) -> None:
        command = [sys.executable, "-m", "shoal", "serve", str(odd), "--replicas", "1", "--slo-ms", "20000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            first = json.loads(process.stdout.readline())
            assert first["pid"] == process.pid
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                open_request = pool.submit(_infer, first["url"], _held())
                _until(lambda: _get(first["url"] + "/v2/models/odd/stats")["model_stats"][0]["shoal"]["open"] == 1)
                process.send_signal(signal.SIGTERM)
                bundles.gate(odd).touch()
                assert open_request.result()[0] == 200
            _, errors = process.communicate(timeout=_DEADLINE_S)
        finally:
            process.kill()
            process.wait()
            bundles.gate(odd).unlink(missing_ok=True)
        assert process.returncode == 0, errors
        assert "odd: 1 accepted, 1 answered" in errors
        assert "Traceback" not in errors

    def test_whoever_has_read_the_first_line_may_end_it_at_once(self, odd: Path) -> None:
        command = [sys.executable, "-m", "shoal", "serve", str(odd), "--replicas", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None and process.stdout.readline()
                process.send_signal(signal.SIGTERM)
                _, errors = process.communicate(timeout=_DEADLINE_S)
            finally:
                process.kill()
        assert process.returncode == 0, errors
        assert "odd: 0 accepted" in errors

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["nothing-here"], "nothing-here"),
            (["--replicas", "0", "BUNDLE"], "--replicas"),
            (["--slo-ms", "0", "BUNDLE"], "SLO"),
        ],
    )
    def test_bad_input(self, odd: Path, arguments: list[str], said: str) -> None:
        given = [str(odd) if word == "BUNDLE" else word for word in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "shoal", "serve", *given], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 2
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_bad_bundles(odd: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no finished model"):
        shoal.serve(tmp_path)
    with pytest.raises(RequestError, match="Two models have the same name"):
        shoal.serve(odd, odd)


def _until(true: Any) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestCache:
    def test_hits_and_company(self, odd: Path) -> None:
        with shoal.serve(odd, slo_ms=_DEADLINE_S * 1e3, replicas=2, cache_mb={"odd": 1}) as service:
            rows = _rows(1, seed=7)
            first = _infer(service.url, rows)
            assert [_infer(service.url, rows) for _ in range(3)] == [first] * 3
            slow = _rows(1)
            slow[0, 0, 0] = 253
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                same = list(pool.map(lambda _: _infer(service.url, slow), range(6)))
            assert all(answer == same[0] and answer[0] == 200 for answer in same)
            raising = _rows(1)
            raising[0, 0, 0] = 255
            assert [_infer(service.url, raising)[0] for _ in range(2)] == [500, 500], "failures are not remembered"
            (statistics,) = _get(service.url + "/v2/models/odd/stats")["model_stats"]
            counts, times = statistics["shoal"], statistics["inference_stats"]
            assert _balanced(counts) and counts["answered"] == 10 and counts["failed"] == 2
            assert counts["cache"]["hits"] == 8 == times["cache_hit"]["count"]
            assert counts["rows"] == 4 and times["cache_miss"]["count"] == 4
            # A new version remembers nothing of the old one.
            service.load("odd")
            assert _get(service.url + "/v2/models/odd/stats")["model_stats"][-1]["shoal"]["cache"]["entries"] == 0

    def test_bad_sizes(self, odd: Path) -> None:
        with pytest.raises(RequestError, match="which is not served"):
            shoal.serve(odd, cache_mb={"even": 1})
        with pytest.raises(RequestError, match="-1 MB"):
            shoal.serve(odd, cache_mb=-1)
