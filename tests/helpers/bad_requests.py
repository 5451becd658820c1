"""Requests that make no sense, as bytes: a corpus written by hand, and what chance makes of good ones.

They are for the model of ``bundles.odd``: UINT8 rows of 3 × 4.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

RECORDED = Path(__file__).parents[1] / "corpus" / "serve"
PATH = "/v2/models/odd/infer"


@dataclass(frozen=True)
class Bad:
    """One request (or several on one connection).

    Attributes:
        name: what is wrong with it.
        raw: what to send; ``times`` times ``tail`` after it.
        cut: whether HTTP itself is broken, so that the connection may end without an answer.
        counted: whether it comes to the model, and has to be counted as invalid there.
        maybe_good: chance may have left it a good one.
        answers: how many there have to be, where it is several.
    """

    name: str
    raw: bytes
    cut: bool = False
    counted: bool = False
    maybe_good: bool = False
    answers: int = 1
    tail: bytes = b""
    times: int = 0


def good() -> dict[str, Any]:
    """A request that the model answers."""
    return {"inputs": [{"name": "input", "datatype": "UINT8", "shape": [1, 3, 4], "data": list(range(12))}]}


def post(body: bytes, *headers: str, path: str = PATH, length: int | None = None) -> bytes:
    """A request as it is sent."""
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _json(**changes: Any) -> bytes:
    return post(json.dumps({**good(), **changes}).encode())


def _input(**changes: Any) -> bytes:
    return post(json.dumps({"inputs": [{**good()["inputs"][0], **changes}]}).encode())


def _binary(size: Any, sent: int, header: int | None = None, datatype: str = "UINT8", shape: Any = (1, 3, 4)) -> bytes:
    entry = {"name": "input", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [entry]}).encode()
    said = len(text) if header is None else header
    return post(text + bytes(sent), f"Inference-Header-Content-Length: {said}")


def corpus() -> list[Bad]:
    """The hand-written ones, and those that were recorded."""
    told = [("recorded " + path.stem, path.read_bytes()) for path in sorted(RECORDED.glob("*.bin"))]
    return [*_of_the_model(), *_of_http(), *(Bad(name, raw, cut=True, maybe_good=True) for name, raw in told)]


def _of_the_model() -> Iterator[Bad]:
    deep = b'{"inputs":[{"name":"input","datatype":"UINT8","shape":[1,3,4],"data":' + b"[" * 50_000 + b"]" * 50_000 + b"}]}"
    huge = "1" + "0" * 4000
    cases = {
        "wrong shape": _input(shape=[1, 4, 3]), "negative shape": _input(shape=[-1, 3, 4]), "no shape": _input(shape=[]),
        "shape of texts": _input(shape=["1", 3, 4]), "enormous shape": _input(shape=[10**400, 3, 4]),
        "shape of fractions": _input(shape=[1.5, 3, 4]), "long shape": _input(shape=[1] * 10_000),
        "wrong datatype": _input(datatype="FP32"), "no datatype": _input(datatype="🐟" * 300),
        "wrong name": _input(name="output"), "long name": _input(name="x" * 60_000), "null name": _input(name=None),
        "too few": _input(data=[1, 2]), "ragged": _input(data=[[1, 2], [3]]), "above": _input(data=[256] * 12),
        "below": _input(data=[-1] * 12), "fractions": _input(data=[0.5] * 12), "texts": _input(data=["a"] * 12),
        "one long text": _input(data=["a" * 40_000, *range(11)]), "nothing": _input(data=None), "object": _input(data={"a": 1}),
        "truths": _input(data=[True] * 12), "enormous number": _input(data=[10**300] * 12),
        "no rows": _input(shape=[0, 3, 4], data=[]), "oversized batch": _input(shape=[5000, 3, 4]),
        "data of one": _input(data=1), "both": _input(parameters={"binary_data_size": 12}),
        "no inputs": _json(inputs=[]), "twice": _json(inputs=good()["inputs"] * 2), "many": _json(inputs=good()["inputs"] * 500),
        "null inputs": _json(inputs=None), "unknown output": _json(outputs=[{"name": "nothing"}]),
        "output twice": _json(outputs=[{"name": "output"}] * 2), "long id": _json(id="i" * 50_000), "id": _json(id=7),
        "timeout": _json(parameters={"timeout": -5}), "timeout text": _json(parameters={"timeout": "soon"}),
        "priority": _json(parameters={"priority": 1e9}), "parameters": _json(parameters=[]),
        "no JSON": post(b"{"), "empty": post(b""), "null": post(b"null"), "list": post(b"[1]"),
        "not UTF-8": post(b'{"id":"\xff"}'),
        "NaN": post(b'{"inputs":[{"name":"input","datatype":"UINT8","shape":[1,3,4],"data":[NaN]}]}'),
        "infinite": post(b'{"inputs":[{"name":"input","datatype":"UINT8","shape":[1,3,4],"data":[1e999]}]}'),
        "deep": post(deep), "deep unknown": post(b'{"x":' + b'{"a":' * 40_000 + b"1" + b"}" * 40_000 + b"}"),
        "long number": post(f'{{"inputs":[],"parameters":{{"timeout":{huge}}}}}'.encode()),
        "zeros": post(b"\0" * 1000), "gzip": post(b"\x1f\x8b", "Content-Encoding: gzip"),
        "truncated binary": _binary(12, 5), "more binary": _binary(12, 13), "negative binary": _binary(-12, 12),
        "enormous binary": _binary(10**400, 12), "binary text": _binary("12", 12), "binary truth": _binary(True, 1),
        "binary shape": _binary(0, 0, shape=(10**9, 0, 4)), "header length": _binary(12, 12, header=5),
        "header length long": _binary(12, 12, header=10**9), "header length digits": _binary(12, 12, header=10**30),
        "header length twice": post(b"{}", "Inference-Header-Content-Length: 2", "Inference-Header-Content-Length: 1"),
    }  # fmt: skip
    for name, raw in cases.items():
        yield Bad(name, raw, counted=True)


def _of_http() -> Iterator[Bad]:
    body = json.dumps(good()).encode()
    chunked = f"POST {PATH} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n".encode()
    mega = b"x" * (1 << 20)
    yield Bad("100 MB announced and sent", post(b"", length=100 << 20), counted=True, tail=mega, times=100)
    yield Bad("100 MB announced", post(b"", length=100 << 20), counted=True)
    yield Bad("100 MB of chunks", chunked + b"\r\n", counted=True, tail=b"100000\r\n" + mega + b"\r\n", times=100, cut=True)
    yield Bad("expects to be told to go on", post(b"", "Expect: 100-continue", length=100 << 20), counted=True)
    yield Bad("chunks of nothing", chunked + b"\r\n0\r\n\r\n", counted=True)
    yield Bad("endless headers behind the body", chunked + b"\r\n1\r\n{\r\n0\r\n", cut=True, tail=b"A: b\r\n" * 10_000, times=20)
    yield Bad("one endless header behind it", chunked + b"\r\n1\r\n{\r\n0\r\nA: ", cut=True, tail=b"a" * 65_536, times=200)
    yield Bad("chunk extensions", chunked + b"\r\n1;" + b"x" * 300_000, cut=True)
    yield Bad("two requests", post(b"{") + post(b"["), counted=True, answers=2)
    yield Bad("a good one in front", post(b"{") * 20 + b"\x16\x03\x01", cut=True, counted=True, answers=20)
    yield Bad("many ahead", b"GET /nothing HTTP/1.1\r\n\r\n" * 5000, cut=True, answers=0)
    yield Bad("long path", f"GET /{'a' * 60_000} HTTP/1.1\r\n\r\n".encode())
    yield Bad("endless path", b"GET /", cut=True, tail=b"a" * 65_536, times=100)
    yield Bad("long header", post(b"{}", "X: " + "y" * 60_000))
    yield Bad("endless header", b"GET / HTTP/1.1\r\nX: ", cut=True, tail=b"a" * 65_536, times=100)
    yield Bad("many headers", post(b"{}", *(f"X{k}: 1" for k in range(300))))
    for name, raw in {
        "unknown model": post(body, path="/v2/models/even/infer"),
        "unknown version": post(body, path=f"{PATH[:-6]}/versions/9/infer"),
        "percent": post(body, path="/v2/models/%2e%2e%2f%00%ff/infer"), "dots": post(body, path="/v2/models/../../etc/passwd"),
        "absolute": post(body, path="http://elsewhere/v2/models/even/infer"), "no such path": post(body, path="/"),
        "method": b"DELETE /v2/models/odd HTTP/1.1\r\n\r\n", "TRACE": b"TRACE / HTTP/1.1\r\n\r\n",
        "OPTIONS": b"OPTIONS * HTTP/1.1\r\n\r\n",
        "old": b"POST /nothing HTTP/1.0\r\n\r\n", "long model": post(body, path=f"/v2/models/{'o' * 20_000}/infer"),
        "embeddings": post(b'{"input": "a", "model": "odd"}', path="/v1/embeddings"),
        "embeddings of nothing": post(b"[]", path="/v1/embeddings"), "load": post(b"{", path="/v2/repository/models/odd/load"),
        "load nothing": post(b"", path="/v2/repository/models/even/load"), "get": b"GET /v2/models/odd/infer HTTP/1.1\r\n\r\n",
        "upgrade": b"GET /nothing HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    }.items():  # fmt: skip
        yield Bad(name, raw)
    for name, raw in {
        "garbage": bytes(range(256)), "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(150), "empty lines": b"\r\n" * 5000,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "CONNECT": b"CONNECT a:80 HTTP/1.1\r\n\r\n",
        "bad method": b"BREW / HTTP/1.1\r\n\r\n",
        "bad version": b"GET / HTTP/9.9\r\n\r\n", "no version": b"GET /nowhere\r\n\r\n", "nul": b"GET /\0 HTTP/1.1\r\n\r\n",
        "lengths": post(b"{}", "Content-Length: 3"), "lengths of two kinds": post(b"{}", "Transfer-Encoding: chunked"),
        "negative length": post(b"", length=-1), "enormous length": post(b"", length=10**30),
        "folded": b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", "no colon": b"GET / HTTP/1.1\r\nnothing\r\n\r\n",
        "bad chunk": chunked + b"\r\nzz\r\n", "negative chunk": chunked + b"\r\n-1\r\n",
        "enormous chunk": chunked + b"\r\n" + b"f" * 30 + b"\r\n",
        "cut in the head": b"POST /v2/mod", "cut in a header": post(body)[:40],
        "absolute nothing": b"GET http://here HTTP/1.1\r\n\r\n",
        "cut in the body": post(body[:20], length=len(body)), "nothing at all": b"",
    }.items():  # fmt: skip
        yield Bad(name, raw, cut=True)


# -- by chance ---------------------------------------------------------------------------------------------------


def mutated(count: int, seed: int) -> Iterator[Bad]:
    """What becomes of the corpus, and of good requests, when bytes of them change."""
    chance = random.Random(seed)
    seeds = [bad.raw for bad in corpus() if bad.raw and not bad.times and len(bad.raw) < 5000]
    seeds += [post(json.dumps(good()).encode())] * (len(seeds) // 3) + [_binary(12, 12)] * (len(seeds) // 3)
    for number in range(count):
        raw = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            _change(raw, chance, seeds)
        yield Bad(f"mutation {number} of {seed}", bytes(raw), cut=True, maybe_good=True, answers=0)


def _change(raw: bytearray, chance: random.Random, others: list[bytes]) -> None:
    at = chance.randrange(len(raw) + 1)
    match chance.randrange(6):
        case 0:
            raw[at : at + 1] = chance.randbytes(1)
        case 1:
            del raw[at : at + chance.choice((1, 2, 8, 64))]
        case 2:
            raw[at:at] = chance.choice((b"\r\n", b"\0", b'"', b"[", b"}", b"-", b"9" * 30, b"\xff\xfe", b": ", b"chunked"))
        case 3:
            raw[at:at] = raw[at : at + chance.choice((4, 32, 256))]
        case 4:
            other = chance.choice(others)
            raw[at:] = other[chance.randrange(len(other)) :]
        case _:
            digits = [k for k, byte in enumerate(raw) if chr(byte).isdigit()]
            if digits:
                raw[chance.choice(digits)] = chance.choice(b"0123456789")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
_ANYTHING = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8
)
_KEYS = ("inputs", "id", "outputs", "parameters")
_INPUT_KEYS = ("name", "shape", "datatype", "data", "parameters")


@st.composite
def _odd_json(draw: Any) -> bytes:
    """A good request in which anything may stand in place of something."""
    request = good()
    for key in draw(st.lists(st.sampled_from(_INPUT_KEYS), max_size=2)):
        request["inputs"][0][key] = draw(_ANYTHING)
    for key in draw(st.lists(st.sampled_from(_KEYS), max_size=1)):
        request[key] = draw(_ANYTHING)
    return json.dumps(request).encode()


def generated(count: int) -> list[Bad]:
    """What hypothesis thinks of, the same each time."""
    found: list[Bad] = []

    @settings(max_examples=count, database=None, derandomize=True, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(_odd_json())
    def take(body: bytes) -> None:
        found.append(Bad(f"generated {len(found)}", post(body), maybe_good=True))

    take()
    return found
