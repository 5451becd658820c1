"""What a run needs before it begins: what its workers have to know, and whether a checkpoint is of the same job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shoal.cluster import Cluster
from shoal.errors import RequestError
from shoal.job import Job
from shoal.plan import Plan
from shoal.train import checkpoint as checkpoints
from shoal.train.api import TrainOptions
from shoal.train.settings import JobFacts, RunSettings, layout_of, portions_of
from shoal.train.split import Split


def run_settings(
    plan: Plan, job: Job, facts: JobFacts, options: TrainOptions, directory: Path, split: Split | None = None,
    private: bool = False,
) -> RunSettings:  # fmt: skip
    """What the workers of a run have to know; ``directory``: of checkpoints; ``private``: they share no memory."""
    per_epoch = -(-facts.samples // job.batch_size)
    total = (options.epochs or job.epochs) * per_epoch
    total = min(total, options.steps) if options.steps else total
    return RunSettings(
        plan=plan,
        split=split,
        layout=layout_of(plan, facts, split, private),
        total_steps=total,
        steps_per_epoch=per_epoch,
        checkpoint_dir=str(directory.resolve()),
        cold_dir=str(directory.resolve().parent / "cold-rows"),
        spin_s=spin_seconds(plan),
        # What has no peer to take over after it needs no undo log either.
        guard=not private and os.environ.get("SHOAL_GUARD", "1") != "0",
        wait_for_observer=options.on_event is not None,
        skip_bad_pushes=options.skip_bad_pushes,
        portions=portions_of(plan, facts) if private else 0,
    )


def refuse_another_job(found: checkpoints.Checkpoint, job: Job) -> None:
    """RequestError where a step of the job is no longer the step that the checkpoint counts."""
    for name in ("batch_size", "seed"):
        then, now = found.meta.get(name), getattr(job, name)
        if then is not None and then != now:
            raise RequestError(
                f"{found.path.parent.parent} was trained with {name}={then} and the job now says {now}; "
                f"go on with --set {name}={then}, or begin another run."
            )


def spin_seconds(plan: Plan) -> float:
    """How long a worker spins before it sleeps: not at all when the cores do not suffice for all."""
    wanted = plan.world_size * (plan.threads or 1)
    return 200e-6 if wanted <= Cluster.local(measure=False).cores else 0.0


def job_page(job: Job, facts: JobFacts, options: TrainOptions) -> dict[str, Any]:
    """What ``job.json`` in a run directory says."""
    return {
        "name": job.name, "batch_size": job.batch_size, "epochs": options.epochs or job.epochs, "seed": job.seed,
        "samples": facts.samples, "eval_samples": facts.eval_samples,
        "parameters": sum(p.numel for p in facts.table.parameters), "factory": options.factory,
        "source": str(options.source) if options.source else None, "changes": dict(options.changes),
    }  # fmt: skip


def take_turns(plan: Plan) -> str | None:
    """What a person should know where a plan has more threads than there are cores."""
    cores = Cluster.local(measure=False).cores
    if plan.world_size * (plan.threads or 1) <= cores:
        return None
    return f"{plan.world_size} workers × {plan.threads} threads are more than the {cores} cores there are, so they take turns"
