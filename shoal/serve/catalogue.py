"""The models of a gateway: who answers for each, whether they are ready, what they have done. Knows no protocol's bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np

from shoal.errors import did_you_mean
from shoal.serve.desk import Desk
from shoal.serve.messages import Told
from shoal.serve.protocols import v2
from shoal.serve.refusals import Refusal
from shoal.serve.shelf import Shelf, compare, numbers_of
from shoal.serve.slots import Outcome
from shoal.serve.ticket import Outputs

_FRESH_S = 1.0
_PROBE_S = 2.0
# A version that comes in is asked while the one before it answers: it may take its time.
_FIRST_ANSWER_S = 30.0
_PROBE_TOLERANCE, _PROBE_TOLERANCE_CHEAP = 1e-3, 3e-2
_LOAD_S = 300.0


class Catalogue:
    """What every protocol asks of models.

    ``shelves``: the versions of each model, by its name; ``unavailable``: models that are not loaded, and why; ``draining``:
    nothing more is taken in.
    """

    def __init__(self, ask: Callable[[str, bool, dict[str, Any]], Awaitable[Told]]) -> None:
        """``ask``: how the supervisor is asked to load (or not) a model, with parameters."""
        self.shelves: dict[str, Shelf] = {}
        self.unavailable: dict[str, str] = {}
        self.draining = False
        self._ask = ask
        self._probing: dict[Desk, asyncio.Task[Outputs]] = {}

    def desk(self, name: str, version: str | None = None) -> Desk:
        """Who answers a request for a model; without a version the one that its shelf picks. Refusal where nobody does."""
        shelf = self.shelves.get(name)
        desk = None if shelf is None else shelf.pick() if version is None else shelf.versions.get(version)
        if desk is not None:
            return desk
        if shelf is not None and version is not None:
            raise Refusal(404, f"{name} has the version {', '.join(shelf.versions)}, not {version[:40]}.")
        if shelf is not None or name in self.unavailable:
            raise Refusal(404, f"The model {name} is not loaded.")
        raise Refusal(
            404, f'There is no model "{name[:80]}".{did_you_mean(name[:80], self.shelves)} There is {", ".join(self.shelves)}.'
        )

    def has(self, desk: Desk) -> bool:
        """Whether a version is still there; who picked it a while ago may come too late."""
        shelf = self.shelves.get(desk.signature.name)
        return shelf is not None and shelf.versions.get(desk.signature.version) is desk

    async def infer(
        self, desk: Desk, request: v2.InferRequest, slo_s: float, abandoned: Callable[[], bool] = lambda: False,
        arrived_s: float | None = None,
    ) -> Outputs:  # fmt: skip
        """Outputs of a request, see ``Desk.infer``; where another version is tried as a shadow, it is asked the same."""
        if request.parts:
            return await self._infer_parts(desk, request.parts, slo_s, abandoned, arrived_s)
        began_s = time.monotonic() if arrived_s is None else arrived_s
        outputs = await desk.infer(request, slo_s, abandoned, arrived_s)
        shelf = self.shelves.get(desk.signature.name)
        if shelf is not None and shelf.trial is not None:
            shelf.mirror(desk, request, outputs, time.monotonic() - began_s)
        return outputs

    async def _infer_parts(
        self, desk: Desk, parts: Sequence[v2.InferRequest], slo_s: float, abandoned: Callable[[], bool],
        arrived_s: float | None,
    ) -> Outputs:  # fmt: skip
        """Each part is a request of its own to the model, so that equal lengths are computed together."""
        asked = (self.infer(desk, part, slo_s, abandoned, arrived_s) for part in parts)
        found = await asyncio.gather(*asked, return_exceptions=True)
        answers: list[Outputs] = []
        for one in found:
            if isinstance(one, BaseException):
                raise one
            answers.append(one)
        outputs = Outputs(np.concatenate(arrays) for arrays in zip(*answers, strict=True))
        outputs.update = min(one.update for one in answers)
        return outputs

    def desks(self) -> dict[str, Desk]:
        """Who answers for each model."""
        return {name: shelf.active for name, shelf in self.shelves.items() if shelf.active is not None}

    def index(self) -> list[dict[str, str]]:
        """Every version and its state, as the protocol's model repository extension has it."""
        rows = [
            {"name": name, "version": version, "state": "UNAVAILABLE" if version in shelf.leaving else "READY", "reason": ""}
            for name, shelf in self.shelves.items()
            for version in shelf.versions
        ]
        return rows + [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": reason}
            for name, reason in self.unavailable.items()
        ]

    def statistics(self, names: Iterable[str], version: str | None = None) -> list[dict[str, Any]]:
        """Of every version of some models, or of the one version, as the protocol has them; shoal's own under ``shoal``."""
        found = []
        for name in names:
            shelf = self.shelves[name]
            for desk in shelf.versions.values():
                if version in (None, desk.signature.version):
                    found.append(_statistics_of(desk))
                    if desk is shelf.active and shelf.trial is not None:
                        found[-1]["shoal"]["trial"] = shelf.trial.numbers()
        return found

    async def change(self, name: str, load: bool, parameters: dict[str, Any]) -> None:
        """Load a model anew from where it came from, or unload it; Refusal where that does not work."""
        try:
            told = await asyncio.wait_for(self._ask(name, load, parameters), _LOAD_S)
        except asyncio.TimeoutError:
            raise Refusal(504, f"The model was not loaded within {_LOAD_S:g} s.") from None
        if told.sentence is not None:
            raise Refusal(told.status, told.sentence)

    async def ready(self, desks: Sequence[Desk | None]) -> None:
        """Return when every model has just answered, a client or, where none asked within the last second, us; else Refusal."""
        if self.draining or not desks:
            why = "" if self.draining else "".join(f" {name}: {reason}." for name, reason in self.unavailable.items())
            raise Refusal(503, f"The service is not ready.{why}", 1.0)
        for desk in desks:
            if desk is None:
                raise Refusal(503, "A model is being unloaded.", 1.0)
            if time.monotonic() - desk.last_answer_s > _FRESH_S:
                await self._probe(desk)

    async def _probe(self, desk: Desk) -> None:
        """Ask for a sample; those who want to know at the same time share one inference, for anybody may ask."""
        asked = self._probing.get(desk)
        if asked is None:
            asked = asyncio.get_running_loop().create_task(desk.infer(_sample_request(desk, _PROBE_S), _PROBE_S))
            self._probing[desk] = asked
            asked.add_done_callback(lambda task: (self._probing.pop(desk, None), task.cancelled() or task.exception()))
        await asyncio.shield(asked)


