"""Pictures as clients send them."""

from __future__ import annotations

import http.client
import io
import json
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shoal
from shoal import bundle
from shoal.serve.pictures import check_preprocess

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
    with shoal.serve(place / "seer", slo_ms=20_000, replicas=1) as running:
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
        capture_output=True, text=True, timeout=60,
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


@pytest.mark.parametrize("wrong", [{"std": 0}, {"mean": [1, 2]}, {"mean": "a"}, [1]])
def test_preprocessing_that_cannot_be_followed(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"preprocess.*\.$"):
        check_preprocess(wrong)
