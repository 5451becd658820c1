"""Which stage of a pipeline owns a weight that several stages use. Pure: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def owning_stages(sizes: Mapping[str, int], uses: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return for each weight the stage that keeps its gradient and its optimizer state, and updates it.

    A tied embedding is used by the first stage and the last. It goes to the one that holds less otherwise, so that
    the largest worker is as small as it can be; the largest weights are placed first.

    Args:
        sizes: name -> bytes.
        uses: name -> the stages that use it, at least one.
    """
    held: dict[int, int] = {}
    found: dict[str, int] = {}
    shared = []
    for name, stages in uses.items():
        if len(set(stages)) > 1:
            shared.append(name)
            continue
        found[name] = stages[0]
        held[stages[0]] = held.get(stages[0], 0) + sizes[name]
    for name in sorted(shared, key=lambda name: (-sizes[name], name)):
        found[name] = min(sorted(uses[name]), key=lambda stage: held.get(stage, 0))
        held[found[name]] = held.get(found[name], 0) + sizes[name]
    return found
