from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_store import MakeOptimizer, Ranks

from shoal.comm.store import Columns, Store
from shoal.errors import RequestError
from shoal.train.checkpoint import (
    PartWriter,
    ScalarRows,
    complete,
    discard_parts,
    newest,
    part_path,
    restore,
)

STEP = 3
MAKERS: dict[str, MakeOptimizer] = {
    "elementwise": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "whole": lambda model: torch.optim.NAdam(model.parameters(), lr=0.1),
}


def trained(make: MakeOptimizer, world_size: int) -> Ranks:
    """A few updates done, buffers and notes written."""
    ranks = Ranks(make, world_size)
    updaters = [ranks.updater(rank) for rank in range(world_size)]
    for step in range(STEP):
        ranks.give_gradients(step)
        for updater in updaters:
            for chunk in range(updater.count):
                updater.sum_gradients(chunk, 1.0)
                updater.apply(chunk, 1.0)
    for index in range(len(ranks.store.table.buffers)):
        ranks.store.buffer(STEP % 2, index).fill_(7 + index)
    for rank in range(world_size):
        record = ranks.store.record(rank, STEP - 1)
        record[Columns.STEP], record[Columns.LOSS_SUM] = STEP, rank + 1.5
        page = {"scheduler": {"last": 4}, "groups": [{"lr": 0.25}], "optimizer": None}
        ranks.store.write_notebook(rank, STEP, page)
    return ranks


def contents(store: Store) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint must bring back, by name, however many workers share it."""
    table, rows = store.table, ScalarRows(store)
    found = {f"weights {spec.name}": store.weights[k].clone() for k, spec in enumerate(table.parameters)}
    for k, spec in enumerate(table.buffers):
        found[f"buffers {spec.name}"] = store.buffer(STEP % 2, k).clone()
    for k, spec in enumerate(table.trained):
        found[f"scalars {spec.name}"] = rows.of(k)[0].clone()
        for number, key in enumerate(table.state_keys):
            place = store.state_range(number, spec.offset, spec.offset + spec.nbytes, spec.dtype)
            found[f"{key} {spec.name}"] = place.clone()
    for k, state in enumerate(table.states):
        found[f"{state.key} {state.parameter}"] = store.state_tensor(k).clone()
    return found


def write(store: Store, directory: Path, step: int = STEP, **meta: Any) -> None:
    PartWriter(store, directory, step).write_all()
    complete(directory, step, meta)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 3), (3, 2), (2, 5), (4, 1)])
def test_a_checkpoint_brings_everything_back_under_any_number_of_workers(
    name: str, before: int, after: int, tmp_path: Path
) -> None:
    source, target = trained(MAKERS[name], before), Ranks(MAKERS[name], after)
    try:
        write(source.store, tmp_path, history=["kept"])
        found = newest(tmp_path)
        assert found is not None and found.step == STEP and found.meta["history"] == ["kept"]
        restored = restore(found, target.store)
        expected = contents(source.store)
        got = contents(target.store)
        assert set(got) == set(expected)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        # All pieces of a parameter begin with the same scalars, such as Adam's step.
        rows = ScalarRows(target.store)
        for k in range(len(target.store.table.trained)):
            assert all(torch.equal(row, rows.of(k)[0]) for row in rows.of(k))
        assert restored.sums[0] == sum(rank + 1.5 for rank in range(before))
        assert restored.notebook is not None and restored.notebook["groups"] == [{"lr": 0.25}]
    finally:
        source.close()
        target.close()


def test_the_file_is_a_safetensors_file_and_the_workers_parts_make_it_too(tmp_path: Path) -> None:
    """What each worker writes of its chunks is, byte for byte, what ``write_all`` writes."""
    ranks = trained(MAKERS["elementwise"], 3)
    try:
        write(ranks.store, tmp_path / "all")
        for rank in range(3):
            writer = PartWriter(ranks.store, tmp_path / "parts", STEP)
            writer.write_rest(rank)
            updater = ranks.updater(rank)
            for chunk in range(updater.count):
                writer.write(updater.saved(chunk))
            writer.close()
        complete(tmp_path / "parts", STEP, {})
        name = f"step-{STEP:08d}/state.safetensors"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
        tensors = load_file(tmp_path / "all" / name)
        for spec, weight in zip(ranks.store.table.parameters, ranks.store.weights, strict=True):
            assert torch.equal(tensors[f"weights/{spec.name}"], weight)
    finally:
        ranks.close()


@pytest.mark.parametrize("victim", ["state.safetensors", "rank-0.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(victim: str, damage: str, tmp_path: Path) -> None:
    ranks = trained(MAKERS["elementwise"], 2)
    try:
        for step in (1, 2, 3):
            write(ranks.store, tmp_path, step)
    finally:
        ranks.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    path = tmp_path / "step-00000003" / victim
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    damaged: list[tuple[Path, str]] = []
    found = newest(tmp_path, damaged)
    assert found is not None and found.step == 2
    assert [path.name for path, reason in damaged if reason] == ["step-00000003"]


def test_what_never_became_complete_is_not_found_and_can_be_discarded(tmp_path: Path) -> None:
    ranks = trained(MAKERS["elementwise"], 1)
    try:
        PartWriter(ranks.store, tmp_path, STEP).write_all()
        assert newest(tmp_path) is None
        assert part_path(tmp_path, STEP).exists()
        discard_parts(tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        ranks.close()


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    source = trained(MAKERS["elementwise"], 1)
    target = Ranks(lambda model: torch.optim.SGD(model.parameters(), lr=0.1), 1)
    try:
        write(source.store, tmp_path)
        before = contents(target.store)
        found = newest(tmp_path)
        assert found is not None
        with pytest.raises(RequestError, match="another model or optimizer"):
            restore(found, target.store)
        assert all(np.array_equal(before[key], value) for key, value in contents(target.store).items())
    finally:
        source.close()
        target.close()
