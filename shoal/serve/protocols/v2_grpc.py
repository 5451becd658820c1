"""The Open Inference Protocol v2 over gRPC: its messages as the values that ``v2`` knows, and back. No server here.

Protocol: https://github.com/kserve/open-inference-protocol (inference_grpc), with Triton's model repository and statistics:
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from shoal.serve.protocols import proto, v2
from shoal.serve.refusals import Refusal
from shoal.serve.signature import ModelSignature, TensorSignature

CODES: Mapping[int, str] = MappingProxyType(
    {
        400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 405: "UNIMPLEMENTED",
        408: "DEADLINE_EXCEEDED", 413: "INVALID_ARGUMENT", 415: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED",
        499: "CANCELLED", 500: "INTERNAL", 502: "UNAVAILABLE", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
    }
)  # fmt: skip
"""The name of gRPC's code for the status of a refusal."""

_NUMBERS = MappingProxyType({"CANCELLED": 1, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5,
                             "PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "UNIMPLEMENTED": 12, "INTERNAL": 13,
                             "UNAVAILABLE": 14, "UNAUTHENTICATED": 16})  # fmt: skip
# Where numbers lie that are not raw bytes. FP16 and BF16 have no such place.
_CONTENTS = MappingProxyType(
    {
        "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
        "INT64": "int64_contents", "UINT8": "uint_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
    }
)  # fmt: skip
_RESPONSE = proto.message("inference.ModelInferResponse")
_STATUS, _RETRY = proto.message("google.rpc.Status"), proto.message("google.rpc.RetryInfo")


def decode(signature: ModelSignature, request: Any, max_rows: int) -> v2.InferRequest:
    """Read a ModelInferRequest; inputs lie in its ``raw_input_contents``, or each in its own ``contents``.

    Raises:
        Refusal: 400 for what makes no sense, 413 for more than ``max_rows`` rows.
    """
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise Refusal(400, f"There are {len(request.inputs)} inputs and {len(raws)} raw_input_contents; send one for each.")
    contents = {entry.name: entry.contents for entry in request.inputs if entry.HasField("contents")}
    if raws and contents:
        raise Refusal(400, "The request has both contents and raw_input_contents; send one of them.")
    said = v2.Said(
        inputs=[v2.Input(entry.name, list(entry.shape), entry.datatype) for entry in request.inputs],
        id=request.id,
        outputs=[v2.Output(entry.name, parameters(entry.parameters)) for entry in request.outputs],
        parameters=parameters(request.parameters),
    )
    raw_of = dict(zip((entry.name for entry in request.inputs), raws, strict=False))
    return v2.assemble(signature, said, _Message(raw_of, contents), max_rows)


class _Message:
    """Data that lie in a message, by the input's name: raw bytes, or typed contents."""

    def __init__(self, raws: Mapping[str, bytes], contents: Mapping[str, Any]) -> None:
        self._raws = raws
        self._contents = contents

    def numbers(self, spec: TensorSignature, entry: v2.Input, count: int) -> np.ndarray:
        raw = self._raws.get(entry.name)
        if raw is None:
            return _typed(spec, entry, count, self._contents.get(entry.name))
        return v2.from_binary(spec, entry, count, len(raw), memoryview(raw))

    def elements(self, entry: v2.Input, count: int) -> list[bytes]:
        raw = self._raws.get(entry.name)
        if raw is not None:
            return v2.elements_of(entry.name, memoryview(raw), count)
        contents = self._contents.get(entry.name)
        return [] if contents is None else list(contents.bytes_contents)


