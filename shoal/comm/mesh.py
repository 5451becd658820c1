"""The ranks of a grid as torch's DeviceMesh, over groups that each speak through what their ranks have in common."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from shoal.comm.grid import Grid
from shoal.comm.group import Group


def make_mesh(group: Group, grid: Grid, device: str = "cpu") -> DeviceMesh:
    """The axes "dp", "pp" and "tp" that have more than one rank, over all processes of the group; all call it together."""
    ways = {name: count for name, count in (("dp", grid.dp), ("pp", grid.pp), ("tp", grid.tp)) if count > 1}
    if not ways:
        ways = {"dp": 1}
    ranks = torch.arange(grid.world_size).view(*ways.values())
    own: list[tuple[int, ...]] = []
    for axis in range(len(ways)):
        rows = [tuple(row) for row in ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist()]
        group.prepare(rows)
        own += [row for row in rows if group.rank in row]
    groups = [group.torch_group(row) for row in own]
    if len(groups) == 1:
        return DeviceMesh.from_group(groups[0], device, mesh_dim_names=tuple(ways))
    return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=tuple(ways))
