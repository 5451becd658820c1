"""Pictures as clients send them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from PIL import Image

import shoal
from shoal import bundle

_LABELS = ["aeroplane", "bird", "cat"]
_MEAN, _STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
_CODE = """\
import torch


def make():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 12, 3))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    (place / "seer.py").write_text(_CODE)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 12, 3))
    bundle.write(place / "seer", model.state_dict(), {
        "name": "seer", "factory": "seer:make", "labels": _LABELS, "preprocess": {"mean": _MEAN, "std": _STD},
        "inputs": [{"name": "input", "dtype": "FP32", "shape": [-1, 3, 8, 12]}],
        "outputs": [{"name": "output", "dtype": "FP32", "shape": [-1, 3]}],
    }, place / "seer.py")  # fmt: skip
    return place


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[Any]:
    with shoal.serve(place / "seer", slo_ms=20_000, replicas=1, grpc_port=0) as running:
        yield running


def _picture(seed: int = 0, size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    raw = io.BytesIO()
    Image.fromarray(values).save(raw, kind)
    return raw.getvalue()


def _right(place: Path, raw: bytes) -> np.ndarray:
    """Probabilities by torch, for a picture that has the model's size already."""
    values = torch.from_numpy(np.array(Image.open(io.BytesIO(raw)).convert("RGB"))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_MEAN, _STD))
    with torch.no_grad():
        found: np.ndarray = bundle.load(place / "seer")(((values - mean) / std)[None]).softmax(1)[0].numpy()
    return found


def _post(service: Any, body: bytes, kind: str, accept: str = "application/json") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", "/v2/models/seer/classify", body, {"content-type": kind, "accept": accept})
        answer = connection.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if accept == "application/json" or answer.status != 200 else raw.decode()
    finally:
        connection.close()


