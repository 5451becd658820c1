"""``shoal plan``: profile, search, explain."""

from __future__ import annotations

import contextlib
from typing import Any

from typer.core import TyperCommand

from shoal.cli.answer import Answer
from shoal.cli.options import (
    ClusterOption,
    DataOption,
    JsonFlag,
    MemoryOption,
    PlanOption,
    SeedOption,
    SetOption,
    TargetArgument,
    find_cluster,
    find_target,
    parse_plan,
)
from shoal.observe.lines import step_time


class PlanCommand(TyperCommand):
    """The command with the glossary of plan keys below its options."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write one line a key."""
        from shoal.plan import GLOSSARY

        with formatter.section("What a plan can say"):
            formatter.write_dl(list(GLOSSARY.items()))


def plan(
    target: TargetArgument,
    plan: PlanOption = None,
    set: SetOption = None,
    seed: SeedOption = None,
    data: DataOption = None,
    cluster: ClusterOption = None,
    memory_limit: MemoryOption = None,
    json: JsonFlag = False,
) -> Answer:
    """Say how a job would run on this machine, and why.

    A plan is a list such as "dp=2,threads=1"; what is left out, the planner chooses.
    """
    wanted = parse_plan(plan)
    from shoal.train.api import plan_job, start_supervisor

    with contextlib.closing(start_supervisor()) as supervisor:
        job = find_target(target, set, seed, data)
        machines = find_cluster(cluster, memory_limit)
        made, result = plan_job(job.job, wanted, machines, supervisor)
    return Answer(result, _lines(made, result))


def _lines(made: Any, result: dict[str, Any]) -> list[str]:
    predicted = result.get("predicted") or {}
    why = made.why()
    lines = [f"plan: {made.brief()}"]
    lines += [f"  {sentence}" for sentence in (why.splitlines() if isinstance(why, str) else why)]
    if predicted.get("step_s") is None:
        lines.append("predicted step time: — (nothing to predict from yet)")
    else:
        named = (("computing", "compute_s"), ("exchanging", "comm_s"))
        parts = [f"{name} {step_time(predicted[key])}" for name, key in named if predicted.get(key) is not None]
        beside = f" ({', '.join(parts)})" if parts else ""
        lines.append(f"predicted step time: {step_time(predicted['step_s'])}{beside}")
    if predicted.get("memory_mb_per_worker") is not None:
        lines.append(f"predicted memory: {predicted['memory_mb_per_worker']:,.0f} MB a worker")
    return [*lines, f"in full: {made}"]