def _sample_request(desk: Desk, within_s: float) -> v2.InferRequest:
    rows = tuple(np.frombuffer(raw, spec.dtype).reshape(1, *spec.shape[1:])
                 for raw, spec in zip(desk.sample, desk.signature.inputs, strict=True))  # fmt: skip
    return v2.InferRequest(id="", inputs=rows, rows=1, wanted=(), timeout_s=within_s, priority=0, uncached=True,
                           own=True)  # fmt: skip


async def probe(desk: Desk) -> str | None:
    """Ask a version for its sample through its queue; None where the right answer came, else what was wrong."""
    try:
        found = await desk.infer(_sample_request(desk, _FIRST_ANSWER_S), _FIRST_ANSWER_S)
    except Refusal as refusal:
        return refusal.sentence
    specs = desk.signature.outputs
    wanted = [
        np.frombuffer(raw, spec.dtype).reshape(values.shape)
        for raw, spec, values in zip(desk.expected, specs, found, strict=True)
    ]
    difference, _ = compare(desk.signature, wanted, found)
    numbers = [numbers_of(spec, values) for spec, values in zip(specs, wanted, strict=True)]
    largest = max((float(np.abs(values.astype("f8")).max()) for values in numbers if values.size), default=0.0)
    # Another number of threads adds up in another order, in bf16 with three digits.
    exact = desk.precision.get("name", "fp32") == "fp32"
    if difference > (_PROBE_TOLERANCE if exact else _PROBE_TOLERANCE_CHEAP) * max(1.0, largest):
        return f"The first answer is {difference:.3g} away from what the model computes outside the queue."
    return None


def _statistics_of(desk: Desk) -> dict[str, Any]:
    """A model's statistics as the protocol has them, and shoal's own under ``shoal``."""
    times, counts = desk.times, desk.slots.counts
    failed = sum(int(counts[o]) for o in (Outcome.FAILED, Outcome.EXPIRED, Outcome.CANCELLED))
    total_ns = times.queue_ns + times.compute_ns
    none = {"count": 0, "ns": 0}
    batches = [
        {"batch_size": size, "compute_input": none, "compute_infer": {"count": count, "ns": ns}, "compute_output": none}
        for size, (count, ns) in sorted(times.by_batch.items())
    ]
    return {
        "name": desk.signature.name, "version": desk.signature.version, "last_inference": int(time.time() * 1000),
        "inference_count": times.rows, "execution_count": times.batches,
        "inference_stats": {
            "success": {"count": times.requests, "ns": total_ns}, "fail": {"count": failed, "ns": 0},
            "queue": {"count": times.requests, "ns": times.queue_ns}, "compute_input": none,
            "compute_infer": {"count": times.requests, "ns": times.compute_ns}, "compute_output": none,
            "cache_hit": {"count": times.hits, "ns": times.hit_ns}, "cache_miss": {"count": times.misses, "ns": 0},
        },
        "batch_stats": batches,
        "shoal": desk.numbers(),
    }  # fmt: skip
