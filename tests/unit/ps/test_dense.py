"""The dense pieces of a server and what its optimizer keeps of them."""

from __future__ import annotations

import psutil
import torch
from shards import PIECES, adam

from shoal.ps.dense import DensePart, cut


def test_no_state_is_what_a_new_optimizer_begins_with() -> None:
    # Adagrad makes its sums as it is made, in older versions of torch only then.
    part = DensePart(PIECES, lambda found: torch.optim.Adagrad([p for _, p in found], lr=0.1, initial_accumulator_value=0.5))
    part.apply({0: torch.ones(PIECES[0].numel)}, 1.0)
    part.put_state(0, {})
    assert torch.equal(part.state(0)["sum"], torch.full((PIECES[0].numel,), 0.5)) and float(part.state(0)["step"]) == 0
    before = part.weight(0).clone()
    part.apply({0: torch.ones(PIECES[0].numel)}, 1.0)
    torch.testing.assert_close(part.weight(0), before - 0.1 / 1.5**0.5)


def test_memory_of_pieces_that_are_given_up_is_given_back() -> None:
    """Also where they lay between others, which stay what they are, with what the optimizer keeps of them."""
    pieces = cut("w", (4 << 20,), torch.float32, 0, 0, True)
    part, like = DensePart(pieces, adam), DensePart(pieces, adam)
    gradients = {piece.number: torch.full((piece.numel,), 1.0 + piece.number) for piece in pieces}
    for each in (part, like):
        each.apply(gradients, 1.0)
    before = psutil.Process().memory_info().rss
    part.give_up([piece.number for piece in pieces if piece.number % 2])
    # Half of the weights, and of both of Adam's moments.
    assert before - psutil.Process().memory_info().rss > 0.4 * 3 * (16 << 20)
    for each in (part, like):
        each.apply({number: gradients[number] for number in part.pieces}, 1.0)
    assert len(part.pieces) == len(pieces) // 2
    assert all(torch.equal(part.weight(number), like.weight(number)) for number in part.pieces)
