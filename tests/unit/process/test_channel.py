"""What goes from one of our processes to another."""

from __future__ import annotations

import cloudpickle
import torch

from shoal.process.channel import dumps


def named(labels: object) -> int:
    """Says torch, and names a part of it that is a module of a kind of its own."""
    return int(torch.ones(len(labels.classes)).sum())  # type: ignore[attr-defined]


def test_a_function_that_says_torch_and_classes() -> None:
    class Labels:
        classes = ("a", "b")

    sent = cloudpickle.loads(dumps((lambda labels: int(torch.ones(len(labels.classes)).sum()), Labels)))
    assert sent[0](sent[1]()) == named(Labels()) == 2
