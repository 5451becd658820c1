"""Where a model is cut into the stages of a pipeline.

The model computes an example once and is watched (``pipeline_trace.py``). It can be cut before any module that is called
exactly once, if every tensor that is made before and needed after is either an argument of that call or something that a
module returned: those tensors travel. Cuts are looked for between the parts of a model: the elements of a ``Sequential``, the
blocks of a transformer and what stands before and after them, never inside a block.

Forward and backward pass are timed part by part on the example, and the parts are put together so that the slowest stage is
as fast as it can be. Then the stages compute the example one after the other, and their output and gradients are compared
with the whole model's: a cut that does not give the same is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shoal.axes.pipeline_balance import Compute, balance, measure
from shoal.axes.pipeline_calls import boundary_before
from shoal.axes.pipeline_check import difference
from shoal.axes.pipeline_stage import Boundary, Carried, Stage, StandIn
from shoal.axes.pipeline_trace import Call, Trace, tensors_in, watch
from shoal.errors import PlanError, ShoalError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model's stages; pure, and can be pickled.

    Attributes:
        stages: how many there are, over all ranks.
        boundaries: where they begin, but for the first.
        parameters: for each stage the names of its parameters; one that several stages use is in each of them.
        buffers: for each stage the names of the buffers that it uses, and may change; one that none uses is in the first.
            Besides, each stage reads those from which it computes masks and the like anew: let all be there on all ranks.
        blocks: for each stage the parts that lie in it: what could be recomputed as one.
        costs_s: for each stage its measured forward and backward pass on the example.
        explanation: how it was cut, in sentences.
    """

    stages: int
    boundaries: tuple[Boundary, ...]
    parameters: tuple[tuple[str, ...], ...]
    buffers: tuple[tuple[str, ...], ...]
    blocks: tuple[tuple[str, ...], ...]
    costs_s: tuple[float, ...]
    explanation: tuple[str, ...]

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """The parameters that several stages use, such as tied embeddings, with those stages."""
        found: dict[str, list[int]] = {}
        for stage, names in enumerate(self.parameters):
            for name in names:
                found.setdefault(name, []).append(stage)
        return {name: tuple(stages) for name, stages in found.items() if len(stages) > 1}


@dataclass(frozen=True)
class _Place:
    """A place where the model can be cut."""

    path: str
    moment: int
    carries: tuple[Carried, ...]


def find_cut(
    model: nn.Module,
    stages: int,
    example: Any,
    *,
    compute: Compute | None = None,
    split_points: Sequence[str] | None = None,
    costs: Mapping[str, float] | None = None,
    asked: str = "",
    holders: Sequence[int] | None = None,
) -> Cut:
    """Cut a model into stages.

    Args:
        stages: how many: ranks times stages a rank.
        example: a microbatch as ``compute`` takes it, of the size to be expected.
        compute: the loss of the example; by default the model's own loss, or the mean square of its output.
        split_points: paths of the modules before which to cut, in order; one less than stages.
        costs: path of a part -> seconds, instead of measuring; "" for the first one.
        asked: what the user wrote, for the error's sentence, such as ``"pp=4, interleave=2"``.
        holders: which rank holds each stage: where one holds several, what counts is their sum.

    The model's weights, buffers and gradients stay as they are.

    Raises:
        PlanError: it cannot be cut into so many stages, or not before ``split_points``; says what would fit.
    """
    compute = compute or default_compute
    asked = asked or f"pp={stages}"
    if stages == 1:
        return _whole(model)
    training = model.training
    saved = [(b, b.clone()) for b in model.buffers()]
    random_state = torch.get_rng_state()
    try:
        model.train()
        return _find(model, stages, example, compute, split_points, costs, asked, holders)
    finally:
        model.train(training)
        torch.set_rng_state(random_state)
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def build_stage(
    model: nn.Module, cut: Cut, index: int, *, share_buffers: bool = True, device: str | torch.device = "cpu",
    prepare: Callable[[nn.Module], None] | None = None,
) -> Stage:  # fmt: skip
    """Return stage ``index`` of a model: its parameters are the model's own objects (on any device), the rest is empty.

    ``prepare`` may change the stage's module before it is made one, as the tensor axis does.
    """
    return Stage(model, index, cut.boundaries, cut.parameters[index], share_buffers, device, prepare)


