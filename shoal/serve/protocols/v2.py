"""The Open Inference Protocol v2: bodies of requests and responses, in JSON and with binary tensors behind the JSON.

Protocol: https://github.com/kserve/open-inference-protocol (inference_rest); binary tensors:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md. What a client sends is never
trusted: whatever is wrong with it is a ``Refusal`` with one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
import numpy as np
import simdjson

from shoal.errors import did_you_mean
from shoal.serve.refusals import Refusal
from shoal.serve.signature import DTYPES, ModelSignature, TensorSignature

_MOST_TIMEOUT_US = 3_600_000_000
_MOST_PRIORITY = 1 << 20
# What a request counts as that names no priority, the client's with its sign turned; 1 is the most urgent, as in Triton.
USUAL_PRIORITY = -100
_MOST_ID = 256
_MOST_DIMS = 8
_MOST_SIZE = 1 << 40
_AROUND_BYTES = 64 << 10
_BEFORE_BYTES = 1024
_DATA, _EMPTY = b'"data"', b"[]"
# A number in JSON, all its digits, and the spaces before it.
_ELEMENT_BYTES = 40
# Pictures are decoded by size: more of them than this are not worth sending at once.
_PICTURES_BYTES = 16 << 20
UPDATE = "shoal_update"
"""The parameter of an answer that says with which update of its run it was computed, where the model follows one."""
_EXTENSIONS = ["binary_tensor_data", "statistics", "model_repository"]


_NOTHING = msgspec.Raw()
# What tensors in JSON are made of, flat or nested. Without texts: NumPy would give each element the room of the longest.
_Numbers: Any = int | float | bool
for _ in range(_MOST_DIMS):
    _Numbers = int | float | bool | list[_Numbers]


class Input(msgspec.Struct):
    """One input in a request."""

    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = _NOTHING
    parameters: dict[str, Any] = {}


class Output(msgspec.Struct):
    """One output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class Said(msgspec.Struct):
    """A request as the client put it, before anything is known of the model."""

    inputs: list[Input]
    id: str = ""
    outputs: list[Output] = []
    parameters: dict[str, Any] = {}


class _Asked(msgspec.Struct):
    parameters: dict[str, Any] = {}



class Data(Protocol):
    """Where the data of a request's inputs lie; the shape of an entry was found to be right before either is asked."""

    def numbers(self, spec: TensorSignature, entry: Input, count: int) -> np.ndarray:
        """An input of ``count`` elements, in its shape."""
        ...

    def elements(self, entry: Input, count: int) -> list[bytes]:
        """``count`` texts or pictures."""
        ...


_DECODER = msgspec.json.Decoder(Said)
_ASKED = msgspec.json.Decoder(_Asked)
_NESTED = msgspec.json.Decoder(_Numbers)
_TEXTS = msgspec.json.Decoder(list[str | list[str]])
# Its memory is used again by the next request, so nothing of a request may outlive the function that reads it.
_NUMBERS = simdjson.Parser()


@dataclass(frozen=True)
class InferRequest:
    """What a client wants.

    Attributes:
        id: the client's own name for it, given back.
        inputs: in the signature's order, each ``[rows, ...]``; a binary one is a view of the body.
        rows: how many rows.
        wanted: (output, whether in binary) in the order in which to answer.
        timeout_s: seconds from its arrival, or None.
        priority: higher goes first; the client's, where 1 is the most urgent, with its sign turned.
        length: of its rows, where those have one of their own.
        uncached: has to be computed, whatever is remembered.
        own: asked by the service itself, to see whether it answers; counted apart.
        encoded: texts or pictures that the inputs are still to be made of.
        parts: what to compute instead, one by one, where rows have lengths of their own.
    """

    id: str
    inputs: tuple[np.ndarray, ...]
    rows: int
    wanted: tuple[tuple[str, bool], ...]
    timeout_s: float | None
    priority: int
    length: int = 0
    uncached: bool = False
    own: bool = False
    encoded: tuple[bytes, ...] = ()
    parts: tuple[InferRequest, ...] = ()

    def within(self, timeout_s: float) -> InferRequest:
        """The same, to be answered within so many seconds at the latest."""
        return replace(self, timeout_s=min(timeout_s, self.timeout_s or timeout_s))


