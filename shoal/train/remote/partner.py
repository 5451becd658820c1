"""A process of a worker that is several, and not its head: it computes its parts when it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.plan import Plan
from shoal.process.failure import user_code
from shoal.process.messages import PARTNER
from shoal.train.allocator import keep_freed_memory
from shoal.train.api import TrainOptions
from shoal.train.evaluate import Slice, evaluate
from shoal.train.feed import Share as Samples
from shoal.train.host import TrainHost
from shoal.train.remote.exchange import Order, Told
from shoal.train.remote.line import Line, Meeting, Signs
from shoal.train.remote.team import Share, come, take_share
from shoal.train.remote.teams import place_of
from shoal.train.remote.worker import Sender, built_as, remote_settings
from shoal.train.split import Split


class Partner:
    """Does what its head says.

    Args:
        worker: which one it is a part of.
        beat: lets the lead hear that this process lives; called with every order, for it may never have to wait for one.
    """

    def __init__(self, share: Share, worker: int, beat: Callable[[], None]) -> None:
        self._share, self._worker, self._beat = share, worker, beat
        # Of which step and shard there are samples already.
        self._fetched: tuple[int, int, Sequence[tuple[Samples, Any]]] | None = None

    def serve(self) -> None:
        """Until there is nothing more to do."""
        while (told := self._share.exchange.hear()).order != Order.END:
            self._beat()
            if told.order == Order.WEIGHTS:
                self._share.exchange.take_weights()
            elif told.order == Order.FETCH:
                self._fetched = (told.step, told.shard, self._fetch(told))
            elif told.order == Order.COMPUTE:
                self._compute(told)
            elif told.order == Order.GRADIENTS:
                self._share.parts.gradients.collect()
                self._share.exchange.give_gradients()
            elif told.order == Order.EVALUATE:
                self._evaluate(told)

    def _fetch(self, told: Told) -> Sequence[tuple[Samples, Any]]:
        self._share.parts.feed.replica = told.shard
        with user_code("train_data", self._worker):
            return self._share.parts.feed.batches(told.step)

    def _compute(self, told: Told) -> None:
        share, parts = self._share, self._share.parts
        if told.fresh:
            share.store.touched[0] = 0
            parts.gradients.begin()
        share.around.replica = told.shard
        assert self._fetched is not None and self._fetched[:2] == (told.step, told.shard), "a head lets all fetch first"
        batches, self._fetched = self._fetched[2], None
        share.exchange.share_buffers()
        for _ in parts.passes.train(told.step, batches, told.total):
            pass
        share.exchange.return_buffers()

    def _evaluate(self, told: Told) -> None:
        parts, settings = self._share.parts, self._share.parts.settings
        assert parts.eval_source is not None
        self._share.exchange.share_buffers()
        part = Slice(self._worker, settings.grid.dp, settings.plan.layout == "channels_last", told.total)
        with user_code("evaluation", self._worker):
            evaluate(parts.job, parts.model, parts.eval_source, part, self._beat, parts.passes.evaluate)


def assist(
    make_host: Callable[[], TrainHost], options: TrainOptions, meeting: Meeting, rank: int, split: Split
) -> tuple[Path, dict[str, Any]]:
    """A partner's whole life; the run's directory and its summary. ``make_host`` builds the job."""
    line = Line(meeting, PARTNER, rank)
    try:
        host = make_host()
        placed = line.join(built_as(host.facts()))
        plan = Plan.parse(placed.plan)
        worker, place = place_of(PARTNER, rank, plan)
        settings = remote_settings(plan, host.job, host.facts(), options, placed.checkpoints)
        keep_freed_memory()
        torch.set_num_threads(plan.threads or 1)
        host.quicken()
        signs = Signs(line)
        with come(plan, placed.team, placed.token, place, meeting.deadline_s) as within:
            within.group.while_waiting = lambda what, waited_s: signs.give()
            share = take_share(host, settings, split, worker, within, Sender(line))
            share.parts.model.train()
            Partner(share, worker, signs.give).serve()
            within.bond.say_farewell()
        return line.leave()
    except BaseException as error:
        line.tell_failure(error)
        raise
    finally:
        line.close()
