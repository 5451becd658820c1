"""Messages from one rank to another: ``send`` never blocks, ``receive`` finds its message by sender, group and tag.

A sender copies a message into memory of its own and writes letters about it (``letters.c``); a short message stands in
its letter. Nobody is asked first, and what found room has been sent: the usual message is one call into C on either
side, a copy in and a copy out. What does not fit goes on when letters have been read. A rank that waits for
anything reads whatever has come and keeps it, so two ranks that send each other more than the rings hold both get on.
"""

from __future__ import annotations

from collections import deque
from ctypes import memmove
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal.comm import letters
from shoal.errors import JobFailed

if TYPE_CHECKING:
    from shoal.comm.port import Pending, Port

_BUSY_NS = 20_000


@dataclass
class Message:
    """A message that has begun to come: where its bytes go, and how many of them are there."""

    key: int
    tag: int
    total: int
    buffer: Any
    address: int
    received: int = 0


class Sent:
    """A message that has left at once; there is nothing to wait for."""

    done = True

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        return True

    def describe(self) -> str:
        return "a message that was sent"

    def missing(self) -> list[int]:
        return []


_SENT = Sent()


class Send:
    """A message on its way out; done when its tensor may be written again."""

    def __init__(self, mail: Mailbox, receiver: int, key: int, tag: int, tensor: torch.Tensor) -> None:
        self._mail = mail
        self.receiver, self.key, self.tag = receiver, key, tag
        self.tensor = tensor
        self.address, self.total, self.sent = tensor.data_ptr(), tensor.nbytes, 0
        self.done = False

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        self._mail.push(self.receiver)
        if not self.done and nap_ns > 0:
            # The receiver may be waiting for room as well: what it has sent is taken in.
            self._mail.progress()
            self._mail.await_reader(self.receiver, spin_ns, yields, nap_ns)
            self._mail.push(self.receiver)
        return self.done

    def describe(self) -> str:
        return f"room to send {self.total} bytes to rank {self.receiver}"

    def missing(self) -> list[int]:
        return [self.receiver]


class Receive:
    """A message that is expected; done when it lies in its tensor. ``sender`` is -1 while it may be any of ``senders``."""

    def __init__(self, mail: Mailbox, senders: list[int], key: int, tag: int, tensor: torch.Tensor) -> None:
        self._mail = mail
        self.senders, self.key, self.tag = senders, key, tag
        self.tensor = tensor
        # Contiguous, so that pieces can be copied straight to where they belong.
        self.place = (
            tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        )
        self.address, self.total = self.place.data_ptr(), tensor.nbytes
        self.sender = senders[0] if len(senders) == 1 else -1
        self.done = False

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        for sender in self.senders:
            self._mail.pull(sender)
        if not self.done and nap_ns > 0:
            self._mail.push_all()
            # With several senders a nap is for one of them, in turn; naps are short.
            self.senders = [*self.senders[1:], self.senders[0]]
            self._mail.await_letter(self.senders[-1], spin_ns, yields, nap_ns)
            self._mail.pull(self.senders[-1])
        return self.done

    def deliver(self) -> None:
        """Everything has come."""
        if self.place is not self.tensor:
            self.tensor.copy_(self.place)
        self.done = True

    def describe(self) -> str:
        return f"a message of {self.total} bytes" + (f" (tag {self.tag})" if self.tag else "")

    def missing(self) -> list[int]:
        return sorted(self.senders)


@dataclass
class _Way:
    """What waits between one rank and one other."""

    queue: deque[Send] = field(default_factory=deque)
    coming: Message | None = None
    unexpected: list[Message] = field(default_factory=list)
    expected: list[Receive] = field(default_factory=list)


