"""What a plan leaves open: chosen by short trials, remembered for this job on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.cluster import Cluster
from shoal.cluster.cache import cache_dir, read_json, write_json
from shoal.cluster.measure import fingerprint
from shoal.comm.arena import Arena, Note, Signal
from shoal.comm.grid import Grid
from shoal.comm.store import Columns, Store
from shoal.comm.table import ALIGNMENT
from shoal.errors import NotBuiltError, PlanError
from shoal.job import Job
from shoal.plan import Plan
from shoal.planner.candidates import in_microbatches, local_candidates
from shoal.planner.memory import Need, axes_text, size_text
from shoal.planner.search import Tried, rank, search
from shoal.process.supervisor import Supervisor
from shoal.ps.lbfgs import DIRECTION
from shoal.train.crew import Crew, bind
from shoal.train.fitting import Fitting, uncompilable
from shoal.train.forecast import Forecast, limit_text
from shoal.train.memory import memory_of
from shoal.train.portions import with_portions
from shoal.train.row_tables import RunTables, check_tables
from shoal.train.settings import JobFacts, RunSettings, layout_of, table_of
from shoal.train.spent import Spent
from shoal.train.split import Split

SEARCH_S = 4.0
_ENOUGH_S = 6.0
_LONG_WARM_UP_S, _LONG_FIRST_S = 0.5, 1.5
_SINGLE_TRIAL_S = 1.5
_WARM_UP_STEPS = 3
_MOST_TRIAL_STEPS = 400
_SPLIT_TIMEOUT_S = 600.0
_LONG_RUN_S = 120.0


@dataclass(frozen=True)
class Choice:
    """A complete, explained plan; how it divides the model; what its largest worker will need, where that was in doubt; and what
    finding it took."""

    plan: Plan
    split: Split | None
    need: Need | None
    spent: Spent = field(default_factory=Spent)


def choose(
    plan: Plan, job: Job, facts: JobFacts, supervisor: Supervisor, cluster: Cluster | None, thorough: bool = False,
    spent: Spent | None = None,
) -> Choice:  # fmt: skip
    """Fill in everything that a plan leaves open, and explain it; PlanError where it does not fit the job or the machine.

    ``thorough``: also try what only a long run gains from; ``spent``: counts the time that all of it takes, by part.
    """
    spent = spent or Spent()
    machine = cluster or Cluster.local(measure=False)
    if len(machine.machines) > 1:
        raise PlanError(
            "The cluster has more than one machine, and shoal starts workers on one; start the job with torchrun on each "
            "machine, and shoal joins them."
        )
    if plan.device == "cuda":
        return _on_gpus(plan, job, facts, supervisor, machine)
    batch = min(job.batch_size, facts.samples)
    check_compile(plan)
    # Compiling takes far longer than a trial: the other choices are made without.
    opened = with_portions(plan.replace(compile=False) if plan.compile else plan, facts)
    candidates = local_candidates(opened, machine.cores, batch, facts.images, divisible(job, facts))
    check_plan(candidates[0], job, facts)
    fitting = Fitting(
        plan, facts, supervisor,
        recall=lambda key: _entries(job, facts).get(key),
        remember=lambda key, found: _remember(key, job, facts, found),
    )  # fmt: skip
    with spent.part("rewrites"):
        candidates = fitting.fit(candidates)
    forecast = Forecast(job, facts, supervisor, machine)
    first = candidates[0]
    need: Need | None = None
    why: list[str] = []
    if plan.names_axes or Grid.of(first).splits_model:
        need = forecast.refuse(plan, first, split_of(first, supervisor))
        why = [given_text(plan, first)]
    else:
        with spent.part("memory"):
            candidates = [candidate for candidate in candidates if forecast.fits(candidate)]
        if not candidates:
            first, need, why = _instead(plan, first, forecast, machine.cores)
            candidates = [first]
    candidates, left_out = fitting.promising(candidates, machine.cores)
    if len(candidates) > 1:
        with spent.part("trials"):
            first, why = _best(candidates, job, facts, supervisor, machine, spent)
    elif not why:
        first = candidates[0]
        why = [f"{first.brief()} is the only plan worth trying here."]
    with spent.part("compile"):
        wanted = not plan.names_axes and (thorough or _is_long(first, job, facts))
        first = fitting.compile(first, wanted, spent.left_s)
    why += left_out + fitting.why_compiled(first) + ([] if first.compile else fitting.why(first))
    split = split_of(first, supervisor)
    if need is None and forecast.doubtful(first):
        need = forecast.need(first, split)[1]
    if need is not None:
        limit = limit_text(forecast.limits)
        why.append(f"Its largest worker needs about {size_text(need.total)} ({need.sentence()}); the limit is {limit}.")
    if split is not None:
        why += split.explanation
    why += remarks(first)
    return Choice(first.replace(explanation=tuple(why)), split, need, spent)


def _on_gpus(plan: Plan, job: Job, facts: JobFacts, supervisor: Supervisor, machine: Cluster) -> Choice:
    """A plan for GPUs: what it says, and one process for each GPU where it says nothing. Nothing is tried."""
    from shoal.train.device import check_device, devices

    check_device(plan)
    named = plan if plan.names_axes else plan.replace(dp=min(devices(plan, 1), job.batch_size))
    threads = plan.threads or max(1, machine.cores // named.world_size)
    whole = in_microbatches(named.replace(dp=named.data_ways, threads=threads), divisible(job, facts)).filled()
    check_plan(whole, job, facts)
    split = split_of(whole, supervisor)
    why = [given_text(plan, whole), *(split.explanation if split is not None else ()), *remarks(whole, private=True)]
    why.append("Plans with GPUs are not tried beforehand.")
    return Choice(whole.replace(explanation=tuple(why)), split, None)


def _instead(wanted: Plan, first: Plan, forecast: Forecast, cores: int) -> tuple[Plan, Need, list[str]]:
    """The plan for a model that no worker can hold as a whole."""
    found = forecast.better(wanted, first)
    if found is None:
        raise PlanError(forecast.too_little(wanted, first))
    plan, need = found
    plan = plan.replace(threads=plan.threads or max(1, cores // plan.world_size)).filled()
    return plan, need, [f"{axes_text(plan)} is the smallest plan that fits: one worker cannot hold the whole model."]


def given_text(wanted: Plan, plan: Plan) -> str:
    """What of a plan was asked for, and what follows from that."""
    said = wanted.values()
    follows = [part for part in plan.brief().split(",") if part.partition("=")[0] not in said and part != "dp=1"]
    return f"{wanted} was given" + (f"; {', '.join(follows)} follow." if follows else " as it is.")


def remarks(plan: Plan, private: bool = False) -> list[str]:
    """What a plan says that changes nothing, or not what one might think; ``private``: workers share no memory."""
    found = []
    if plan.zero in (1, 2) and plan.data_ways > 1 and not private:
        found.append(
            f"zero={plan.zero} is what workers on one machine do anyway: weights and optimizer state exist once, and each "
            "worker updates its own slice."
        )
    if plan.zero and plan.data_ways == 1:
        found.append(f"zero={plan.zero} changes nothing with dp=1: there is nobody to share with.")
    if (plan.pp or 1) == 1 and (plan.microbatches or 1) > 1:
        found.append(f"Without pp, microbatches={plan.microbatches} are pieces that are computed in turn.")
    return found


def _best(
    candidates: list[Plan], job: Job, facts: JobFacts, supervisor: Supervisor, machine: Cluster, spent: Spent
) -> tuple[Plan, list[str]]:
    def favourite(plan: Plan) -> bool:
        # What wins wherever nothing else runs; trials of a second cannot tell a few percent apart.
        return plan.threads == 1 and plan.world_size == machine.cores

    known = _known(job, facts, candidates)
    if known is None:
        began = time.monotonic()
        # What looking for rewrites took longer is not there for trials.
        limit_s = min(_ENOUGH_S, max(SEARCH_S, spent.left_s))
        longest_s = 0.0

        def trial(plan: Plan, seconds: float) -> list[float]:
            nonlocal longest_s
            asked = time.monotonic()
            found = run_trial(plan, job, facts, supervisor, seconds).step_times_s
            longest_s = max(longest_s, time.monotonic() - asked)
            return found

        def enough() -> bool:
            # Another trial may take as long as any so far.
            return time.monotonic() - began + longest_s > limit_s

        tried = search(candidates, trial, SEARCH_S, enough=enough, favourite=favourite)
        for entry in tried:
            remember(entry.plan, job, facts, {"trial_step_s": entry.step_s})
        how = f"tried {len(tried)} plans in {time.monotonic() - began:.0f} s"
    else:
        tried, how = rank(known, favourite), "remembered from earlier trials of this job on this machine"
    best = tried[0]
    samples = min(job.batch_size, facts.samples)
    fastest = "the fastest" if best.step_s <= min(t.step_s for t in tried) else "as fast, within 3 %, as the fastest"
    why = [f"{best.plan.brief()} is {fastest} of {len(tried)} plans on {machine.cores} cores ({how})."]
    why += [f"{t.plan.brief()}: {t.step_s * 1e3:.2f} ms a step, {samples / t.step_s:,.0f} samples/s" for t in tried]
    return best.plan, why


def _is_long(plan: Plan, job: Job, facts: JobFacts) -> bool:
    """Whether a run takes long enough for seconds before it, as far as that is known."""
    step_s = predicted_step(plan, job, facts)
    steps = job.epochs * -(-facts.samples // min(job.batch_size, facts.samples))
    return step_s is not None and step_s * steps > _LONG_RUN_S


def check_compile(plan: Plan) -> None:
    """PlanError where a plan asks for compiled code that cannot be had under it."""
    trouble = uncompilable(plan) if plan.compile else None
    if plan.compile and isinstance(plan.rewrites, tuple):
        trouble = f"rewrites={'+'.join(plan.rewrites)} makes other code of the model already"
    if trouble is not None:
        raise PlanError(f"compile=on cannot be used: {trouble}; leave compile out.")


def divisible(job: Job, facts: JobFacts) -> int:
    """Into how many microbatches any batch of an epoch can be cut; BatchNorm needs two samples in each."""
    batch = min(job.batch_size, facts.samples)
    smallest = facts.samples % batch or batch
    return max(1, smallest // 2) if facts.batchnorm else batch


def check_plan(plan: Plan, job: Job, facts: JobFacts) -> None:
    """Refuse a plan that does not fit the job."""
    batch = min(job.batch_size, facts.samples)
    if plan.data_ways > batch:
        raise PlanError(
            f"{plan.data_ways} workers cannot share a batch of {batch} samples; use "
            f"{'dp' if plan.ps is None else 'workers'}={batch} or fewer, or a larger batch."
        )
    check_servers(plan, facts)
    check_compile(plan)
    if DIRECTION in facts.table.state_keys:
        check_lbfgs(plan, job)
    if plan.mode == "bounded" and plan.staleness is None:
        raise PlanError("mode=bounded does not say by how much; write staleness=3, say.")
    if (plan.waits_for_nobody or plan.backup) and (plan.tp or 1) * (plan.pp or 1) > 1:
        raise NotBuiltError(
            f"{'backup' if plan.backup else plan.mode} is built for workers that have the whole model; write sync alone, or "
            "leave tp and pp out of the plan."
        )
    if plan.shares is not None and sum(plan.shares) == 0:
        raise PlanError("All shares are 0; give at least one worker a part of the batch.")
    for key in ("tp", "pp"):
        if plan.local_steps and (getattr(plan, key) or 1) > 1:
            raise NotBuiltError(
                f"local_steps={plan.local_steps} lets each worker train alone and {key}={getattr(plan, key)} lets several "
                "compute together; that is not built, so keep one of them."
            )
    check_tables(plan, facts.tables)
    if (plan.accumulate or 1) > batch:
        raise PlanError(
            f"accumulate={plan.accumulate} cuts a batch of {batch} samples into more parts than it has; use fewer."
        )


def check_lbfgs(plan: Plan, job: Job) -> None:
    """Refuse what L-BFGS is not built for."""
    if plan.ps is None or plan.waits_for_nobody or plan.backup or (plan.tp or 1) * (plan.pp or 1) > 1:
        raise PlanError('optimizer="lbfgs" runs on parameter servers that wait for all; use --plan ps=1,workers=2,sync.')
    if job.grad_clip is not None:
        raise PlanError('optimizer="lbfgs" looks at the gradient as it is; leave grad_clip out.')


def check_servers(plan: Plan, facts: JobFacts) -> None:
    """Refuse more servers than there is anything to serve for."""
    table = facts.table
    elements = sum(spec.numel for spec in table.trained)
    if table.elementwise:
        most = min(elements, -(-table.trained_bytes // ALIGNMENT))
        what = f"{elements:,} parameters, {ALIGNMENT} bytes of them at least for each"
    else:
        most = len(table.trained) if table.splittable else 1
        what = f"{len(table.trained)} parameter tensors that the optimizer takes as wholes"
    if facts.tables:
        # Rows by key are dealt out by shards: a server may have some, and no parameters.
        shards = max(spec.shards for spec in facts.tables)
        most, what = max(most, shards), f"{what}; {shards} shards of rows"
    if plan.servers > most:
        raise PlanError(f"ps={plan.servers} is more servers than parameters ({what}); use ps={most} or fewer.")


def split_of(plan: Plan, supervisor: Supervisor) -> Split | None:
    """How a plan divides the model; None where every worker has all of it. PlanError where it does not fit the model."""
    if not Grid.of(plan).splits_model:
        return None
    split: Split | None = supervisor.call("split", plan, timeout_s=_SPLIT_TIMEOUT_S)
    return split


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured.

    Attributes:
        step_times_s: of the steps after the first few.
        compute_s, comm_s: medians of a worker's computing, and of its reducing, updating and waiting.
        memory_mb: the largest worker's peak resident memory.
    """

    step_times_s: list[float]
    compute_s: float
    comm_s: float
    memory_mb: float | None