def decode(
    signature: ModelSignature, body: bytes | memoryview, header_length: int | None, max_rows: int
) -> InferRequest:
    """Read a request; ``header_length``: bytes of its JSON where binary data follows, None where all of it is JSON.

    Raises:
        Refusal: 400 for what makes no sense, 413 for more than ``max_rows`` rows.
    """
    view = memoryview(body)
    if header_length is not None and header_length > len(view):
        raise Refusal(400, f"The header is said to be {header_length} bytes long and the body has {len(view)}.")
    request = _numbers_apart(body) if header_length is None and isinstance(body, bytes) else None
    if request is None:
        request = _parse(view if header_length is None else view[:header_length])
    data = _Body(view[len(view) if header_length is None else header_length :])
    found = assemble(signature, request, data, max_rows)
    if data.at != len(data.binary):
        raise Refusal(400, f"{len(data.binary)} bytes follow the header and the inputs account for {data.at}.")
    return found


def assemble(signature: ModelSignature, said: Said, data: Data, max_rows: int) -> InferRequest:
    """What a client wants, from what it said.

    Raises:
        Refusal: 400 for what makes no sense, 413 for more than ``max_rows`` rows.
    """
    if len(said.id) > _MOST_ID:
        raise Refusal(400, f"The id is longer than {_MOST_ID} characters.")
    for entry in said.inputs:
        # Before anything is made of it.
        if entry.shape and max_rows < entry.shape[0] <= _MOST_SIZE:
            raise Refusal(413, f"The request has {entry.shape[0]} rows and at most {max_rows} fit in one; send several.")
    wanted, (timeout_s, priority) = _wanted(signature, said), _urgency(said.parameters)
    if len(said.inputs) == 1 and said.inputs[0].datatype == "BYTES":
        encoded = _encoded(signature, said.inputs[0], data)
        return InferRequest(said.id, (), len(encoded), wanted, timeout_s, priority, encoded=encoded)
    inputs = _inputs(signature, said.inputs, data)
    rows = {len(array) for array in inputs}
    if len(rows) > 1:
        raise Refusal(400, f"The inputs have unequal numbers of rows ({', '.join(map(str, sorted(rows)))}).")
    (count,) = rows
    if count == 0:
        raise Refusal(400, "The request has no rows.")
    return InferRequest(said.id, inputs, count, wanted, timeout_s, priority, length_of(signature, inputs))


def longest_body(signature: ModelSignature, max_rows: int) -> int | None:
    """More bytes than any request for a model makes sense with, in JSON or binary; None where nobody can say.

    Reading numbers takes far longer than receiving them, so bodies are as short as they can be.
    """
    sizes = [spec.row_shape for spec in signature.inputs]
    least = _PICTURES_BYTES if signature.takes_pictures else 0
    elements = sum(math.prod(size) for size in sizes if size is not None)
    return None if None in sizes else max(least, _AROUND_BYTES + max_rows * elements * _ELEMENT_BYTES)


def length_of(signature: ModelSignature, inputs: Sequence[np.ndarray]) -> int:
    """The length that all inputs with a free length have, 0 where there are none. Refusal where they differ or are too long."""
    longest = signature.longest
    lengths = {array.shape[1] for spec, array in zip(signature.inputs, inputs, strict=True) if spec.free}
    if not lengths or longest is None:
        return 0
    if len(lengths) > 1:
        raise Refusal(400, f"The inputs have unequal lengths ({', '.join(map(str, sorted(lengths)))}).")
    (length,) = lengths
    if not 0 < length <= longest:
        raise Refusal(400, f"The rows are {length} long; {signature.name} takes 1 to {longest}.")
    return length


def encode(
    signature: ModelSignature, request: InferRequest, outputs: Sequence[np.ndarray], update: int = 0
) -> tuple[bytes, int | None]:
    """Return the body of a response, and the length of its JSON where binary data follows.

    ``outputs`` are in the signature's order. In JSON a number that is not finite becomes null, for JSON has no other word; BF16
    becomes the float it stands for. ``update``: so many updates of the run that the model follows are in the weights, 0 to say
    nothing of it.
    """
    values = {spec.name: (spec, array) for spec, array in zip(signature.outputs, outputs, strict=True)}
    described: list[dict[str, Any]] = []
    raws: list[bytes] = []
    for name, binary in request.wanted:
        spec, array = values[name]
        entry: dict[str, Any] = {"name": name, "datatype": spec.datatype, "shape": array.shape}
        if binary:
            raws.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            entry["data"] = _json_values(spec, array)
        described.append(entry)
    answer: dict[str, Any] = {"model_name": signature.name, "model_version": signature.version}
    if request.id:
        answer["id"] = request.id
    if update:
        answer["parameters"] = {UPDATE: update}
    answer["outputs"] = described
    header = msgspec.json.encode(answer)
    return (b"".join([header, *raws]), len(header)) if raws else (header, None)


