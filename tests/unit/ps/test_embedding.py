"""The module: bags, padding, copies, state_dict, and the dtype that a model is moved to."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from shoal import ps

KEYS = torch.tensor([[5, -7, 5, 0], [2**62, 0, 9, 9]])


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(ps.Embedding(4, optimizer=ps.SGD(lr=1.0)))
    model(KEYS).sum().backward()
    ps.step(model)
    return model


def test_bags_are_sums_and_means_without_the_padding() -> None:
    torch.manual_seed(0)
    plain = ps.Embedding(4, init=ps.Uniform())
    sums, means = (copy.deepcopy(plain) for _ in range(2))
    sums.mode, means.mode = "sum", "mean"
    sums.padding_key = means.padding_key = 0
    there = (KEYS != 0).unsqueeze(-1)
    torch.testing.assert_close(sums(KEYS), (plain(KEYS) * there).sum(1))
    torch.testing.assert_close(means(KEYS), (plain(KEYS) * there).sum(1) / there.sum(1))
    assert sums(KEYS[:, :0]).shape == (2, 4) and plain(KEYS[:0]).shape == (0, 4, 4)
    sums(KEYS).square().sum().backward()
    found = sums.take_gathered()
    assert found is not None and sorted(found.keys.tolist()) == [-7, 5, 9, 2**62]


def test_nothing_is_made_by_reading() -> None:
    model = trained()
    rows = len(model[0].table)
    with torch.no_grad():
        model(torch.arange(1000))
    model(torch.arange(1000))
    assert len(model[0].table) == rows == 5


def test_copies_and_bundles_hold_the_rows() -> None:
    model = trained()
    torch.manual_seed(0)
    other = nn.Sequential(ps.Embedding(4))
    state = model.state_dict()
    assert list(state) == ["0.keys", "0.rows"] and state["0.keys"].tolist() == [-7, 0, 5, 9, 2**62]
    other.load_state_dict(state)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert twin(KEYS).equal(model(KEYS))
    with pytest.raises(RuntimeError, match="rows here are 3 wide"):
        nn.Sequential(ps.Embedding(3)).load_state_dict(state)
    before = model(KEYS).detach()
    assert model.double()(KEYS).dtype == torch.float64
    torch.testing.assert_close(model(KEYS).float(), before)


def test_gradients_of_several_passes_are_summed_by_key() -> None:
    module = ps.Embedding(2, optimizer=ps.SGD(lr=1.0), init=ps.Zeros())
    for keys in ([1, 2, 1], [2, 3]):
        module(torch.tensor(keys)).sum().backward()
    module.step()
    assert module(torch.tensor([1, 2, 3])).tolist() == [[-2, -2], [-2, -2], [-1, -1]]
