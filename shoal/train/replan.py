"""Changing the plan of a run while it runs: what was asked for, and the whole plan that follows from it.

A request names what is to be different. Where it names an axis it names all of them; habits that it says nothing of stay as they
are, so that a run goes on computing what it computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from shoal.cluster import Cluster
from shoal.comm.arena import Arena
from shoal.comm.grid import Grid
from shoal.errors import PlanError, ShoalError
from shoal.job import Job
from shoal.plan import Plan
from shoal.planner.candidates import local_candidates
from shoal.process.supervisor import Supervisor, TemplateLost
from shoal.train.choose import check_plan, divisible, given_text, remarks, split_of
from shoal.train.forecast import Forecast
from shoal.train.orders import Inbox
from shoal.train.settings import JobFacts
from shoal.train.split import Split

_CONSISTENCY = ("mode", "staleness", "push_every", "pull_every", "backup", "replicas")
_HABITS = ("recompute", "accumulate", "device", "precision", "layout", "compile", "rewrites", "sub_batch", "codec", "adapt")
_STAY = ("device", "compile", "adapt", "replicas")
TOO_LATE = "The run is over before its plan could change; go on with it under the plan by --resume."


def complete(
    asked: Plan, present: Plan, job: Job, facts: JobFacts, supervisor: Supervisor, cluster: Cluster | None
) -> tuple[Plan, Split | None]:
    """The whole plan that a run is to go on with, and how it divides the model.

    PlanError, or NotBuiltError, where it makes no sense; nothing has happened to the run then. How a plan divides the model is
    found out later where the template has no longer the whole of it.
    """
    wanted = wished(asked, present, facts.batchnorm)
    machine = cluster or Cluster.local(measure=False)
    batch = min(job.batch_size, facts.samples)
    plan = local_candidates(wanted, machine.cores, batch, facts.images, divisible(job, facts))[0]
    if Grid.of(plan).splits_model and asked.rewrites is None:
        plan = plan.replace(rewrites="none")
    check_plan(plan, job, facts)
    refuse_same(plan, present)
    why = [given_text(asked, plan), *remarks(plan)]
    split: Split | None = None
    if not Grid.of(present).splits_model:
        split = split_of(plan, supervisor)
        Forecast(job, facts, supervisor, machine).refuse(asked, plan, split)
        why += split.explanation if split is not None else ()
    return plan.replace(explanation=tuple(why)), split


def wished(asked: Plan, present: Plan, batchnorm: bool) -> Plan:
    """What was asked for with what stays; ``batchnorm``: the model has some. PlanError where that cannot change meanwhile."""
    if asked.is_auto:
        raise PlanError('Say what is to change, such as --plan "dp=2"; a run that is under way tries no plans.')
    asked.require_built()
    wanted = merged(asked, present, batchnorm)
    for key in _STAY:
        if getattr(asked, key) not in (None, getattr(present, key)):
            raise PlanError(f"{key} cannot change while a run is under way; go on with it by --resume --plan instead.")
    if wanted.rewrites not in (present.rewrites, "none"):
        raise PlanError("Rewrites are checked before a run starts; leave rewrites out, or write rewrites=none.")
    return wanted


def refuse_same(plan: Plan, present: Plan) -> None:
    """PlanError where a run has a plan already."""
    if plan == present:
        raise PlanError(f"The run has the plan {present.brief()} already.")


def merged(asked: Plan, present: Plan, batchnorm: bool) -> Plan:
    """What was asked for, and what stays; ``batchnorm``: the model has some."""
    changes = asked.values()
    if not asked.names_axes:
        # What suits BatchNorm follows from the rest where there is none.
        return Plan(**{**present.values(), **({} if batchnorm else {"batchnorm": None}), **changes})
    keys = [key for key in _HABITS if key not in changes]
    if batchnorm and "batchnorm" not in changes:
        keys.append("batchnorm")
    if asked.ps is not None and present.ps is not None and not set(changes) & set(_CONSISTENCY):
        keys += [key for key in _CONSISTENCY if key != "mode" or present.staleness is None]
    if present.shares is not None and asked.data_ways == present.data_ways:
        keys.append("shares")
    # The pieces of a pipeline are microbatches.
    kept = {key: getattr(present, key) for key in keys if (asked.pp or 1) == 1 or key != "sub_batch"}
    return Plan(**{**kept, **changes})


@dataclass(frozen=True)
class Change:
    """A change that was found sound and waits for the end of a step.

    Attributes:
        plan: what the run is to go on with.
        arena: the memory for it, where it could be reserved.
        by: ``command`` or ``on_event``.
        answer: tells who asked, by fields.
    """

    plan: Plan
    arena: Arena | None
    by: str
    answer: Callable[..., None]

    def give_up(self, why: str) -> None:
        """It will not be made."""
        if self.arena is not None:
            self.arena.memory.close()
        self.answer(error=why)


@dataclass(frozen=True)
class _Wish:
    plan: str | Plan
    by: str
    answer: Callable[..., None]


class Replanner:
    """Hears what is asked for, by command or by ``on_event``, and says what of it makes sense.

    ``check``: gives the whole plan, and the memory for it.
    """

    def __init__(self, inbox: Inbox, check: Callable[[Plan], tuple[Plan, Arena | None]]) -> None:
        self.inbox = inbox
        self._check = check
        self._waiting: list[_Wish] = []

    def next(self, wished: Plan | None, warn: Callable[[str], None]) -> Change | None:
        """A change that is to be made; what makes no sense is answered here.

        ``wished``: by ``on_event``; ``warn``: says a sentence to whoever watches the run.
        """
        if wished is not None:
            self._waiting.append(_Wish(wished, "on_event", lambda **fields: warn(fields["error"]) if "error" in fields else None))
        elif not self._waiting and (asked := self.inbox.next()) is not None:
            self._waiting.append(_Wish(asked.plan, "command", partial(self.inbox.answer, asked)))
        if not self._waiting:
            return None
        wish = self._waiting.pop(0)
        try:
            plan, arena = self._check(Plan.parse(wish.plan) if isinstance(wish.plan, str) else wish.plan)
        except TemplateLost:
            # It is being replaced, and then it can be asked.
            self._waiting.append(wish)
            return None
        except ShoalError as error:
            # Whatever it is, it is the request's and not the run's.
            wish.answer(error=str(error))
            return None
        return Change(plan, arena, wish.by, wish.answer)
