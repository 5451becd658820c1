"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.errors import PlanError, RequestError, did_you_mean

if TYPE_CHECKING:
    from shoal.cluster import Cluster
    from shoal.jobs.registry import Target
    from shoal.plan import Plan

TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="A shipped job, file.py:name, or package.module:name.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object; all else goes to standard error.")]
PlanOption = Annotated[
    str | None, typer.Option("--plan", metavar="PLAN", help='How to run it, such as "dp=2"; left out: auto.')
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the job: batch_size=256. May be repeated."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="The job's seed.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A .csv or .npz file or a folder of class folders, instead of the job's data; not evaluated.",
    ),
]
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="A description of machines; left out: this machine.")
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory-limit", metavar="SIZE", help="What a worker may use, such as 2GB.")
]


def _whole(text: str) -> int:
    return int(text)


def _real(text: str) -> float:
    return float(text)


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else read(text)


SETTABLE: Mapping[str, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        "batch_size": (_whole, "a whole number"),
        "epochs": (_whole, "a whole number"),
        "seed": (_whole, "a whole number"),
        "grad_clip": (_or_none(_real), "a number, or none"),
        "patience": (_or_none(_whole), "a whole number, or none"),
        "name": (str, "a name"),
        "scheduler_every": (str, '"step" or "epoch"'),
    }
)
"""The fields of a job that ``--set`` may change: how each is read, and what it expects."""


def settings(pairs: Sequence[str], seed: int | None = None) -> dict[str, Any]:
    """Return the fields that ``--set`` and ``--seed`` give.

    Raises:
        RequestError: a pair that is none, an unknown field, or a value that the field cannot hold.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise RequestError(f'--set {pair} has no value; write it as in "--set batch_size=256".')
        if key not in SETTABLE:
            near = did_you_mean(key, SETTABLE)
            raise RequestError(f'--set cannot change "{key}".{near} It can change {", ".join(SETTABLE)}.')
        read, expected = SETTABLE[key]
        try:
            found[key] = read(text)
        except ValueError:
            raise RequestError(f'--set {key}="{text}": give {expected}.') from None
    if seed is not None:
        if "seed" in found and found["seed"] != seed:
            raise RequestError(f"--seed {seed} and --set seed={found['seed']} contradict each other; leave one out.")
        found["seed"] = seed
    return found


def find_target(name: str, pairs: Sequence[str] | None, seed: int | None, data: Path | None = None) -> Target:
    """Return the job that was asked for, changed as the options say; with ``data`` it has no evaluation data."""
    changes = settings(pairs or (), seed)
    if data is not None:
        # The job's own evaluation data may be of other classes, or not even on this machine.
        changes.update(train_data=load_data(data), eval_data=None)
    from shoal.jobs.registry import find

    target = find(name)
    return dataclasses.replace(target, job=target.job.replace(**changes)) if changes else target


def load_data(path: Path) -> Any:
    """Return the data set at ``path``; DataError where there is none."""
    from shoal import data

    return data.load(path)


def parse_plan(text: str | None) -> Plan | None:
    """Return the plan that ``--plan`` gives; None where it is left out."""
    if text is None:
        return None
    if not text.strip():
        raise PlanError('--plan is empty; give a plan such as "dp=2", or auto.')
    from shoal.plan import Plan

    return Plan.parse(text)


def find_cluster(file: Path | None, memory_limit: str | None) -> Cluster | None:
    """Return the cluster that the options describe; None where this machine as it is was meant."""
    if file is None and memory_limit is None:
        return None
    from shoal.cluster import Cluster
    from shoal.cluster.cluster import parse_memory

    if file is None:
        return Cluster.local(memory_limit)
    cluster = Cluster.from_toml(file)
    if memory_limit is None:
        return cluster
    return dataclasses.replace(cluster, memory_limit_bytes=parse_memory(memory_limit))


def at_least_one(option: str, value: int | None) -> int | None:
    """Return ``value``; RequestError where it is less than 1."""
    if value is not None and value < 1:
        raise RequestError(f"{option} is {value}; give a whole number of at least 1.")
    return value
