"""The replicas of one model: chosen by measurement, watched, replaced when they die.

One template (``shoal.process``) holds the loaded model, replicas are forked from it. What a dead one had in work goes back to the
gateway's queue before another takes over its ring: inference is pure, so it is run again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import DeadlineError, JobFailed, RequestError
from shoal.process.channel import ChannelClosed
from shoal.process.gentle import gently
from shoal.process.supervisor import Child, Supervisor, TemplateLost
from shoal.process.templates import Ground
from shoal.serve.computing import AS_IT_IS, Precision
from shoal.serve.messages import AddModel, Attach, Attached, Edition, FollowRun, Lost, Skipped
from shoal.serve.scaling import ReplicaRange
from shoal.serve.signature import UNIT, ModelSignature
from shoal.serve.slots import LIVE, SlotLayout, Slots, row_bytes
from shoal.serve.source import ModelSource

PRELOAD = ("shoal.serve.replica",)
"""What templates of crews import before they know their model."""
_HOST = "shoal.serve.replica:ReplicaHost"
_MEMORY_BYTES = 128 << 20
_MOST_SLOTS, _LEAST_SLOTS = 1024, 64
_MOST_BATCH = 32
_MOST_UNITS = 128
_MEASURE_S = 0.6
_WARM_S = 0.05
_LOAD_S = 120.0
_ATTACH_S = 60.0
_STALLED_S = 30.0
_FIRST_WORD_S = 5.0
# A replica that dies so often as soon as it is there, without having been given anything, would do so for ever; so would a
# template that dies while it loads.
_MOST_FRUITLESS = 5
_AT_ONCE_S = 1.0
# Who follows a run and dies without having brought an update is replaced after twice as long each time, up to so often.
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_MOST_FOLLOWERS = 12


@dataclass
class _Place:
    """A ring and who serves it; ``child`` is None between a death and the gateway's ``Released``."""

    rank: int
    threads: int
    wake: int
    child: Child | None = None
    up: bool = False
    deaths: int = 0
    fruitless: int = 0
    # It gets nothing more, and ends when it has finished what it had.
    leaving: bool = False
    posted_at_death: int = -1
    # How many batches it had done when it was last seen to have more; -1: it had none.
    done_seen: int = -1
    done_at: float = field(default_factory=time.monotonic)
    up_at: float = field(default_factory=time.monotonic)


