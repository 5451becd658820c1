"""Keys that move from server to server: everything that belongs to them goes along, and nothing else travels."""

import contextlib

import pytest
import torch
from shards import PIECES, a_push, a_shard, adam

from shoal.errors import JobFailed
from shoal.ps import Adagrad
from shoal.ps.client import Client, Patience
from shoal.ps.dense import DensePart
from shoal.ps.endpoint import Endpoint, RunKeys, Serving
from shoal.ps.moving import move
from shoal.ps.placement import Placement
from shoal.ps.shard import Shard
from shoal.ps.shard_server import ShardServer
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table

KNOWN = {piece.number: piece for piece in PIECES}
SPEC = TableSpec(width=4, optimizer=Adagrad(lr=0.1), admission=2)


def placed(*numbers: int) -> Placement:
    return Placement(numbers, PIECES, [SPEC.shards])


def test_servers_come_and_go_and_all_numbers_stay_as_they_would_have_been() -> None:
    """Adam's moments, rows with their state, and what was counted of keys that have no row yet."""
    keys, like = RunKeys.new(), a_shard()
    two, three, one = placed(0, 1), placed(0, 1, 2), placed(2)
    with contextlib.ExitStack() as stack:
        shards, addresses = {}, {}
        for number, begins in ((0, two), (1, two), (2, three)):
            shards[number] = Shard(DensePart(begins.pieces_of(number), adam), {0: Table.create(SPEC)})
            endpoint = Endpoint(keys)
            stack.callback(endpoint.close)
            stack.enter_context(Serving(ShardServer(shards[number], endpoint, pieces=KNOWN).serve, f"server {number}"))
            addresses[number] = endpoint.address
        client = Client(addresses, keys, Patience(deadline_s=60.0))
        stack.callback(client.close)

        def push(k: int, placement: Placement) -> None:
            whole = a_push(k)
            like.apply(whole)
            # What a server has nothing of it is told of as well.
            parts = placement.split(whole.ids, whole.dense, whole.rows, step=k, scale=whole.scale, groups=whole.groups)
            client.acknowledged(client.push(parts))

        for k in range(3):
            push(k, two)
        grown = move(client, two, three, (0, 3, 0))
        assert grown.of == len(PIECES) + 64 and grown.version == 3 and shards[2].version == 3
        assert grown.keys == sum(two.server_of[n] != three.server_of[n] for n in KNOWN) + sum(
            two.server_of_shard(0, k) != three.server_of_shard(0, k) for k in range(64)
        )
        for number, shard in shards.items():
            assert set(shard.dense.pieces) == {piece.number for piece in three.pieces_of(number)}
            held = shard.tables[0].export().keys
            assert set(three.servers_of(0, held)) <= {number} and shard.ledger.settled == (0, 3, 0)
        # What was sent before counts nowhere once more, whoever has its keys now.
        assert client.acknowledged(client.push(three.split(((0, 1, 0),), {}, {}, step=1))) == {0: 3, 1: 3, 2: 3}
        for k in range(3, 6):
            push(k, three)
        shrunk = move(client, three, one, (0, 6, 0))
        assert shrunk.rows > 0 and shrunk.nbytes > 0 and shrunk.version == 6
        push(6, one)
        found, expected = shards[2].snapshot().tensors, like.snapshot().tensors
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
        # Where nothing has another place, nothing goes anywhere.
        assert move(client, one, one, (0, 7, 0)).nbytes == 0

        with pytest.raises(JobFailed, match="no shards"):
            client.hold(2, [0], {0: (64,)})
        with pytest.raises(JobFailed, match="cannot hold other pieces"):
            client.hold(2, [99], {})
        assert torch.equal(shards[2].snapshot().tensors["weights/0"], found["weights/0"])