def _infer(service: Any, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    return _ask(service, "POST", "/v2/models/seer/infer", body, headers)


def _get(service: Any, path: str) -> tuple[int, Any]:
    return _ask(service, "GET", path)


def _ask(
    service: Any, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_answer_is_the_models(service: Any, place: Path, kind: str) -> None:
    raw = _picture(kind=kind)
    right = _right(place, raw)
    status, answer = _post(service, raw, f"image/{kind.lower()}")
    assert status == 200 and answer["label"] == _LABELS[int(right.argmax())]
    assert [row["label"] for row in answer["top"]] == [_LABELS[k] for k in np.argsort(-right)]
    np.testing.assert_allclose([row["score"] for row in answer["top"]], np.sort(right)[::-1], rtol=0, atol=1e-5)


def test_curl_gets_a_line(service: Any, place: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(_picture(3))
    right = _right(place, _picture(3))
    done = subprocess.run(
        ["curl", "-s", "-F", f"image=@{tmp_path / 'cat.png'}", f"{service.url}/v2/models/seer/classify"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout == f"{_LABELS[int(right.argmax())]} {right.max():.2f}\n"


def test_other_sizes_are_cut_and_resized(service: Any) -> None:
    # The sides are black, and nothing of them is left when it is cut to the aspect of 12 × 8.
    values = np.zeros((80, 400, 3), np.uint8)
    values[:, 120:280] = 200
    raw, middle = io.BytesIO(), io.BytesIO()
    Image.fromarray(values).save(raw, "PNG")
    Image.fromarray(values[:8, 140:152]).save(middle, "PNG")
    assert _post(service, raw.getvalue(), "image/png") == _post(service, middle.getvalue(), "image/png")


def _bomb() -> bytes:
    """A PNG that says that it has 10⁵ × 10⁵ pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (_bomb(), "image/png", (400, 413)),
        (_picture()[:60], "image/png", (400,)),
        (b"", "image/png", (400,)),
        (b"no picture", "image/jpeg", (400,)),
        (_picture(), "text/plain", (415,)),
        (b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x", (400,)),
        (b"\xff\xfe", "multipart/form-data", (400,)),
        (b"\r\n--x" * 3000, "multipart/form-data; boundary=x", (400,)),
        (b"GIF89a" + b"\0" * 50, "image/png", (400,)),
    ],
)
def test_what_is_no_picture(service: Any, body: bytes, kind: str, status: tuple[int, ...]) -> None:
    before = service.numbers()["seer"]["invalid"]
    found, answer = _post(service, body, kind)
    assert found in status and answer["error"].endswith(".") and "Traceback" not in answer["error"]
    assert service.numbers()["seer"]["invalid"] == before + 1


_SIZES = ((12, 8), (24, 16), (40, 9), (7, 30))


def test_pictures_as_bytes_are_answered_as_predict_answers_them(service: Any, place: Path, tmp_path: Path) -> None:
    """One way from a picture to an input: over JSON, binary HTTP and gRPC, and offline."""
    raws = [_picture(k, size) for k, size in enumerate(_SIZES)]
    for k, raw in enumerate(raws):
        (tmp_path / f"{k}.png").write_bytes(raw)
    right = shoal.predict(place / "seer", tmp_path, replicas=1)["output"]
    entry = {"name": "image", "datatype": "BYTES", "shape": [len(raws)]}
    asked = {"inputs": [{**entry, "data": [base64.b64encode(raw).decode() for raw in raws]}]}
    status, answer = _infer(service, json.dumps(asked).encode())
    assert status == 200 and answer["outputs"][0]["shape"] == [len(raws), 3]
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (-1, 3)), right, rtol=1e-5, atol=1e-5)
    binary = b"".join(len(raw).to_bytes(4, "little") + raw for raw in raws)
    head = {"inputs": [{**entry, "name": "input", "parameters": {"binary_data_size": len(binary)}}]}
    header = json.dumps(head).encode()
    status, answer = _infer(service, header + binary, {"inference-header-content-length": str(len(header))})
    assert status == 200
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (-1, 3)), right, rtol=1e-5, atol=1e-5)
    status, metadata = _get(service, "/v2/models/seer")
    assert metadata["alternative_inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    # As the public client sends them.
    triton = pytest.importorskip("tritonclient.grpc")
    with triton.InferenceServerClient(service.grpc_url) as client:
        pictures = triton.InferInput("image", [len(raws), 1], "BYTES")
        pictures.set_data_from_numpy(np.array(raws, np.object_).reshape(-1, 1))
        np.testing.assert_allclose(client.infer("seer", [pictures]).as_numpy("output"), right, rtol=1e-5, atol=1e-5)
        assert client.get_model_config("seer").config.parameters["alternative_inputs"].string_value
        assert len(client.get_model_metadata("seer").inputs) == 1


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"data": ["no picture"]}, "cannot be decoded"),
        ({"data": ["a", "b"]}, "2 elements"),
        ({"data": [1]}, "not texts"),
        ({"shape": [1, 3], "data": ["a"]}, r"\[rows\]"),
        ({"shape": [0], "data": []}, "no rows"),
        ({"name": "text", "data": ["a"]}, "takes BYTES as image"),
        ({"parameters": {"binary_data_size": 4}}, "ends within"),
    ],
)
def test_bytes_that_make_no_sense(service: Any, entry: dict[str, Any], said: str) -> None:
    before = service.numbers()["seer"]["invalid"]
    asked = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], **entry}]}
    status, answer = _infer(service, json.dumps(asked).encode())
    assert status == 400 and re.search(said, answer["error"])
    assert service.numbers()["seer"]["invalid"] == before + 1


@browser.needed
def test_the_page_says_what_is_in_a_picture(place: Path, service: Any, tmp_path: Path) -> None:
    raw = _picture(5)
    (tmp_path / "upload.png").write_bytes(raw)
    with browser.browser(tmp_path / "profile") as page:
        page.open(service.url + "/")
        page.until("models.has('seer')")
        assert page.evaluate("[...document.querySelectorAll('.tabs button')].map(b => b.textContent)") == ["Picture", "JSON"]
        page.evaluate("$('go').click()")
        assert page.until("(document.querySelector('#answer .error') || {}).textContent") == "Choose a picture first."
        page.choose_file("#file", tmp_path / "upload.png")
        page.until("picture !== null")
        page.evaluate("$('go').click()")
        page.until("document.querySelectorAll('#answer .bar').length === 3")
        shown = page.bars()
        right = _right(place, raw)
        assert [name for name, _ in shown] == [_LABELS[k] for k in np.argsort(-right)]
        np.testing.assert_allclose([score for _, score in shown], np.sort(right)[::-1], atol=1e-3)
        # What can be typed instead, and the numbers beside it.
        page.evaluate("choose('tensors'); $('go').click()")
        page.until("document.querySelector('#answer h3').textContent.startsWith('output · FP32 [1, 3]')")
        before = page.evaluate("history.get('seer').answered")
        page.until(f"history.get('seer').answered > {before} && $('rate').textContent !== '–'")
        assert page.evaluate("document.querySelectorAll('#numbers tr').length") == 10