class Mailbox:
    """One rank's letters."""

    def __init__(self, port: Port) -> None:
        self._layout, self._base, self._rank = port.layout, port.base, port.rank
        self._clerk = letters.load()
        self.clear()

    def clear(self) -> None:
        """Forget all messages and empty this rank's words."""
        self._unsent = False
        self._ways = [_Way() for _ in range(self._layout.world_size)]
        self._post = letters.post_of(self._layout, self._base, self._rank)

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, receiver: int, key: int, tag: int, tensor: torch.Tensor) -> Pending:
        """Begin to send a contiguous tensor."""
        way = self._ways[receiver]
        sent = 0
        if not way.queue:
            total = tensor.nbytes
            sent = self._clerk.write(self._post, receiver, key, tag, total, tensor.data_ptr(), 0)
            if sent == total:
                return _SENT
        send = Send(self, receiver, key, tag, tensor)
        send.sent = max(sent, 0)
        way.queue.append(send)
        self._unsent = True
        return send

    def push(self, receiver: int) -> bool:
        """Write as many letters as there is room for; whether something is left."""
        queue = self._ways[receiver].queue
        while queue:
            send = queue[0]
            sent = self._clerk.write(self._post, receiver, send.key, send.tag, send.total, send.address, send.sent)
            if sent != send.total:
                send.sent = max(sent, 0)
                return True
            send.done = True
            queue.popleft()
        return False

    def await_reader(self, receiver: int, spin_ns: int, yields: int, nap_ns: int) -> None:
        """Wait for a moment until the receiver has read a letter more."""
        self._clerk.await_reader(self._post, receiver, *self._patience(spin_ns, yields, nap_ns))

    def _patience(self, spin_ns: int, yields: int, nap_ns: int) -> tuple[int, int, int]:
        if not self._unsent:
            return spin_ns, yields, nap_ns
        # Others may wait for what has found no room yet: soon it is tried again.
        return min(spin_ns, _BUSY_NS), yields, min(nap_ns, _BUSY_NS)

    # -- receiving -----------------------------------------------------------------------------------------------

    def receive(self, senders: list[int], key: int, tag: int, tensor: torch.Tensor) -> Receive:
        """Expect a message in a tensor."""
        receive = Receive(self, senders, key, tag, tensor)
        for sender in senders:
            for message in self._ways[sender].unexpected:
                if (message.key, message.tag) == (key, tag):
                    self._ways[sender].unexpected.remove(message)
                    self._match(receive, message, sender)
                    return receive
        for sender in senders:
            self._ways[sender].expected.append(receive)
        return receive

    def pull(self, sender: int) -> None:
        """Read all letters that have come from a rank."""
        way = self._ways[sender]
        while self._read(way, sender):
            pass

    def _read(self, way: _Way, sender: int) -> bool:
        """Read what has come of one message; whether all of it has."""
        message = way.coming
        if message is None and way.expected:
            # Mostly what comes is what is expected first.
            receive = way.expected[0]
            got = self._clerk.read(self._post, sender, receive.key, receive.tag, receive.total, receive.address, 0)
            if got == receive.total:
                self._found(receive, sender)
                receive.deliver()
                return True
            if got == letters.NOTHING:
                return False
            if got > 0:
                self._found(receive, sender)
                way.coming = Message(receive.key, receive.tag, receive.total, receive, receive.address, got)
                return False
        if message is None:
            found = self._clerk.next(self._post, sender)
            if not found:
                return False
            message = way.coming = self._begin(way, letters.Letter.from_address(found), sender)
        got = self._clerk.read(
            self._post, sender, message.key, message.tag, message.total, message.address, message.received
        )
        message.received = max(got, 0)
        if got != message.total:
            return False
        way.coming = None
        if isinstance(message.buffer, Receive):
            message.buffer.deliver()
        return True

    def _begin(self, way: _Way, letter: Any, sender: int) -> Message:
        """Where a message that begins to come belongs: to the first who expects it, or aside."""
        key, tag, total = letter.key, letter.tag, letter.total
        for receive in way.expected:
            if (receive.key, receive.tag) == (key, tag):
                message = Message(key, tag, total, receive, receive.address)
                self._match(receive, message, sender)
                return message
        aside = np.empty(max(total, 1), np.uint8)
        message = Message(key, tag, total, aside, aside.ctypes.data)
        way.unexpected.append(message)
        return message

    def _found(self, receive: Receive, sender: int) -> None:
        for other in receive.senders:
            if receive in self._ways[other].expected:
                self._ways[other].expected.remove(receive)
        receive.sender, receive.senders = sender, [sender]

    def _match(self, receive: Receive, message: Message, sender: int) -> None:
        self._found(receive, sender)
        if message.total != receive.total:
            raise JobFailed(
                f"Rank {self._rank} receives {receive.total} bytes and rank {sender} sends {message.total}; "
                "both sides need tensors of one size."
            )
        if isinstance(message.buffer, Receive):
            return
        if message.received:
            memmove(receive.address, message.address, message.received)
        message.buffer, message.address = receive, receive.address
        if message.received == message.total:
            receive.deliver()

    def await_letter(self, sender: int, spin_ns: int, yields: int, nap_ns: int) -> None:
        """Wait for a moment until a letter more has come."""
        self._clerk.await_letter(self._post, sender, *self._patience(spin_ns, yields, nap_ns))

    def progress(self) -> bool:
        """Send and read what can be, without waiting; whether something still waits to be sent."""
        left = False
        for other in range(self._layout.world_size):
            if other != self._rank:
                left = self.push(other) or left
                self.pull(other)
        return left

    def push_all(self) -> None:
        """Go on with what found no room before."""
        if self._unsent:
            self._unsent = any([self.push(other) for other in range(self._layout.world_size)])
