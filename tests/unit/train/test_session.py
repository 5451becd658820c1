"""What a session refuses before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import RequestError
from shoal.job import Job
from shoal.train.checkpoint import Checkpoint
from shoal.train.session import refuse_another_job


def job(**changes: Any) -> Job:
    data = (torch.zeros(4, 1), torch.zeros(4, 1))
    return Job(model=torch.nn.Linear(1, 1), train_data=data, batch_size=2, seed=3).replace(**changes)


def checkpoint(**meta: Any) -> Checkpoint:
    return Checkpoint(Path("runs/one/checkpoints/step-00000004"), 4, meta)


def test_the_same_job_goes_on_for_longer() -> None:
    refuse_another_job(checkpoint(batch_size=2, seed=3), job(epochs=9))
    refuse_another_job(checkpoint(), job())


@pytest.mark.parametrize(("field", "then"), [("batch_size", 4), ("seed", 0)])
def test_a_job_whose_steps_are_others_is_refused_with_the_remedy(field: str, then: int) -> None:
    with pytest.raises(RequestError, match=rf"^runs/one was trained with {field}={then} .* --set {field}={then}"):
        refuse_another_job(checkpoint(**{"batch_size": 2, "seed": 3, field: then}), job())
