"""The head of a worker that is several processes: the loop of any that shares no memory, whose passes are its partners' too.

What it pulls it deals out, what all have computed it adds up before it is pushed: servers and lead see a worker like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from shoal.comm.arena import Arena
from shoal.comm.store import Store
from shoal.ps.client import Client
from shoal.ps.requests import Requests
from shoal.train.api import TrainOptions
from shoal.train.feed import Share as Samples
from shoal.train.gradients import Gradients
from shoal.train.host import TrainHost
from shoal.train.loop import Parts
from shoal.train.objective import Outcome
from shoal.train.passes import Passes, Surroundings
from shoal.train.remote import bond, words
from shoal.train.remote.exchange import Exchange, Order, Told
from shoal.train.remote.line import Line, Meeting
from shoal.train.remote.team import Share, gathered, take_share
from shoal.train.remote.worker import Alone, RemoteLoop, Sender, make_axis, work
from shoal.train.settings import RunSettings
from shoal.train.split import Split


class HeadPasses:
    """Passes through the parts of all processes of a worker; the loss comes out here."""

    knows_loss = True

    def __init__(self, own: Passes, around: Surroundings, exchange: Exchange) -> None:
        self._own, self._around, self._exchange = own, around, exchange
        # Whether the next one's gradients are the first of a push.
        self.fresh = True

    def train(self, step: int, batches: Sequence[tuple[Samples, Any]], total: int) -> Iterator[tuple[Outcome, int]]:
        exchange = self._exchange
        exchange.tell(Told(Order.COMPUTE, step, self._around.replica, total, self.fresh))
        self.fresh = False
        exchange.share_buffers()
        yield from self._own.train(step, batches, total)
        exchange.return_buffers()
        exchange.done()

    def evaluate(self, batch: Any, count: int) -> Outcome | None:
        return self._own.evaluate(batch, count)

    def clear(self) -> None:
        self._own.clear()


class HeadGradients:
    """The gradients of a worker's processes, which come together in one stripe of a whole model's."""

    is_void: Callable[[], bool] | None = None
    rows_squared = 0.0
    bad_row: str | None = None

    def __init__(self, share: Share, passes: HeadPasses, whole: Store, stripe: int) -> None:
        self._share, self._passes = share, passes
        self._whole, self._stripe = whole, stripe
        # None has been looked at.
        self.finite = np.zeros(len(whole.table.trained), dtype=bool)

    def begin(self) -> None:
        self._passes.fresh = True
        self._share.store.touched[0] = 0
        self._share.parts.gradients.begin()

    def collect(self) -> None:
        self._share.parts.gradients.collect()
        self._share.exchange.gather(self._whole, self._stripe, self._share.owns)

    def withdraw_rows(self) -> None:
        """There are none."""


class HeadLoop(RemoteLoop):
    """Computes units with partners until there are none left."""

    def __init__(self, parts: Parts, share: Share, copy: torch.Tensor) -> None:
        super().__init__(parts, share.around, copy)
        self._share = share
        # The servers' versions of the weights that all have.
        self._dealt: list[int] | None = None

    def _fetch(self, step: int, shard: int) -> Sequence[tuple[Samples, Any]]:
        # All need the samples, and nobody has to wait for another's.
        self._share.exchange.tell(Told(Order.FETCH, step, shard))
        found = super()._fetch(step, shard)
        self._share.exchange.done()
        return found

    def _pull(self) -> None:
        super()._pull()
        if self._pulled != self._dealt:
            self._share.exchange.deal(self.parts.store, self._share.owns)
            self._dealt = list(self._pulled)

    def _evaluate(self, step: int, epoch: int) -> None:
        if self.parts.eval_source is not None and self.parts.settings.evaluate:
            self._buffers.load(step)
            self._share.exchange.tell(Told(Order.EVALUATE, step, total=epoch))
            self._share.exchange.share_buffers()
        super()._evaluate(step, epoch)
        self._share.exchange.done()


class Head(Alone):
    """How a head goes through a run."""

    def __init__(self, meeting: Meeting, split: Split) -> None:
        here = meeting.listen_at().startswith("tcp://127.0.0.1:")
        self._split = split
        self._listener = bond.listen("127.0.0.1" if here else "0.0.0.0")
        self.address = f"tcp://{'127.0.0.1' if here else meeting.own_host()}:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()

    def train(
        self, host: TrainHost, settings: RunSettings, line: Line, client: Client, placed: words.Placed
    ) -> Mapping[str, Any]:
        with gathered(settings.plan, self._listener, placed.token, line.meeting.deadline_s) as within:
            whole = host.take_up(Arena.private(settings.layout), settings, True)
            axis = make_axis(host, whole, settings, line, client, placed)
            within.group.while_waiting = lambda what, waited_s: axis.give_a_sign()
            share = take_share(host, settings, self._split, line.rank, within, Sender(line), axis)
            passes = HeadPasses(share.parts.passes, share.around, share.exchange)
            gradients = HeadGradients(share, passes, whole, whole.stripe_of(line.rank))
            parts = dataclasses.replace(
                share.parts, store=whole, settings=settings, passes=passes, gradients=cast(Gradients, gradients), publishes=None
            )
            loop = HeadLoop(parts, share, whole.weight_range(0, whole.table.trained_bytes, torch.uint8))
            with _awake(share.exchange, line, client):
                loop.run()
            share.exchange.tell(Told(Order.END))
            within.bond.await_farewells()
            return loop.gathered


@contextlib.contextmanager
def _awake(exchange: Exchange, *asked: Requests) -> Iterator[None]:
    """Let partners hear of their head while it waits for an answer, of whomever: they wait for it as long as it may take."""
    before = [each.while_waiting for each in asked]

    def together(own: Callable[[], None]) -> Callable[[], None]:
        def look() -> None:
            own()
            exchange.keep_awake()

        return look

    for each, own in zip(asked, before, strict=True):
        each.while_waiting = together(own)
    try:
        yield
    finally:
        for each, own in zip(asked, before, strict=True):
            each.while_waiting = own


def lead_team(
    make_host: Callable[[], TrainHost], options: TrainOptions, meeting: Meeting, rank: int, split: Split
) -> tuple[Path, dict[str, Any]]:
    """A head's whole life; the run's directory and its summary. ``make_host`` builds the job."""
    with contextlib.closing(Head(meeting, split)) as how:
        return work(make_host, options, meeting, rank, how)
