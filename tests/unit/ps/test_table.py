"""Tables of rows: what optimizers make of gradients, that no order matters, keys come and go, and nothing is lost to kill -9."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal import ps
from shoal.errors import JobError, JobFailed
from shoal.ps.fallback import Fallback
from shoal.ps.kernel import Kernel, load
from shoal.ps.optimizers import RowOptimizer
from shoal.ps.spec import TableSpec
from shoal.ps.table import Rows, Table, from_tensors, to_tensors

KERNELS = [load(), Fallback()]
OPTIMIZERS: list[RowOptimizer] = [
    ps.SGD(), ps.SGD(momentum=0.9), ps.Adagrad(initial_accumulator_value=0.1), ps.RowWiseAdagrad(), ps.Adam(lr=0.01),
    ps.FTRL(l1=0.01, l2=0.1),
]  # fmt: skip
INITIALISERS = [ps.Normal(), ps.Uniform(), ps.Zeros(), ps.Constant(0.5)]


def keys_of(step: int, rows: int = 300, seed: int = 0) -> np.ndarray:
    """Some keys of all sizes, a few of them often."""
    draw = np.random.default_rng((seed, step))
    return (draw.zipf(1.3, rows) % 400).astype(np.int64) * (2**40 + 1) - 7


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_the_fallback_gives_the_same_answers(optimizer: RowOptimizer) -> None:
    # Admission, ageing and cold rows are all at work.
    for at, dtype in enumerate((torch.float32, torch.float64)):
        spec = TableSpec(
            width=5, dtype=dtype, optimizer=optimizer, init=INITIALISERS[(OPTIMIZERS.index(optimizer) + at) % 4],
            admission=2, max_age=4, memory_bytes=16_000, shards=4, seed=9,
        )  # fmt: skip
        tables = [Table.create(spec, kernel=kernel) for kernel in KERNELS]
        for step in range(8):
            batches = [table.unique(keys_of(step), -7) for table in tables]
            for field in ("keys", "inverse", "counts"):
                np.testing.assert_array_equal(*(getattr(batch, field) for batch in batches))
            batch, bag = batches[0], 3
            gradients = torch.randn(100, 5, dtype=dtype)
            sums = [t.kernel.scatter(gradients, batch.inverse, bag, len(batch.keys)) for t in tables]
            torch.testing.assert_close(*sums)
            torch.testing.assert_close(*(t.kernel.gather(sums[0], batch.inverse, bag) for t in tables))
            for table in tables:
                assert table.push(batch.keys, sums[0], batch.counts, push_id=step, step=step) == 4
                assert table.push(batch.keys, sums[0], batch.counts, push_id=step, step=step) == 0
            assert tables[0].sweep(step) == tables[1].sweep(step)
            torch.testing.assert_close(*(t.pull(batch.keys, step) for t in tables))
        ours, theirs = (table.export() for table in tables)
        assert len(tables[0]) < len(ours.keys)
        for field in ("keys", "counts", "last"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
        torch.testing.assert_close(ours.values, theirs.values)


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (ps.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (ps.Adagrad(lr=0.1, initial_accumulator_value=0.2),
         lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2)),
        (ps.Adam(lr=0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1)),
    ],
    ids=["SGD", "Adagrad", "SparseAdam"],
)  # fmt: skip
def test_rows_are_trained_as_torch_trains_them(optimizer: RowOptimizer, theirs: object) -> None:
    torch.manual_seed(0)
    ours = ps.Embedding(6, optimizer=optimizer).double()
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (12, 8, 3)))
    plain = torch.nn.Embedding(40, 6, sparse=True, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(ours(torch.arange(40)))
    optim = theirs(list(plain.parameters()))  # type: ignore[operator]
    for batch in keys:
        for module in (ours, plain):
            module(batch).square().sum().backward()
        ps.step(ours)
        optim.step()
        optim.zero_grad()
    torch.testing.assert_close(ours(torch.arange(40)), plain(torch.arange(40)), rtol=1e-12, atol=1e-12)


def test_what_momentum_ftrl_and_rowwise_adagrad_do_is_what_their_papers_say() -> None:
    draw = np.random.default_rng(1)
    gradients = draw.standard_normal((6, 3))
    for optimizer in (ps.SGD(lr=0.1, momentum=0.9), ps.FTRL(lr=0.1, l1=0.2, l2=0.3), ps.RowWiseAdagrad(lr=0.1)):
        spec = TableSpec(width=3, dtype=torch.float64, optimizer=optimizer, init=ps.Zeros(), shards=1)
        table = Table.create(spec)
        w, z, n = np.zeros(3), np.zeros(3), np.zeros(3)
        for g in gradients:
            table.push(np.array([5]), torch.from_numpy(g[None]))
            if isinstance(optimizer, ps.SGD):
                z = 0.9 * z + g
                w = w - 0.1 * z
            elif isinstance(optimizer, ps.FTRL):
                z += g - (np.sqrt(n + g * g) - np.sqrt(n)) / 0.1 * w
                n += g * g
                w = np.where(np.abs(z) <= 0.2, 0.0, -(z - np.sign(z) * 0.2) / ((1.0 + np.sqrt(n)) / 0.1 + 0.3))
            else:
                n += np.mean(g * g)
                w = w - 0.1 * g / (np.sqrt(n) + 1e-10)
        np.testing.assert_allclose(table.pull(np.array([5]))[0], w, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_learning_rates_are_scaled_for_one_process_from_what_the_table_says(kernel: Kernel) -> None:
    """Adagrad's first step is lr, whatever the gradient, so it is the rate that is scaled; twice is not twice over."""
    spec = TableSpec(width=2, optimizer=ps.Adagrad(lr=0.5), init=ps.Zeros(), dtype=torch.float64)
    table, keys = Table.create(spec, kernel=kernel), np.arange(3)
    for key, factor in ((0, 1.0), (1, 0.5), (2, 0.25)):
        table.scale_lr(factor)
        table.push(keys[key : key + 1], torch.full((1, 2), 3.0, dtype=torch.float64))
    assert torch.allclose(table.pull(keys)[:, 0], torch.tensor([-0.5, -0.25, -0.125], dtype=torch.float64))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_pushes_count_anew_from_where_they_are_said_to_begin(kernel: Kernel) -> None:
    """Under another plan updates are counted otherwise, so numbers come again that were used."""
    spec = TableSpec(width=1, optimizer=ps.SGD(lr=1.0), init=ps.Zeros(), dtype=torch.float64, shards=2)
    table, key, one = Table.create(spec, kernel=kernel), np.array([7]), torch.ones(1, 1, dtype=torch.float64)
    for begin, numbers in ((0, range(40)), (20, range(20, 3000)), (2500, range(2500, 2600))):
        table.begin_at(begin)
        before = float(table.pull(key)[0, 0])
        for number in numbers:
            # By both shards, one of which has nothing to do.
            assert table.push(key, one, push_id=number, step=number) == 2
        assert table.push(key, one, push_id=numbers[-1]) == table.push(key, one, push_id=begin) == 0
        assert before - float(table.pull(key)[0, 0]) == len(numbers)


