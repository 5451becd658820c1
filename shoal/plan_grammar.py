"""The words of a plan string: which keys there are, what each may hold, and how text becomes values and back.

A plan string is a list of parts joined by commas. A part is ``key=value`` or one of the flags ``auto``, ``sync``
and ``async``; ``sync`` is short for ``mode=sync``. Here every key is looked at by itself; what keys say about each
other is in ``plan.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import PlanError, did_you_mean

LARGEST_COUNT = 999_999_999
FLAGS: Mapping[str, str] = {"sync": "sync", "async": "async"}
"""Words that stand for a value of ``mode``."""


class Kind:
    """What a key may hold.

    ``expects`` ends the sentence "give …". ``read`` takes the text of a plan string and ``check`` a Python value;
    both return the value as a Plan holds it and raise ValueError where it is none. ``write`` undoes ``read``.
    """

    expects: str

    def read(self, text: str) -> Any:
        return self.check(text)

    def check(self, value: Any) -> Any:
        raise NotImplementedError

    def write(self, value: Any) -> str:
        return str(value)


@dataclass(frozen=True)
class Count(Kind):
    """A whole number from ``least`` to ``most``."""

    least: int = 1
    most: int = LARGEST_COUNT

    @property
    def expects(self) -> str:  # type: ignore[override]
        if self.most != LARGEST_COUNT:
            return f"a whole number from {self.least} to {self.most}"
        return f"a whole number of at least {self.least}"

    def read(self, text: str) -> int:
        # int() alone would also take "1_000", "+2" and digits of other scripts
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(text)
        return self.check(int(text))

    def check(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self.least <= value <= self.most:
            raise ValueError(value)
        return value


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def expects(self) -> str:  # type: ignore[override]
        return " or ".join([", ".join(self.words[:-1]), self.words[-1]])

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(value)
        return value


class Switch(Kind):
    """``on`` or ``off`` in text, a bool in a Plan."""

    expects = "on or off"

    def check(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value in ("on", "off"):
            return value == "on"
        raise ValueError(value)

    def write(self, value: bool) -> str:
        return "on" if value else "off"


class Name(Kind):
    """A name from a list that is kept elsewhere, so only its letters are checked here."""

    expects = "a name in small letters, or none"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", value):
            raise ValueError(value)
        return value


class Names(Kind):
    """``auto``, ``none``, or names joined by ``+``; in a Plan ``"auto"``, ``"none"`` or a tuple of names."""

    expects = "auto, none, or names joined by +"

    def check(self, value: Any) -> str | tuple[str, ...]:
        names = tuple(value.split("+")) if isinstance(value, str) else value
        if not isinstance(names, (tuple, list)):
            raise ValueError(value)
        names = tuple(Name().check(name) for name in names)
        if not names or names == ("none",):
            return "none"
        if names == ("auto",):
            return "auto"
        if len(set(names)) != len(names) or {"auto", "none"} & set(names):
            raise ValueError(value)
        return names

    def write(self, value: str | tuple[str, ...]) -> str:
        return value if isinstance(value, str) else "+".join(value)


class Parts(Kind):
    """Whole numbers joined by ``+``; in a Plan a tuple of them."""

    expects = "a whole number of at least 1 for each worker, joined by +, such as 3+1"

    def read(self, text: str) -> tuple[int, ...]:
        return tuple(Count().read(part) for part in text.split("+"))

    def check(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            return self.read(value)
        if not isinstance(value, (tuple, list)) or not value:
            raise ValueError(value)
        return tuple(Count().check(part) for part in value)

    def write(self, value: tuple[int, ...]) -> str:
        return "+".join(str(part) for part in value)


@dataclass(frozen=True)
class Key:
    """One key: what it may hold, one plain line about it, and a value that serves as example."""

    kind: Kind
    line: str
    example: str


KEYS: Mapping[str, Key] = {
    "dp": Key(Count(), "data parallel: so many workers share each batch", "2"),
    "tp": Key(Count(), "tensor parallel: each layer is split over so many workers", "2"),
    "pp": Key(Count(), "pipeline parallel: the layers are split into so many stages", "2"),
    "zero": Key(Count(0, 3), "sharded over dp: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too", "3"),
    "cp": Key(Count(), "context parallel: reserved, not built", "2"),
    "ep": Key(Count(), "expert parallel: reserved, not built", "2"),
    "ps": Key(Count(), "parameter server: so many servers hold the weights", "2"),
    "workers": Key(Count(), "with ps: so many workers share each batch; each is tp × pp processes", "4"),
    "mode": Key(
        Choice(("sync", "async", "bounded")),
        "with ps: wait for all workers, for none, or for those too far behind; sync and async may stand alone",
        "sync",
    ),
    "staleness": Key(Count(0), "with ps: how many steps a worker may be ahead of the slowest; means mode=bounded", "3"),
    "push_every": Key(Count(), "with ps: steps between two sendings of gradients", "1"),
    "pull_every": Key(Count(), "with ps: steps between two fetchings of weights", "1"),
    "backup": Key(Count(0), "with ps and sync: so many of the workers a step need not wait for", "1"),
    "replicas": Key(Count(0), "with ps: other servers that have a copy of each server's weights; 0 none", "1"),
    "microbatches": Key(Count(), "pieces of a worker's share, sent through the pipeline or computed in turn", "4"),
    "schedule": Key(Choice(("gpipe", "1f1b", "interleaved", "zbv")), "with pp: order of forward and backward", "1f1b"),
    "interleave": Key(Count(), "with pp and schedule=interleaved or zbv: pieces of the model on each stage", "2"),
    "sequence_parallel": Key(Switch(), "with tp: what is not split by tp is split along the sequence", "on"),
    "recompute": Key(Choice(("full", "selective", "none")), "activations computed again to save memory", "none"),
    "accumulate": Key(Count(), "pieces that a worker's share is computed in before one update", "2"),
    "threads": Key(Count(), "threads of each worker", "1"),
    "device": Key(Choice(("cpu", "cuda", "mps")), "what a worker computes on", "cpu"),
    "precision": Key(Choice(("fp32", "bf16")), "as the model is, or autocast with fp32 master weights", "fp32"),
    "layout": Key(Choice(("contiguous", "channels_last")), "how images lie in memory", "channels_last"),
    "compile": Key(Switch(), "torch.compile", "off"),
    "rewrites": Key(Names(), "exact rewrites of the model for this machine", "none"),
    "shares": Key(Parts(), "parts of the batch by worker; equal where it is left out", "3+1"),
    "sub_batch": Key(Count(0), "samples that pass the network at a time, to stay in the cache; 0 all", "25"),
    "local_steps": Key(Count(0), "weights averaged every so many steps; 0 averages gradients each step", "4"),
    "codec": Key(Name(), "what makes messages between workers smaller", "none"),
    "batchnorm": Key(
        Choice(("global", "local", "micro")),
        "BatchNorm normalises over the batch, a worker's share, or a microbatch",
        "global",
    ),
    "adapt": Key(Switch(), "whether the run may change its own plan while it runs", "off"),
}
"""Every key in the order in which a plan string names it."""

GLOSSARY: Mapping[str, str] = {
    "auto": "everything that is not named is chosen by the planner (so auto alone chooses everything)",
    **{name: f"{key.line} ({key.kind.expects})" for name, key in KEYS.items()},
}
"""One plain line for each key, with its values, for ``shoal plan --help``."""


def read_text(text: str) -> dict[str, Any]:
    """Return the values that a plan string names, by key; raise PlanError for what is no plan string."""
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    if not text.strip():
        return values
    for part in (part.strip() for part in text.split(",")):
        if part == "auto":
            continue
        key, value = _split(part, text)
        if key in given:
            raise PlanError(_twice(key, given[key], part))
        given[key] = part
        values[key] = checked(key, value, from_text=True)
    return values


def write_text(values: Mapping[str, Any]) -> str:
    """Return the plan string for values by key; ``auto`` where there are none. Undoes ``read_text``."""
    return ",".join(name_value(key, values[key]) for key in KEYS if key in values) or "auto"


def name_value(key: str, value: Any) -> str:
    """Return how a plan string says one value: ``dp=2``, or ``sync`` for a mode that is a flag."""
    return value if key == "mode" and value in FLAGS else f"{key}={KEYS[key].kind.write(value)}"


def checked(key: str, value: Any, from_text: bool = False) -> Any:
    """Return a key's value as a Plan holds it; raise PlanError where it is none."""
    kind = KEYS[key].kind
    try:
        return kind.read(value) if from_text else kind.check(value)
    except ValueError:
        shown = value if from_text else repr(value)
        raise PlanError(f"{key}={shown} makes no sense; give {kind.expects}.") from None


def unknown_key(key: str, known: Iterable[str] = KEYS) -> PlanError:
    """Return the error for a key that does not exist, with the nearest ones and all."""
    words = list(known)
    return PlanError(f'A plan has no key "{key}".{did_you_mean(key, words)} The keys are {", ".join(words)}.')


def _split(part: str, text: str) -> tuple[str, str]:
    key, equals, value = (piece.strip() for piece in part.partition("="))
    if not part:
        raise PlanError(f'The plan "{text}" has an empty part; take out the comma that is too many.')
    if key in FLAGS and not equals:
        return "mode", key
    if key in FLAGS or key == "auto":
        raise PlanError(f'"{key}" takes no value; write {key} alone, not "{part}".')
    if key not in KEYS:
        raise unknown_key(key, [*KEYS, *FLAGS, "auto"])
    if not value:
        raise PlanError(f"{key} needs a value; write {key}={KEYS[key].example}, say.")
    return key, value


def _twice(key: str, first: str, second: str) -> str:
    if key == "mode" and first.split("=")[-1].strip() != second.split("=")[-1].strip():
        return f"{first} and {second} contradict each other; keep one of them."
    return f"The plan gives {key} twice ({first} and {second}); keep one of them."
