"""Consistent hashing: even parts, and few things that move."""

from collections import Counter

import numpy as np
import pytest
import torch

from shoal.ps.dense import cut
from shoal.ps.placement import Placement
from shoal.ps.ring import Ring


def test_every_server_gets_about_its_part_of_the_bytes():
    sizes = {f"thing {k}": 1 + (k * 7919) % 1000 for k in range(400)}
    for servers in (1, 2, 3, 7):
        held = Counter()
        for name, server in Ring(range(servers)).place(sizes).items():
            held[server] += sizes[name]
        assert max(held.values()) <= 1.1 * sum(sizes.values()) / servers + 1000 and len(held) == servers


def test_few_things_move_when_a_server_comes_or_goes():
    sizes = {f"thing {k}": 100 for k in range(1000)}
    before = Ring([0, 1, 2, 3]).place(sizes)
    after = Ring([0, 1, 2, 3, 4]).place(sizes)
    moved = [name for name in sizes if before[name] != after[name]]
    # A fifth has to; dealing them out anew would move four fifths.
    assert 0.1 < len(moved) / len(sizes) < 0.35
    assert sum(after[name] != 4 for name in moved) < 0.12 * len(sizes)
    owners = Ring([0, 1, 2, 3])
    assert all(owners.owner(name) == Ring([0, 1, 2]).owner(name) for name in sizes if owners.owner(name) != 3)


def test_a_ring_needs_different_servers():
    for servers in ([], [1, 1]):
        with pytest.raises(ValueError, match="no different servers"):
            Ring(servers)


def test_a_placement_cuts_a_push_so_that_every_number_goes_to_one_server():
    pieces = cut("a", (1000,), torch.float32, 0, 0, True, most_bytes=400) + cut("b", (8, 8), torch.float32, 0, 10, False)
    placement = Placement([0, 1, 2], pieces, row_shards=[64])
    held = [piece.number for server in placement.servers for piece in placement.pieces_of(server)]
    assert sorted(held) == list(range(11))
    assert sorted(k for s in placement.servers for k in placement.row_shards_of(s, 0)) == list(range(64))
    keys = np.arange(500) * 31 - 77
    rows = placement.servers_of(0, keys)
    assert sorted(np.concatenate(list(rows.values()))) == list(range(500)) and set(rows) == {0, 1, 2}
