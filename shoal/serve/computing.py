"""How the replicas of a model compute it: what was chosen, of what, and why. No torch here: the supervisor reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shoal.serve.tolerance import Distance

AS_IT_IS, CHANNELS_LAST = "as it is", "channels last"
"""How pictures lie in memory."""
FP32 = "fp32"
"""The name of the precision of a model that is computed as it is."""


@dataclass(frozen=True)
class Candidate:
    """A way to compute the model that was tried: how fast it was and how far off, or why it was not taken."""

    name: str
    speedup: float | None = None
    cosine: float | None = None
    max_error: float | None = None
    refused: str | None = None

    def __str__(self) -> str:
        if self.speedup is None or self.cosine is None or self.max_error is None:
            return f"{self.name}: {self.refused}"
        off = Distance(self.cosine, self.max_error)
        return f"{self.name}: {self.speedup:.2f} × as fast, {off}" + (f", {self.refused}" if self.refused else "")


@dataclass(frozen=True)
class Precision:
    """What was chosen, of what, and by which rows. ``name`` is ``fp32`` where the model is computed as it is."""

    name: str = FP32
    tolerance: str = "none"
    rows: str = ""
    tried: tuple[Candidate, ...] = ()

    def describe(self) -> dict[str, Any]:
        """For statistics and metadata."""
        return {**asdict(self), "tried": [asdict(one) for one in self.tried]}

    def __str__(self) -> str:
        tried = "; ".join(map(str, self.tried))
        return f"{self.name} within {self.tolerance} on {self.rows} ({tried})"
