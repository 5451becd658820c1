"""Which plans a run can have whose servers and workers share no memory, from its beginning on and while it runs."""

from __future__ import annotations

from shoal.cluster import Cluster
from shoal.errors import NotBuiltError, PlanError
from shoal.plan import Plan
from shoal.planner.candidates import in_microbatches
from shoal.ps.ledger import UNITS_KEPT
from shoal.train.choose import check_plan, divisible, given_text, remarks
from shoal.train.host import TrainHost
from shoal.train.portions import with_portions
from shoal.train.remote.state import pieces_of
from shoal.train.remote.teams import size_of
from shoal.train.replan import refuse_same, wished
from shoal.train.settings import units_of

_NEEDS_MEETINGS = (
    "Workers that share no memory and do not wait for each other see no batch but their own; add batchnorm=local to the plan, or "
    "write sync without backup."
)


def threads_of(processes: int) -> int:
    """How many threads each of so many processes computes with where the plan leaves that open."""
    return max(1, Cluster.local(measure=False).cores // processes)


def complete(plan: Plan, host: TrainHost, threads: int) -> Plan:
    """The plan with everything that it leaves open. A sentence where it is not built, or does not fit the job."""
    job, facts = host.job, host.facts()
    whole = with_portions(in_microbatches(plan, divisible(job, facts)).replace(threads=plan.threads or threads), facts).filled()
    check_plan(whole, job, facts)
    if (count := units_of(whole, facts)) > UNITS_KEPT:
        raise PlanError(
            f"accumulate={whole.accumulate} cuts a batch into {count} portions, and no more than {UNITS_KEPT} are kept count "
            "of; write a smaller one."
        )
    keys = len(pieces_of(facts.table)) + sum(spec.shards for spec in facts.tables)
    if facts.tables and whole.servers > keys:
        raise PlanError(
            f"ps={whole.servers} is more servers than pieces of parameters and shards of tables; use ps={keys} or fewer."
        )
    if not facts.table.elementwise and not facts.table.splittable and whole.servers > 1:
        raise PlanError("The optimizer may look across tensors, so one server has to hold all of them; write ps=1.")
    if facts.batchnorm and whole.batchnorm != "local" and (whole.waits_for_nobody or whole.backup):
        raise NotBuiltError(_NEEDS_MEETINGS)
    if facts.batchnorm and whole.batchnorm != "local" and size_of(whole) > 1 and whole.data_ways > 1:
        raise NotBuiltError(
            "BatchNorm over the global batch is not built for workers of several processes that share no memory; add "
            "batchnorm=local to the plan, or leave tp and pp out."
        )
    of = f" of {size_of(whole)} processes each" if size_of(whole) > 1 else ""
    why = f"{whole.servers} servers and {whole.data_ways} workers{of} share no memory and speak over sockets."
    return whole.replace(explanation=(why, *remarks(whole, private=True)))


def changed(asked: Plan, present: Plan, host: TrainHost, threads: int | None = None) -> Plan:
    """The whole plan that a run is to go on with which has ``present``. PlanError, or NotBuiltError, where it makes no sense.

    ``threads``: of each worker where the plan says nothing; None: as many as this machine has cores for.
    """
    wanted = wished(asked, present, host.facts().batchnorm)
    if wanted.ps is None:
        raise PlanError(
            f"Processes that share no memory stay servers and workers while a run is under way; name both, such as "
            f"ps={present.servers},workers=3, or go on by --resume --plan {asked}."
        )
    if size_of(wanted) > 1 or size_of(present) > 1:
        raise NotBuiltError(
            "Workers of several processes that share no memory do not change while a run is under way; stop the run, and go on "
            f"with it by --resume --plan {asked}."
        )
    # What it asks for of how servers wait leaves open how many copies there are.
    plan = complete(wanted.replace(replicas=present.replicas), host, threads or threads_of(wanted.world_size))
    refuse_same(plan, present)
    return plan.replace(explanation=(given_text(asked, plan), *plan.explanation))
