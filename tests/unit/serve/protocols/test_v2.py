"""Bodies of the Open Inference Protocol, read and written."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.serve.protocols import v2
from shoal.serve.refusals import Refusal
from shoal.serve.signature import DTYPES, ModelSignature, TensorSignature

_ALL = [name for name in DTYPES if name != "BF16"]


def _signature(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 3)) -> ModelSignature:
    return ModelSignature("m", (TensorSignature("x", datatype, shape),), (TensorSignature("y", datatype, shape),))


_TWO = ModelSignature("m", (TensorSignature("a", "INT8", (-1, 2)), TensorSignature("b", "FP64", (-1,))),
                      (TensorSignature("y", "FP32", (-1,)), TensorSignature("z", "BF16", (-1, 2))))  # fmt: skip


def _body(
    array: np.ndarray, datatype: str, binary: bool, nested: bool = False, **more: Any
) -> tuple[bytes, int | None]:
    entry: dict[str, Any] = {"name": "x", "shape": list(array.shape), "datatype": datatype}
    if binary:
        entry["parameters"] = {"binary_data_size": array.nbytes}
        header = json.dumps({"inputs": [entry], **more}).encode()
        return header + array.tobytes(), len(header)
    entry["data"] = array.tolist() if nested else array.ravel().tolist()
    return json.dumps({"inputs": [entry], **more}).encode(), None


@st.composite
def _arrays(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    datatype = draw(st.sampled_from(_ALL))
    shape = (draw(st.integers(1, 4)), 3)
    elements = {"allow_nan": False, "allow_infinity": False} if DTYPES[datatype].kind == "f" else None
    return datatype, draw(hnp.arrays(DTYPES[datatype], shape, elements=elements))


class TestRoundTrip:
    @given(_arrays(), st.booleans(), st.booleans())
    def test_inputs_come_out_as_they_were_sent(
        self, given_: tuple[str, np.ndarray], binary: bool, nested: bool
    ) -> None:
        datatype, array = given_
        body, length = _body(array, datatype, binary, nested)
        request = v2.decode(_signature(datatype), body, length, 8)
        assert request.inputs[0].dtype == DTYPES[datatype] and request.rows == len(array)
        np.testing.assert_array_equal(request.inputs[0], array)

    @given(_arrays(), st.booleans())
    def test_outputs_can_be_read(self, given_: tuple[str, np.ndarray], binary: bool) -> None:
        datatype, array = given_
        body, length = _body(array, datatype, True, id="nine", parameters={"binary_data_output": binary})
        request = v2.decode(_signature(datatype), body, length, 8)
        content, header_length = v2.encode(_signature(datatype), request, [array])
        said = json.loads(content[:header_length])
        assert (said["model_name"], said["model_version"], said["id"]) == ("m", "1", "nine")
        (output,) = said["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("y", datatype, list(array.shape))
        if binary:
            assert header_length is not None and output["parameters"]["binary_data_size"] == array.nbytes
            values = np.frombuffer(content[header_length:], DTYPES[datatype])
        else:
            assert header_length is None
            values = np.array(output["data"], DTYPES[datatype])
        np.testing.assert_array_equal(values, array.ravel())

    def test_several_tensors_in_any_order_and_kind(self) -> None:
        a, b = np.int8([[1, 2], [3, 4]]), np.float64([0.5, -2])
        header = {"inputs": [
            {"name": "b", "shape": [2], "datatype": "FP64", "parameters": {"binary_data_size": 16}},
            {"name": "a", "shape": [2, 2], "datatype": "INT8", "data": [1, 2, 3, 4]},
        ], "outputs": [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]}  # fmt: skip
        raw = json.dumps(header).encode()
        request = v2.decode(_TWO, raw + b.tobytes(), len(raw), 8)
        np.testing.assert_array_equal(request.inputs[0], a)
        np.testing.assert_array_equal(request.inputs[1], b)
        assert request.wanted == (("z", True), ("y", False))

    def test_what_json_has_no_word_for_is_null_and_bf16_is_a_float(self) -> None:
        request = v2.InferRequest("", (), 2, (("y", False), ("z", False)), None, 0)
        body, _ = v2.encode(_TWO, request, [np.float32([np.nan, np.inf]), np.uint16([[0x3F80, 0xC000]])])
        outputs = json.loads(body)["outputs"]
        assert outputs[0]["data"] == [None, None]
        assert outputs[1]["data"] == [1.0, -2.0]

    def test_urgency(self) -> None:
        def of(**parameters: Any) -> tuple[float | None, int]:
            request = v2.decode(_signature(), _body(np.zeros((1, 3)), "FP32", False, parameters=parameters)[0], None, 8)
            return request.timeout_s, request.priority

        assert of(timeout=250_000)[0] == 0.25
        assert of()[0] is None
        assert of(priority=1)[1] > of(priority=2)[1] > of()[1] > of(priority=101)[1]


def _entry(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3], **changes}]}


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "said"),
        [
            (_entry(name="xx"), 'Did you mean "x"'),
            (_entry(datatype="FP64"), "takes FP32"),
            (_entry(shape=[1, 4]), "[-1, 3]"),
            (_entry(shape=[3]), "[-1, 3]"),
            (_entry(shape=[-1, 3]), "[-1, 3]"),
            (_entry(data=[1, 2]), "shape"),
            (_entry(data=[[1, 2], [3]]), "shape"),
            (_entry(data=["a", "b", "c"]), "are not FP32 numbers"),
            (_entry(data=None), "no data"),
            (_entry(data=[1e300, 0, 0]), "beyond"),
            (_entry(parameters={"binary_data_size": 12}), "both"),
            ({"inputs": []}, "missing"),
            ({"inputs": _entry()["inputs"] * 2}, "twice"),
            ({}, "protocol"),
            ([], "protocol"),
            ({**_entry(shape=[0, 3], data=[])}, "no rows"),
            ({**_entry(), "outputs": [{"name": "q"}]}, 'no output "q"'),
            ({**_entry(), "outputs": [{"name": "y"}, {"name": "y"}]}, "twice"),
            ({**_entry(), "outputs": [{"name": "y", "parameters": {"classification": 2}}]}, "lassification"),
            ({**_entry(), "parameters": {"timeout": 0}}, "timeout"),
            ({**_entry(), "parameters": {"timeout": 1.5}}, "timeout"),
            ({**_entry(), "parameters": {"priority": -1}}, "priority"),
            ({**_entry(), "parameters": {"binary_data_output": 1}}, "binary_data_output"),
            ({**_entry(), "id": "i" * 300}, "id"),
        ],
    )  # fmt: skip
    def test_one_sentence(self, request_: Any, said: str) -> None:
        with pytest.raises(Refusal) as refused:
            v2.decode(_signature(), json.dumps(request_).encode(), None, 8)
        assert refused.value.status == 400
        assert said in refused.value.sentence and refused.value.sentence.endswith(".")

    def test_integers_out_of_range_and_fractions(self) -> None:
        for values in ([256, 0, 0], [-1, 0, 0], [0.5, 0, 0], [True, False, True], [1 << 70, 0, 0]):
            with pytest.raises(Refusal) as refused:
                v2.decode(_signature("UINT8"), json.dumps(_entry(datatype="UINT8", data=values)).encode(), None, 8)
            assert refused.value.status == 400

    def test_too_many_rows(self) -> None:
        with pytest.raises(Refusal) as refused:
            v2.decode(_signature(), _body(np.zeros((9, 3)), "FP32", False)[0], None, 8)
        assert refused.value.status == 413 and "8" in refused.value.sentence

    def test_binary_that_is_cut_or_too_long(self) -> None:
        body, length = _body(np.zeros((2, 3), np.float32), "FP32", True)
        assert length is not None
        for wrong, header in (
            (body[:-1], length),
            (body + b"x", length),
            (body, len(body) + 1),
            (body, None),
            (body, length - 1),
        ):
            with pytest.raises(Refusal) as refused:
                v2.decode(_signature(), wrong, header, 8)
            assert refused.value.status == 400

    @pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"inputs":' * 50_000, b"NaN"])
    def test_what_is_not_json(self, body: bytes) -> None:
        with pytest.raises(Refusal) as refused:
            v2.decode(_signature(), body, None, 8)
        assert refused.value.status == 400

    def test_nan_goes_in_in_neither_form_and_comes_out_as_null_in_json(self) -> None:
        with pytest.raises(Refusal):
            v2.decode(
                _signature(), b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[NaN,1,2]}]}', None, 8
            )
        body, length = _body(np.float32([[np.nan, 1, np.inf]]), "FP32", True)
        with pytest.raises(Refusal, match="not finite"):
            v2.decode(_signature(), body, length, 8)

    @pytest.mark.parametrize("binary", [True, False])
    def test_mutations_are_read_or_refused(self, binary: bool) -> None:
        """5,000 damaged bodies: nothing but Refusal is ever raised."""
        draw = random.Random(0)
        body, length = _body(
            np.arange(6, dtype=np.float32).reshape(2, 3), "FP32", binary, id="7", parameters={"timeout": 5}
        )
        for _ in range(5_000):
            wrong = bytearray(body)
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(wrong))
                kind = draw.randrange(3)
                if kind == 0:
                    wrong[at] = draw.randrange(256)
                elif kind == 1:
                    del wrong[at : at + draw.randint(1, 8)]
                else:
                    wrong[at:at] = bytes(
                        draw.choice(b'0123456789-.,:[]{}"eatruflsn') for _ in range(draw.randint(1, 8))
                    )
            try:
                request = v2.decode(_signature(), bytes(wrong), length, 8)
            except Refusal as refusal:
                assert 400 <= refusal.status < 500 and refusal.sentence.endswith(".")
            else:
                assert request.inputs[0].shape[1:] == (3,)


class TestSizes:
    """What costs more to look at than it may."""

    @pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_numbers_that_are_not_finite(self, datatype: str, value: float) -> None:
        spec = TensorSignature("x", datatype, (-1, 3))
        raw = np.array([0, value, 0]).astype(spec.dtype).tobytes()
        _refused_unless_wanted(spec, raw, 400)

    def test_bfloat16_that_is_not_finite(self) -> None:
        for bits in (0x7F80, 0xFF80, 0x7FC1):
            _refused_unless_wanted(TensorSignature("x", "BF16", (-1, 3)), np.array([0, bits, 1], "<u2").tobytes(), 400)
        entry = {"name": "x", "datatype": "BF16", "shape": [1, 3], "parameters": {"binary_data_size": 6}}
        header = json.dumps({"inputs": [entry]}).encode()
        signature = ModelSignature("m", (TensorSignature("x", "BF16", (-1, 3)),), (TensorSignature("y", "FP32", (-1, 3)),))
        largest = np.array([0x7F7F, 0xFF7F, 0], "<u2").tobytes()
        assert v2.decode(signature, header + largest, len(header), 8).rows == 1

    def test_longest_body(self) -> None:
        longest = v2.longest_body(_signature(), 8)
        entry = _entry(shape=[8, 3], data=[[-1.2345678901234567e-300] * 3] * 8)
        assert longest is not None and len(json.dumps(entry, indent=8)) < longest < 1 << 20
        free = ModelSignature("m", (TensorSignature("x", "FP32", (-1, 3, -1)),), ())
        assert v2.longest_body(free, 8) is None

    @pytest.mark.parametrize(
        "entry",
        [
            {"shape": [10**400, 3]}, {"shape": [1, 10**4000]}, {"parameters": {"binary_data_size": 10**4000}, "data": None},
            {"name": "n" * 1_000_000}, {"datatype": "d" * 1_000_000}, {"data": ["t" * 1_000_000, *range(100_000)]},
            {"shape": [3] * 100_000},
        ],
    )  # fmt: skip
    def test_long_values_make_short_sentences(self, entry: dict[str, Any]) -> None:
        with pytest.raises(Refusal) as refused:
            v2.decode(_signature(), json.dumps(_entry(**entry)).encode(), None, 8)
        assert refused.value.status == 400 and len(refused.value.sentence) < 400

    @pytest.mark.parametrize("shape", [[1 << 30, 3], [9, 3]])
    def test_rows_are_refused_before_anything_is_made_of_them(self, shape: list[int]) -> None:
        with pytest.raises(Refusal) as refused:
            v2.decode(_signature(), json.dumps(_entry(shape=shape)).encode(), None, 8)
        assert refused.value.status == 413

    @pytest.mark.parametrize(
        "where",
        ['"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":%s}]', '"else":%s', '"parameters":{"a":%s}'],
    )
    def test_depth(self, where: str) -> None:
        with pytest.raises(Refusal) as refused:
            v2.decode(_signature(), ("{" + where % ("[" * 100_000 + "]" * 100_000) + "}").encode(), None, 8)
        assert refused.value.status == 400


def _refused_unless_wanted(spec: TensorSignature, raw: bytes, status: int) -> None:
    entry = {"name": "x", "datatype": spec.datatype, "shape": [1, 3], "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [entry]}).encode()
    for finite in (True, False):
        signature = ModelSignature("m", (replace(spec, finite=finite),), (TensorSignature("y", "FP32", (-1, 3)),))
        if finite:
            with pytest.raises(Refusal, match="not finite") as refused:
                v2.decode(signature, header + raw, len(header), 8)
            assert refused.value.status == status
        else:
            assert v2.decode(signature, header + raw, len(header), 8).inputs[0].tobytes() == raw


_APART = [
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,2.5,-3e1]}]}',
    b'{"inputs":[{"data" : [1, 2, 3], "name":"x","shape":[1,3],"datatype":"FP32"}],"id":"]","parameters":{"priority":2}}',
    b'{"inputs":[{"data":[1,2,3],"name":"x","shape":[1,3],"datatype":"FP32","data":[4,5,6]}]}',
    b'{"parameters":{"data":[7,8,9]},"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[]}]}',
    b'{"parameters":{"data":[7,8,9]},"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","\\u0064ata":[1,2,3]}]}',
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[[1,2,3]]}]}',
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,,3]}]}',
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":["],", ":1}]}',
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,2,3]},{"name":"x","shape":[0],"datatype":"FP32"}]}',
    b'{"inputs":[],"id":"data","outputs":[{"name":"y"}]} [1,2,3]',
]  # fmt: skip


@given(st.data())
def test_numbers_that_are_cut_out_say_what_they_say_in_their_place(data: st.DataObject) -> None:
    body = bytearray(data.draw(st.sampled_from(_APART)))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(body)))
        piece = data.draw(st.sampled_from([b"", b"[", b"]", b'"', b",", b'"data":', b"\\"]))
        body[at : at + data.draw(st.integers(0, 3))] = piece

    def found(given: bytes | memoryview) -> Any:
        try:
            request = v2.decode(_signature(), given, None, 8)
        except Refusal as refusal:
            return refusal.status
        return request.id, request.priority, request.inputs[0].tolist()

    # Only what is bytes has its numbers cut out.
    assert found(bytes(body)) == found(memoryview(bytes(body)))
