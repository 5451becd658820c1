"""A server's state machine, and speaking to it over sockets."""

import contextlib
import threading
import time

import numpy as np
import pytest
import torch

from shoal.errors import DeadlineError, JobFailed, RequestError
from shoal.ps import SGD, Adagrad, messages
from shoal.ps.applied import Applied, PartlyApplied
from shoal.ps.client import Client, NotStaged, Patience
from shoal.ps.dense import DensePart, cut
from shoal.ps.endpoint import Endpoint, RunKeys, Serving
from shoal.ps.placement import Placement
from shoal.ps.shard import Push, RowGradients, Shard
from shoal.ps.shard_server import ShardServer
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table
from shoal.ps.wire import encode

PIECES = cut("w", (100,), torch.float32, 0, 0, True, most_bytes=160)
SPEC = TableSpec(width=4, optimizer=Adagrad(lr=0.1), admission=2)


def adam(parameters):
    return torch.optim.Adam([{"params": [p for _, p in parameters]}], lr=0.1)


def sgd(parameters):
    return torch.optim.SGD([{"params": [p for _, p in parameters]}], lr=0.5, momentum=0.9)


def a_shard(optimizer=adam, pieces=PIECES, spec=SPEC) -> Shard:
    return Shard(DensePart(pieces, optimizer), {0: Table.create(spec)})


def a_push(k: int, pieces=PIECES) -> Push:
    stream = torch.Generator().manual_seed(k)
    keys = np.unique(np.arange(6) * (k % 4 + 1))
    rows = RowGradients(keys, np.ones(len(keys), np.uint32), torch.randn(len(keys), 4, generator=stream))
    dense = {p.number: torch.randn(p.numel, generator=stream) for p in pieces if (p.number + k) % 3}
    return Push(ids=((0, k, 0),), step=k, dense=dense, rows={0: rows}, scale=0.5, groups=[{"lr": 0.1 / (1 + k)}])


def state_of(shard: Shard) -> dict[str, torch.Tensor]:
    return shard.snapshot().tensors


def same(a: Shard, b: Shard) -> bool:
    left, right = state_of(a), state_of(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left) and a.version == b.version


def test_the_ledger_knows_each_push_once_and_forgets_what_nobody_will_send_again():
    ledger = Applied()
    ledger.add([(0, 0, 0), (0, 0, 1)])
    assert ledger.has([(0, 0, 0)]) and ledger.has([(0, 0, 0), (0, 0, 1)]) and not ledger.has([(0, 1, 0)])
    with pytest.raises(PartlyApplied):
        ledger.has([(0, 0, 1), (0, 1, 0)])
    ledger.settle((0, 1, 0))
    assert len(ledger) == 0 and ledger.has([(0, 0, 5)]) and not ledger.has([(0, 1, 0)])
    ledger.settle((0, 0, 0))
    assert ledger.settled == (0, 1, 0)


def test_a_push_counts_once_and_its_update_is_the_optimizers_own():
    shard, alone = a_shard(sgd), torch.nn.Parameter(torch.zeros(100))
    plain = torch.optim.SGD([alone], lr=0.5, momentum=0.9)
    for k in range(3):
        gradient = torch.randn(100)
        parts = {p.number: gradient[p.start : p.stop] for p in PIECES}
        for again in range(3):
            assert shard.apply(Push(ids=((0, k, 0),), dense=parts, scale=0.5)) == (not again)
        alone.grad = gradient * 0.5
        plain.step()
    assert shard.version == 3
    assert torch.equal(torch.cat(list(shard.pull().values())), alone.detach())


def test_a_snapshot_goes_on_to_the_same_bits():
    first, second = a_shard(), a_shard()
    for k in range(4):
        first.apply(a_push(k))
    second.restore(first.snapshot())
    assert same(first, second) and not second.apply(a_push(3))
    for k in range(4, 8):
        first.apply(a_push(k))
        second.apply(a_push(k))
    assert same(first, second)


