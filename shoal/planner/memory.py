"""How much memory a worker needs under a plan, and the refusal of a plan that needs too much. Pure: numbers in, numbers out.

What is predicted is what the operating system shows as a worker's peak: its own memory, and the pages of the arena
that it touches. With W bytes of weights and G of gradients of the worker's own coordinate (its stage, its part of what the
tensor axis splits), s optimizer tensors, and N workers on the data axis::

    weights      W, once on the machine; zero=3: W/N, and what is gathered for a while
    gradients    G in its own stripe, G/N from each other one when it sums its slice; zero=3: G/N
    state        s · G/N
    activations  what is saved for the backward pass of each microbatch in flight, and the peak of the last one
    process      Python, torch and the arena's small regions

With a parameter server (``ps=S``) the workers have their weights and their own stripe, and each server W/S of weights, of
each optimizer tensor, and of every worker's stripe. A worker that waits for nobody (bounded, async) has a copy of W.

Sources: ZeRO (Rajbhandari et al. 2020, section 3) for the shares, Korthikanti et al. 2022 (equations 1 to 4) for what of the
activations the tensor axis splits, Narayanan et al. 2021 for microbatches in flight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from shoal.axes.owners import owning_stages
from shoal.axes.zero import held
from shoal.errors import PlanError
from shoal.plan import SERVER_KEYS, Plan
from shoal.planner.candidates import in_microbatches

PROCESS_BYTES = 330_000_000
"""Resident memory of a worker that has imported torch and run a step of a tiny model."""

MARGIN = 0.05
"""What a proposed plan leaves of the limit, for what no prediction knows: heaps with holes, kernels' work space."""

HOLES = 1.3
"""Activations take so much more than their bytes where freed memory stays in the process: the heap has holes. Measured on
transformers of 30 to 200 million parameters. With ``zero=3`` freed memory goes back at once (``train/allocator.py``)."""

SPLIT_SHARE = 24 / 34
"""What tensor parallelism splits of a transformer layer's activations: all but 10 of 34 parts (Korthikanti, equation 2)."""


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        nbytes: of the whole tensor.
        unit: which unit of the model uses it first; see ``ModelMemory.units``.
        also: further units that use it (a tied head).
        split: whether the tensor axis splits it.
        trained: whether it has a gradient and optimizer state.
    """

    name: str
    nbytes: int
    unit: int = 0
    also: tuple[int, ...] = ()
    split: bool = False
    trained: bool = True


@dataclass(frozen=True)
class Unit:
    """A part of the model that a pipeline does not cut: what comes before the blocks, each block, what comes after.

    Attributes:
        saved: bytes a sample that stay from the forward to the backward pass.
        fixed: bytes that stay, however many samples there are.
        peak: bytes a sample that are live at the unit's worst moment, beyond what it and the units before it have saved.
        burst: bytes that are live then, however many samples there are: gradients of weights that were just computed.
        entry: bytes a sample that come in: what travels where a pipeline is cut before it.
        block: whether it is one of the repeated blocks.
        recomputed: bytes a sample of ``saved`` for each mode of ``recompute``, where they are known.
    """

    saved: float
    fixed: float = 0.0
    peak: float = 0.0
    burst: float = 0.0
    entry: float = 0.0
    block: bool = False
    recomputed: Mapping[str, float] = field(default_factory=dict)

    def kept(self, mode: str) -> float:
        """Bytes a sample that stay under a mode of ``recompute``."""
        if mode in self.recomputed:
            return self.recomputed[mode]
        if mode == "full" and self.block:
            return min(self.entry, self.saved)
        return self.saved


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """What of a model and its job decides memory.

    Attributes:
        units: in the order of the forward pass.
        batch: samples in a step, over all workers.
        buffer_bytes: of all buffers; the arena keeps them twice.
        state_tensors: optimizer tensors for each trained parameter (Adam 2, momentum 1).
        process_bytes: what a worker needs before all that.
        guessed: the activations were not measured exactly.
        portioned: a parameter server's workers take portions of a batch (``accumulate`` of a share), each with a gradient.
    """

    weights: tuple[Weight, ...]
    units: tuple[Unit, ...]
    batch: int
    buffer_bytes: int = 0
    state_tensors: int = 2
    process_bytes: int = PROCESS_BYTES
    guessed: bool = False
    portioned: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes of the largest worker, by what they are for."""

    weights: int
    gradients: int
    state: int
    activations: int
    gathered: int
    buffers: int
    process: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def sentence(self) -> str:
        """The parts, the largest first, those under a hundredth left out."""
        names = {"state": "optimizer state", "gathered": "gathered weights"}
        parts = sorted(((getattr(self, f.name), names.get(f.name, f.name)) for f in fields(self)), reverse=True)
        return ", ".join(f"{name} {size_text(size)}" for size, name in parts if size * 100 >= self.total)


