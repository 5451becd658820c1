"""What a plan leaves open: chosen by short trials, remembered for this job on this machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from shoal.cluster import Cluster
from shoal.cluster.cache import cache_dir, read_json, write_json
from shoal.cluster.measure import fingerprint
from shoal.comm.arena import Arena, Note, Signal
from shoal.comm.store import Columns, Store, arena_layout
from shoal.errors import PlanError, RequestError
from shoal.job import Job
from shoal.plan import Plan
from shoal.planner.candidates import local_candidates
from shoal.planner.search import Tried, search
from shoal.process.supervisor import Supervisor
from shoal.train.crew import Crew
from shoal.train.settings import JobFacts, RunSettings

SEARCH_S = 6.0
_WARM_UP_STEPS = 3
_MOST_TRIAL_STEPS = 400


def choose_plan(plan: Plan, job: Job, facts: JobFacts, supervisor: Supervisor, cluster: Cluster | None) -> Plan:
    """Return the plan with everything filled in and explained; PlanError where it does not fit the job or the machine."""
    machine = cluster or Cluster.local(measure=False)
    if len(machine.machines) > 1:
        raise PlanError(
            "The cluster has more than one machine, and shoal starts workers on one; start the job with torchrun on each "
            "machine, and shoal joins them."
        )
    _check_memory(facts, plan.filled() if plan.names_axes else Plan(dp=1), machine)
    batch = min(job.batch_size, facts.samples)
    candidates = local_candidates(plan, machine.cores, batch, facts.images)
    chosen, why = candidates[0], [f"{candidates[0]} was given as it is."]
    if len(candidates) > 1:
        chosen, why = _best(candidates, job, facts, supervisor, plan, machine)
    workers = chosen.world_size * (chosen.threads or 1)
    if workers > machine.cores:
        why.append(
            f"Warning: {chosen.world_size} workers × {chosen.threads} threads are more than the {machine.cores} cores "
            "there are, so they take turns."
        )
    return chosen.replace(explanation=tuple(why))


def _best(
    candidates: list[Plan], job: Job, facts: JobFacts, supervisor: Supervisor, wanted: Plan, machine: Cluster
) -> tuple[Plan, list[str]]:
    known = _known(job, facts, candidates)
    if known is None:
        began = time.monotonic()
        tried = search(candidates, _trial(job, facts, supervisor), SEARCH_S)
        for entry in tried:
            remember(entry.plan, job, facts, entry.step_s, tried=True)
        how = f"tried {len(tried)} plans in {time.monotonic() - began:.0f} s"
    else:
        tried, how = known, "remembered from earlier trials of this job on this machine"
    best = tried[0]
    samples = min(job.batch_size, facts.samples)
    why = [f"{_short(best.plan)} is the fastest of {len(tried)} plans on {machine.cores} cores ({how})."]
    why += [f"{_short(t.plan)}: {t.step_s * 1e3:.2f} ms a step, {samples / t.step_s:,.0f} samples/s" for t in tried]
    return best.plan, why


def _short(plan: Plan) -> str:
    """The part of a plan that the search chose."""
    return f"dp={plan.dp},threads={plan.threads}" + (f",layout={plan.layout}" if plan.layout != "contiguous" else "")


def _trial(job: Job, facts: JobFacts, supervisor: Supervisor) -> Callable[[Plan, float], list[float]]:
    def trial(plan: Plan, seconds: float) -> list[float]:
        from shoal.train.session import spin_seconds

        settings = RunSettings(
            plan=plan,
            layout=arena_layout(facts.table, plan.world_size, facts.collective_bytes),
            total_steps=_MOST_TRIAL_STEPS,
            steps_per_epoch=_MOST_TRIAL_STEPS + 1 if facts.samples > job.batch_size else 1,
            spin_s=spin_seconds(plan),
            evaluate=False,
        )
        arena = Arena.create(settings.layout)
        try:
            return _run_trial(arena, settings, supervisor, facts, seconds)
        finally:
            arena.memory.close()

    return trial


def _run_trial(
    arena: Arena, settings: RunSettings, supervisor: Supervisor, facts: JobFacts, seconds: float
) -> list[float]:
    """Run a plan in an arena of its own, whose results are thrown away; the times of its steps after the first few."""
    supervisor.call("bind", settings, True, fds=(arena.memory.fd,))
    crew = Crew(supervisor, arena, settings, lambda *_, **__: None, arena.memory.fd)
    crew.start(spare=False)
    started = None
    while not crew.finished:
        crew.poll(0.01, 0.0, lambda: "the job was only being tried.")
        done = min(slot.signal(Signal.UPDATED) for slot in arena.slots)
        if started is None and done >= _WARM_UP_STEPS:
            started = time.monotonic()
        if started is not None and time.monotonic() - started > seconds and done > _WARM_UP_STEPS + 1:
            arena.supervisor.write(Note.STOP_WANTED, 1)
    store = Store(arena, facts.table)
    count = min(slot.signal(Signal.UPDATED) for slot in arena.slots)
    ends = [float(store.record(0, step)[Columns.ENDED]) for step in range(count)]
    first = min(_WARM_UP_STEPS, max(0, count - 2))
    return [b - a for a, b in zip(ends[first:-1], ends[first + 1 :], strict=True)]


def _check_memory(facts: JobFacts, plan: Plan, machine: Cluster) -> None:
    """Refuse what certainly does not fit: weights, state and gradients alone."""
    need = arena_layout(facts.table, plan.world_size, 0).size
    limit = machine.memory_limit_bytes
    if limit is not None and need / plan.world_size > limit:
        raise PlanError(
            f"The plan needs at least {need / plan.world_size / 1e6:,.0f} MB a worker and the limit is {limit / 1e6:,.0f} MB; "
            "raise --memory-limit, or use a smaller model."
        )
    if need > machine.memory_bytes:
        raise RequestError(
            f"The plan needs at least {need / 1e9:.1f} GB and this machine has {machine.memory_bytes / 1e9:.1f} GB; "
            "use fewer workers or a smaller model."
        )


# -- what is remembered ----------------------------------------------------------------------------------------------


def job_key(job: Job, facts: JobFacts) -> str:
    """A name for what decides the speed of a job: its tensors, batch, data and seed-free settings, on this machine."""
    import torch

    machine = Cluster.local(measure=False).machines[0]
    shapes: list[Any] = [[spec.shape, str(spec.dtype), spec.group] for spec in facts.table.parameters]
    parts = [job.name, job.batch_size, facts.samples, shapes, facts.table.state_keys, torch.__version__, fingerprint(machine)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _file(job: Job, facts: JobFacts) -> Any:
    return cache_dir() / "plans" / f"{job_key(job, facts)}.json"


def remember(plan: Plan, job: Job, facts: JobFacts, step_s: float, tried: bool = False) -> None:
    """Keep the median step of a plan; a full run counts for more than a trial."""
    path = _file(job, facts)
    known = read_json(path) or {}
    entry = known.setdefault(str(plan), {})
    entry["trial_step_s" if tried else "step_s"] = step_s
    try:
        write_json(path, known)
    except OSError:
        return


def _known(job: Job, facts: JobFacts, candidates: list[Plan]) -> list[Tried] | None:
    """What is remembered of all the candidates' trials, the fastest first, or None where one was never tried."""
    known = read_json(_file(job, facts)) or {}
    if any("trial_step_s" not in known.get(str(plan), {}) for plan in candidates):
        return None
    found = [Tried(plan, float(known[str(plan)]["trial_step_s"]), 0) for plan in candidates]
    return sorted(found, key=lambda entry: entry.step_s)


def predicted_step(plan: Plan, job: Job, facts: JobFacts) -> float | None:
    """What this plan's median step was in an earlier run, or in a trial; None where nothing is known of it."""
    entry = (read_json(_file(job, facts)) or {}).get(str(plan), {})
    value = entry.get("step_s", entry.get("trial_step_s"))
    return None if value is None else float(value)
