"""What a model's activations need, found out without computing them: a forward and a backward pass of shapes only.

The tensors are torch's fake ones: they have a shape, a dtype and a device, but no values. (The meta device would not do:
it chooses other kernels than the processor, and autocast passes it by.)
Every operation is watched (a ``TorchDispatchMode``), and the bytes of each memory block that it makes are counted until
nobody refers to it any more. That is exact: what autograd saves, what code keeps in between, what is shared and counted
once. Two passes with different numbers of samples tell what grows with the batch from what does not. A model
that cannot run without values (it looks at them) runs a few real samples instead; where that fails too, its weights
are taken as a guess.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.axes import recompute
from shoal.axes.blocks import find_blocks
from shoal.comm.table import FROZEN, ParameterTable
from shoal.planner.memory import ModelMemory, Unit, Weight

_FEW = 2
_GUESSED_FACTOR = 2.0

Loss = Callable[[nn.Module, Any], torch.Tensor]
"""(model, batch) -> the scalar to differentiate. It must not look at values, or real ones are needed."""


@dataclass(frozen=True)
class Activations:
    """What was found.

    Attributes:
        units: what comes before the blocks, each block, what comes after: at least one.
        block_names: of the blocks, in the order in which they are called.
        guessed: these are not exact numbers; ``why`` says so in a sentence.
        homes: parameter name -> the units that use it, the first one first.
    """

    units: tuple[Unit, ...]
    block_names: tuple[str, ...]
    homes: dict[str, tuple[int, ...]]
    guessed: bool = False
    why: str = ""


def measure_activations(
    model: nn.Module,
    batch: Any,
    count: int,
    loss: Loss,
    precision: str = "fp32",
    modes: Sequence[str] = recompute.MODES,
) -> Activations:
    """Return what the activations of a model need a sample.

    Args:
        model: is not changed, but that its gradients are dropped where a real pass was needed.
        batch: an example batch: tensors, in any structure, whose first dim is ``count`` where they have one a sample.
        count: samples in it.
        loss: what is computed of it.
        precision: ``"fp32"`` or ``"bf16"``.
        modes: of ``recompute``, those to measure besides ``"none"``: each costs two passes.
    """
    wanted = [mode for mode in modes if mode != "none"]
    try:
        # Near the real size: at the worst moment of a tiny batch other things are large than at that of a real one.
        few = max(_FEW, count)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        twin = fake_copy(model, mode)
        with mode:
            return _measure(twin, lambda n: _of_size(batch, count, n), loss, precision, (few, 2 * few), wanted)
    except Exception as problem:
        reason = f"{type(problem).__name__} without values"
    try:
        with _untouched(model):
            found = _measure(model, lambda n: _first(batch, count, n), loss, precision, (min(_FEW, count),), wanted)
        return Activations(found.units, found.block_names, found.homes, True, f"One real pass was measured ({reason}).")
    except Exception:
        weights = float(sum(p.numel() * p.element_size() for p in model.parameters()))
        unit = Unit(saved=_GUESSED_FACTOR * weights / max(1, count), peak=0.0)
        homes: dict[str, tuple[int, ...]] = {name: (0,) for name, _ in model.named_parameters()}
        return Activations(
            (unit,), (), homes, True, f"Nothing could be measured ({reason}); twice the weights are assumed."
        )


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Leave the model and the random state as they were: buffers, gradients and classes."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            recompute.apply(model, "none")
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for parameter in model.parameters():
                parameter.grad = None


def model_memory(
    table: ParameterTable, found: Activations, batch: int, process_bytes: int, split: Callable[[str], bool]
) -> ModelMemory:
    """Put together what decides memory: the tensors of the unsplit model, its optimizer, and its activations.

    Args:
        split: whether the tensor axis splits the parameter of that name.
        batch: samples in a step.
    """
    weights = []
    for spec in table.parameters:
        homes = sorted({unit for name in spec.names for unit in found.homes.get(name, ())}) or [0]
        divided = any(split(name) for name in spec.names)
        weights.append(Weight(spec.name, spec.nbytes, homes[0], tuple(homes[1:]), divided, spec.group != FROZEN))
    trained = max(1, sum(spec.nbytes for spec in table.trained))
    state_tensors = len(table.state_keys) if table.elementwise else -(-table.state_bytes // trained)
    return ModelMemory(
        weights=tuple(weights),
        units=found.units,
        batch=batch,
        buffer_bytes=table.buffer_bytes,
        state_tensors=state_tensors,
        process_bytes=process_bytes,
        guessed=found.guessed,
    )


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy whose parameters and buffers are fake tensors; nothing of their size is allocated."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        with mode:
            # A model whose weights have gone to the arena already is on the meta device; it will not run there.
            device = "cpu" if tensor.is_meta else tensor.device
            twin: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    return copy.deepcopy(model, memo)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all memory blocks that operations made under it and that still exist."""

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}
        for tensor in known:
            self._add(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage, storage.nbytes())
        return result

    def _add(self, storage: Any, size: int) -> None:
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= size


@dataclass
class _Pass:
    """Bytes by unit of one forward and backward pass."""

    saved: list[int]
    peak: list[int]
    entry: list[int]


