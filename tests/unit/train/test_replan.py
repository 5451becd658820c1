from __future__ import annotations

import pytest

from shoal.plan import Plan
from shoal.train.replan import merged

PRESENT = "ps=1,workers=2,staleness=3,pull_every=2,threads=1,precision=bf16,rewrites=relu_pool,batchnorm=local"


@pytest.mark.parametrize(
    ("present", "asked", "batchnorm", "expected"),
    [
        # Axes are said as a whole; habits stay, threads are for the planner, and the way to wait stays where servers do.
        (
            PRESENT, "ps=2,workers=3", True,
            "ps=2,workers=3,staleness=3,pull_every=2,precision=bf16,rewrites=relu_pool,batchnorm=local",
        ),
        (PRESENT, "dp=2", True, "dp=2,precision=bf16,rewrites=relu_pool,batchnorm=local"),
        # What suits BatchNorm follows where there is none.
        (PRESENT, "dp=2,precision=fp32", False, "dp=2,precision=fp32,rewrites=relu_pool"),
        # A way to wait is said as a whole.
        (PRESENT, "ps=1,workers=2,async", False, "ps=1,workers=2,async,precision=bf16,rewrites=relu_pool"),
        (PRESENT, "threads=2", True, PRESENT.replace("threads=1", "threads=2")),
        # Shares stay with their workers; the pieces of a pipeline are microbatches.
        ("dp=2,shares=3+1,sub_batch=8", "ps=1,workers=2", False, "ps=1,workers=2,shares=3+1,sub_batch=8"),
        ("dp=2,shares=3+1,sub_batch=8", "dp=3", False, "dp=3,sub_batch=8"),
        ("dp=2,sub_batch=8", "pp=2", False, "pp=2"),
    ],
)  # fmt: skip
def test_what_is_not_named_stays(present: str, asked: str, batchnorm: bool, expected: str) -> None:
    found = merged(Plan.parse(asked), Plan.parse(present), batchnorm)
    assert found == Plan.parse(expected), str(found)
