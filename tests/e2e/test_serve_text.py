"""Models of texts of any length: Hugging Face folders as they are, masks, and answers that do not depend on company."""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from hubs import LONGEST as _LONGEST
from hubs import folder as _folder

import shoal
from shoal.errors import TargetError
from shoal.serve import hugging_face

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    plain = _folder(tmp_path_factory.mktemp("hub") / "plain", pooling=None)
    judge = _folder(tmp_path_factory.mktemp("hub") / "judge", pooling=None, labels=3)
    with shoal.serve(folder, plain, judge, slo_ms=20_000, replicas=2, grpc_port=0) as running:
        yield running


def _texts(count: int, seed: int = 0) -> list[str]:
    made = np.random.default_rng(seed)
    return [" ".join(f"w{k}" for k in made.integers(0, 60, made.integers(1, 60))) for _ in range(count)]


def _tokens(folder: Path, text: str) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_LONGEST)
    found: list[int] = tokenizer.encode(text).ids
    return found


def _right(folder: Path, texts: list[str]) -> np.ndarray:
    """Each text alone, by transformers and the definition of mean pooling."""
    model = transformers.BertModel.from_pretrained(folder).eval()
    rows = []
    with torch.no_grad():
        for text in texts:
            hidden = model(torch.tensor([_tokens(folder, text)])).last_hidden_state
            rows.append(torch.nn.functional.normalize(hidden.mean(1), dim=1)[0].numpy())
    return np.stack(rows)


def _post(url: str, path: str, value: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, json.dumps(value))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def _bad(service: Any) -> int:
    """Requests that made no sense, for a model or for none."""
    with urllib.request.urlopen(f"{service.url}/metrics") as page:
        nothing = re.search(r'shoal_turned_away_total{reason="nothing"} (\d+)', page.read().decode())
    return sum(numbers["invalid"] for numbers in service.numbers().values()) + (int(nothing[1]) if nothing else 0)


class TestEmbeddings:
    def test_are_those_of_each_text_alone(self, service: Any, folder: Path) -> None:
        texts = _texts(60)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [{"model": "tiny", "input": texts[k::4]} for k in range(4)]
            parts = list(pool.map(lambda one: _post(service.url, "/v1/embeddings", one), asked))
        found = np.zeros((60, 32))
        for k, (status, answer) in enumerate(parts):
            assert status == 200, answer
            found[k::4] = [row["embedding"] for row in answer["data"]]
            assert answer["usage"]["prompt_tokens"] == sum(len(_tokens(folder, text)) for text in texts[k::4])
        np.testing.assert_allclose(found, _right(folder, texts), rtol=0, atol=1e-6)

    def test_forms_of_a_request(self, service: Any, folder: Path) -> None:
        right = _right(folder, ["w1 w2"])[0]
        for given in ("w1 w2", ["w1 w2"], _tokens(folder, "w1 w2"), [_tokens(folder, "w1 w2")]):
            status, answer = _post(service.url, "/v1/embeddings", {"model": "tiny", "input": given})
            assert status == 200 and answer["object"] == "list"
            np.testing.assert_allclose(answer["data"][0]["embedding"], right, rtol=0, atol=1e-6)
        asked = {"model": "tiny", "input": "w1 w2", "encoding_format": "base64"}
        raw = base64.b64decode(_post(service.url, "/v1/embeddings", asked)[1]["data"][0]["embedding"])
        np.testing.assert_allclose(np.frombuffer(raw, "<f4"), right, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("asked", "status"),
        [
            ({"model": "none", "input": "w1"}, 404),
            ({"model": "plain", "input": "w1"}, 400),
            ({"model": "tiny", "input": []}, 400),
            ({"model": "tiny", "input": ""}, 400),
            ({"model": "tiny", "input": ["w1", [2]]}, 400),
            ({"model": "tiny", "input": [[-1]]}, 400),
            ({"model": "tiny", "input": {"a": 1}}, 400),
            ({"model": "tiny", "input": "w1", "encoding_format": "hex"}, 400),
            ({"model": "tiny", "input": "w1", "dimensions": 8}, 400),
            ({"input": "w1"}, 400),
            ([], 400),
        ],
    )
    def test_bad_requests(self, service: Any, asked: Any, status: int) -> None:
        before = _bad(service)
        found, answer = _post(service.url, "/v1/embeddings", asked)
        assert found == status and answer["error"]["message"].endswith(".")
        assert _bad(service) == before + 1

    def test_texts_as_bytes_over_v2(self, service: Any, folder: Path) -> None:
        """Each is a request of its own, over HTTP and over gRPC."""
        texts = _texts(5, seed=3)
        right = _right(folder, texts)
        for name in ("text", "input_ids"):
            entry = {"name": name, "datatype": "BYTES", "shape": [5], "data": texts}
            status, answer = _post(service.url, "/v2/models/tiny/infer", {"inputs": [entry]})
            assert status == 200 and answer["outputs"][0]["shape"] == [5, 32]
            np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (5, 32)), right, rtol=0, atol=1e-5)
        for kind, url in (("http", service.url.removeprefix("http://")), ("grpc", service.grpc_url)):
            triton = pytest.importorskip(f"tritonclient.{kind}")
            with triton.InferenceServerClient(url) as client:
                given = triton.InferInput("text", [5], "BYTES")
                given.set_data_from_numpy(np.array([text.encode() for text in texts], np.object_))
                found = client.infer("tiny", [given]).as_numpy(answer["outputs"][0]["name"])
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("model", "data", "said"),
        [
            ("tiny", [""], "1 to"),
            ("tiny", [["a"], 3], "not texts"),
            ("plain", ["w1", "w1 w2"], "one by one"),
        ],
    )
    def test_texts_that_make_no_sense(self, service: Any, model: str, data: list[Any], said: str) -> None:
        before = _bad(service)
        entry = {"name": "text", "datatype": "BYTES", "shape": [len(data)], "data": data}
        status, answer = _post(service.url, f"/v2/models/{model}/infer", {"inputs": [entry]})
        assert status == 400 and said in answer["error"] and _bad(service) == before + 1

    def test_public_client(self, service: Any, folder: Path) -> None:
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(base_url=service.url + "/v1", api_key="none")
        answer = client.embeddings.create(model="tiny", input=["w5 w6 w7", "w1"])
        np.testing.assert_allclose([row.embedding for row in answer.data], _right(folder, ["w5 w6 w7", "w1"]), atol=1e-6)
        assert {model.id for model in client.models.list()} == {"tiny", "plain", "judge"}