def test_pieces_and_rows_move_to_another_shard_with_their_state():
    whole, left = a_shard(), a_shard(pieces=PIECES[:1])
    for k in range(3):
        whole.apply(a_push(k))
    left.dense.take_up(PIECES[1:])
    left.merge(whole.snapshot())
    assert left.version == 0
    kept = state_of(left)
    assert all(torch.equal(kept[name], tensor) for name, tensor in state_of(whole).items())
    left.dense.give_up([0])
    assert 0 not in left.pull() and set(left.pull()) == {p.number for p in PIECES[1:]}


def test_what_was_counted_of_keys_without_a_row_goes_along_with_its_shards():
    first, second = a_shard(), a_shard()
    first.apply(a_push(1))
    table, other = first.tables[0], second.tables[0]
    counted = {shard: table.export_sketch((shard,)) for shard in range(SPEC.shards)}
    there = [shard for shard, sketch in counted.items() if sketch is not None and sketch.any()]
    assert len(there) > 3
    moved = (there[3], there[0], there[2])
    second.merge(first.snapshot((), {0: moved}))
    for shard in range(SPEC.shards):
        found = other.export_sketch((shard,))
        assert np.array_equal(found, counted[shard]) if shard in moved else not found.any()


def test_what_does_not_belong_here_changes_nothing():
    shard, before = a_shard(), a_shard()
    bad = a_push(1)
    wrong = [
        Push(ids=(), dense={}), Push(ids=((0, 0, 0),), dense={99: torch.zeros(3)}),
        Push(ids=((0, 0, 0),), dense={0: torch.zeros(3)}), Push(ids=((0, 0, 0),), rows={7: bad.rows[0]}),
        Push(ids=((0, 0, 0),), scale=float("nan")), Push(ids=((0, 0, 0),), dense={0: torch.ones(40)}, groups=[{"lr": "x"}]),
    ]  # fmt: skip
    for push in wrong:
        with pytest.raises(RequestError):
            shard.apply(push)
    for dense, rows in (({0: torch.full((40,), float("nan"))}, {}), ({0: torch.ones(40)}, {0: RowGradients(
        np.array([1]), np.ones(1, np.uint32), torch.full((1, 4), float("inf")))})):  # fmt: skip
        with pytest.raises(JobFailed, match="not finite"):
            shard.apply(Push(ids=((0, 0, 0),), dense=dense, rows=rows))
    shard.on_apply = lambda push: (_ for _ in ()).throw(JobFailed("the disk is full"))
    with pytest.raises(JobFailed, match="disk"):
        shard.apply(bad)
    assert same(shard, before)


@contextlib.contextmanager
def servers(count: int, optimizer=sgd):
    """So many servers in threads, and the placement of what they hold."""
    keys, placement = RunKeys.new(), Placement(range(count), PIECES, [SPEC.shards])
    with contextlib.ExitStack() as stack:
        found = {}
        for number in range(count):
            spec = TableSpec(width=4, optimizer=SGD(lr=1.0))
            shard = a_shard(optimizer, placement.pieces_of(number), spec)
            endpoint = Endpoint(keys)
            stack.callback(endpoint.close)
            server = ShardServer(shard, endpoint)
            stack.enter_context(Serving(server.serve, f"server {number}"))
            found[number] = server
        client = Client({n: s.endpoint.address for n, s in found.items()}, keys, Patience(deadline_s=60.0))
        stack.callback(client.close)
        yield found, client, placement, keys


def gathered(client: Client) -> torch.Tensor:
    weights = torch.zeros(100)

    def write(number: int, data: memoryview) -> None:
        piece = PIECES[number]
        weights[piece.start : piece.stop] = torch.frombuffer(data, dtype=torch.float32)

    client.pull(write, anew=True)
    return weights


