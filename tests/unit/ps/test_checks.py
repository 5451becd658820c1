"""What a server is given and does not fit is refused before anything changes, and costs no more to read than it has bytes."""

from __future__ import annotations

import dataclasses
import resource
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from shards import a_push, a_shard, same

from shoal.errors import RequestError
from shoal.ps import messages
from shoal.ps.checks import has_twice
from shoal.ps.shard import Snapshot
from shoal.ps.wire import Malformed, encode


@pytest.mark.parametrize(
    "changes",
    [
        {"settled": (1 << 50, 0, 0)}, {"settled": (2, 0, 0)}, {"settled": (0, -1, 0)},
        {"ids": ((1 << 63, 0, 0),)},
        {"ids": ((0, 9, 0), (0, 9, 0))}, {"scale": float("inf")}, {"step": -1}, {"groups": [{"lr": float("nan")}]},
        {"groups": [{"lr": (0.1, 0.2)}]}, {"groups": [{}] * 3},
    ],
)  # fmt: skip
def test_what_a_push_says_of_itself_is_looked_at(changes: dict[str, Any]) -> None:
    """What is settled counts as applied: with one wrong word all pushes to come would be acknowledged, and none applied."""
    shard, like = a_shard(), a_shard()
    with pytest.raises(RequestError):
        shard.apply(dataclasses.replace(a_push(9), **changes))
    assert shard.apply(a_push(9)) and like.apply(a_push(9)) and same(shard, like)


def test_what_is_settled_may_be_just_behind_a_push() -> None:
    shard = a_shard()
    assert shard.apply(dataclasses.replace(a_push(9), settled=(0, 10, 0)))
    assert shard.apply(dataclasses.replace(a_push(10), settled=(1, 0, 0)))


def test_a_state_with_something_that_is_no_number_is_not_taken_up() -> None:
    shard = a_shard()
    shard.apply(a_push(1))
    shard.apply(a_push(2))
    right, before = shard.snapshot(), shard.snapshot()
    for name in ("weights/1", "state.exp_avg/1", "rows/0/values"):
        wrong = {key: tensor.clone() for key, tensor in right.tensors.items()}
        wrong[name].view(-1)[-1] = float("nan")
        for take in (shard.restore, shard.merge):
            with pytest.raises(RequestError, match="no number"):
                take(Snapshot(right.kept, wrong))
    after = shard.snapshot().tensors
    assert all(torch.equal(after[name], tensor) for name, tensor in before.tensors.items())


def test_a_key_that_is_there_twice_is_found_in_any_order() -> None:
    high = np.int64(1) << 32
    # Of these, two halves look alike, and the keys are different.
    assert not has_twice(np.array([5 + 3 * high, 3 + 5 * high, 7], np.int64))
    assert has_twice(np.array([5 + 3 * high, 3 + 5 * high, 5 + 3 * high], np.int64))
    assert has_twice(np.array([1, 2, 2, 3], np.int64)) and not has_twice(np.array([-3, -1, 0, 9], np.int64))
    assert not has_twice(np.array([], np.int64)) and not has_twice(np.array([4], np.int64))


def test_a_small_message_cannot_take_much_memory() -> None:
    """Every empty mapping is one byte, and would be a hundred when it is read."""
    head, _ = messages.pack_push(a_push(1), 1)
    tree = msgspec.msgpack.decode(encode(head))
    count = 15 << 20
    raw = msgspec.msgpack.encode({**tree, "groups": None})
    # Many groups, and one of which a number is a list of many lists.
    nested = b"\x81\xa2lr\xdd" + count.to_bytes(4, "big") + b"\x90" * count
    for size, filled in ((count, b"\x80" * count), (1, nested)):
        bomb = raw.replace(b"\xa6groups\xc0", b"\xa6groups\xdd" + size.to_bytes(4, "big") + filled)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(Malformed):
            messages.decode_request([bomb])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
