"""A server with a log: another one that has it and what the first began with has the same bits; a full disk loses nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from shards import a_push, a_shard, same

from shoal.errors import DeadlineError, JobFailed
from shoal.ps import messages
from shoal.ps.client import Client, Patience
from shoal.ps.endpoint import Endpoint, RunKeys, Serving
from shoal.ps.log import segments
from shoal.ps.logged import LoggedServer, Mark, Recover, TakeUp, ToldLog, do_again, read_told
from shoal.ps.messages import Done
from shoal.ps.requests import Damaged
from shoal.ps.shard import Kept, Shard, Snapshot
from shoal.ps.staged import Staged
from shoal.ps.staleness import inverse
from shoal.ps.wire import encode

QUICK = Patience(deadline_s=20.0, retry_s=5.0)


@contextlib.contextmanager
def served(
    directory: Path, shard: Shard, limit: int | None = None, take_up: TakeUp | None = None
) -> Iterator[tuple[Client, LoggedServer]]:
    keys = RunKeys.new()
    endpoint = Endpoint(keys)
    server = LoggedServer(shard, endpoint, ToldLog(directory, "server-0", endpoint, limit), take_up)
    with Serving(server.serve, "server") as serving, contextlib.closing(Client({0: endpoint.address}, keys, QUICK)) as client:
        yield client, server
    endpoint.close()
    assert serving.error is None


def recover(client: Client, mark: int) -> None:
    client.wait([client.send(0, lambda n: Recover(n, mark))], "recovery")


def stage(client: Client, k: int) -> None:
    client.acknowledged(client.push({0: a_push(k)}, staged=True))


def test_another_server_goes_on_from_the_log_with_the_same_bits(tmp_path: Path) -> None:
    first, alone = a_shard(), a_shard()
    with served(tmp_path, first) as (client, _):
        recover(client, 0)
        for k in range(4):
            assert client.acknowledged(client.push({0: a_push(k)})) == {0: k + 1}
            alone.apply(a_push(k))
        client.acknowledged(client.push({0: a_push(2)}))
        for k in (4, 5, 6):
            stage(client, k)
        client.commit([(0, 4, 0), (0, 5, 0)], (0, 0, 0), 0.5)
    second = a_shard()
    with served(tmp_path, second) as (client, _):
        recover(client, 0)
        assert same(first, second) and second.version == 5 and not same(first, alone)
        # What waited for others waits here; what is sent again counts once.
        assert client.acknowledged(client.push({0: a_push(3)})) == {0: 4}
        client.commit([(0, 6, 0)], (0, 0, 0))
        # A checkpoint holds all that there is.
        client.wait([client.send(0, lambda n: Mark(n, 9))], "a mark")
        client.acknowledged(client.push({0: a_push(7)}))
    third = a_shard()
    checkpoint = a_shard()
    with served(tmp_path, checkpoint) as (client, _):
        recover(client, 0)
        assert same(checkpoint, second)
    assert [segment.mark for segment in segments(tmp_path, "server-0")] == [0, 9]
    with served(tmp_path, third) as (client, _):
        recover(client, 9)
    assert third.version == 1 and (0, 7, 0) in third.ledger and (0, 6, 0) not in third.ledger


def test_what_is_left_out_when_a_log_is_done_again_makes_no_other_push_later_or_earlier(tmp_path: Path) -> None:
    first, second = a_shard(inverse), a_shard(inverse)
    with served(tmp_path, first) as (client, _):
        recover(client, 0)
        for k, pulled in enumerate((0, 0, 1, 0)):
            client.acknowledged(client.push({0: a_push(k)}, pulled={0: pulled}))
        # What comes again is told how it was applied, from wherever it comes.
        (again,) = client.push({0: a_push(1)}, pulled={0: 4})
        client.acknowledged([again])
        assert again.answer == Done(again.number, 2, new=False, staleness=1)
        # What says that it has seen more than there is, is of a server that has yet to be told that much again.
        client.acknowledged(client.push({0: a_push(4)}, pulled={0: 9}))
    do_again(second, Staged(second), read_told(tmp_path, "server-0", 0), lambda ids: ids != ((0, 1, 0),))
    one, two = a_shard(inverse), a_shard(inverse)
    for k, staleness in enumerate((0, 1, 1, 3, 0)):
        one.apply(replace(a_push(k), staleness=staleness))
        if k != 1:
            two.apply(replace(a_push(k), staleness=staleness))
    assert same(first, one) and same(second, two)


def test_what_is_in_a_log_and_does_not_fit_is_said_and_the_server_lives(tmp_path: Path) -> None:
    with served(tmp_path, a_shard()) as (_, server):
        head, frames = messages.pack_push(a_push(1), 1)
        server._log.append(encode(head), [*frames[:-1], bytes(3)])
    with served(tmp_path, a_shard()) as (client, _):
        with pytest.raises(JobFailed, match="does not fit the run"):
            recover(client, 0)
        assert client.ping(0) == 0


def test_a_full_disk_is_told_and_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    first = a_shard()
    with served(tmp_path, first, limit=4000) as (client, server):
        recover(client, 0)
        stage(client, 0)
        done = 0
        with pytest.raises(DeadlineError):
            client.patience = Patience(deadline_s=0.5, retry_s=5.0)
            for k in range(1, 20):
                client.acknowledged(client.push({0: a_push(k)}))
                done = k
        assert server.trouble is not None and "limit" in server.trouble and done >= 1 and first.version == done
        # Nobody who waits for a step to be applied waits for ever.
        with pytest.raises(JobFailed, match="limit"):
            client.commit([(0, 0, 0)], (0, 0, 0))
    second = a_shard()
    with served(tmp_path, second) as (client, _):
        recover(client, 0)
        assert same(first, second)
        client.commit([(0, 0, 0)], (0, 0, 0))


def test_another_server_takes_up_a_checkpoint_once_and_goes_on_behind_it(tmp_path: Path) -> None:
    first, begun = a_shard(), a_shard()
    with served(tmp_path, first) as (client, _):
        recover(client, 0)
        client.acknowledged(client.push({0: a_push(0)}))
        begun.apply(a_push(0))
        client.wait([client.send(0, lambda n: Mark(n, 1))], "a mark")
        client.acknowledged(client.push({0: a_push(1)}))
    checkpoint, second = begun.snapshot(), a_shard()

    def take_up(name: str, kept: Kept) -> None:
        if name == "changed":
            raise Damaged("changed is damaged")
        second.restore(Snapshot(kept, checkpoint.tensors))

    with served(tmp_path, second, take_up=take_up) as (client, server):
        for name, error in (("changed", Damaged), ("", JobFailed)):
            # Neither what is damaged, nor what nobody has said enough of.
            with pytest.raises(error):
                ask = partial(Recover, mark=2, checkpoint=name or "whole", since=1, kept=checkpoint.kept if name else None)
                client.wait([client.send(0, ask)], "recovery")
        number = client.send(0, lambda n: Recover(n, 2, "whole", 1, checkpoint.kept)).number
        client.wait([client.send(0, messages.Ping)], "an answer")
        assert same(first, second)
        client.acknowledged(client.push({0: a_push(2)}))
        # The same again, on its way for long: what was done since is not undone.
        again = encode(Recover(number, 2, "whole", 1, checkpoint.kept))
        client._sockets[0].send_multipart([again])
        assert client.ping(0) == 3 and not same(first, second)
        assert server._log.mark == 2
    assert [segment.mark for segment in segments(tmp_path, "server-0")] == [0, 1, 2]


def test_a_server_goes_on_in_the_log_of_another_session(tmp_path: Path) -> None:
    first, begun = a_shard(), a_shard()
    with served(tmp_path / "0001", first) as (client, server):
        recover(client, 0)
        client.acknowledged(client.push({0: a_push(0)}))
        begun.apply(a_push(0))
        for session in ("../0002", "x"):
            with pytest.raises(JobFailed, match="no session"):
                client.wait([client.send(0, lambda n: Recover(n, 1, session=session))], "a session")  # noqa: B023
        client.wait([client.send(0, lambda n: Recover(n, 1, session="0002"))], "a session")
        assert (tmp_path / "0002" / "server-0.here").exists() and server._log.directory == tmp_path / "0002"
        client.acknowledged(client.push({0: a_push(1)}))
        stage(client, 2)
    assert [segment.mark for segment in segments(tmp_path / "0002", "server-0")] == [1]
    # Behind what it had then, the new log has everything.
    with served(tmp_path / "0002", begun) as (client, _):
        recover(client, 1)
        assert same(begun, first)
        client.commit([(0, 2, 0)], (0, 0, 0))