def test_pushes_and_pulls_go_through_sockets_and_count_once_however_often_they_are_sent():
    with servers(2) as (found, client, placement, _):
        gradient, keys = torch.arange(100.0), np.arange(40)
        rows = {0: RowGradients(keys, np.ones(40, np.uint32), torch.ones(40, 4))}
        first = {n: client.pull_rows(0, {s: keys[at] for s, at in placement.servers_of(0, keys).items()}, 0, 4, torch.float32)
                 for n in (0,)}[0]  # fmt: skip
        dense = {p.number: gradient[p.start : p.stop] for p in PIECES}
        parts = placement.split(((0, 0, 0),), dense, rows, step=0)
        tickets = [client.push(parts) for _ in range(9)]
        assert all(client.acknowledged(t) == {0: 1, 1: 1} for t in tickets)
        assert torch.equal(gathered(client), -0.5 * gradient)
        after = client.pull_rows(0, {s: keys[at] for s, at in placement.servers_of(0, keys).items()}, 0, 4, torch.float32)
        assert all(torch.allclose(after[s], first[s] - 1.0) for s in first)
        # Nothing is sent again where nothing has changed.
        seen: list[int] = []
        assert client.pull(lambda number, data: seen.append(number)) == {0: 1, 1: 1} and not seen
        assert sum(len(server.shard.ledger) for server in found.values()) == 2


def test_staged_pushes_are_applied_together_or_not_at_all():
    with servers(2) as (found, client, placement, _):
        ids = [(0, 0, shard) for shard in range(3)]
        gradients = [torch.randn(100, generator=torch.Generator().manual_seed(k)) for k in range(3)]
        for id, g in list(zip(ids, gradients, strict=True))[:2]:
            dense = {p.number: g[p.start : p.stop] for p in PIECES}
            client.acknowledged(client.push(placement.split((id,), dense, {}, step=0), staged=True))
        with pytest.raises(NotStaged):
            client.commit(ids, (0, 0, 0))
        assert not gathered(client).any()
        dense = {p.number: gradients[2][p.start : p.stop] for p in PIECES}
        client.acknowledged(client.push(placement.split((ids[2],), dense, {}, step=0), staged=True))
        total = gradients[0] + gradients[1] + gradients[2]
        assert client.norm_squared(ids) == pytest.approx(float(total.double().norm() ** 2))
        assert client.commit(ids, (0, 1, 0), scale=0.1) == {0: 1, 1: 1} == client.commit(ids, (0, 1, 0), scale=0.1)
        assert torch.allclose(gathered(client), -0.05 * total)
        assert not any(server.staged._pushes for server in found.values())