def test_neither_the_order_of_keys_nor_who_comes_first_matters() -> None:
    spec = TableSpec(width=4, dtype=torch.float64, admission=3, shards=8, seed=3)
    ordered, shuffled = Table.create(spec), Table.create(spec)
    keys = np.arange(-500, 500, dtype=np.int64) * (1 << 50)
    for step in range(4):
        rows = torch.randn(1000, 4, dtype=torch.float64)
        order = np.random.default_rng(step).permutation(1000)
        ordered.push(keys, rows, step=step)
        shuffled.push(keys[order], rows[torch.from_numpy(order)], step=step)
        if step == 1:
            # Twice seen is not enough: they read as in the beginning.
            assert len(ordered) == 0 and ordered.pull(keys).equal(Table.create(spec).pull(keys))
    assert len(ordered) == 1000 and ordered.export().values.equal(shuffled.export().values)
    # Restored with another number of shards, what was counted included.
    other = Table.create(dataclasses.replace(spec, shards=2))
    rows, sketch = from_tensors(to_tensors(ordered.export(), ordered.export_sketch()))
    assert sketch is not None
    other.put(rows)
    other.put_sketch(sketch)
    for table in (ordered, other):
        table.push(keys, torch.ones(1000, 4, dtype=torch.float64), step=4)
    assert ordered.export().values.equal(other.export().values)


