"""A process's place in a job that something else started: torchrun, or Slurm's srun."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import RequestError


@dataclass(frozen=True)
class Member:
    """This process's place in a job that something else started.

    Attributes:
        rank, world_size: among all processes of the job.
        local_size: processes of the job on this machine.
        init_method: how torch.distributed finds the others.
    """

    rank: int
    world_size: int
    local_size: int
    init_method: str = "env://"

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Member | None:
        """What torchrun or Slurm says in the environment; None where this process stands alone.

        RequestError where they say something that is no number, or that contradicts itself.
        """
        if environ.get("RANK") and environ.get("WORLD_SIZE"):
            rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
            local = _number(environ, "LOCAL_WORLD_SIZE") if environ.get("LOCAL_WORLD_SIZE") else size
            found = cls(rank, size, local)
        elif environ.get("SLURM_PROCID") and environ.get("SLURM_NTASKS") and environ.get("SLURM_STEP_ID"):
            found = cls._of_slurm(environ)
        else:
            return None
        if not 0 <= found.rank < found.world_size:
            raise RequestError(
                f"The environment says rank {found.rank} of {found.world_size} processes; "
                "start the job with torchrun or srun."
            )
        return found if found.world_size > 1 else None

    @classmethod
    def _of_slurm(cls, environ: Mapping[str, str]) -> Member:
        rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(size)
        host = environ.get("MASTER_ADDR") or first_node(nodes)
        # Steps of one job may run side by side: each gets a port of its own, the same on all its nodes.
        job, step = environ.get("SLURM_JOB_ID", "0"), environ["SLURM_STEP_ID"]
        port = environ.get("MASTER_PORT") or str(20000 + (int(job or 0) * 61 + int(step or 0)) % 30000)
        return cls(rank, size, int(tasks.split("(")[0].split(",")[0]), f"tcp://{host}:{port}")


def shares_memory(environ: Mapping[str, str]) -> bool:
    """Whether workers on this machine meet in shared memory; ``SHOAL_TRANSPORT=group`` lets them speak instead."""
    wanted = environ.get("SHOAL_TRANSPORT") or "arena"
    if wanted not in ("arena", "group"):
        raise RequestError(f'SHOAL_TRANSPORT is "{wanted}"; set it to arena or group, or leave it out.')
    return wanted == "arena" and sys.platform == "linux" and hasattr(os, "memfd_create")


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[03-07,9],login1" -> "gpu03"."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", nodes)
    if match is None:
        raise RequestError(f'Slurm names its nodes "{nodes}", which has no first one; set MASTER_ADDR.')
    return match[1] + (re.split(r"[-,]", match[2])[0] if match[2] else "")


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise RequestError(f'{name} is "{environ[name]}" in the environment; it must be a whole number.') from None
