"""An update of single lines is that of everything, bit for bit, and can be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_store import MakeOptimizer, Ranks, every_bit

from shoal.axes.data import ArenaData
from shoal.axes.updating import Hooks, Totals
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Note
from shoal.train import sparse_lines
from shoal.train.sgd import PARTLY

STEPS = 4
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "sgd, a tensor at a time": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, foreach=False, fused=False),
    "adagrad": lambda model: torch.optim.Adagrad(
        model.parameters(), lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5
    ),
    "adagrad, foreach": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1, foreach=True),
}


class Killed(Exception):
    pass


def _train(make: MakeOptimizer, clip: float | None, dies: str = "") -> tuple[bytes, set[float]]:
    """Two ranks; in step 2 rank 0 dies once in each chunk at the named place. All bits, and what UNDO_LINES has said."""
    ranks = Ranks(make, 2)
    said: set[float] = set()
    axes = [ArenaData(ranks.store, rank, ranks.updater(rank), Waiting(spin_s=0.0)) for rank in range(2)]
    with torch.no_grad():
        ranks.store.weight(0)[5, :3] = torch.tensor([-0.0, 1e-310, 0.0])
    try:
        for step in range(STEPS):
            ranks.give_gradients(step)
            for stripe in range(2):
                # The table: rows 5 and up to 40 of the others have a gradient, of row 6 it is -0.0.
                table = ranks.store.gradient(stripe, 0)
                rest = torch.randperm(900, generator=torch.Generator().manual_seed(9 * step + stripe))[40:]
                table[rest] = 0.0
                table[6] = -0.0
            for axis in axes:
                axis.publish(step)
            if clip is not None:
                for axis in axes:
                    _norm(axis)
            for rank, axis in enumerate(axes):
                chunks = range(axis.updater.count) if dies and rank == 0 and step == 2 else ()
                for chunk in chunks:
                    _die_at(axis.updater, dies, chunk)
                    with pytest.raises(Killed):
                        axis.update(step, Totals(1.0, 0.5), clip, _HOOKS)
                    axis = axes[0] = ArenaData(ranks.store, 0, ranks.updater(0), Waiting(spin_s=0.0))
                axis.update(step, Totals(1.0, 0.5), clip, _HOOKS)
                said.add(axis.slot.note(Note.UNDO_LINES))
            for axis in axes:
                axis.commit(step)
        return every_bit(ranks.store), said
    finally:
        ranks.close()


_HOOKS = Hooks(reach=lambda phase, step: None, before_chunk=lambda chunk, step: None)


def _norm(axis: ArenaData) -> None:
    """Post this rank's part of the norm, so that in one process nobody waits for it."""
    from shoal.comm.arena import Signal

    squared = 0.0
    for chunk in range(axis.updater.count):
        axis.updater.sum_gradients(chunk, 0.5)
        squared += axis.updater.norm_squared()
    axis.slot.write(Note.GRADIENT_NORM_SQUARED, squared)
    axis.slot.post(Signal.NORM, axis.slot.signal(Signal.UPDATED) + 1)