def _typed(spec: TensorSignature, entry: v2.Input, count: int, contents: Any) -> np.ndarray:
    """An input whose numbers are a list of the message."""
    field = _CONTENTS.get(spec.datatype)
    if field is None:
        raise Refusal(400, f"The input {spec.name} is {spec.datatype}, which only travels in raw_input_contents.")
    if contents is None:
        raise Refusal(400, f"The input {spec.name} has no data.")
    strange = [found.name for found, _ in contents.ListFields() if found.name != field]
    numbers = getattr(contents, field)
    if strange or len(numbers) != count:
        said = strange[0] if strange else f"{len(numbers)} numbers"
        raise Refusal(400, f"The input {spec.name} needs {count} numbers in {field} for its shape, not {said}.")
    wrong = Refusal(400, f"The contents of the input {spec.name} are not {spec.datatype} numbers.")
    values = np.fromiter(numbers, _KINDS[field], count)
    if spec.finite and values.dtype.kind == "f" and not np.isfinite(values).all():
        raise Refusal(400, f"The input {spec.name} has numbers that are not finite (NaN or infinite).")
    fitted = values if values.dtype == spec.dtype else v2.cast(values, spec, wrong)
    return fitted.reshape(entry.shape)


_KINDS = MappingProxyType({"bool_contents": "?", "int_contents": "i8", "int64_contents": "<i8", "uint_contents": "i8",
                           "fp32_contents": "<f4", "fp64_contents": "<f8"})  # fmt: skip


def parameters(given: Any) -> dict[str, Any]:
    """A message's parameters as values."""
    found = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(parameter, kind)
    return found


def numbers(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a model repository, which can be no fractions there: strings that are numbers as numbers ("0.1")."""
    found = dict(given)
    for name, value in given.items():
        for kind in (int, float):
            if isinstance(found[name], str):
                with contextlib.suppress(ValueError):
                    found[name] = kind(value)
    return found


def encode(signature: ModelSignature, request: v2.InferRequest, outputs: Sequence[np.ndarray], update: int = 0) -> Any:
    """The ModelInferResponse; ``outputs`` are in the signature's order, all of them go as raw bytes. ``update``: see ``v2``."""
    values = {spec.name: (spec, array) for spec, array in zip(signature.outputs, outputs, strict=True)}
    response = _RESPONSE(model_name=signature.name, model_version=signature.version, id=request.id)
    if update:
        response.parameters[v2.UPDATE].int64_param = update
    for name, _ in request.wanted:
        spec, array = values[name]
        response.outputs.add(name=name, datatype=spec.datatype, shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return response


def metadata(signature: ModelSignature) -> dict[str, Any]:
    """What ModelMetadata says; it has no place for alternative inputs, which ``config`` names."""
    return {key: value for key, value in signature.metadata().items() if key != "alternative_inputs"}


def config(signature: ModelSignature, max_rows: int) -> dict[str, Any]:
    """What ModelConfig says: as Triton, dims without the batch's."""
    said = signature.metadata()
    return {
        "name": signature.name, "platform": said["platform"], "max_batch_size": max_rows,
        "input": [_configured(spec) for spec in signature.inputs],
        "output": [_configured(spec) for spec in signature.outputs],
        "parameters": {name: {"string_value": msgspec.json.encode(said[name]).decode()}
                       for name in ("alternative_inputs",) if name in said},
    }  # fmt: skip


def _configured(spec: TensorSignature) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape[1:])}


def trailers(refusal: Refusal) -> tuple[tuple[str, str | bytes], ...]:
    """What goes with an error: when to try again, as HTTP's header and as google.rpc.RetryInfo have it."""
    if refusal.retry_after_s is None:
        return ()
    seconds = max(0.0, refusal.retry_after_s)
    info = _RETRY()
    info.retry_delay.seconds, info.retry_delay.nanos = int(seconds), int(seconds % 1 * 1e9)
    status = _STATUS(code=_NUMBERS[CODES[refusal.status]], message=refusal.sentence)
    detail = status.details.add()
    detail.type_url, detail.value = "type.googleapis.com/google.rpc.RetryInfo", info.SerializeToString()
    return ("retry-after", str(max(1, math.ceil(seconds)))), ("grpc-status-details-bin", status.SerializeToString())
