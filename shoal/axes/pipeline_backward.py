"""A backward pass in two parts: first the gradients of a stage's inputs, later those of its weights.

As in Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2, and by the method of torch's own
``torch.distributed.pipelining._backward``: the nodes of the graph on the way from the outputs to the inputs are the *spine*.
Going down it, the gradients that reach a spine node from which a weight branches off are kept; later the branches are gone
down from there. Unlike torch's, the second part goes through ``torch.autograd.backward``, so that hooks of the parameters
see their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge


@dataclass(eq=False)
class _Branch:
    """Some weights, and the spine nodes at which their gradients branch off."""

    weights: list[torch.Tensor]
    nodes: list[Any]
    arrived: dict[int, Any] = field(default_factory=dict)

    def go_down(self, retain_graph: bool) -> None:
        edges, gradients = [], []
        for place, node in enumerate(self.nodes):
            for index, gradient in enumerate(self.arrived.get(place, ())):
                if gradient is not None:
                    edges.append(GradientEdge(node, index))
                    gradients.append(gradient)
        if not edges:
            return
        # A node that lies below another of the same branch must not get what comes down the spine a second time.
        handles = []
        if len(self.nodes) > 1:
            for place, node in enumerate(self.nodes):
                if place in self.arrived:
                    handles.append(node.register_prehook(_always(self.arrived[place])))
        try:
            torch.autograd.backward(edges, gradients, inputs=self.weights, retain_graph=retain_graph)
        finally:
            for handle in handles:
                handle.remove()


def input_gradients(
    outputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    inputs: Sequence[torch.Tensor],
    weights: Iterable[torch.Tensor],
) -> tuple[list[torch.Tensor | None], Callable[[], None]]:
    """Return the gradients of ``inputs``, and a function that later adds the weights' to their ``grad``.

    Where the two cannot be told apart (there are no inputs, or a weight's way to the outputs goes past the spine), all is
    computed at once and the function does nothing, or everything is left to the function.
    """
    weights = [weight for weight in weights if weight.requires_grad]
    if not inputs:
        return [], lambda: torch.autograd.backward(outputs, gradients)
    branches = _branches([t.grad_fn for t in outputs], [_end_of(t) for t in inputs], weights)
    if branches is None:
        torch.autograd.backward(outputs, gradients)
        found = [tensor.grad for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        return found, lambda: None
    handles = [
        node.register_prehook(_keep(branch, place)) for branch in branches for place, node in enumerate(branch.nodes)
    ]
    try:
        found = list(torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()

    # A weight that is used at several places goes down the spine between them once more, so it must still be there.
    retain_graph = any(len(branch.nodes) > 1 for branch in branches)

    def rest() -> None:
        while branches:
            branches.pop().go_down(retain_graph)

    return found, rest


def _keep(branch: _Branch, place: int) -> Callable[[Any], None]:
    def keep(gradients: Any) -> None:
        branch.arrived[place] = gradients

    return keep


def _always(gradients: Any) -> Callable[[Any], Any]:
    return lambda _: gradients


def _end_of(leaf: torch.Tensor) -> Any:
    """The node that takes a leaf's gradient."""
    return leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def _branches(roots: Sequence[Any], ends: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[_Branch] | None:
    above: dict[Any, list[Any]] = {}
    waiting = [root for root in roots if root is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for below, _ in node.next_functions:
            if below is not None:
                above.setdefault(below, []).append(node)
                if below not in seen:
                    seen.add(below)
                    waiting.append(below)
    spine = _upwards(ends, above, set())[0]
    if any(root is not None and root not in spine for root in roots):
        return None
    found: list[_Branch] = []
    by_node: dict[Any, _Branch] = {}
    for weight in weights:
        end = _end_of(weight)
        if end not in seen:
            continue
        branch = _Branch([weight], [])
        for node in _upwards([end], above, spine)[1]:
            other = by_node.get(node)
            if other is None:
                branch.nodes.append(node)
            elif other is not branch:
                branch.weights += other.weights
                branch.nodes += other.nodes
                found.remove(other)
                by_node.update(dict.fromkeys(other.nodes, branch))
            by_node[node] = branch
        found.append(branch)
    return found


def _upwards(starts: Sequence[Any], above: dict[Any, list[Any]], stops: set[Any]) -> tuple[set[Any], list[Any]]:
    """All nodes above some, and those of ``stops`` that were reached, beyond which the way is not followed."""
    found = set(starts)
    reached: dict[Any, None] = {}
    waiting = list(starts)
    while waiting:
        for node in above.get(waiting.pop(), ()):
            if node in stops:
                reached[node] = None
            elif node not in found:
                found.add(node)
                waiting.append(node)
    return found, list(reached)
