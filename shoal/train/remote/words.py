"""What workers and servers say to the lead of a run, and it to them: see ``shoal.ps.messages`` for the rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from shoal.ps.applied import PushId
from shoal.ps.dense import Groups
from shoal.ps.messages import Refused, Tensor
from shoal.ps.wire import decode_head


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """The lead's words, as the supervisor's in an arena.

    ``idle``: everything that was begun is done. ``heads``: where each shard is now, where that may change. Of portions: ``past``:
    everything before this unit is done, and ``done``: so are these, which several were given. ``keeps``: what a keeper keeps, a
    role, which one of it, and a term.
    """

    steps_allowed: int = 0
    over: int = 0
    epoch_done: int = 0
    stop_epoch: int = 0
    stop_at: int = 0
    eval_loss: float = 0.0
    idle: bool = False
    heads: tuple[str, ...] = ()
    past: int = 0
    done: tuple[int, ...] = ()
    keeps: tuple[str, int, int] = ("", 0, 0)


class Row(msgspec.Struct, frozen=True):
    """What was found of a unit; ``columns``: of its row in the ledger, up to the values; ``pulled``: at which versions."""

    unit: int
    columns: tuple[float, ...]
    pulled: tuple[int, ...]


# -- what is said to the lead ------------------------------------------------------------------------------------


class Join(msgspec.Struct, tag="join", frozen=True, kw_only=True):
    """A worker or a server is there, a server, or the head of a worker's processes, at ``address``.

    ``built``: to compare what was built.
    """

    number: int
    role: str
    rank: int
    pid: int
    host: str
    built: str
    address: str = ""


class Claim(msgspec.Struct, tag="claim", frozen=True):
    """A worker asks for a unit; ``open``: how many it has that it has not pushed."""

    number: int
    rank: int
    open: int


class Look(msgspec.Struct, tag="look", frozen=True):
    """Somebody asks for the orders as soon as they are others than ``seen``; None: at once."""

    number: int
    role: str
    rank: int
    seen: Orders | None = None


class Report(msgspec.Struct, tag="report", frozen=True, kw_only=True):
    """Units are done; ``made``: of each server, its version with their push, none where nothing was pushed or it was staged."""

    number: int
    rank: int
    rows: tuple[Row, ...]
    made: tuple[int, ...]
    buffers: tuple[Tensor, ...]


class Gives(msgspec.Struct, tag="gives", frozen=True, kw_only=True):
    """What a worker has found of a unit's batch, to be added up over these shards of its step (BatchNorm's statistics).

    ``index``: it is the how manieth sum of the unit over the same shards. One frame: ``values``.
    """

    number: int
    rank: int
    unit: int
    index: int
    shards: tuple[int, ...]
    values: tuple[Tensor, ...]


class Names(msgspec.Struct, tag="names", frozen=True):
    """What the values in a unit's row are called."""

    number: int
    names: tuple[str, ...]


class Bad(msgspec.Struct, tag="bad", frozen=True):
    """A gradient was no number, and was not pushed."""

    number: int
    rank: int
    units: tuple[int, ...]
    parameter: str | None
    samples: tuple[int, ...]


class Evaluated(msgspec.Struct, tag="evaluated", frozen=True, kw_only=True):
    """A worker's part of an evaluation. Two frames: what metrics with a state hold, of the evaluation and of the training."""

    number: int
    rank: int
    epoch: int
    sums: dict[str, tuple[float, float]] | None
    seconds: float


class Failed(msgspec.Struct, tag="failed", frozen=True, kw_only=True):
    """A process has failed, with this error."""

    number: int
    rank: int
    kind: str
    sentence: str
    traceback: str


class LogFailed(msgspec.Struct, tag="log_failed", frozen=True):
    """A server could not write its log, and takes no pushes any more."""

    number: int
    rank: int
    reason: str


class Gone(msgspec.Struct, tag="gone", frozen=True):
    """A process of this ``host`` has died, says the one that had started it."""

    number: int
    role: str
    rank: int
    pid: int
    host: str
    cause: str


class Leave(msgspec.Struct, tag="leave", frozen=True):
    """A process is done; it is answered when the run has ended, or goes on without it.

    One frame or none: what a worker's training metrics with a state hold.
    """

    number: int
    role: str
    rank: int


# -- what the lead answers ---------------------------------------------------------------------------------------


class Placed(msgspec.Struct, tag="placed", frozen=True, kw_only=True):
    """The run that somebody has joined. Servers are told no others; ``log``: where they keep their logs, if they do.

    ``team``, ``token``: where the head of a worker's processes is, and what lets them in there.
    """

    number: int
    plan: str
    total_steps: int
    first_step: int
    checkpoints: str
    servers: dict[str, str]
    orders: Orders
    log: str = ""
    team: str = ""
    token: str = ""


class Unit(msgspec.Struct, tag="unit", frozen=True, kw_only=True):
    """A unit to compute; ``alone``: to be pushed by itself. Frames: the model's buffers."""

    number: int
    unit: int
    slowest: int
    alone: bool
    groups: Groups | None
    settled: PushId
    buffers: tuple[Tensor, ...]
    orders: Orders


class Later(msgspec.Struct, tag="later", frozen=True):
    """No unit for now. Where all rest, to evaluate: the model's ``buffers``, and frames of them."""

    number: int
    step: int
    orders: Orders
    buffers: tuple[Tensor, ...] = ()


class Heard(msgspec.Struct, tag="heard", frozen=True):
    """It was heard; or these are the orders.

    ``counts``: of a report, whether all units in it do, and nobody was quicker; of a death, whether who has died had joined: then
    the lead sees to it that nobody dies for ever.
    """

    number: int
    orders: Orders
    counts: bool = True


class Summed(msgspec.Struct, tag="summed", frozen=True):
    """The sum of what was given, in a frame. None: it ``waits_for`` the rest, or, ``over``, others have done the whole step."""

    number: int
    orders: Orders
    sums: tuple[Tensor, ...] = ()
    waits_for: str = ""
    over: bool = False


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """The run has ended: where it is, and its summary as JSON."""

    number: int
    path: str
    summary: bytes


Said = Join | Claim | Look | Report | Gives | Names | Bad | Evaluated | Failed | LogFailed | Gone | Leave
Answered = Placed | Unit | Later | Heard | Summed | Ended | Refused
_said = msgspec.msgpack.Decoder(Said)
_answered = msgspec.msgpack.Decoder(Answered)


def decode_said(frames: Sequence[Any]) -> Said:
    """Read the head of what was said to the lead. Raises Malformed."""
    return decode_head(_said, frames)  # type: ignore[no-any-return]


def decode_answered(frames: Sequence[Any]) -> Answered:
    """Read the head of what the lead answered. Raises Malformed."""
    return decode_head(_answered, frames)  # type: ignore[no-any-return]
