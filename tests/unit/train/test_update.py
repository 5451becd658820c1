from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_store import MakeOptimizer, Ranks, every_bit

from shoal.axes.data import ArenaData
from shoal.axes.updating import Hooks, Totals
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Note, Signal
from shoal.ps import outbox
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table
from shoal.train.row_tables import Owner, TableUpdater
from shoal.train.update import Updater

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda model: torch.optim.SGD(_groups(model), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(_groups(model), lr=0.1, amsgrad=True),
    "adagrad": lambda model: torch.optim.Adagrad(_groups(model), lr=0.1, initial_accumulator_value=0.5),
    "rmsprop": lambda model: torch.optim.RMSprop(_groups(model), lr=0.1, momentum=0.5),
    "nadam": lambda model: torch.optim.NAdam(_groups(model), lr=0.1),
    "adafactor": lambda model: torch.optim.Adafactor(_groups(model), lr=0.1),
}
STEPS = 3


def _groups(model: Any) -> list[dict[str, Any]]:
    small = list(model.small.parameters())
    second = {"params": [*small, *model.norm.parameters()], "lr": 0.01}
    return [{"params": [model.large, model.late, model.frozen]}, second]


class Killed(Exception):
    pass


class Dying:
    """Raises at one place: an event, and how often it has come before since the last ``arm``."""

    def __init__(self) -> None:
        self.arm("", 0)

    def arm(self, event: str, count: int) -> None:
        self._event, self._left = event, count
        self.seen: dict[str, int] = {}

    def reach(self, event: str) -> None:
        before = self.seen.get(event, 0)
        self.seen[event] = before + 1
        if event == self._event and before == self._left:
            raise Killed


def _dies_inside(updater: Updater, dying: Dying) -> None:
    """Let the places between a chunk's copy and its update be deadly, too."""
    save, apply = updater.save, updater.apply

    def saving(chunk: int) -> None:
        dying.reach("before save")
        save(chunk)

    def applying(chunk: int, scale: float) -> None:
        dying.reach("saved")
        apply(chunk, scale)
        dying.reach("applied")

    updater.save, updater.apply = saving, applying  # type: ignore[method-assign]


def _axis(ranks: Ranks, rank: int, dying: Dying) -> ArenaData:
    updater = ranks.updater(rank)
    _dies_inside(updater, dying)
    return ArenaData(ranks.store, rank, updater, Waiting(spin_s=0.0))


def _train(make: MakeOptimizer, world_size: int, event: str = "", count: int = -1) -> tuple[bytes, dict[str, int]]:
    """Train for a few steps; rank 0 dies at one place of steps 1 and 2 and is replaced."""
    ranks = Ranks(make, world_size)
    dying = Dying()
    axes = [_axis(ranks, rank, dying if rank == 0 else Dying()) for rank in range(world_size)]
    pages: dict[int, Any] = {}
    try:
        for step in range(STEPS):
            ranks.give_gradients(step)
            if step == 1:
                dying.arm(event, count)
            for axis in axes:
                axis.publish(step)
            for rank, axis in enumerate(axes):
                hooks = Hooks(reach=lambda phase, step: None, before_chunk=lambda chunk, step: None)
                if hasattr(axis.updater, "memory"):
                    pages[rank] = axis.updater.memory()
                for _ in range(2):
                    try:
                        axis.update(step, Totals(1.0, 0.5), None, hooks)
                        break
                    except Killed:
                        axis = axes[rank] = _axis(ranks, rank, Dying())
                        if hasattr(axis.updater, "remember"):
                            axis.updater.remember(pages[rank])
                axis.commit(step)
        return every_bit(ranks.store), dying.seen
    finally:
        ranks.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_is_gone_on_with_after_a_death_at_any_point_gives_the_same_bits(name: str) -> None:
    undisturbed, places = _train(OPTIMIZERS[name], world_size=2)
    # In steps 1 and 2, of each chunk.
    times = 2 if name in ("nadam", "adafactor") else 4
    assert places == {"before save": times, "saved": times, "applied": times}
    for event, count in itertools.product(places, range(times)):
        assert _train(OPTIMIZERS[name], 2, event, count)[0] == undisturbed, (event, count)


