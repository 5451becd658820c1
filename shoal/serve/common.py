"""What the protocols of one gateway share: the same models, limits, counts and guard, whichever way a request comes in."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.serve.catalogue import Catalogue
from shoal.serve.guard import Bodies, Guard
from shoal.serve.messages import Limits
from shoal.serve.metrics import Metrics
from shoal.serve.pace import Pace
from shoal.serve.tracing import Tracing


@dataclass(frozen=True, kw_only=True)
class Common:
    """One of each in a gateway.

    Attributes:
        guard: who looks at each request first; None where everybody may ask anything.
        bodies: all long ones that are held.
        tracing: None where no traces are kept.
        grpc_port: where gRPC is spoken too, None for nowhere.
    """

    limits: Limits
    metrics: Metrics
    catalogue: Catalogue
    guard: Guard | None
    bodies: Bodies
    pace: Pace
    tracing: Tracing | None = None
    grpc_port: int | None = None
