"""Waiting for others: every wait of a worker or a server has a deadline and a name, and ends when the run does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shoal.comm.arena import Arena, Note, Order, Phase, Signal, Slot
from shoal.errors import DeadlineError, ShoalError


class Aborted(ShoalError):
    """The supervisor has ended the run."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """How long a worker waits for its peers, and how."""

    spin_s: float
    deadline_s: float = 3600.0
    slice_s: float = 0.2


class Spinning:
    """How long to look at a word before sleeping on it, by how long it has taken lately.

    A sleeper is woken in some 50 to 300 µs, which is more than a small push takes. So short waits are spun through, the
    core given up at each look; where waits are long, spinning would only take time from those who work.
    """

    def __init__(self, most_s: float = 500e-6) -> None:
        self._most_s = most_s
        self._usual_s = 0.0

    @property
    def spin_s(self) -> float:
        return self._most_s if self._usual_s < self._most_s else 0.0

    def learn(self, waited_s: float) -> None:
        """A wait took so long."""
        # One that was very long says no more than that.
        self._usual_s += (min(waited_s, 8 * self._most_s) - self._usual_s) / 4


class Waiter:
    """One process's way of waiting for others in an arena; ``place``: its own (see ``Arena.places``)."""

    def __init__(self, arena: Arena, place: int, waiting: Waiting) -> None:
        self.arena = arena
        self.place = place
        self.slot: Slot = arena.places[place]
        self._waiting = waiting
        self.waited_s = 0.0

    def await_supervisor(self, order: Order, target: int, what: str, check: Callable[[], None] | None = None) -> None:
        """Wait for the supervisor's word."""
        supervisor, itself = self.arena.supervisor, len(self.arena.places)
        self.wait_for(lambda times: -1 if supervisor.wait(order, target, times[1]) else itself, what, check)

    def await_end(self) -> None:
        """Wait until the supervisor ends the run: Aborted."""

        def attempt(times: tuple[float, float]) -> int:
            time.sleep(times[1])
            return len(self.arena.places)

        self.wait_for(attempt, "the end of the run")

    def wait(self, signal: Signal, target: int) -> None:
        """Wait until all ranks have posted; Aborted when the run ends, DeadlineError with the missing rank's name."""
        self.wait_for(lambda s: self.arena.wait_all(signal, target, *s), f"{signal.name.lower()} of step {target}")

    def wait_updaters(self, signal: Signal, target: int) -> None:
        """The same for all who update weights."""
        self.wait_for(lambda s: self.arena.wait_updaters(signal, target, *s), f"{signal.name.lower()} of step {target}")

    def must_stop(self, step: int) -> bool:
        """Whether the run ends here: the leader said so before it finished the step, or an observer when all had."""
        return step > 0 and step in (
            int(self.arena.leader.note(Note.STOP_AFTER)),
            int(self.arena.supervisor.note(Note.STOP_AT)),
        )

    def wait_for(
        self, attempt: Callable[[tuple[float, float]], int], what: str, check: Callable[[], None] | None = None
    ) -> None:
        """Repeat a short wait (its argument: spin and timeout in s; its result: -1 or the missing place) until it succeeds.

        ``check`` is asked between the attempts, and may raise.
        """
        waiting = self._waiting
        began = time.monotonic()
        missing = attempt((waiting.spin_s, waiting.slice_s))
        while missing >= 0:
            self.slot.write(Note.WAITS_FOR, missing)
            # A worker that waits is alive: it says so at each round, and the supervisor looks for those who do not.
            self.slot.write(Note.PHASE_SINCE, time.monotonic())
            if self.arena.supervisor.signal(Order.ABORT):
                raise Aborted("The run was ended.")
            if check is not None:
                check()
            if time.monotonic() - began > waiting.deadline_s:
                places = self.arena.places
                other = places[missing] if missing < len(places) else self.arena.supervisor
                doing = Phase(int(other.note(Note.PHASE))).name.lower()
                name = self.arena.place_name(self.place)
                raise DeadlineError(
                    f"{name[0].upper()}{name[1:]} waited {waiting.deadline_s:.0f} s for {what} from "
                    f"{self.arena.place_name(missing)}, which was at {doing}."
                )
            missing = attempt((0.0, waiting.slice_s))
        self.slot.write(Note.WAITS_FOR, -1)
        self.waited_s += time.monotonic() - began

    def wait_briefly(self, attempt: Callable[[tuple[float, float]], int], what: str, spinning: Spinning) -> None:
        """The same for what is likely to come soon: also where the cores are not for all, the first attempt may spin."""
        began = time.monotonic()
        first = [max(spinning.spin_s, self._waiting.spin_s)]
        self.wait_for(lambda times: attempt((first.pop(), times[1]) if first else times), what)
        spinning.learn(time.monotonic() - began)
