"""What torch imports late, imported once in the process that workers are forked from: each worker, and each replacement, would
take the same second for it. A plan that needs nothing of it does without."""

from __future__ import annotations

import importlib

from shoal.plan import Plan

DYNAMO = "torch._dynamo"


def import_ahead(plan: Plan) -> None:
    """Import what a plan's workers are going to import at their first step."""
    for name in late_imports(plan):
        importlib.import_module(name)


def late_imports(plan: Plan) -> list[str]:
    """What they are: pipelining, DTensors and torch.utils.checkpoint import torch._dynamo themselves, whatever is done."""
    found = []
    if plan.compile or plan.zero == 3 or plan.recompute not in (None, "none"):
        found.append(DYNAMO)
    if (plan.pp or 1) > 1:
        found.append("torch.distributed.pipelining")
    if (plan.tp or 1) > 1:
        # Operators on the meta device, where the parts of a model are cut.
        found.append("torch.fx.experimental.symbolic_shapes")
    return found
