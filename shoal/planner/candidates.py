"""Which plans are worth trying on one machine. Pure: no torch, no processes."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.plan import Plan


def local_candidates(wanted: Plan, cores: int, batch: int, images: bool) -> list[Plan]:
    """Plans that keep what ``wanted`` says and fill in workers, threads and memory layout.

    Args:
        wanted: what the user fixed; the rest is open.
        cores: cores that the run may use.
        batch: samples in the smallest full batch; no plan has more workers.
        images: the batch holds images, so that the memory layout matters.

    Returns complete plans, without doubles, the simplest first.
    """
    ways = [wanted.data_ways] if wanted.names_axes else [n for n in _powers(cores) if n <= batch]
    found: list[Plan] = []
    for dp in ways:
        threads = [wanted.threads] if wanted.threads is not None else _threads(cores, dp)
        for count in threads:
            for layout in _layouts(wanted, images):
                plan = wanted.replace(dp=dp, threads=count, layout=layout).filled()
                if plan not in found:
                    found.append(plan)
    return found


def _powers(cores: int) -> list[int]:
    """1, 2, 4 … and the number of cores itself."""
    powers = [1]
    while powers[-1] * 2 <= cores:
        powers.append(powers[-1] * 2)
    return sorted({*powers, max(cores, 1)})


def _threads(cores: int, dp: int) -> list[int]:
    """All cores divided among the workers; for a single worker one thread, too: small models are slowed by more."""
    share = max(1, cores // dp)
    return [1, share] if dp == 1 and share > 1 else [share]


def _layouts(wanted: Plan, images: bool) -> Sequence[str]:
    if wanted.layout is not None:
        return [wanted.layout]
    return ["contiguous", "channels_last"] if images else ["contiguous"]
