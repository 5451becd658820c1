"""L-BFGS's coordinator where servers share no memory (Sandblaster, Dean et al. 2012): it sees scalar products, and no parameter.

Each server has its pieces of all vectors. In a step the lead asks all of them for the products of these, adds them up, and says
with the word that the step is to be applied which way it goes, as hyperparameters: so logs and copies of servers have it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shoal.ps.applied import PushId
from shoal.ps.client import Client
from shoal.ps.dense import Numbers
from shoal.ps.lbfgs import PAGE, direct


class Coordinator:
    """Decides on a run's steps; ``memory``: what an optimizer has kept in a checkpoint, where there is one."""

    def __init__(self, memory: Mapping[str, Any] | None) -> None:
        found = (memory or {}).get("lbfgs")
        self._page = np.zeros(PAGE) if found is None else np.array(found, np.float64)

    def decide(self, client: Client, ids: Sequence[PushId], scale: float, groups: Sequence[Numbers]) -> tuple[Numbers, ...]:
        """The hyperparameters of a step, with which servers go where these staged pushes, times ``scale``, point to."""
        (group,) = groups
        move = direct(client.multiply(ids, scale), self._page, float(group["lr"]))
        return ({**group, **move.numbers(), "page": tuple(self._page.tolist())},)

    def memory(self, step: int) -> dict[str, Any]:
        """What is to be kept for a run that goes on at this step."""
        return {"state": {}, "common": {}, "lbfgs": self._page.tolist(), "step": step}


def went_on(memory: dict[str, Any] | None, groups: Sequence[Numbers]) -> None:
    """Bring what a checkpoint has kept to where a server has gone on from it; ``groups``: the server's hyperparameters."""
    page = groups[0].get("page") if groups else None
    if memory is not None and page is not None and any(page):
        memory["lbfgs"] = list(page)