def size_text(nbytes: float) -> str:
    """A number of bytes as people write it: ``1.4 GB``, ``310 MB``."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 999.5e6 else f"{nbytes / 1e6:,.0f} MB"


# -- what a plan needs ------------------------------------------------------------------------------------------------


def worker_need(model: ModelMemory, plan: Plan, stages: Sequence[Sequence[int]] | None = None) -> Need:
    """Return what the largest worker needs under a plan.

    Args:
        plan: axes that it leaves open count as 1.
        stages: for each stage of the pipeline the units that it holds; cut evenly where it is None.
    """
    pp = plan.pp or 1
    cut = cut_stages(model, pp * _pieces(plan)) if stages is None else stages
    ranks = [[u for c in _chunks_of_stage(stage, pp, len(cut), plan.schedule) for u in cut[c]] for stage in range(pp)]
    owners = _owners(model, ranks)
    needs = [_stage_need(model, plan, ranks, owners, stage) for stage in range(pp)]
    if plan.ps is not None:
        needs.append(_server_need(model, plan))
    return max(needs, key=lambda need: need.total)


def machine_need(model: ModelMemory, plan: Plan, need: Need) -> int:
    """Bytes of all workers of a plan together on one machine, what they share counted once; ``need``: of the largest."""
    world = plan.world_size if plan.names_axes else 1
    weights = sum(w.nbytes for w in model.weights)
    trained = sum(w.nbytes for w in model.weights if w.trained)
    private = need.activations + need.gathered + need.process
    # A server is a process, too, without activations; workers that wait for nobody have weights of their own.
    copies = 0 if plan.mode in (None, "sync") else world
    servers = plan.servers * model.process_bytes
    shared = weights + trained * (_stripes(model, plan) + model.state_tensors + copies) + 2 * model.buffer_bytes
    return shared + world * private + servers


def _stripes(model: ModelMemory, plan: Plan) -> int:
    """How many gradients of all weights there are at once; of portions, those that wait and those that are computed."""
    ways = plan.data_ways if plan.names_axes and plan.zero != 3 else 1
    return ways * ((plan.accumulate or 1) + 1) - 1 if model.portioned and plan.ps is not None else ways


def cut_stages(model: ModelMemory, count: int) -> list[list[int]]:
    """Cut the units into ``count`` runs, so that the heaviest (weights with state, and activations) is as light as can be.

    A pipeline cuts by measured time; for equal blocks that comes to the same.
    """
    each = (2 + model.state_tensors) if model.weights else 1
    heavy = [unit.saved * model.batch + unit.fixed for unit in model.units]
    for weight in model.weights:
        heavy[weight.unit] += weight.nbytes * (each if weight.trained else 1)
    total = len(heavy)
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for parts in range(1, count + 1):
        for end in range(parts, total - (count - parts) + 1):
            options = [
                (max(best[start, parts - 1][0], sum(heavy[start:end])), start)
                for start in range(parts - 1, end)
                if (start, parts - 1) in best
            ]
            if options:
                best[end, parts] = min(options)
    if (total, count) not in best:
        # More stages than units: the last ones stay empty.
        return [[u] for u in range(total)] + [[] for _ in range(count - total)]
    runs: list[list[int]] = []
    end = total
    for parts in range(count, 0, -1):
        start = best[end, parts][1]
        runs.append(list(range(start, end)))
        end = start
    return runs[::-1]


def in_flight(plan: Plan, stage: int) -> float:
    """How many microbatches' activations a stage holds at once, of all its pieces of the model.

    GPipe holds all; 1F1B as many as there are stages from here to the end; ZBV at most as many as there are stages on every
    one (Qi et al. 2023); interleaved 1F1B its warm-up (Narayanan et al. 2021, section 2.2) of pieces.
    """
    pp, count = plan.pp or 1, plan.microbatches or 1
    if pp == 1:
        return 1.0
    if plan.schedule == "1f1b":
        return float(min(count, pp - stage))
    if plan.schedule == "zbv":
        return float(min(count, pp))
    if plan.schedule == "interleaved":
        pieces = _pieces(plan)
        return min(float(count), ((pp - stage - 1) * 2 + (pieces - 1) * pp + 1) / pieces)
    return float(count)


def _pieces(plan: Plan) -> int:
    """How many pieces of the model each stage of the pipeline has."""
    if plan.schedule == "zbv":
        return 2
    return (plan.interleave or 2) if plan.schedule == "interleaved" else 1


def _chunks_of_stage(stage: int, pp: int, chunks: int, schedule: str | None) -> list[int]:
    if schedule == "zbv" and chunks == 2 * pp:
        return [stage, chunks - 1 - stage]
    return list(range(stage, chunks, pp))


def _stage_need(
    model: ModelMemory, plan: Plan, cut: Sequence[Sequence[int]], owners: Mapping[str, int], stage: int
) -> Need:
    dp, tp = plan.data_ways if plan.names_axes else 1, plan.tp or 1
    serves = plan.ps is not None
    units = cut[stage]
    own = set(units)
    mine = [(w, w.nbytes / (tp if w.split else 1)) for w in model.weights if {w.unit, *w.also} & own]
    weights = sum(size for _, size in mine)
    trained = sum(size for w, size in mine if w.trained and owners[w.name] == stage)
    # A gradient of a weight that another stage owns has a place of its own, which the owner reads.
    echoes = sum(
        size for w, size in mine
        if w.trained and len({owners[w.name], *(_stages_of(w, cut))}) > 1
    )  # fmt: skip
    gathered = 0
    if plan.zero == 3 and dp > 1:
        blocks = [sum(s for w, s in mine if w.unit == u and not w.also) for u in units if model.units[u].block]
        rest = weights - sum(blocks)
        gathered = held([int(size) for size in blocks], int(rest), dp, 0).gathered
        weights, gradients = weights / dp, (trained + echoes) / dp
    else:
        # Its own stripe, and of each other one the slice that it adds up: that is the servers' work where there are some.
        # Portions' gradients go wherever there is room.
        others = _stripes(model, plan) - 1 if model.portioned and serves else 0 if serves else (dp - 1) / dp
        gradients = trained * (1 + others) + echoes
        weights *= 2 if serves and plan.mode not in (None, "sync") else 1
    return Need(
        weights=math.ceil(weights),
        gradients=math.ceil(gradients),
        state=0 if serves else math.ceil(model.state_tensors * trained / dp),
        activations=math.ceil(_activations(model, plan, units, stage)),
        gathered=gathered,
        buffers=2 * model.buffer_bytes,
        process=model.process_bytes,
    )


def _server_need(model: ModelMemory, plan: Plan) -> Need:
    """What a parameter server has, or reads, of everybody's."""
    trained = sum(w.nbytes for w in model.weights if w.trained) / plan.servers
    return Need(
        weights=math.ceil(trained),
        gradients=math.ceil(trained * _stripes(model, plan)),
        state=math.ceil(model.state_tensors * trained),
        activations=0,
        gathered=0,
        buffers=2 * model.buffer_bytes,
        process=model.process_bytes,
    )