def run_trial(plan: Plan, job: Job, facts: JobFacts, supervisor: Supervisor, seconds: float) -> TrialResult:
    """Run a plan for about so many seconds in an arena of its own, whose results are thrown away; remember the times."""
    from shoal.train.setup import spin_seconds

    asked = plan
    if plan.waits_for_nobody:
        # There is nobody here who could lead such a run; its units are those of a sync one.
        plan = plan.replace(mode="sync", staleness=None, push_every=None, pull_every=None)
    plan = plan.replace(backup=0) if plan.backup else plan
    split = split_of(plan, supervisor)
    settings = RunSettings(
        plan=plan,
        split=split,
        layout=layout_of(plan, facts, split),
        total_steps=_MOST_TRIAL_STEPS,
        steps_per_epoch=_MOST_TRIAL_STEPS + 1 if facts.samples > job.batch_size else 1,
        spin_s=spin_seconds(plan),
        evaluate=False,
        cold_dir=str(cache_dir() / "trials" / str(os.getpid())),
    )
    arena = Arena.create(settings.layout)
    tables = RunTables(facts.tables, settings.cold_dir)
    try:
        result = _run_trial(arena, tables, settings, supervisor, facts, seconds)
    finally:
        arena.memory.close()
        tables.close()
    details = {"compute_s": result.compute_s, "comm_s": result.comm_s, "memory_mb": result.memory_mb}
    remember(asked, job, facts, {"trial_step_s": statistics.median(result.step_times_s), **details})
    return result


