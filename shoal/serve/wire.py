"""HTTP and the Open Inference Protocol from the client's side: addresses, request bytes, responses, tensors. No sockets here.

Protocol: https://github.com/open-inference/open-inference-protocol (inference_rest) and Triton's binary tensor extension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np

from shoal.errors import RequestError

_MOST_HEAD_BYTES = 64 << 10
CHUNKED, UNTIL_CLOSED = -1, -2

DATATYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype("?"),
        **{f"{kind}INT{bits}": np.dtype(f"<{code}{bits // 8}")
           for kind, code in (("U", "u"), ("", "i")) for bits in (8, 16, 32, 64)},
        **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
        # NumPy has no bfloat16: the upper half of a float32's bits.
        "BF16": np.dtype("<u2"),
    }
)  # fmt: skip
"""The protocol's name of a data type -> how its elements lie in memory."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items() if name != "BF16"}


class BadResponse(Exception):
    """What answers does not speak HTTP, or not the protocol; one clause that says how."""


@dataclass(frozen=True)
class Address:
    """Where a service listens, and how it lets this client in.

    Attributes:
        prefix: what its paths begin with, without a slash at the end.
        tls: whether it speaks TLS.
        api_key: sent with each request.
    """

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    api_key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """http://host:port/prefix, or https://."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"

    @property
    def authority(self) -> str:
        """What the Host header holds."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_url(url: str, api_key: str | None = None) -> Address:
    """Return the address that ``http://host:port``, ``https://…`` or ``host:port`` names; RequestError where it names none."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise RequestError("An API key is printable ASCII characters without spaces; give it as it stands in its file.")
    example = "write it as in http://127.0.0.1:8000"
    text = url.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise RequestError(f"{url!r} is no address of a service; {example}.") from None
    if parts.scheme not in ("http", "https"):
        raise RequestError(f"{url} begins with {parts.scheme}://, but only http:// and https:// are spoken here; {example}.")
    if not host or any(c.isspace() for c in text) or parts.query or parts.fragment or parts.username is not None:
        raise RequestError(f"{url!r} is no address of a service; {example}.")
    tls = parts.scheme == "https"
    return Address(host, (443 if tls else 80) if port is None else port, parts.path.rstrip("/"), tls, api_key)


def model_path(model: str, rest: str = "") -> str:
    """Return the path of a model: /v2/models/NAME/rest."""
    return f"/v2/models/{quote(model, safe='')}" + (f"/{rest}" if rest else "")


def render(address: Address, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a whole request that keeps its connection."""
    lines = [f"{method} {address.prefix}{path} HTTP/1.1", f"Host: {address.authority}"]
    if address.api_key is not None:
        lines.append(f"Authorization: Bearer {address.api_key}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


# -- responses ---------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """The beginning of a response: its body's first byte is at ``start``, ``text`` is the head in lower case."""

    status: int
    start: int
    length: int
    keep_alive: bool
    text: bytes


def read_head(data: bytes) -> Head | None:
    """Return the head that ``data`` begins with, None where it is not whole yet; BadResponse where it cannot be one."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > _MOST_HEAD_BYTES or not (data.startswith(b"HTTP/1.") or b"HTTP/1.".startswith(data[:7])):
            raise BadResponse("it does not speak HTTP/1.1")
        return None
    text = data[: end + 2].lower()
    if not text.startswith(b"http/1.") or not text[9:12].isdigit():
        raise BadResponse("it does not speak HTTP/1.1")
    status = int(text[9:12])
    at = text.find(b"\r\ncontent-length:")
    if at >= 0:
        said = text[at + 17 : text.index(b"\r\n", at + 17)].strip()
        if not said.isdigit():
            raise BadResponse("its Content-Length is no number")
        length = int(said)
    elif status in (204, 304) or status < 200:
        length = 0
    else:
        length = CHUNKED if b"\r\ntransfer-encoding:" in text else UNTIL_CLOSED
    keep_alive = length != UNTIL_CLOSED and b"\r\nconnection: close" not in text and not text.startswith(b"http/1.0")
    return Head(status, end + 4, length, keep_alive, text)


class Response:
    """One response, read from the pieces in which it arrives."""

    def __init__(self) -> None:
        self.status = 0
        self.keep_alive = False
        self.body = b""
        self._head = b""
        self._length: int | None = None
        self._buffer = bytearray()

    def feed(self, data: bytes) -> bool:
        """Take in what has arrived; return whether the response is whole. BadResponse where it cannot be read."""
        self._buffer += data
        if self._length is None:
            head = read_head(bytes(self._buffer))
            if head is None:
                return False
            del self._buffer[: head.start]
            self.status, self._length, self.keep_alive, self._head = head.status, head.length, head.keep_alive, head.text
        if self._length == CHUNKED:
            return self._read_chunks()
        if self._length >= 0 and len(self._buffer) >= self._length:
            self.body = bytes(self._buffer[: self._length])
            return True
        return False

    def end(self) -> bool:
        """The connection has ended; return whether that makes the response whole."""
        if self._length != UNTIL_CLOSED:
            return False
        self.body = bytes(self._buffer)
        return True

    def header(self, name: str) -> str | None:
        """Return a header's value, in lower case."""
        before, found, rest = self._head.partition(f"\r\n{name.lower()}:".encode())
        return rest.partition(b"\r\n")[0].strip().decode("latin-1") if found else None

    def _read_chunks(self) -> bool:
        # Read from the beginning each time: what we talk to sends a length, except for the odd proxy.
        raw, at = self._buffer, 0
        parts: list[bytes] = []
        while (line := raw.find(b"\r\n", at)) >= 0:
            try:
                size = int(bytes(raw[at:line]).partition(b";")[0], 16)
            except ValueError:
                raise BadResponse("a chunk of its body has no length") from None
            if size == 0:
                if len(raw) < line + 4:
                    return False
                self.body = b"".join(parts)
                return True
            parts.append(bytes(raw[line + 2 : line + 2 + size]))
            at = line + 4 + size
            if at > len(raw):
                return False
        return False


def sentence_of(response_body: bytes, status: int) -> str:
    """Return what an answer that is none says: the protocol's ``error``, else the status."""
    try:
        said = json.loads(response_body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"The service answered with the status {status}."
    return " ".join(str(said).split()) or f"The service answered with the status {status}."


# -- tensors -----------------------------------------------------------------------------------------------------


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16 (ties to even) of each float, as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(bits.view("<f4")), 0x7FC0, rounded).astype("<u2")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 that each bfloat16 stands for."""
    return (bits.astype("<u4") << 16).view("<f4")


def as_sent(value: Any, datatype: str | None) -> tuple[str, np.ndarray]:
    """Return (data type, array) to send for an input; ``datatype`` is what the model wants, None where nobody knows.

    Only what NumPy calls a safe cast is done (and float32 to BF16); else the array goes as it is, for the service to judge.
    """
    array = np.asarray(value)
    wanted = DATATYPES.get(datatype or "")
    if datatype == "BF16":
        if array.dtype != np.uint16 and np.can_cast(array.dtype, np.float32, "same_kind"):
            array = to_bf16(array)
        if array.dtype == np.uint16:
            return "BF16", np.ascontiguousarray(array, "<u2")
    elif wanted is not None and datatype is not None and np.can_cast(array.dtype, wanted, "safe"):
        return datatype, np.ascontiguousarray(array, wanted)
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        known = ", ".join(DATATYPES)
        raise RequestError(f"An input of the type {array.dtype} cannot be sent; the types of the protocol are {known}.")
    return name, np.ascontiguousarray(array, DATATYPES[name])


def encode_infer(
    inputs: Sequence[tuple[str, str, np.ndarray]], parameters: Mapping[str, Any], binary: bool = True
) -> tuple[bytes, dict[str, str]]:
    """Return (body, headers) of an inference request; ``inputs`` are (name, data type, array)."""
    described: list[dict[str, Any]] = []
    raws: list[bytes] = []
    for name, datatype, array in inputs:
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype}
        if binary:
            raws.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            values = from_bf16(array) if datatype == "BF16" else array
            entry["data"] = values.ravel().tolist()
        described.append(entry)
    body: dict[str, Any] = {"inputs": described}
    if binary or parameters:
        body["parameters"] = {**({"binary_data_output": True} if binary else {}), **parameters}
    header = json.dumps(body, separators=(",", ":")).encode()
    if not binary:
        return header, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return b"".join([header, *raws]), headers


def decode_infer(response: Response) -> dict[str, np.ndarray]:
    """Return the outputs of an inference by name; BadResponse where the answer is not one of the protocol's."""
    said = response.header("inference-header-content-length")
    try:
        end = len(response.body) if said is None else int(said)
        described = json.loads(response.body[:end])["outputs"]
        outputs = {}
        for entry in described:
            size = (entry.get("parameters") or {}).get("binary_data_size")
            raw = None if size is None else response.body[end : end + size]
            end += size or 0
            outputs[entry["name"]] = _tensor(entry, raw)
        return outputs
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadResponse(f"its answer to an inference cannot be read ({type(error).__name__})") from error


def _tensor(entry: Mapping[str, Any], raw: bytes | None) -> np.ndarray:
    datatype, shape = entry["datatype"], tuple(entry["shape"])
    dtype = DATATYPES[datatype]
    if raw is None:
        values = np.asarray(entry["data"], np.dtype("<f4") if datatype == "BF16" else dtype)
        return values.reshape(shape)
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError("an output is cut off")
    # A copy: the array may be written to, and does not keep the whole body alive.
    values = np.frombuffer(raw, dtype).reshape(shape)
    return from_bf16(values) if datatype == "BF16" else values.copy()
