from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shoal.train import streams


@pytest.fixture(autouse=True)
def _generators_as_before() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1, dtype=torch.float64).item()


def test_a_place_gives_the_same_numbers_however_it_was_reached() -> None:
    streams.reseed(streams.STEP, 0, 7, 1, 0)
    first = draw()
    draw()
    streams.reseed(streams.STEP, 0, 7, 1, 0)
    assert draw() == first


def test_every_place_has_numbers_of_its_own() -> None:
    kinds = (streams.MODEL, streams.STEP, streams.EVALUATION, streams.ITEM)
    places = [(kind, *rest) for kind in kinds for rest in itertools.product((0, 1), (0, 1, 2), (0, 1))]
    drawn = []
    for place in places:
        streams.reseed(*place)
        drawn.append(draw())
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == len(places)


def test_a_model_is_built_as_after_torchs_manual_seed() -> None:
    streams.seed_for_model(12)
    found = torch.rand(3)
    torch.manual_seed(12)
    assert torch.equal(found, torch.rand(3))
