"""The chains of a run with ``replicas``: who holds which shard, who answers for it, and what follows when one of them dies.

Server n holds shard n mod S: the first S are the heads as a run begins, the others follow them in turn. When a head dies the one
behind it is the head at once. A replacement joins as the tail, and counts as soon as it has taken up everything: nobody is made
the head who lacks a push that was acknowledged.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.ps.client import Client
from shoal.ps.messages import Done, Ping
from shoal.ps.replication import Follow, Lead, follow, lead
from shoal.ps.requests import Ticket
from shoal.train.remote.members import MOST_DEATHS


@dataclass
class _Joining:
    """A server on its way into a chain; ``told``: the tail was told of it, ``ping``: how far the new one is."""

    rank: int
    told: Ticket
    ping: Ticket | None = None


class Chains:
    """The lead's view of all servers. What it tells them it does not wait for, so that another death is seen meanwhile."""

    def __init__(self, servers: int, replicas: int) -> None:
        self._servers, self.replicas = servers, replicas
        self._of = {shard: [shard + servers * copy for copy in range(replicas + 1)] for shard in range(servers)}
        self._addresses: dict[int, str] = {}
        self._told: dict[int, Ticket] = {}
        self._made_heads: dict[int, Ticket] = {}
        self._joining: dict[int, _Joining] = {}
        self._deaths: Counter[int] = Counter()
        self._client: Client | None = None

    @property
    def ranks(self) -> range:
        """The numbers of all servers."""
        return range(self._servers * (self.replicas + 1))

    @property
    def heads(self) -> dict[int, str]:
        """Of each shard, the address of the one that clients speak to."""
        return {shard: self._addresses[chain[0]] for shard, chain in self._of.items()}

    def know(self, addresses: Mapping[int, str]) -> None:
        """All servers are there."""
        self._addresses = dict(addresses)

    def moved(self, rank: int, address: str) -> None:
        """A server is somewhere else; others may be gone meanwhile, and be somewhere else later."""
        self._addresses[rank] = address

    def begin(self, client: Client) -> None:
        """The heads have what they are to have, the others nothing, and nobody is at work: each gets what the one before it has.

        ``client``: knows every server by its number.
        """
        for chain in self._of.values():
            lead(client, chain[0])
            for before, after in itertools.pairwise(chain):
                follow(client, before, self._addresses[after], anew=True, whole=True)
        self._client = client

    def has(self, shard: int, rank: int) -> bool:
        """Whether a server has all that was acknowledged of a shard."""
        return rank in self._of[shard]

    def lose(self, rank: int) -> bool:
        """A server has died; False where nobody else has all that it had."""
        shard = rank % self._servers
        chain = self._of[shard]
        if self._client is None or chain == [rank]:
            return False
        self._deaths[rank] += 1
        self._told.pop(rank, None)
        self._made_heads.pop(rank, None)
        self._client.disconnect(rank)
        joining = self._joining.get(shard)
        if rank in chain:
            at = chain.index(rank)
            chain.remove(rank)
            if not at:
                self._made_heads[chain[0]] = self._client.send(chain[0], Lead)
            if at == len(chain):
                # Whoever was about to follow it follows the one before it: see ``attend``.
                self._joining.pop(shard, None)
                self._tell(chain[-1], "")
            elif at:
                self._tell(chain[at - 1], self._addresses[chain[at]])
        elif joining is not None and joining.rank == rank:
            del self._joining[shard]
            self._tell(chain[-1], "")
        return True

    def may_begin_again(self, rank: int) -> bool:
        """A server has died before the run had begun: whether to start it again."""
        self._deaths[rank] += 1
        return self.may_return(rank)

    def may_return(self, rank: int) -> bool:
        """Whether to start a server again: not where it has died many times before it was of any use."""
        return self._deaths[rank] < MOST_DEATHS

    def attend(self, joined: Mapping[int, str]) -> list[int]:
        """Let those who are there and belong to no chain join one; who has been taken into one since the last call.

        ``joined``: the addresses of all servers that are there.
        """
        client = self._client
        if client is None:
            return []
        client.receive(0.0)
        for ticket in (*self._told.values(), *self._made_heads.values()):
            client.again(ticket)
        for rank, address in joined.items():
            shard = rank % self._servers
            # Of a plan that is over there may be some yet.
            if rank in self.ranks and rank not in self._of[shard] and shard not in self._joining:
                self._addresses[rank] = address
                client.connect(rank, address)
                self._joining[shard] = _Joining(rank, self._tell(self._of[shard][-1], address, anew=True))
        whole = [joining.rank for joining in self._joining.values() if self._is_whole(client, joining)]
        for rank in whole:
            shard = rank % self._servers
            del self._joining[shard], self._deaths[rank]
            self._of[shard].append(rank)
        return whole

    def _is_whole(self, client: Client, joining: _Joining) -> bool:
        """Whether a new server has taken up what the one before it had when it was told of it."""
        if not isinstance(joining.told.answer, Done):
            return False
        ping = joining.ping
        if ping is not None and ping.answer is None:
            client.again(ping)
            return False
        # An empty server is at 0, too, so there it takes a push to tell.
        if (
            ping is not None
            and isinstance(ping.answer, Done)
            and ping.answer.version >= max(1, joining.told.answer.version)
        ):
            return True
        joining.ping = client.send(joining.rank, Ping)
        return False

    def _tell(self, rank: int, address: str, anew: bool = False) -> Ticket:
        """Tell a server whom to hand pushes on to; only the last word counts, so no earlier one is repeated."""
        assert self._client is not None
        self._told[rank] = self._client.send(rank, lambda n: Follow(n, address, anew))
        return self._told[rank]

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
