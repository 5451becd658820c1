"""A Plan: how a job runs on a cluster, one number per axis. Written by the planner or by hand.

A key that is None was left out: the planner chooses it. What each key may hold is in ``plan_grammar.py``; here is
what the keys say together, what follows from them, and which of them this version runs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import NotBuiltError, PlanError
from shoal.plan_grammar import GLOSSARY, KEYS, checked, name_value, read_text, unknown_key, write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["GLOSSARY", "SERVER_KEYS", "Plan"]

_RUNS: Mapping[str, tuple[Any, ...]] = {
    "cp": (1,), "ep": (1,), "device": ("cpu", "cuda"), "codec": ("none",), "adapt": (False,),
}  # fmt: skip
"""The values that this version runs, for each key of which it does not run all. The one place to change."""

SERVER_KEYS = ("workers", "mode", "staleness", "push_every", "pull_every", "backup", "replicas")
_AXES = ("dp", "tp", "pp", "cp", "ep", "ps")
_DEFAULTS: Mapping[str, Any] = {
    "dp": 1, "tp": 1, "pp": 1, "zero": 0, "workers": 1,
    "mode": "sync", "push_every": 1, "pull_every": 1, "backup": 0, "replicas": 0,
    "sequence_parallel": False, "recompute": "none", "accumulate": 1,
    "device": "cpu", "precision": "fp32", "layout": "contiguous", "compile": False, "rewrites": "none",
    "sub_batch": 0, "local_steps": 0, "codec": "none", "batchnorm": "global", "adapt": False,
}  # fmt: skip
"""What ``filled`` puts where a key was left out: the choice that changes nothing."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """How a job runs on a cluster. Each key of a plan string is a field; None means the planner chooses.

    ``Plan.parse("dp=2,threads=1")`` reads one, ``str(plan)`` writes it, and ``Plan.parse(str(plan)) == plan`` always.
    ``GLOSSARY`` says what each key means. Keys that are ``on`` or ``off`` are bools here, ``shares`` is a tuple of
    whole numbers, ``rewrites`` is ``"auto"``, ``"none"`` or a tuple of names. ``staleness`` sets ``mode`` to
    ``"bounded"``. ``explanation`` holds sentences that say why; it takes no part in equality, hash or string.

    Raises:
        PlanError: a value that makes no sense, or keys that contradict each other.
    """

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    zero: int | None = None
    cp: int | None = None
    ep: int | None = None
    ps: int | None = None
    workers: int | None = None
    mode: str | None = None
    staleness: int | None = None
    push_every: int | None = None
    pull_every: int | None = None
    backup: int | None = None
    replicas: int | None = None
    microbatches: int | None = None
    schedule: str | None = None
    interleave: int | None = None
    sequence_parallel: bool | None = None
    recompute: str | None = None
    accumulate: int | None = None
    threads: int | None = None
    device: str | None = None
    precision: str | None = None
    layout: str | None = None
    compile: bool | None = None
    rewrites: str | tuple[str, ...] | None = None
    shares: tuple[int, ...] | None = None
    sub_batch: int | None = None
    local_steps: int | None = None
    codec: str | None = None
    batchnorm: str | None = None
    adapt: bool | None = None
    explanation: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for key, value in self.values().items():
            object.__setattr__(self, key, checked(key, value))
        if self.staleness is not None and self.mode is None:
            object.__setattr__(self, "mode", "bounded")
        object.__setattr__(self, "explanation", tuple(self.explanation))
        for sentence in _contradictions(self):
            raise PlanError(sentence)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan string; ``"auto"`` and ``""`` leave everything to the planner. Raises PlanError."""
        if not isinstance(text, str):
            raise PlanError(f'A plan string is text such as "dp=2", not {type(text).__name__}; give a string.')
        return cls(**read_text(text))

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read what ``to_toml`` wrote, the explanation included. Raises PlanError."""
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"The plan file is not valid TOML ({error}); correct it at that place.") from None
        why = values.pop("why", [])
        if not isinstance(why, list) or not all(isinstance(sentence, str) for sentence in why):
            raise PlanError("why in the plan file is not a list of sentences; give a list of strings, or leave it out.")
        for key in values:
            if key not in KEYS:
                raise unknown_key(key, [*KEYS, "why"])
        return cls(**values, explanation=tuple(why))

    def to_toml(self) -> str:
        """Return the whole plan as TOML: every key that is set, and ``why`` where there is an explanation."""
        import tomli_w

        values: dict[str, Any] = {key: list(v) if isinstance(v, tuple) else v for key, v in self.values().items()}
        if self.explanation:
            values["why"] = list(self.explanation)
        return f'# The same as --plan "{self}"\n' + tomli_w.dumps(values)

    def values(self) -> dict[str, Any]:
        """Return what was not left out, by key, in the order of the plan string."""
        return {key: value for key in KEYS if (value := getattr(self, key)) is not None}

    def replace(self, **changes: Any) -> Plan:
        """Return the plan with some fields changed; None gives a key back to the planner. Raises PlanError."""
        known = [*KEYS, "explanation"]
        for name in changes:
            if name not in known:
                raise unknown_key(name, known)
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        # staleness says the mode already, and a string should say nothing twice
        said = {key: value for key, value in self.values().items() if key != "mode" or self.staleness is None}
        return write_text(said)

    def brief(self) -> str:
        """Return the plan without the keys that are at the value which changes nothing; axes and threads always show."""
        said = {
            key: value
            for key, value in self.values().items()
            if key in ("dp", "threads", "workers") or _DEFAULTS.get(key, None) != value
        }
        said.pop("mode" if self.staleness is not None else "", None)
        return write_text(said) if said else str(self)

    def __repr__(self) -> str:
        return f'Plan.parse("{self}")'

    def why(self) -> str:
        """Return why the plan is as it is, a sentence a line."""
        if self.explanation:
            return "\n".join(self.explanation)
        if self.is_auto:
            return "Everything is left to the planner."
        return f"Nobody has explained this plan: {self} was given as it is."

    @property
    def is_auto(self) -> bool:
        """Whether nothing is named, so that the planner chooses everything."""
        return not self.values()

    @property
    def names_axes(self) -> bool:
        """Whether it says how the work is split; axes that are not named are then not used (1 way)."""
        return any(getattr(self, key) is not None for key in _AXES)

    @property
    def data_ways(self) -> int:
        """How many ways the batch is split: ``dp``, or ``workers`` with a parameter server. Raises PlanError."""
        if not self.names_axes:
            raise PlanError(f'The plan "{self}" does not say how many workers there are; add dp=2, say.')
        return (self.workers if self.ps is not None else self.dp) or 1

    @property
    def world_size(self) -> int:
        """How many processes compute gradients: data ways × tp × pp × cp (``ep`` uses the same processes again).

        Servers are not among them: see ``servers``. An axis that is not named counts as 1. Raises PlanError where
        no axis is named at all, because then only the planner can say.
        """
        return self.data_ways * (self.tp or 1) * (self.pp or 1) * (self.cp or 1)

    @property
    def servers(self) -> int:
        """How many processes hold parameters for others: ``ps``; 0 without a parameter server."""
        return self.ps or 0

    @property
    def waits_for_nobody(self) -> bool:
        """Whether each push is applied by itself (bounded, async), and not all pushes of a step together."""
        return self.ps is not None and self.mode not in (None, "sync")

    @property
    def missing(self) -> tuple[str, ...]:
        """The keys that are still to be chosen before the plan can decide every bit of a run."""
        chosen = {key for key, value in self.values().items() if (key, value) != ("rewrites", "auto")}
        return tuple(key for key in _needed(self) if key not in chosen)

    @property
    def complete(self) -> bool:
        """Whether nothing is left open that could change a bit of the result."""
        return not self.missing

    def filled(self) -> Plan:
        """Return the plan with each missing key at the value that changes nothing, where there is one.

        ``threads`` has none, and neither have ``schedule``, ``microbatches`` and ``interleave`` of a pipeline or a
        bounded mode's ``staleness``: those stay open, as do the axes where none is named. ``batchnorm`` becomes
        ``micro`` where a share is computed in pieces.
        """
        open_axes = () if self.names_axes else ("dp", "tp", "pp", "zero", "local_steps")
        changes = {key: _DEFAULTS[key] for key in self.missing if key in _DEFAULTS and key not in open_axes}
        if "mode" in changes and max(self.push_every or 1, self.pull_every or 1) > 1:
            changes["mode"] = "async"
        if "batchnorm" in changes and (self.waits_for_nobody or self.backup or changes.get("mode") == "async"):
            changes["batchnorm"] = "local"
        if "batchnorm" in changes and _in_pieces(self):
            changes["batchnorm"] = "micro"
        return self.replace(**changes)

    def require_built(self) -> None:
        """Raise NotBuiltError, naming every key whose value this version does not run."""
        lacking = {key: value for key, value in self.values().items() if key in _RUNS and value not in _RUNS[key]}
        if not lacking:
            return
        *others, last = (name_value(key, value) for key, value in lacking.items())
        parts = " and ".join([", ".join(others), last]) if others else last
        verb, pronoun = ("is", "it") if len(lacking) == 1 else ("are", "them")
        reserved = " (reserved for later)" if {"cp", "ep"} & set(lacking) else ""
        raise NotBuiltError(f"{parts} {verb} not built in this version{reserved}; leave {pronoun} out of the plan.")


def _needed(plan: Plan) -> Iterator[str]:
    """Give the keys that have to be set before the plan decides every bit."""
    if plan.ps is not None:
        yield from ("tp", "pp", "workers", "mode", "push_every", "pull_every", "backup", "replicas")
        if plan.mode == "bounded":
            yield "staleness"
    else:
        yield from ("dp", "tp", "pp", "zero", "local_steps")
    if (plan.pp or 1) > 1:
        yield from ("microbatches", "schedule")
        if plan.schedule == "interleaved":
            yield "interleave"
    if (plan.tp or 1) > 1:
        yield "sequence_parallel"
    yield from ("recompute", "accumulate", "threads", "device", "precision", "layout", "compile", "rewrites")
    yield from ("sub_batch", "codec", "batchnorm", "adapt")


def _in_pieces(plan: Plan) -> str | None:
    """Return the key by which a worker's share is computed in several pieces, or None."""
    if plan.sub_batch:
        return "sub_batch"
    return next((key for key in ("accumulate", "microbatches") if (getattr(plan, key) or 1) > 1), None)


