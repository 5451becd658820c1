from __future__ import annotations

import weakref

import torch

from shoal.axes.opened import closed, opened
from shoal.axes.tensor_cut import Cut, Team


def test_a_split_tensor_is_opened_to_its_parts_and_closed_over_other_ones() -> None:
    team = Team(2)
    cut = Cut((torch.zeros(3, 2), torch.ones(3, 1)), 1, ((2, 1),), team, frozenset({"layer"}))
    cut.along_sequence = True
    tree = {"x": [cut, torch.ones(2)], "n": 5, "pair": (1, 2)}
    open_tree = opened(tree)
    tensors = [t for t in torch.utils._pytree.tree_leaves(open_tree) if isinstance(t, torch.Tensor)]
    assert [type(t) for t in tensors] == [torch.Tensor] * 3 and tensors[1] is cut.parts[1]
    assert open_tree["n"] == 5 and open_tree["pair"] == (1, 2)
    (parts, cover), plain = open_tree["x"]
    again = closed({"x": [((parts[0] + 7, parts[1]), cover), plain]})["x"][0]
    assert isinstance(again, Cut) and again.shape == (3, 3)
    assert (again.split_dim, again.widths, again.origins, again.along_sequence) == (1, ((2, 1),), {"layer"}, True)
    assert again.team is team and float(again.parts[0].sum()) == 42


def test_what_it_was_keeps_no_tensor_alive() -> None:
    part = torch.ones(3)
    watch = weakref.ref(part)
    cover = opened(Cut((part,), 0, ((3, 3),), Team(2)))[1]
    del part
    assert watch() is None and cover is not None


def test_what_is_not_split_stays_the_same() -> None:
    x = torch.ones(2)
    assert opened((x, None, "a"))[0] is x and closed((x, None, "a")) == (x, None, "a")