def _run_trial(
    arena: Arena, tables: RunTables, settings: RunSettings, supervisor: Supervisor, facts: JobFacts, seconds: float
) -> TrialResult:
    fds = (arena.memory.fd, *tables.fds)
    bind(supervisor, settings, fds, last=False)
    table = table_of(facts, settings.split)
    Store(arena, table).spread()
    crew = Crew(supervisor, arena, settings, lambda *_, **__: None, fds)
    crew.start(spare=False)
    began = time.monotonic()
    started: tuple[float, int] | None = None
    memory: dict[str, Any] = {}
    while not crew.finished:
        crew.poll(0.01, 0.0, lambda: "the job was only being tried.")
        done = min(slot.signal(Signal.UPDATED) for slot in arena.slots)
        now = time.monotonic()
        if started is None and (done >= _WARM_UP_STEPS or (done and now - began > _LONG_WARM_UP_S)):
            started = now, done
        # Of steps that take long one is enough: the one that is being made when this is asked.
        long = started is not None and started[1] == 1 and started[0] - began > _LONG_FIRST_S
        if started is not None and (long or (now - started[0] > seconds and done > started[1])):
            if not arena.supervisor.note(Note.STOP_WANTED):
                memory = memory_of([child.pid for child in supervisor.children.values() if child.role == "worker"])
            arena.supervisor.write(Note.STOP_WANTED, 1)
    # The quickest jobs are done with all trial steps before anybody could look: the template is what they were forked from.
    memory = memory or memory_of([supervisor.template_pid])
    store = Store(arena, table)
    count = min(slot.signal(Signal.UPDATED) for slot in arena.slots)
    first = min(started[1] if started is not None else _WARM_UP_STEPS, max(0, count - 2))
    rows = [store.record(0, step) for step in range(first, count)]
    ends = [float(row[Columns.ENDED]) for row in rows]
    return TrialResult(
        [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)] or [ends[0] - float(rows[0][Columns.BEGAN])],
        statistics.median(float(row[Columns.COMPUTE]) for row in rows),
        statistics.median(float(row[Columns.REDUCE] + row[Columns.WAIT]) for row in rows),
        max(memory.get("peak_rss_mb") or [0.0]) or None,
    )


