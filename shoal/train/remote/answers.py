"""Whether what a lead answers can be meant: of the kind that was asked for, with counts, addresses and buffers that are some."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from shoal.errors import PlanError
from shoal.plan import Plan
from shoal.process.messages import PARTNER, SERVER, WORKER
from shoal.ps import messages
from shoal.ps.checks import MOST
from shoal.ps.wire import Malformed
from shoal.train.remote import words
from shoal.train.remote.bond import TOKEN_BYTES
from shoal.train.remote.teams import size_of

_ADDRESS = re.compile(r"tcp://[^\s:/]+:\d{1,5}|tcp://\[[0-9a-fA-F:.%\w]+\]:\d{1,5}")
_TOKEN = re.compile(f"[0-9a-f]{{{2 * TOKEN_BYTES}}}")
_TO: dict[type, tuple[type, ...]] = {
    words.Join: (words.Placed,), words.Claim: (words.Unit, words.Later), words.Leave: (words.Ended,),
    words.Gives: (words.Summed,),
}  # fmt: skip


def check_answer(
    asked: msgspec.Struct, answer: Any, frames: Sequence[Any], buffers: Mapping[str, torch.Tensor] | None = None,
    servers: int | None = None,
) -> None:  # fmt: skip
    """Raises Malformed where it is no answer to what was asked.

    Args:
        buffers: the model's, and ``servers``: how many there are; both where it is known.
    """
    if type(answer) not in _TO.get(type(asked), (words.Heard,)):
        raise Malformed(f"{type(answer).__name__} is no answer to {type(asked).__name__}")
    if isinstance(answer, words.Summed):
        messages.unpack_tensors(answer.sums, frames)
        if answer.sums not in ((), getattr(asked, "values", ())):
            raise Malformed("a sum is of another form than what it is the sum of")
    elif not isinstance(answer, (words.Unit, words.Later)):
        if frames:
            raise Malformed(f"{len(frames)} frames where none belongs")
    elif buffers is not None:
        check_buffers(buffers, answer.buffers, frames)
    if isinstance(answer, words.Ended):
        _check_end(answer)
        return
    if isinstance(answer, words.Placed):
        _check_place(answer, getattr(asked, "role", SERVER) != SERVER)
    elif isinstance(answer, words.Unit):
        _check_counts(answer.unit, answer.slowest, *answer.settled)
    elif isinstance(answer, words.Later):
        _check_counts(answer.step)
    orders = answer.orders
    _check_counts(orders.steps_allowed, orders.over, orders.epoch_done, orders.stop_epoch, orders.stop_at, orders.past)
    _check_counts(*orders.done, *orders.keeps[1:])
    if orders.keeps[0] not in ("", SERVER, WORKER, PARTNER):
        raise Malformed(f"nobody keeps a {orders.keeps[0][:20]}")
    if not all(map(is_address, orders.heads)) or (servers is not None and len(orders.heads) not in (0, servers)):
        raise Malformed(f"{orders.heads[:9]} are no addresses of {servers} servers")


def is_address(text: str) -> bool:
    """Whether somebody can be spoken to at it."""
    return _ADDRESS.fullmatch(text) is not None


def check_buffers(like: Mapping[str, torch.Tensor], heads: Sequence[messages.Tensor], frames: Sequence[Any]) -> None:
    """Raises Malformed where buffers are not those of a model; none at all may be left out."""
    found = messages.unpack_tensors(heads, frames)
    forms = [{name: (buffer.shape, buffer.dtype) for name, buffer in each.items()} for each in (found, like)]
    if found and forms[0] != forms[1]:
        raise Malformed("its buffers are not those of the model")


def _check_counts(*counts: int) -> None:
    if not all(0 <= count < MOST for count in counts):
        raise Malformed(f"{counts} are no counts")


def _check_place(answer: words.Placed, computes: bool) -> None:
    _check_counts(answer.first_step, answer.total_steps)
    try:
        plan = Plan.parse(answer.plan)
    except PlanError as error:
        raise Malformed(str(error)) from None
    if not all(place.isascii() and place.isdigit() and is_address(at) for place, at in answer.servers.items()):
        raise Malformed(f"{answer.servers} are no servers")
    meets = computes and size_of(plan) > 1
    if (answer.team or meets) and not (is_address(answer.team) and _TOKEN.fullmatch(answer.token)):
        raise Malformed(f"{answer.team!r} is no place for the processes of a worker to meet at")


def _check_end(answer: words.Ended) -> None:
    try:
        summary = json.loads(answer.summary)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None
    if not isinstance(summary, dict):
        raise Malformed("the run's summary is none")
