"""Doing without torch._dynamo: the same bits, and nothing of it is left once somebody imports it. In processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

_BEGIN = """
import sys
import torch
from shoal.process.late_dynamo import NAME, LateDynamo

OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adamax", "LBFGS")

def train(name):
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters())
    x = torch.randn(4, 3)
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss
    for _ in range(3):
        optimizer.step(closure)
        optimizer.load_state_dict(optimizer.state_dict())
    assert torch.is_grad_enabled()
    return model.weight.detach()

def operator(name):
    @torch.library.custom_op(f"shoal_test::{name}", mutates_args=(), device_types="cpu")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x
    return twice

def marked():
    return [f for f in vars(torch.optim.Optimizer).values() if hasattr(getattr(f, "__wrapped__", None), "__dynamo_disable")]
"""

_WITHOUT_AND_WITH = _BEGIN + """
theirs = torch._disable_dynamo
before = operator("before")
late = LateDynamo()
assert late.active and len(marked()) > 0
light = {name: train(name) for name in OPTIMIZERS}
assert all(before(torch.ones(1)) == operator(f"after{k}")(torch.ones(1)) == 2 for k in range(2))
assert torch.cat([torch.ones(1, device="meta")] * 2).shape == (2,)
assert NAME not in sys.modules

# A user's own compiling imports it, and finds torch as torch is.
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
def double(x):
    return x + x
assert torch.equal(torch.compile(double, backend=backend)(torch.ones(2)), torch.full((2,), 2.0))
assert NAME in sys.modules and len(graphs) == 1
assert not late.active and marked() == [] and torch._disable_dynamo is theirs
for name in OPTIMIZERS:
    assert torch.equal(light[name], train(name)), name
assert len(marked()) > 0, "torch marks what it has told torch._dynamo of"
assert LateDynamo().active is False
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
torch.compile(optimizer.step, backend=backend)()
assert len(graphs) > 1
"""

_ANOTHER_TORCH = _BEGIN + """
step = torch.optim.SGD.step
def another(function):
    def step(*args, **kwargs):
        return function(*args, **kwargs)
    return step
module = sys.modules[torch.optim.Optimizer.__module__]
module._use_grad_for_differentiable = another
disable, torch._disable_dynamo = torch._disable_dynamo, None
late = LateDynamo()
assert torch.optim.SGD.step is step and marked() == [] and late not in sys.meta_path
torch._disable_dynamo = disable
late = LateDynamo()
assert torch.optim.SGD.step is step and len(marked()) > 0
train("SGD")
assert NAME in sys.modules and not late.active
"""


def _run(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_all_is_the_same_without_it_and_as_torch_made_it_with_it() -> None:
    _run(_WITHOUT_AND_WITH)


def test_a_torch_that_is_written_in_another_way_is_left_alone() -> None:
    _run(_ANOTHER_TORCH)