def report(choice: Choice, job: Job, facts: JobFacts, supervisor: Supervisor) -> dict[str, Any]:
    """What ``shoal plan --json`` says of a chosen plan; it is tried now if nothing is known of it."""
    plan = choice.plan
    if "memory_mb" not in _entries(job, facts).get(str(plan), {}):
        with choice.spent.part("trials"):
            run_trial(plan, job, facts, supervisor, _SINGLE_TRIAL_S)
    entries = _entries(job, facts)
    entry = entries[str(plan)]
    return {
        "plan": str(plan),
        "predicted": {
            "step_s": predicted_step(plan, job, facts),
            "memory_mb_per_worker": entry["memory_mb"],
            "forecast_mb_per_worker": None if choice.need is None else round(choice.need.total / 1e6, 1),
            "compute_s": entry["compute_s"],
            "comm_s": entry["comm_s"],
        },
        "candidates": sorted(
            ({"plan": name, "step_s": e["trial_step_s"]} for name, e in entries.items() if "trial_step_s" in e),
            key=lambda e: e["step_s"],
        ),
        "why": [*plan.explanation, choice.spent.sentence()],
        "spent_s": choice.spent.as_dict(),
    }


# -- what is remembered ----------------------------------------------------------------------------------------------


def job_key(job: Job, facts: JobFacts) -> str:
    """A name for what decides the speed of a job: its tensors, batch, data and seed-free settings, on this machine."""
    import torch

    machine = Cluster.local(measure=False).machines[0]
    shapes: list[Any] = [[spec.shape, str(spec.dtype), spec.group] for spec in facts.table.parameters]
    parts = [
        job.name,
        job.batch_size,
        facts.samples,
        shapes,
        facts.table.state_keys,
        torch.__version__,
        fingerprint(machine),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _file(job: Job, facts: JobFacts) -> Any:
    return cache_dir() / "plans" / f"{job_key(job, facts)}.json"


def _entries(job: Job, facts: JobFacts) -> dict[str, dict[str, Any]]:
    """What is known of this job on this machine: plan -> measurements."""
    return read_json(_file(job, facts)) or {}


def remember(plan: Plan, job: Job, facts: JobFacts, measured: Mapping[str, float | None]) -> None:
    """Keep measurements of a plan: ``trial_step_s`` of a trial, ``step_s`` of a full run, which counts for more."""
    _remember(str(plan), job, facts, measured)


def _remember(key: str, job: Job, facts: JobFacts, found: Mapping[str, Any]) -> None:
    known = _entries(job, facts)
    known.setdefault(key, {}).update(found)
    # A cache that cannot be written costs the next run a trial, nothing else.
    with contextlib.suppress(OSError):
        write_json(_file(job, facts), known)


def _known(job: Job, facts: JobFacts, candidates: list[Plan]) -> list[Tried] | None:
    """What is remembered of all the candidates' trials, or None where one was never tried."""
    known = _entries(job, facts)
    if any("trial_step_s" not in known.get(str(plan), {}) for plan in candidates):
        return None
    return [Tried(plan, float(known[str(plan)]["trial_step_s"]), 0) for plan in candidates]


def predicted_step(plan: Plan, job: Job, facts: JobFacts) -> float | None:
    """What this plan's median step was in an earlier run, or in a trial; None where nothing is known of it."""
    entry = _entries(job, facts).get(str(plan), {})
    value = entry.get("step_s", entry.get("trial_step_s"))
    return None if value is None else float(value)
