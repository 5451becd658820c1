"""Messages of gRPC, read and written; tritonclient's own messages are the yardstick."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.protocols import proto, v2_grpc
from shoal.serve.refusals import Refusal
from shoal.serve.signature import DTYPES, ModelSignature, TensorSignature

_REQUEST = proto.message("inference.ModelInferRequest")


def _signature(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 3)) -> ModelSignature:
    return ModelSignature("m", (TensorSignature("x", datatype, shape),), (TensorSignature("y", datatype, shape),))


def _request(shape: tuple[int, ...], datatype: str = "FP32", **more: Any) -> Any:
    return _REQUEST(model_name="m", inputs=[{"name": "x", "datatype": datatype, "shape": shape}], **more)


def test_the_messages_are_those_of_tritonclient() -> None:
    """Same names, numbers and kinds, field by field, for all that shoal knows."""
    theirs = pytest.importorskip("tritonclient.grpc").service_pb2.DESCRIPTOR.pool

    def same(ours: Any, other: Any) -> None:
        for field in ours.fields:
            found = other.fields_by_number[field.number]
            facts = [(f.name, f.type, f.is_repeated, bool(f.containing_oneof)) for f in (field, found)]
            assert facts[0] == facts[1], f"{ours.full_name}: {facts}"
        for nested in ours.nested_types:
            same(nested, other.nested_types_by_name[nested.name])

    file = proto.POOL.FindFileByName("open_inference.proto")
    for name, message in file.message_types_by_name.items():
        same(message, theirs.FindMessageTypeByName(f"inference.{name}"))
    kinds = file.enum_types_by_name["DataType"]
    assert {v.name: v.number for v in kinds.values} == {
        v.name: v.number for v in theirs.FindEnumTypeByName("inference.DataType").values
    }
    methods = theirs.FindServiceByName(proto.SERVICE).methods_by_name
    for method in proto.POOL.FindServiceByName(proto.SERVICE).methods:
        assert method.input_type.full_name == methods[method.name].input_type.full_name


@given(st.sampled_from([name for name in DTYPES if name not in ("FP16", "BF16")]), st.integers(1, 4), st.integers(0, 99))
def test_raw_and_typed_contents_are_the_same(datatype: str, rows: int, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 100, (rows, 3)).astype(DTYPES[datatype])
    raw = _request(array.shape, datatype, raw_input_contents=[array.tobytes()])
    typed = _request(array.shape, datatype)
    getattr(typed.inputs[0].contents, v2_grpc._CONTENTS[datatype]).extend(array.ravel().tolist())
    for request in (raw, typed):
        found = v2_grpc.decode(_signature(datatype), request, 8)
        assert found.inputs[0].dtype == DTYPES[datatype]
        np.testing.assert_array_equal(found.inputs[0], array)


def test_parameters() -> None:
    request = _request((1, 3), raw_input_contents=[bytes(12)], id="abc")
    request.parameters["timeout"].int64_param = 250_000
    request.parameters["priority"].uint64_param = 2
    found = v2_grpc.decode(_signature(), request, 8)
    assert (found.id, found.timeout_s, found.priority) == ("abc", 0.25, -2)
    assert found.within(0.1).timeout_s == 0.1 and found.within(1.0).timeout_s == 0.25


def test_outputs_go_as_raw_bytes() -> None:
    request = _request((2, 3), raw_input_contents=[bytes(24)], id="abc", outputs=[{"name": "y"}])
    found = v2_grpc.decode(_signature(), request, 8)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    answer = v2_grpc.encode(_signature(), found, [values])
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "1", "abc")
    assert list(answer.outputs[0].shape) == [2, 3] and answer.raw_output_contents[0] == values.tobytes()


class TestBadRequests:
    @pytest.mark.parametrize(
        "more, words",
        [
            ({}, "has no data"),
            ({"raw_input_contents": [bytes(8)]}, "needs 12 bytes"),
            ({"raw_input_contents": [bytes(12), b""]}, "1 inputs and 2 raw_input_contents"),
            ({"raw_input_contents": [np.full(3, np.nan, np.float32).tobytes()]}, "not finite"),
            ({"raw_input_contents": [bytes(12)], "outputs": [{"name": "z"}]}, "no output"),
            ({"raw_input_contents": [bytes(12)], "id": "i" * 300}, "The id is longer"),
        ],
    )
    def test_one_sentence(self, more: dict[str, Any], words: str) -> None:
        with pytest.raises(Refusal, match=words) as refused:
            v2_grpc.decode(_signature(), _request((1, 3), **more), 8)
        assert refused.value.status == 400

    @pytest.mark.parametrize(
        "datatype, field, values, words",
        [
            ("FP32", "fp32_contents", [1.0, 2.0], "3 numbers in fp32_contents"),
            ("FP32", "fp32_contents", [1.0, 2.0, float("inf")], "not finite"),
            ("FP32", "int_contents", [1, 2, 3], "not int_contents"),
            ("INT8", "int_contents", [1, 2, 300], "outside -128 to 127"),
            ("FP16", "fp32_contents", [1.0, 2.0, 3.0], "only travels in raw_input_contents"),
        ],
    )
    def test_typed_contents(self, datatype: str, field: str, values: list[Any], words: str) -> None:
        request = _request((1, 3), datatype)
        getattr(request.inputs[0].contents, field).extend(values)
        with pytest.raises(Refusal, match=words):
            v2_grpc.decode(_signature(datatype), request, 8)

    def test_too_many_rows(self) -> None:
        with pytest.raises(Refusal) as refused:
            v2_grpc.decode(_signature(), _request((9, 3), raw_input_contents=[bytes(108)]), 8)
        assert refused.value.status == 413

    @given(st.binary(max_size=200))
    def test_any_bytes_are_read_or_refused(self, raw: bytes) -> None:
        from google.protobuf.message import DecodeError

        try:
            message = _REQUEST.FromString(raw)
        except DecodeError:
            return
        with pytest.raises(Refusal):
            v2_grpc.decode(_signature(), message, 8)


def test_an_error_says_when_to_try_again() -> None:
    assert v2_grpc.trailers(Refusal(400, "No.")) == ()
    (name, seconds), (details, raw) = v2_grpc.trailers(Refusal(429, "Later.", 1.25))
    assert (name, seconds, details) == ("retry-after", "2", "grpc-status-details-bin")
    status = proto.message("google.rpc.Status").FromString(raw)
    assert status.code == 8 and status.message == "Later."
    info = proto.message("google.rpc.RetryInfo").FromString(status.details[0].value)
    assert status.details[0].type_url.endswith("/google.rpc.RetryInfo")
    assert (info.retry_delay.seconds, info.retry_delay.nanos) == (1, 250_000_000)


def test_fractions_of_a_model_repository_come_as_strings() -> None:
    given = {"canary": "0.1", "requests": "50", "shadow": False, "tolerance": 2, "x": "fast"}
    assert v2_grpc.numbers(given) == {"canary": 0.1, "requests": 50, "shadow": False, "tolerance": 2, "x": "fast"}
