"""Training a job: what ``shoal.train`` and ``shoal train`` call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import PlanError, RequestError
from shoal.job import Job
from shoal.plan import Plan
from shoal.process.supervisor import Supervisor

if TYPE_CHECKING:
    from shoal.cluster import Cluster
    from shoal.train.run import Run

Observer = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train: everything that is not the job.

    Attributes:
        plan: a plan, its string, or None for ``auto``.
        run_dir: the run directory, or None for ``runs/<job>-<time>``.
        resume: go on from the directory's (without one: the job's latest) last checkpoint.
        epochs, steps: totals, counted from the run's beginning; None: the job's epochs, no limit of steps.
        tensorboard: also write TensorBoard event files into the run directory.
        on_event: called for every event; the run waits for it after each step, and "stop" ends the run cleanly.
        skip_bad_pushes: with a parameter server, go on without pushes whose gradient is no number.
        push_log: keep a write-ahead log of pushes; None: as the run that is gone on with did, a new one does not.
        factory, source: where a bundle's reader finds the model's code.
        changes: fields of the job that were changed after it was found there.
    """

    plan: str | Plan | None = None
    run_dir: Path | None = None
    resume: bool = False
    epochs: int | None = None
    steps: int | None = None
    cluster: Cluster | None = None
    tensorboard: bool = False
    on_event: Observer | None = None
    skip_bad_pushes: bool = False
    push_log: bool | None = None
    factory: str | None = None
    source: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def train(
    job: Job,
    plan: str | Plan | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    epochs: int | None = None,
    steps: int | None = None,
    cluster: Cluster | None = None,
    on_event: Observer | None = None,
    skip_bad_pushes: bool = False,
    push_log: bool | None = None,
) -> Run:
    """Train a job and return its Run.

    Args:
        job: what to train.
        plan: how: a Plan or its string; None or "auto" measures and chooses.
        run_dir: where to leave it; None: ``runs/<job>-<time>``.
        resume: go on from that directory's last checkpoint (without one: the job's latest); begins at the beginning
            where there is none.
        epochs, steps: totals, counted from the run's beginning.
        cluster: the machines; None: this one.
        on_event: called in this process for every event; the run waits for it at each step. Returning "stop" ends the
            run cleanly after the step.
        skip_bad_pushes: with a parameter server, go on without pushes whose gradient is no number, instead of ending.
        push_log: with a parameter server, acknowledge a push only when it is in a log on disk, so that nothing is lost where all
            processes die at once. None: as the run that is gone on with did; a new one keeps none.

    Raises RequestError (or one of its kinds) where the request makes no sense, JobFailed where the job failed.
    """
    from shoal.train.driver import run_job

    if not isinstance(job, Job):
        raise RequestError(f"shoal.train needs a shoal.Job, not a {type(job).__name__}; build one with shoal.Job(…).")
    options = TrainOptions(
        plan=plan, run_dir=None if run_dir is None else Path(run_dir), resume=resume, epochs=epochs, steps=steps,
        cluster=cluster, on_event=on_event, skip_bad_pushes=skip_bad_pushes, push_log=push_log,
        factory=importable(job.model),
    )  # fmt: skip
    return run_job(job, options, [])


def plan(job: Job, cluster: Cluster | None = None, wanted: str | Plan | None = None) -> Plan:
    """Choose how a job would run on a cluster (None: this machine), by short trials, without training it.

    Args:
        wanted: what is already decided, such as "dp=2"; the rest is chosen.

    Returns a complete Plan: ``print(plan)`` shows it, ``plan.why()`` explains it.
    """
    return plan_job(job, wanted, cluster)[0]


def start_supervisor() -> Supervisor:
    """Start a template that imports, while this process goes on, what every training job needs.

    torch._dynamo is what the first torch optimizer imports; it takes as long as torch itself.
    """
    # A process that has touched a GPU cannot be forked: its children fail at their first look at it. Workers that are
    # forked compute on processors, and torch's optimizers look for GPUs wherever there are some.
    supervisor = Supervisor(preload=("shoal.train.host",), environment={"CUDA_VISIBLE_DEVICES": ""})
    supervisor.start()
    return supervisor


def plan_job(
    job: Job, wanted: str | Plan | None, cluster: Cluster | None, supervisor: Supervisor | None = None
) -> tuple[Plan, dict[str, Any]]:
    """The chosen plan, and what ``shoal plan --json`` prints."""
    from shoal.train.choose import choose, report
    from shoal.train.driver import ENTRY, portable
    from shoal.train.spent import Spent

    asked = read_plan(wanted)
    asked.require_built()
    supervisor, spent = supervisor or start_supervisor(), Spent()
    try:
        # Importing torch is most of it; the job's data the rest.
        with spent.part("start"):
            supervisor.load(ENTRY, portable(job), 3600.0)
            facts = supervisor.call("facts")
        choice = choose(asked, job, facts, supervisor, cluster, thorough=True, spent=spent)
        return choice.plan, report(choice, job, facts, supervisor)
    finally:
        supervisor.close()


def train_target(
    target: Any, options: TrainOptions, observers: Sequence[Observer] = (), supervisor: Supervisor | None = None
) -> Run:
    """Train what a command's TARGET named (a ``shoal.jobs.registry.Target``)."""
    import dataclasses

    from shoal.train.driver import run_job

    factory = target.factory or (f"{Path(target.source).stem}:{target.attribute}" if target.source else None)
    options = dataclasses.replace(options, factory=factory, source=target.source)
    return run_job(target.job, options, observers, supervisor)


def read_plan(plan: str | Plan | None) -> Plan:
    """A plan from what the user gave; PlanError for anything else."""
    if plan is None:
        return Plan()
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, str):
        return Plan.parse(plan)
    raise PlanError(f"A plan is a string or a shoal.Plan, not a {type(plan).__name__}.")


def importable(factory: Any) -> str | None:
    """ "module:name" of a function that another process can import, else None."""
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "")
    if not module or module == "__main__" or "<" in name or not callable(factory):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is factory else None