def decode_parameters(body: bytes) -> dict[str, Any]:
    """The ``parameters`` of a request to the model repository; none where the body is empty."""
    if not body:
        return {}
    try:
        return _ASKED.decode(body).parameters
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal(400, 'The body is not {"parameters": {...}} in JSON.') from None


def error_body(sentence: str) -> bytes:
    """The body of an answer that is none."""
    return msgspec.json.encode({"error": sentence})


def server_metadata() -> dict[str, Any]:
    """What ``GET /v2`` says."""
    from shoal import __version__

    return {"name": "shoal", "version": __version__, "extensions": _EXTENSIONS}


class _Body:
    """Data of JSON, and binary ones behind it, ``at`` which of them the next begins."""

    def __init__(self, binary: memoryview) -> None:
        self.binary = binary
        self.at = 0

    def numbers(self, spec: TensorSignature, entry: Input, count: int) -> np.ndarray:
        size = entry.parameters.get("binary_data_size")
        if size is None:
            return _from_json(spec, entry, count)
        values = from_binary(spec, entry, count, size, self.binary[self.at :])
        self.at += size
        return values

    def elements(self, entry: Input, count: int) -> list[bytes]:
        size = entry.parameters.get("binary_data_size")
        if size is None:
            return _texts_of_json(entry)
        if not _is_whole(size) or not 0 <= size <= len(self.binary) - self.at:
            raise Refusal(400, f"The body ends within the input {entry.name}.")
        found = elements_of(entry.name, self.binary[self.at : self.at + size], count)
        self.at += size
        return found


def elements_of(name: str, raw: memoryview, count: int) -> list[bytes]:
    """``count`` elements as BYTES travel: four bytes with its length, little-endian, then itself. Refusal where it is not so."""
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        if len(found) == count:
            raise Refusal(400, f"The input {name} has more than the {count} elements of its shape.")
        size = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + size > len(raw):
            raise Refusal(400, f"The input {name} ends within its element {len(found)}.")
        found.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    return found


# -- reading -----------------------------------------------------------------------------------------------------


def _numbers_apart(body: bytes) -> Said | None:
    """A request with one flat list of numbers, which is most of its bytes; None for any other, to be read as a whole.

    The list is cut out and looked at by who makes an array of it, so it is read once: msgspec reads what it passes over.
    """
    at = body.find(_DATA, 0, _BEFORE_BYTES)
    start = body.find(b"[", at, at + _BEFORE_BYTES)
    end = body.find(b"]", start) + 1
    # Without strings in it, the list ends there if what is around it makes sense without it.
    if at < 0 or start < 0 or not end or body.find(b'"', start, end) >= 0:
        return None
    around = body[:start] + _EMPTY + body[end:]
    # The word could be written with escapes, or be there as another's, too.
    if len(around) > _AROUND_BYTES or around.count(_DATA) != 1 or b"\\" in around:
        return None
    try:
        said = _DECODER.decode(around)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if len(said.inputs) != 1 or bytes(said.inputs[0].data) != _EMPTY:
        return None
    said.inputs[0].data = msgspec.Raw(body[start:end])
    return said


def _parse(header: memoryview) -> Said:
    try:
        return _DECODER.decode(header)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"The request is not one of the protocol: {str(error).rstrip('.')}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"The request is not valid JSON: {str(error).rstrip('.')}.") from None
    except RecursionError:
        raise Refusal(400, "The JSON is nested too deep.") from None


def _inputs(signature: ModelSignature, given: Sequence[Input], data: Data) -> tuple[np.ndarray, ...]:
    specs = {spec.name: spec for spec in signature.inputs}
    found: dict[str, np.ndarray] = {}
    for entry in given:
        spec = specs.get(entry.name)
        if spec is None:
            near = did_you_mean(entry.name[:80], specs)
            raise Refusal(
                400, f'There is no input "{entry.name[:80]}".{near} {signature.name} takes {", ".join(specs)}.'
            )
        if entry.name in found:
            raise Refusal(400, f"The input {entry.name} is there twice.")
        found[entry.name] = data.numbers(spec, entry, _check_shape(spec, entry))
    missing = [name for name in specs if name not in found]
    for name in [name for name in missing if specs[name].absent is not None and found]:
        missing.remove(name)
        found[name] = _left_out(specs[name], found, specs)
    if missing:
        raise Refusal(400, f"The input {missing[0]} is missing.")
    return tuple(found[name] for name in specs)


