from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shoal.serve import wire

BODY = b"0123456789" * 3


def test_addresses() -> None:
    assert wire.parse_url("http://127.0.0.1:8000/") == wire.Address("127.0.0.1", 8000)
    assert wire.parse_url("localhost:81/a/b/").url == "http://localhost:81/a/b"
    assert wire.parse_url("http://[::1]:9").authority == "[::1]:9" and wire.parse_url("http://a").port == 80


@given(st.lists(st.integers(1, 200), max_size=8), st.sampled_from(["length", "chunked", "closed"]))
def test_a_response_is_the_same_in_whatever_pieces_it_comes(cuts: list[int], kind: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nX-Some: Thing\r\n"
    data = {
        "length": head + b"Content-Length: 30\r\n\r\n" + BODY,
        "chunked": head + b"transfer-encoding: chunked\r\n\r\n7\r\n0123456\r\n17;x=y\r\n" + BODY[7:] + b"\r\n0\r\n\r\n",
        "closed": head + b"\r\n" + BODY,
    }[kind]
    places = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    response = wire.Response()
    whole = [response.feed(data[a:b]) for a, b in zip(places, places[1:], strict=False)]
    assert whole[:-1] == [False] * (len(whole) - 1)
    assert whole[-1] == (kind != "closed") and (whole[-1] or response.end())
    assert (response.status, response.body, response.header("x-some")) == (200, BODY, "thing")
    assert response.keep_alive == (kind != "closed") and response.header("x-other") is None


@pytest.mark.parametrize(
    "data", [b"SSH-2.0\r\n\r\n", b"SSH-2.0 and", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"]
)
def test_what_is_no_response_is_found_out(data: bytes) -> None:
    with pytest.raises(wire.BadResponse):
        wire.read_head(data)


def test_the_head_says_whether_the_connection_stays() -> None:
    def stays(text: str) -> bool:
        found = wire.read_head(f"{text}\r\nContent-Length: 0\r\n\r\n".encode())
        assert found is not None
        return found.keep_alive

    assert stays("HTTP/1.1 200 OK") and not stays("HTTP/1.1 200 OK\r\nConnection: Close") and not stays("HTTP/1.0 200 OK")
    assert wire.read_head(b"HTTP/1.1 2") is None and wire.read_head(b"HT") is None


@given(arrays.arrays(np.float32, 20, elements=st.floats(width=32)))
def test_bf16_rounds_as_torch_does(values: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        found = wire.from_bf16(wire.to_bf16(values))
    np.testing.assert_array_equal(found, torch.from_numpy(values.copy()).bfloat16().float().numpy())


def test_inputs_are_cast_only_where_nothing_is_lost() -> None:
    assert wire.as_sent(np.zeros(2, np.float16), "FP32")[0] == "FP32"
    assert wire.as_sent(np.zeros(2, np.float64), "FP32")[0] == "FP64"
    assert wire.as_sent(np.zeros(2, np.int64), "UINT8")[0] == "INT64"
    assert wire.as_sent(np.zeros(2, ">f4"), None)[1].dtype == np.dtype("<f4")
    datatype, bits = wire.as_sent(np.float32([1.0, -2.0]), "BF16")
    assert datatype == "BF16" and bits.tolist() == [0x3F80, 0xC000]
    assert wire.as_sent(bits, "BF16")[1] is not None and wire.as_sent(bits, "BF16")[0] == "BF16"
    assert wire.as_sent(bits, "UINT16")[0] == "UINT16"