def default_compute(model: nn.Module, example: Any) -> torch.Tensor:
    """Call the model (a mapping by keywords, a tuple by position) and return its own loss or its output's mean square."""
    if isinstance(example, Mapping):
        output = model(**example)
    elif isinstance(example, (tuple, list)):
        output = model(*example)
    else:
        output = model(example)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = [t for t in tensors_in(pytree.tree_leaves(output)) if t.is_floating_point() and t.requires_grad]
    if not leaves:
        raise PlanError("The model's output does not depend on any parameter, so it cannot be cut for a pipeline.")
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


# -- finding -------------------------------------------------------------------------------------------------------


def _find(
    model: nn.Module,
    stages: int,
    example: Any,
    compute: Compute,
    split_points: Sequence[str] | None,
    costs: Mapping[str, float] | None,
    asked: str,
    holders: Sequence[int] | None,
) -> Cut:
    trace = watch(model, lambda m: compute(m, example))
    if trace is None:
        raise PlanError(f"{asked} needs a model that is called exactly once for a loss; use pp=1 for this job.")
    parts = list(_parts(trace))
    places = [place for call in parts if (place := _place(trace, call))]
    if split_points is not None:
        chosen = _given(trace, split_points, stages, asked)
        places = _with(places, chosen)
    else:
        chosen = []
        places = _with_parameters(trace, places)
        if len(places) + 1 < stages:
            return _between_functions(model, trace, stages, example, compute, asked, places)
    trace.forget_tensors()
    paths = [place.path for place in places]
    seconds = _given_costs(costs, paths) if costs is not None else measure(model, example, compute, paths)
    if not chosen:
        chosen = [places[index - 1] for index in balance(seconds, stages, holders)]
    starts = [0, *(paths.index(place.path) + 1 for place in chosen), len(seconds)]
    by_stage = tuple(sum(seconds[a:b]) for a, b in zip(starts, starts[1:], strict=False))
    slowest = "stage" if holders is None or len(set(holders)) == stages else "rank"
    how = "at the split_points given" if split_points is not None else f"so that the slowest {slowest} is as fast as can be"
    cut = _build(model, trace, [place.moment for place in chosen], _boundaries(model, trace, chosen), by_stage, how)
    try:
        return _verified(model, example, compute, cut, asked)
    except PlanError as refusal:
        again = watch(model, lambda m: compute(m, example)) if split_points is None else None
        if again is None:
            raise
        try:
            return _between_functions(model, again, stages, example, compute, asked, places)
        except PlanError:
            raise refusal from None


