"""How the ranks of a run are arranged: along the data, pipeline and tensor axes.

The ranks that compute one share of the batch together, each a part of the model, are a *replica*. What one rank holds of
the model it holds as an *owner*: ranks of different replicas with the same part are one owner, and divide the work of
updating it among themselves. With sharded weights (``zero=3``) every rank is an owner of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.plan import Plan


@dataclass(frozen=True)
class Place:
    """Where a rank is on each axis, from 0."""

    data: int
    stage: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """dp × pp × tp ranks; the tensor axis is the innermost, since its ranks speak most often.

    ``sharded``: weights and gradients are cut along the data axis, too. ``servers``: processes beside the ranks that update
    the weights in their place. ``spare_stripes``: gradients of the whole model that there is room for beyond one a replica.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    sharded: bool = False
    servers: int = 0
    spare_stripes: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Grid:
        """The grid that a plan names."""
        # A single worker on the data axis has nobody to share with.
        sharded = plan.zero == 3 and plan.data_ways > 1
        return cls(plan.data_ways, plan.pp or 1, plan.tp or 1, sharded, plan.ps or 0)

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def updaters(self) -> int:
        """How many processes divide the updates among themselves: the servers, or all ranks where there are none."""
        return self.servers or self.world_size

    @property
    def splits_model(self) -> bool:
        """Whether a rank holds only a part of the model."""
        return self.pp > 1 or self.tp > 1 or self.sharded

    def place(self, rank: int) -> Place:
        rest, tensor = divmod(rank, self.tp)
        data, stage = divmod(rest, self.pp)
        return Place(data, stage, tensor)

    def rank(self, data: int, stage: int = 0, tensor: int = 0) -> int:
        return (data * self.pp + stage) * self.tp + tensor

    @property
    def team_size(self) -> int:
        """How many ranks need each other within a step's computation: a replica; all, where weights are sharded."""
        return self.world_size if self.sharded else self.pp * self.tp

    def team(self, rank: int) -> tuple[int, ...]:
        """The ranks that a rank needs within a step's computation, itself among them."""
        first = rank // self.team_size * self.team_size
        return tuple(range(first, first + self.team_size))

    @property
    def owners(self) -> int:
        """How many different parts of the model there are."""
        return self.pp * self.tp * (self.dp if self.sharded else 1)

    def owner(self, rank: int) -> int:
        """Which part a rank holds."""
        place = self.place(rank)
        part = place.stage * self.tp + place.tensor
        return part * self.dp + place.data if self.sharded else part

    def owner_at(self, stage: int, tensor: int, data: int = 0) -> int:
        return self.owner(self.rank(data, stage, tensor))

    def ranks_of(self, owner: int) -> tuple[int, ...]:
        """The ranks that hold a part, in order: they divide its update."""
        return tuple(rank for rank in range(self.world_size) if self.owner(rank) == owner)

    def along_data(self, rank: int) -> tuple[int, ...]:
        """The ranks at the same place of every replica, in order."""
        place = self.place(rank)
        return tuple(self.rank(data, place.stage, place.tensor) for data in range(self.dp))

    @property
    def stripes(self) -> int:
        """How many gradients of the whole model there is room for: sharded ones come added up already."""
        return (1 if self.sharded else self.dp) + self.spare_stripes

    def stripe(self, rank: int) -> int:
        """The stripe that a rank's gradients go to."""
        return 0 if self.sharded else self.place(rank).data
