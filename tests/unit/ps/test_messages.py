"""Messages of the parameter server: what is packed comes out again, and what is none is refused."""

import random

import msgspec
import numpy as np
import pytest
import torch

from shoal.ps import messages
from shoal.ps.messages import Forms, PullRows, PushHead
from shoal.ps.shard import Push, RowGradients
from shoal.ps.wire import Malformed, encode

FORMS = Forms({0: (6, torch.float32), 3: (2, torch.float64)}, {1: (4, torch.float32)})


def a_push() -> Push:
    rows = RowGradients(np.array([7, -1 << 62]), np.array([1, 9], np.uint32), torch.arange(8.0).view(2, 4))
    return Push(
        ids=((0, 1, 2),), step=5, settled=(0, 1, 0), scale=0.5, rows={1: rows}, groups=[{"lr": 0.1, "betas": [0.9, 0.99]}],
        staleness=4, dense={0: torch.arange(6.0), 3: torch.tensor([1.5, -2.5], dtype=torch.float64)},
    )  # fmt: skip


def wire(push: Push, **choices) -> list[bytearray]:
    head, frames = messages.pack_push(push, 11, **choices)
    return [bytearray(encode(head)), *map(bytearray, frames)]


def test_a_push_arrives_as_it_was_sent():
    frames = wire(a_push())
    head = messages.decode_request(frames)
    assert isinstance(head, PushHead) and head.number == 11 and not head.staged
    found, sent = messages.unpack_push(head, frames[1:], FORMS), a_push()
    names = "ids", "step", "settled", "scale", "staleness"
    assert [getattr(found, name) for name in names] == [getattr(sent, name) for name in names]
    assert found.groups is not None and found.groups[0]["betas"] == (0.9, 0.99)
    assert all(torch.equal(found.dense[n], sent.dense[n]) for n in sent.dense)
    assert np.array_equal(found.rows[1].keys, sent.rows[1].keys) and np.array_equal(found.rows[1].counts, sent.rows[1].counts)
    assert torch.equal(found.rows[1].gradients, sent.rows[1].gradients)


def test_a_codec_makes_a_gradient_smaller_and_its_piece_comes_out_in_its_own_dtype():
    frames = wire(a_push(), codec_of=lambda piece: "bf16" if piece == 0 else "none")
    assert len(frames[1]) == 12
    found = messages.unpack_push(messages.decode_request(frames), frames[1:], FORMS)
    assert found.dense[0].dtype == torch.float32 and torch.allclose(found.dense[0], torch.arange(6.0), rtol=2**-8)


def test_tensors_arrive_with_names_and_shapes():
    sent = {
        "a": torch.arange(6).view(2, 3), "b": torch.tensor(2.5), "c": torch.empty(0, 4), "d": torch.ones(3, dtype=torch.bfloat16),
    }  # fmt: skip
    heads, frames = messages.pack_tensors(sent)
    found = messages.unpack_tensors(heads, [bytearray(f) for f in frames])
    assert all(torch.equal(found[name], tensor) and found[name].shape == tensor.shape for name, tensor in sent.items())


def mangled(frames: list[bytearray], dice: random.Random) -> list[bytearray]:
    """Something like a message, and none."""
    found = list(frames)
    at = dice.randrange(len(found))
    kind = dice.randrange(5)
    if kind == 0:
        del found[at]
    elif kind == 1:
        found.insert(at, bytearray(dice.randbytes(dice.randrange(40))))
    elif kind == 2:
        found[at] = found[at][: dice.randrange(max(1, len(found[at])))]
    elif kind == 3:
        raw = bytearray(found[0])
        for _ in range(dice.randrange(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        found[0] = raw
    else:
        found = [bytearray(dice.randbytes(dice.randrange(200))) for _ in range(dice.randrange(4))]
    return found


def test_what_is_malformed_is_refused_and_nothing_else_happens():
    dice, refused = random.Random(1), 0
    asked = [bytearray(encode(PullRows(1, 1, 2))), bytearray(np.array([3, 4]).tobytes())]
    for round in range(600):
        frames = mangled(wire(a_push()) if round % 3 else asked, dice)
        try:
            head = messages.decode_request(frames)
            if isinstance(head, PushHead):
                push = messages.unpack_push(head, frames[1:], FORMS)
                # What still is one fits what is held here.
                assert all(g.numel() == FORMS.pieces[n][0] for n, g in push.dense.items())
            elif isinstance(head, PullRows):
                assert len(messages.unpack_keys(head, frames[1:])) == head.keys
        except Malformed:
            refused += 1
    assert refused > 400


@pytest.mark.parametrize(
    "head",
    [
        {"type": "push"}, {"type": "os.system", "number": 1}, {"type": "pull", "number": "1"}, [1, 2],
        {"type": "put", "number": 1, "kept": {}, "tensors": [], "whole": True},
    ],
)  # fmt: skip
def test_a_head_that_is_no_message_is_refused(head):
    with pytest.raises(Malformed):
        messages.decode_request([msgspec.msgpack.encode(head)])


def test_a_tensor_that_says_more_than_it_has_is_refused():
    for tensor in (messages.Tensor("a", "float32", (1 << 40, 1 << 40)), messages.Tensor("a", "float32", (-1,)),
                   messages.Tensor("a", "load", (1,)), messages.Tensor("a", "float32", (1,), "zip")):  # fmt: skip
        with pytest.raises(Malformed):
            messages.unpack_tensors([tensor], [b"\0" * 4])