def _die_at(updater: Any, place: str, chunk: int) -> None:
    method = {"before the copy": "save", "copied": "apply", "half done": "apply", "done": "apply"}[place]
    whole = getattr(updater, method)

    def dying(number: int, *rest: Any) -> None:
        if number != chunk:
            whole(number, *rest)
            return
        if place in ("half done", "done"):
            whole(number, *rest)
        if place == "half done":
            # Weights are back where they were, states are not.
            updater.chunks[number].ranges[0].copy_(before)
        raise Killed

    before = updater.chunks[chunk].ranges[0].clone()
    setattr(updater, method, dying)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_single_lines_get_the_bits_that_everything_would(
    name: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, said = _train(OPTIMIZERS[name], clip)
    assert max(said) > 0
    monkeypatch.setattr(sparse_lines.LineWork, "sum_gradients", lambda self, *rest: None)
    everything, said = _train(OPTIMIZERS[name], clip)
    # Of plain SGD, save for the first step of each piece, in one pass.
    assert said == ({sparse_lines.WHOLE} if "adagrad" in name else {sparse_lines.WHOLE, PARTLY})
    if clip is None:
        assert bits == everything
    else:
        # The norm is summed in another order.
        close = [torch.frombuffer(bytearray(b), dtype=torch.float64) for b in (bits, everything)]
        torch.testing.assert_close(*close, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
@pytest.mark.parametrize("dies", ["before the copy", "copied", "half done", "done"])
def test_a_death_at_any_point_changes_no_bit(name: str, dies: str) -> None:
    assert _train(OPTIMIZERS[name], None, dies) == _train(OPTIMIZERS[name], None)


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), False),
        (lambda p: torch.optim.Adagrad(p), True),
        (lambda p: torch.optim.Adagrad(p, eps=0.0), False),
        (lambda p: torch.optim.Adagrad(p, weight_decay=0.1), False),
        (lambda p: torch.optim.Adam(p), False),
        (lambda p: torch.optim.RMSprop(p), False),
        (lambda p: type("Mine", (torch.optim.SGD,), {})(p, lr=0.1), False),
    ],
)
def test_which_optimizers_leave_alone_what_has_no_gradient(make: Any, answer: bool) -> None:
    assert sparse_lines.zeros_change_nothing(make([torch.nn.Parameter(torch.ones(3))])) is answer


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_they_do_so_bit_for_bit(make: Any, way: dict[str, bool]) -> None:
    """The claim of ``zeros_change_nothing``, for values at which it might fail."""
    values = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, float("inf"), float("-inf")]
    parameter = torch.nn.Parameter(torch.tensor(values * 5))
    optimizer = make([parameter], lr=0.1, **way)
    sums = optimizer.state[parameter].get("sum")
    if sums is not None:
        sums.copy_(torch.tensor([0.0, 1e-45, 1.0, 3e38, float("inf")]).repeat_interleave(len(values)))
    kept = [t.clone() for t in (parameter.data, sums) if t is not None]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for now, before in zip((parameter.data, sums), kept, strict=False):
        assert torch.equal(now.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_table_whose_lines_were_full_is_looked_through_again_later(clip: float | None) -> None:
    """Not with every update, as dense gradients need not be searched each time; but where gradients are clipped: the norm's last
    bit depends on how they are summed, and whoever takes a dead worker's place does not know what was found before."""
    ranks = Ranks(OPTIMIZERS["adagrad"], 1)
    axis = ArenaData(ranks.store, 0, ranks.updater(0), Waiting(spin_s=0.0))
    looks, said = [], []
    chunk = axis.updater.chunks[0]  # type: ignore[attr-defined]
    try:
        for step in range(20):
            ranks.give_gradients(step)
            if step >= 4:
                ranks.store.gradient(0, 0)[40:] = 0.0
            axis.publish(step)
            if clip is not None:
                _norm(axis)
            axis.update(step, Totals(1.0, 0.5), clip, _HOOKS)
            axis.commit(step)
            looks.append(chunk._full)
            said.append(axis.slot.note(Note.UNDO_LINES))
    finally:
        ranks.close()
    if clip is not None:
        assert max(looks) == 0 and max(said[1:4]) < 0 < min(said[4:])
        return
    # Looked at and full with the second update, with the tenth and each one after it with few lines; others one later.
    assert looks == [0, 7, 6, 5, 4, 3, 2, 1, *[0] * 12]
    assert max(said[1:9]) < 0 < min(said[10:])


class _UntilLines:
    """A slot whose process dies when it is about to say in which form its undo log is."""

    def __init__(self, slot: Any) -> None:
        self._slot = slot

    def write(self, note: Note, value: float) -> None:
        if note == Note.UNDO_LINES:
            raise Killed
        self._slot.write(note, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slot, name)


def test_a_chunk_that_is_saved_as_a_whole_and_then_by_lines_is_put_back_in_the_right_form() -> None:
    """Who updated it had not looked for lines; its successor finds some, and dies as it writes them over the saved whole."""
    bits = []
    for kills in (False, True):
        ranks = Ranks(OPTIMIZERS["adagrad"], 1)
        axis = ArenaData(ranks.store, 0, ranks.updater(0), Waiting(spin_s=0.0))
        try:
            for step in range(4):
                ranks.give_gradients(step)
                if step == 3:
                    ranks.store.gradient(0, 0)[40:] = 0.0
                axis.publish(step)
                if kills and step == 3:
                    _die_at(axis.updater, "half done", 0)
                    with pytest.raises(Killed):
                        axis.update(step, Totals(1.0, 0.5), None, _HOOKS)
                    assert axis.slot.note(Note.UNDO_LINES) == sparse_lines.WHOLE
                    axis = ArenaData(ranks.store, 0, ranks.updater(0), Waiting(spin_s=0.0))
                    axis.updater._slot = _UntilLines(axis.updater._slot)  # type: ignore[attr-defined]
                    with pytest.raises(Killed):
                        axis.update(step, Totals(1.0, 0.5), None, _HOOKS)
                    axis = ArenaData(ranks.store, 0, ranks.updater(0), Waiting(spin_s=0.0))
                axis.update(step, Totals(1.0, 0.5), None, _HOOKS)
                axis.commit(step)
            bits.append(every_bit(ranks.store))
        finally:
            ranks.close()
    assert bits[0] == bits[1]