def _encoded(signature: ModelSignature, entry: Input, data: Data) -> tuple[bytes, ...]:
    """The texts or pictures that are sent in place of the inputs."""
    takes = signature.encoded
    if takes is None or entry.name not in (takes["name"], signature.inputs[0].name):
        sent = "no BYTES" if takes is None else f"BYTES as {takes['name']}"
        raise Refusal(400, f"The input {entry.name[:80]} is BYTES; {signature.name} takes {sent}.")
    shape = entry.shape
    if len(shape) not in (1, 2) or shape[1:] not in ([], [1]) or not 0 <= shape[0] <= _MOST_SIZE:
        raise Refusal(400, f"The input {entry.name} has the shape {_short(shape[:_MOST_DIMS])}; BYTES have [rows] or [rows, 1].")
    if shape[0] == 0:
        raise Refusal(400, "The request has no rows.")
    found = data.elements(entry, shape[0])
    if len(found) != shape[0]:
        raise Refusal(400, f"The input {entry.name} has {len(found)} elements and the shape {shape}.")
    return tuple(found)


def _texts_of_json(entry: Input) -> list[bytes]:
    """Texts as they are; pictures are base64 there, for JSON has no bytes."""
    try:
        found = _TEXTS.decode(bytes(entry.data) or b"null")
        return [text.encode() for one in found for text in ([one] if isinstance(one, str) else one)]
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise Refusal(400, f"The data of the input {entry.name} are not texts of its shape.") from None


def _left_out(
    spec: TensorSignature, found: dict[str, np.ndarray], specs: dict[str, TensorSignature]
) -> np.ndarray:
    """What an input is that a client may leave out: the same number everywhere, in the shape of the others."""
    like = next((array for name, array in found.items() if specs[name].free), next(iter(found.values())))
    shape = (len(like), *(like.shape[1:2] if spec.free else ()), *spec.shape[2 if spec.free else 1 :])
    return np.full(shape, spec.absent, spec.dtype)


def _check_shape(spec: TensorSignature, entry: Input) -> int:
    """How many elements the shape stands for."""
    if entry.datatype != spec.datatype:
        raise Refusal(400, f"The input {spec.name} is {entry.datatype[:20]}; the model takes {spec.datatype}.")
    fits = len(entry.shape) == len(spec.shape) and all(
        0 <= given <= _MOST_SIZE and wanted in (-1, given) for given, wanted in zip(entry.shape, spec.shape, strict=True)
    )
    if not fits:
        said = _short(entry.shape[:_MOST_DIMS])
        raise Refusal(
            400, f"The input {spec.name} has the shape {said}; the model takes {list(spec.shape)}, -1 being any size."
        )
    return math.prod(entry.shape)


def from_binary(spec: TensorSignature, entry: Input, count: int, size: Any, rest: memoryview) -> np.ndarray:
    """The first ``size`` bytes of ``rest`` as an input of ``count`` elements; Refusal where they are none."""
    if entry.data:
        raise Refusal(400, f"The input {spec.name} has both data and binary data; send one of them.")
    if not isinstance(size, int) or isinstance(size, bool) or size != count * spec.dtype.itemsize:
        raise Refusal(
            400, f"The input {spec.name} needs {count * spec.dtype.itemsize} bytes for its shape, not {_short(size)}."
        )
    if size > len(rest):
        raise Refusal(400, f"The body ends within the input {spec.name}.")
    values = np.frombuffer(rest[:size], spec.dtype).reshape(entry.shape)
    if spec.finite and not finite(spec, values):
        raise Refusal(400, f"The input {spec.name} has numbers that are not finite (NaN or infinite).")
    return values


def finite(spec: TensorSignature, values: np.ndarray) -> bool:
    """Whether no number is NaN or infinite."""
    if spec.datatype == "BF16":
        return bool(((values & 0x7F80) != 0x7F80).all())
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _from_json(spec: TensorSignature, entry: Input, count: int) -> np.ndarray:
    raw = bytes(entry.data)
    if raw in (b"", b"null"):
        raise Refusal(400, f"The input {spec.name} has no data.")
    if spec.datatype == "BF16":
        raise Refusal(400, f"The input {spec.name} is BF16, which only travels in binary.")
    wrong = Refusal(
        400, f"The data of the input {spec.name} are not {spec.datatype} numbers of its shape {entry.shape[:10]}."
    )
    if len(raw) > _AROUND_BYTES + count * _ELEMENT_BYTES:
        raise wrong
    values = _flat_numbers(raw, spec)
    if values is None:
        try:
            values = np.array(_NESTED.decode(raw))
        except (ValueError, TypeError, OverflowError, RecursionError, msgspec.DecodeError):
            raise wrong from None
    # Flat or nested as the shape says: nothing between.
    if values.shape not in ((count,), tuple(entry.shape)) and not (count == 0 and values.size == 0):
        raise wrong
    return cast(values, spec, wrong).reshape(entry.shape)


