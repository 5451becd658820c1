"""Whoever has a run's keys and says what is malformed ends no server: it is dropped or refused, and others are served as ever."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import msgspec
import pytest
import torch
import zmq
from mutations import mutated
from shards import PIECES, a_push, a_shard

from shoal.ps import messages
from shoal.ps.client import Client, Patience
from shoal.ps.endpoint import Endpoint, RunKeys, Serving
from shoal.ps.logged import LoggedServer, Mark, Recover, ToldLog
from shoal.ps.replication import Adopt, ChainServer, Follow, Forward, Together, follow, lead
from shoal.ps.shard import Shard, Snapshot
from shoal.ps.shard_server import ShardServer
from shoal.ps.watch import ReadPiece, Watch
from shoal.ps.wire import encode

COUNT = 400


def of_a_client(shard: Shard, k: int) -> list[tuple[bytes, list[bytes]]]:
    """Right messages of every kind."""
    pushes = [messages.pack_push(a_push(k + at), 1, staged=at > 0) for at in (0, 1)]
    kept, tensors, frames = messages.pack_snapshot(shard.snapshot())
    ids = ((0, k + 1, 0),)
    heads = [
        *((head, frames) for head, frames in pushes),
        (messages.Put(number=2, kept=kept, tensors=tensors, whole=bool(k % 2)), frames),
        (messages.Norm(number=3, ids=ids), []), (messages.Multiply(number=3, ids=ids, scale=0.5), []),
        (messages.Commit(number=4, ids=ids, groups=({"lr": 0.1},)), []),
        (messages.Multiply(number=4, ids=ids, scale=1.0), []), (messages.Pull(5), []),
        (messages.PullRows(6, 0, 2), [bytes(16)]),
        (messages.Take(7, (0, 1), {"0": (0, 5)}), []), (messages.Take(8), []), (messages.Ping(9), []),
        (messages.Hold(number=10, pieces=(0, 1), row_shards={"0": (0, 5)}, version=3, settled=(0, 1, 0)), []),
        (Watch(10, 1), []), (ReadPiece(11, 0, 3, False, 0), []),
    ]  # fmt: skip
    return [(encode(head), [bytes(frame) for frame in frames]) for head, frames in heads]


def of_a_chain(snapshot: Snapshot, k: int) -> list[tuple[bytes, list[bytes]]]:
    (push, frames), (waiting, further) = (messages.pack_push(a_push(k + at), 0, staged=at > 0) for at in (0, 1))
    kept, tensors, held = messages.pack_snapshot(snapshot)
    heads = [
        (Forward(number=k, push=push), frames), (Forward(number=k, push=waiting), further),
        (Together(number=k, ids=((0, k, 0),), settled=(0, 0, 0), scale=1.0, groups=None), []),
        (Adopt(number=k, kept=kept, tensors=tensors, waiting=(waiting,)), [*held, *further]),
        (Follow(3, "tcp://127.0.0.1:9", bool(k % 2)), []),
    ]  # fmt: skip
    return [(encode(head), [bytes(frame) for frame in frames]) for head, frames in heads]


def of_a_log(k: int) -> list[tuple[bytes, list[bytes]]]:
    return [(encode(Recover(1, k % 2)), []), (encode(Mark(2, k % 5)), [])]


def hear(rogue: zmq.Socket[bytes], number: int, serving: Serving) -> None:
    """Wait until all that was said has been heard."""
    rogue.rcvtimeo = 1000
    rogue.send_multipart([encode(messages.Ping((1 << 40) + number))])
    until, heard = time.monotonic() + 100, -1
    while heard != (1 << 40) + number:
        assert serving.error is None and time.monotonic() < until, serving.error
        with contextlib.suppress(zmq.Again):
            heard = msgspec.msgpack.decode(rogue.recv_multipart()[0])["number"]


@pytest.mark.parametrize("kind", ["alone", "chain", "logged"])
def test_what_is_malformed_ends_no_server(kind: str, tmp_path: Path) -> None:
    keys, shard, like = RunKeys.new(), a_shard(), a_shard()
    endpoint = Endpoint(keys)
    server: ShardServer
    if kind == "chain":
        server = ChainServer(shard, endpoint, keys)
    elif kind == "logged":
        server = LoggedServer(shard, endpoint, ToldLog(tmp_path, "server-0", endpoint, None))
    else:
        server = ShardServer(shard, endpoint)
    dice = random.Random(5)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rogue = keys.dealer(context, 0)
    rogue.connect(endpoint.address)
    client = Client({0: endpoint.address}, keys, Patience(60.0, 2.0))
    for push in (a_push(1), a_push(2)):
        like.apply(push)
    begun = like.snapshot()
    right = [of_a_client(like, k) for k in range(8)]
    with Serving(server.serve, kind) as serving:
        for k in range(COUNT):
            known = right[k % 8]
            if isinstance(server, ChainServer):
                # As one that has heard no client: a head takes no entries.
                known = of_a_chain(begun, dice.choice((k % 40, server.chain.number + 1))) + known[5:]
            if kind == "logged" and k % 50 == 0:
                known = of_a_log(k)
            rogue.send_multipart(mutated(dice, *dice.choice(known)))
            if k % 100 == 0:
                # Where nobody reads, answers are thrown away, also the last.
                hear(rogue, k, serving)
                if kind == "chain":
                    follow(client, 0, "")
                client.ping(0)
                assert serving.error is None
        hear(rogue, COUNT, serving)
        if kind == "chain":
            follow(client, 0, "")
            lead(client, 0)
        assert endpoint.dropped > COUNT // 10
        # A right client is served, and has the right bits.
        client.put(0, begun, whole=True)
        client.acknowledged(client.push({0: a_push(41)}))
        like.apply(a_push(41))
        found = client.take(0).tensors
        expected = like.snapshot().tensors
        for piece in PIECES:
            for name in (f"{part}/{piece.number}" for part in ("weights", "state.exp_avg", "state.exp_avg_sq", "state.step")):
                assert torch.equal(found[name], expected[name]), name
    assert serving.error is None
    client.close()
    rogue.close(linger=0)
    context.term()
    endpoint.close()