def test_cold_rows_go_to_disk_and_come_back(tmp_path: Path) -> None:
    spec = TableSpec(width=4, optimizer=ps.Adagrad(), shards=2, seed=1)
    all_of_it = Table.create(spec)
    small = Table.create(dataclasses.replace(spec, memory_bytes=200 * spec.row_bytes), tmp_path / "cold")
    for step in range(30):
        keys = np.random.default_rng(step).choice(2000, 150, replace=False).astype(np.int64)
        rows = torch.randn(150, 4)
        for table in (all_of_it, small):
            table.push(keys, rows, step=step)
    assert len(small) <= 200 and len(all_of_it) > 1000
    keys = np.arange(2500, dtype=np.int64)
    assert small.pull(keys).equal(all_of_it.pull(keys))
    assert small.export().values.equal(all_of_it.export().values)


def test_a_disk_that_takes_nothing_loses_nothing(tmp_path: Path) -> None:
    spec = TableSpec(width=4, memory_bytes=100_000, shards=1)
    table = Table.create(spec, tmp_path / "file" / "cold")
    (tmp_path / "file").write_text("in the way")
    keys = np.arange(5000, dtype=np.int64)
    with pytest.raises(JobFailed, match="make room there"):
        table.push(keys, torch.ones(5000, 4))
    assert table.pull(keys).equal(table.pull(keys)) and len(table) == 5000