def _measure(
    model: nn.Module,
    make: Callable[[int], Any],
    loss: Loss,
    precision: str,
    counts: Sequence[int],
    modes: Sequence[str],
) -> Activations:
    names, homes = _order(model, make(counts[0]), loss)
    runs = {mode: [_run(model, names, make(n), loss, precision, mode) for n in counts] for mode in ["none", *modes]}
    plain = runs["none"]
    units = []
    for index in range(len(names) + 2):
        saved, fixed = _line(counts, [p.saved[index] for p in plain])
        recomputed = {mode: _line(counts, [p.saved[index] for p in runs[mode]])[0] for mode in modes}
        peak, burst = _line(counts, [p.peak[index] for p in plain])
        entry = _line(counts, [p.entry[index] for p in plain])[0]
        block = 0 < index <= len(names)
        units.append(Unit(saved, fixed, peak, burst, entry, block, recomputed if block else {}))
    return Activations(tuple(units), tuple(names), homes)


def _line(counts: Sequence[int], sizes: Sequence[int]) -> tuple[float, float]:
    """Bytes a sample, and bytes that do not depend on samples."""
    if len(counts) == 1:
        return sizes[0] / counts[0], 0.0
    slope = (sizes[1] - sizes[0]) / (counts[1] - counts[0])
    return max(0.0, slope), max(0.0, sizes[0] - slope * counts[0])


def _order(model: nn.Module, batch: Any, loss: Loss) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """The blocks in the order in which they are called, and which units use each parameter."""
    blocks = {id(block): name for name, block in find_blocks(model).items()}
    called: list[str] = []
    uses: list[tuple[nn.Module, int]] = []

    def before(module: nn.Module, _inputs: Any) -> None:
        name = blocks.get(id(module))
        if name is not None and name not in called:
            called.append(name)
        if module._parameters:
            uses.append((module, len(called)))

    with _hooked(model, before), torch.no_grad():
        loss(model, batch)
    modules = dict(model.named_modules())
    inside = {id(m): called.index(name) + 1 for name in called for m in modules[name].modules()}
    first = {id(p): name for name, p in model.named_parameters()}
    homes: dict[str, list[int]] = {}
    for module, seen in uses:
        # What stands between two blocks goes with the one before it.
        unit = inside.get(id(module), seen if seen < len(called) else len(called) + bool(seen))
        for parameter in module._parameters.values():
            if parameter is not None:
                home = homes.setdefault(first[id(parameter)], [])
                if unit not in home:
                    home.append(unit)
    for name in first.values():
        # What belongs to a module that is never called itself: its owner reads it at some time; the beginning is safe.
        homes.setdefault(name, [0])
    return called, {name: tuple(units) for name, units in homes.items()}


def _run(model: nn.Module, names: Sequence[str], batch: Any, loss: Loss, precision: str, mode: str) -> _Pass:
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in names]
    places = {id(block): index + 1 for index, block in enumerate(blocks)}
    recompute.apply(model, mode, [b for b in blocks if next(b.children(), None) is not None])
    inputs = [t for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)]
    live = LiveBytes([*model.parameters(), *model.buffers(), *inputs])
    last = len(names) + 1
    found = _Pass([0] * (last + 1), [0] * (last + 1), [0] * (last + 1))
    mark, unit = 0, 0
    done: set[int] = set()

    def turn(to: int) -> None:
        """Count what has come to stay since the last turn for the unit that made it."""
        nonlocal mark, unit
        found.saved[unit] += live.now - mark
        found.peak[unit] = max(found.peak[unit], live.peak - live.now)
        mark, unit, live.peak = live.now, to, live.now

    def turn_back(to: int) -> None:
        """The same in the backward pass, where all counts that is beyond what the units from here to the beginning have saved."""
        nonlocal unit
        found.peak[unit] = max(found.peak[unit], live.peak - sum(found.saved[: unit + 1]))
        unit, live.peak = to, live.now

    def before(module: nn.Module, given: Any) -> None:
        place = places.get(id(module), 0)
        if place and place not in done and torch.is_grad_enabled():
            turn(place)
            found.entry[place] = _bytes_of(given)

    def after(module: nn.Module, _given: Any, made: Any) -> None:
        place = places.get(id(module), 0)
        if place and place not in done:
            done.add(place)
            if len(done) == len(places):
                turn(last)
            if isinstance(made, torch.Tensor) and made.requires_grad:
                made.register_hook(lambda _, place=place: turn_back(place))

    with _own_gradients(model), _hooked(model, before, after), live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(model, batch)
        turn(unit)
        value.backward()
        turn_back(unit)
    return found


def _bytes_of(given: Any) -> int:
    """Bytes of the tensors that a unit is called with, each block of memory counted once."""
    storages = {t.untyped_storage()._cdata: t.numel() * t.element_size() for t in pytree.tree_leaves(given)
                if isinstance(t, torch.Tensor)}  # fmt: skip
    return sum(storages.values())


@contextlib.contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Drop each gradient as soon as it is complete, as a worker does that writes it into its stripe."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hooked(model: nn.Module, before: Any, after: Any = None) -> Iterator[None]:
    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before))
        if after is not None:
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_size(batch: Any, count: int, wanted: int) -> Any:
    """The batch's shapes for another number of samples; nothing is allocated under a ``FakeTensorMode``."""

    def make(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        shape = (wanted, *value.shape[1:]) if value.dim() and value.shape[0] == count else tuple(value.shape)
        return torch.empty(shape, dtype=value.dtype, device=value.device)

    return pytree.tree_map(make, batch)


def _first(batch: Any, count: int, wanted: int) -> Any:
    def take(value: Any) -> Any:
        samples = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == count
        return value[:wanted].clone() if samples else value

    return pytree.tree_map(take, batch)
