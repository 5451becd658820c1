"""How a lead answers: each question once, now or later; a question that comes again gets the same answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.ps.checks import MOST
from shoal.ps.endpoint import Endpoint
from shoal.ps.messages import Refused
from shoal.ps.wire import Malformed, encode
from shoal.train.remote import words

_MOST_OPEN = 16
"""Everybody asks one thing at a time, and looks for orders beside it."""


@dataclass
class Asked:
    """A question that is not answered yet; ``frames``: what came with it."""

    identity: bytes
    said: words.Said
    frames: Sequence[Any]
    since: float = field(default_factory=time.monotonic)


class Desk:
    """The lead's endpoint, question by question. Everybody asks one thing at a time, and looks for orders beside it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        # Raises Malformed where what is said cannot be meant.
        self.check: Callable[[words.Said, Sequence[Any]], None] = lambda said, frames: None
        self.open: list[Asked] = []
        self._last: dict[bytes, tuple[int, bytes, Sequence[Any]]] = {}
        self._dead: set[bytes] = set()

    def receive(self, timeout_s: float) -> list[Asked]:
        """The questions that have come and are new; they are open until they are answered."""
        found = []
        for identity, frames in self.endpoint.receive(timeout_s):
            if identity in self._dead:
                continue
            try:
                said = words.decode_said(frames)
                if sum(asked.identity == identity for asked in self.open) >= _MOST_OPEN:
                    raise Malformed(f"somebody asks more than {_MOST_OPEN} things at once")
            except Malformed as error:
                self.endpoint.complain(str(error))
                continue
            try:
                self.check(said, frames[1:])
            except Malformed as error:
                self.endpoint.complain(str(error))
                refused = Refused(min(said.number, MOST), f"The lead was told what cannot be meant: {error}.")
                self.endpoint.send(identity, encode(refused))
                continue
            number, head, further = self._last.get(identity, (0, b"", ()))
            if said.number == number:
                self.endpoint.send(identity, head, further)
            elif said.number > number and not any(a.identity == identity and a.said.number == said.number for a in self.open):
                asked = Asked(identity, said, frames[1:])
                self.open.append(asked)
                found.append(asked)
        return found

    def forget(self, identity: bytes, for_good: bool) -> None:
        """Leave open what was asked under this name; ``for_good``: who asked has died, and nothing on its way is heard."""
        if for_good:
            self._dead.add(identity)
            self._last.pop(identity, None)
        self.open = [asked for asked in self.open if asked.identity != identity]

    def is_open(self, asked: Asked) -> bool:
        """Whether it still waits for an answer: not where whoever asked has died."""
        return any(other is asked for other in self.open)

    def answer(self, asked: Asked, make: Callable[[int], msgspec.Struct], frames: Sequence[Any] = ()) -> None:
        """Answer a question, unless whoever asked it has died since."""
        if not self.is_open(asked):
            return
        self.open = [other for other in self.open if other is not asked]
        head = encode(make(asked.said.number))
        # Who looks for orders may have asked something else since, and that is what may come again.
        if asked.said.number > self._last.get(asked.identity, (0, b"", ()))[0]:
            self._last[asked.identity] = (asked.said.number, head, frames)
        self.endpoint.send(asked.identity, head, frames)
