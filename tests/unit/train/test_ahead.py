"""Which of what torch imports late is imported before workers are forked."""

from __future__ import annotations

import importlib.util

import pytest

from shoal.plan import Plan
from shoal.train.ahead import DYNAMO, late_imports


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        ("dp=2", []),
        ("ps=1,workers=2,async", []),
        ("dp=2,zero=1,recompute=none,compile=off", []),
        ("dp=2,compile=on", [DYNAMO]),
        ("dp=2,zero=3", [DYNAMO]),
        ("dp=2,recompute=selective", [DYNAMO]),
        ("pp=2,microbatches=2", ["torch.distributed.pipelining"]),
        ("tp=2", ["torch.fx.experimental.symbolic_shapes"]),
        ("tp=2,recompute=full", [DYNAMO, "torch.fx.experimental.symbolic_shapes"]),
    ],
)
def test_what_a_plan_needs_and_no_more(plan: str, names: list[str]) -> None:
    assert late_imports(Plan.parse(plan)) == names
    assert all(importlib.util.find_spec(name) for name in names)