def test_rows_that_are_too_old_begin_anew_swept_or_not() -> None:
    spec = TableSpec(width=2, max_age=3, shards=1, init=ps.Constant(1.0), optimizer=ps.SGD(lr=1.0))
    for sweeps in (False, True):
        table = Table.create(spec)
        table.push(np.array([1, 2]), torch.ones(2, 2), step=0)
        table.push(np.array([2]), torch.ones(1, 2), step=3)
        assert table.pull(np.array([1, 2]), 3).tolist() == [[0, 0], [-1, -1]]
        assert table.pull(np.array([1, 2]), 4).tolist() == [[1, 1], [-1, -1]]
        if sweeps:
            assert table.sweep(4) == 1 and len(table) == 1
        table.push(np.array([1]), torch.ones(1, 2), step=5)
        assert table.pull(np.array([1]), 5).tolist() == [[0, 0]]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_ledger_kept_outside_is_exact_however_often_writers_are_killed(kernel: Kernel) -> None:
    """Several writers push by turns and are killed at random moments; every acknowledged push is there, and once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = TableSpec(width=8, dtype=torch.float64, optimizer=ps.SGD(lr=1.0), init=ps.Zeros(), shards=2)
    table = Table.create(spec, kernel=kernel)
    chance = random.Random(5)
    rows = 1500 if kernel.name == "c" else 300
    kills = 30 if kernel.name == "c" else 12

    def push(push_id: int) -> None:
        keys = np.unique(keys_of(push_id, rows, 1))
        table.push(keys, -torch.ones(len(keys), 8, dtype=torch.float64), push_id=push_id, step=push_id)

    acknowledged = 0
    try:
        for _ in range(kills):
            readable, writable = os.pipe()
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    for push_id in range(acknowledged, 1 << 30):
                        push(push_id)
                        os.write(writable, b".")
                os._exit(1)
            os.close(writable)
            # From its first push on: before that it only warms up.
            seen = len(os.read(readable, 1))
            time.sleep(chance.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            while piece := os.read(readable, 1 << 16):
                seen += len(piece)
            os.close(readable)
            acknowledged += seen
        # What was in flight is sent again; it may have been applied in some shards, in all, or in none.
        push(acknowledged)
        expected: Counter[int] = Counter()
        for push_id in range(acknowledged + 1):
            expected.update(set(keys_of(push_id, rows, 1).tolist()))
        found = table.export()
        assert found.values.equal(found.values[:, :1].expand(-1, 8))
        assert dict(zip(found.keys.tolist(), found.values[:, 0].tolist(), strict=True)) == dict(expected)
        assert dict(zip(found.keys.tolist(), found.counts.tolist(), strict=True)) == dict(expected)
        assert len(table) == len(expected)
    finally:
        torch.set_num_threads(threads)


def test_bad_input_is_answered_by_one_sentence() -> None:
    module = ps.Embedding(3)
    with pytest.raises(JobError, match=r"keys of torch\.float32; give an int64 tensor"):
        module(torch.zeros(2))
    table = module.table
    with pytest.raises(JobError, match=r"shape \(2, 4\) for 2 keys of width 3"):
        table.push(np.array([1, 2]), torch.ones(2, 4))
    with pytest.raises(JobFailed, match="key 2 of the table embedding is not finite"):
        table.push(np.array([1, 2]), torch.tensor([[1.0, 1.0, 1.0], [1.0, float("nan"), 1.0]]))
    assert len(table) == 0
    for wrong, words in (
        ({"width": 0}, "width is 0"), ({"width": 3, "optimizer": "adam"}, r"shoal\.ps\.SGD"),
        ({"width": 3, "memory": "2 XB"}, "memory is '2 XB'"), ({"width": 3, "mode": "max"}, "mode is 'max'"),
        ({"width": 3, "admission": 0}, "admission is 0"),
    ):  # fmt: skip
        with pytest.raises(JobError, match=words):
            ps.Embedding(**wrong)  # type: ignore[arg-type]
    with pytest.raises(JobError, match=r"Adagrad\(eps=0"):
        ps.Adagrad(eps=0)


def test_many_rows_at_once_come_back_as_they_were_put() -> None:
    spec, n = TableSpec(width=2, shards=8), 150_000
    table = Table.create(spec)
    keys = np.arange(n, dtype=np.int64) * 7919 - 2**40
    values = torch.arange(n * (2 + spec.state), dtype=torch.float32).view(n, -1)
    rows = Rows(keys, values, np.arange(n, dtype=np.uint32), np.arange(n, dtype=np.int64))
    # Some of them are there already, with other numbers.
    table.push(keys[::100].copy(), torch.ones(1500, 2), np.ones(1500, np.uint32), step=1)
    table.put(rows)
    found = table.export()
    assert all(np.array_equal(getattr(found, name), getattr(rows, name)) for name in ("keys", "counts", "last"))
    assert found.values.equal(values)


@pytest.mark.parametrize("kernel", KERNELS, ids=["native", "fallback"])
def test_memory_of_shards_that_were_emptied_is_given_back_and_they_can_be_filled_again(kernel: Kernel) -> None:
    table = Table.create(TableSpec(width=64, optimizer=ps.Adagrad(), shards=4), kernel=kernel)
    keys = np.arange(20_000)
    table.pull(keys)
    counts, gradients = np.ones(len(keys), np.uint32), torch.ones(len(keys), 64)
    table.push(keys, gradients, counts, step=1)

    def held() -> int:
        return os.fstat(table.memory.fd).st_blocks * 512

    before, rows, kept = held(), table.export(), table.export([2])
    table.discard(None, [0, 1, 3])
    table.give_back(range(4))
    # What is beside rows stays: the index, and room to undo what was begun.
    assert before - held() > 0.6 * len(keys) * table.spec.row_bytes
    assert np.array_equal(table.export().keys, kept.keys) and torch.equal(table.export().values, kept.values)
    table.put(rows)
    found = table.export()
    assert np.array_equal(found.keys, rows.keys) and torch.equal(found.values, rows.values)
    table.push(keys, gradients, counts, step=2)
    assert len(table) == len(keys) and not torch.equal(table.export().values, rows.values)