def _between_functions(
    model: nn.Module,
    trace: Trace,
    stages: int,
    example: Any,
    compute: Compute,
    asked: str,
    places: Sequence[_Place],
) -> Cut:
    """Cut between torch functions, where modules are no help; PlanError where they are, but are too few."""
    blocks = _blocks_of(model)
    if len(places) + 1 < stages and any(model.get_submodule(place.path) in blocks for place in places):
        raise PlanError(_too_many(asked, stages, places))
    found = [
        (number, boundary)
        for number, function in enumerate(trace.functions)
        if function.takes_parameter and (boundary := boundary_before(trace, number))
    ]
    if len(found) + 1 < stages:
        raise PlanError(_too_many(asked, stages, found or places))
    ends = [0, *(number for number, _ in found), len(trace.functions)]
    moments = [function.moment for function in trace.functions]
    trace.forget_tensors()
    # The first time is slower. The backward pass of a function takes about twice as long as its forward pass.
    again = watch(model, lambda m: compute(m, example))
    times = [function.seconds for function in (again or trace).functions]
    seconds = [3 * sum(times[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    chosen = [index - 1 for index in balance(seconds, stages)]
    starts = [0, *(index + 1 for index in chosen), len(seconds)]
    by_stage = tuple(sum(seconds[a:b]) for a, b in zip(starts, starts[1:], strict=False))
    how = "between torch functions, as it has too few modules to cut between"
    begins = [moments[found[index][0]] for index in chosen]
    cut = _build(model, trace, begins, [found[index][1] for index in chosen], by_stage, how)
    return _verified(model, example, compute, cut, asked)


def _parts(trace: Trace) -> Iterator[Call]:
    """The calls that a cut may come before: from the model down, into everything but blocks."""
    blocks = _blocks_of(trace.root.module)

    def walk(call: Call) -> Iterator[Call]:
        for inner in call.inside:
            yield inner
            if inner.module not in blocks:
                yield from walk(inner)

    return walk(trace.root)


def _blocks_of(model: nn.Module) -> set[nn.Module]:
    """The elements of lists that are opened no further.

    An element is opened if there is a list of modules with layers of their own inside and no other element is of its class
    and size: the groups of layers of a convolutional network are opened, a transformer's layers are not.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = [(type(element), sum(p.numel() for p in element.parameters())) for element in module]
            for element, kind in zip(module, kinds, strict=True):
                if kinds.count(kind) > 1 or not _holds_a_list(element):
                    found.add(element)
    return found


def _holds_a_list(module: nn.Module) -> bool:
    """Whether it is a list, or there is a list of at least two modules of one class with layers of their own inside."""
    for inner in module.modules():
        if isinstance(inner, (nn.ModuleList, nn.Sequential)):
            kinds = [type(element) for element in inner if next(element.children(), None) is not None]
            if inner is module or any(kinds.count(kind) > 1 for kind in kinds):
                return True
    return False


def _place(trace: Trace, call: Call) -> _Place | None:
    """The place before a call, if what crosses there can be named."""
    if trace.times_called[call.path] != 1:
        return None
    names: dict[int, Carried] = {}
    for other in trace.calls():
        # The call around others begins first, and it is the one that is still made where it only stands in.
        if other.path and other.stop < call.start and trace.times_called[other.path] == 1:
            for leaf, value in enumerate(other.results):
                if isinstance(value, torch.Tensor):
                    names.setdefault(id(value), Carried(other.path, leaf))
    for leaf, value in reversed(list(enumerate(call.arguments))):
        if isinstance(value, torch.Tensor):
            names[id(value)] = Carried("", leaf)
    crossing = trace.crossing(call.start)
    if not crossing or any(id(made.tensor) not in names for made in crossing):
        return None
    return _Place(call.path, call.start, tuple(names[id(made.tensor)] for made in crossing))


def _with_parameters(trace: Trace, places: Sequence[_Place]) -> list[_Place]:
    """Those places that have a parameter's use between them and the next one, and before the first one."""
    uses = sorted(moment for moments in trace.parameter_uses.values() for moment in moments)
    found: list[_Place] = []
    end = trace.root.stop
    for place in sorted(places, key=lambda p: -p.moment):
        inside = any(place.moment < moment < end for moment in uses)
        before = any(moment < place.moment for moment in uses)
        if inside and before:
            found.append(place)
            end = place.moment
    return found[::-1]


def _given(trace: Trace, split_points: Sequence[str], stages: int, asked: str) -> list[_Place]:
    if isinstance(split_points, str) or not all(isinstance(path, str) for path in split_points):
        raise PlanError("split_points is no list of module paths; give the modules before which to cut, by name.")
    if len(split_points) != stages - 1:
        raise PlanError(
            f"{asked} makes {stages} stages and needs {stages - 1} split_points, not {len(split_points)}; "
            "give one for each stage but the first."
        )
    chosen: list[_Place] = []
    calls = {call.path: call for call in trace.calls() if call.path}
    for path in split_points:
        if path not in calls:
            raise PlanError(f'The model calls no module "{path}" to cut before.{did_you_mean(path, calls)}')
        place = _place(trace, calls[path])
        if not trace.crossing(calls[path].start):
            raise PlanError(f'There is nothing to cut off before "{path}": nothing before it depends on parameters.')
        if place is None:
            raise PlanError(
                f'The model cannot be cut before "{path}": it is called more than once, or a tensor from before is needed '
                "later without being handed on by a module."
            )
        if chosen and place.moment <= chosen[-1].moment:
            raise PlanError(
                f'split_points are not in the order of computing: "{path}" comes before "{chosen[-1].path}".'
            )
        chosen.append(place)
    return chosen


def _with(places: Sequence[_Place], chosen: Sequence[_Place]) -> list[_Place]:
    every = {place.path: place for place in (*places, *chosen)}
    return sorted(every.values(), key=lambda place: place.moment)


def _too_many(asked: str, stages: int, places: Sequence[Any]) -> str:
    if not places:
        return (
            f"{asked} does not fit: no place was found where this model can be cut into stages; use pp=1 (a pipeline needs "
            "parts that are called one after the other, such as the layers of an nn.Sequential)."
        )
    most = len(places) + 1
    where = f" (before {_few([p.path for p in places])})" if isinstance(places[0], _Place) else ""
    return (
        f"{asked} needs {stages} stages and this model can be cut into at most {most}{where}; "
        f"use at most {most} stages, such as pp={most}{',schedule=1f1b' if 'schedule=' in asked else ''}."
    )


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths) if len(paths) <= 6 else f"{', '.join(paths[:3])}, …, {paths[-1]}"


def _given_costs(costs: Mapping[str, float], paths: Sequence[str]) -> list[float]:
    return [float(costs.get(path, 0.0)) for path in ["", *paths]]


# -- building ------------------------------------------------------------------------------------------------------


def _whole(model: nn.Module) -> Cut:
    return Cut(
        stages=1,
        boundaries=(),
        parameters=(tuple(name for name, _ in model.named_parameters()),),
        buffers=(tuple(name for name, _ in model.named_buffers()),),
        blocks=(tuple(name for name, _ in model.named_modules()),),
        costs_s=(0.0,),
        explanation=("The model is not cut.",),
    )


def _boundaries(model: nn.Module, trace: Trace, chosen: Sequence[_Place]) -> list[Boundary]:
    blocks = _blocks_of(model)
    return [Boundary(p.path, p.carries, tuple(_stand_ins(trace, p.moment, blocks))) for p in chosen]


def _build(
    model: nn.Module,
    trace: Trace,
    moments: Sequence[int],
    boundaries: Sequence[Boundary],
    costs_s: tuple[float, ...],
    how: str,
) -> Cut:
    """Put together what follows from the moments at which stages begin."""

    def stages_of(uses: Sequence[int]) -> list[int]:
        return sorted({sum(moment <= use for moment in moments) for use in uses}) or [0]

    count = len(moments) + 1
    parameters: list[list[str]] = [[] for _ in range(count)]
    buffers: list[list[str]] = [[] for _ in range(count)]
    for uses, lists in ((trace.parameter_uses, parameters), (trace.buffer_uses, buffers)):
        for name, moments_used in uses.items():
            for stage in stages_of(moments_used):
                lists[stage].append(name)
    blocks: list[list[str]] = [[] for _ in range(count)]
    kinds = _blocks_of(model)
    for call in trace.calls():
        inside = any(call.path.startswith(f"{path}.") for path in chain.from_iterable(blocks))
        if call.module in kinds and not inside and stages_of([call.start]) == stages_of([call.stop]):
            blocks[stages_of([call.start])[0]].append(call.path)
    total = sum(costs_s) or 1.0
    shares = ", ".join(f"{100 * cost / total:.0f} %" for cost in costs_s)
    explanation = [
        f"Cut into {count} stages before {_few([b.before for b in boundaries])}, {how}: {shares} of the computing."
    ]
    cut = Cut(
        stages=count,
        boundaries=tuple(boundaries),
        parameters=tuple(map(tuple, parameters)),
        buffers=tuple(map(tuple, buffers)),
        blocks=tuple(map(tuple, blocks)),
        costs_s=costs_s,
        explanation=tuple(explanation),
    )
    shared = cut.shared
    if shared:
        words = ", ".join(f"{name} (stages {' and '.join(map(str, at))})" for name, at in list(shared.items())[:4])
        cut = replace(cut, explanation=(*explanation, f"Used by several stages, with gradients summed: {words}."))
    return cut


def _stand_ins(trace: Trace, moment: int, blocks: set[nn.Module]) -> Iterator[StandIn]:
    """The largest modules that are done before a moment and return something made."""
    calls = list(trace.calls())

    def all_made(path: str) -> bool:
        return all(call.depends for call in calls if call.path == path and call.stop < moment)

    def walk(call: Call) -> Iterator[Call]:
        for inner in call.inside:
            if inner.start >= moment:
                return
            if inner.stop < moment and inner.depends and all_made(inner.path):
                yield inner
            else:
                yield from walk(inner)

    seen: set[str] = set()
    for call in walk(trace.root):
        if call.path not in seen:
            seen.add(call.path)
            layers = next(call.module.children(), None) is not None
            yield StandIn(call.path, call.keeps_shape and layers and call.module in blocks)


# -- verifying -----------------------------------------------------------------------------------------------------


def _verified(model: nn.Module, example: Any, compute: Compute, cut: Cut, asked: str) -> Cut:
    """Return the cut, or a variation of it, that computes what the model computes; PlanError where none does."""
    reason = ""
    for copies in (False, True):
        tried = replace(cut, boundaries=tuple(replace(b, copies=copies) for b in cut.boundaries))
        try:
            stages = [build_stage(model, tried, index, share_buffers=False) for index in range(tried.stages)]
            wrong = difference(model, stages, example, compute)
        except ShoalError as error:
            wrong = str(error)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if not wrong:
            return tried
        reason = reason or wrong
    raise PlanError(
        f"{asked} does not fit: cut before {_few([b.before for b in cut.boundaries])}, the stages do not compute what the "
        f"whole model computes ({reason.rstrip('.')}); give other split_points, or use pp=1."
    )
