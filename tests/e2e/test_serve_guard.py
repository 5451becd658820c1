"""Keys, rates and TLS, as clients meet them."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import bundles
import certificates
import numpy as np
import pytest

import shoal
from shoal.errors import RequestError
from shoal.serve.client import ServiceError, ServiceUnreachableError
from shoal.serve.service import ServiceOptions

_KEY, _OTHER = "0123456789abcdef0123", "fedcba9876543210fedc"
_ROWS = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("guard")
    certificate, key = certificates.make(directory)
    keys = directory / "keys"
    keys.write_text(f"# ours\nanna:{_KEY}\n{_OTHER}\n")
    keys.chmod(0o600)
    return {"bundle": bundles.odd(directory / "bundle"), "cert": certificate, "key": key, "keys": keys}


@pytest.fixture(scope="module")
def service(files: dict[str, Path]) -> Iterator[Any]:
    with shoal.serve(files["bundle"], slo_ms=20_000, replicas=1, api_key_file=files["keys"], rate_limit=10_000,
                     tls_cert=files["cert"], tls_key=files["key"]) as running:  # fmt: skip
        yield running


def _ask(service: Any, files: dict[str, Path], path: str, headers: dict[str, str], method: str = "GET") -> tuple[int, Any]:
    context = ssl.create_default_context(cafile=str(files["cert"]))
    connection = http.client.HTTPSConnection(service.url.removeprefix("https://"), timeout=60, context=context)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class TestKeys:
    def test_client(self, service: Any, files: dict[str, Path]) -> None:
        assert service.url.startswith("https://127.0.0.1:")
        with shoal.Client(service.url, api_key=_KEY, ca_file=files["cert"]) as client:
            answers = [client.infer(_ROWS)["output"] for _ in range(3)]
            answers.append(asyncio.run(client.infer_async(_ROWS))["output"])
        assert all(np.array_equal(answer, answers[0]) for answer in answers) and answers[0].shape == (1, 5)

    def test_no_key_and_another_key(self, service: Any, files: dict[str, Path]) -> None:
        for key in (None, _KEY[:-1], _KEY.upper()):
            with shoal.Client(service.url, api_key=key, ca_file=files["cert"]) as client, pytest.raises(ServiceError) as error:
                client.infer(_ROWS)
            assert error.value.status == 401 and "API key" in str(error.value)

    @pytest.mark.parametrize("path", ["/v2", "/metrics", "/processes", "/v2/models/odd", "/v2/health/live/x", "/v1/models"])
    def test_everything_wants_a_key(self, service: Any, files: dict[str, Path], path: str) -> None:
        assert _ask(service, files, path, {})[0] == 401
        assert _ask(service, files, path, {"X-Api-Key": _OTHER})[0] in (200, 404)

    def test_forms(self, service: Any, files: dict[str, Path]) -> None:
        for path, method in (("/v2/models/odd/infer", "POST"), ("/v2/repository/models/odd/unload", "POST")):
            assert _ask(service, files, path, {"Authorization": f"Basic {_KEY}"}, method)[0] == 401
        assert _ask(service, files, "/v2", {"authorization": f"bearer {_KEY}"})[0] == 200
        assert _ask(service, files, "/v2/health/live", {})[0] == _ask(service, files, "/v2/health/ready", {})[0] == 200
        assert _ask(service, files, "/v2/health/live", {}, "POST")[0] == 401
        status, page = _ask(service, files, "/metrics", {"X-Api-Key": _KEY})
        assert status == 200 and b'shoal_turned_away_total{reason="key"}' in page

    def test_certificates(self, service: Any) -> None:
        with shoal.Client(service.url, api_key=_KEY, retries=0) as client, pytest.raises(ServiceUnreachableError, match="tls"):
            client.infer(_ROWS)
        plain = service.url.replace("https", "http")
        with shoal.Client(plain, api_key=_KEY, retries=0) as client, pytest.raises(ServiceError):
            client.infer(_ROWS)

    def test_load(self, service: Any, files: dict[str, Path]) -> None:
        command = [sys.executable, "-m", "shoal", "load", service.url, "--requests", "20", "--concurrency", "2", "--json"]
        done = subprocess.run([*command, "--api-key-file", str(files["keys"]), "--ca-file", str(files["cert"])],
                              capture_output=True, text=True, timeout=200)  # fmt: skip
        assert done.returncode == 0, done.stderr
        # The model raises where a random row begins with 255.
        assert set(json.loads(done.stdout)["statuses"]) <= {"200", "500"}, done.stdout
        done = subprocess.run([*command, "--ca-file", str(files["cert"])], capture_output=True, text=True, timeout=200)
        assert done.returncode == 2 and "API key" in done.stderr


def test_rate(files: dict[str, Path]) -> None:
    with (
        shoal.serve(files["bundle"], slo_ms=20_000, replicas=1, rate_limit=0.001) as service,
        shoal.Client(service.url, retries=0) as client,
    ):
        assert client.models() == ["odd"]
        with pytest.raises(ServiceError) as error:
            client.models()
        assert client.ready()
    assert error.value.status == 429 and "requests a second" in str(error.value)


def test_bad_options(files: dict[str, Path]) -> None:
    for options, said in (
        ({"api_key_file": files["bundle"]}, "cannot be read"), ({"rate_limit": 0}, "requests a second"),
        ({"tls_cert": files["cert"]}, "--tls-key"), ({"tls_cert": files["cert"], "tls_key": files["cert"]}, "PEM"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            shoal.serve(files["bundle"], **options)  # type: ignore[arg-type]


def test_the_command_refuses_keys_that_others_may_read(files: dict[str, Path], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(_KEY)
    keys.chmod(0o644)
    command = [sys.executable, "-m", "shoal", "serve", str(files["bundle"]), "--api-key-file", str(keys)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "chmod 600" in done.stderr


def test_warning(files: dict[str, Path]) -> None:
    warning = ServiceOptions(host="0.0.0.0").warning
    assert warning is not None and "--api-key-file" in warning and warning.endswith(".")
    assert ServiceOptions(host="0.0.0.0", api_key_file=files["keys"]).warning is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ServiceOptions().warning is None


@browser.needed
def test_the_page_asks_for_a_key(service: Any, files: dict[str, Path], tmp_path: Path) -> None:
    assert _ask(service, files, "/live", {})[0] == 401
    with browser.browser(tmp_path) as page:
        page.open(service.url + "/")
        page.until("!$('key-row').hidden")
        page.evaluate(f"$('key').value = '{_KEY}'")
        page.until("models.has('odd')")
        page.evaluate("$('go').click()")
        page.until("document.querySelectorAll('#answer .bar').length === 5")


def test_a_route_speaks_tls_on_both_sides_and_passes_keys_on(service: Any, files: dict[str, Path]) -> None:
    tls = ("--ca-file", files["cert"], "--tls-cert", files["cert"], "--tls-key", files["key"])
    command = [sys.executable, "-m", "shoal", "route", service.url, *map(str, tls)]
    route = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert route.stdout is not None
        url = json.loads(route.stdout.readline())["url"]
        with shoal.Client(url, api_key=_KEY, ca_file=files["cert"], timeout_s=60) as client:
            assert client.infer(_ROWS)["output"].shape == (1, 5)
        with shoal.Client(url, ca_file=files["cert"], timeout_s=60) as client, pytest.raises(ServiceError) as error:
            client.infer(_ROWS)
        assert error.value.status == 401
    finally:
        route.terminate()
        assert route.wait(60) == 0
        route.stdout.close()