class Counting(torch.optim.Optimizer):
    """Keeps a number that is no tensor, and steps by its inverse."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            state["n"] = state.get("n", 0) + 1
            parameter.data.sub_(parameter.grad, alpha=0.1 / state["n"])


@pytest.mark.parametrize("dies_in", [0, 1])
def test_numbers_of_an_optimizer_outlive_a_death_in_a_table_behind_its_tensors(dies_in: int) -> None:
    def train(dies_at: int | None) -> bytes:
        ranks, table = Ranks(lambda model: Counting(model.parameters()), 1), Table.create(TableSpec(width=2, shards=1))
        outbox.write(table.memory, table.kernel, table.spec, 0, None)

        def begin(page: Any) -> tuple[Any, ArenaData]:
            inner: Any = ranks.updater(0)
            if page is not None:
                inner.remember(page)
            both = TableUpdater(inner, [table], Owner(0, 1, 1), lambda: ranks.store.arena.slots[0].signal(Signal.UPDATED))
            return inner, ArenaData(ranks.store, 0, both, Waiting(spin_s=0.0))

        def die(phase: str, step: int) -> None:
            if ranks.store.arena.slots[0].note(Note.CHUNK_SAVED) == dies_at:
                raise Killed

        try:
            inner, axis = begin(None)
            for step in range(STEPS):
                ranks.give_gradients(step)
                axis.publish(step)
                page = inner.memory()
                for reach in (die if step == 1 and dies_at is not None else lambda phase, step: None, lambda phase, step: None):
                    try:
                        axis.update(step, Totals(1.0, 0.5), None, Hooks(reach=reach, before_chunk=lambda chunk, step: None))
                        break
                    except Killed:
                        inner, axis = begin(page)
                axis.commit(step)
            assert {n["n"] for n in inner.memory()["state"].values()} == {STEPS, STEPS - 1}
            return every_bit(ranks.store)
        finally:
            ranks.close()
            table.close()

    assert train(dies_in) == train(None)


@pytest.fixture(params=[1, 2, 5])
def world_size(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_slices_together_do_what_the_optimizer_does_alone(name: str, world_size: int) -> None:
    ranks = Ranks(OPTIMIZERS[name], world_size)
    try:
        twin = Ranks(OPTIMIZERS[name], 1).model
        optimizer = OPTIMIZERS[name](twin)
        by_name = dict(twin.named_parameters())
        updaters = [ranks.updater(rank) for rank in range(world_size)]
        for step in range(STEPS):
            for spec, total in zip(ranks.store.table.trained, ranks.give_gradients(step), strict=True):
                by_name[spec.name].grad = None if total is None else total / 4
            optimizer.step()
            for updater in updaters:
                for chunk in range(updater.count):
                    updater.sum_gradients(chunk, 0.25)
                    updater.apply(chunk, 1.0)
        for tensor, expected in zip(ranks.model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-11, atol=1e-13)
        everything = [chunk for updater in updaters for k in range(updater.count) for chunk in updater.saved(k)]
        written = sum(s.data.numel() for s in everything if s.kind == "weights")
        assert written == sum(spec.nbytes for spec in ranks.store.table.trained)
    finally:
        ranks.close()


def test_the_norms_of_the_slices_make_the_global_norm(world_size: int) -> None:
    ranks = Ranks(OPTIMIZERS["sgd"], world_size)
    try:
        sums = ranks.give_gradients(1)
        squared = 0.0
        for rank in range(world_size):
            updater = ranks.updater(rank)
            for chunk in range(updater.count):
                updater.sum_gradients(chunk, 1.0)
                squared += updater.norm_squared()
        assert squared == pytest.approx(sum(float(g.norm()) ** 2 for g in sums if g is not None), rel=1e-12)
    finally:
        ranks.close()
