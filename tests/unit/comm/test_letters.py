"""Letters between two ranks that both live in this process: whole, in order, with and without a compiler."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from shoal.comm import letters, native
from shoal.comm.letters import ANOTHER, NOTHING, Clerk, Letter, post_of
from shoal.comm.region import RegionLayout

LAYOUT = RegionLayout(world_size=2, piece_bytes=128, seats=1, letters=4, mail_pieces=2, mail_piece_bytes=512)
KEY = 7


class Rank:
    """One rank's letters, and the functions with which it writes and reads them."""

    def __init__(self, region: torch.Tensor, rank: int, clerk: Clerk) -> None:
        self.region = region
        self.post, self.rank, self.clerk = post_of(LAYOUT, region.data_ptr(), rank), rank, clerk

    def write(self, text: bytes, sent: int = 0, *, tag: int = 0) -> int:
        address = ctypes.cast(text, ctypes.c_void_p).value or 0
        return self.clerk.write(self.post, 1 - self.rank, KEY, tag, len(text), address, sent)

    def read(self, buffer: bytearray, got: int = 0, *, tag: int = 0) -> int:
        place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        return self.clerk.read(self.post, 1 - self.rank, KEY, tag, len(buffer), ctypes.addressof(place), got)


def pair(kinds: str) -> tuple[Rank, Rank]:
    if "c" in kinds and native.load().name != "c":
        pytest.skip("no C compiler here")
    region = torch.zeros(LAYOUT.bytes, dtype=torch.uint8)
    return tuple(  # type: ignore[return-value]
        Rank(region, rank, letters.load() if kind == "c" else letters.InPython()) for rank, kind in enumerate(kinds)
    )


@pytest.mark.parametrize("kinds", ["cc", "cp", "pc", "pp"])
def test_messages_come_whole_and_in_order_whoever_is_early(kinds: str) -> None:
    draw = random.Random(3)
    writer, reader = pair(kinds)
    texts = [draw.randbytes(draw.choice([0, 1, 223, 224, 225, 512, 513, 3000])) for _ in range(150)]
    left, came = list(texts), []
    sent = got = 0
    buffer = bytearray(len(texts[0]))
    full = False
    while len(came) < len(texts):
        if left and draw.random() < 0.5:
            now = writer.write(left[0], sent)
            full = full or now in (sent, NOTHING)
            sent = max(0, now)
            if now == len(left[0]):
                left.pop(0)
                sent = 0
        else:
            now = reader.read(buffer, got)
            got = max(0, now)
            if now == len(buffer):
                came.append(bytes(buffer))
                got, buffer = 0, bytearray(len(texts[len(came)]) if len(came) < len(texts) else 0)
    assert came == texts and full
    # All pieces are free again, and nothing is left to read.
    assert writer.write(b"") == 0 and writer.post.pieces_free == LAYOUT.mail_pieces
    assert reader.read(bytearray()) == 0 and reader.read(bytearray()) == NOTHING


@pytest.mark.parametrize("kinds", ["cc", "pp"])
def test_what_comes_is_only_taken_for_what_it_is(kinds: str) -> None:
    writer, reader = pair(kinds)
    assert reader.clerk.next(reader.post, 0) is None
    assert writer.write(b"abc", tag=2) == 3
    assert reader.read(bytearray(3), tag=1) == ANOTHER and reader.read(bytearray(4), tag=2) == ANOTHER
    letter = Letter.from_address(reader.clerk.next(reader.post, 0) or 0)
    assert (letter.key, letter.tag, letter.total, letter.bytes) == (KEY, 2, 3, 3)
    assert reader.read(buffer := bytearray(3), tag=2) == 3 and buffer == b"abc"


@pytest.mark.parametrize("kinds", ["cc", "pp"])
def test_one_receiver_cannot_take_the_last_piece_of_another(kinds: str) -> None:
    writer, reader = pair(kinds)
    # Two pieces for anybody and one that is this receiver's; after them there is no room until something is read.
    assert writer.write(bytes(4000)) == 3 * LAYOUT.mail_piece_bytes
    assert not writer.clerk.await_reader(writer.post, 1, 0, 0, 0)
    assert reader.clerk.await_letter(reader.post, 0, 0, 0, 0)
    assert reader.read(bytearray(4000)) == 3 * LAYOUT.mail_piece_bytes
    assert writer.clerk.await_reader(writer.post, 1, 0, 0, 0)
    assert writer.write(bytes(4000), 3 * LAYOUT.mail_piece_bytes) == 6 * LAYOUT.mail_piece_bytes