class Crew:
    """One model's template and replicas."""

    def __init__(
        self, source: ModelSource, cores: int, replicas: int | ReplicaRange | None, gentle: bool = False,
        ground: Ground | None = None,
    ) -> None:  # fmt: skip
        """``replicas``: how many, or None to find out by measurement. ``gentle``: load and measure at the lowest priority.

        ``ground``: whom the template is forked from, which has imported ``PRELOAD``.
        """
        self.source = source
        self._cores = cores
        self.range = ReplicaRange.of(replicas)
        self.threads = 1
        self._gentle = gentle
        self._supervisor = Supervisor(preload=PRELOAD, gentle=gentle, ground=ground)
        self._places: dict[int, _Place] = {}
        self._measured: dict[int, dict[int, float]] = {}
        self.on_up: Callable[[int, int], None] = lambda rank, wake: None
        self.on_down: Callable[[int], None] = lambda rank: None
        # Told why weights that follow a run do so no more, and of updates that were not taken.
        self.on_lost: Callable[[str, bool], None] = lambda reason, ended: None
        self.on_skipped: Callable[[str], None] = lambda sentence: None
        self._follower: Child | None = None
        self._follows = False
        # How often it has died since its last update, and when the next one begins.
        self._fruitless, self._updates_at_death = 0, 0.0
        self._next_follower_at = float("inf")
        self.deaths = 0

    # -- starting ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the template while the caller goes on."""
        self._supervisor.start()

    def load(self, like: Crew | None = None) -> None:
        """Load the model, try it, reserve the memory. ``like``: an older version, whose way of computing is taken over.

        Raises what the model's own code raised, TargetError for a bad bundle.
        """
        self._supervisor.load(_HOST, self.source, _LOAD_S)
        self.signature: ModelSignature = self._supervisor.call("describe", timeout_s=10.0)
        self._supervisor.call("try_out", timeout_s=_LOAD_S)
        if self.source.live is not None and like is not None and self._supervisor.call("first_update", timeout_s=10.0) is None:
            # A checkpoint may be older than what answers now.
            raise RequestError("Nobody answers who publishes the run's weights.")
        self._choose_computing(like)
        self._sample, self._expected = self._supervisor.call("sample", timeout_s=10.0)
        self._tokenizer: str | None = self._supervisor.call("tokenizer", timeout_s=10.0)
        slot_bytes = sum(row_bytes(t) for t in (*self.signature.inputs, *self.signature.outputs))
        most = max(self._cores, self.range.most or 1)
        slots = max(_LEAST_SLOTS, min(_MOST_SLOTS, _MEMORY_BYTES // slot_bytes))
        # One ring more than replicas: two ways of sharing the cores are tried beside each other.
        self.layout = SlotLayout.of(self.signature, slots, rings=most + 1, max_batch=_MOST_BATCH)
        # Filling so much memory with zeros takes a core for a while.
        self.slots = gently(lambda: Slots.create(self.layout)) if self._gentle else Slots.create(self.layout)
        self.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def _choose_computing(self, like: Crew | None) -> None:
        """``like``: whose layout and precision are taken over, the latter only if it is within the tolerance here as well."""
        self.precision: Precision
        self.rewrites: tuple[str, ...]
        layout, name = (None, None) if like is None else (like.memory_layout, like.precision.name)
        self.memory_layout: str = self._supervisor.call("choose_layout", layout, timeout_s=_LOAD_S)
        if self.source.live is not None:
            # Nothing that is computed from weights beforehand: they change.
            self.precision, self.rewrites = Precision(), ()
            self._supervisor.call("make_banks", timeout_s=_LOAD_S)
            return
        if like is not None and like.source.live is not None:
            name = None
        self.precision = self._supervisor.call("choose_precision", name, timeout_s=_LOAD_S)
        # Another version may be another network, which has to be checked anew.
        names = self.rewrites if like is self else None
        self.rewrites = self._supervisor.call("choose_rewrites", names, timeout_s=_LOAD_S)

    def choose(self, like: Crew | None = None) -> None:
        """Find out whether many replicas of one thread or one of all cores answers more, and keep the better.

        ``like``: the crew of an older version, whose choice is taken over.
        """
        most = _MOST_BATCH if self.signature.longest is None else _MOST_UNITS
        batches = tuple(2**k for k in range(most.bit_length()))
        least, at_most = self.range.least, self.range.most
        if like is not None:
            options = [(like.replicas, like.threads)]
        elif self.range.fixed:
            options = [(least, max(1, self._cores // least))]
        else:
            many = max(least, min(self._cores, at_most or self._cores))
            options = [(many, max(1, self._cores // many))] + [(1, self._cores)] * (many > 1 and least == 1)
        tried = [self._try(count, threads, batches) for count, threads in options]
        best = max(tried, key=lambda option: option.rows_per_s)
        for option in tried:
            if option is not best:
                self._dismiss(option.places)
        self.measured_s = best.measured_s
        self.threads = best.places[0].threads
        unit = "rows" if self.signature.longest is None else f"pieces of {UNIT}"
        self.why = (
            "; ".join(f"{option.text}: {option.rows_per_s:.0f} {unit}/s" for option in tried)
            + f"; took {best.text}"
            + (f", pictures {self.memory_layout}" if self.memory_layout != AS_IT_IS else "")
            + (f"; {self.precision}" if self.precision.tried else "")
            + (f", rewritten by {' and '.join(self.rewrites)}" if self.rewrites else "")
            + ("; its weights follow their run, so it is computed as it is" if self.source.live is not None else "")
        )
        self._supervisor.fork()
        # They are about to answer themselves.
        self._gentle = False
        self._supervisor.hurry()

    def _try(self, count: int, threads: int, batches: Sequence[int]) -> _Option:
        first = len(self._places)
        places = [
            _Place(rank, threads, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE))
            for rank in range(first, first + count)
        ]
        for place in places:
            self._places[place.rank] = place
            self._assign(place, tuple(batches), _MEASURE_S)
        found = [self._await_attached(place) for place in places]
        common = {
            size: sum(one[size] for one in found) / count for size in found[0] if all(size in one for one in found)
        }
        rate = count * max(size / seconds for size, seconds in common.items())
        text = f"{count} replica{'s' * (count > 1)} × {threads} thread{'s' * (threads > 1)}"
        return _Option(places, common, rate, text)

    def _dismiss(self, places: Sequence[_Place]) -> None:
        for place in places:
            del self._places[place.rank]
            assert place.child is not None
            self._supervisor.kill(place.child)
            os.close(place.wake)

    def introduction(self) -> AddModel:
        """What a gateway has to know of the model."""
        return AddModel(
            signature=self.signature, layout=self.layout, measured_s=self.measured_s, why=self.why, sample=self._sample,
            expected=self._expected, tokenizer=self._tokenizer,
            precision=self.precision.describe(), live=self.source.live is not None,
        )  # fmt: skip

    @property
    def replicas(self) -> int:
        """How many there are to be; those that leave do not count."""
        return sum(not place.leaving for place in self._places.values())

    @property
    def most_replicas(self) -> int:
        """How many there may be: each thread has a core, unless it was said how many."""
        return max(self.range.least, self.range.most or self._cores // self.threads)

    @property
    def settled(self) -> bool:
        """Whether everybody is at work, and nobody is coming or leaving."""
        return all(place.up and not place.leaving for place in self._places.values())

    @property
    def edition(self) -> Edition:
        """The model's name and version."""
        return Edition(self.signature.name, self.signature.version)

    def ready(self) -> list[tuple[int, int]]:
        """(rank, the eventfd that wakes it) of every replica that takes batches."""
        return [(place.rank, place.wake) for place in self._places.values() if place.up]

    # -- more and less -------------------------------------------------------------------------------------------

    def add(self) -> None:
        """One replica more, from the process in reserve; ``on_up`` follows when it takes batches."""
        rank = min(set(range(len(self.slots.rings))) - set(self._places))
        place = self._places[rank] = _Place(rank, self.threads, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE))
        try:
            self._assign(place, (1,), _WARM_S)
        except ChannelClosed:
            # The template is gone, which ``poll`` sees; whoever wants one more asks again.
            del self._places[rank]
            return os.close(place.wake)
        self._keep_a_spare()

    def remove(self) -> int:
        """Choose who leaves; the gateway has to be told, and ``end`` to be called when it uses that one no more."""
        place = max((place for place in self._places.values() if place.up), key=lambda place: place.rank)
        place.leaving = True
        return place.rank

    def end(self, rank: int) -> None:
        """End a replica that leaves."""
        place = self._places.get(rank)
        if place is not None and place.leaving:
            del self._places[rank]
            if place.child is not None:
                self._supervisor.kill(place.child)
            os.close(place.wake)

    def stay(self) -> None:
        """There is a new gateway: who was leaving is needed again."""
        for place in self._places.values():
            place.leaving = False

    # -- weights that follow a run -------------------------------------------------------------------------------

    def follow(self) -> None:
        """Let the weights keep up with the run from now on; ``on_lost`` says when that ends."""
        if self.source.live is None:
            return
        self._follows = True
        self.slots.live[LIVE.PUBLISHED_AT] = time.time()
        self._begin_to_follow()

    def _begin_to_follow(self) -> None:
        assert self.source.live is not None
        try:
            child = self._supervisor.standby()
        except ChannelClosed:
            # The template is gone, which ``poll`` sees: it begins again with this, too.
            return
        self._follower = child
        self._supervisor.assign(child, "follower", 0, 0)
        with contextlib.suppress(ChannelClosed):
            child.channel.send(FollowRun(self.layout, self.source.live, _FIRST_WORD_S), (self.slots.fd,))
        self._keep_a_spare()

    def _attend_follower(self, dead: Sequence[Child]) -> None:
        child = self._follower
        if child is None:
            if self._follows and time.monotonic() >= self._next_follower_at:
                self._begin_to_follow()
            return
        while child.inbox:
            message = child.inbox.pop(0)
            if isinstance(message, Skipped):
                self.on_skipped(message.sentence)
            elif isinstance(message, Lost):
                self._lose(message.reason, message.ended)
        if child in dead:
            self._follower = None
            if self._follows:
                self.deaths += 1
                updates = float(self.slots.live[LIVE.UPDATES])
                self._fruitless = self._fruitless + 1 if updates == self._updates_at_death else 0
                self._updates_at_death = updates
                if self._fruitless >= _MOST_FOLLOWERS:
                    return self._lose(f"The process that takes them in died again and again ({child.cause()}).")
                pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2**self._fruitless) if self._fruitless else 0.0
                self._next_follower_at = time.monotonic() + pause_s

    def _lose(self, reason: str, ended: bool = False) -> None:
        self._follows = False
        self.slots.live[LIVE.ENDED] = 1
        self.on_lost(reason, ended)

    # -- a replica's life ----------------------------------------------------------------------------------------

    def _assign(self, place: _Place, batches: tuple[int, ...], budget_s: float) -> None:
        child = self._supervisor.standby()
        self._supervisor.assign(child, "replica", place.rank, place.deaths)
        message = Attach(layout=self.layout, ring=place.rank, threads=place.threads, batches=batches, budget_s=budget_s,
                         gentle=self._gentle and not place.deaths)  # fmt: skip
        place.child, place.up = child, False
        try:
            child.channel.send(message, (self.slots.fd, place.wake, self.done_fd))
        except ChannelClosed:
            return

    def _await_attached(self, place: _Place) -> dict[int, float]:
        deadline = time.monotonic() + _ATTACH_S
        while time.monotonic() < deadline:
            dead = self._supervisor.poll(0.05)
            assert place.child is not None
            if place.child in dead:
                raise JobFailed(
                    f"A replica of {self.signature.name} died ({place.child.cause()}) while it tried the model; "
                    "if it was killed for memory, use fewer replicas or a smaller model."
                )
            if not place.up:
                self._look_at(place, silent=True)
            if place.up:
                return self._measured[place.rank]
        raise DeadlineError(f"Replica {place.rank} of {self.signature.name} did not answer within {_ATTACH_S:g} s.")

    def _look_at(self, place: _Place, silent: bool = False) -> None:
        child = place.child
        while child is not None and child.inbox:
            message: Any = child.inbox.pop(0)
            if isinstance(message, Attached):
                self._measured[place.rank] = message.measured_s
                place.up, place.done_at, place.up_at = True, time.monotonic(), time.monotonic()
                if not silent:
                    self.on_up(place.rank, place.wake)

    def poll(self, timeout_s: float) -> None:
        """Take in what has happened to replicas, and replace the dead."""
        try:
            dead = self._supervisor.poll(timeout_s)
        except ChannelClosed:
            return self._begin_again()
        self._attend_follower(dead)
        for place in list(self._places.values()):
            if place.child in dead:
                self._bury(place)
            else:
                self._look_at(place)
                self._end_if_stalled(place)

    def _bury(self, place: _Place) -> None:
        self.deaths += 1
        self.slots.using[place.rank] = 0
        place.deaths += 1
        posted = self.slots.rings[place.rank].posted
        at_once = not place.up or time.monotonic() - place.up_at < _AT_ONCE_S
        place.fruitless = place.fruitless + 1 if at_once and posted == place.posted_at_death else 0
        place.posted_at_death = posted
        if place.fruitless >= _MOST_FRUITLESS:
            raise JobFailed(
                f"Replica {place.rank} of {self.signature.name} died again and again before it was given a request; "
                "if it was killed for memory, use fewer replicas or a smaller model."
            )
        place.child, place.up = None, False
        self.on_down(place.rank)

    def _begin_again(self) -> None:
        """The template is gone, and every replica with it."""
        for place in list(self._places.values()):
            if place.child is not None:
                self._bury(place)
        self.slots.using[:] = 0
        self._load_again()
        self._follower = None
        self.slots.live[[LIVE.BANK, LIVE.UPDATE_0, LIVE.UPDATE_1]] = 0
        if self._follows:
            self.follow()

    def _load_again(self) -> None:
        for attempt in range(1, _MOST_FRUITLESS + 1):
            try:
                self._supervisor.restart(_LOAD_S)
                return self._choose_computing(self)
            except TemplateLost:
                if attempt == _MOST_FRUITLESS:
                    raise

    def release(self, rank: int) -> None:
        """The gateway uses nothing of a dead replica's ring any more: the next one may have it."""
        place = self._places.get(rank)
        if place is not None and place.leaving:
            self.end(rank)
        elif place is not None and place.child is None:
            try:
                self._assign(place, (1,), _WARM_S)
            except ChannelClosed:
                # Nobody will say again that this ring is free.
                self._begin_again()
                self._assign(place, (1,), _WARM_S)
            self._keep_a_spare()

    def _keep_a_spare(self) -> None:
        """Fork a process in reserve; where the template is gone, ``poll`` sees it."""
        with contextlib.suppress(ChannelClosed):
            self._supervisor.fork()

    def release_all(self) -> None:
        """There is no gateway: dead replicas' rings are reset here."""
        # Again, where the template turns out to be gone meanwhile, and with it those that had been passed over.
        while dead := [place for place in self._places.values() if place.child is None]:
            for place in dead:
                if place.child is None:
                    self.slots.rings[place.rank].reset()
                    self.release(place.rank)

    def _end_if_stalled(self, place: _Place) -> None:
        """A replica that has had a batch for very long is killed, and replaced like any dead one."""
        ring, now = self.slots.rings[place.rank], time.monotonic()
        done = ring.done
        if ring.posted == done:
            # Since when it has a batch is known only when that is seen: it may be long until it is looked at again.
            place.done_seen = -1
        elif done != place.done_seen:
            place.done_seen, place.done_at = done, now
        elif place.up and now - place.done_at > _STALLED_S and place.child is not None:
            self._supervisor.kill(place.child)

    def processes(self) -> list[dict[str, Any]]:
        """Template, replicas and standbys."""
        return [row for row in self._supervisor.processes() if row["role"] != "supervisor"]

    @property
    def changes(self) -> int:
        return self._supervisor.changes

    def retire(self) -> None:
        """As ``close``, while others answer: they come first."""
        self._supervisor.step_back()
        self.close()

    def end_processes(self) -> None:
        """End all processes; safe to call twice."""
        self._supervisor.close()

    def close(self) -> None:
        """End all processes and give the memory back."""
        self.end_processes()
        if hasattr(self, "slots"):
            for place in self._places.values():
                os.close(place.wake)
            os.close(self.done_fd)
            self.slots.close()


@dataclass(frozen=True)
class _Option:
    """A way of sharing the cores, tried."""

    places: list[_Place]
    measured_s: dict[int, float]
    rows_per_s: float
    text: str