def _stages_of(weight: Weight, cut: Sequence[Sequence[int]]) -> list[int]:
    used = {weight.unit, *weight.also}
    return [stage for stage, units in enumerate(cut) if used & set(units)]


def _owners(model: ModelMemory, cut: Sequence[Sequence[int]]) -> dict[str, int]:
    """Which stage owns each weight, and with it the gradient and the optimizer state: see ``owning_stages``."""
    uses = {w.name: _stages_of(w, cut) or [0] for w in model.weights}
    return owning_stages({w.name: w.nbytes for w in model.weights}, uses)


def _activations(model: ModelMemory, plan: Plan, units: Sequence[int], stage: int) -> float:
    """Bytes at the worst moment: while one unit computes, with what it and those before it have saved.

    Of a pipeline's other microbatches everything is there.
    """
    mode = plan.recompute or "none"
    tp = plan.tp or 1
    divided = 1.0 / tp if plan.sequence_parallel else 1 - SPLIT_SHARE + SPLIT_SHARE / tp
    share = -(-model.batch // (plan.data_ways if plan.names_axes else 1))
    if plan.shares:
        share = math.ceil(model.batch * max(plan.shares) / sum(plan.shares))
    samples = -(-share // ((plan.accumulate or 1) * (plan.microbatches or 1)))
    # What no split weight takes part in is computed by every worker of the tensor axis alike.
    split = {unit for weight in model.weights if weight.split for unit in (weight.unit, *weight.also)}
    # Gathered gradients are counted where weights are.
    sharded = plan.zero == 3 and (plan.dp or 1) > 1
    bursts = 0.0 if sharded else 1.0
    kept = worst = 0.0
    for index in units:
        unit = model.units[index]
        recomputed = unit.block and mode == "full"
        factor = divided if index in split else 1.0
        # What does not grow with the batch (rounded weights under bf16, statistics) goes with a block that is recomputed.
        kept += factor * (samples * unit.kept(mode) + (0.0 if recomputed else unit.fixed))
        # One block at a time is whole again while it is recomputed.
        again = factor * (samples * max(0.0, unit.saved - unit.kept(mode)) + (unit.fixed if recomputed else 0.0))
        burst = bursts * unit.burst / (tp if index in split else 1)
        worst = max(worst, kept + again + factor * samples * unit.peak + burst)
    return (kept * (in_flight(plan, stage) - 1) + worst) * (1.0 if sharded else HOLES)


# -- refusing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What there is.

    Attributes:
        worker_bytes: what a worker may use (``--memory-limit``), or None.
        machine_bytes: what all workers may use together, or None.
        most_workers: how many workers a plan that is proposed instead may have.
    """

    worker_bytes: int | None = None
    machine_bytes: int | None = None
    most_workers: int = 1

    def hold(self, model: ModelMemory, plan: Plan, need: Need, spared: float = 0.0) -> bool:
        """Whether a plan fits that needs so much a worker, with a part of the limits to spare."""
        if self.worker_bytes is not None and need.total > self.worker_bytes * (1 - spared):
            return False
        return self.machine_bytes is None or machine_need(model, plan, need) <= self.machine_bytes * (1 - spared)


def refusal(model: ModelMemory, plan: Plan, need: Need, limits: Limits, better: tuple[Plan, Need] | None) -> str:
    """Return the sentence for a plan that needs too much: what it needs, the limit, and what would fit.

    Args:
        better: a plan that fits, from ``propose``, and what it needs; None where there is none.
    """
    name = axes_text(plan)
    if limits.worker_bytes is not None and need.total > limits.worker_bytes:
        said = f"{name} needs about {size_text(need.total)} a worker ({need.sentence()})"
        said += f" and the limit is {size_text(limits.worker_bytes)}"
    else:
        everything = machine_need(model, plan, need)
        said = f"{name} needs about {size_text(everything)} in all"
        said += f" and the machine has {size_text(limits.machine_bytes or 0)}"
    if better is None:
        most = limits.most_workers
        remedy = f"no plan with up to {most} workers fits; raise the limit, or use a smaller model or batch"
    else:
        remedy = f"--plan {axes_text(better[0])} would fit with {size_text(better[1].total)} a worker"
    guess = " (the activations are a guess)" if model.guessed else ""
    return f"{said}{guess}; {remedy}."


def propose(
    model: ModelMemory,
    wanted: Plan,
    limits: Limits,
    check: Callable[[Plan], Need | None] | None = None,
) -> tuple[Plan, Need] | None:
    """Return the smallest plan that fits and what it needs: the fewest workers, then the fewest axes, then the least memory.

    What ``wanted`` says beside its axes is kept. Recomputing is proposed only where nothing fits without. It leaves a part
    of the limits free (``MARGIN``).

    Args:
        check: asked of each plan that seems to fit, in this order: what it really needs, or None where the model cannot be
            split like that. By default what is predicted here.
    """
    check = check or (lambda plan: worker_need(model, plan))
    modes = [wanted.recompute or "none"]
    if modes != ["full"]:
        modes.append("full")
    for mode in modes:
        for workers in range(1, limits.most_workers + 1):
            fitting: list[tuple[int, int, int, Plan]] = []
            for plan in _plans_of(wanted, workers, mode, model):
                need = worker_need(model, plan)
                if limits.hold(model, plan, need, MARGIN):
                    fitting.append((_axes_used(plan), need.total, len(fitting), plan))
            for _, _, _, plan in sorted(fitting):
                checked = check(plan)
                if checked is not None and limits.hold(model, plan, checked, MARGIN):
                    return plan, checked
    return None


def _plans_of(wanted: Plan, workers: int, mode: str, model: ModelMemory) -> Iterable[Plan]:
    """Every way to use exactly so many workers."""
    dropped = ("ps", *SERVER_KEYS, "shares", "microbatches", "schedule", "interleave", "sequence_parallel", "batchnorm")
    kept = wanted.replace(**dict.fromkeys(dropped), explanation=())
    for tp in _divisors(workers):
        for pp in _divisors(workers // tp):
            dp = workers // tp // pp
            if dp > model.batch or pp > len(model.units):
                continue
            for zero in (0, 3) if dp > 1 else (0,):
                changes: dict[str, object] = {"dp": dp, "tp": tp, "pp": pp, "zero": zero, "recompute": mode}
                if pp > 1:
                    names = ("microbatches", "schedule", "interleave", "batchnorm")
                    changes.update({name: getattr(wanted, name) for name in names})
                else:
                    changes["batchnorm"] = wanted.batchnorm
                if tp > 1:
                    changes["sequence_parallel"] = wanted.sequence_parallel
                try:
                    yield in_microbatches(kept.replace(**changes), model.batch)
                except PlanError:
                    # What the user fixed does not go with these axes.
                    continue


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _axes_used(plan: Plan) -> int:
    return sum((getattr(plan, key) or 1) > 1 for key in ("dp", "tp", "pp")) + bool(plan.zero)


def axes_text(plan: Plan) -> str:
    """The part of a plan that memory depends on, as a plan string, without what follows from the rest."""
    said = {k: v for k, v in plan.values().items() if k in ("dp", "tp", "pp", "accumulate") and v != 1}
    said.update({k: v for k, v in plan.values().items() if k in ("ps", "workers", "mode", "staleness")})
    said.update({k: v for k, v in plan.values().items() if k == "zero" and v})
    said.update({k: v for k, v in plan.values().items() if k == "recompute" and v != "none"})
    said.update({k: v for k, v in plan.values().items() if k == "precision" and v != "fp32"})
    said.update({k: v for k, v in plan.values().items() if k == "sequence_parallel" and v})
    return str(Plan(**said)) if said else "dp=1"
