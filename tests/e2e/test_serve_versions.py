"""Versions of a model while it answers: no request fails, the right version answers, a bad one never does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import torch

import shoal
from shoal import bundle, tensorfile
from shoal.errors import RequestError, TargetError

triton = pytest.importorskip("tritonclient.http")

_SLO_MS = 20_000.0


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.odd(tmp_path_factory.mktemp("first") / "bundle")


def _changed(first: Path, directory: Path, by: float) -> Path:
    """The same model with other weights."""
    shutil.copytree(first, directory)
    state = {name: value + by for name, value in bundle.read_weights(first).items()}
    tensorfile.write(directory / bundle.WEIGHTS, state)
    return directory


def _right(directory: Path, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = bundle.load(directory)(torch.from_numpy(rows)).numpy()
    return found


@pytest.fixture
def service(first: Path, tmp_path: Path) -> Iterator[Any]:
    home = tmp_path / "home"
    shutil.copytree(first, home)
    with shoal.serve(f"odd={home}", slo_ms=_SLO_MS, replicas=1) as running:
        running.home = home
        yield running


class Crowd:
    """Clients that keep asking, and a ledger of what they were told."""

    def __init__(self, url: str, model: str = "odd") -> None:
        self.answers: list[tuple[np.ndarray, np.ndarray]] = []
        self.asked_s: list[float] = []
        self.errors: list[str] = []
        self._url, self._model = url, model
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(4)]

    def _ask(self, seed: int) -> None:
        made = np.random.default_rng(seed)
        client = shoal.Client(self._url, retries=0)
        while not self._stop.is_set():
            rows, asked_s = made.integers(0, 250, (1, 3, 4), dtype=np.uint8), time.monotonic()
            try:
                answer = client.infer(rows, model=self._model)["output"]
                with self._lock:
                    self.answers.append((rows, answer))
                    self.asked_s.append(asked_s)
            except Exception as error:
                self.errors.append(repr(error))

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, count: int) -> None:
        """Until so many more answers have come."""
        wanted = len(self.answers) + count
        _until(lambda: len(self.answers) >= wanted)

    def answered_by(self, *versions: Path) -> list[int]:
        """For each answer, which version's it is; AssertionError where it is nobody's."""
        rows = np.concatenate([rows for rows, _ in self.answers])
        found = np.concatenate([answer for _, answer in self.answers])
        apart = np.stack([np.abs(_right(version, rows) - found).max(1) for version in versions])
        assert (apart.min(0) < 1e-4).all()
        return [int(k) for k in apart.argmin(0)]


def test_swap_under_load(service: Any, first: Path, tmp_path: Path) -> None:
    second = _changed(first, tmp_path / "second", 1.0)
    ground = service.processes()[-1]["pid"]
    with Crowd(service.url) as crowd:
        crowd.wait(50)
        # Who answers does not need what templates are forked from; another version gets another one.
        os.kill(ground, signal.SIGKILL)
        service.load("odd", second)
        loaded_s = time.monotonic()
        crowd.wait(50)
    assert crowd.errors == []
    by = crowd.answered_by(first, second)
    assert by[0] == 0 and {k for k, asked_s in zip(by, crowd.asked_s, strict=True) if asked_s > loaded_s} == {1}
    client = triton.InferenceServerClient(service.url.removeprefix("http://"))
    assert client.get_model_metadata("odd")["versions"] == ["2"]
    client.close()
    _until(lambda: service.numbers()["odd"]["accepted"] == service.numbers()["odd"]["answered"])
    # What the old version had counted is still there.
    assert service.numbers()["odd"]["answered"] == len(crowd.answers) and service.numbers()["odd"]["probed"] >= 1
    _until(lambda: len([row for row in service.processes() if row["role"] == "template"]) == 1)
    (template,) = [row["pid"] for row in service.processes() if row["role"] == "template"]
    group = Path(f"/proc/{template}/autogroup")
    # It was loaded while others came first; now it has as much of the cores as anybody.
    assert not group.exists() or group.read_text().split()[-1] == "0"


@pytest.mark.parametrize(("by", "kept"), [(0.0, True), (1.0, False)])
def test_shadow_is_compared_and_decided(service: Any, first: Path, tmp_path: Path, by: float, kept: bool) -> None:
    second = _changed(first, tmp_path / "second", by)
    with Crowd(service.url) as crowd:
        if kept:
            service.load("odd", second, shadow=True, requests=20, tolerance=1e-3, slower=1e9)
        else:
            with pytest.raises(RequestError, match="rolled back: an answer is"):
                service.load("odd", second, shadow=True, requests=20, tolerance=1e-3, slower=1e9)
        crowd.wait(20)
    assert crowd.errors == []
    assert set(crowd.answered_by(first)) == {0}
    _until(lambda: len(_index(service.url)) == 1)
    (row,) = _index(service.url)
    assert (row["version"], row["state"]) == ("2" if kept else "1", "READY")


def test_canary_answers_its_share(service: Any, first: Path, tmp_path: Path) -> None:
    second = _changed(first, tmp_path / "second", 1.0)
    shares: list[dict[str, Any]] = []

    def note() -> bool:
        trial = service.numbers()["odd"].get("trial")
        if trial:
            shares.append(trial)
        return bool(shares)

    loading = threading.Thread(target=lambda: service.load("odd", second, canary=0.25, requests=100, slower=1e9))
    loading.start()
    # Before anybody asks, so that it cannot be over before it was looked at.
    _until(note)
    with Crowd(service.url) as crowd:
        loading.join()
        loaded_s = time.monotonic()
        crowd.wait(40)
    assert crowd.errors == []
    assert shares[0]["kind"] == "canary" and shares[0]["share"] == 0.25
    by = crowd.answered_by(first, second)
    assert {k for k, asked_s in zip(by, crowd.asked_s, strict=True) if asked_s > loaded_s} == {1}
    # As they were asked: one that the old version answers late would have many by the new one before it.
    by = [k for _, k in sorted(zip(crowd.asked_s, by, strict=True))]
    during = by[by.index(1) : len(by) - 1 - by[::-1].index(0)]
    assert 0.15 < sum(during) / len(during) < 0.35


def test_canary_that_fails_is_rolled_back(service: Any, first: Path, tmp_path: Path) -> None:
    bad = _changed(first, tmp_path / "bad", 0.0)
    source = bad / "odd_code.py"
    source.write_text(source.read_text().replace("asked == 255", "asked > 1"))
    _sign(bad)
    client = shoal.Client(service.url, retries=0)
    stop = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            try:
                client.infer(np.full((1, 3, 4), 9, np.uint8), model="odd")
                statuses.append(200)
            except Exception:
                statuses.append(500)

    thread = threading.Thread(target=ask)
    thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(stop.set)
        with pytest.raises(RequestError, match="rolled back: .* failed"):
            service.load("odd", bad, canary=0.1)
    assert statuses.count(500) >= 1
    assert client.infer(np.full((1, 3, 4), 9, np.uint8), model="odd")["output"].shape == (1, 5)


def test_what_cannot_come_in_changes_nothing(service: Any, first: Path, tmp_path: Path) -> None:
    other = bundles.two(tmp_path / "two" / "bundle")
    broken = _changed(first, tmp_path / "broken", 0.0)
    (broken / bundle.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(RequestError, match="other tensors"):
        service.load("odd", other)
    with pytest.raises(RequestError):
        service.load("odd", broken)
    with pytest.raises(TargetError, match="no model"):
        service.load("even")
    with pytest.raises(RequestError, match="canary"):
        service.load("odd", canary=1.5)
    with pytest.raises(TargetError, match="no model"):
        service.unload("even")
    rows = np.full((1, 3, 4), 9, np.uint8)
    answer = shoal.Client(service.url).infer(rows, model="odd")["output"]
    np.testing.assert_allclose(answer, _right(first, rows), rtol=1e-5, atol=1e-5)


def test_public_client_loads_and_unloads(service: Any, first: Path, tmp_path: Path) -> None:
    client = triton.InferenceServerClient(service.url.removeprefix("http://"))
    # As a page in a browser on this machine would ask.
    with pytest.raises(triton.InferenceServerException, match="A page of another place"):
        client.unload_model("odd", headers={"Origin": "https://evil.example"})
    client.unload_model("odd", headers={"Origin": service.url})
    assert [(row["name"], row["state"]) for row in _index(service.url)] == [("odd", "UNAVAILABLE")]
    assert not client.is_model_ready("odd") and not client.is_server_ready()
    shutil.copy(_changed(first, tmp_path / "second", 1.0) / bundle.WEIGHTS, service.home / bundle.WEIGHTS)
    client.load_model("odd")
    assert client.is_model_ready("odd") and client.is_server_ready()
    rows = np.full((1, 3, 4), 9, np.uint8)
    answer = shoal.Client(service.url).infer(rows, model="odd")["output"]
    np.testing.assert_allclose(answer, _right(tmp_path / "second", rows), rtol=1e-5, atol=1e-5)
    for name, parameters, status in (("even", {}, 404), ("odd", {"canary": 2}, 400), ("odd", {"path": "/tmp"}, 400)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _post(f"{service.url}/v2/repository/models/{name}/load", {"parameters": parameters})
        assert refused.value.code == status
        assert json.load(refused.value)["error"].endswith(".")
    client.close()


def test_gateway_dies_in_a_rollout(service: Any, first: Path, tmp_path: Path) -> None:
    second = _changed(first, tmp_path / "second", 0.0)
    loading = threading.Thread(target=lambda: service.load("odd", second, shadow=True, requests=30, slower=1e9))
    loading.start()
    _until(lambda: bool(service.numbers()["odd"].get("trial")))
    (gateway,) = (row["pid"] for row in service.processes() if row["role"] == "gateway")
    os.kill(gateway, signal.SIGKILL)
    client = shoal.Client(service.url)
    rows = np.full((1, 3, 4), 9, np.uint8)

    def answered() -> bool:
        with contextlib.suppress(Exception):
            client.infer(rows, model="odd")
        return not loading.is_alive()

    _until(answered)
    assert _index(service.url)[-1]["version"] == "2"


def _sign(directory: Path) -> None:
    """Write the checksum of a changed source into the bundle."""
    import hashlib

    described = bundle.read_description(directory)
    described["source"]["sha256"] = hashlib.sha256((directory / described["source"]["file"]).read_bytes()).hexdigest()
    (directory / bundle.DESCRIPTION).write_text(json.dumps(described))


def _index(url: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(_post(f"{url}/v2/repository/index", {}))
    return found


def _post(url: str, body: Any) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), method="POST"), timeout=60) as answer:
        found: bytes = answer.read()
    return found


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
