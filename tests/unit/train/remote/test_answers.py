"""What a lead answers is of the kind that was asked for, and its counts, addresses and buffers are some."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.ps import messages
from shoal.ps.wire import Malformed
from shoal.train.remote import words
from shoal.train.remote.answers import check_answer
from shoal.train.remote.words import Orders

BUFFERS = {"mean": torch.zeros(3), "count": torch.tensor(0)}
HEADS, FRAMES = messages.pack_tensors(BUFFERS)
CLAIM, LOOK, LEAVE = words.Claim(1, 0, 0), words.Look(1, "worker", 0), words.Leave(1, "worker", 0)
JOIN = words.Join(number=1, role="worker", rank=0, pid=1, host="", built="")
AT = "tcp://10.0.0.1:99"


def unit(**changes: Any) -> words.Unit:
    return words.Unit(**{
        "number": 1, "unit": 4, "slowest": 2, "alone": False, "groups": ({"lr": 0.1},), "settled": (0, 1, 0), "buffers": HEADS,
        "orders": Orders(steps_allowed=5, heads=(AT, AT)), **changes,
    })  # fmt: skip


def placed(**changes: Any) -> words.Placed:
    return words.Placed(**{
        "number": 1, "plan": "ps=2,workers=2,sync", "total_steps": 9, "first_step": 0, "checkpoints": "c",
        "servers": {"0": AT, "1": AT}, "orders": Orders(), **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "answer", "frames"),
    [
        (CLAIM, unit(), FRAMES), (CLAIM, words.Later(1, 3, Orders()), []), (LOOK, words.Heard(1, Orders(past=4, done=(5,))), []),
        (CLAIM, words.Later(1, 3, Orders(), HEADS), FRAMES),
        (JOIN, placed(), []), (LEAVE, words.Ended(1, "runs/a", b"{}"), []), (CLAIM, unit(buffers=()), []),
        (JOIN, placed(plan="tp=2,ps=2", team=AT, token="0f" * 16), []),
    ],
)  # fmt: skip
def test_what_is_right_is_taken(asked: Any, answer: Any, frames: Any) -> None:
    check_answer(asked, answer, frames, BUFFERS, 2)


@pytest.mark.parametrize(
    ("asked", "answer", "frames"),
    [
        (CLAIM, words.Heard(1, Orders()), []), (LOOK, unit(), FRAMES), (JOIN, words.Heard(1, Orders()), []),
        (LEAVE, placed(), []), (CLAIM, unit(unit=-1), FRAMES), (CLAIM, unit(settled=(0, -1, 0)), FRAMES),
        (CLAIM, unit(), FRAMES[:1]),
        (CLAIM, unit(buffers=HEADS[:1]), FRAMES[:1]), (CLAIM, words.Later(1, -3, Orders()), []),
        (LOOK, words.Heard(1, Orders()), [b""]), (LOOK, words.Heard(1, Orders(steps_allowed=-1)), []),
        (LOOK, words.Heard(1, Orders(heads=(AT,))), []), (CLAIM, words.Later(1, 3, Orders(), HEADS), FRAMES[:1]),
        (LOOK, words.Heard(1, Orders(done=(4, -1))), []), (LOOK, words.Heard(1, Orders(keeps=("king", 0, 1))), []),
        (LOOK, words.Heard(1, Orders(keeps=("worker", -1, 1))), []),
        (LOOK, words.Heard(1, Orders(heads=(AT, "nowhere"))), []), (JOIN, placed(plan="ps=zebra"), []),
        (JOIN, placed(servers={"²": AT}), []), (JOIN, placed(first_step=-1), []), (LEAVE, words.Ended(1, "runs/a", b"[]"), []),
        (LEAVE, words.Ended(1, "runs/a", b"{"), []), (JOIN, placed(team="nowhere", token="0f" * 16), []),
        (JOIN, placed(team=AT, token="0f"), []), (JOIN, placed(plan="tp=2,ps=2", token="0f" * 16), []),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_not(asked: Any, answer: Any, frames: Any) -> None:
    with pytest.raises(Malformed):
        check_answer(asked, answer, frames, BUFFERS, 2)
