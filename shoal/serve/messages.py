"""What the service's supervisor, its gateway and its replicas say to each other; descriptors travel beside the messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shoal.serve.credentials import TlsFiles
from shoal.serve.guard import Access
from shoal.serve.signature import ModelSignature
from shoal.serve.slots import SlotLayout


class Edition(NamedTuple):
    """One version of one model."""

    model: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a gateway lets in.

    Attributes:
        slo_s: the deadline of a request that brings none, in seconds from its arrival.
        body_bytes: the longest body.
        body_s: how long a client may take to send it.
        bodies_bytes: of all bodies together that are being read or answered.
        access: who may ask, and how often.
    """

    slo_s: float = 0.05
    body_bytes: int = 32 << 20
    body_s: float = 10.0
    bodies_bytes: int = 512 << 20
    access: Access = Access()


@dataclass(frozen=True)
class Open:
    """Supervisor to gateway, first of all; the listening socket comes along.

    ``tls``: what to speak TLS with, None for HTTP. ``grpc``: the address at which to speak gRPC too, None for nowhere.
    """

    limits: Limits
    url: str
    tls: TlsFiles | None = None
    grpc: str | None = None


@dataclass(frozen=True, kw_only=True)
class AddModel:
    """Supervisor to gateway: here is a version of a model; ``Take`` gives it requests.

    Descriptors: the slots, the eventfd of what is done. ``measured_s``: seconds for a batch, by its size. ``sample``: one row of
    each input, to ask with whether it works; ``expected``: the row of each output that has to come back.
    ``tokenizer``: path of what turns texts into rows.
    ``precision``: how it is computed, and what else was tried (``Precision.describe``).
    ``cache_bytes``: how much of its answers to remember, for ``cache_ttl_s`` seconds each; 0: nothing.
    ``live``: its weights follow a run.
    """

    signature: ModelSignature
    layout: SlotLayout
    measured_s: dict[int, float]
    why: str
    sample: tuple[bytes, ...]
    expected: tuple[bytes, ...]
    tokenizer: str | None = None
    precision: dict[str, Any] = field(default_factory=dict)
    cache_bytes: int = 0
    cache_ttl_s: float = 300.0
    live: bool = False

    @property
    def edition(self) -> Edition:
        return Edition(self.signature.name, self.signature.version)


@dataclass(frozen=True)
class Probe:
    """Supervisor to gateway: ask this version for its sample, through its queue. Answered by ``Probed``."""

    edition: Edition


@dataclass(frozen=True)
class Probed:
    """Gateway to supervisor: the answer was right, or what was wrong."""

    edition: Edition
    trouble: str | None


@dataclass(frozen=True)
class Take:
    """Supervisor to gateway: this version gets its model's requests from now on: all, a share, or copies of all (``shadow``)."""

    edition: Edition
    share: float = 1.0
    shadow: bool = False


@dataclass(frozen=True)
class Retire:
    """Supervisor to gateway: this version gets nothing new. ``Retired`` follows when it has finished what it had."""

    edition: Edition


@dataclass(frozen=True)
class Retired:
    """Gateway to supervisor: nobody uses this version's memory any more."""

    edition: Edition


@dataclass(frozen=True)
class Asked:
    """Gateway to supervisor: a client wants a model loaded anew, or unloaded. Answered by ``Told``."""

    number: int
    model: str
    load: bool
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """Supervisor to gateway: what became of what a client asked; ``sentence`` is None where it worked."""

    number: int
    sentence: str | None
    status: int = 200


@dataclass(frozen=True)
class Known:
    """Supervisor to gateway: models that are not loaded now, and why."""

    unavailable: dict[str, str]


@dataclass(frozen=True)
class ReplicaUp:
    """Supervisor to gateway: this replica takes batches. Descriptor: the eventfd that wakes it."""

    edition: Edition
    rank: int


@dataclass(frozen=True)
class ReplicaDown:
    """Supervisor to gateway: this replica is dead; take back what it had. Answered by ``Released``."""

    edition: Edition
    rank: int


@dataclass(frozen=True)
class ReplicaLeave:
    """Supervisor to gateway: give this replica nothing more. Answered by ``ReplicaLeft`` when it has finished what it had."""

    edition: Edition
    rank: int


@dataclass(frozen=True)
class ReplicaLeft:
    """Gateway to supervisor: nobody uses this replica any more."""

    edition: Edition
    rank: int


@dataclass(frozen=True)
class Released:
    """Gateway to supervisor: nothing of the dead replica's ring is in use any more."""

    edition: Edition
    rank: int


@dataclass(frozen=True)
class Processes:
    """Supervisor to gateway: who there is, for ``GET /processes``."""

    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Drain:
    """Supervisor to gateway: take nothing more in, finish what is there within so many seconds, then say ``Drained``."""

    within_s: float


@dataclass(frozen=True)
class Drained:
    """Gateway to supervisor: every accepted request has its outcome."""


@dataclass(frozen=True)
class Opened:
    """Gateway to supervisor: it answers on the socket."""


@dataclass(frozen=True)
class Numbers:
    """Gateway to supervisor, twice a second: what the display shows of each model."""

    models: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Attach:
    """Supervisor to replica: serve this ring. Descriptors: the slots, the eventfd to wait on, the eventfd to say done with.

    ``gentle``: measure at the lowest priority, because others are answering meanwhile.
    """

    layout: SlotLayout
    ring: int
    threads: int
    batches: tuple[int, ...]
    budget_s: float
    gentle: bool


@dataclass(frozen=True)
class Attached:
    """Replica to supervisor: ready, with the measured seconds of a batch by its size."""

    measured_s: dict[int, float]


@dataclass(frozen=True)
class FollowRun:
    """Supervisor to a process that keeps weights current with a run (``serve/live.py``). Descriptor: the slots.

    ``within_s``: how long to wait for its first word.
    """

    layout: SlotLayout
    run: Path
    within_s: float


@dataclass(frozen=True)
class Skipped:
    """That process to the supervisor: weights were not taken, and why."""

    sentence: str


@dataclass(frozen=True)
class Lost:
    """That process to the supervisor: the run publishes nothing more, or cannot be heard, and why. ``ended``: it has said so."""

    reason: str
    ended: bool = False
