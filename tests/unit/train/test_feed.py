from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.order import batch_indices, epoch_order
from shoal.data.source import open_source
from shoal.train.feed import Division, Feed


@given(
    st.integers(1, 60), st.integers(1, 25), st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    st.integers(1, 5), st.integers(0, 3),
)  # fmt: skip
def test_the_workers_shares_of_an_epoch_are_every_batch_once_and_in_order(
    samples: int, batch_size: int, shares: list[int], accumulate: int, seed: int
) -> None:
    division = Division(batch_size, tuple(shares), accumulate, seed)
    order = epoch_order(samples, seed, 0)
    for index in range(-(-samples // batch_size)):
        parts = [division.shares_of(batch_indices(order, index, batch_size), rank) for rank in range(len(shares))]
        # All workers see the same microbatches, and who has how many samples of each.
        assert len({len(own) for own in parts}) == 1
        batch = []
        for micro in zip(*parts, strict=True):
            assert all(share.counts == micro[0].counts for share in micro)
            assert tuple(len(share.indices) for share in micro) == micro[0].counts
            assert sum(micro[0].counts) > 0
            batch += [share.indices for share in micro]
        assert np.array_equal(np.concatenate(batch), order[index * batch_size : (index + 1) * batch_size])


def test_batches_are_the_same_whether_they_were_prepared_or_not() -> None:
    x = torch.arange(23)
    source = open_source((x, x * 10), "data")
    division = Division(5, (1, 2), 2, seed=4)
    eager, lazy = (Feed(source, division, 1, None, channels_last=False) for _ in range(2))
    assert eager.steps_per_epoch == 5
    for step in range(12):
        eager.prepare(step)
        found, plain = eager.batches(step), lazy.batches(step)
        assert [share.counts for share, _ in found] == [share.counts for share, _ in plain]
        for (share, batch), (_, other) in zip(found, plain, strict=True):
            if not len(share.indices):
                assert batch is None and other is None
                continue
            assert torch.equal(batch[0], torch.from_numpy(share.indices.copy()))
            assert torch.equal(batch[1], other[1]) and torch.equal(batch[1], batch[0] * 10)


def test_each_epoch_has_an_order_of_its_own_and_a_step_can_be_asked_for_at_any_time() -> None:
    feed = Feed(open_source((torch.arange(12),), "data"), Division(4, (1,), 1, seed=0), 0, None, channels_last=False)
    epochs = [np.concatenate([feed.shares(3 * epoch + k)[0].indices for k in range(3)]) for epoch in range(2)]
    assert not np.array_equal(*epochs)
    assert [sorted(order) for order in epochs] == [list(range(12))] * 2
    assert np.array_equal(feed.shares(1)[0].indices, epochs[0][4:8])


def test_sub_batches_are_the_same_number_for_all_and_hold_every_sample_once() -> None:
    order = np.arange(103)
    division = Division(50, (3, 1), 1, 0, 1, sub_batch=10)
    for index, sizes in ((0, ([10, 10, 10, 8], [10, 2, 0, 0])), (2, ([2], [1]))):
        own = [division.shares_of(batch_indices(order, index, 50), replica) for replica in (0, 1)]
        assert [[len(share.indices) for share in shares] for shares in own] == list(sizes)
        assert [share.counts for share in own[0]] == [share.counts for share in own[1]] == list(zip(*sizes, strict=True))
        together = np.concatenate([share.indices for shares in own for share in shares])
        assert sorted(together) == list(range(50 * index, min(103, 50 * index + 50)))