class TestLengths:
    def test_outputs_are_as_long_as_the_inputs(self, service: Any, folder: Path, tmp_path: Path) -> None:
        client = shoal.Client(service.url)
        model = transformers.BertModel.from_pretrained(folder).eval()
        made = np.random.default_rng(1)
        asked = [made.integers(4, 64, (rows, length)) for rows, length in [(1, 3), (3, 7), (2, 8), (1, 21)]]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda ids: client.infer({"input_ids": ids}, model="plain")["last_hidden_state"], asked))
        for ids, answer in zip(asked, answers, strict=True):
            with torch.no_grad():
                right = model(torch.from_numpy(ids)).last_hidden_state.numpy()
            np.testing.assert_allclose(answer, right, rtol=0, atol=5e-6)

    def test_own_mask(self, service: Any) -> None:
        client = shoal.Client(service.url)
        ids = np.array([[2, 9, 3]])
        longer, mask = np.array([[2, 9, 3, 0, 0]]), np.array([[1, 1, 1, 0, 0]])
        alone = client.infer({"input_ids": ids}, model="judge")["logits"]
        padded = client.infer({"input_ids": longer, "attention_mask": mask}, model="judge")["logits"]
        assert alone.shape == (1, 3)
        np.testing.assert_allclose(padded, alone, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            ({"input_ids": np.ones((1, _LONGEST + 1), np.int64)}, "41 long; tiny takes 1 to 40"),
            ({"input_ids": np.ones((1, 0), np.int64)}, "0 long"),
            ({"input_ids": np.ones((1, 4), np.int64), "attention_mask": np.ones((1, 5), np.int64)}, "unequal lengths"),
            ({"attention_mask": np.ones((1, 5), np.int64)}, "input_ids is missing"),
        ],
    )
    def test_bad_lengths(self, service: Any, inputs: dict[str, np.ndarray], said: str) -> None:
        with pytest.raises(Exception, match=said):
            shoal.Client(service.url, retries=0).infer(inputs, model="tiny")


def test_folders_that_cannot_be_served(tmp_path: Path) -> None:
    for name, config, said in [
        ("writer", {"architectures": ["GPT2LMHeadModel"], "vocab_size": 9}, "not what writes text"),
        ("seer", {"architectures": ["ViTModel"]}, "encoders of text"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        with pytest.raises(TargetError, match=said):
            hugging_face.describe(tmp_path / name)
    odd = _folder(tmp_path / "odd")
    (odd / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(TargetError, match="pools by pooling_mode_max_tokens"):
        hugging_face.describe(odd)


@browser.needed
def test_the_page_compares_texts(service: Any, folder: Path, tmp_path: Path) -> None:
    with browser.browser(tmp_path) as page:
        page.open(service.url + "/")
        page.until("models.size === 3")
        page.evaluate("$('model').value = 'tiny'; pick(); $('texts').value = 'w1 w2 w3\\n\\nw1 w2 w4\\nw9'; $('go').click()")
        page.until("document.querySelectorAll('#answer .bar').length === 2")
        assert page.evaluate("document.querySelectorAll('#answer canvas').length") == 3
        shown = page.bars()
        vectors = _right(folder, ["w1 w2 w3", "w1 w2 w4", "w9"])
        right = vectors[1:] @ vectors[0] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1:], axis=1)
        assert [score for _, score in shown] == pytest.approx(sorted(right, reverse=True), abs=1e-3)
