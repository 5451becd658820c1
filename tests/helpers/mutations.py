"""Messages that are nearly right: a head of msgpack of which something is changed, frames that are cut, added or exchanged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec

_VALUES = (
    0, 1, -1, 2, 7, 1 << 31, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 0.5, float("nan"), float("inf"), -1e308, None, True, False,
    "", "x", "0", "²", "params", "rows/0/keys", "weights/0", "state.step/0", "tcp://nowhere", "float16", "complex64", "bf16",
    b"", b"\x00", [], [0], [-1, -1], [[0, 0, 0]], {}, {"lr": "x"}, {"params": []}, {"0": {"step": []}},
)  # fmt: skip


def mutated(dice: random.Random, head: bytes, frames: Sequence[Any]) -> list[bytes]:
    """The message with a few changes, of which some may leave it right."""
    parts = [head, *(bytes(frame) for frame in frames)]
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        kind = dice.random()
        if kind < 0.7:
            try:
                tree = msgspec.msgpack.decode(parts[0])
            except (msgspec.DecodeError, ValueError):
                continue
            parts[0] = msgspec.msgpack.encode(_changed(dice, tree))
        elif kind < 0.8:
            raw = bytearray(parts[0])
            for _ in range(dice.randrange(1, 4)):
                if raw:
                    raw[dice.randrange(len(raw))] = dice.randrange(256)
            parts[0] = bytes(raw[: dice.randrange(len(raw) + 1)] if dice.random() < 0.3 else raw)
        else:
            _change_frames(dice, parts)
    return parts


def _changed(dice: random.Random, tree: Any) -> Any:
    """The same with one leaf, entry or name changed somewhere."""
    if not isinstance(tree, (dict, list)) or not tree or dice.random() < 0.1:
        return dice.choice(_VALUES)
    if isinstance(tree, list):
        at, found = dice.randrange(len(tree)), list(tree)
        if dice.random() < 0.15:
            del found[at]
        elif dice.random() < 0.1:
            found.append(found[at])
        else:
            found[at] = _changed(dice, found[at])
        return found
    key, rest = dice.choice(sorted(tree, key=str)), dict(tree)
    # The tag says what it is: of another kind it would mostly be refused for its fields.
    if key == "type" and dice.random() < 0.8:
        return tree
    kind = dice.random()
    if kind < 0.1:
        del rest[key]
    elif kind < 0.2:
        rest[str(dice.choice(_VALUES))] = rest.pop(key)
    else:
        rest[key] = _changed(dice, rest[key])
    return rest


def _change_frames(dice: random.Random, parts: list[bytes]) -> None:
    if len(parts) == 1 or dice.random() < 0.2:
        parts.append(bytes(dice.randrange(20)))
        return
    at = dice.randrange(1, len(parts))
    kind = dice.randrange(5)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts[at] = parts[at][: dice.randrange(len(parts[at]) + 1)]
    elif kind == 2:
        parts[at] += bytes(dice.randrange(1, 9))
    elif kind == 3:
        other = dice.randrange(1, len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    else:
        raw = bytearray(parts[at])
        for _ in range(8):
            if raw:
                raw[dice.randrange(len(raw))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF))
        parts[at] = bytes(raw)