def _contradictions(plan: Plan) -> Iterator[str]:
    """Give a sentence for each pair of keys that cannot both be meant."""
    said = {key: name_value(key, value) for key, value in plan.values().items()}
    if plan.ps is None:
        for key in SERVER_KEYS:
            if key in said and not (key == "mode" and plan.staleness is not None):
                yield f"{said[key]} belongs to a parameter server; add ps=1, or leave {said[key]} out."
    else:
        yield from _server_contradictions(plan, said)
    yield from _share_contradictions(plan, said)
    for key in ("schedule", "interleave"):
        if key in said and plan.pp is None:
            yield f"{said[key]} belongs to a pipeline; add pp=2, say, or leave {key} out."
    if (plan.interleave or 1) > 1 and plan.schedule in ("gpipe", "1f1b"):
        yield f"{said['interleave']} does not go with {said['schedule']}; write schedule=interleaved instead."
    if plan.sub_batch and (plan.pp or 1) > 1:
        yield f"{said['sub_batch']} does not go with a pipeline, whose pieces are microbatches; leave sub_batch out."
    if plan.sequence_parallel and plan.tp is None:
        yield "sequence_parallel=on belongs to tensor parallelism; add tp=2, say, or leave sequence_parallel out."
    if plan.local_steps and plan.zero:
        yield f"{said['local_steps']} lets each worker train alone and {said['zero']} shards the work; keep one."
    pieces = _in_pieces(plan)
    if pieces and plan.batchnorm == "global":
        yield f"With {said[pieces]} BatchNorm sees one piece at a time; write batchnorm=micro instead of global."


