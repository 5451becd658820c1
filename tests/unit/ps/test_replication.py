"""A chain of servers: what was acknowledged is held by all, whoever goes, and all hold the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import msgspec
import pytest
from shards import a_push, a_shard, same

from shoal.errors import DeadlineError
from shoal.ps import replication, requests
from shoal.ps.client import Client, Patience
from shoal.ps.endpoint import Endpoint, RunKeys, Serving
from shoal.ps.messages import Done, Refused
from shoal.ps.replication import Chain, ChainServer, Follow, follow, lead
from shoal.ps.requests import Ticket
from shoal.ps.shard import Shard, add_up
from shoal.ps.staleness import inverse
from shoal.ps.wire import encode

QUICK = Patience(deadline_s=60.0, retry_s=0.2)


@contextlib.contextmanager
def member(keys: RunKeys, shard: Shard, name: str, address: str = "tcp://127.0.0.1:*") -> Iterator[str]:
    """A server of a chain in a thread; its address."""
    endpoint = Endpoint(keys, address)
    server = ChainServer(shard, endpoint, keys)
    serving = Serving(server.serve, name)
    try:
        with serving:
            yield endpoint.address
    finally:
        endpoint.close()
    assert serving.error is None


def test_whoever_of_a_chain_goes_nothing_acknowledged_is_lost_and_a_replacement_joins_while_pushes_go_on():
    keys, alone = RunKeys.new(), a_shard(inverse)
    shards = [a_shard(inverse) for _ in range(5)]
    pushes = [a_push(k) for k in range(40)]
    for k, push in enumerate(pushes):
        alone.apply(dataclasses.replace(push, staleness=k % 3))
    with contextlib.ExitStack() as stack:
        leave = [contextlib.ExitStack() for _ in shards]
        at = [leave[k].enter_context(member(keys, shard, f"server {k}")) for k, shard in enumerate(shards[:3])]
        for each in leave:
            stack.enter_context(each)
        client = Client({k: at[k] for k in range(3)}, keys, QUICK)
        stack.callback(client.close)
        head = 0
        follow(client, 0, at[1])
        follow(client, 1, at[2])
        lead(client, 0)

        def send(by: Client, k: int) -> list[Ticket]:
            return by.push({head: pushes[k]}, pulled={head: k - k % 3})

        def push(ks: range) -> None:
            for k in ks:
                assert client.acknowledged(send(client, k)) == {head: k + 1}

        push(range(10))
        # All of them have what was acknowledged.
        assert [shard.version for shard in shards[:3]] == [10, 10, 10] and same(shards[0], shards[2])
        # The one in the middle goes, with a push on its way; then whoever was told is followed by the tail.
        leave[1].close()
        tickets = send(client, 10)
        hasty = Client({head: at[0]}, keys, Patience(0.5, 0.1))
        with pytest.raises(DeadlineError, match="has not answered"):
            hasty.acknowledged(send(hasty, 10))
        hasty.close()
        follow(client, 0, at[2])
        assert client.acknowledged(tickets) == {head: 11} and shards[2].version == 11
        push(range(11, 15))
        # The head goes, before it has acknowledged: its successor is the head, and the push that is sent to it again counts once.
        tickets = send(client, 15)
        leave[0].close()
        client.disconnect(0)
        client.connect(0, at[2])
        lead(client, 0)
        assert client.acknowledged(tickets) == {head: 16}
        # Two replacements join as the tail, one while pushes are on their way to the first.
        at.append(leave[3].enter_context(member(keys, shards[3], "server 3")))
        client.connect(3, at[3])
        follow(client, 0, at[3], anew=True)
        push(range(16, 25))
        at.append(leave[4].enter_context(member(keys, shards[4], "server 4")))
        follow(client, 3, at[4], anew=True)
        push(range(25, 39))
        assert same(shards[2], shards[3]) and same(shards[3], shards[4])
        # The tail goes: the one before it answers alone.
        leave[4].close()
        follow(client, 3, "")
        push(range(39, 40))
        assert same(shards[2], alone) and same(shards[3], alone)


def test_who_has_missed_a_push_gets_it_once_more_before_any_other():
    keys, first, second = RunKeys.new(), a_shard(), a_shard()
    with member(keys, first, "head") as head:
        client = Client({0: head}, keys, QUICK)
        lead(client, 0)
        with member(keys, a_shard(), "tail") as tail:
            follow(client, 0, tail)
            client.acknowledged(client.push({0: a_push(0)}))
        # Another one is at its address, and has nothing.
        with member(keys, second, "tail again", tail):
            tickets = client.push({0: a_push(1)})
            with pytest.raises(DeadlineError, match="has not answered"):
                hasty = Client({0: head}, keys, Patience(0.5, 0.1))
                try:
                    hasty.acknowledged(hasty.push({0: a_push(1)}))
                finally:
                    hasty.close()
            assert second.version == 0
            follow(client, 0, tail, anew=True)
            assert client.acknowledged(tickets) == {0: 2}
            assert same(first, second)
        client.close()


def test_a_head_that_was_given_up_and_lives_acknowledges_nothing_any_more():
    keys, first, second = RunKeys.new(), a_shard(), a_shard()
    with member(keys, first, "head") as head, member(keys, second, "successor") as successor:
        client = Client({0: head, 1: successor}, keys, QUICK)
        follow(client, 0, successor)
        lead(client, 0)
        client.acknowledged(client.push({0: a_push(0)}))

        def is_not_taken(server: int, address: str, k: int) -> None:
            hasty = Client({server: address}, keys, Patience(0.5, 0.1))
            with pytest.raises(DeadlineError, match="has not answered"):
                hasty.acknowledged(hasty.push({server: a_push(k)}))
            hasty.close()

        # Nobody but the head takes pushes, and whoever sends them elsewhere does not part the chain.
        is_not_taken(1, successor, 4)
        assert client.acknowledged(client.push({0: a_push(5)})) == {0: 2} and same(first, second)
        lead(client, 1)
        assert client.acknowledged(client.push({1: a_push(1)})) == {1: 3}
        is_not_taken(0, head, 2)
        assert client.acknowledged(client.push({1: a_push(2)})) == {1: 4}
        client.close()


def test_pushes_that_wait_for_others_survive_and_are_applied_once_whoever_of_a_chain_goes():
    keys, alone = RunKeys.new(), a_shard()
    steps = [
        [dataclasses.replace(a_push(step), ids=((0, step, part),), scale=1.0 + part) for part in (0, 1)] for step in range(5)
    ]
    for step, pushes in enumerate(steps):
        alone.apply(dataclasses.replace(add_up(pushes, alone.tables, 0.5, [{"lr": 0.02}]), settled=(0, step + 1, 0)))
    shards = [a_shard() for _ in range(4)]
    with contextlib.ExitStack() as stack:
        leave = [contextlib.ExitStack() for _ in shards]
        at = [leave[k].enter_context(member(keys, shard, f"server {k}")) for k, shard in enumerate(shards)]
        for each in leave:
            stack.enter_context(each)
        client = Client({0: at[0]}, keys, QUICK)
        others = Client(dict(enumerate(at)), keys, QUICK)
        stack.callback(client.close)
        stack.callback(others.close)
        follow(others, 0, at[1])
        lead(others, 0)

        def stage(step: int, *parts: int) -> None:
            for part in parts:
                client.acknowledged(client.push({0: steps[step][part]}, staged=True))

        def commit(step: int) -> None:
            ids = [push.ids[0] for push in steps[step]]
            assert client.commit(ids, (0, step + 1, 0), 0.5, [{"lr": 0.02}]) == {0: step + 1}

        def go_to(head: int) -> None:
            client.disconnect(0)
            client.connect(0, at[head])
            lead(client, 0)

        stage(0, 0, 1)
        commit(0)
        assert shards[1].version == 1
        # The head goes between two pushes of a step: the next one has the first of them.
        stage(1, 0)
        leave[0].close()
        go_to(1)
        stage(1, 1, 0)
        commit(1)
        # A new tail gets those that wait along with everything else, and is the head before they are applied.
        stage(2, 1, 0)
        follow(others, 1, at[2], anew=True)
        stage(2, 0)
        leave[1].close()
        go_to(2)
        commit(2)
        # The head goes when a step was applied and nobody has heard of it: it is asked for again, and done once.
        follow(others, 2, at[3], anew=True)
        stage(3, 0, 1)
        commit(3)
        leave[2].close()
        go_to(3)
        commit(3)
        stage(4, 0, 1)
        commit(4)
        assert same(shards[3], alone) and shards[3].ledger.settled == (0, 5, 0)


def test_a_slow_successor_is_sent_everything_again_later_the_more_it_is_and_once_for_all_that_it_misses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, came = [0.0], list[int]()
    monkeypatch.setattr(replication, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(requests, "_LEAST_BYTES_S", 1000.0)
    keys, shard = RunKeys.new(), a_shard()
    with contextlib.ExitStack() as stack:
        own, behind = (stack.enter_context(contextlib.closing(Endpoint(keys))) for _ in range(2))
        chain = stack.enter_context(contextlib.closing(Chain(shard, own, keys)))
        chain.follow_with(behind.address, anew=False)
        identity, sizes = b"", dict[int, int]()

        def come_until_another() -> list[int]:
            """The entries that have come, and one more that is applied now."""
            nonlocal identity
            came.clear()
            shard.apply(a_push(shard.version))
            while not came or came[-1] < chain.number:
                for who, frames in behind.receive(1.0):
                    identity = who
                    came.append(msgspec.msgpack.decode(frames[0])["number"])
                    sizes[came[-1]] = sum(frame.nbytes for frame in frames[1:])
            return came

        assert come_until_another() == [1] and come_until_another() == [2] and come_until_another() == [3]
        # It cannot take two of them, and says so of both: they come once more, and not twice.
        for answer in (Refused(2, "1 is missing", missing=True), Refused(3, "1 is missing", missing=True), Done(1, 1)):
            behind.send(identity, encode(answer))
        while chain.kept < 1:
            own.receive(1.0)
        assert come_until_another() == [1, 2, 3, 4]
        # Then it says nothing for a while: what is on the way takes its time, and each further time takes longer.
        for least_s in (1.0, 2.0, 4.0):
            on_the_way = [number for number in sizes if number > 1]
            now[0] += least_s + sum(sizes[number] for number in on_the_way) / 1000 - 0.01
            chain.attend()
            now[0] += 0.02
            assert come_until_another() == [chain.number]
            now[0] += sizes[chain.number] / 1000
            chain.attend()
            assert come_until_another() == [*on_the_way, chain.number - 1, chain.number]


def test_who_waits_for_a_copy_hears_of_it_when_it_is_whole():
    keys, first, second, third = RunKeys.new(), a_shard(), a_shard(), a_shard()
    with member(keys, first, "head") as head, member(keys, second, "copy") as copy, member(keys, third, "tail") as tail:
        client = Client({0: head, 1: copy}, keys, QUICK)
        lead(client, 0)
        for k in range(3):
            client.acknowledged(client.push({0: a_push(k)}))
        # Each has all of it as soon as this is answered, and nothing is waited for.
        follow(client, 0, copy, anew=True, whole=True)
        assert same(first, second)
        follow(client, 1, tail, anew=True, whole=True)
        assert same(first, third)
        client.acknowledged(client.push({0: a_push(3)}))
        assert third.version == 4 and same(first, third)
        # What is sent twice while it waits is begun once: the second one is answered as well.
        asked = client.send(0, lambda n: Follow(n, copy, False, True))
        client._transmit(asked)
        client.wait([asked], "a copy")
        client.acknowledged(client.push({0: a_push(4)}))
        assert same(first, third)
        client.close()