def _flat_numbers(raw: bytes, spec: TensorSignature) -> np.ndarray | None:
    """The numbers of a flat list, straight into an array; None for anything else, which is then read with more care."""
    # One byte is found, or not, twenty times as fast as it is counted.
    if spec.dtype.kind not in "fiu" or raw[:1] != b"[" or raw.find(b"[", 1) >= 0:
        return None
    try:
        found = _NUMBERS.parse(raw)
        if not isinstance(found, simdjson.Array):
            return None
        if spec.dtype.kind == "f":
            return np.frombuffer(found.as_buffer(of_type="d"), np.float64)
        return np.frombuffer(found.as_buffer(of_type="i"), np.int64)
    except (ValueError, TypeError, RuntimeError):
        return None


def cast(values: np.ndarray, spec: TensorSignature, wrong: Refusal) -> np.ndarray:
    """The values as the model's datatype, where nothing is lost but the last digits of a fraction."""
    kind, wanted = values.dtype.kind, spec.dtype
    if values.size == 0:
        return np.zeros(values.shape, wanted)
    if wanted.kind == "b":
        if kind != "b":
            raise wrong
        return values
    if wanted.kind == "f":
        if kind not in "iuf":
            raise wrong
        with np.errstate(over="ignore"):
            fitted = values.astype(wanted)
        if not np.isfinite(fitted).all():
            raise Refusal(400, f"The input {spec.name} has a number beyond what {spec.datatype} holds.")
        return fitted
    if kind not in "iu":
        raise wrong
    limits = np.iinfo(wanted)
    if int(values.min()) < limits.min or int(values.max()) > limits.max:
        raise Refusal(
            400,
            f"The input {spec.name} has a number outside {limits.min} to {limits.max}, the range of {spec.datatype}.",
        )
    return values.astype(wanted)


def _wanted(signature: ModelSignature, request: Said) -> tuple[tuple[str, bool], ...]:
    names = [spec.name for spec in signature.outputs]
    every = _flag(request.parameters, "binary_data_output")
    if not request.outputs:
        return tuple((name, every) for name in names)
    found: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in names:
            near = did_you_mean(output.name[:80], names)
            raise Refusal(
                400, f'There is no output "{output.name[:80]}".{near} {signature.name} gives {", ".join(names)}.'
            )
        if output.name in found:
            raise Refusal(400, f"The output {output.name} is asked for twice.")
        if output.parameters.get("classification"):
            raise Refusal(400, "Classification of outputs is not supported; ask for the output itself.")
        found[output.name] = _flag(output.parameters, "binary_data") if "binary_data" in output.parameters else every
    return tuple(found.items())


def _flag(parameters: dict[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(400, f"The parameter {name} is true or false.")
    return value


def _urgency(parameters: dict[str, Any]) -> tuple[float | None, int]:
    """(seconds or None, priority)."""
    timeout, priority = parameters.get("timeout"), parameters.get("priority", 0)
    if timeout is not None and not (_is_whole(timeout) and 0 < timeout <= _MOST_TIMEOUT_US):
        raise Refusal(400, f"The parameter timeout is a whole number of microseconds from 1 to {_MOST_TIMEOUT_US}.")
    if not (_is_whole(priority) and 0 <= priority <= _MOST_PRIORITY):
        raise Refusal(400, f"The parameter priority is a whole number from 0 to {_MOST_PRIORITY}.")
    return (None if timeout is None else timeout / 1e6), (-priority or USUAL_PRIORITY)


def _short(value: Any) -> str:
    """A client's value for a sentence: whole numbers that nobody reads to their end are left out."""
    if isinstance(value, list):
        return "[" + ", ".join(_short(one) for one in value) + "]"
    if isinstance(value, int) and abs(value) > _MOST_SIZE:
        return "something far too large"
    return str(value)[:20]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json_values(spec: TensorSignature, array: np.ndarray) -> list[Any]:
    if spec.datatype == "BF16":
        array = (array.astype("<u4") << 16).view(DTYPES["FP32"])
    values: list[Any] = array.ravel().tolist()
    return values