def _server_contradictions(plan: Plan, said: Mapping[str, str]) -> Iterator[str]:
    if plan.dp is not None:
        yield f"{said['dp']} does not go with {said['ps']}; with a parameter server write workers={plan.dp} instead."
    for key in ("zero", "local_steps"):
        if getattr(plan, key):
            yield f"{said[key]} updates weights in the workers and {said['ps']} in the servers; keep one of them."
    if plan.staleness is not None and plan.mode != "bounded":
        yield f"{said['staleness']} and {said['mode']} contradict each other; keep one of them."
    if plan.waits_for_nobody and plan.batchnorm == "global":
        yield f"With {said['mode']} workers do not meet; write batchnorm=local instead of global."
    if plan.backup and plan.batchnorm == "global":
        yield f"With {said['backup']} workers do not meet; write batchnorm=local instead of global."
    for key in ("push_every", "pull_every"):
        if (getattr(plan, key) or 1) > 1 and (plan.mode == "sync" or plan.backup):
            yield f"{said[key]} belongs to async or staleness; with sync every step is pushed and pulled."
    if plan.backup and plan.mode not in (None, "sync"):
        yield f"{said['backup']} only makes sense with sync, and the plan says {said['mode']}; keep one of them."
    if plan.backup and plan.backup >= (plan.workers or 1):
        yield f"{said['backup']} leaves no worker to wait for; give more workers than backup."


def _share_contradictions(plan: Plan, said: Mapping[str, str]) -> Iterator[str]:
    if plan.shares is None:
        return
    key = "workers" if plan.ps is not None else "dp"
    count = len(plan.shares)
    if getattr(plan, key) is None:
        yield f"{said['shares']} is for {count} workers and the plan does not say {key}; add {key}={count}."
    elif getattr(plan, key) != count:
        yield f"{said['shares']} has {count} parts and the plan says {said[key]}; give one part for each worker."