def test_many_threads_pushing_at_once_lose_nothing_and_see_no_half_of_a_push():
    with servers(2) as (found, client, placement, keys):
        addresses = {n: s.endpoint.address for n, s in found.items()}
        torn = []

        def work(worker: int) -> None:
            own = Client(addresses, keys, Patience(deadline_s=60.0, retry_s=0.05))
            one = {p.number: torch.ones(p.numel) for p in PIECES}
            for k in range(20):
                # Two workers send the same pushes, as one that does another's work again.
                parts = placement.split(((0, k, worker // 2),), one, {}, step=k)
                tickets = own.push(parts)
                weights = gathered(own)
                for server in placement.servers:
                    values = torch.cat([weights[p.start : p.stop] for p in placement.pieces_of(server)])
                    torn.extend([] if bool((values == values[0]).all()) else [(worker, k, server)])
                own.acknowledged(tickets)
            own.close()

        threads = [threading.Thread(target=work, args=(w,)) for w in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not torn and [s.shard.version for s in found.values()] == [40, 40]


def test_a_stranger_and_a_stranger_message_get_nothing():
    with servers(1) as (found, client, _, keys):
        endpoint = found[0].endpoint
        stranger = Client({0: endpoint.address}, RunKeys(keys.server, RunKeys.new().member), Patience(0.6, 0.2))
        with pytest.raises(DeadlineError, match="Server 0 has not answered"):
            stranger.ping(0)
        deadline = time.monotonic() + 60
        while not endpoint.refused:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stranger.close()
        for k in range(300):
            client._sockets[0].send_multipart([bytes([k % 256]) * (k % 50), b"x" * k])
        for shards in ([99999], [-1]):
            client._sockets[0].send_multipart([encode(messages.Take(0, None, {"0": tuple(shards)}))])
        assert client.ping(0) == 0 and endpoint.dropped == 300


def test_a_server_that_comes_back_at_its_address_is_spoken_to_again_and_the_same_push_counts_once():
    keys = RunKeys.new()
    endpoint = Endpoint(keys)
    address = endpoint.address
    shard = a_shard(sgd)
    client = Client({0: address}, keys, Patience(deadline_s=60.0, retry_s=0.1))
    push = {0: Push(ids=((0, 0, 0),), dense={p.number: torch.ones(p.numel) for p in PIECES})}
    with Serving(ShardServer(shard, endpoint).serve, "first"):
        client.acknowledged(client.push(push))
    kept = shard.snapshot()
    endpoint.close()
    tickets = client.push(push)
    again = a_shard(sgd)
    again.restore(kept)
    endpoint = Endpoint(keys, address)
    with Serving(ShardServer(again, endpoint).serve, "second"):
        assert client.acknowledged(tickets) == {0: 1}
        assert torch.equal(gathered(client), torch.full((100,), -0.5))
    client.close()
    endpoint.close()


def test_an_address_in_use_is_said_in_one_sentence():
    keys = RunKeys.new()
    endpoint = Endpoint(keys)
    with pytest.raises(RequestError, match="choose another port"):
        Endpoint(keys, endpoint.address)
    endpoint.close()



def test_a_push_that_comes_late_moves_less_and_its_optimizer_is_as_before():
    factors = {0: 1.0, 3: 0.25, 4: float("nan")}
    late = Shard(DensePart(PIECES, sgd), {0: Table.create(TableSpec(width=4, optimizer=SGD(lr=1.0)))}, factors.__getitem__)
    plain = Shard(DensePart(PIECES, sgd), {0: Table.create(TableSpec(width=4, optimizer=SGD(lr=1.0)))})
    keys, dense = np.arange(3), {p.number: torch.ones(p.numel) for p in PIECES}
    rows = {0: RowGradients(keys, np.ones(3, np.uint32), torch.ones(3, 4))}
    first = plain.pull_rows(0, keys)
    assert torch.equal(late.pull_rows(0, keys), first)
    pushed = [Push(ids=((0, k, 0),), dense=dense, rows=rows, staleness=s) for k, s in enumerate((3, 0, None))]
    late.apply(pushed[0])
    plain.apply(pushed[0])
    # Rates are scaled, whatever an optimizer remembers of a gradient is not.
    assert all(torch.equal(late.pull()[n], plain.pull()[n] / 4) for n in plain.pull())
    assert torch.equal(late.pull_rows(0, keys), first - 0.25) and torch.equal(plain.pull_rows(0, keys), first - 1.0)
    assert late.dense.groups == plain.dense.groups
    for push in pushed[1:]:
        late.apply(push)
        plain.apply(push)
    assert all(torch.allclose(late.pull()[n] - plain.pull()[n], torch.full((p.numel,), 0.375)) for n, p in enumerate(PIECES))
    before = late.snapshot().tensors
    for staleness, said in ((4, "is nan"), (5, "has failed with KeyError")):
        with pytest.raises(JobFailed, match=f"for a staleness of {staleness} {said}"):
            late.apply(Push(ids=((0, 9, 0),), dense=dense, staleness=staleness))
    assert late.version == 3 and all(torch.equal(tensor, before[name]) for name, tensor in late.snapshot().tensors.items())
