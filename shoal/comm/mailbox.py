"""Messages from one rank to another: ``send`` never blocks, ``receive`` finds its message by sender, group and tag.

A sender copies a message into pieces of memory of its own and writes a letter about each into the receiver's ring; a
short message stands in the letter itself. What does not fit goes on when letters have been read. A rank that waits for
anything reads whatever has come and keeps it, so two ranks that send each other more than the rings hold both get on.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal.comm.region import LETTER
from shoal.errors import JobFailed

if TYPE_CHECKING:
    from shoal.comm.port import Port

_INLINE = 0xFFFFFFFF
_BUSY_NS = 20_000


class _Letter(ctypes.Structure):
    _fields_ = [
        ("key", ctypes.c_uint64), ("tag", ctypes.c_int64), ("total", ctypes.c_uint64), ("bytes", ctypes.c_uint32),
        ("piece", ctypes.c_uint32), ("text", ctypes.c_char * (LETTER - 32)),
    ]  # fmt: skip


_TEXT_AT = _Letter.text.offset
_TEXT = LETTER - _TEXT_AT


@dataclass
class Message:
    """A message that has begun to come: where its bytes go, and how many of them are there."""

    key: int
    tag: int
    total: int
    buffer: Any
    address: int
    received: int = 0


class Send:
    """A message on its way out; done when its tensor may be written again."""

    def __init__(self, port: Port, receiver: int, key: int, tag: int, tensor: torch.Tensor) -> None:
        self._mail = port.mail
        self.receiver, self.key, self.tag = receiver, key, tag
        self.tensor = tensor
        self.address, self.total, self.sent = tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0
        self.done = False

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        self._mail.push(self.receiver)
        if not self.done and nap_ns > 0:
            # The receiver may be waiting for room as well: what it has sent is taken in.
            self._mail.progress()
            self._mail.await_reader(self.receiver, spin_ns, nap_ns)
            self._mail.push(self.receiver)
        return self.done

    def describe(self) -> str:
        return f"room to send {self.total} bytes to rank {self.receiver}"

    def missing(self) -> list[int]:
        return [self.receiver]


class Receive:
    """A message that is expected; done when it lies in its tensor. ``sender`` is None for any of ``senders``."""

    def __init__(self, port: Port, senders: list[int], key: int, tag: int, tensor: torch.Tensor) -> None:
        self._mail = port.mail
        self.senders, self.key, self.tag = senders, key, tag
        self.tensor = tensor
        # Contiguous, so that pieces can be copied straight to where they belong.
        self.place = (
            tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        )
        self.total = tensor.numel() * tensor.element_size()
        self.message: Message | None = None
        self.sender = senders[0] if len(senders) == 1 else -1
        self.done = False

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        for sender in self.senders:
            self._mail.pull(sender)
        if not self.done and nap_ns > 0:
            self._mail.push_all()
            # With several senders a nap is for one of them, in turn; naps are short.
            self.senders = [*self.senders[1:], self.senders[0]]
            self._mail.await_letter(self.senders[-1], spin_ns, nap_ns)
            self._mail.pull(self.senders[-1])
        return self.done

    def describe(self) -> str:
        return f"a message of {self.total} bytes" + (f" (tag {self.tag})" if self.tag else "")

    def missing(self) -> list[int]:
        return sorted(self.senders)


@dataclass
class _Way:
    """What one rank knows of its letters to, and from, one other."""

    written: int = 0
    freed: int = 0
    queue: deque[Send] = field(default_factory=deque)
    used: deque[int] = field(default_factory=deque)
    read: int = 0
    coming: Message | None = None
    unexpected: list[Message] = field(default_factory=list)
    expected: list[Receive] = field(default_factory=list)


class Mailbox:
    """One rank's letters."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._layout, self._base, self._rank = port.layout, port.base, port.rank
        self.clear()

    def clear(self) -> None:
        """Forget all messages and empty this rank's words."""
        world_size, layout = self._port.world_size, self._layout
        self._unsent = False
        self._ways = [_Way() for _ in range(world_size)]
        self._free = [world_size + index for index in range(layout.mail_pieces)]
        for other in range(world_size):
            for offset in (layout.head(self._rank, other), layout.tail(self._rank, other)):
                ctypes.c_uint32.from_address(self._base + offset).value = 0

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, receiver: int, key: int, tag: int, tensor: torch.Tensor) -> Send:
        """Begin to send a contiguous tensor."""
        send = Send(self._port, receiver, key, tag, tensor)
        self._ways[receiver].queue.append(send)
        self._unsent = self.push(receiver) or self._unsent
        return send

    def push(self, receiver: int) -> bool:
        """Write as many letters as there is room for; whether something is left."""
        way = self._ways[receiver]
        if not way.queue:
            return False
        layout = self._layout
        self._take_back(way, receiver)
        while way.queue and way.written - way.freed < layout.letters:
            send = way.queue[0]
            left = send.total - send.sent
            address = self._base + layout.letter(self._rank, receiver, way.written)
            letter = _Letter.from_address(address)
            if left <= _TEXT:
                piece, size, place = _INLINE, left, address + _TEXT_AT
            else:
                piece = self._take_piece(way, receiver)
                if piece < 0:
                    return True
                size = min(left, layout.mail_piece_bytes)
                place = self._base + layout.mail_piece(self._rank, piece)
            ctypes.memmove(place, send.address + send.sent, size)
            letter.key, letter.tag, letter.total = send.key, send.tag, send.total
            letter.bytes, letter.piece = size, piece
            way.used.append(piece)
            way.written += 1
            self._port.native.post(self._base + layout.head(self._rank, receiver), way.written)
            send.sent += size
            if send.sent == send.total:
                send.done = True
                way.queue.popleft()
        return bool(way.queue)

    def _take_back(self, way: _Way, receiver: int) -> None:
        for _ in range(self._news(self._layout.tail(receiver, self._rank), way.freed)):
            piece = way.used.popleft()
            if piece != _INLINE and piece >= self._port.world_size:
                self._free.append(piece)
            way.freed += 1

    def _take_piece(self, way: _Way, receiver: int) -> int:
        """A piece for a letter; every receiver has one that the others' messages cannot take away. -1: none now."""
        if self._free:
            return self._free.pop()
        return -1 if receiver in way.used else receiver

    def await_reader(self, receiver: int, spin_ns: int, nap_ns: int) -> None:
        """Wait for a moment until the receiver has read a letter more."""
        self._await(self._layout.tail(receiver, self._rank), self._ways[receiver].freed + 1, spin_ns, nap_ns)

    def _await(self, offset: int, target: int, spin_ns: int, nap_ns: int) -> None:
        if self._unsent:
            # Others may wait for what has found no room yet: soon it is tried again.
            spin_ns, nap_ns = min(spin_ns, _BUSY_NS), min(nap_ns, _BUSY_NS)
        self._port.native.wait_all(self._base + offset, 0, 1, target, spin_ns * 1e-9, max(spin_ns, nap_ns) * 1e-9)

    # -- receiving -----------------------------------------------------------------------------------------------

    def receive(self, senders: list[int], key: int, tag: int, tensor: torch.Tensor) -> Receive:
        """Expect a message in a tensor."""
        receive = Receive(self._port, senders, key, tag, tensor)
        for sender in senders:
            way = self._ways[sender]
            for message in way.unexpected:
                if (message.key, message.tag) == (key, tag):
                    way.unexpected.remove(message)
                    self._match(receive, message, sender)
                    return receive
        for sender in senders:
            self._ways[sender].expected.append(receive)
        return receive

    def pull(self, sender: int) -> None:
        """Read all letters that have come from a rank."""
        way = self._ways[sender]
        layout = self._layout
        for _ in range(self._news(layout.head(sender, self._rank), way.read)):
            address = self._base + layout.letter(sender, self._rank, way.read)
            letter = _Letter.from_address(address)
            inline = letter.piece == _INLINE
            place = address + _TEXT_AT if inline else self._base + layout.mail_piece(sender, letter.piece)
            message = way.coming or self._begin(way, letter, sender)
            ctypes.memmove(message.address + message.received, place, letter.bytes)
            message.received += letter.bytes
            way.read += 1
            self._port.native.post(self._base + layout.tail(self._rank, sender), way.read)
            way.coming = None
            if message.received < message.total:
                way.coming = message
            elif isinstance(message.buffer, Receive):
                _deliver(message.buffer, message)

    def _begin(self, way: _Way, letter: Any, sender: int) -> Message:
        """Where a message that begins to come belongs: to the first who expects it, or aside."""
        key, tag, total = letter.key, letter.tag, letter.total
        for receive in way.expected:
            if (receive.key, receive.tag) == (key, tag):
                message = Message(key, tag, total, receive, receive.place.data_ptr())
                self._match(receive, message, sender)
                return message
        aside = np.empty(max(total, 1), np.uint8)
        message = Message(key, tag, total, aside, aside.ctypes.data)
        way.unexpected.append(message)
        return message

    def _match(self, receive: Receive, message: Message, sender: int) -> None:
        for other in receive.senders:
            if receive in self._ways[other].expected:
                self._ways[other].expected.remove(receive)
        receive.sender, receive.senders, receive.message = sender, [sender], message
        if message.total != receive.total:
            raise JobFailed(
                f"Rank {self._rank} receives {receive.total} bytes and rank {sender} sends {message.total}; "
                "both sides need tensors of one size."
            )
        if isinstance(message.buffer, Receive):
            return
        if message.received:
            ctypes.memmove(receive.place.data_ptr(), message.address, message.received)
        message.buffer, message.address = receive, receive.place.data_ptr()
        if message.received == message.total:
            _deliver(receive, message)

    def await_letter(self, sender: int, spin_ns: int, nap_ns: int) -> None:
        """Wait for a moment until a letter more has come."""
        self._await(self._layout.head(sender, self._rank), self._ways[sender].read + 1, spin_ns, nap_ns)

    def progress(self) -> bool:
        """Send and read what can be, without waiting; whether something still waits to be sent."""
        left = False
        for other in range(self._port.world_size):
            if other != self._rank:
                left = self.push(other) or left
                self.pull(other)
        return left

    def push_all(self) -> None:
        """Go on with what found no room before."""
        if self._unsent:
            self._unsent = any([self.push(other) for other in range(self._port.world_size)])

    def _news(self, offset: int, known: int) -> int:
        """How far a word of another rank is beyond what is known of it."""
        news = (ctypes.c_uint32.from_address(self._base + offset).value - known) & 0xFFFFFFFF
        # Never more than the ring holds: such a word was emptied, because its rank begins anew.
        return news if news <= self._layout.letters else 0


def _deliver(receive: Receive, message: Message) -> None:
    if receive.place is not receive.tensor:
        receive.tensor.copy_(receive.place)
    receive.done = True
