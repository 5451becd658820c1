"""Replicas that come and go while a service answers."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest

import shoal
from shoal.errors import RequestError
from shoal.serve.scaling import Change

_WAIT_S = 60.0


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with shoal.serve(bundles.odd(tmp_path / "odd"), slo_ms=20_000, replicas=request.param) as running:
        yield running


class _Clients:
    """Closed loops that keep a ledger: every request has one answer, the right one."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.client = shoal.Client(url)
        self.rows = np.random.default_rng(0).integers(0, 250, (1, 3, 4), dtype=np.uint8)
        self.right = self.client.infer(self.rows)["output"]
        self.wrong: list[Any] = []
        self.answered = 0
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run) for _ in range(count)]

    def _run(self) -> None:
        while not self.stop.is_set():
            try:
                found = self.client.infer(self.rows)["output"]
                if not np.allclose(found, self.right, atol=1e-6):
                    self.wrong.append(found)
                self.answered += 1
            except Exception as error:
                self.wrong.append(error)

    def __enter__(self) -> _Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def _until(done: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + _WAIT_S
    while not done():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.05)


def _pids(service: Any) -> set[int]:
    return {row["pid"] for row in service.processes() if row["role"] == "replica"}


# Of a fixed number nobody else changes anything.
@pytest.mark.parametrize("service", [2], indirect=True)
def test_they_come_and_leave_under_load_and_no_request_fails(service: Any) -> None:
    fleet = service._service.fleet

    def resize(by: int) -> None:
        before, asked = fleet._active["odd"].replicas, threading.Event()
        service._service.command(lambda: (fleet.resize("odd", Change(by, "a test")), asked.set()))
        assert asked.wait(_WAIT_S)
        wanted = before + by
        _until(lambda: service.numbers()["odd"].get("replicas") == wanted and len(_pids(service)) == wanted, f"{wanted} replicas")

    with _Clients(service.url) as clients:
        resize(1)
        before = _pids(service)
        for by in (-1, -1, 1):
            resize(by)
        assert len(_pids(service) & before) == 1
        seen = clients.answered
        _until(lambda: clients.answered > seen + 50, "answers by the new one")
    assert clients.wrong == []
    counts = service.numbers()["odd"]
    assert counts["replica_deaths"] == 0
    assert [one["replicas"] for one in counts["scaling"]["changes"]] == [3, 2, 1, 2]


@pytest.mark.parametrize("service", ["1-3"], indirect=True)
def test_refusals_bring_one_more(service: Any) -> None:
    fleet = service._service.fleet
    while len(_pids(service)) > 1:
        before = len(_pids(service))
        service._service.command(lambda: fleet.resize("odd", Change(-1, "a test")))
        _until(lambda n=before: len(_pids(service)) < n, "one less")  # type: ignore[misc]
    hopeless = {
        "inputs": [{"name": "input", "datatype": "UINT8", "shape": [1, 3, 4], "data": [0] * 12}], "parameters": {"timeout": 1}
    }  # fmt: skip

    def refused_once() -> bool:
        connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=_WAIT_S)
        connection.request("POST", "/v2/models/odd/infer", json.dumps(hopeless))
        assert connection.getresponse().status == 429
        connection.close()
        return any("could not be answered in time" in one["why"] for one in service.numbers()["odd"]["scaling"]["changes"])

    _until(refused_once, "one more")
    _until(lambda: service.numbers()["odd"].get("replicas", 0) >= 2, "the new one to be up")


@pytest.mark.parametrize("replicas", ["3-1", "0", "some"])
def test_bad_ranges(replicas: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--replicas is"):
        shoal.serve(bundles.odd(tmp_path / "odd"), replicas=replicas)
