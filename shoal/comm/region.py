"""How the shared memory is cut through which the ranks of one machine speak: see ``port.py``.

All zeros is its beginning. Every rank has a block in which only that rank writes:

* a page of words: whether it has met the others (``met``), whether it sleeps (``asleep``), how many letters it has
  written for each (``heads``) and how many it has read from each (``tails``);
* seats, one for each of its groups, through which collectives go (``rounds.c``);
* an outbox for each other rank, a ring of letters (``letters.c``), and the pieces of memory that they point to.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.comm.rounds import LINE, MEMBERS, seat_bytes
from shoal.errors import RequestError

_PAGE = 4096
LETTER = 256


@dataclass(frozen=True, kw_only=True)
class RegionLayout:
    """Where everything lies, as offsets in bytes from the beginning.

    Attributes:
        world_size: ranks.
        seats: how many groups a rank can be in at a time.
        piece_bytes: what one half of a seat holds; a multiple of 64 times the ranks is best.
        letters: how many messages may be on their way from one rank to another.
        mail_pieces, mail_piece_bytes: what holds the messages that a rank has sent and nobody has read; one piece for
            each receiver comes on top.
    """

    world_size: int
    seats: int = 8
    piece_bytes: int = 512 << 10
    letters: int = 64
    mail_pieces: int = 24
    mail_piece_bytes: int = 128 << 10

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= MEMBERS:
            raise RequestError(f"{self.world_size} ranks cannot share one machine's memory; use 1 to {MEMBERS}.")

    @property
    def bytes(self) -> int:
        return self.world_size * self._block

    def met(self, rank: int) -> int:
        return rank * self._block

    def asleep(self, rank: int) -> int:
        return rank * self._block + LINE

    def head(self, sender: int, receiver: int) -> int:
        return sender * self._block + LINE * (2 + receiver)

    def tail(self, receiver: int, sender: int) -> int:
        return receiver * self._block + LINE * (2 + self.world_size + sender)

    def seat(self, rank: int, index: int) -> int:
        return rank * self._block + self._words + index * self._seat

    def letter(self, sender: int, receiver: int, number: int) -> int:
        start = self._words + self.seats * self._seat + receiver * self.letters * LETTER
        return sender * self._block + start + number % self.letters * LETTER

    def mail_piece(self, sender: int, index: int) -> int:
        start = self._words + self.seats * self._seat + self.world_size * self.letters * LETTER
        return sender * self._block + start + index * self.mail_piece_bytes

    @property
    def _words(self) -> int:
        return _pages(2 * LINE * (1 + self.world_size))

    @property
    def _seat(self) -> int:
        return _pages(seat_bytes(self.piece_bytes))

    @property
    def _block(self) -> int:
        pieces = (self.world_size + self.mail_pieces) * self.mail_piece_bytes
        return _pages(self._words + self.seats * self._seat + self.world_size * self.letters * LETTER + pieces)


def exchange_bytes(world_size: int) -> int:
    """How many bytes of shared memory, all zero, so many ranks need to speak with one another."""
    return RegionLayout(world_size=world_size).bytes


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
