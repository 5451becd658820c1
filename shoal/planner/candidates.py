"""Which plans are worth trying on one machine. Pure: no torch, no processes."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.plan import Plan

_LEAST_SUB_BATCH, _MOST_SUB_BATCHES = 8, 3


def local_candidates(
    wanted: Plan, cores: int, batch: int, images: bool, divisible: int | None = None
) -> list[Plan]:
    """Plans that keep what ``wanted`` says and fill in workers, threads, memory layout, and how a pipeline is gone through.

    Args:
        wanted: what the user fixed; the rest is open.
        cores: cores that the run may use.
        batch: samples in the smallest full batch; no plan has more workers.
        images: the batch holds images, so that the memory layout matters.
        divisible: into how many pieces any batch can be cut at most, the batch's samples where it is None.

    Returns complete plans, without doubles, the simplest first. Where the model is split there is just one: a trial of such
    a plan takes seconds, and the cores are best divided evenly among workers that wait for each other.
    """
    found: list[Plan] = []
    for dp in _ways(wanted, cores, batch):
        ways = {"dp": dp} if wanted.ps is None else {"workers": dp}
        asked = in_microbatches(wanted.replace(**ways), batch if divisible is None else divisible)
        threads = [wanted.threads] if wanted.threads is not None else _threads(cores, asked)
        for count in threads:
            for layout in _layouts(asked, images):
                plan = asked.replace(threads=count, layout=layout).filled()
                if plan not in found:
                    found.append(plan)
    return found


def sub_batches(samples: int) -> tuple[int, ...]:
    """Sizes worth trying for a worker that has so many samples, the largest first: halves, while a vector's worth is left."""
    sizes: list[int] = []
    size = samples
    while size >= 2 * _LEAST_SUB_BATCH and len(sizes) < _MOST_SUB_BATCHES:
        size = -(-size // 2)
        sizes.append(size)
    return tuple(sizes)


def in_microbatches(plan: Plan, batch: int) -> Plan:
    """Fill in what a pipeline needs and the plan leaves open; any other plan stays as it is.

    ``schedule`` becomes 1f1b. ``microbatches`` becomes four for each stage, of which an eighth or so of the time is lost
    (Narayanan et al. 2021: (p - 1)/(m + p - 1)), and fewer where a worker's share of the batch has not so many samples; one
    where BatchNorm is to see the whole batch. ``interleave`` becomes 2 where it matters.
    """
    pp = plan.pp or 1
    if pp == 1:
        return plan
    share = max(1, batch // (plan.data_ways * (plan.accumulate or 1)))
    pieces = 1 if plan.batchnorm == "global" else min(share, 4 * pp)
    schedule = plan.schedule or ("interleaved" if (plan.interleave or 1) > 1 else "1f1b")
    return plan.replace(
        schedule=schedule,
        microbatches=plan.microbatches or pieces,
        interleave=plan.interleave or (2 if schedule == "interleaved" else None),
    )


def _ways(wanted: Plan, cores: int, batch: int) -> list[int]:
    """How many workers could share a batch."""
    if wanted.names_axes:
        return [wanted.data_ways]
    if wanted.zero == 3:
        # Sharding was asked for, which takes several.
        return [min(max(2, cores), batch)]
    return [n for n in _powers(cores) if n <= batch]


def _powers(cores: int) -> list[int]:
    """1, 2, 4 … and the number of cores itself."""
    powers = [1]
    while powers[-1] * 2 <= cores:
        powers.append(powers[-1] * 2)
    return sorted({*powers, max(cores, 1)})


def _threads(cores: int, plan: Plan) -> list[int]:
    """All cores divided among the workers; for a single worker one thread, too: small models are slowed by more."""
    share = max(1, cores // plan.world_size)
    return [1, share] if plan.world_size == 1 and share > 1 else [share]


def _layouts(wanted: Plan, images: bool) -> Sequence[str]:
    if wanted.layout is not None:
        return [wanted.layout]
    split = wanted.world_size > wanted.data_ways or wanted.zero == 3
    return ["contiguous", "channels_last"] if images and not split else ["contiguous"]
