"""Where a process of a plan with ``device=cuda`` computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from shoal.comm.arena import Arena, ArenaLayout
from shoal.comm.device_arena import DeviceArena
from shoal.comm.grid import Grid
from shoal.comm.group import Group
from shoal.errors import NotBuiltError, PlanError
from shoal.plan import Plan

CHUNK_BYTES = 256 << 20
"""What is updated as one on a GPU: a kernel over a large piece costs no more to start than over a small one."""
_PRETEND = "SHOAL_DEVICE_PRETEND"
"""A torch device that stands for the GPU, for testing the path where there is none: "cpu"."""


def check_device(plan: Plan) -> None:
    """PlanError where a plan asks for a GPU and there is none that torch can use."""
    if plan.device != "cuda" or os.environ.get(_PRETEND) or torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise PlanError(
            f"device=cuda needs a torch with CUDA, and torch {torch.__version__} is for processors; install one where there is "
            "an NVIDIA GPU, or leave device out."
        )
    raise PlanError("device=cuda needs an NVIDIA GPU and its driver, and torch sees none here; leave device out.")


def open_device(plan: Plan, group: Group) -> torch.device:
    """Choose this process's device, and what the processes speak through: NCCL where each has a GPU of its own.

    All processes of the group call it. PlanError where the plan cannot be run on the GPUs that there are.
    """
    check_device(plan)
    if plan.device != "cuda":
        return torch.device("cpu")
    if plan.rewrites not in (None, "auto", "none", ()):
        raise PlanError("Rewrites are for processors; leave rewrites out of a plan with device=cuda.")
    if plan.sub_batch:
        raise PlanError("sub_batch is for the caches of processors; leave it out of a plan with device=cuda.")
    pretended = os.environ.get(_PRETEND)
    if pretended:
        return torch.device(pretended)
    own = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or group.rank) % torch.cuda.device_count()
    torch.cuda.set_device(own)
    device = torch.device("cuda", own)
    torch.cuda.reset_peak_memory_stats(device)
    names = group.gather_objects(str(torch.cuda.get_device_properties(own).uuid), "the GPUs")
    if len(set(names)) == len(names):
        group.use_nccl()
    elif Grid.of(plan).splits_model:
        raise NotBuiltError(
            f"{len(names)} processes have {len(set(names))} GPUs, and a model is split only where each has its own; write "
            "dp alone, or start as many processes as there are GPUs."
        )
    return device


def make_arena(layout: ArenaLayout, device: torch.device, plan: Plan) -> Arena:
    """The memory of one process, with what is computed with on its device."""
    return Arena.private(layout) if plan.device != "cuda" else DeviceArena(layout, device)


def devices(plan: Plan, cores: int) -> int:
    """How many processes a plan that leaves its axes open can have: one for each GPU, or for each core."""
    if plan.device != "cuda":
        return cores
    return 1 if os.environ.get(_PRETEND) else torch.cuda.device_count()


def device_text(device: torch.device) -> tuple[str, ...]:
    """A sentence on the GPU that rank 0 has; none for a processor."""
    if device.type != "cuda":
        return ()
    found = torch.cuda.get_device_properties(device)
    return (f"It computes on GPUs: {found.name} with {found.total_memory / 1e9:.0f} GB.",)


def peak_mb(device: torch.device) -> float | None:
    """The most memory that torch had on a GPU in this run, in 10⁶ bytes; None for a processor."""
    return round(torch.cuda.max_memory_allocated(device) / 1e6, 1) if device.type == "cuda" else None


@contextlib.contextmanager
def full_precision(plan: Plan) -> Iterator[None]:
    """Let convolutions compute in float32 where the plan says so: by default they round to TF32 on a GPU."""
    if plan.device != "cuda" or plan.precision == "bf16":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
