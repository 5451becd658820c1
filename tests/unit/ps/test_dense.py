"""The dense pieces of a server and what its optimizer keeps of them."""

from __future__ import annotations

import torch
from shards import PIECES

from shoal.ps.dense import DensePart


def test_no_state_is_what_a_new_optimizer_begins_with() -> None:
    # Adagrad makes its sums as it is made, in older versions of torch only then.
    part = DensePart(PIECES, lambda found: torch.optim.Adagrad([p for _, p in found], lr=0.1, initial_accumulator_value=0.5))
    part.apply({0: torch.ones(PIECES[0].numel)}, 1.0)
    part.put_state(0, {})
    assert torch.equal(part.state(0)["sum"], torch.full((PIECES[0].numel,), 0.5)) and float(part.state(0)["step"]) == 0
    before = part.weight(0).clone()
    part.apply({0: torch.ones(PIECES[0].numel)}, 1.0)
    torch.testing.assert_close(part.weight(0), before - 0.1 / 1.5**0.5)
